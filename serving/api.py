"""The HTTP API: routes, errors and headers over a backend that answers. Knows neither Ray nor Feast.

Every error is ``{code, message, hint, request_id}``. Every response carries ``X-Request-Id`` and ``X-Model-Version``, and
``X-Degraded`` with the reason when something that an answer normally uses was missing. How old a history is stands with the
result of its user. Logs name routes, never users.
Where tokens or identities are set, all but health, documentation and the page needs one: strangers are refused at the door, see
`serving.admission`, and who lacks the scope of a path is refused before the body is read.
"""

import asyncio
import hashlib
import importlib.util
import math
import re
import time
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
import structlog
from fastapi import Body, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.admission import RETRY_AFTER_SECONDS, SCOPES, Admission, Door, has_request_id, is_open, path_of, request_id
from serving.attributes import FilterError
from serving.auth import TokenScope
from serving.callers import Callers
from serving.features import LOADING, UNAVAILABLE, Histories, Profiles
from serving.limits import Limiter
from serving.schemas import (
    Answer,
    ErrorBody,
    EventsRequest,
    EventsResponse,
    ExplainRequest,
    ExplainResponse,
    Health,
    ItemsRequest,
    ItemsResponse,
    ModelResponse,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
)

MAX_BODY_BYTES = 1 << 20
MAX_DEPTH = 3
"""Levels of the deepest request there is; what is deeper has a field that is not known, and is refused for it."""
BODY_SECONDS = 10.0
"""Within which a body must be there: while it comes in, its request is one of those that are worked on."""
READY_SECONDS = 1.0
"""For which what the model told /readyz is told to whoever asks."""

_FEATURES_REASONS = {"loading": LOADING, "unavailable": UNAVAILABLE}
_SEE_DOCS = "See /docs for the fields and their limits."

_Answer = TypeVar("_Answer", bound=Answer)

log = structlog.get_logger()


class Unavailable(Exception):
    """The backend cannot answer now; a client may try again.

    Args:
        code: what it is: "overloaded", "scorer_unavailable".
        message: one line for the caller.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Impossible(Exception):
    """What is asked for cannot be done by this endpoint, now or later.

    Args:
        code: what is missing: "no_feature_store".
        message: one line for the caller.
        hint: what to do about it.
    """

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


class Backend(Protocol):
    """What answers the API's questions; every method but `histories` may raise Unavailable."""

    model_version: str
    """Of the latest answer: what errors and pages carry, which no model gave."""

    async def histories(self, user_ids: list[str]) -> Histories:
        """Recent items of some users, and what they did since, as far as the feature store answers in time."""
        ...

    async def recommend(
        self, request: RecommendRequest, histories: list[list[str]], profiles: Profiles | None = None
    ) -> RecommendResponse:
        """See Recommender."""
        ...

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """See Recommender."""
        ...

    async def explain(self, request: ExplainRequest, history: list[str]) -> ExplainResponse:
        """See Recommender."""
        ...

    async def events(self, request: EventsRequest) -> EventsResponse:
        """Writes events to the online history; raises Impossible where there is no feature store."""
        ...

    async def items(self, request: ItemsRequest, histories: list[list[str]]) -> ItemsResponse:
        """See Recommender.new_items; raises Impossible where the model has no texts, or their encoder is not installed."""
        ...

    async def model(self) -> ModelResponse:
        """The bundle, and the state of the feature store."""
        ...


def create_app(
    backend: Backend,
    admission: Admission | None = None,
    limiter: Limiter | None = None,
) -> FastAPI:
    """The API over one backend.

    Args:
        backend: what answers.
        admission: who is let in, and how many at a time; everybody without.
        limiter: how much each may ask; any amount without.
    """
    door = admission or Admission(model_version=lambda: backend.model_version)
    app = FastAPI(
        title="CLLMR: debiased recommendations",
        version="1",
        description="Recommendations that use side information written by a language model without inheriting its biases: "
        "what the side information says by itself is estimated and taken out of every score.",
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if door.callers.tokens.are_needed else [],  # for the docs alone
        responses={
            400: {"model": ErrorBody, "description": "The body is no text that can be read."},
            401: {"model": ErrorBody, "description": "No token or identity, or one that is not known."},
            403: {"model": ErrorBody, "description": "The token or identity lacks the scope."},
            408: {"model": ErrorBody, "description": "The body takes too long to come."},
            409: {"model": ErrorBody, "description": "This endpoint lacks what that needs."},
            413: {"model": ErrorBody, "description": "The body is too large."},
            422: {"model": ErrorBody, "description": "The request is not valid."},
            429: {"model": ErrorBody, "description": "Too many requests; try again after Retry-After seconds."},
            503: {"model": ErrorBody, "description": "Overloaded or starting; try again after Retry-After seconds."},
        },
    )
    app.add_middleware(_Envelope, backend=backend, callers=door.callers, limiter=limiter)
    app.add_middleware(Door, admission=lambda: door)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Unavailable, _unavailable)
    app.add_exception_handler(Impossible, _impossible)
    app.add_exception_handler(FilterError, _invalid_filter)
    _add_docs(app)

    @app.get("/", include_in_schema=False)
    async def page() -> RedirectResponse:
        return RedirectResponse("ui/")  # as seen from here: a proxy may have put the endpoint below a path of its own

    app.mount("/ui", StaticFiles(directory=Path(__file__).parent / "ui", html=True), name="ui")
    _add_routes(app, backend)
    return app


class _Readiness:
    """Asks the model for all who want to know whether it answers: anybody may, and the model has others to answer."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._asking: asyncio.Task[ModelResponse] | None = None
        self._until = 0.0

    async def model(self) -> ModelResponse:
        """What it said within the last `READY_SECONDS`, or says now; raises as Backend.model."""
        now = asyncio.get_running_loop().time()
        if self._asking is None or (self._asking.done() and now >= self._until):
            self._asking, self._until = asyncio.create_task(self._backend.model()), now + READY_SECONDS
        return await asyncio.shield(self._asking)  # who goes away takes the answer from nobody else


def _add_routes(app: FastAPI, backend: Backend) -> None:
    readiness = _Readiness(backend)

    @app.post("/v1/recommend", tags=["recommend"], summary="Rank items for users", response_model=RecommendResponse)
    async def recommend(request: Annotated[RecommendRequest, Body()], response: Response) -> Response:
        """Debiased rankings, best first. `compare` adds the factual ranking, `debias` sets the strength per request."""
        found = await histories(request.users, response)
        answer = await backend.recommend(found.told_to(request), found.item_ids, found.profiles)
        if answer.results[0].method == "static" and (reason := answer.results[0].reason):
            response.headers["X-Degraded"] = reason
        signed = _signed(answer.model_copy(update={"results": found.said_of(answer.results)}), response)
        # made JSON here: FastAPI would check a valid answer again
        return Response(signed.model_dump_json(), headers=dict(response.headers), media_type="application/json")

    @app.post("/v1/score", tags=["recommend"], summary="Score given items")
    async def score(request: Annotated[ScoreRequest, Body()], response: Response) -> ScoreResponse:
        """The debiased, factual and direct score of each item; unknown items are listed and have none."""
        found = await histories([request.user_id], response)
        (answer,) = found.said_of([await backend.score(found.told_to_one(request))])
        return _signed(answer, response)

    @app.post("/v1/explain", tags=["recommend"], summary="Take a score apart")
    async def explain(request: Annotated[ExplainRequest, Body()], response: Response) -> ExplainResponse:
        """Total effect, natural direct effect, what debiasing removed, and the liked items that are nearest."""
        found = await histories([request.user_id], response)
        (answer,) = found.said_of([await backend.explain(found.told_to_one(request), found.item_ids[0])])
        return _signed(answer, response)

    @app.post("/v1/items", tags=["recommend"], summary="Score new items from their text")
    async def items(request: Annotated[ItemsRequest, Body()], response: Response) -> ItemsResponse:
        """What items that were not there in training are to some users, and which known items are nearest to them.

        Their texts are read by the encoder that read the training texts, which takes some milliseconds each, and seconds when
        it is first needed.
        """
        found = await histories(request.users, response) if request.users else Histories([])
        answer = await backend.items(request, found.known)
        results = [result.model_copy(update={"scores": found.said_of(result.scores)}) for result in answer.results]
        return _signed(answer.model_copy(update={"results": results}), response)

    @app.post("/v1/events", tags=["recommend"], summary="Tell what users did")
    async def events(request: Annotated[EventsRequest, Body()], response: Response) -> EventsResponse:
        """Writes new interactions to the online history: the next answers to these users use them."""
        return _signed(await backend.events(request), response)

    @app.get("/v1/model", tags=["operate"], summary="What is being served")
    async def model(response: Response) -> ModelResponse:
        """The bundle and the state of the feature store."""
        return _signed(await backend.model(), response)

    @app.get("/healthz", tags=["operate"], summary="Liveness")
    async def healthz() -> Health:
        """Answers as long as the process does."""
        return Health(status="ok")

    @app.get("/readyz", tags=["operate"], summary="Readiness", responses={503: {"model": ErrorBody}})
    async def readyz(response: Response) -> Health:
        """Answers 200 once the model answers; a missing feature store degrades answers and does not make it unready.

        `reason` is then its code; /v1/model has the details. The answer may be a second old.
        """
        model = _signed(await readiness.model(), response)
        return Health(status="ok", reason=_FEATURES_REASONS.get(model.features.state))

    async def histories(user_ids: list[str], response: Response) -> Histories:
        found = await backend.histories(user_ids)
        if found.degraded is not None:
            response.headers["X-Degraded"] = found.degraded
        return found


def _signed(answer: _Answer, response: Response) -> _Answer:
    """The answer, its headers naming the very model that gave it, whatever is served by now."""
    response.headers["X-Model-Version"] = _ascii(answer.model_version)
    return answer


def _ascii(text: str) -> str:
    """Fit for a header or a message: a name may hold anything, lone surrogates included, that cannot be sent as it is."""
    return text.encode("ascii", "backslashreplace").decode()


def _add_docs(app: FastAPI) -> None:
    """The Swagger page, with its scripts from the package fastapi-offline where that is installed, else from a CDN."""
    assets: dict[str, Any] = {}
    spec = importlib.util.find_spec("fastapi_offline")
    if spec is not None and spec.submodule_search_locations:
        static = Path(next(iter(spec.submodule_search_locations))) / "static"
        app.mount("/docs/assets", StaticFiles(directory=static), name="docs-assets")
        assets = {
            "swagger_js_url": "docs/assets/swagger-ui-bundle.js",
            "swagger_css_url": "docs/assets/swagger-ui.css",
            "swagger_favicon_url": "docs/assets/favicon.png",
        }

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(openapi_url="openapi.json", title=app.title, **assets)


# -- errors -----------------------------------------------------------------------------------------------------------


def error_response(status: int, code: str, message: str, hint: str, request_id: str) -> JSONResponse:
    """An error as every client sees it."""
    body = ErrorBody(code=code, message=message, hint=hint, request_id=request_id)
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else None
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if part != "body")[:200]
    if problem["type"] == "json_invalid":
        message, hint = "the body is not JSON.", "Send a JSON object with Content-Type: application/json."
    else:
        said = problem["msg"].removeprefix("Value error, ")  # pydantic's, of a check of ours
        message, hint = f"{place + ': ' if place else ''}{said}.", _SEE_DOCS
    return error_response(422, "invalid_request", _ascii(message), hint, _id(request))


_HTTP_ERRORS = {
    404: ("not_found", "there is no such path.", "See /docs for the paths there are."),
    413: (
        "body_too_large",
        f"the body is larger than {MAX_BODY_BYTES} bytes.",
        "Send a smaller one: split the users or items over several requests.",
    ),
    408: (
        "body_too_slow",
        f"the body was not there within {BODY_SECONDS:g} s.",
        "Send it at once: a request that is not whole keeps others out.",
    ),
    405: ("method_not_allowed", "this path does not take this method.", "See /docs for the methods of each path."),
}


_NESTING = {ord(b): step for b, step in zip("[{]}", (1, 1, -1, -1), strict=True)}
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)


def depth_of(body: bytes) -> int:
    """How deep a text in JSON, or what is there of it, is nested; brackets in strings are none."""
    text = np.frombuffer(_STRINGS.sub(b"", body), dtype=np.uint8)
    steps = np.zeros(256, dtype=np.int64)
    steps[list(_NESTING)] = list(_NESTING.values())
    return int(steps[text].cumsum().max(initial=0))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400 and isinstance(error.__cause__, RecursionError):
        depth = depth_of(b"".join(request.scope["state"]["body"]))
        message = f"the body is nested {depth} levels deep; at most {MAX_DEPTH} are allowed."
        return error_response(400, "bad_request", message, _SEE_DOCS, _id(request))
    default = ("bad_request", "the request cannot be read.", "Send a JSON object with Content-Type: application/json.")
    code, message, hint = _HTTP_ERRORS.get(error.status_code, default)
    response = error_response(error.status_code, code, message, hint, _id(request))
    response.headers.update(error.headers or {})
    return response


async def _unavailable(request: Request, error: Exception) -> Response:
    assert isinstance(error, Unavailable)
    return _try_again(error.code, error.message, _id(request))


def _try_again(code: str, message: str, request_id: str) -> Response:
    return error_response(503, code, message, f"Try again in {RETRY_AFTER_SECONDS} s.", request_id)


async def _impossible(request: Request, error: Exception) -> Response:
    assert isinstance(error, Impossible)
    return error_response(409, error.code, error.message, error.hint, _id(request))


def _id(request: Request) -> str:
    return str(request.scope["state"]["request_id"])


async def _invalid_filter(request: Request, error: Exception) -> Response:
    assert isinstance(error, FilterError)
    return error_response(422, error.code, _ascii(error.message), _ascii(error.hint), _id(request))


class _Envelope:
    """Around every request: its id, the headers, the cap on the body, the last resort for errors, one log line."""

    def __init__(self, app: ASGIApp, backend: Backend, callers: Callers, limiter: Limiter | None) -> None:
        self._app = app
        self._backend = backend
        self._callers, self._limiter = callers, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        name = request_id(scope)
        scope.setdefault("state", {})["request_id"] = name
        # Serve gives every request an id and answers it itself
        id_header = [] if has_request_id(scope) else [(b"x-request-id", name.encode())]

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), *id_header]
                if not any(name == b"x-model-version" for name, _ in headers):
                    headers.append((b"x-model-version", _ascii(self._backend.model_version).encode()))
                message = {**message, "headers": headers}
            await send(message)

        try:
            refusal = _forbidden(scope, self._callers) or _delay(scope, self._callers, self._limiter)
            await (refusal or self._app)(scope, _capped(scope, receive), send_with_headers)
        except Exception:
            log.exception("request failed", request_id=name)
            if status:
                raise  # the answer has begun; the server can only cut the connection
            hint = "Report it with the request id."
            answer = error_response(500, "internal_error", "the server failed.", hint, name)
            await answer(scope, receive, send_with_headers)
        finally:
            log.info(
                "request",
                method=scope["method"],
                route=getattr(scope.get("route"), "path", None),
                status=status,
                milliseconds=round(1000 * (time.perf_counter() - started), 1),
                request_id=name,
            )


_SCOPES: dict[str, tuple[TokenScope, ...]] = {"/v1/model": ("admin",), "/v1/events": ("events", "admin")}
"""Scopes one of which a path needs; all others need "score"."""


def _forbidden(scope: Scope, callers: Callers) -> Response | None:
    """The answer to a request that its token or identity does not allow, None when it does."""
    path = path_of(scope)
    if not callers.must_be_known or is_open(path):
        return None
    needed = _SCOPES.get(path, ("score",))
    if not scope[SCOPES].isdisjoint(needed):
        return None
    scopes = " or ".join(f"'{scope}'" for scope in needed)
    hint = "Use a token or an identity that has it."
    return error_response(403, "forbidden", f"this needs the scope {scopes}.", hint, scope["state"]["request_id"])


def _delay(scope: Scope, callers: Callers, limiter: Limiter | None) -> Response | None:
    """The answer to a caller that has asked too much, None when it has not."""
    if limiter is None or is_open(path_of(scope)):
        return None
    if (wait := limiter.wait(hashlib.sha256(callers.name(scope).encode("utf-8", "surrogateescape")).hexdigest())) <= 0:
        return None
    seconds = math.ceil(wait)
    message, hint = f"more than {limiter.rate} were asked.", f"Try again in {seconds} s, or ask for more users at once."
    response = error_response(429, "too_many_requests", message, hint, scope["state"]["request_id"])
    response.headers["Retry-After"] = str(seconds)
    return response


def _capped(scope: Scope, receive: Receive) -> Receive:
    """`receive` that raises 413 when the announced or the received body is too large, 408 when it takes too long to come."""
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    announced_bytes = int(announced) if announced.isdigit() else 0
    received, is_whole = 0, False
    parts: list[bytes] = scope["state"].setdefault("body", [])
    deadline = asyncio.get_running_loop().time() + BODY_SECONDS

    async def capped() -> Message:
        nonlocal received, is_whole
        if announced_bytes > MAX_BODY_BYTES:
            raise HTTPException(413)
        try:
            async with asyncio.timeout_at(None if is_whole else deadline):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, headers={"Connection": "close"}) from None
        received += len(message.get("body", b""))
        is_whole = not message.get("more_body", False)
        if received > MAX_BODY_BYTES:
            raise HTTPException(413)
        parts.append(message.get("body", b""))
        return message

    return capped
