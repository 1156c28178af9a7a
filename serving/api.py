"""The HTTP API: routes and their documentation over a backend that answers. Knows neither Ray nor Feast.

Every error is ``{code, message, hint, request_id}``, see `serving.refusals`. Every response carries ``X-Request-Id`` and
``X-Model-Version``, and ``X-Degraded`` with the reason when something that an answer normally uses was missing. How old a
history is stands with the result of its user. Logs name routes, never users.
Where tokens or identities are set, all but health, documentation and the page needs one: strangers are refused at the door, see
`serving.admission`, and who lacks the scope of a path is refused before the body is read.
"""

import asyncio
import importlib.util
from contextvars import Context
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Body, Depends, FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles

from serving.admission import Admission, Door
from serving.contract import Backend
from serving.envelope import Envelope
from serving.features import LOADING, UNAVAILABLE, Histories
from serving.limits import Limiter
from serving.refusals import add_handlers, as_ascii
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

READY_SECONDS = 1.0
"""For which what the model told /readyz is told to whoever asks."""

_FEATURES_REASONS = {"loading": LOADING, "unavailable": UNAVAILABLE}

_Answer = TypeVar("_Answer", bound=Answer)


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
        redirect_slashes=False,  # to an address of its own making: http and without a path, whatever a proxy in front has
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
    app.add_middleware(Envelope, backend=backend, callers=door.callers, limiter=limiter)
    app.add_middleware(Door, admission=lambda: door)
    add_handlers(app)
    _add_docs(app)

    @app.get("/", include_in_schema=False)
    @app.get("/ui", include_in_schema=False)
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
            # in a context of nobody's: what a request has asked of other deployments Serve cancels when its caller goes away
            self._asking = asyncio.create_task(self._backend.model(), context=Context())
            self._until = now + READY_SECONDS
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
    response.headers["X-Model-Version"] = as_ascii(answer.model_version)
    return answer


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
