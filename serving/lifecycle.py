"""Which model is served: the registry's champion, loaded beside the one that answers and swapped in when it is proven.

A replica asks for the champion every few seconds. Another one than before is loaded and its golden requests are replayed in a
background thread, so both are in memory for that time; then one assignment swaps it in. A request works with the model it
began with, so its answer is of one model. A bundle that cannot be loaded is refused: the model before goes on, the refusal is
counted and logged once, and the bundle is tried again after a while, as it may be the storage that failed.
"""

import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import structlog

from components.artifacts import hold
from components.cllmr.linear.ranking import head_items
from components.errors import UserError
from serving.approximate import Exactness, prepare
from serving.attributes import Attributes
from serving.bundle import BUNDLE_DIRECTORY, find_bundle
from serving.feature_set import FeatureSet
from serving.lists import ready_made
from serving.recommender import Recommender
from serving.scorer import Scorer
from serving.settings import Scoring
from serving.texts import Texts, read_newcomers

JITTER = 0.25  # of the interval: replicas that started together do not ask together
RETRY_SECONDS = (30.0, 120.0, 600.0)  # between tries of one refused bundle
LISTS_SECONDS = 30.0  # between two looks for lists of the model that is served, or for better ones

EXACT = Scoring()

log = structlog.get_logger()


@dataclass(frozen=True)
class Target:
    """A bundle to serve, as the registry or the configuration file names it."""

    model_version: str
    fingerprint: str
    """Of the train artifact."""
    storage_root: str = field(compare=False)
    bundle_dir: str | None = field(default=None, compare=False)
    """A bundle outside the store, used instead of the train artifact's."""


@dataclass(frozen=True)
class Live:
    """A loaded bundle with all that a request needs of it, so that one assignment swaps everything."""

    target: Target
    recommender: Recommender
    head: npt.NDArray[np.bool_]
    texts: Texts
    golden_requests: int
    lists_table: str | None
    """Which lists were measured, see serving.lists.Looked."""

    @property
    def feature_set(self) -> FeatureSet | None:
        """What the bundle was trained on."""
        fingerprint: str | None = self.recommender.scorer.bundle.get("feature_fingerprint")
        return None if fingerprint is None else FeatureSet(self.target.storage_root, fingerprint)


def load(target: Target, scoring: Scoring = EXACT) -> Live:
    """Loads a bundle and replays its golden requests; raises ArtifactError when it is missing or damaged."""
    directory = Path(target.bundle_dir) if target.bundle_dir else find_bundle(target.storage_root, target.fingerprint)
    scorer = Scorer.load(directory, scoring.item_storage)
    golden_requests = scorer.replay_golden()
    attributes = Attributes.read(directory, scorer.num_items)
    index, exactness = prepare(scorer, scoring, directory)
    lists, exactness, table = ready_made(target.storage_root, target.fingerprint, scorer, scoring, exactness)
    log.info(
        "bundle loaded",
        model_version=target.model_version,
        fingerprint=target.fingerprint,
        golden_requests=golden_requests,
        **exactness.model_dump(exclude_none=True),
    )
    texts = Texts(directory, scorer)
    newcomers = read_newcomers(directory, scorer)
    recommender = Recommender(scorer, target.model_version, texts, index, exactness, lists, attributes, newcomers)
    return Live(target, recommender, head_items(scorer.popularity), texts, golden_requests, table)


def _nobody() -> Target | None:
    return None


class Events(Protocol):
    """Who is told what happens."""

    def swapped(self, before: Target | None, now: Target) -> None:
        """Another model answers; `before` is None for the first one."""
        ...

    def measured(self, target: Target, exactness: Exactness) -> None:
        """How exact the rankings of the model are that answers now."""
        ...

    def refused(self, target: Target) -> None:
        """A bundle was refused for the first time."""
        ...

    def settled(self, on_champion: bool) -> None:
        """The champion was asked for, and is what is served, or not."""
        ...

    def tried(self, before: Target | None, now: Target | None) -> None:
        """Another challenger is on trial, or none any more."""
        ...


class _Refusals:
    """The bundle that was refused last, and when it may be tried again."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._target: Target | None = None
        self._number, self._try_again_at = 0, 0.0

    def allow(self, target: Target) -> bool:
        """Whether to try a bundle now."""
        return target != self._target or time.monotonic() >= self._try_again_at

    def forget(self) -> None:
        """Something else is served: the bundle is told of again when it is refused again."""
        self._target = None

    def refuse(self, target: Target, error: Exception) -> None:
        """Tells of a bundle once."""
        if target != self._target:
            self._target, self._number = target, 0
            reason = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            log.error("bundle refused", model_version=target.model_version, fingerprint=target.fingerprint, reason=reason)
            self._events.refused(target)
        self._try_again_at = time.monotonic() + RETRY_SECONDS[min(self._number, len(RETRY_SECONDS) - 1)]
        self._number += 1


class Follower:
    """Serves one bundle, `live`, and follows the champion; while `tries` is true it holds the challenger too, `challenger`.

    Args:
        candidates: bundles to begin with, the first that can be loaded; the last one's error is raised when none can.
        read_champion: asks for the champion; None where there is none. May take long and may raise.
        events: who is told.
        interval: seconds between two questions.
        read_challenger: asks for the challenger; None where there is none. As `read_champion`.
        scoring: how item vectors are kept and looked through.
    """

    def __init__(
        self,
        candidates: Iterable[Target],
        read_champion: Callable[[], Target | None],
        events: Events,
        interval: float,
        read_challenger: Callable[[], Target | None] = _nobody,
        scoring: Scoring = EXACT,
    ) -> None:
        self._scoring = scoring
        self._read_champion, self._read_challenger = read_champion, read_challenger
        self.tries = False
        self.challenger: Live | None = None
        self._events = events
        self._interval = interval
        self._is_reachable = True
        self._refused, self._refused_challenger = _Refusals(events), _Refusals(events)
        self._closed = threading.Event()
        self._lists_table: str | None = None
        self._lists_failures, self._look_for_lists_at = 0, 0.0
        self.live = self._first(list(candidates))
        self._swapped(None)

    def _first(self, candidates: list[Target]) -> Live:
        target, *others = candidates
        try:
            return load(target, self._scoring)
        except Exception as error:  # whatever it is, the next one may do
            self._refused.refuse(target, error)
            if not others:
                raise
        return self._first(others)

    def start(self) -> None:
        """Begins to follow, in a thread of its own."""
        threading.Thread(target=self._follow, daemon=True, name="follow-champion").start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def _follow(self) -> None:
        while not self._closed.wait(self._interval * random.uniform(1 - JITTER, 1 + JITTER)):
            self.look()

    def look(self) -> None:
        """Asks once, and swaps if there is something to swap to; never raises."""
        for live in filter(None, (self.live, self.challenger)):  # whose texts are read when they are first asked for
            hold(live.target.storage_root, "train", live.target.fingerprint, BUNDLE_DIRECTORY)
        try:
            champion = self._read_champion()
            challenger = self._read_challenger() if self.tries else None
        except Exception as error:  # the model that is served goes on, whatever is wrong with the registry or the way to it
            if self._is_reachable:
                log.warning("champion cannot be asked for", error=type(error).__name__)
            self._is_reachable = False
            return
        self._is_reachable = True
        if champion is None or champion == self.live.target:
            self._refused.forget()
        elif self._refused.allow(champion):
            self._swap(champion)
        self._events.settled(champion in (None, self.live.target))
        self._look_for_lists()
        self._try(None if challenger == self.live.target else challenger)

    def _look_for_lists(self) -> None:
        """They are made after the model is served, as often as not, and storage that failed may answer later."""
        target, recommender = self.live.target, self.live.recommender
        before = recommender.exactness
        if before.lists == "off" or time.monotonic() < self._look_for_lists_at:
            return
        lists, exactness, table = ready_made(
            target.storage_root, target.fingerprint, recommender.scorer, self._scoring, before, self._lists_table
        )
        failed = exactness.lists == "refused" and table is None
        self._lists_failures = self._lists_failures + 1 if failed else 0
        pause = RETRY_SECONDS[min(self._lists_failures, len(RETRY_SECONDS)) - 1] if failed else LISTS_SECONDS
        self._look_for_lists_at = time.monotonic() + pause
        if lists is None and before.lists == "on":  # those that are used are as good as they were
            self._lists_table = table or self._lists_table
            return
        self._lists_table = table
        if lists is not None or exactness != before:
            recommender.take(lists, exactness)
            self._events.measured(target, exactness)

    def _try(self, target: Target | None) -> None:
        """Holds this challenger and no other; one that is refused is not tried on anybody."""
        before = None if self.challenger is None else self.challenger.target
        if target == before:
            return
        if target is not None and not self._refused_challenger.allow(target):
            return
        self.challenger = None  # as in _swap
        try:
            self.challenger = None if target is None else load(target, self._scoring)
        except Exception as error:  # as in _first
            assert target is not None, "to hold none needs no loading"
            self._refused_challenger.refuse(target, error)
        else:
            self._refused_challenger.forget()
        self._events.tried(before, None if self.challenger is None else self.challenger.target)

    def _swap(self, champion: Target) -> None:
        if self.challenger is not None and self.challenger.target != champion:
            self._try(None)  # before another is loaded: there are never three models
        try:
            live = self.challenger or load(champion, self._scoring)  # a challenger that is promoted is here already
        except Exception as error:  # as in _first
            self._refused.refuse(champion, error)
            return
        before, self.live = self.live.target, live
        self._refused.forget()
        log.info("model swapped", before=before.model_version, now=champion.model_version)
        self._swapped(before)

    def _swapped(self, before: Target | None) -> None:
        self._lists_table, self._lists_failures = self.live.lists_table, 0
        self._look_for_lists_at = time.monotonic() + LISTS_SECONDS
        self._events.swapped(before, self.live.target)
        self._events.measured(self.live.target, self.live.recommender.exactness)
