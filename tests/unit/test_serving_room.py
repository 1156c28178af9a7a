"""How many requests there is room for: fewer while some are refused and the others wait, all again afterwards."""

import asyncio
import time

import pytest

from serving.room import FEWEST, TICK_SECONDS, TICKS, WAIT_SECONDS, Room, adapted

MOST = 64


@pytest.mark.parametrize(
    ("room", "wait", "was_refused", "after"),
    [
        (64, 2 * WAIT_SECONDS, True, 32),
        (64, 100 * WAIT_SECONDS, True, 32),  # at most half at once: one long turn is no overload
        (64, 1.25 * WAIT_SECONDS, True, 51),
        (5, 2 * WAIT_SECONDS, True, FEWEST),
        (64, 100 * WAIT_SECONDS, False, 64),  # a queue that nobody is refused for
        (10, 100 * WAIT_SECONDS, False, 12),
        (10, WAIT_SECONDS, True, 11),  # refused, though there was time for more
        (64, 0.0, True, 64),
    ],
)
def test_the_room_shrinks_while_some_are_refused_and_the_others_wait(
    room: int, wait: float, was_refused: bool, after: int
) -> None:
    assert adapted(room, wait, was_refused, FEWEST, MOST) == after


def test_it_is_found_under_an_overload_and_given_back_after_it() -> None:
    async def run() -> None:
        told: list[int] = []
        room = Room(MOST, told=told.append)
        until = time.monotonic() + 30.0
        while room.now > FEWEST and time.monotonic() < until:  # an event loop whose turns take long
            room.refused()
            time.sleep(4 * TICK_SECONDS)
            await asyncio.sleep(0)
        assert room.now == FEWEST
        assert told == [32, 16, 8, 4]
        while room.now < MOST and time.monotonic() < until:
            await asyncio.sleep(TICK_SECONDS)
        assert room.now == MOST
        assert told[4:] == [5, 6, 7, 8, 10, 12, 15, 18, 22, 27, 33, 41, 51, 63, 64]

    asyncio.run(run())


def test_who_waits_for_others_answers_makes_it_shrink_too() -> None:
    async def run() -> int:
        room = Room(MOST)
        for _ in range(3 * TICKS):
            room.refused()
            room.waited(20 * WAIT_SECONDS)
            await asyncio.sleep(TICK_SECONDS)
        return room.now

    assert asyncio.run(run()) < MOST


def test_there_is_never_less_than_the_fewest_nor_more_than_the_most() -> None:
    assert Room(2).fewest == 2
    assert Room(MOST, fewest=12).fewest == 12
    assert adapted(12, 1.0, True, 12, MOST) == 12
    assert adapted(MOST, 0.0, False, FEWEST, MOST) == MOST


def test_nothing_is_looked_at_as_long_as_nobody_is_refused() -> None:
    async def run() -> Room:
        room = Room(MOST)
        room.waited(1.0)
        time.sleep(2 * TICK_SECONDS * TICKS)
        await asyncio.sleep(2 * TICK_SECONDS)
        return room

    room = asyncio.run(run())
    assert (room.now, room._waited, room._is_looking) == (MOST, [], False)
