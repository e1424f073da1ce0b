"""Averages over the last seconds, from samples that land in one-second buckets.

Both kinds behave as Knative's do, to the last rounding (knative/serving 98e5ef90aa, pkg/autoscaler/aggregation/bucketing.go).
They read no clock: `now` is in seconds since any fixed moment and may have a fraction, which only chooses the bucket.
"""

from __future__ import annotations

import math

_DIGITS = 1e6  # a linear average keeps six decimal places
_MIN_COEFFICIENT = 0.2  # else a very long exponential window would hardly differ from a linear one
_WEIGHT_LEFT_OUT = 0.0001  # of the weights of an exponential window, which never add up to 1


class LinearWindow:
    """The mean of the buckets of the last `window_s` seconds.

    Seconds without a sample count as 0, but not those before the first sample nor those after the last one: three seconds of data are
    averaged over three seconds, however long the window. After a whole window without samples it starts afresh.
    """

    __slots__ = ("_buckets", "_first", "_last", "_total", "window_s")

    def __init__(self, window_s: int) -> None:
        self.window_s = window_s
        self._buckets = [0.0] * window_s  # a ring, indexed by second % window_s
        self._total = 0.0  # of all buckets, those that went out of date since the last sample included
        self._first = 0  # second of the earliest sample since the window last started afresh
        self._last: int | None = None  # second of the latest sample; None before any

    def record(self, now: float, value: float) -> None:
        """Add `value` to the bucket of `now`: samples of one second add up. One that is older than the window is dropped."""
        second = math.floor(now)
        last = self._last
        if last is None or second - last >= self.window_s:
            self._start_at(second)
        elif second > last:
            self._clear(last + 1, second)
            self._last = second
        elif second <= last - self.window_s:
            return
        elif second < self._first:
            self._first = second
        self._buckets[second % self.window_s] += value
        self._total += value

    def average(self, now: float) -> float:
        """The average at `now`, rounded to six decimal places; 0 where the window holds no data (see `is_empty`)."""
        if self._last is None:
            return 0.0
        gap = math.floor(now) - self._last
        if gap >= self.window_s:
            return 0.0
        total = self._total
        for second in range(self._last + 1, self._last + gap + 1):
            total -= self._buckets[second % self.window_s]
        seconds = min(self._last - self._first + 1, self.window_s - max(gap, 0))
        return _round(total / seconds)

    def is_empty(self, now: float) -> bool:
        """Whether there is nothing to go by: no sample yet, or none for more than a whole window."""
        return self._last is None or math.floor(now) - self._last > self.window_s

    def _start_at(self, second: int) -> None:
        self._buckets = [0.0] * self.window_s
        self._total = 0.0
        self._first = self._last = second

    def _clear(self, begin: int, end: int) -> None:
        """Empty the buckets of the seconds from `begin` to `end`, which held a turn of the ring ago's values."""
        for second in range(begin, end + 1):
            index = second % self.window_s
            self._total -= self._buckets[index]
            self._buckets[index] = 0.0


class WeightedWindow(LinearWindow):
    """An exponentially weighted average: the latest second counts most, each older one by the same factor less.

    E.g. with a coefficient of 0.5 and the seconds 8, 4, 2 (latest last): 2 * 0.5 + 4 * 0.25 + 8 * 0.125 = 3.
    """

    __slots__ = ("_coefficient",)

    def __init__(self, window_s: int) -> None:
        super().__init__(window_s)
        self._coefficient = max(1 - _WEIGHT_LEFT_OUT ** (1 / window_s), _MIN_COEFFICIENT)

    def average(self, now: float) -> float:
        """The average at `now`, not rounded; 0 where the window holds no data (see `is_empty`). Takes time with the window's length."""
        if self._last is None or self.is_empty(now):
            return 0.0
        gap = max(math.floor(now) - self._last, 0)
        decay = 1 - self._coefficient
        weight = self._coefficient * decay**gap
        total = 0.0
        for second in range(self._last, self._last - self.window_s + gap, -1):
            total += self._buckets[second % self.window_s] * weight
            weight *= decay
        return total


def _round(value: float) -> float:
    """`value` to six decimal places, halves away from zero (Python's own `round` takes halves to even)."""
    fraction, whole = math.modf(value * _DIGITS)
    if abs(fraction) >= 0.5:
        whole += math.copysign(1.0, fraction)
    return whole / _DIGITS
