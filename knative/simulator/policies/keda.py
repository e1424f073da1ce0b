"""KEDA: between zero and one by itself, above one by an HPA that it makes.

Source: pkg/scaling/executor/scale_scaledobjects.go at kedacore/keda 8b4f083ca; scaler/handlers.go at kedacore/http-add-on 59b2f6a1.
"""

from __future__ import annotations

import math
from collections import deque

from knative.simulator.policies.hpa import STABILIZATION_S, SYNC_S, TOLERANCE, Behavior, by_total
from knative.simulator.policies.knobs import Knobs
from knative.simulator.policy import Policy, Sample

POLLING_S = 30.0
COOLDOWN_S = 300.0


def activate(pods: int, active: bool, idle_s: float, cooldown_s: float, least: int) -> int | None:
    """What KEDA itself does at a poll with `pods`, last active `idle_s` ago; None: nothing, the HPA scales."""
    if active:
        return None if pods else max(1, least)
    if pods and not least and idle_s > cooldown_s:
        return 0
    return least if pods < least else None


class _Keda(Policy):
    """What both scalers share. `_metric` is what the HPA divides by its target."""

    def __init__(self, knobs: Knobs, target: float) -> None:
        self._target = knobs.number("target", target, above=0.0)
        self._activation = knobs.number("activation", 0.0)
        self._polling_s = knobs.seconds("polling", POLLING_S, above=0)
        self._cooldown_s = knobs.seconds("cooldown", COOLDOWN_S)
        self.period_s = knobs.seconds("sync", SYNC_S, above=0)
        self._behavior = Behavior(knobs.seconds("stabilization", STABILIZATION_S))
        self._least, self._most = knobs.bounds(0, 100)
        self.initial = self._least
        self._active_s = -math.inf

    def _metric(self, now: float, sample: Sample) -> float:
        raise NotImplementedError

    def decide(self, now: float, sample: Sample) -> int | None:
        """A poll of KEDA's, a sync of the HPA's, or both."""
        metric, pods = self._metric(now, sample), sample.pods
        wanted = None
        if _due(now, self._polling_s):
            if metric > self._activation:
                self._active_s = now
            wanted = activate(pods, metric > self._activation, now - self._active_s, self._cooldown_s, self._least)
        if wanted is None and pods and _due(now, self.period_s):  # the HPA leaves zero alone
            recommended = by_total(pods, metric, self._target, TOLERANCE)
            wanted = self._behavior.apply(now, pods, recommended, max(1, self._least), self._most)
        return wanted

    def next_s(self, now: float, idle: bool) -> float:
        """The next poll or sync."""
        if idle:
            return math.inf
        return min((math.floor(now / every_s) + 1) * every_s for every_s in (self.period_s, self._polling_s))


def _due(now: float, every_s: float) -> bool:
    return abs(now / every_s - round(now / every_s)) < 1e-9


class KedaQueue(_Keda):
    """Requests as messages in a queue: nobody tells KEDA that one has come, it asks every 30 s."""

    name = "keda-queue"
    source = "kedacore/keda 8b4f083ca, e.g. with the SQS scaler"

    def __init__(self, knobs: Knobs) -> None:
        """Target: messages per pod, those that are being worked on included (`in-flight`), as SQS's scaler has it by default."""
        super().__init__(knobs, 5.0)
        self._in_flight = knobs.choice("in-flight", "true", ("true", "false")) == "true"

    def _metric(self, now: float, sample: Sample) -> float:
        return sample.in_system if self._in_flight else sample.queued


class KedaHttp(_Keda):
    """Behind the HTTP add-on's interceptor, which counts requests and tells KEDA of the first one at once (within 200 ms)."""

    name = "keda-http"
    source = "kedacore/http-add-on 59b2f6a1"

    def __init__(self, knobs: Knobs, concurrency: int) -> None:
        """Target: requests at once per pod, 100 as the add-on has it, but not more than a pod takes; or per second (`metric=rate`)."""
        self._by_rate = knobs.choice("metric", "concurrency", ("concurrency", "rate")) == "rate"
        self._window_s = knobs.seconds("window", 60.0, above=0)
        super().__init__(knobs, 100.0 if self._by_rate else min(100.0, concurrency or 100.0))
        self._counts: deque[tuple[float, float]] = deque()  # until when, requests
        self._counted_s = -math.inf

    def _metric(self, now: float, sample: Sample) -> float:
        if sample.in_system:
            self._active_s = now  # the push stream says so all the time
        if not self._by_rate:
            return sample.in_system
        counts = self._counts
        counts.append((now, sample.rps * min(self.period_s, now - self._counted_s)))
        self._counted_s = now
        while counts[0][0] <= now - self._window_s:
            counts.popleft()
        return sum(count for _, count in counts) / self._window_s

    def poke(self, now: float, in_system: int, pods: int) -> int | None:
        """The push."""
        if pods or in_system <= self._activation:
            return None
        self._active_s = now
        return max(1, self._least)
