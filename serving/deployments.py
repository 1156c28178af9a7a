"""The endpoint's Ray Serve deployments: a gateway that speaks HTTP and a scorer that holds the model, scaled apart, and one
replica that asks the model registry for all scorers.

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
from typing import Any, Generic, NamedTuple, TypeVar

import structlog
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from components.progress import configure_logging
from components.tracking import Registry, RegistryError
from serving.api import Unavailable, create_app
from serving.approximate import ScoringArgs
from serving.auth import read_tokens
from serving.features import (
    FeatureSet,
    FeatureSource,
    FollowingFeatures,
    Histories,
    NoFeatures,
    OnlineFeatures,
    open_history_reader,
)
from serving.lifecycle import EXACT, Follower, Live, Target
from serving.metrics import GatewayMetrics, RegistryMetrics, ScorerMetrics
from serving.schemas import (
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
MAX_BATCH = 32  # requests that are worked on together at most
REGISTRY_DEADLINE_SECONDS = 10.0  # a registry that is slower is asked again later

_T = TypeVar("_T")
_Model = TypeVar("_Model", bound=BaseModel)

log = structlog.get_logger()


class Answered(NamedTuple, Generic[_Model]):
    """What a scorer sends: the answer and whose it is."""

    answer: str
    """JSON: a sixth of the time that pickling the model objects of a ranking takes."""
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


class ScorerReplica:
    """Holds one model at a time; it is loaded and its golden requests are replayed before the replica takes requests.

    Args:
        deployed: the bundle that the configuration names.
        registry: a handle to the `RegistryReplica`, whose champion comes before it; None: no other bundle is ever served.
        poll_interval_s: how often the champion is asked for, seconds.
        scoring: how item vectors are kept and looked through.
    """

    def __init__(
        self,
        deployed: Target,
        registry: DeploymentHandle[Any] | None,
        poll_interval_s: float,
        scoring: ScoringArgs = EXACT,
    ) -> None:
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
            return Follower(candidates, lambda: next(iter(champions()), None), self._metrics, poll_interval_s, scoring)

        with ThreadPoolExecutor(1) as pool:  # a handle cannot be waited for in the event loop, where a replica is made
            self._follower = pool.submit(begin).result()
        if registry is not None:
            self._follower.start()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.0)
    async def recommend(self, asked: list[tuple[RecommendRequest, list[list[str]]]]) -> list[Answered[RecommendResponse]]:
        """See Recommender. What has come while the batch before was worked on is the next one: nobody waits for company."""
        live = self._follower.live
        with self._metrics.timed("model"):
            answers = await asyncio.to_thread(live.recommender.recommend_all, asked)
        for answer in answers:
            self._metrics.recommended(answer, live.recommender.scorer.item_vocabulary, live.head)
        return [_answered(answer, live) for answer in answers]

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

    async def model(self) -> Answered[ModelInfo]:
        """See Recommender."""
        live = self._follower.live
        return _answered(live.recommender.describe(live.golden_requests), live)


def _answered(answer: _Model, live: Live) -> Answered[_Model]:
    return Answered(answer.model_dump_json(), live.target.model_version, live.feature_set)


class RayBackend:
    """The API's backend over a handle to the scorer."""

    def __init__(self, scorer: DeploymentHandle[Any], features: FeatureSource, deployed_version: str) -> None:
        self.model_version = deployed_version
        self._deployed_version = deployed_version
        self._features = features
        self._scorer = scorer
        self._metrics = GatewayMetrics()

    async def histories(self, user_ids: list[str]) -> Histories:
        """See Backend."""
        with self._metrics.timed("features"):
            found = await self._features.histories(user_ids)
        self._metrics.count_degraded(found.degraded)
        return found

    async def recommend(self, request: RecommendRequest, histories: list[list[str]]) -> RecommendResponse:
        """See Backend."""
        return await self._ask(RecommendResponse, self._scorer.recommend.remote((request, histories)))

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """See Backend."""
        return await self._ask(ScoreResponse, self._scorer.score.remote(request))

    async def explain(self, request: ExplainRequest, history: list[str]) -> ExplainResponse:
        """See Backend."""
        return await self._ask(ExplainResponse, self._scorer.explain.remote(request, history))

    async def model(self) -> ModelResponse:
        """See Backend."""
        info = await self._ask(ModelInfo, self._scorer.model.remote())
        return ModelResponse(
            model_version=self.model_version,
            deployed_version=self._deployed_version,
            model=info,
            features=self._features.state(),
        )

    async def _ask(self, kind: type[_Model], response: Awaitable[Answered[_Model]]) -> _Model:
        with self._metrics.timed("scorer"):
            answer, self.model_version, feature_set = await _answer(response)
        self._features.follow(feature_set)
        return kind.model_validate_json(answer)


async def _answer(response: Awaitable[_T]) -> _T:
    """Waits for the scorer; raises Unavailable when it is overloaded, gone or too slow."""
    try:
        return await asyncio.wait_for(_awaited(response), SCORER_DEADLINE_SECONDS)
    except BackPressureError:
        raise Unavailable("overloaded", "too many requests are waiting.") from None
    except TimeoutError:
        raise Unavailable("overloaded", f"the scorer did not answer within {SCORER_DEADLINE_SECONDS:g} s.") from None
    except RayTaskError:
        raise  # the scorer's own code failed: a bug, not an outage
    except (RayActorError, DeploymentUnavailableError, RayServeException) as error:
        log.warning("scorer unavailable", error=type(error).__name__)
        raise Unavailable("scorer_unavailable", "no scorer replica answers.") from None


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
    ) -> None:
        configure_logging()
        logging.getLogger("httpx").setLevel(logging.WARNING)
        self._tokens = read_tokens()
        features: FeatureSource = NoFeatures()
        if feature_fingerprint is not None:

            def open_source(wanted: FeatureSet) -> OnlineFeatures:
                return OnlineFeatures(
                    partial(open_history_reader, wanted.storage_root, wanted.fingerprint), feature_deadline_ms / 1000
                )

            features = FollowingFeatures(open_source, FeatureSet(storage_root, feature_fingerprint))
            features.wait(feature_loading_s)
        self._backend = RayBackend(scorer, features, deployed_version)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._backend, self._tokens)
