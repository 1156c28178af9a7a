"""What tests wait for: it comes, or they fail and say what was there instead."""

import pytest

from tests.waiting import wait_until


def test_what_was_waited_for_is_returned() -> None:
    counts = iter(range(10))
    assert wait_until("three", lambda: next(counts), lambda count: count == 3) == 3


def test_what_does_not_come_is_told_with_what_was_last_seen() -> None:
    with pytest.raises(TimeoutError, match=r"^waited 0\.1 s for the moon; last seen: \['a star'\]$"):
        wait_until("the moon", lambda: ["a star"], lambda seen: "the moon" in seen, seconds=0.1)
