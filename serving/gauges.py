"""Gauges that last: what was true when it was set is told until it is set otherwise.

Ray forgets a gauge's value that was not set again within two of its reports (20 s), so that what nobody reports any more ends.
What changes seldom, as which model answers, would so be gone when somebody looks.
"""

import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

from ray.serve.metrics import Gauge

REPEAT_SECONDS = 5.0

_Tags = frozenset[tuple[str, str]]


class LastingGauge:
    """A gauge of Ray Serve whose values are set again and again, as long as this process lives.

    Args:
        name: see Ray.
        description: likewise.
        tag_keys: likewise.
    """

    def __init__(self, name: str, description: str, tag_keys: Any = ()) -> None:
        self.gauge = Gauge(name, description=description, tag_keys=tag_keys)
        self._values: dict[_Tags, float] = {}
        self._setting = threading.Lock()  # what has ended must not be repeated by a thread that is about to
        _repeat(self)

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Sets it, for good."""
        with self._setting:
            self._values[frozenset((tags or {}).items())] = value
            self.gauge.set(value, tags=dict(tags or {}))

    def end(self, tags: Mapping[str, str]) -> None:
        """Sets it to 0 and repeats that no more: the series ends soon after, so that series of the past do not pile up."""
        with self._setting:
            self._values.pop(frozenset(tags.items()), None)
            self.gauge.set(0, tags=dict(tags))

    def repeat(self) -> None:
        """Sets all values again."""
        with self._setting:
            for tags, value in self._values.items():
                self.gauge.set(value, tags=dict(tags))


_lasting: "weakref.WeakSet[LastingGauge]" = weakref.WeakSet()
_starting = threading.Lock()
_thread: threading.Thread | None = None


def _repeat(gauge: LastingGauge) -> None:
    """One thread for all gauges of the process, from the first of them on."""
    global _thread
    with _starting:
        _lasting.add(gauge)
        if _thread is None:
            _thread = threading.Thread(target=_keep_repeating, daemon=True, name="gauges")
            _thread.start()


def _keep_repeating() -> None:
    while True:
        time.sleep(REPEAT_SECONDS)
        with _starting:
            gauges = list(_lasting)
        for gauge in gauges:
            gauge.repeat()
