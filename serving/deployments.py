"""The endpoint's Ray Serve deployments: a gateway that speaks HTTP and a scorer that holds the model, scaled apart, and two of
which there is one replica each: one asks the model registry for all scorers, one writes the online history for all gateways.

They are thin: the gateway runs the API of `serving.api` over a handle to the scorer, the scorer runs `serving.recommender` and
follows the registry's champion with `serving.lifecycle`.
A full queue in front of the scorer refuses a request at once (503, Retry-After) instead of letting everybody wait.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import structlog
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from components.ids import UNKNOWN
from components.progress import configure_logging
from components.tracking import Registry, RegistryError
from serving.api import Impossible, Unavailable, create_app
from serving.auth import read_tokens
from serving.events import OnlineHistory, open_history
from serving.features import (
    UNAVAILABLE,
    FeatureSet,
    FeatureSource,
    FollowingFeatures,
    Histories,
    HistoryReader,
    NoFeatures,
    OnlineFeatures,
    open_history_reader,
)
from serving.lifecycle import Follower, Live, Target
from serving.metrics import GatewayMetrics, HistoryMetrics, RegistryMetrics, ScorerMetrics
from serving.schemas import (
    Event,
    EventsRequest,
    EventsResponse,
    EventStatus,
    ExplainRequest,
    ExplainResponse,
    ModelInfo,
    ModelResponse,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
)

SCORER_DEADLINE_SECONDS = 10.0  # a request that waited so long for the scorer is refused: its caller has given up
REGISTRY_DEADLINE_SECONDS = 10.0  # a registry that is slower is asked again later

_T = TypeVar("_T")

log = structlog.get_logger()


class Answered(NamedTuple, Generic[_T]):
    """What a scorer sends: the answer and whose it is."""

    answer: _T
    model_version: str
    feature_set: FeatureSet | None


class RegistryReplica:
    """Asks the model registry, so that one process holds its client and not every scorer; remembers the last answers.

    Args:
        tracking_uri: of the registry, see `components.tracking`.
        model_name: in the registry.
        max_age_s: how old an answer may be before the registry is asked again, seconds.
    """

    def __init__(self, tracking_uri: str, model_name: str, max_age_s: float) -> None:
        configure_logging()
        self._registry = Registry(tracking_uri, model_name)
        self._max_age_s = max_age_s
        self._metrics = RegistryMetrics()
        self._champions: list[Target] = []
        self._asked_at = -math.inf
        self._is_up = True
        self._asking = asyncio.Lock()

    async def champions(self) -> list[Target]:
        """The champion and the champion before it, as far as there are any; of earlier while the registry is down."""
        async with self._asking:
            if time.monotonic() - self._asked_at >= self._max_age_s:
                await asyncio.to_thread(self._ask)
                self._asked_at = time.monotonic()
        return self._champions

    def _ask(self) -> None:
        try:
            found = [version for version in (self._registry.champion(), self._registry.previous()) if version is not None]
        except Exception as error:  # whatever MLflow raises, models stay as they are and it is asked again
            if self._is_up:
                reason = error.message if isinstance(error, RegistryError) else f"{type(error).__name__}: {error}"
                log.warning("registry does not answer", reason=reason)
            self._is_up = False
        else:
            self._champions = [Target(version.version, version.fingerprint, version.storage_root) for version in found]
            self._is_up = True
        self._metrics.registry_up.set(int(self._is_up))


class HistoryReplica:
    """Writes the online history for all gateways: one writer, so that no event is lost between reading a list and writing it.

    Requests that come while one is written are written together. While there is no such replica, or no store, events are
    refused and told again by whoever sent them.

    Args:
        storage_root: of the endpoint.
        feature_fingerprint: of a feature set there.
    """

    def __init__(self, storage_root: str, feature_fingerprint: str) -> None:
        configure_logging()
        self._open = partial(open_history, storage_root, feature_fingerprint)
        self._history: OnlineHistory | None = None
        self._metrics = HistoryMetrics()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="online-history")
        self._thread.submit(self._write, [])  # opens it

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.0)
    async def write(self, requests: list[list[Event]]) -> list[list[EventStatus] | None]:
        """What became of each event, in order; None if the feature store cannot be written."""
        events = [event for request in requests for event in request]
        statuses = await asyncio.get_running_loop().run_in_executor(self._thread, self._write, events)
        self._metrics.count(statuses or ["failed"] * len(events))
        left = None if statuses is None else iter(statuses)
        return [None if left is None else list(islice(left, len(request))) for request in requests]

    def _write(self, events: list[Event]) -> list[EventStatus] | None:
        try:
            self._history = self._history or self._open()
            return self._history.write(events) if events else []
        except Exception as error:  # whatever a store's client raises, the events are told again and it is tried again
            log.warning("online history cannot be written", error=type(error).__name__)
            return None


class ScorerReplica:
    """Holds one model at a time; it is loaded and its golden requests are replayed before the replica takes requests.

    Args:
        deployed: the bundle that the configuration names.
        registry: a handle to the `RegistryReplica`, whose champion comes before it; None: no other bundle is ever served.
        poll_interval_s: how often the champion is asked for, seconds.
    """

    def __init__(self, deployed: Target, registry: DeploymentHandle[Any] | None, poll_interval_s: float) -> None:
        configure_logging()
        self._metrics = ScorerMetrics()

        def champions() -> list[Target]:
            found: list[Target] = registry.champions.remote().result(timeout_s=REGISTRY_DEADLINE_SECONDS) if registry else []
            return found

        def begin() -> Follower:
            """With what other replicas serve: the configuration's bundle may be of long ago."""
            try:
                first = champions()
            except Exception as error:  # as in Follower.look
                log.warning("champion cannot be asked for", error=type(error).__name__)
                first = []
            candidates = dict.fromkeys([*first, deployed])
            return Follower(candidates, lambda: next(iter(champions()), None), self._metrics, poll_interval_s)

        with ThreadPoolExecutor(1) as pool:  # a handle cannot be waited for in the event loop, where a replica is made
            self._follower = pool.submit(begin).result()
        if registry is not None:
            self._follower.start()

    async def recommend(self, request: RecommendRequest, histories: list[list[str]]) -> Answered[RecommendResponse]:
        """See Recommender."""
        live = self._follower.live
        with self._metrics.timed("model"):
            answer = live.recommender.recommend(request, histories)
        self._metrics.recommended(answer, live.recommender.scorer.item_vocabulary, live.head)
        return _answered(answer, live)

    async def score(self, request: ScoreRequest) -> Answered[ScoreResponse]:
        """See Recommender."""
        live = self._follower.live
        with self._metrics.timed("model"):
            answer = live.recommender.score(request)
        self._metrics.scored(answer)
        return _answered(answer, live)

    async def explain(self, request: ExplainRequest, history: list[str]) -> Answered[ExplainResponse]:
        """See Recommender."""
        live = self._follower.live
        with self._metrics.timed("model"):
            answer = live.recommender.explain(request, history)
        self._metrics.explained(answer)
        return _answered(answer, live)

    async def unknown_items(self, item_ids: list[str]) -> Answered[list[str]]:
        """Those of some items that the model does not know, each once, in their order."""
        live = self._follower.live
        rows = live.recommender.scorer.item_vocabulary.rows(item_ids)
        unknown = list(dict.fromkeys(item_id for item_id, row in zip(item_ids, rows, strict=True) if row == UNKNOWN))
        self._metrics.told(len(unknown), live.target.model_version)
        return _answered(unknown, live)

    async def model(self) -> Answered[ModelInfo]:
        """See Recommender."""
        live = self._follower.live
        return _answered(live.recommender.describe(live.golden_requests), live)


def _answered(answer: _T, live: Live) -> Answered[_T]:
    return Answered(answer, live.target.model_version, live.feature_set)


class RayBackend:
    """The API's backend over handles to the scorer and to the writer of the online history, if there is one.

    `events` looks the online history up.
    """

    def __init__(
        self,
        scorer: DeploymentHandle[Any],
        features: FeatureSource,
        deployed_version: str,
        events: OnlineFeatures | NoFeatures,
        history: DeploymentHandle[Any] | None,
    ) -> None:
        self.model_version = deployed_version
        self._deployed_version = deployed_version
        self._features, self._events = features, events
        self._scorer, self._history = scorer, history
        self._metrics = GatewayMetrics()

    async def histories(self, user_ids: list[str]) -> Histories:
        """See Backend."""
        with self._metrics.timed("features"):  # at the same time: one wait
            found, since = await asyncio.gather(self._features.histories(user_ids), self._events.histories(user_ids))
        degraded = found.degraded or since.degraded
        self._metrics.count_degraded(degraded)
        return Histories(found.item_ids, degraded, since.item_ids)

    async def recommend(self, request: RecommendRequest, histories: list[list[str]]) -> RecommendResponse:
        """See Backend."""
        return await self._ask(self._scorer.recommend.remote(request, histories))

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """See Backend."""
        return await self._ask(self._scorer.score.remote(request))

    async def explain(self, request: ExplainRequest, history: list[str]) -> ExplainResponse:
        """See Backend."""
        return await self._ask(self._scorer.explain.remote(request, history))

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
        asking: Awaitable[Answered[list[str]]] = self._scorer.unknown_items.remote(item_ids)
        statuses, unknown = await asyncio.gather(_answer(writing, "history"), _answer(asking))
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
        info: ModelInfo = await self._ask(self._scorer.model.remote())
        return ModelResponse(
            model_version=self.model_version,
            deployed_version=self._deployed_version,
            model=info,
            features=self._features.state(),
        )

    async def _ask(self, response: Awaitable[Answered[_T]]) -> _T:
        with self._metrics.timed("scorer"):
            answer, self.model_version, feature_set = await _answer(response)
        self._features.follow(feature_set)
        return answer


async def _answer(response: Awaitable[_T], who: str = "scorer") -> _T:
    """Waits for another deployment; raises Unavailable when it is overloaded, gone or too slow."""
    try:
        return await asyncio.wait_for(_awaited(response), SCORER_DEADLINE_SECONDS)
    except BackPressureError:
        raise Unavailable("overloaded", "too many requests are waiting.") from None
    except TimeoutError:
        raise Unavailable("overloaded", f"the {who} did not answer within {SCORER_DEADLINE_SECONDS:g} s.") from None
    except RayTaskError:
        raise  # its own code failed: a bug, not an outage
    except (RayActorError, DeploymentUnavailableError, RayServeException) as error:
        log.warning(f"{who} unavailable", error=type(error).__name__)
        raise Unavailable(f"{who}_unavailable", f"no {who} replica answers.") from None


async def _awaited(response: Awaitable[_T]) -> _T:
    return await response


@serve.ingress()
class GatewayReplica:
    """Speaks HTTP: checks requests, looks up features, asks the scorer.

    A starting replica waits for the feature store up to a limit, so that the first answers are as good as later ones; a
    store that is down does not keep it from answering.
    """

    def __init__(
        self,
        scorer: DeploymentHandle[Any],
        storage_root: str,
        feature_fingerprint: str | None,
        deployed_version: str,
        feature_deadline_ms: int,
        feature_loading_s: int,
        history: DeploymentHandle[Any] | None,
    ) -> None:
        configure_logging()
        logging.getLogger("httpx").setLevel(logging.WARNING)
        self._tokens = read_tokens()
        features: FeatureSource = NoFeatures()
        events: OnlineFeatures | NoFeatures = NoFeatures()
        deadline = feature_deadline_ms / 1000
        if feature_fingerprint is not None:

            def open_events() -> HistoryReader:
                return open_history(storage_root, feature_fingerprint).read

            def open_source(wanted: FeatureSet) -> OnlineFeatures:
                return OnlineFeatures(partial(open_history_reader, wanted.storage_root, wanted.fingerprint), deadline)

            features = FollowingFeatures(open_source, FeatureSet(storage_root, feature_fingerprint))
            events = OnlineFeatures(open_events, deadline)
            give_up = time.monotonic() + feature_loading_s
            for source in (features, events):
                source.wait(max(0.0, give_up - time.monotonic()))
        self._backend = RayBackend(scorer, features, deployed_version, events, history)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._backend, self._tokens)
