"""Pre-warming by how long a function usually is idle.

Source: Shahrad et al., "Serverless in the Wild", USENIX ATC 2020, section 4.2.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import NamedTuple

from knative.simulator.policies.knobs import Knobs
from knative.simulator.policies.simple import Most, needed
from knative.simulator.policy import Policy, Sample

BIN_S = 60.0
OUT_OF_RANGE_SHARE = 0.5  # beyond which the histogram is not asked
OUT_OF_RANGE_MARGIN = 0.15  # on both sides of a prediction


class Windows(NamedTuple):
    """After the last request, for how long no pod is needed, and then for how long one is kept for the next. Seconds."""

    prewarm_s: float
    keep_alive_s: float


class IdleTimes:
    """The histogram of a function's idle times, in bins of a minute up to `range_s`."""

    def __init__(self, range_s: float, cv: float, head: float, tail: float, margin: float) -> None:
        self._range_s = range_s
        self._cv = cv
        self._head, self._tail, self._margin = head, tail, margin
        self._bins = [0] * max(1, math.ceil(range_s / BIN_S))
        self._count = 0
        self._squares = 0  # sum of the squares of the bins
        self._beyond = 0
        self._last_beyond: deque[float] = deque(maxlen=11)

    def add(self, idle_s: float) -> None:
        """One more."""
        index = int(idle_s / BIN_S)
        if index >= len(self._bins):
            self._beyond += 1
            self._last_beyond.append(idle_s)
            return
        self._squares += 2 * self._bins[index] + 1
        self._bins[index] += 1
        self._count += 1

    def windows(self) -> Windows:
        """What is expected of the next idle time.

        Where most are longer than the range, the paper fits an ARIMA model; here it is the median of the last ones. Where the bins differ
        too little to say anything (coefficient of variation below the threshold), a pod is kept for the whole range.
        """
        if self._beyond > OUT_OF_RANGE_SHARE * (self._count + self._beyond):
            expected_s = statistics.median(self._last_beyond)
            return Windows(expected_s * (1 - OUT_OF_RANGE_MARGIN), expected_s * 2 * OUT_OF_RANGE_MARGIN)
        if self.variation() < self._cv:
            return Windows(0.0, self._range_s)
        first = self._bin_of(self._head) * BIN_S * (1 - self._margin)
        last = (self._bin_of(self._tail) + 1) * BIN_S * (1 + self._margin)
        return Windows(first, min(last, self._range_s) - first)

    def variation(self) -> float:
        """Coefficient of variation of the bins' counts: high where the idle times are much alike."""
        if not self._count:
            return 0.0
        mean = self._count / len(self._bins)
        return math.sqrt(max(0.0, self._squares / len(self._bins) - mean * mean)) / mean

    def _bin_of(self, quantile: float) -> int:
        rank, seen = quantile * self._count, 0
        for index, count in enumerate(self._bins):
            seen += count
            if seen >= rank and count:
                return index
        return len(self._bins) - 1


class HybridHistogram(Policy):
    """One pod is kept, or started ahead, for the next request as the idle times say; more than one as `keep-alive` has it, for a minute."""

    name = "hybrid-histogram"
    source = "Shahrad et al., Serverless in the Wild, USENIX ATC 2020"

    def __init__(self, knobs: Knobs, concurrency: int) -> None:
        """Knobs: `range`, `cv`, `head`, `tail` (percentiles), `margin`, and `keep` for pods beyond the first."""
        self._concurrency = concurrency
        self.idle_times = IdleTimes(
            knobs.seconds("range", 4 * 3600.0, above=0),
            knobs.number("cv", 2.0),
            knobs.number("head", 5.0, high=100) / 100,
            knobs.number("tail", 99.0, high=100) / 100,
            knobs.number("margin", 0.1, high=1),
        )
        self._most_lately = Most(knobs.seconds("keep", 60.0))
        self._least, self._most = knobs.bounds(0, 1_000)
        self.initial = self._least
        self._idle_since: float | None = None  # None: there are requests, or there have been none yet
        self._windows = Windows(0.0, 0.0)

    def decide(self, now: float, sample: Sample) -> int | None:
        """Requests now, or an idle time that goes on."""
        if sample.peak:
            self._begin(now)
        if sample.in_system:
            return self._bounded(self._most_lately.add(now, needed(sample.peak, self._concurrency)))
        if sample.peak:
            self._idle_since = now
            self._windows = self.idle_times.windows()
        return self._bounded(self._while_idle(now, self._most_lately.add(now, needed(sample.peak, self._concurrency))))

    def poke(self, now: float, in_system: int, pods: int) -> int | None:
        """A request that came while there was no room."""
        self._begin(now)
        return self._bounded(max(pods, self._most_lately.add(now, needed(in_system, self._concurrency))))

    def next_s(self, now: float, idle: bool) -> float:
        """Each second, and where there is no pod, when one is to be started for the next request."""
        if not idle:
            return math.floor(now) + 1.0
        if self._idle_since is not None and self._windows.keep_alive_s and (at := self._idle_since + self._windows.prewarm_s) > now:
            return at
        return math.inf

    def _begin(self, now: float) -> None:
        """An idle time, if there was one, is over."""
        if self._idle_since is not None:
            self.idle_times.add(now - self._idle_since)
            self._idle_since = None

    def _while_idle(self, now: float, lately: int) -> int:
        if self._idle_since is None:
            return 0
        idle_s = now - self._idle_since
        prewarm_s, keep_alive_s = self._windows
        one = prewarm_s <= idle_s < prewarm_s + keep_alive_s
        # The first pod is the histogram's to keep, those beyond it go after their minute.
        return max(int(one), lately if lately > 1 else 0)

    def _bounded(self, pods: int) -> int:
        return max(self._least, min(self._most, pods))
