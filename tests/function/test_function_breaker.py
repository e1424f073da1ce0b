"""The breaker's states, with a clock that is turned by hand."""

import pytest

from function.breaker import Breaker
from function.errors import Unavailable


class Clock:
    """Shows what it is set to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(3, 30.0, clock=clock)


def call(breaker: Breaker, in_time: bool | None) -> bool:
    """A call that ends so; returns whether it was the trial."""
    is_trial = breaker.admit()
    breaker.ended(is_trial=is_trial, in_time=in_time)
    return is_trial


def test_it_trips_after_so_many_time_outs_in_a_row(breaker: Breaker) -> None:
    for _ in range(2):
        call(breaker, False)
    assert breaker.state == "closed"
    call(breaker, False)
    assert (breaker.state, breaker.trips) == ("open", 1)


def test_an_answer_in_between_starts_the_count_again(breaker: Breaker) -> None:
    for in_time in (False, False, True, False, False):
        call(breaker, in_time)
    assert breaker.state == "closed"


def test_a_caller_who_gives_up_counts_neither_way(breaker: Breaker) -> None:
    for in_time in (False, False, None, None, False):
        call(breaker, in_time)
    assert breaker.state == "open"


def test_while_it_is_open_callers_are_told_when_to_come_back(breaker: Breaker, clock: Clock) -> None:
    for _ in range(3):
        call(breaker, False)
    clock.now += 10
    with pytest.raises(Unavailable, match="the last 3 calls of the model timed out") as found:
        breaker.admit()
    assert found.value.retry_after_s == 20
    with pytest.raises(Unavailable):
        breaker.check()


def test_then_one_call_is_tried_and_the_others_wait_for_what_it_finds(breaker: Breaker, clock: Clock) -> None:
    for _ in range(3):
        call(breaker, False)
    clock.now += 30
    assert breaker.state == "half-open"
    breaker.check()  # asking takes nothing away
    assert breaker.admit()
    with pytest.raises(Unavailable):
        breaker.admit()
    breaker.ended(is_trial=True, in_time=True)
    assert breaker.state == "closed"
    assert not call(breaker, True)


def test_a_trial_that_times_out_opens_it_again(breaker: Breaker, clock: Clock) -> None:
    for _ in range(3):
        call(breaker, False)
    clock.now += 30
    assert call(breaker, False)
    assert (breaker.state, breaker.trips) == ("open", 2)
    clock.now += 29
    assert breaker.state == "open"


def test_a_trial_whose_caller_leaves_decides_nothing_and_the_next_call_is_one(breaker: Breaker, clock: Clock) -> None:
    for _ in range(3):
        call(breaker, False)
    clock.now += 30
    assert call(breaker, None)
    assert breaker.state == "half-open"
    assert call(breaker, True)
    assert breaker.state == "closed"


def test_a_call_from_before_that_still_comes_back_closes_it(breaker: Breaker) -> None:
    late = breaker.admit()
    for _ in range(3):
        call(breaker, False)
    breaker.ended(is_trial=late, in_time=True)
    assert breaker.state == "closed"


def test_one_from_before_that_times_out_later_is_not_taken_for_the_trial(breaker: Breaker, clock: Clock) -> None:
    late = breaker.admit()
    for _ in range(3):
        call(breaker, False)
    clock.now += 30
    trial = breaker.admit()
    breaker.ended(is_trial=late, in_time=False)
    with pytest.raises(Unavailable):
        breaker.check()  # the trial is still on its way
    breaker.ended(is_trial=trial, in_time=True)
    assert (breaker.state, breaker.trips) == ("closed", 1)
