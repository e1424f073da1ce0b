"""How many requests a revision has at once, on average, by a clock that the tests move."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knative.local.meter import ConcurrencyMeter, Load

STEADY = settings(derandomize=True, deadline=None, max_examples=200)


@pytest.mark.parametrize(
    ("events", "concurrency", "rps"),
    [
        pytest.param([], 0, 0, id="nobody comes"),
        pytest.param([(0, +1)], 1, 0.5, id="one stays all the time"),
        pytest.param([(0, +1), (1, -1)], 0.5, 0.5, id="one stays half the time"),
        pytest.param([(1, +1)], 0.5, 0.5, id="one comes at half-time and stays"),
        pytest.param([(0, +1), (0, +1), (1, -1), (1, +1)], 2, 1.5, id="one is followed by another"),
        pytest.param([(0, +1), (0, -1)], 0, 0.5, id="one that takes no time counts as a request only"),
        pytest.param([(2, +1), (2, +1)], 0, 1, id="those of the last moment count as requests only"),
        pytest.param([(0, +1), (0.5, +1), (1, +1), (1.5, -1)], 2, 1.5, id="by the time that each stays"),
    ],
)
def test_requests_are_averaged_over_two_seconds(events: list[tuple[float, int]], concurrency: float, rps: float) -> None:
    meter = ConcurrencyMeter(now=0)
    for now, change in events:
        (meter.arrive if change > 0 else meter.leave)(now)
    assert meter.report(2) == pytest.approx((concurrency, rps))


def test_each_report_is_about_the_time_since_the_one_before() -> None:
    meter = ConcurrencyMeter(now=0)
    meter.arrive(0)
    assert meter.report(1) == (1, 1)
    assert meter.report(3) == (1, 0)
    meter.leave(4)
    assert meter.report(5) == (0.5, 0)
    assert meter.report(6) == (0, 0)


def test_a_report_at_the_moment_of_the_one_before_gives_the_present() -> None:
    meter = ConcurrencyMeter(now=0)
    meter.arrive(0)
    meter.arrive(0)
    assert meter.report(0) == (2, 0)


def test_the_present_and_the_total_are_counted_on() -> None:
    meter = ConcurrencyMeter(now=0)
    for now in (0, 1, 2):
        meter.arrive(now)
        meter.report(now)
    meter.leave(3)
    assert (meter.current, meter.total) == (2, 3)


@STEADY
@given(
    steps=st.lists(st.tuples(st.floats(0, 10), st.sampled_from([+1, -1])), min_size=1),
    rest_s=st.floats(0.001, 10),
)
def test_the_average_is_never_outside_what_there_was(steps: list[tuple[float, int]], rest_s: float) -> None:
    meter, now, levels = ConcurrencyMeter(now=0), 0.0, [0]
    for pause_s, change in steps:
        now += pause_s
        if levels[-1] + change >= 0:
            levels.append(levels[-1] + change)
            (meter.arrive if change > 0 else meter.leave)(now)
    average, _ = meter.report(now + rest_s)
    assert min(levels) - 1e-9 <= average <= max(levels) + 1e-9


def test_a_request_is_load_once_it_is_there_and_no_longer_than_it_is() -> None:
    clock = {"now": 0.0}
    meter = ConcurrencyMeter(0)
    whole, never = (Load(meter, lambda: clock["now"]) for _ in range(2))
    clock["now"] = 1.0
    whole.count()
    whole.count()
    assert (meter.current, meter.total) == (1, 1)
    clock["now"] = 3.0
    assert (whole.end(), never.end()) == (3.0, 3.0)
    never.count()  # it came when nobody wanted it any more
    assert (meter.current, meter.total) == (0, 2)
    assert meter.report(4.0) == (0.5, 0.5)
