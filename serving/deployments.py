"""The endpoint's Ray Serve deployments: a gateway that speaks HTTP and a scorer that holds the model, scaled apart.

Both are thin: the gateway runs the API of `serving.api` over a handle to the scorer, the scorer runs `serving.recommender`.
A full queue in front of the scorer refuses a request at once (503, Retry-After) instead of letting everybody wait.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import structlog
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter

from components.progress import configure_logging
from serving.api import Unavailable, create_app
from serving.features import FeatureSource, NoFeatures, OnlineFeatures, open_history_reader
from serving.recommender import Recommender
from serving.schemas import (
    ExplainRequest,
    ExplainResponse,
    ModelInfo,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
)
from serving.scorer import Scorer, find_bundle

SCORER_DEADLINE_SECONDS = 10.0  # a request that waited so long for the scorer is refused: its caller has given up

_T = TypeVar("_T")

log = structlog.get_logger()


class ScorerReplica:
    """Holds one bundle; it is loaded and its golden requests are replayed before the replica takes requests."""

    def __init__(self, storage_root: str, fingerprint: str, bundle_dir: str | None, model_version: str) -> None:
        configure_logging()
        scorer = Scorer.load(bundle_dir or find_bundle(storage_root, fingerprint))
        self._golden_requests = scorer.replay_golden()
        self._recommender = Recommender(scorer, model_version)
        log.info("bundle loaded", fingerprint=scorer.fingerprint, golden_requests=self._golden_requests)

    async def recommend(self, request: RecommendRequest, histories: list[list[str]]) -> RecommendResponse:
        """See Recommender."""
        return self._recommender.recommend(request, histories)

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """See Recommender."""
        return self._recommender.score(request)

    async def explain(self, request: ExplainRequest, history: list[str]) -> ExplainResponse:
        """See Recommender."""
        return self._recommender.explain(request, history)

    async def model(self) -> ModelInfo:
        """See Recommender."""
        return self._recommender.describe(self._golden_requests)


class RayBackend:
    """The API's backend over a handle to the scorer."""

    def __init__(self, scorer: DeploymentHandle[Any], features: FeatureSource, model_version: str) -> None:
        self.model_version = model_version
        self.features = features
        self._scorer = scorer
        self._degraded = Counter(
            "cllmr_degraded_answers", description="Answers given without the feature store, by reason.", tag_keys=("reason",)
        )

    async def recommend(self, request: RecommendRequest, histories: list[list[str]]) -> RecommendResponse:
        """See Backend."""
        return await _answer(self._scorer.recommend.remote(request, histories))

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """See Backend."""
        return await _answer(self._scorer.score.remote(request))

    async def explain(self, request: ExplainRequest, history: list[str]) -> ExplainResponse:
        """See Backend."""
        return await _answer(self._scorer.explain.remote(request, history))

    async def model(self) -> ModelInfo:
        """See Backend."""
        return await _answer(self._scorer.model.remote())

    def count_degraded(self, reason: str) -> None:
        """See Backend."""
        self._degraded.inc(tags={"reason": reason})


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
        model_version: str,
        feature_deadline_ms: int,
        feature_loading_s: int,
    ) -> None:
        configure_logging()
        logging.getLogger("httpx").setLevel(logging.WARNING)
        features: FeatureSource = NoFeatures()
        if feature_fingerprint is not None:
            open_reader: Callable[[], Any] = partial(open_history_reader, storage_root, feature_fingerprint)
            features = OnlineFeatures(open_reader, feature_deadline_ms / 1000)
            features.wait(feature_loading_s)
        self._backend = RayBackend(scorer, features, model_version)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._backend)
