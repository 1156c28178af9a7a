"""How much one caller may ask of a gateway replica: a moving window over its requests, by the package `limits`."""

import time

import limits


class Limiter:
    """Counts requests of callers, in this process: an endpoint of several gateway replicas lets through as many times more.

    Args:
        rate: such as 50/second, see `serving.RATE`.
    """

    def __init__(self, rate: str) -> None:
        self.rate = rate
        self._item = limits.parse(rate)
        self._window = limits.strategies.MovingWindowRateLimiter(limits.storage.MemoryStorage())
        self._latest = 0.0  # Unix seconds

    def wait(self, caller: str) -> float:
        """0 where the caller may ask now, which counts as asking; else the seconds until it may."""
        now = time.time()  # the package's clock
        if now < self._latest:  # it was set back: what was counted lies in the future, and would count until then
            self._window.storage.reset()
        self._latest = now
        if self._window.hit(self._item, caller):
            return 0.0
        # the window may have moved on since it was hit: refused is refused, and never 0
        return max(0.001, self._window.get_window_stats(self._item, caller).reset_time - time.time())
