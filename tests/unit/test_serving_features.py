"""The feature store seen from a request: never an exception, never a wait beyond the deadline, recovers by itself."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from feature_repo.store import UNTIMED
from serving import features as features_module
from serving.feature_set import FeatureSet
from serving.features import UNAVAILABLE, FollowingFeatures, Histories, HistoryReader, NoFeatures, OnlineFeatures, Profiles
from tests.waiting import wait_until

DEADLINE = 0.5  # seconds, where it passes
NOW = 1_800_000_000  # Unix seconds
PATIENCE = 60.0  # seconds, where it does not: the machine may be busy


def known(user_ids: Sequence[str]) -> Histories:
    return Histories([[f"seen by {user_id}"] for user_id in user_ids])


@pytest.fixture
def opened() -> Iterator[list[OnlineFeatures]]:
    sources: list[OnlineFeatures] = []
    yield sources
    for source in sources:
        source.close()


def ask(source: OnlineFeatures | NoFeatures, *users: str) -> Histories:
    return asyncio.run(source.histories(users))


def test_histories_come_from_the_store_in_the_order_asked(opened: list[OnlineFeatures]) -> None:
    source = OnlineFeatures(lambda: known, PATIENCE)
    opened.append(source)
    source.wait(PATIENCE)
    assert source.state().state == "ready"
    assert ask(source, "b", "a") == Histories([["seen by b"], ["seen by a"]])


def test_while_the_store_is_being_opened_answers_are_degraded(opened: list[OnlineFeatures]) -> None:
    release = threading.Event()

    def slow_open() -> HistoryReader:
        release.wait(PATIENCE)
        return known

    source = OnlineFeatures(slow_open, PATIENCE)
    opened.append(source)
    started = time.monotonic()
    source.wait(0.05)
    assert time.monotonic() - started < PATIENCE / 2
    assert ask(source, "a") == Histories([[]], "features_loading")
    assert source.state().state == "loading"
    release.set()
    source.wait(PATIENCE)
    assert ask(source, "a") == Histories([["seen by a"]])


def test_a_store_that_cannot_be_opened_is_tried_again(opened: list[OnlineFeatures], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_RETRY_SECONDS", (0.3,))
    attempts: list[int] = []
    release = threading.Event()

    def third_time_lucky() -> HistoryReader:
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionError("no route to host\nand a second line")
        release.wait(PATIENCE)
        return known

    source = OnlineFeatures(third_time_lucky, PATIENCE)
    opened.append(source)
    source.wait(PATIENCE)
    assert ask(source, "a") == Histories([[]], "features_unavailable")
    assert source.state().reason == "ConnectionError: no route to host"
    release.set()
    wait_until("the store", source.state, lambda now: now.state == "ready", PATIENCE)
    assert ask(source, "a") == Histories([["seen by a"]])
    assert len(attempts) == 3


def test_a_slow_store_costs_the_deadline_and_not_more(opened: list[OnlineFeatures]) -> None:
    release = threading.Event()

    def stuck(user_ids: Sequence[str]) -> Histories:
        release.wait(PATIENCE)
        return known(user_ids)

    source = OnlineFeatures(lambda: stuck, DEADLINE)
    opened.append(source)
    source.wait(PATIENCE)

    async def many() -> list[Histories]:
        return await asyncio.gather(*(source.histories(["a"]) for _ in range(100)))

    started = time.monotonic()
    answers = asyncio.run(many())
    assert time.monotonic() - started < PATIENCE / 2  # all at once, though only a few threads look up
    assert set(map(str, answers)) == {str(Histories([[]], "features_timeout"))}
    release.set()


def test_of_look_ups_that_would_pile_up_behind_a_stall_the_store_never_hears(
    opened: list[OnlineFeatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "_MAX_WAITING", 3)
    release, looked_up = threading.Event(), list[str]()

    def stuck(user_ids: Sequence[str]) -> Histories:
        looked_up.extend(user_ids)
        release.wait(PATIENCE)
        return known(user_ids)

    source = OnlineFeatures(lambda: stuck, DEADLINE)
    opened.append(source)
    source.wait(PATIENCE)

    async def many() -> list[Histories]:
        return await asyncio.gather(*(source.histories([str(number)]) for number in range(8)))

    answers = asyncio.run(many())
    release.set()
    source._pool.shutdown(wait=True)
    assert {answer.degraded for answer in answers} == {"features_timeout"}
    assert sorted(looked_up) == ["0", "1", "2"]


def test_after_a_stall_the_store_is_used_again(opened: list[OnlineFeatures], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BREAKER_SECONDS", 0.05)
    release = threading.Event()

    def stuck(user_ids: Sequence[str]) -> Histories:
        release.wait(PATIENCE)
        return known(user_ids)

    source = OnlineFeatures(lambda: stuck, DEADLINE)
    opened.append(source)
    source.wait(PATIENCE)

    async def stall_and_recover() -> tuple[Histories, Histories]:
        during = await asyncio.gather(*(source.histories(["a"]) for _ in range(100)))
        release.set()
        await asyncio.sleep(0.1)
        return during[-1], await source.histories(["a"])

    during, after = asyncio.run(stall_and_recover())
    assert during.degraded == "features_timeout"
    assert after == Histories([["seen by a"]])


def test_a_store_that_fails_at_a_look_up_degrades_the_answer(opened: list[OnlineFeatures]) -> None:
    def broken(user_ids: Sequence[str]) -> Histories:
        raise RuntimeError("no such table")

    source = OnlineFeatures(lambda: broken, PATIENCE)
    opened.append(source)
    source.wait(PATIENCE)
    assert ask(source, "a", "b") == Histories([[], []], "features_unavailable")


def test_a_store_that_is_away_costs_nothing_after_a_few_failures_and_answers_are_what_was_last_known(
    opened: list[OnlineFeatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "BREAKER_SECONDS", 0.3)
    asked: list[Sequence[str]] = []
    told: list[tuple[str, Any]] = []
    is_up = True

    def reader(user_ids: Sequence[str]) -> Histories:
        asked.append(user_ids)
        if not is_up:
            raise ConnectionError("refused")
        return known(user_ids)

    class Remembers:
        def circuit(self, is_open: bool) -> None:
            told.append(("open", is_open))

        def last_good(self, users: int) -> None:
            told.append(("last good", users))

    source = OnlineFeatures(lambda: reader, PATIENCE, Remembers())
    opened.append(source)
    source.wait(PATIENCE)
    assert ask(source, "a") == Histories([["seen by a"]])
    is_up = False
    failed = [ask(source, "a", "b") for _ in range(5)]
    assert failed == [Histories([["seen by a"], []], "features_unavailable", ages=["last_good", None])] * 5
    assert [ask(source, "a") for _ in range(20)] == [Histories([["seen by a"]], "features_circuit_open")] * 20
    assert len(asked) == 6
    is_up = True
    time.sleep(0.4)
    assert ask(source, "b") == Histories([["seen by b"]])
    assert ask(source, "a") == Histories([["seen by a"]])
    assert [one for one in told if one[0] == "open"] == [("open", True), ("open", False)]
    assert told.count(("last good", 1)) == 25


def test_of_a_store_that_is_away_events_and_side_information_are_what_was_last_known_too(opened: list[OnlineFeatures]) -> None:
    text = np.ones(3, np.float32)
    found = Histories([["i1"], [], []], None, [[], ["i2"], []], profiles=Profiles("first", {"new": text}))
    answers = [found]
    source = OnlineFeatures(lambda: lambda user_ids: answers.pop(), DEADLINE)  # once
    opened.append(source)
    source.wait(5)
    assert ask(source, "a", "b", "new").ages == ["fresh", "fresh", None]
    away = ask(source, "new", "b", "nobody", "a")
    assert (away.degraded, away.item_ids, away.events) == (UNAVAILABLE, [[], [], [], ["i1"]], [[], ["i2"], [], []])
    assert away.ages == [None, "last_good", None, "last_good"]
    assert away.profiles == Profiles("first", {"new": text})
    assert ask(source, "a").profiles is None


@pytest.mark.parametrize(
    ("seconds_ago", "ttl", "age"), [(NOW, 100, "missing"), (100, 100, "fresh"), (101, 100, "stale"), (NOW - 1, 0, "fresh")]
)
def test_rows_older_than_their_view_allows_are_stale(seconds_ago: int, ttl: int, age: str) -> None:
    assert features_module.age_of(NOW - seconds_ago, ttl, NOW) == age


def test_rows_of_data_without_timestamps_have_no_age() -> None:
    for zones_apart in (-26, -9, 0, 5.5, 26):
        assert features_module.age_of(UNTIMED + zones_apart * 3600, 100, NOW) == "fresh"
    for days in (-2, 2):
        assert features_module.age_of(UNTIMED + days * 86_400, 100, NOW) == "stale"


def test_an_endpoint_without_a_feature_store_is_not_degraded() -> None:
    assert ask(NoFeatures(), "a", "b") == Histories([[], []])
    assert NoFeatures().state().state == "not_configured"


# -- bundles that change ------------------------------------------------------------------------------------------------

FIRST, SECOND, THIRD = (FeatureSet("/store", name) for name in ("first", "second", "third"))


def test_another_feature_set_is_used_once_it_is_open_and_the_one_before_until_then() -> None:
    release, opened = threading.Event(), []

    def open_source(wanted: FeatureSet) -> OnlineFeatures:
        def open_reader() -> HistoryReader:
            opened.append(wanted.fingerprint)
            if wanted != FIRST:
                release.wait(PATIENCE)
            return lambda users: Histories([[f"{wanted.fingerprint} of {user}"] for user in users])

        return OnlineFeatures(open_reader, deadline=PATIENCE)

    source = FollowingFeatures(open_source, FIRST)
    source.wait(PATIENCE)
    try:
        source.follow(FIRST)
        source.follow(None)  # a bundle that was trained without
        assert asyncio.run(source.histories(["a"])) == Histories([["first of a"]])
        source.follow(SECOND)
        assert asyncio.run(source.histories(["a"])) == Histories([["first of a"]])
        assert source.state().state == "loading"
        release.set()
        source.wait(PATIENCE)
        assert asyncio.run(source.histories(["a"])) == Histories([["second of a"]])
        assert source.state().state == "ready"
        for back_and_forth in (FIRST, SECOND, FIRST):
            source.follow(back_and_forth)
            assert asyncio.run(source.histories(["a"])) == Histories([[f"{back_and_forth.fingerprint} of a"]])
        source.follow(THIRD)
        source.wait(PATIENCE)
        assert asyncio.run(source.histories(["a"])) == Histories([["third of a"]])
        assert opened == ["first", "second", "third"]  # each once
    finally:
        source.close()


def test_the_circuit_that_is_told_is_the_one_of_the_feature_set_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BREAKER_SECONDS", PATIENCE)
    told: list[bool] = []
    release = threading.Event()

    class Remembers:
        def circuit(self, is_open: bool) -> None:
            told.append(is_open)

        def last_good(self, users: int) -> None:
            return

    def open_source(wanted: FeatureSet) -> OnlineFeatures:
        def read(user_ids: Sequence[str]) -> Histories:
            if wanted == SECOND:
                return known(user_ids)
            if "slow" in user_ids:
                release.wait(PATIENCE)
            raise ConnectionError("refused")

        return OnlineFeatures(lambda: read, PATIENCE, Remembers())

    source = FollowingFeatures(open_source, FIRST)

    async def fail_and_swap() -> None:
        for _ in range(3):
            await source.histories(["a"])
        under_way = [asyncio.create_task(source.histories(["slow"])) for _ in range(2)]
        await asyncio.sleep(0)
        source.follow(SECOND)
        source.wait(PATIENCE)
        assert await source.histories(["a"]) == Histories([["seen by a"]])
        assert told[-1] is False
        release.set()  # the failures that open the circuit of the one that was left
        await asyncio.gather(*under_way)
        assert True in told
        assert told[-1] is False
        source.follow(FIRST)
        assert (await source.histories(["a"])).degraded == "features_circuit_open"
        assert told[-1] is True
        source.follow(SECOND)
        assert (await source.histories(["a"])).degraded is None
        assert told[-1] is False

    source.wait(PATIENCE)
    try:
        asyncio.run(fail_and_swap())
    finally:
        source.close()


def test_a_feature_set_that_cannot_be_opened_leaves_the_one_before_and_is_told_in_the_state() -> None:
    def open_source(wanted: FeatureSet) -> OnlineFeatures:
        def open_reader() -> HistoryReader:
            if wanted == SECOND:
                raise ConnectionError("refused")
            return known

        return OnlineFeatures(open_reader, deadline=PATIENCE)

    source = FollowingFeatures(open_source, FIRST)
    source.wait(PATIENCE)
    try:
        source.follow(SECOND)
        source.wait(PATIENCE)
        assert asyncio.run(source.histories(["a"])) == Histories([["seen by a"]])
        assert (source.state().state, source.state().reason) == ("unavailable", "ConnectionError: refused")
    finally:
        source.close()
