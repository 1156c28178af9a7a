"""How many requests a gateway takes on: as it is set, and while it must refuse some, only as many as it keeps up with.

Once more come than can be answered, who is let in waits for all that were let in before. With 64 of them that was twenty times
an answer's own time, and no more were answered for it than with five. What counts is the time that requests wait for each
other: until the gateway's event loop turns to them, and from the question to a scorer until its answer, less what that takes.
A feature store that is slow makes answers late too; to let in fewer would not help then, and it is not counted.

Nothing is measured, and nothing changes, as long as nobody is refused: a burst is answered late rather than refused.
"""

import asyncio
import time
from collections.abc import Callable
from statistics import fmean

FEWEST = 4
"""Requests for which there always is room: they keep a gateway busy."""
WAIT_SECONDS = 0.005
"""How long a request should wait for others, mean, while some are refused."""
TICK_SECONDS, TICKS = 0.01, 10
"""How often the event loop is asked, and how many of its answers make a decision."""


def adapted(room: int, wait: float, was_refused: bool, fewest: int, most: int) -> int:
    """The room after a decision: while some are refused, less in proportion to the wait, at most half at once, or one more; a
    quarter more while nobody is, as in the pauses of an overload that is hardly one.

    Args:
        room: before it.
        wait: of requests for others, mean since the last decision, seconds.
        was_refused: whether anybody was, since then.
        fewest, most: bounds of the room.
    """
    if not was_refused:
        return min(most, room + max(1, room // 4))
    if wait > WAIT_SECONDS:
        return max(fewest, int(room * max(0.5, WAIT_SECONDS / wait)))
    return min(most, room + 1)


class Room:
    """How many requests are worked on at a time.

    Args:
        most: at any time.
        fewest: at any time.
        told: the room, whenever it changes.
    """

    def __init__(self, most: int, fewest: int = FEWEST, told: Callable[[int], None] = lambda room: None) -> None:
        self.most, self.fewest, self.now = most, min(fewest, most), most
        self._told = told
        self._is_looking = self._was_refused = False
        self._late: list[float] = []
        self._waited: list[float] = []

    def refused(self) -> None:
        """Somebody found no room. From now on it is looked at how long requests wait, until there is room for all again."""
        self._was_refused = True
        if not self._is_looking:
            self._is_looking = True
            self._look_soon()

    def waited(self, seconds: float) -> None:
        """A scorer's answer has waited for others for so long."""
        if self._is_looking:
            self._waited.append(seconds)

    def _look_soon(self) -> None:
        asyncio.get_running_loop().call_later(TICK_SECONDS, self._look, time.monotonic() + TICK_SECONDS)

    def _look(self, due: float) -> None:
        self._late.append(max(0.0, time.monotonic() - due))
        if len(self._late) == TICKS:
            wait = fmean(self._late) + (fmean(self._waited) if self._waited else 0.0)
            room = adapted(self.now, wait, self._was_refused, self.fewest, self.most)
            if room != self.now:
                self.now = room
                self._told(room)
            self._is_looking = self._was_refused or room < self.most
            self._was_refused, self._late, self._waited = False, [], []
        if self._is_looking:
            self._look_soon()
