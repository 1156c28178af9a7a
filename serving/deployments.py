"""The endpoint's Ray Serve deployments: a gateway that speaks HTTP and a scorer that holds the model, scaled apart, and three
of one replica: one asks the model registry for all scorers, one writes the online history for all gateways, and one
reads the texts of new items.

They are thin: the gateway runs the API of `serving.api` over handles to the others (`serving.backend`), the scorer runs
`serving.recommender`, for all who ask at about the same time (`serving.together`), and follows the registry's champion with
`serving.lifecycle`.
A full queue in front of the scorer refuses a request at once (503, Retry-After) instead of letting everybody wait.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import structlog
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from components.errors import ConfigError
from components.ids import UNKNOWN
from components.registry import ModelVersion, Registry, RegistryError
from serving import admission
from serving.admission import Admission
from serving.api import create_app
from serving.attributes import FilterError
from serving.auth import read_tokens
from serving.backend import Answered, Inside, RayBackend
from serving.breaker import Breaker
from serving.callers import Callers
from serving.degrade import Static
from serving.events import OnlineHistory, open_history
from serving.feature_set import FeatureSet
from serving.features import (
    BREAKER_FAILURES,
    BREAKER_SECONDS,
    FeatureSource,
    FollowingFeatures,
    NoFeatures,
    OnlineFeatures,
    Profiles,
    open_history_reader,
)
from serving.identity import read_identities
from serving.lifecycle import EXACT, Follower, Live, Target
from serving.limits import Limiter
from serving.logs import configure_replica_logging
from serving.metrics import GatewayMetrics, HistoryMetrics, RegistryMetrics, ScorerMetrics
from serving.ranking import Floats
from serving.recommender import Question
from serving.room import Room
from serving.schemas import (
    Event,
    EventStatus,
    ExplainRequest,
    ExplainResponse,
    ItemsRequest,
    ItemsResponse,
    ModelInfo,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
)
from serving.settings import Scoring, Trial
from serving.texts import TextEncoder
from serving.together import Together
from serving.trial import Shadow, joined, model_of, narrowed, parts, share

PRODUCTS_AT_ONCE = 1 << 27
"""Products, some 20 ms of one core, up to which a ranking is made where requests come in: in a thread beside it everything took
two to three times the CPU (both wait for Python's lock at every step). Longer work may not hold up health checks."""
REGISTRY_DEADLINE_SECONDS = 10.0  # for an answer of the replica that asks the registry
REGISTRY_PATIENCE_SECONDS = 5.0
"""How long that replica waits for the registry before it answers with what it remembers: well within the deadline, where MLflow
gives up on a registry that hangs after 45 s."""
HOLD_SECONDS = 600.0
"""How often a replica that follows no registry says that its copy of the model is in use: see `components.artifacts.hold`."""

_T = TypeVar("_T")

log = structlog.get_logger()


class RegistryReplica:
    """Asks the model registry, so that one process holds its client and not every scorer; remembers the last answers.

    Args:
        tracking_uri: of the registry, see `components.registry`.
        model_name: in the registry.
        max_age_s: how old an answer may be before the registry is asked again, seconds.
    """

    def __init__(self, tracking_uri: str, model_name: str, max_age_s: float) -> None:
        configure_replica_logging()
        self._registry = Registry(tracking_uri, model_name)
        self._max_age_s = max_age_s
        self._metrics = RegistryMetrics()
        self._champions: list[Target] = []
        self._challenger: Target | None = None
        self._asked_at = -math.inf
        self._is_up = True
        self._asking: asyncio.Task[None] | None = None

    async def champions(self) -> list[Target]:
        """The champion and the champion before it, as far as there are any; of earlier while the registry is down or slow."""
        await self._refresh()
        return self._champions

    async def challenger(self) -> Target | None:
        """The challenger, if there is one; of earlier while the registry is down or slow."""
        await self._refresh()
        return self._challenger

    async def _refresh(self) -> None:
        """Waits for one question that all callers share, and outlives each of them."""
        if self._asking is None:
            if time.monotonic() - self._asked_at < self._max_age_s:
                return
            self._asking = asyncio.create_task(self._ask_aside())
        await asyncio.wait([self._asking], timeout=REGISTRY_PATIENCE_SECONDS)

    async def _ask_aside(self) -> None:
        try:
            await asyncio.to_thread(self._ask)
        finally:
            self._asked_at, self._asking = time.monotonic(), None

    def _ask(self) -> None:
        try:
            found = [version for version in (self._registry.champion(), self._registry.previous()) if version is not None]
            challenger = self._registry.challenger()
        except Exception as error:  # whatever MLflow raises, models stay as they are and it is asked again
            if self._is_up:
                reason = error.message if isinstance(error, RegistryError) else f"{type(error).__name__}: {error}"
                log.warning("registry does not answer", reason=reason)
            self._is_up = False
        else:
            self._champions = [_target(version) for version in found]
            self._challenger = None if challenger is None else _target(challenger)
            self._is_up = True
        self._metrics.registry_up.set(int(self._is_up))


async def _aside(answer: Callable[[], _T], recent: Sequence[str]) -> _T:
    """What is answered, in a thread where further items are scored against all others: that may take long."""
    return await asyncio.to_thread(answer) if recent else answer()


def _target(version: ModelVersion) -> Target:
    return Target(version.version, version.fingerprint, version.storage_root)


class HistoryReplica:
    """Writes the online history for all gateways: one writer, so that no event is lost between reading a list and writing it.

    Requests that come while one is written are written together. While there is no such replica, or no store, events are
    refused and told again by whoever sent them.

    Args:
        storage_root: of the endpoint.
        feature_fingerprint: of a feature set there.
    """

    def __init__(self, storage_root: str, feature_fingerprint: str) -> None:
        configure_replica_logging()
        self._open = partial(open_history, storage_root, feature_fingerprint)
        self._breaker = Breaker(BREAKER_FAILURES, BREAKER_SECONDS)  # as where it is read: nobody queues up behind a dead store
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
        if not self._breaker.allows():
            return None
        try:
            self._history = self._history or self._open()
            statuses = self._history.write(events) if events else []
        except Exception as error:  # whatever a store's client raises, the events are told again and it is tried again
            log.warning("online history cannot be written", error=type(error).__name__)
            self._breaker.failed()
            return None
        self._breaker.succeeded()
        return statuses


class EncoderReplica:
    """Reads texts of new items: in a process of its own, so that nobody who asks for a ranking waits for it or its memory.

    It is started when it is first needed, and stopped when nobody asks for long. Who asks before it has loaded its encoder may
    be told to come back; the loading goes on meanwhile. What waits is bounded by the deployment's queue.
    """

    def __init__(self) -> None:
        configure_replica_logging()
        self._encoder = TextEncoder()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="text-encoder")

    async def encode(self, encoder: str, texts: list[str]) -> Floats | str:
        """Embeddings, (len(texts), dim), or why there are none."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._encoder.encode, encoder, texts)
        except (ConfigError, ImportError) as error:
            log.error("text encoder cannot be loaded", encoder=encoder, reason=str(error))
            return f"the text encoder '{encoder}' is not installed here."


class _AskedRegistry:
    """A `RegistryReplica` as a scorer asks it: from threads, where an answer can be waited for; without one it names nobody."""

    def __init__(self, handle: DeploymentHandle[Any] | None) -> None:
        if handle is not None:
            # RAY_SERVE_THROUGHPUT_OPTIMIZED=1 does not let a handle be asked from threads by itself
            handle._init(_run_router_in_separate_loop=True)  # type: ignore[no-untyped-call]
        self._handle = handle
        self.is_there = handle is not None

    def champions(self) -> list[Target]:
        return [] if self._handle is None else self._handle.champions.remote().result(timeout_s=REGISTRY_DEADLINE_SECONDS)

    def champion(self) -> Target | None:
        return next(iter(self.champions()), None)

    def challenger(self) -> Target | None:
        return None if self._handle is None else self._handle.challenger.remote().result(timeout_s=REGISTRY_DEADLINE_SECONDS)


class ScorerReplica:
    """Holds one model, and a challenger while one is on trial; the model is loaded and its golden requests are replayed before
    the replica takes requests.

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
        scoring: Scoring = EXACT,
    ) -> None:
        configure_replica_logging()
        self._metrics = ScorerMetrics()
        self._registry = _AskedRegistry(registry)
        interval = poll_interval_s or HOLD_SECONDS

        def begin() -> Follower:
            """With what other replicas serve: the configuration's bundle may be of long ago."""
            asked = self._registry
            try:
                first = asked.champions()
            except Exception as error:  # as in Follower.look
                log.warning("champion cannot be asked for", error=type(error).__name__)
                first = []
            candidates = dict.fromkeys([*first, deployed])
            return Follower(candidates, asked.champion, self._metrics, interval, asked.challenger, scoring)

        with ThreadPoolExecutor(1) as pool:  # a handle cannot be waited for in the event loop, where a replica is made
            self._follower = pool.submit(begin).result()
        self._trial, self._shadow = Trial(), Shadow(self._metrics)
        self._together = Together(self._answers)
        # products with all texts, for every user and item of a history: one such request at a time, beside all others
        self._new_items = ThreadPoolExecutor(1, thread_name_prefix="new-items")
        self._follower.start()  # without a registry too: the model's copy is to be held

    def reconfigure(self, trial: dict[str, Any]) -> None:
        """Ray Serve's way to change a running replica: its `user_config`, see Trial."""
        self._trial = Trial.model_validate(trial)
        self._follower.tries = self._trial.needs()
        if self._trial.needs() and not self._registry.is_there:
            log.warning("nobody is tried: the endpoint was deployed without a registry, serve.poll_interval_s = 0")
        log.info("trial", **trial)

    async def recommend(
        self, request: RecommendRequest, histories: list[list[str]], profiles: Profiles | None = None
    ) -> Answered[str | FilterError]:
        """See Recommender; answers as JSON, which takes a sixth of the time that pickling the models of a ranking does.

        A filter that is wrong is an answer too: what is raised here, Ray Serve logs and counts as a failure of ours.
        """
        try:
            found = await self.recommend_here(request, histories, profiles)
        except FilterError as error:
            return self._answered(error, self._follower.live)
        answer = found.answer.model_dump_json()
        return Answered(answer, found.model_version, found.feature_set, found.live_version, found.took)

    async def recommend_here(
        self, request: RecommendRequest, histories: list[list[str]], profiles: Profiles | None = None
    ) -> Answered[RecommendResponse]:
        """Likewise, for who asks in this very process; raises FilterError."""
        self._follower.live.recommender.filters.matching(request.filters)  # before others are asked together with it
        answered, took = await self._together.ask(Question(request, histories, profiles))
        return answered._replace(took=took)

    async def _answers(self, asked: list[Question]) -> list[Answered[RecommendResponse]]:
        """Answers to several requests; those for one model are scored together."""
        self._metrics.batch_size.observe(len(asked))
        trial, live, challenger = self._trial, self._follower.live, self._follower.challenger
        split = [parts(trial, live, challenger, question) for question in asked]
        ranked: list[tuple[Live, list[RecommendResponse]]] = []
        for model in filter(None, (live, challenger)):
            if questions := [part.question for found in split for part in found if part.model is model]:
                ranked.append((model, await self._rank(model, questions)))
        in_turn = {model.target: iter(answers) for model, answers in ranked}
        told = [joined([(part.places, next(in_turn[part.model.target])) for part in found]) for found in split]
        sent = [Answered(answer, answer.model_version, live.feature_set, live.target.model_version) for answer in told]
        # from here on nothing fails for a request: a batch that did is answered again, and must not be counted twice
        for model, answers in ranked:
            self._metrics.recommended(answers, model.recommender.scorer.item_vocabulary, model.head)
        if challenger is not None:
            for question, answer in zip(asked, told, strict=True):
                self._try(trial, challenger, question, answer)
        return sent

    async def _rank(self, model: Live, questions: list[Question]) -> list[RecommendResponse]:
        """Answers of one model, in a thread where they may take long."""
        recommender = model.recommender
        self._metrics.profiles_refused(sum(map(recommender.refused, questions)), model.target.model_version)
        with self._metrics.timed("model"):
            if sum(map(recommender.products, questions)) <= PRODUCTS_AT_ONCE:
                return recommender.recommend_all(questions)
            return await asyncio.to_thread(recommender.recommend_all, questions)

    def _try(self, trial: Trial, challenger: Live, question: Question, answer: RecommendResponse) -> None:
        """Compares a shadow with what was answered; counts a request that a canary had no part in, see `parts`."""
        match trial.mode:
            case "shadow":
                if held := share(trial, challenger, question):
                    compared = answer.model_copy(update={"results": [answer.results[at] for at in held]})
                    self._shadow.compare(challenger, narrowed(question, held), compared)
            case "canary":
                if not challenger.recommender.filters.know(question.request.filters) and share(trial, challenger, question):
                    self._metrics.left_out(challenger.target.model_version)

    def _answered(self, answer: _T, model: Live) -> Answered[_T]:
        live = self._follower.live
        return Answered(answer, model.target.model_version, live.feature_set, live.target.model_version)

    def _model_of(self, user_id: str) -> Live:
        """What answers one user."""
        return model_of(self._trial, self._follower.live, self._follower.challenger, user_id)

    async def score(self, request: ScoreRequest) -> Answered[ScoreResponse]:
        """See Recommender."""
        live = self._model_of(request.user_id)
        with self._metrics.timed("model"):
            answer = await _aside(partial(live.recommender.score, request), request.recent)
        self._metrics.scored(answer)
        return self._answered(answer, live)

    async def explain(self, request: ExplainRequest, history: list[str]) -> Answered[ExplainResponse]:
        """See Recommender."""
        live = self._model_of(request.user_id)
        with self._metrics.timed("model"):
            answer = await _aside(partial(live.recommender.explain, request, history), request.recent)
        self._metrics.explained(answer)
        return self._answered(answer, live)

    async def popular(self, k: int) -> Answered[Static]:
        """See Recommender."""
        live = self._follower.live
        return self._answered(live.recommender.popular(k), live)

    async def text_encoder(self) -> Answered[str | None]:
        """Which encoder new items' texts must be read by, None without texts."""
        live = self._follower.live
        found = await asyncio.to_thread(live.texts.are_there)  # what is damaged is told as what is not there
        return self._answered(live.texts.encoder if found else None, live)

    async def new_items(
        self, request: ItemsRequest, histories: list[list[str]], encoder: str, embeddings: Floats
    ) -> Answered[ItemsResponse | None]:
        """See Recommender; None when the texts were encoded for another model than the one that is live by now."""
        live = self._follower.live
        if live.texts.encoder != encoder:
            return self._answered(None, live)
        with self._metrics.timed("model"):
            answer = await asyncio.get_running_loop().run_in_executor(
                self._new_items, self._of_texts, live, request, histories, encoder, embeddings
            )
        self._metrics.new_items_scored(answer)
        return self._answered(answer, live)

    @staticmethod
    def _of_texts(
        live: Live, request: ItemsRequest, histories: list[list[str]], encoder: str, embeddings: Floats
    ) -> ItemsResponse:
        return live.recommender.new_items(request, histories, encoder, live.texts.read(), embeddings)

    async def unknown_items(self, item_ids: list[str]) -> Answered[list[str]]:
        """Those of some items that the model does not know, each once, in their order."""
        live = self._follower.live
        rows = live.recommender.scorer.item_vocabulary.rows(item_ids)
        unknown = list(dict.fromkeys(item_id for item_id, row in zip(item_ids, rows, strict=True) if row == UNKNOWN))
        self._metrics.told(len(unknown), live.target.model_version)
        return self._answered(unknown, live)

    async def model(self) -> Answered[ModelInfo]:
        """See Recommender."""
        live = self._follower.live
        return self._answered(live.recommender.describe(live.golden_requests), live)


@serve.ingress()
class GatewayReplica:
    """Speaks HTTP: checks requests, looks up features, asks the scorer.

    A starting replica waits for the feature store up to a limit, so that the first answers are as good as later ones; a
    store that is down does not keep it from answering.

    Args:
        scorer: a handle to scorers, or arguments of one to hold itself.
        storage_root: of the endpoint.
        feature_fingerprint: of the feature set that the bundle was trained on; None: no feature store.
        deployed_version: what the registry calls the bundle.
        most_working, fewest_working: requests that are worked on at a time, and while some are refused: see `serving.room`.
        rate_limit: requests taken from one caller, see Limiter; None: any number.
        feature_deadline_ms: how long a request waits for the feature store.
        feature_loading_s: how long the start does.
        history: a handle to the `HistoryReplica`, where there is a feature store.
        encoder: a handle to the `EncoderReplica`.
    """

    def __init__(
        self,
        scorer: DeploymentHandle[Any] | dict[str, Any],
        storage_root: str,
        feature_fingerprint: str | None,
        deployed_version: str,
        most_working: int,
        fewest_working: int,
        rate_limit: str | None,
        feature_deadline_ms: int,
        feature_loading_s: int,
        history: DeploymentHandle[Any] | None,
        encoder: DeploymentHandle[Any],
    ) -> None:
        configure_replica_logging()
        logging.getLogger("httpx").setLevel(logging.WARNING)
        callers = Callers(read_tokens(), read_identities())
        self._limiter = None if rate_limit is None else Limiter(rate_limit)
        metrics = GatewayMetrics()
        features: FeatureSource = NoFeatures()
        if feature_fingerprint is not None:

            def open_source(wanted: FeatureSet) -> OnlineFeatures:
                reader = partial(open_history_reader, wanted.storage_root, wanted.fingerprint, metrics.count_ages)
                return OnlineFeatures(reader, feature_deadline_ms / 1000, metrics)

            features = FollowingFeatures(open_source, FeatureSet(storage_root, feature_fingerprint))
            features.wait(feature_loading_s)
        room = Room(most_working, fewest_working, metrics.room.set)
        metrics.room.set(room.now)
        self._scorer: ScorerReplica | None = None
        asked: DeploymentHandle[Any] | Inside
        if isinstance(scorer, dict):
            self._scorer = ScorerReplica(**scorer)
            asked = Inside(self._scorer)
        else:
            asked = scorer
        self._backend = RayBackend(asked, features, deployed_version, history, encoder, metrics, room.waited)
        self._admission = Admission(room, lambda: self._backend.model_version, metrics.refused.inc, callers)
        admission.keep(self._admission)

    def reconfigure(self, trial: dict[str, Any]) -> None:
        """See ScorerReplica; only of a gateway that holds one."""
        assert self._scorer is not None
        self._scorer.reconfigure(trial)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._backend, self._admission, self._limiter)
