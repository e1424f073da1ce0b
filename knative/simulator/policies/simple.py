"""Policies of one rule: `fixed`, `keep-alive` and `rps-step`."""

from __future__ import annotations

import math
from collections import deque

from knative.simulator.policies.knobs import Knobs
from knative.simulator.policy import Policy, Sample


class Fixed(Policy):
    """A warm pool: always so many pods."""

    name = "fixed"
    source = "min-scale = max-scale"

    def __init__(self, knobs: Knobs) -> None:
        """Knob: `pods`."""
        self.initial = knobs.whole("pods", 1)

    def decide(self, now: float, sample: Sample) -> int | None:
        """What it always is."""
        return self.initial

    def next_s(self, now: float, idle: bool) -> float:
        """Never: there is nothing to decide."""
        return math.inf


class Most:
    """The largest of the numbers of the last `window_s` seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._falling: deque[tuple[float, int]] = deque()  # a number is forgotten once a later one is as large

    def add(self, now: float, number: int) -> int:
        """The largest, with this one."""
        falling = self._falling
        while falling and falling[-1][1] <= number:
            falling.pop()
        falling.append((now, number))
        while falling[0][0] < now - self._window_s:
            falling.popleft()
        return falling[0][1]


def needed(requests: int, concurrency: int) -> int:
    """Pods so that each of so many requests has a place at once."""
    return math.ceil(requests / concurrency) if concurrency else min(1, requests)


class KeepAlive(Policy):
    """A pod for each request that finds none free, kept for so long after its last one: what function services do."""

    name = "keep-alive"
    source = "AWS Lambda and OpenWhisk (10 min), Azure Functions (20 min), as described in Shahrad et al., ATC 2020, section 4"

    def __init__(self, knobs: Knobs, concurrency: int) -> None:
        """Knob: `keep`."""
        self._concurrency = concurrency
        self._most_lately = Most(knobs.seconds("keep", 600.0))
        self._least, self._most = knobs.bounds(0, 1_000)
        self.initial = self._least

    def decide(self, now: float, sample: Sample) -> int | None:
        """As many as were needed at once within the time."""
        return self._bounded(self._most_lately.add(now, needed(sample.peak, self._concurrency)))

    def poke(self, now: float, in_system: int, pods: int) -> int | None:
        """One more."""
        return self._bounded(max(pods, self._most_lately.add(now, needed(in_system, self._concurrency))))

    def _bounded(self, pods: int) -> int:
        return max(self._least, min(self._most, pods))


class RpsStep(Policy):
    """The textbook's autoscaler: more pods above a rate of requests, fewer below half of it, looked at every 5 s.

    It flaps because it measures what comes, not what is there: slow requests come seldom, so that it takes their pods away.
    """

    name = "rps-step"
    source = "the textbook loop: up when requests per second exceed a threshold per pod, down below 0.5 of it"

    def __init__(self, knobs: Knobs) -> None:
        """Knobs: `threshold` requests per second and pod, `down-factor` of it."""
        self._threshold = knobs.number("threshold", 1.0, above=0.0)
        self._down_factor = knobs.number("down-factor", 0.5, high=1.0)
        self.period_s = knobs.seconds("period", 5.0, above=0)
        self._least, self._most = knobs.bounds(0, 100)
        self.initial = self._least

    def decide(self, now: float, sample: Sample) -> int | None:
        """One step."""
        least = max(self._least, 1) if sample.queued else self._least
        return step(sample.rps, sample.pods, self._threshold, self._down_factor, least, self._most)

    def poke(self, now: float, in_system: int, pods: int) -> int | None:
        """Some pod there must be."""
        return None if pods else max(1, self._least)


def step(rps: float, pods: int, threshold: float, down_factor: float, least: int, most: int) -> int:
    """The pods after one look."""
    wanted = math.ceil(rps / threshold)
    if rps < down_factor * threshold * pods:
        pods = max(wanted, math.floor(pods * down_factor))
    elif wanted > pods:
        pods = wanted
    return max(least, min(most, pods))
