"""The API's backend: asks scorers, the writer of the online history and the encoder, by handles of Ray Serve.

While no scorer answers, it answers with what was popular when one last did. Who asks for replicas that are gone is not told
that they are: he waits, and holds one of the places that a gateway has. So scorers that let request after request wait for
nothing are left alone for a while (`serving.breaker`), and the others are answered at once.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any, Generic, NamedTuple, TypeVar

import structlog
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from serving.admission import OVERLOADED
from serving.attributes import FilterError
from serving.breaker import Breaker, State
from serving.contract import Impossible, Unavailable
from serving.degrade import Static
from serving.feature_set import FeatureSet
from serving.features import BREAKER_FAILURES, BREAKER_SECONDS, UNAVAILABLE, FeatureSource, Histories, Profiles
from serving.metrics import GatewayMetrics
from serving.ranking import Floats
from serving.schemas import (
    EventsRequest,
    EventsResponse,
    EventStatus,
    ExplainRequest,
    ExplainResponse,
    ItemsRequest,
    ItemsResponse,
    ModelInfo,
    ModelResponse,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
)

SCORER_DEADLINE_SECONDS = 10.0  # a request that waited so long for the scorer is refused: its caller has given up
SCORER_TIMEOUT = "scorer_timeout"
STATIC_ITEMS = 1_000  # kept for when no scorer answers: the longest ranking, and what may have to be left out of it

_T = TypeVar("_T")

log = structlog.get_logger()


class Answered(NamedTuple, Generic[_T]):
    """What a scorer sends: the answer and whose it is."""

    answer: _T
    model_version: str
    feature_set: FeatureSet | None
    """Of the model that answers where no challenger is tried: histories are looked up for all users alike."""
    live_version: str
    """Of the model that answers where no challenger is tried; it tells what is popular."""
    took: float | None = None
    """Seconds that were worked on it; None where nobody asks."""


class Inside:
    """A scorer in this very process, asked as a handle asks one elsewhere: by ``method.remote(...)``."""

    def __init__(self, scorer: object) -> None:
        self._scorer = scorer

    def __getattr__(self, method: str) -> "_Method":
        return _Method(getattr(self._scorer, method))


class _Method(NamedTuple):
    remote: Callable[..., Awaitable[Any]]


class RayBackend:
    """The API's backend over handles to the scorer and to the writer of the online history, if there is one.

    `waited` is told how long questions wait for others, on the way to a scorer, there, and back: see `serving.room`.
    """

    def __init__(
        self,
        scorer: DeploymentHandle[Any] | Inside,
        features: FeatureSource,
        deployed_version: str,
        history: DeploymentHandle[Any] | None,
        encoder: DeploymentHandle[Any],
        metrics: GatewayMetrics,
        waited: Callable[[float], None],
    ) -> None:
        self.model_version = deployed_version
        self._deployed_version = deployed_version
        self._features = features
        self._scorer, self._history, self._encoder = scorer, history, encoder
        self._metrics, self._waited = metrics, waited
        self._breaker = Breaker(BREAKER_FAILURES, BREAKER_SECONDS, _tell_of_circuit)
        self._static: Static | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def histories(self, user_ids: list[str]) -> Histories:
        """See Backend."""
        with self._metrics.timed("features"):
            histories = await self._features.histories(user_ids)
        self._metrics.count_degraded(histories.degraded)
        return histories

    async def recommend(
        self, request: RecommendRequest, histories: list[list[str]], profiles: Profiles | None = None
    ) -> RecommendResponse:
        """See Backend."""
        try:
            if isinstance(self._scorer, Inside):
                return await self._ask(self._scorer.recommend_here.remote, request, histories, profiles)
            answer: str | FilterError = await self._ask(self._scorer.recommend.remote, request, histories, profiles)
        except Unavailable as error:
            if self._static is None or error.code == OVERLOADED:  # who comes back later gets a model's answer
                raise
            self._metrics.count_degraded(error.code)
            return self._static.recommend(request, histories, error.code)
        if isinstance(answer, FilterError):
            raise answer
        return RecommendResponse.model_validate_json(answer)

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """See Backend."""
        return await self._ask(self._scorer.score.remote, request)

    async def explain(self, request: ExplainRequest, history: list[str]) -> ExplainResponse:
        """See Backend."""
        return await self._ask(self._scorer.explain.remote, request, history)

    async def items(self, request: ItemsRequest, histories: list[list[str]]) -> ItemsResponse:
        """See Backend."""
        encoder: str | None = await self._ask(self._scorer.text_encoder.remote)
        if encoder is None:
            raise Impossible(
                "no_texts",
                "the model was trained without texts, or before new items could be scored, or they are damaged.",
                "Give the items texts and train again: cllmr run --from train",
            )
        with self._metrics.timed("encoder"):
            texts: Awaitable[Floats | str] = self._encoder.encode.remote(encoder, [item.text for item in request.items])
            embeddings = await _answer(texts, "encoder")
        if isinstance(embeddings, str):
            raise Impossible("no_encoder", embeddings, "Install it: pip install 'cllmr-platform[embed]'")
        with self._metrics.timed("scorer"):  # these queue up behind each other: a scorer that lets them wait is not gone
            scored = self._scorer.new_items.remote(request, histories, encoder, embeddings)
            answer: ItemsResponse | None = self._told(await _answer(scored))
        if answer is None:
            raise Unavailable("model_changed", "another model has taken over meanwhile.")
        return answer

    async def events(self, request: EventsRequest) -> EventsResponse:
        """See Backend."""
        if self._history is None:
            raise Impossible(
                "no_feature_store",
                "this endpoint has no feature store, so it keeps no events.",
                "Send them with the question, as 'recent', or serve a model that was trained with features.",
            )
        item_ids = list(dict.fromkeys(event.item_id for event in request.events))
        writing: Awaitable[list[EventStatus] | None] = self._history.write.remote(request.events)
        asking: Awaitable[Answered[list[str]]] = self._in_time(self._scorer.unknown_items.remote, item_ids)
        statuses, unknown = await asyncio.gather(_answer(writing, "history"), asking)
        if statuses is None:
            raise Unavailable(UNAVAILABLE, "the feature store cannot be written.")
        return EventsResponse(
            model_version=unknown.model_version,
            stored=statuses.count("stored"),
            statuses=statuses,
            unknown_items=unknown.answer,
        )

    async def model(self) -> ModelResponse:
        """See Backend."""
        info: ModelInfo = await self._ask(self._scorer.model.remote)
        return ModelResponse(
            model_version=self.model_version,
            deployed_version=self._deployed_version,
            model=info,
            features=self._features.state(),
        )

    async def _ask(self, ask: Callable[..., Awaitable[Answered[_T]]], *question: Any) -> _T:
        asked_at = time.monotonic()
        with self._metrics.timed("scorer"):
            answered = await self._in_time(ask, *question)
        if answered.took is not None:
            self._waited(max(0.0, time.monotonic() - asked_at - answered.took))
        return self._told(answered)

    def _told(self, answered: Answered[_T]) -> _T:
        """What a scorer answers; what it says of its model is remembered."""
        answer, self.model_version, feature_set, live_version, _ = answered
        self._features.follow(feature_set)
        if self._keeping is None and (self._static is None or self._static.model_version != live_version):
            # in a context of nobody's, as in serving.api._Readiness
            self._keeping = asyncio.create_task(self._keep_popular(), context=Context())
        return answer

    async def _in_time(self, ask: Callable[..., Awaitable[_T]], *question: Any) -> _T:
        """Asks a scorer, unless those who asked before have waited for nothing; raises as `_answer`."""
        if not self._breaker.allows():
            raise Unavailable(SCORER_TIMEOUT, f"no scorer has answered within {SCORER_DEADLINE_SECONDS:g} s of late.")
        try:
            answer = await _answer(ask(*question))
        except Unavailable as error:
            if error.code == SCORER_TIMEOUT:  # of others one hears at once, and they hold nobody up
                self._breaker.failed()
            raise
        self._breaker.succeeded()
        return answer

    async def _keep_popular(self) -> None:
        """Asks the model that answers for what to answer when it does not."""
        try:
            self._static = (await _answer(self._popular())).answer
        except Unavailable as error:
            log.warning("popular items cannot be asked for", reason=error.message)
        finally:
            self._keeping = None

    def _popular(self) -> Awaitable[Answered[Static]]:
        return self._scorer.popular.remote(STATIC_ITEMS)


def _tell_of_circuit(state: State) -> None:
    if state != "half_open":
        log.warning("scorer circuit", state=state)


async def _answer(response: Awaitable[_T], who: str = "scorer") -> _T:
    """Waits for another deployment; raises Unavailable when it is overloaded, gone or too slow."""
    try:
        async with asyncio.timeout(SCORER_DEADLINE_SECONDS):
            return await response
    except BackPressureError:
        raise Unavailable(OVERLOADED, "too many requests are waiting.") from None
    except TimeoutError:
        raise Unavailable(f"{who}_timeout", f"the {who} did not answer within {SCORER_DEADLINE_SECONDS:g} s.") from None
    except RayTaskError:
        raise  # its own code failed: a bug, not an outage
    except (RayActorError, DeploymentUnavailableError, RayServeException) as error:
        log.warning(f"{who} unavailable", error=type(error).__name__)
        raise Unavailable(f"{who}_unavailable", f"no {who} replica answers.") from None
