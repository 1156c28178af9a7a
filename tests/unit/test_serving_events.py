"""One user's list of events: what is kept, in which order, and what the writer of an event is told."""

import time
from datetime import timedelta

import pytest

from serving.events import MAX_AHEAD_SECONDS, MAX_KEPT, Happened, happened, merged
from serving.schemas import EventsRequest

NOW = 1_000_000.0
TTL = 5_000.0


def at(*events: tuple[int, str]) -> list[Happened]:
    return [Happened(*event) for event in events]


def test_events_are_kept_in_the_order_of_their_time_whatever_the_order_they_come_in() -> None:
    kept, statuses = merged(at((999_000, "b")), at((999_500, "c"), (998_000, "a")), NOW, TTL)
    assert kept == at((998_000, "a"), (999_000, "b"), (999_500, "c"))
    assert statuses == ["stored", "stored"]


def test_the_same_event_again_changes_nothing_and_another_time_of_the_same_item_is_another_event() -> None:
    event = at((999_000, "a"))
    kept, statuses = merged(event, [*event, *event], NOW, TTL)
    assert (kept, statuses) == (event, ["duplicate", "duplicate"])
    kept, statuses = merged([], [*event, *event, *at((999_001, "a"))], NOW, TTL)
    assert (kept, statuses) == (at((999_000, "a"), (999_001, "a")), ["stored", "duplicate", "stored"])


@pytest.mark.parametrize(
    ("timestamp", "status"),
    [
        (int(NOW - TTL), "stored"),
        (int(NOW - TTL) - 1, "too_old"),
        (int(NOW) + MAX_AHEAD_SECONDS, "stored"),
        (int(NOW) + MAX_AHEAD_SECONDS + 1, "in_the_future"),
    ],
)
def test_what_is_too_old_or_of_the_future_is_not_kept(timestamp: int, status: str) -> None:
    kept, statuses = merged([], at((timestamp, "a")), NOW, TTL)
    assert statuses == [status]
    assert bool(kept) == (status == "stored")


def test_what_has_become_too_old_is_left_out_when_it_is_read_for_the_store_keeps_it() -> None:
    assert happened(["a", "b", "c"], [10, 20, 30], oldest=20.0) == at((20, "b"), (30, "c"))
    assert happened(None, None, oldest=0.0) == []


def test_the_examples_of_the_documentation_are_stored_whenever_they_are_copied() -> None:
    examples = EventsRequest.model_json_schema()["examples"]
    assert examples
    for example in examples:
        for event in EventsRequest.model_validate(example).events:
            _, statuses = merged([], at((event.timestamp, event.item_id)), time.time(), timedelta(days=30).total_seconds())
            assert statuses == ["stored"]


def test_a_full_list_lets_go_of_the_oldest_and_takes_nothing_older() -> None:
    full = at(*((998_000 + number, f"i{number}") for number in range(MAX_KEPT)))
    kept, statuses = merged(full, at((999_999, "new"), (997_000, "older than all")), NOW, TTL)
    assert statuses == ["stored", "too_old"]
    assert kept == [*full[1:], Happened(999_999, "new")]
