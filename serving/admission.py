"""How many requests a gateway works on at a time; what is more is refused before anything else is done for it.

Under an overload most of what a gateway does is to refuse, so a refusal must cost next to nothing. It is decided where a
request is first seen: outside of all that the API does, and where the gateway itself listens (behind HAProxy) already outside
of what Ray Serve puts around a request, which costs more than ours. Serve takes such a middleware from the function that
`CALLBACK_VARIABLE` names.
So under an overload who is not known here is told 503 as all are, and 401 when there is room: to look for a token or read a
certificate first would make every refusal dearer, for whoever it is, and 503 tells a stranger no more than a slow answer does.
"""

import asyncio
import json
import re
import uuid
from collections.abc import Callable

import structlog
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "serving.admission:middlewares"

RETRY_AFTER_SECONDS = 1
OVERLOADED = "overloaded"

_TELL_SECONDS = 1.0  # refusals are told together: a log line for each would cost as much as the refusal
_ADMITTED = "cllmr.admitted"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_OPEN_PATHS = ("/healthz", "/readyz", "/docs", "/openapi.json", "/ui")
_OPEN_FILES = ("/docs/assets/", "/ui/")
_SERVES_OWN = "/-/"  # by which HAProxy asks whether a replica lives

log = structlog.get_logger()


def path_of(scope: Scope) -> str:
    """A request's path below where the application is mounted."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def is_open(path: str) -> bool:
    """Whether a path is health, documentation or the page: neither refused nor in need of a token."""
    return path in _OPEN_PATHS or path.startswith(_OPEN_FILES)


def request_id(scope: Scope) -> str:
    """The caller's own id where that may stand in answers and logs, else a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


class Admission:
    """Counts the requests that are worked on.

    Args:
        most: at a time; more are refused.
        model_version: of the latest answer, which refusals carry as all answers do.
        told: how many were refused since it was told last.
    """

    def __init__(
        self, most: int, model_version: Callable[[], str] = lambda: "", told: Callable[[int], None] = lambda number: None
    ) -> None:
        self.most = most
        self.working = 0
        self._model_version, self._told = model_version, told
        self._refused = 0

    async def refuse(self, scope: Scope, send: Send) -> None:
        """Answers with 503 and when to come again."""
        if not self._refused:
            asyncio.get_running_loop().call_later(_TELL_SECONDS, self._tell)
        self._refused += 1
        name = request_id(scope)
        message, hint = f"more than {self.most} at a time were asked.", f"Try again in {RETRY_AFTER_SECONDS} s."
        body = json.dumps({"code": OVERLOADED, "message": message, "hint": hint, "request_id": name}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"retry-after", str(RETRY_AFTER_SECONDS).encode()),
            (b"x-request-id", name.encode()),
            (b"x-model-version", self._model_version().encode("ascii", "backslashreplace")),
        ]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _tell(self) -> None:
        number, self._refused = self._refused, 0
        log.warning("requests refused", number=number, working=self.working, most=self.most)
        self._told(number)


class Door:
    """ASGI middleware that asks an `Admission`; of two around one request the outer one decides.

    Args:
        app: what requests are let in to.
        admission: whom to ask; None: everybody is let in.
    """

    def __init__(self, app: ASGIApp, admission: Callable[[], Admission | None]) -> None:
        self._app, self._admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        admission = self._admission()
        if admission is None or scope["type"] != "http" or _ADMITTED in scope:
            await self._app(scope, receive, send)
            return
        if admission.working >= admission.most:
            path = path_of(scope)
            if not is_open(path) and not path.startswith(_SERVES_OWN):
                await admission.refuse(scope, send)
                return
        scope[_ADMITTED] = True
        admission.working += 1
        try:
            await self._app(scope, receive, send)
        finally:
            admission.working -= 1


_of_this_process: Admission | None = None


class Undisturbed:
    """ASGI middleware that tells Ray Serve not to look out for a client that goes away: that takes two tasks for every request,
    and an answer takes milliseconds."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            scope["headers"] = [*scope["headers"], (b"x-request-disconnect-disabled", b"?1")]
        await self._app(scope, receive, send)


def keep(admission: Admission) -> None:
    """Makes an admission known to the server that listens in this process; a gateway has its process for itself."""
    global _of_this_process
    _of_this_process = admission


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around everything, see `CALLBACK_VARIABLE`; where no gateway is, as in its proxy, all are let in."""
    return [Middleware(Undisturbed), Middleware(Door, admission=lambda: _of_this_process)]
