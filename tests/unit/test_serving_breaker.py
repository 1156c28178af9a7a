"""The circuit breaker: when it opens, whom it lets through, and when it closes."""

from serving.breaker import Breaker


class Clock:
    """Seconds that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock, told: list[str]) -> Breaker:
    breaker = Breaker(3, 2.0, told.append, clock)
    for _ in range(3):
        assert breaker.allows()
        breaker.failed()
    return breaker


def test_it_opens_after_failures_in_a_row_and_a_success_between_them_starts_the_count_again() -> None:
    told: list[str] = []
    breaker = Breaker(3, 2.0, told.append, Clock())
    for outcome in (breaker.failed, breaker.failed, breaker.succeeded, breaker.failed, breaker.failed):
        assert breaker.allows()
        outcome()
    assert told == []
    breaker.failed()
    assert not breaker.allows()
    assert told == ["open"]


def test_after_a_while_one_call_is_let_through_which_closes_it() -> None:
    clock, told = Clock(), list[str]()
    breaker = opened(clock, told)
    clock.now = 1.9
    assert not breaker.allows()
    clock.now = 2.0
    assert [breaker.allows() for _ in range(5)] == [True, False, False, False, False]
    breaker.succeeded()
    assert all(breaker.allows() for _ in range(5))
    assert told == ["open", "half_open", "closed"]


def test_a_failed_trial_opens_it_again_at_once_and_for_as_long() -> None:
    clock, told = Clock(), list[str]()
    breaker = opened(clock, told)
    clock.now = 2.0
    assert breaker.allows()
    breaker.failed()
    clock.now = 3.9
    assert not breaker.allows()
    clock.now = 4.0
    assert breaker.allows()
    assert told == ["open", "half_open", "open", "half_open"]


def test_a_trial_of_which_nothing_is_heard_does_not_keep_it_open_for_ever() -> None:
    clock = Clock()
    breaker = opened(clock, [])
    clock.now = 2.0
    assert breaker.allows()
    clock.now = 4.0
    assert breaker.allows()
