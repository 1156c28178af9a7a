"""Features at request time from the Feast online store: each user's recent items, and what he did since.

The feature store's client takes seconds to import, so it is loaded beside the model, and every look-up has a deadline: a
store that is slow, down or not there yet costs freshness, never an answer. The caller then gets what was last known of the
user, or nothing beside what the model was trained on, and the reason is in the answer (``X-Degraded``) and counted. A store
that fails again and again is left alone for a while (`serving.breaker`): nobody waits for it.

Feast does not apply a view's ``ttl`` to what it reads online, so event timestamps are looked at here. A history that is older
is used all the same, as what a user has seen stays true; the user's result says so (``history``), and it is counted as stale:
many of them say that no feature set was built for long. A history holds raw item ids, so it needs no certain bundle either:
when another bundle begins to answer, histories come from the feature set of the one before until the new one's is open.

A request of many users is one look-up of their histories and one of their events (`serving.events`), side by side. They cannot
be one: Feast looks up one project at a time, each feature set is a project of its own, and events live in another that a new
feature set must not forget. The user's vector is in the bundle, beside the items' that it is multiplied with. His
side-information embedding is in the online store (service "serving") and is not read here: whom a feature set knows has a
history in it, of any split, and is in the bundle that was trained on it, so nobody is left whom the embedding alone could
answer; and it would cost everybody (`tests/benchmarks/serving_features.py`).
"""

import asyncio
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import structlog
from cachetools import TTLCache

from components.artifacts import Store
from components.errors import ArtifactError
from serving.breaker import Breaker, State
from serving.schemas import ExplainResponse, FeaturesState, HistoryAge, NewItemScore, UserRecommendations

LOADING = "features_loading"
TIMEOUT = "features_timeout"
CIRCUIT_OPEN = "features_circuit_open"
UNAVAILABLE = "features_unavailable"

SERVICE = "serving"
JOIN_KEY = "user_id"
HISTORY = "user_history:item_ids"

BREAKER_FAILURES, BREAKER_SECONDS = 5, 2.0

_THREADS = 4  # look-ups at a time; the store's client blocks
_LAST_GOOD_USERS, _LAST_GOOD_SECONDS = 10_000, 3600.0  # histories kept for when the store is away: about 20 MB
_MAX_WAITING = 64  # look-ups that may pile up behind a slow store before new ones are not even tried
_RETRY_SECONDS = (1.0, 2.0, 5.0, 15.0, 60.0)

Age = Literal["fresh", "stale", "missing"]
_OfUser = TypeVar("_OfUser", UserRecommendations, ExplainResponse, NewItemScore)
log = structlog.get_logger()


@dataclass(frozen=True)
class Histories:
    """What the feature store knew in time."""

    item_ids: list[list[str]]
    """Recent items per user, in the order asked; empty where nothing is known."""
    degraded: str | None = None
    """Why the feature store was not used, None when it was."""
    events: list[list[str]] = field(default_factory=list)
    """Items of what each user did since, oldest first, in the same order."""
    ages: list[HistoryAge] = field(default_factory=list)
    """How current each user's items are; left out: as current as can be where the store was used, else last seen."""

    def __post_init__(self) -> None:
        if not self.events:
            object.__setattr__(self, "events", [[] for _ in self.item_ids])
        if not self.ages:
            age: HistoryAge = "fresh" if self.degraded is None else "last_good"
            object.__setattr__(self, "ages", [age if items else None for items in self.item_ids])

    def with_events(self, since: "Histories") -> "Histories":
        """These with what the same users did since; of what differs between the two, the worse is said."""
        ages = [max(pair, key=_WORST_LAST.index) for pair in zip(self.ages, since.ages, strict=True)]
        return Histories(self.item_ids, self.degraded or since.degraded, since.item_ids, ages)

    def said_of(self, results: Sequence[_OfUser]) -> list[_OfUser]:
        """What was answered to each user, saying how current the history is that it was made with."""
        return [result.model_copy(update={"history": age}) for result, age in zip(results, self.ages, strict=True)]


_WORST_LAST: tuple[HistoryAge, ...] = (None, "fresh", "stale", "last_good")

HistoryReader = Callable[[Sequence[str]], Histories]
"""Recent item ids of each user, empty for a user the store does not know."""


@dataclass(frozen=True)
class FeatureSet:
    """The features that one bundle was trained on."""

    storage_root: str
    fingerprint: str


class FeatureSource(Protocol):
    """Where request-time features come from."""

    async def histories(self, user_ids: Sequence[str]) -> Histories:
        """Recent items of some users; never raises, never waits longer than its deadline."""
        ...

    def state(self) -> FeaturesState:
        """Whether it can be used right now."""
        ...

    def follow(self, feature_set: FeatureSet | None) -> None:
        """Told after every answer which feature set its bundle was trained on."""
        ...


class Told(Protocol):
    """Who is told how the store does."""

    def circuit(self, is_open: bool) -> None:
        """The circuit breaker opened or closed."""
        ...

    def last_good(self, users: int) -> None:
        """So many users were answered with what was last known of them."""
        ...


class NobodyTold:
    """See Told."""

    def circuit(self, is_open: bool) -> None:
        """See Told."""

    def last_good(self, users: int) -> None:
        """See Told."""


class NoFeatures:
    """An endpoint without a feature store, by choice: what is seen is what the model was trained on."""

    async def histories(self, user_ids: Sequence[str]) -> Histories:
        """See FeatureSource."""
        return Histories([[] for _ in user_ids])

    def state(self) -> FeaturesState:
        """See FeatureSource."""
        return FeaturesState(state="not_configured")

    def follow(self, feature_set: FeatureSet | None) -> None:
        """See FeatureSource; the choice holds for later bundles too."""


class OnlineFeatures:
    """A feature store that is opened in the background and asked with a deadline; recovers by itself.

    Args:
        open_reader: opens the store; may take seconds, may fail, is tried again.
        deadline: seconds a look-up may take.
        told: who is told how the store does.
    """

    def __init__(self, open_reader: Callable[[], HistoryReader], deadline: float, told: Told | None = None) -> None:
        self._open_reader = open_reader
        self._deadline = deadline
        self._reader: HistoryReader | None = None
        self._problem: str | None = None
        self._waiting = 0
        self._told = told or NobodyTold()
        self._breaker = Breaker(BREAKER_FAILURES, BREAKER_SECONDS, self._circuit)
        self._last_good: TTLCache[str, list[str]] = TTLCache(_LAST_GOOD_USERS, _LAST_GOOD_SECONDS)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="features")
        self._settled = threading.Event()  # opened, or failed once
        self._closed = threading.Event()
        threading.Thread(target=self._open, daemon=True, name="features-open").start()

    def _open(self) -> None:
        for attempt in range(10**9):
            started = time.monotonic()
            try:
                self._reader = self._open_reader()
            except Exception as error:  # whatever a store's client raises, the endpoint answers without it and tries again
                self._problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                log.warning("feature store cannot be opened", reason=self._problem, attempt=attempt + 1)
            else:
                self._problem = None
                log.info("feature store opened", seconds=round(time.monotonic() - started, 1))
                return
            finally:
                self._settled.set()
            if self._closed.wait(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)]):
                return

    @property
    def is_open(self) -> bool:
        """Whether look-ups are tried."""
        return self._reader is not None

    def wait(self, seconds: float) -> None:
        """Waits until the store is open or has failed once, at most so long."""
        self._settled.wait(seconds)

    def close(self) -> None:
        """Ends the background threads once look-ups in flight are through."""
        self._closed.set()
        self._pool.shutdown(wait=False)

    async def histories(self, user_ids: Sequence[str]) -> Histories:
        """See FeatureSource."""
        reader = self._reader
        if reader is None:
            return self._without_store(user_ids, UNAVAILABLE if self._problem else LOADING)
        if self._waiting >= _MAX_WAITING:
            return self._without_store(user_ids, TIMEOUT)
        if not self._breaker.allows():
            return self._without_store(user_ids, CIRCUIT_OPEN)
        self._waiting += 1
        lookup = asyncio.get_running_loop().run_in_executor(self._pool, reader, list(user_ids))
        lookup.add_done_callback(self._done)
        try:
            found = await asyncio.wait_for(asyncio.shield(lookup), self._deadline)
        except TimeoutError:
            self._breaker.failed()
            return self._without_store(user_ids, TIMEOUT)
        except Exception as error:  # as in _open
            self._breaker.failed()
            log.warning("feature store look-up failed", error=type(error).__name__)
            return self._without_store(user_ids, UNAVAILABLE)
        self._breaker.succeeded()
        self._last_good.update(zip(user_ids, found.item_ids, strict=True))
        return found

    def _without_store(self, user_ids: Sequence[str], reason: str) -> Histories:
        """What was last known of the users."""
        if known := sum(user_id in self._last_good for user_id in user_ids):
            self._told.last_good(known)
        return Histories([self._last_good.get(user_id, []) for user_id in user_ids], reason)

    def _circuit(self, state: State) -> None:
        if state != "half_open":
            log.warning("feature store circuit", state=state)
            self._told.circuit(state == "open")

    def _done(self, lookup: "asyncio.Future[Histories]") -> None:
        self._waiting -= 1
        if not lookup.cancelled():
            lookup.exception()  # of a look-up that nobody waits for any more: read, so that asyncio does not complain

    def state(self) -> FeaturesState:
        """See FeatureSource."""
        if self._reader is not None:
            return FeaturesState(state="ready")
        return FeaturesState(state="unavailable" if self._problem else "loading", reason=self._problem)


class FollowingFeatures:
    """The feature set of the bundle that answers.

    Args:
        open_source: begins to open a feature set.
        first: the feature set to begin with.
    """

    def __init__(self, open_source: Callable[[FeatureSet], OnlineFeatures], first: FeatureSet) -> None:
        self._open_source = open_source
        self._wanted = first
        self._used = open_source(first)
        self._sources = {first: self._used}

    def wait(self, seconds: float) -> None:
        """See OnlineFeatures."""
        self._sources[self._wanted].wait(seconds)

    def close(self) -> None:
        """See OnlineFeatures."""
        for source in self._sources.values():
            source.close()

    async def histories(self, user_ids: Sequence[str]) -> Histories:
        """See FeatureSource."""
        if self._sources[self._wanted].is_open:
            self._used = self._sources[self._wanted]
        return await self._used.histories(user_ids)

    def state(self) -> FeaturesState:
        """See FeatureSource."""
        return self._sources[self._wanted].state()

    def follow(self, feature_set: FeatureSet | None) -> None:
        """See FeatureSource. The one used until now stays open: a rollback, or replicas that swap one after another, return."""
        if feature_set is None or feature_set == self._wanted:
            return
        self._wanted = feature_set
        if feature_set not in self._sources:
            log.info("feature set follows the bundle", fingerprint=feature_set.fingerprint)
            for other in [key for key, source in self._sources.items() if source is not self._used]:
                self._sources.pop(other).close()
            self._sources[feature_set] = self._open_source(feature_set)


_IMPORTING = threading.Lock()


@contextmanager
def lean_import() -> Iterator[None]:
    """Lets Feast be imported in one second instead of six, and in 130 MB less.

    Feast imports torch where it is installed, which an endpoint has no use for, and lets typeguard rewrite its classes to
    check every call, which is meant for its own development.
    """
    import typeguard

    with _IMPORTING:
        checked, torch = typeguard.typechecked, "torch"
        hide_torch = torch not in sys.modules
        if hide_torch:
            sys.modules[torch] = None  # type: ignore[assignment]  # Python's own way to say: cannot be imported
        typeguard.typechecked = _unchecked
        try:
            yield
        finally:
            typeguard.typechecked = checked
            if hide_torch:
                del sys.modules[torch]


def _unchecked(target: Any = None, **options: Any) -> Any:
    return target if target is not None else lambda decorated: decorated


def find_feature_set(storage_root: str, fingerprint: str) -> Path:
    """Where a feature set lies; Feast, which opens it, is imported on the way, see `lean_import`.

    Raises:
        ArtifactError: there is no such feature set.
    """
    manifest = Store(storage_root).find("features", fingerprint)
    if manifest is None:
        raise ArtifactError(
            f"feature set {fingerprint} is not below '{storage_root}'.", "Build it again: cllmr run --from features"
        )
    with lean_import():
        import feast  # noqa: F401  # here, before anything else imports it the slow way
    return manifest.path()


def open_history_reader(
    storage_root: str, fingerprint: str, on_ages: Callable[[str, Counter[Age]], None] = lambda view, ages: None
) -> HistoryReader:
    """Opens the feature set with this fingerprint and looks one user up, so that the first request does not pay for it.

    Args:
        storage_root: where the feature set lies.
        fingerprint: of the features artifact.
        on_ages: told after every look-up how many rows of the view are fresh, stale or missing.

    Raises:
        ArtifactError: there is no such feature set.
        Exception: whatever Feast raises when the store cannot be reached.
    """
    directory = find_feature_set(storage_root, fingerprint)
    from feature_repo.store import feature_refs, open_store

    store = open_store(directory, storage_root)
    view, _, feature = HISTORY.partition(":")
    if HISTORY not in feature_refs(store, SERVICE, JOIN_KEY):
        raise ArtifactError(
            f"feature set {fingerprint} has no {HISTORY} in its service '{SERVICE}'.",
            "Build it again: cllmr run --from features",
        )

    kept = store.get_feature_view(view).ttl
    ttl = 0.0 if kept is None else kept.total_seconds()

    def read(user_ids: Sequence[str]) -> Histories:
        rows = [{JOIN_KEY: user_id} for user_id in user_ids]
        answer = store.get_online_features(features=[HISTORY], entity_rows=rows)
        column = list(answer.proto.metadata.feature_names.val).index(feature)
        now = time.time()
        ages = [age_of(stamp.seconds, ttl, now) for stamp in answer.proto.results[column].event_timestamps]
        on_ages(view, Counter(ages))
        told: list[HistoryAge] = [None if age == "missing" else age for age in ages]
        return Histories([list(items or []) for items in answer.to_dict()[feature]], ages=told)

    read([""])
    return read


def age_of(event_time: int, ttl: float, now: float) -> Age:
    """Of a row that was looked up.

    Args:
        event_time: Unix seconds, 0 where there is no row.
        ttl: of its view, seconds; 0 is without end, as Feast has it.
        now: Unix seconds.
    """
    if not event_time:
        return "missing"
    return "stale" if 0 < ttl < now - event_time else "fresh"
