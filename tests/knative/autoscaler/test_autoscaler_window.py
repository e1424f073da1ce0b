"""The averaging windows, by example and against a slow model that keeps every sample."""

import math
from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knative.autoscaler.window import LinearWindow, WeightedWindow

STEADY = settings(derandomize=True, deadline=None, max_examples=200)

# Eighths add up without rounding, so a model may be compared exactly.
VALUES = st.integers(0, 8000).map(lambda n: n / 8)
# Mostly small steps on, some beyond any window, some back.
STEPS = st.one_of(st.sampled_from([0.0, 0.25, 1.0, 1.0, 2.0]), st.sampled_from([-70.0, -3.0, -1.0, 5.0, 9.0, 61.0, 1000.0]))
SAMPLES = st.lists(st.tuples(STEPS, VALUES), max_size=60)


class SlowWindow:
    """What a window is meant to average, computed anew from a dictionary of seconds."""

    def __init__(self, window_s: int) -> None:
        self.window_s = window_s
        self.seconds: dict[int, float] = {}

    def record(self, now: float, value: float) -> None:
        second = math.floor(now)
        if self.seconds and second - max(self.seconds) >= self.window_s:
            self.seconds = {}
        if not self.seconds or second > max(self.seconds) - self.window_s:
            self.seconds[second] = self.seconds.get(second, 0.0) + value

    def in_reach(self, now: float) -> dict[int, float]:
        if not self.seconds:
            return {}
        end = max(math.floor(now), max(self.seconds))
        return {second: value for second, value in self.seconds.items() if second > end - self.window_s}

    def linear(self, now: float) -> float:
        values = self.in_reach(now)
        if not values:
            return 0.0
        last = max(self.seconds)
        length = min(last - min(self.seconds) + 1, self.window_s - max(math.floor(now) - last, 0))
        return float((Decimal(sum(values.values())) / length).quantize(Decimal("1e-6"), ROUND_HALF_UP))

    def weighted(self, now: float) -> float:
        values = self.in_reach(now)
        if not values:
            return 0.0
        end = max(math.floor(now), max(self.seconds))
        coefficient = max(1 - 0.0001 ** (1 / self.window_s), 0.2)
        return math.fsum(value * coefficient * (1 - coefficient) ** (end - second) for second, value in values.items())


def filled(window: LinearWindow, samples: list[tuple[float, float]]) -> LinearWindow:
    for now, value in samples:
        window.record(now, value)
    return window


@pytest.mark.parametrize(
    ("samples", "now", "average"),
    [
        pytest.param([], 0, 0, id="nothing recorded is 0"),
        pytest.param([(0, 6)], 0, 6, id="one second is averaged over one second"),
        pytest.param([(0, 6), (0.99, 2)], 0, 8, id="samples of one second add up"),
        pytest.param([(0, 1), (1, 2), (2, 3)], 2, 2, id="a young window is averaged over its age"),
        pytest.param([(0, 8), (3, 8)], 3, 4, id="seconds without a sample count as 0"),
        pytest.param([(t, 2) for t in range(10)], 13.9, 2, id="seconds after the last sample do not count"),
        pytest.param([(t, float(t)) for t in range(10)], 13, 6.5, id="what the window has left behind does not count"),
        pytest.param([(t, 2) for t in range(10)], 18, 2, id="the last sample counts to the window's last second"),
        pytest.param([(t, 2) for t in range(10)], 19, 0, id="a window after the last sample the average is 0"),
        pytest.param([(0, 5), (9, 5)], 9, 1, id="a gap shorter than the window is filled with 0"),
        pytest.param([(0, 5), (10, 5)], 10, 5, id="after a whole window without samples it starts afresh"),
        pytest.param([(10, 2), (7, 6)], 10, 2, id="a late sample lands in its own second"),
        pytest.param([(10, 2), (0, 6)], 10, 2, id="a sample older than the window is dropped"),
        pytest.param([(10, 2), (1, 6)], 10, 0.8, id="the oldest second of the window is still taken"),
        pytest.param([(10, 2), (7, 6)], 5, 2, id="asked about the past it answers for its latest second"),
        pytest.param([(0, 0.0000005)], 0, 0.000001, id="half a millionth is rounded away from zero"),
        pytest.param([(0, -0.0000005)], 0, -0.000001, id="and so below zero"),
        pytest.param([(0, 1), (1, 0), (2, 0)], 2, 0.333333, id="six decimal places are kept"),
        pytest.param([(-3.5, 4), (-2, 2)], -2, 2, id="time may begin below zero"),
    ],
)
def test_a_linear_window_averages_its_seconds(samples: list[tuple[float, float]], now: float, average: float) -> None:
    assert filled(LinearWindow(10), samples).average(now) == average


@pytest.mark.parametrize(
    ("now", "empty"),
    [pytest.param(15, False, id="a window later not yet"), pytest.param(16, True, id="a second after that")],
)
def test_a_window_is_empty_when_more_than_its_length_has_passed(now: float, empty: bool) -> None:
    assert filled(LinearWindow(10), [(5, 1)]).is_empty(now) is empty


def test_a_new_window_is_empty() -> None:
    assert LinearWindow(10).is_empty(0)


def test_a_weighted_window_prefers_late_samples() -> None:
    rising = filled(WeightedWindow(4), [(0, 5), (1, 5), (2, 10), (3, 10)])
    falling = filled(WeightedWindow(4), [(0, 10), (1, 10), (2, 5), (3, 5)])
    assert rising.average(3) > 9.9
    assert falling.average(3) < 5.1


def test_a_weighted_window_of_a_minute_weighs_the_latest_second_with_a_fifth() -> None:
    assert filled(WeightedWindow(60), [(0, 10)]).average(0) == pytest.approx(2.0)


def test_a_weighted_average_fades_while_nothing_comes() -> None:
    window = filled(WeightedWindow(60), [(0, 10)])
    assert window.average(1) == pytest.approx(2.0 * 0.8)
    assert window.average(59) > 0
    assert window.average(60) == 0


def test_a_weighted_window_is_0_where_it_is_empty() -> None:
    assert WeightedWindow(6).average(3) == 0
    assert filled(WeightedWindow(6), [(0, 10)]).average(7) == 0


@STEADY
@given(window_s=st.sampled_from([1, 2, 6, 7, 60]), samples=SAMPLES, start=st.sampled_from([0.0, 1000.5]), ask=STEPS)
def test_windows_agree_with_the_slow_model(window_s: int, samples: list[tuple[float, float]], start: float, ask: float) -> None:
    linear, weighted, model = LinearWindow(window_s), WeightedWindow(window_s), SlowWindow(window_s)
    now = start
    for step, value in samples:
        now += step
        for window in (linear, weighted, model):
            window.record(now, value)
        for at in (now, now + abs(ask)):
            assert linear.average(at) == pytest.approx(model.linear(at), abs=1.1e-6)
            assert weighted.average(at) == pytest.approx(model.weighted(at), rel=1e-9, abs=1e-9)
            assert linear.is_empty(at) is (math.floor(at) - max(model.seconds) > window_s)


@STEADY
@given(values=st.lists(VALUES, min_size=1, max_size=100))
def test_an_average_of_gapless_data_lies_between_its_least_and_largest_second(values: list[float]) -> None:
    window = filled(LinearWindow(20), list(enumerate(values)))
    recent = values[-20:]
    assert min(recent) - 1e-6 <= window.average(len(values) - 1) <= max(recent) + 1e-6


@STEADY
@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_rounding_errors_do_not_pile_up(values: list[float]) -> None:
    window = LinearWindow(6)
    for second, value in enumerate(values):
        window.record(second, value)
    recent = values[-6:]
    assert window.average(len(values) - 1) == pytest.approx(sum(recent) / len(recent), abs=2e-6)


@STEADY
@given(values=st.lists(VALUES, min_size=1, max_size=100))
def test_a_weighted_average_never_exceeds_the_largest_second(values: list[float]) -> None:
    window = filled(WeightedWindow(20), list(enumerate(values)))
    assert 0 <= window.average(len(values) - 1) <= max(values)
