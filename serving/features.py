"""Features at request time from the Feast online store: each user's recent items, and what he did since.

The feature store's client takes seconds to import, so it is loaded beside the model, and every look-up has a deadline: a
store that is slow, down or not there yet costs freshness, never an answer. The caller then gets what was last known of the
user, or nothing beside what the model was trained on, and the reason is in the answer (``X-Degraded``) and counted. A store
that fails again and again is left alone for a while (`serving.breaker`): nobody waits for it.

Feast does not apply a view's ``ttl`` to what it reads online, so event timestamps are looked at here. A history that is older
is used all the same, as what a user has seen stays true; the user's result says so (``history``), and it is counted as stale:
many of them say that no feature set was built for long. Data without timestamps have no age and are fresh. A history holds raw
item ids, so it needs no certain bundle either: when another bundle begins to answer, histories come from the feature set of the
one before until the new one's is open.

A request of many users is one look-up: histories and side information are in the feature set's Feast project, what users did
since (`serving.events`) in another that a new feature set must not forget, and both are read together (`feature_repo.joint`).
The user's vector is in the bundle, beside the items' that it is multiplied with. Side information is used of those of whom
nothing else is known (`Profiles`), and goes with the name of its feature set: a bundle trained on another refuses it.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import structlog
from cachetools import TTLCache

from feature_repo.store import UNTIMED
from serving.breaker import Breaker, State
from serving.events import FIELDS as EVENT_FIELDS
from serving.events import VIEW as EVENTS
from serving.events import happened
from serving.feature_set import JOIN_KEY, FeatureSet, find_feature_set
from serving.schemas import (
    ExplainRequest,
    ExplainResponse,
    FeaturesState,
    HistoryAge,
    NewItemScore,
    RecommendRequest,
    ScoreRequest,
    ScoreResponse,
    UserRecommendations,
)

LOADING = "features_loading"
TIMEOUT = "features_timeout"
CIRCUIT_OPEN = "features_circuit_open"
UNAVAILABLE = "features_unavailable"

HISTORY, ITEM_IDS = "user_history", "item_ids"
SIDE_INFORMATION, INTRODUCTION = "user_side_information", "introduction"

BREAKER_FAILURES, BREAKER_SECONDS = 5, 2.0

_THREADS = 4  # look-ups at a time; the store's client blocks
_LAST_GOOD_USERS, _LAST_GOOD_SECONDS = 10_000, 3600.0  # users kept for when the store is away: about 20 MB
_MAX_WAITING = 64  # look-ups that may pile up behind a slow store before new ones are not even tried
_RETRY_SECONDS = (1.0, 2.0, 5.0, 15.0, 60.0)
_ZONES_APART = 26 * 3600  # seconds between the time zones that are farthest from each other, see feature_repo.joint.Row

Age = Literal["fresh", "stale", "missing"]
_OfUser = TypeVar("_OfUser", UserRecommendations, ScoreResponse, ExplainResponse, NewItemScore)
_AboutOne = TypeVar("_AboutOne", ScoreRequest, ExplainRequest)
Floats = npt.NDArray[np.float32]
log = structlog.get_logger()


@dataclass(frozen=True)
class Profiles:
    """Side information of users of whom nothing else is known."""

    feature_set: str
    """Fingerprint of the one it is from: another may have been made with another encoder."""
    embeddings: Mapping[str, Floats]
    """Of the users' texts, (dim,), by user id; left out where there is none."""


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
    profiles: Profiles | None = None
    """Of the users who have neither items nor events; None where there are no such users, or where they have none."""

    def __post_init__(self) -> None:
        if not self.events:
            object.__setattr__(self, "events", [[] for _ in self.item_ids])
        if not self.ages:
            age: HistoryAge = "fresh" if self.degraded is None else "last_good"
            known = zip(self.item_ids, self.events, strict=True)
            object.__setattr__(self, "ages", [age if items or since else None for items, since in known])

    @property
    def known(self) -> list[list[str]]:
        """All items of each user: the history, then what happened since."""
        return [[*before, *since] for before, since in zip(self.item_ids, self.events, strict=True)]

    def told_to(self, request: RecommendRequest) -> RecommendRequest:
        """The request as if it had brought what its users did lately, oldest first."""
        events = {user_id: items for user_id, items in zip(request.users, self.events, strict=True) if items}
        if not events:
            return request
        recent = {user_id: [*events.get(user_id, []), *request.recent.get(user_id, [])] for user_id in request.users}
        return request.model_copy(update={"recent": recent})

    def told_to_one(self, request: _AboutOne) -> _AboutOne:
        """Likewise, of a request that is about one user."""
        return request.model_copy(update={"recent": [*self.events[0], *request.recent]})

    def said_of(self, results: Sequence[_OfUser]) -> list[_OfUser]:
        """What was answered to each user, saying how current the history is that it was made with."""
        return [result.model_copy(update={"history": age}) for result, age in zip(results, self.ages, strict=True)]


HistoryReader = Callable[[Sequence[str]], Histories]
"""What is known of each user, with empty lists for a user the store does not know."""


class _Known(NamedTuple):
    """What was last known of a user."""

    item_ids: list[str]
    events: list[str]
    profile: tuple[str, Floats] | None
    """And its feature set."""


_NOTHING = _Known([], [], None)


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
        self._last_good: TTLCache[str, _Known] = TTLCache(_LAST_GOOD_USERS, _LAST_GOOD_SECONDS)
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
        self._keep(user_ids, found)
        return found

    def _keep(self, user_ids: Sequence[str], found: Histories) -> None:
        source, embeddings = ("", {}) if found.profiles is None else (found.profiles.feature_set, found.profiles.embeddings)
        for user_id, items, events in zip(user_ids, found.item_ids, found.events, strict=True):
            profile = (source, embeddings[user_id]) if user_id in embeddings else None
            self._last_good[user_id] = _Known(items, events, profile)

    def _without_store(self, user_ids: Sequence[str], reason: str) -> Histories:
        """What was last known of the users."""
        if number := sum(user_id in self._last_good for user_id in user_ids):
            self._told.last_good(number)
        known = [self._last_good.get(user_id, _NOTHING) for user_id in user_ids]
        profiles = {user_id: one.profile for user_id, one in zip(user_ids, known, strict=True) if one.profile is not None}
        source = next((feature_set for feature_set, _ in profiles.values()), None)  # a reader reads one feature set
        return Histories(
            [one.item_ids for one in known],
            reason,
            [one.events for one in known],
            profiles=None if source is None else Profiles(source, {user_id: text for user_id, (_, text) in profiles.items()}),
        )

    def _circuit(self, state: State) -> None:
        if state != "half_open":
            log.warning("feature store circuit", state=state)
            self.tell_circuit()

    def tell_circuit(self) -> None:
        """Tells whether the circuit is open, to whom it is told when that changes: they may have heard of another source's."""
        self._told.circuit(self._breaker.state != "closed")

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
        wanted = self._sources[self._wanted]
        if wanted.is_open and wanted is not self._used:
            self._used = wanted
            wanted.tell_circuit()
        asked = self._used
        found = await asked.histories(user_ids)
        if asked is not self._used:  # left meanwhile, and may have told of its own circuit
            self._used.tell_circuit()
        return found

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
    from feature_repo.joint import open_joint_store

    own = {HISTORY: [ITEM_IDS], SIDE_INFORMATION: [INTRODUCTION]}
    store = open_joint_store(directory, storage_root, JOIN_KEY, own, {EVENTS: list(EVENT_FIELDS)})
    ttl = {view: store.ttl(view) for view in (*own, EVENTS)}

    def read(user_ids: Sequence[str]) -> Histories:
        rows, now = store.read(user_ids), time.time()
        ages = {view: [age_of(row.event_time, ttl[view], now) for row in rows[view]] for view in own}
        for view, found in ages.items():
            on_ages(view, Counter(found))
        items = [list(row[ITEM_IDS] or []) for row in rows[HISTORY]]
        since = ([row[name] for name in EVENT_FIELDS] for row in rows[EVENTS])
        events = [[event.item_id for event in happened(of, at, now - ttl[EVENTS])] for of, at in since]
        texts = {
            user_id: np.asarray(embedding, dtype=np.float32)
            for user_id, row, *known in zip(user_ids, rows[SIDE_INFORMATION], items, events, strict=True)
            if not any(known) and (embedding := row[INTRODUCTION])
        }
        told = [_said(age, bool(since)) for age, since in zip(ages[HISTORY], events, strict=True)]
        return Histories(items, None, events, told, Profiles(fingerprint, texts) if texts else None)

    read([""])
    return read


def _said(history: Age, has_events: bool) -> HistoryAge:
    """Of a history and what happened since, the worse; events are as current as can be."""
    if history == "missing":
        return "fresh" if has_events else None
    return history


def age_of(event_time: float, ttl: float, now: float) -> Age:
    """Of a row that was looked up.

    Args:
        event_time: Unix seconds, 0 where there is no row; `UNTIMED`, read in whatever time zone, has no age and is fresh.
        ttl: of its view, seconds; 0 is without end, as Feast has it.
        now: Unix seconds.
    """
    if not event_time:
        return "missing"
    has_age = abs(event_time - UNTIMED) > _ZONES_APART
    return "stale" if has_age and 0 < ttl < now - event_time else "fresh"
