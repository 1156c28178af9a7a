"""Who is let in, and how many at a time; who is not is refused before anything else is done for it.

Under an overload most of what a gateway does is to refuse, so a refusal must cost next to nothing. It is decided where a
request is first seen: outside of all that the API does, and where the gateway itself listens (behind HAProxy) already outside
of what Ray Serve puts around a request, which costs more than ours. Serve takes such a middleware from the function that
`CALLBACK_VARIABLE` names.
A stranger is told 401 there too, before it is counted: it takes no room from those who are known, and is told the same at
every load. To look for a token costs microseconds.
"""

import asyncio
import json
import re
import uuid
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import structlog
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.auth import TokenScope
from serving.callers import Callers
from serving.room import Room

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "serving.admission:middlewares"

RETRY_AFTER_SECONDS = 1
OVERLOADED = "overloaded"
UNAUTHORIZED = "unauthorized"

SCOPES = "cllmr.scopes"
"""Under which a request that was let in carries what its caller may do."""

_TELL_SECONDS = 1.0  # refusals are told together: a log line for each would cost as much as the refusal
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_TO_SERVE = frozenset(
    (b"serve-multiplexed-model-id", b"x-session-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
)
_OPEN_PATHS = ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/ui")
_OPEN_BELOW = ("/docs/assets/", "/ui/", "/-/")  # the last is Serve's own, by which HAProxy asks whether a replica lives

log = structlog.get_logger()


def path_of(scope: Scope) -> str:
    """A request's path below where the application is mounted."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def is_open(path: str) -> bool:
    """Whether a path is health, documentation or the page: neither counted nor refused, nor in need of a token."""
    return path in _OPEN_PATHS or path.startswith(_OPEN_BELOW)


def has_request_id(scope: Scope) -> bool:
    """Whether a request came with an id."""
    return any(name == b"x-request-id" for name, _ in scope["headers"])


def request_id(scope: Scope) -> str:
    """The caller's own id where that may stand in answers and logs, else a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


class Refusal(NamedTuple):
    """Why somebody is not let in: an answer, less what all answers have."""

    status: int
    code: str
    message: str
    hint: str
    header: tuple[bytes, bytes] | None = None


class Admission:
    """Decides who is let in, and counts the requests that are worked on.

    Args:
        room: for how many at a time; more are refused. None: any number is let in.
        model_version: of the latest answer, which refusals carry as all answers do.
        told: how many were too many since it was told last.
        callers: who is known; strangers are refused and not counted.
    """

    def __init__(
        self,
        room: Room | None = None,
        model_version: Callable[[], str] = lambda: "",
        told: Callable[[int], None] = lambda number: None,
        callers: Callers | None = None,
    ) -> None:
        self.room = room
        self.working = 0
        self.model_version = model_version
        self.callers = callers or Callers()
        self._told = told
        self._refused: Counter[str] = Counter()

    def refusal(self, scopes: frozenset[TokenScope]) -> Refusal | None:
        """The answer to one more request, None where it is let in; counts refusals.

        Args:
            scopes: what its caller may do.
        """
        refusal = self._decided(scopes)
        if refusal is not None:
            if not self._refused:
                asyncio.get_running_loop().call_later(_TELL_SECONDS, self._tell)
            self._refused[refusal.code] += 1
        return refusal

    def _decided(self, scopes: frozenset[TokenScope]) -> Refusal | None:
        if self.callers.must_be_known and not scopes:
            challenge = (b"www-authenticate", b"Bearer") if self.callers.tokens.are_needed else None
            return Refusal(401, UNAUTHORIZED, *self.callers.wanted(), challenge)
        if self.room is not None and self.working >= self.room.now:
            self.room.refused()
            message, hint = f"more than {self.room.now} at a time were asked.", f"Try again in {RETRY_AFTER_SECONDS} s."
            return Refusal(503, OVERLOADED, message, hint, (b"retry-after", str(RETRY_AFTER_SECONDS).encode()))
        return None

    def _tell(self) -> None:
        refused, self._refused = self._refused, Counter()
        for code, number in refused.items():
            log.warning("requests refused", code=code, number=number, working=self.working, room=self.room and self.room.now)
        if refused[OVERLOADED]:
            self._told(refused[OVERLOADED])


class Door:
    """ASGI middleware that asks an `Admission`; of two around one request the outer one decides.

    Args:
        app: what requests are let in to.
        admission: whom to ask; None: everybody is let in.
        is_first: whether nobody has seen a request before; else one that has an id got it from Ray Serve, which answers it.
    """

    def __init__(self, app: ASGIApp, admission: Callable[[], Admission | None], is_first: bool = False) -> None:
        self._app, self._admission, self._is_first = app, admission, is_first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        admission = self._admission()
        if admission is None or scope["type"] != "http" or SCOPES in scope or is_open(path_of(scope)):
            await self._app(scope, receive, send)
            return
        scopes = admission.callers.scopes(scope)
        if (refusal := admission.refusal(scopes)) is not None:
            await self._refuse(scope, send, refusal, admission.model_version())
            return
        scope[SCOPES] = scopes
        admission.working += 1
        try:
            await self._app(scope, receive, send)
        finally:
            admission.working -= 1

    async def _refuse(self, scope: Scope, send: Send, refusal: Refusal, model_version: str) -> None:
        name = request_id(scope)
        told = {"code": refusal.code, "message": refusal.message, "hint": refusal.hint, "request_id": name}
        body = json.dumps(told).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-model-version", model_version.encode("ascii", "backslashreplace")),
        ]
        if self._is_first or not has_request_id(scope):
            headers.append((b"x-request-id", name.encode()))
        if refusal.header is not None:
            headers.append(refusal.header)
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


_of_this_process: Admission | None = None


class Unheard:
    """ASGI middleware for what Ray Serve is told by headers: by nobody but us.

    From clients it would take a deadline, a session and a request id as they come: one that is no UTF-8 ends in a 500 of its
    own, and an id that may not stand in answers and logs would be in both.
    Where the gateway listens itself, Serve is told not to look out for a client that goes away: that takes two tasks for every
    request, and an answer takes milliseconds.
    """

    def __init__(self, app: ASGIApp, admission: Callable[[], Admission | None]) -> None:
        self._app, self._admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            ids = [value for name, value in scope["headers"] if name == b"x-request-id"]
            is_named = len(ids) == 1 and _REQUEST_ID.fullmatch(ids[0])
            unheard = _TO_SERVE if is_named else _TO_SERVE | {b"x-request-id"}
            headers = [header for header in scope["headers"] if header[0].replace(b"_", b"-") not in unheard]
            if self._admission() is not None:
                headers.append((b"x-request-disconnect-disabled", b"?1"))
            scope["headers"] = headers
        await self._app(scope, receive, send)


def keep(admission: Admission) -> None:
    """Makes an admission known to the server that listens in this process; a gateway has its process for itself."""
    global _of_this_process
    _of_this_process = admission


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around everything, see `CALLBACK_VARIABLE`; where no gateway is, as in its proxy, all are let in."""
    return [
        Middleware(Unheard, admission=lambda: _of_this_process),
        Middleware(Door, admission=lambda: _of_this_process, is_first=True),
    ]
