"""The online history: what users did since the feature set was built, pushed to the feature store as it happens.

It belongs to no feature set: a model that takes over finds it. Writing reads a user's list, adds to it and writes it back, so
there must be one writer at a time: an endpoint has one, and with SQLite those of several endpoints wait for each other (with
Redis they do not). The same event (user, item, time) written again changes nothing. Lists are bounded, and events older than
the view's ``ttl`` are left out when they are read: Feast does not do it.
"""

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from serving.feature_set import JOIN_KEY, find_feature_set
from serving.schemas import Event, EventStatus

if TYPE_CHECKING:
    from feast import FeatureStore

PUSH_SOURCE = "interactions"
VIEW = "user_events"
FIELDS = ("item_ids", "timestamps")

MAX_KEPT = 200
"""Events kept per user, the latest; as many as a history has."""
MAX_AHEAD_SECONDS = 300
"""How far a caller's clock may be ahead: an event of the far future would never leave the list."""
LOCK_SECONDS = 5.0
"""Longest wait for another writer, less than callers wait: one that hangs must not hold up who is told so."""


class Happened(NamedTuple):
    """An event of a known user; ordered by time."""

    timestamp: int
    item_id: str


def happened(item_ids: Sequence[str] | None, timestamps: Sequence[int] | None, oldest: float) -> list[Happened]:
    """A user's row of the view (see `FIELDS`) without what says nothing any more; its values are None where there is no row."""
    events = zip(timestamps or [], item_ids or [], strict=True)
    return [Happened(timestamp, item_id) for timestamp, item_id in events if timestamp >= oldest]


class OnlineHistory:
    """Reads and writes the events of users.

    Args:
        store: see `feature_repo.store.open_shared_store`.
        ttl: age beyond which an event says nothing any more.
        lock: a file that whoever writes this store locks, see `alone`.
    """

    def __init__(self, store: "FeatureStore", ttl: timedelta, lock: Path | None) -> None:
        self._store = store
        self._ttl = ttl.total_seconds()
        self._lock = lock

    def read(self, user_ids: Sequence[str]) -> list[list[str]]:
        """Items of each user's events, oldest first; empty for a user without any. One look-up for all users."""
        return [[event.item_id for event in events] for events in self._events(user_ids)]

    def _events(self, user_ids: Sequence[str]) -> list[list[Happened]]:
        oldest = time.time() - self._ttl
        found = self._store.get_online_features(
            features=[f"{VIEW}:{field}" for field in FIELDS], entity_rows=[{JOIN_KEY: user_id} for user_id in user_ids]
        ).to_dict()
        return [happened(items, times, oldest) for items, times in zip(*(found[field] for field in FIELDS), strict=True)]

    def write(self, events: Sequence[Event]) -> list[EventStatus]:
        """Adds events to their users' lists, one look-up and one write for all; returns what became of each, in order.

        Waits while another process writes; raises BlockingIOError as `alone`.
        """
        with alone(self._lock):
            return self._write(events)

    def _write(self, events: Sequence[Event]) -> list[EventStatus]:
        import pandas as pd

        places: dict[str, list[int]] = {}
        for place, event in enumerate(events):
            places.setdefault(event.user_id, []).append(place)
        now, statuses, changed = time.time(), list[EventStatus](["stored"] * len(events)), dict[str, list[Happened]]()
        for (user_id, own), before in zip(places.items(), self._events(list(places)), strict=True):
            new = [Happened(events[place].timestamp, events[place].item_id) for place in own]
            kept, found = merged(before, new, now, self._ttl)
            for place, status in zip(own, found, strict=True):
                statuses[place] = status
            if kept != before:
                changed[user_id] = kept
        if changed:
            table = {
                JOIN_KEY: list(changed),
                "event_timestamp": [datetime.fromtimestamp(kept[-1].timestamp, UTC) for kept in changed.values()],
                "item_ids": [[event.item_id for event in kept] for kept in changed.values()],
                "timestamps": [[event.timestamp for event in kept] for kept in changed.values()],
            }
            self._store.push(PUSH_SOURCE, pd.DataFrame(table))
        return statuses


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Within, nobody else holds this lock, in whatever process; it ends with its process, however that ends. None: no lock.

    Raises BlockingIOError where somebody holds it for `LOCK_SECONDS`.
    """
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        _take(file)
        yield


@retry(retry=retry_if_exception_type(BlockingIOError), wait=wait_fixed(0.02), stop=stop_after_delay(LOCK_SECONDS), reraise=True)
def _take(file: IO[str]) -> None:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def merged(
    before: Sequence[Happened], new: Sequence[Happened], now: float, ttl: float
) -> tuple[list[Happened], list[EventStatus]]:
    """One user's list with new events in it, oldest first, and what became of each of them.

    Args:
        before: the list so far.
        new: in any order, repeats allowed.
        now: Unix seconds.
        ttl: age beyond which an event is not kept, seconds.
    """
    usable = {event for event in new if now - ttl <= event.timestamp <= now + MAX_AHEAD_SECONDS}
    kept = sorted({*before, *usable})[-MAX_KEPT:]
    known = set(before)
    statuses: list[EventStatus] = []
    for event in new:
        if event.timestamp > now + MAX_AHEAD_SECONDS:
            statuses.append("in_the_future")
        elif event in known:
            statuses.append("duplicate")
        elif event not in kept:
            statuses.append("too_old")
        else:
            statuses.append("stored")
            known.add(event)
    return kept, statuses


def open_history(storage_root: str, feature_fingerprint: str) -> OnlineHistory:
    """Opens the online history beside a feature set and looks one user up, so that the first request does not pay for it.

    Args:
        storage_root: of the endpoint.
        feature_fingerprint: of a feature set there: it says which kind of online store there is.

    Raises:
        ArtifactError: there is no such feature set.
        Exception: whatever Feast raises when the store cannot be reached.
    """
    from feature_repo.store import SHARED_PROJECT, SQLITE, open_shared_store, sqlite_path

    store = open_shared_store(find_feature_set(storage_root, feature_fingerprint), storage_root)
    from feature_repo.feature_views import EVENTS_TTL  # Feast is imported by now, see `feature_repo.feast_import`

    is_sqlite = store.config.online_store.type == SQLITE
    lock = sqlite_path(storage_root, SHARED_PROJECT).with_suffix(".lock") if is_sqlite else None
    history = OnlineHistory(store, EVENTS_TTL, lock)
    history.read([""])
    return history
