"""A circuit breaker: what fails again and again is left alone for a while, then tried by one call at a time.

Ours, as it is asked from an event loop, where a deadline passes while the call itself goes on: libraries count what a wrapped
call raises, and most let everybody through at once when the circuit is tried again.
"""

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]


class Breaker:
    """Told what became of every call; says whether to make the next one. For one thread.

    Args:
        failures: in a row until it opens.
        seconds: it stays open; then one call is let through, which closes it or opens it again.
        on_change: told the new state.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        failures: int,
        seconds: float,
        on_change: Callable[[State], None] = lambda state: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._seconds = failures, seconds
        self._on_change, self._clock = on_change, clock
        self._failures, self._until = 0, 0.0
        self.state: State = "closed"

    def allows(self) -> bool:
        """Whether to make a call now; one that is made must be told of by `succeeded` or `failed`."""
        if self.state == "closed":
            return True
        if self._clock() < self._until:
            return False
        self._until = self._clock() + self._seconds  # a call of which nothing is heard holds others up for no longer than this
        self._become("half_open")
        return True

    def succeeded(self) -> None:
        """A call went well."""
        self._failures = 0
        self._become("closed")

    def failed(self) -> None:
        """A call failed, or took too long."""
        self._failures += 1
        if self.state == "half_open" or self._failures >= self._limit:
            self._until = self._clock() + self._seconds
            self._become("open")

    def _become(self, state: State) -> None:
        if state != self.state:
            self.state = state
            self._on_change(state)
