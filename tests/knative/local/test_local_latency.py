"""Percentiles of the last minute, and the histogram of everything, by a clock that the tests move."""

import pytest

from knative.local.latency import Histogram, Latencies


def test_before_anybody_was_answered_there_is_no_percentile() -> None:
    assert Latencies().percentiles(0) == {"p50": None, "p95": None, "p99": None}


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        pytest.param([3.0], (3.0, 3.0, 3.0), id="of one it is that one"),
        pytest.param([2.0, 1.0], (1.0, 2.0, 2.0), id="of two the median is the smaller"),
        pytest.param([n / 100 for n in range(100, 0, -1)], (0.5, 0.95, 0.99), id="of a hundred, by rank"),
    ],
)
def test_percentiles_are_by_nearest_rank(seconds: list[float], expected: tuple[float, ...]) -> None:
    latencies = Latencies()
    for value in seconds:
        latencies.add(0, value)
    assert tuple(latencies.percentiles(0).values()) == expected


def test_what_is_older_than_a_minute_counts_no_more() -> None:
    latencies = Latencies()
    latencies.add(0, 9.0)
    latencies.add(30, 1.0)
    assert latencies.percentiles(60)["p99"] == 9.0
    assert latencies.percentiles(61)["p99"] == 1.0
    assert latencies.percentiles(91)["p99"] is None
    assert latencies.histogram.buckets()[-1] == ("+Inf", 2)


def test_of_very_many_the_last_thousand_are_kept() -> None:
    latencies = Latencies()
    for value in range(2000):
        latencies.add(0, float(value))
    assert latencies.percentiles(0)["p50"] == 1499


def test_a_histogram_counts_what_took_at_most_as_long_as_each_bound() -> None:
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 7.0):
        histogram.add(seconds)
    assert histogram.buckets() == [("0.1", 2), ("1", 3), ("+Inf", 4)]
    assert histogram.total_s == pytest.approx(7.65)
