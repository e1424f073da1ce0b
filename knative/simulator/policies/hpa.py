"""Kubernetes' HorizontalPodAutoscaler: the rules as pure functions, and the policy `hpa`.

Source: pkg/controller/podautoscaler/horizontal.go and replica_calculator.go of Kubernetes, with the default `behavior` of autoscaling/v2.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from knative.simulator.policies.knobs import Knobs
from knative.simulator.policy import Policy, Sample

SYNC_S = 15.0
TOLERANCE = 0.1
STABILIZATION_S = 300.0  # of scale-downs; scale-ups have none
PERIOD_S = 15.0  # of the rates below
UP_FACTOR, UP_PODS = 2.0, 4  # in a period: twice as many, or 4 more, whichever is more; a scale-down may remove all


def by_total(current: int, total: float, target: float, tolerance: float = TOLERANCE) -> int:
    """Pods for a metric whose `total` over all pods is to be `target` per pod (AverageValue of an external or custom metric)."""
    if abs(1.0 - total / (target * current)) <= tolerance:
        return current
    return math.ceil(total / target)


def by_utilisation(current: int, ready: int, used: float, target: float, tolerance: float = TOLERANCE) -> int:
    """Pods for a resource of which `used` (in pods' requests, all ready pods together) is to be a share `target` per pod.

    Pods that are not ready count as using nothing where that damps a scale-up, and not at all otherwise.
    """
    if not ready:
        return current  # no metrics of any pod: no decision
    ratio = used / ready / target
    if ratio <= 1.0 or ready == current:
        return current if abs(1.0 - ratio) <= tolerance else math.ceil(ratio * ready)
    damped = used / current / target
    if abs(1.0 - damped) <= tolerance or damped < 1.0:
        return current
    return max(current, math.ceil(damped * current))


@dataclass
class Behavior:
    """What was recommended and done lately, which stabilises and limits what is done now."""

    stabilization_s: float = STABILIZATION_S
    recommended: deque[tuple[float, int]] = field(default_factory=deque)
    changed: deque[tuple[float, int]] = field(default_factory=deque)  # by how many pods: more than 0 added, fewer removed

    def apply(self, now: float, current: int, wanted: int, least: int, most: int) -> int:
        """The pods to have, of which `wanted` were recommended just now."""
        wanted = self._stabilise(now, current, wanted)
        if wanted > current:
            wanted = min(wanted, max(current, self._most(now, current)))
        wanted = max(least, min(most, wanted))
        if wanted != current:
            self.changed.append((now, wanted - current))
        return wanted

    def _stabilise(self, now: float, current: int, wanted: int) -> int:
        """A scale-down goes no further than to the largest count recommended within the window, and is never a scale-up."""
        recent = self.recommended
        while recent and recent[0][0] <= now - self.stabilization_s:
            recent.popleft()
        recent.append((now, wanted))
        return wanted if wanted >= current else min(current, max(pods for _, pods in recent))

    def _most(self, now: float, current: int) -> int:
        """What the rates allow, counted from the beginning of the period."""
        while self.changed and self.changed[0][0] <= now - PERIOD_S:
            self.changed.popleft()
        at_begin = current - sum(pods for _, pods in self.changed)
        return max(math.ceil(at_begin * UP_FACTOR), at_begin + UP_PODS)


class Hpa(Policy):
    """The HPA on CPU or on concurrency. It cannot go to zero, and looks at the pods only every 15 s."""

    name = "hpa"
    source = "kubernetes/kubernetes pkg/controller/podautoscaler; autoscaling/v2 defaults"

    def __init__(self, knobs: Knobs, concurrency: int) -> None:
        """A pod with a request at all uses all of its CPU: that is what a model's forward pass does."""
        self._metric = knobs.choice("metric", "cpu", ("cpu", "concurrency"))
        default = 0.8 if self._metric == "cpu" else 0.7 * (concurrency or 100)
        self._target = knobs.number("target", default, above=0.0)
        self._tolerance = knobs.number("tolerance", TOLERANCE)
        self.period_s = knobs.seconds("sync", SYNC_S, above=0)
        self._behavior = Behavior(knobs.seconds("stabilization", STABILIZATION_S))
        self._least, self._most = knobs.bounds(1, 100)
        self.initial = self._least

    def decide(self, now: float, sample: Sample) -> int | None:
        """One sync."""
        if not sample.pods:
            return self._least
        if self._metric == "cpu":
            wanted = by_utilisation(sample.pods, sample.ready, sample.busy_pods, self._target, self._tolerance)
        else:
            wanted = by_total(sample.pods, sample.concurrency or 0.0, self._target, self._tolerance)
        return self._behavior.apply(now, sample.pods, wanted, self._least, self._most)
