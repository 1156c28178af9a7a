"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable
from typing import TypeVar

Seen = TypeVar("Seen")


def wait_until(what: str, look: Callable[[], Seen], holds: Callable[[Seen], object] = bool, seconds: float = 180) -> Seen:
    """Looks again and again until what is seen `holds`, and returns that.

    Raises:
        TimeoutError: it did not within `seconds`; tells what was waited for and what was last seen.
    """
    deadline = time.monotonic() + seconds
    while True:
        started = time.monotonic()
        if holds(seen := look()):
            return seen
        if (now := time.monotonic()) > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}; last seen: {seen!r}")
        time.sleep(max(0.05, now - started))  # looking does not keep busy what is waited for
