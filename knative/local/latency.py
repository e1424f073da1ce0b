"""How long things took: a histogram for whoever scrapes, and percentiles of what was lately for whoever looks."""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

# Seconds; from an echo on the same machine to the longest cold start that Knative allows a caller to wait for.
BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 300.0, 600.0)
RECENT = 1000  # of so many the percentiles are exact; to sort them takes a tenth of a millisecond
RECENT_S = 60.0
PERCENTILES = (50, 95, 99)


class Histogram:
    """Counts durations by size since the start, as Prometheus wants them."""

    def __init__(self, bounds_s: Sequence[float] = BOUNDS_S) -> None:
        self.total_s = 0.0
        self._bounds = (*bounds_s, math.inf)
        self._counts = [0] * len(self._bounds)

    def add(self, seconds: float) -> None:
        """One more."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self.total_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """For each upper bound, how many took at most that long; the last is `+Inf`, and counts them all."""
        total, buckets = 0, []
        for bound, count in zip(self._bounds, self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == math.inf else f"{bound:g}", float(total)))
        return buckets


class Latencies:
    """A Histogram, and the percentiles of the last minute, or of its last 1,000 if there were more. Times in seconds."""

    def __init__(self) -> None:
        self.histogram = Histogram()
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)  # when, and how long

    def add(self, now: float, seconds: float) -> None:
        """One more, that is over now."""
        self.histogram.add(seconds)
        self._recent.append((now, seconds))

    def percentiles(self, now: float) -> dict[str, float | None]:
        """`p50`, `p95` and `p99`: None when there was nothing lately."""
        while self._recent and now - self._recent[0][0] > RECENT_S:
            self._recent.popleft()
        ordered = sorted(seconds for _, seconds in self._recent)
        return {f"p{percent}": round(ordered[_rank(len(ordered), percent)], 6) if ordered else None for percent in PERCENTILES}


def _rank(count: int, percent: int) -> int:
    """The nearest-rank percentile's place among `count` ordered values: the smallest that at least `percent` in a hundred do not exceed."""
    return max(0, math.ceil(count * percent / 100) - 1)
