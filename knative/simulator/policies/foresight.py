"""Policies that know a trace: `schedule` an earlier one, `oracle` the very one that will come."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from knative.simulator.engine import seeds, simulate
from knative.simulator.errors import PolicyError
from knative.simulator.model import ColdStart, FunctionModel, Nodes
from knative.simulator.policies.knobs import Knobs
from knative.simulator.policies.kpa import Kpa
from knative.simulator.policy import Policy, Sample
from knative.simulator.trace import Source

HOUR_S = 3_600
WEEK_HOURS = 168
_POWERS = 8  # of two, that are tried where there is no limit to the requests at once
_EARLY_S = 1e-6  # a pod is there so long before it is needed: rounding must not make a request wait


class _OnDemand(Policy):
    """As many pods as have requests, started in no time: what is needed so that nobody waits. Writes down when that changes."""

    name = "on-demand"
    source = ""
    packs = True
    hears_idle = True

    def __init__(self) -> None:
        self.changes: list[tuple[float, int]] = []

    def poke(self, now: float, in_system: int, pods: int) -> int | None:
        return self._note(now, pods + 1)

    def pod_idle(self, now: float, busy: int) -> int | None:
        return self._note(now, busy)

    def next_s(self, now: float, idle: bool) -> float:
        return math.inf

    def cold_start_s(self) -> float | None:
        return 0.0

    def _note(self, now: float, pods: int) -> int:
        self.changes.append((now, pods))
        return pods


def demand(source: Source, model: FunctionModel, seed: int, index: int = 0) -> list[tuple[float, int]]:
    """(when, pods from then on): the pods with requests if none ever waited, each as full as it gets. Its memory grows with the trace."""
    alone = _without_trouble(model)
    policy = _OnDemand()
    simulate(source(), alone, policy, seed=seed, index=index)
    return policy.changes


def _without_trouble(model: FunctionModel) -> FunctionModel:
    return replace(model, pod_mtbf_s=math.inf, rollouts=(), drain_s=0.0)


def by_hour(changes: list[tuple[float, int]], quantile: float) -> dict[int, int]:
    """For each hour of the week, the pods that sufficed for such a share of its time in all weeks of the history."""
    times: dict[int, dict[int, float]] = {}
    ends = [at for at, _ in changes[1:]]
    for (begin, pods), end in zip(changes, ends, strict=False):
        while begin < end:
            hour = math.floor(begin / HOUR_S)
            until = min(end, (hour + 1) * HOUR_S)
            shares = times.setdefault(hour % WEEK_HOURS, {})
            shares[pods] = shares.get(pods, 0.0) + until - begin
            begin = until
    table = {}
    for hour, shares in times.items():
        left = (1 - quantile) * sum(shares.values())
        for pods in sorted(shares, reverse=True):
            left -= shares[pods]
            if left <= 0:
                break
        table[hour] = pods
    return table


class Schedule(Policy):
    """The KPA with a minimum by hour of the week, as a cron job that sets `min-scale` would have it."""

    name = "schedule"
    source = "KEDA's cron scaler, with hours learnt from history; the rest is the KPA"

    def __init__(self, table: Mapping[int, int], kpa: Kpa, lead_s: float) -> None:
        """table: least pods by hour of the week (of the trace's time 0), 0 where there is no entry; lead_s: so long ahead of the hour."""
        self.table = table
        self._kpa = kpa
        self._lead_s = lead_s
        self._of_kpa = kpa.initial
        self.initial = max(kpa.initial, self._least(0.0))

    def decide(self, now: float, sample: Sample) -> int | None:
        """What the KPA wants, and not less than the hour asks for."""
        return self._at_least(now, self._kpa.decide(now, sample))

    def poke(self, now: float, in_system: int, pods: int) -> int | None:
        """As the KPA."""
        wanted = self._kpa.poke(now, in_system, pods)
        return None if wanted is None else self._at_least(now, wanted)

    def pods_changed(self, now: float, ready: int) -> int | None:
        """As the KPA."""
        return self._at_least(now, self._kpa.pods_changed(now, ready))

    def next_s(self, now: float, idle: bool) -> float:
        """Each second; where there is nothing, when an hour begins that asks for pods."""
        if not idle:
            return math.floor(now) + 1.0
        hour = math.floor((now + self._lead_s) / HOUR_S) + 1
        for ahead in range(hour, hour + WEEK_HOURS):
            if self.table.get(ahead % WEEK_HOURS):
                return max(ahead * HOUR_S - self._lead_s, math.nextafter(now, math.inf))
        return math.inf

    def _at_least(self, now: float, wanted: int | None) -> int:
        if wanted is not None:
            self._of_kpa = wanted
        return max(self._of_kpa, self._least(now))

    def _least(self, now: float) -> int:
        """Of this hour, and of the one that has begun `lead_s` from now."""
        hours = (math.floor(at / HOUR_S) % WEEK_HOURS for at in (now, now + self._lead_s))
        return max(self.table.get(hour, 0) for hour in hours)


class _Pod(NamedTuple):
    """A pod of the plan: ready at `ready_s` after a start of `cold_s` (None: there from the beginning), not needed after `end_s`."""

    ready_s: float
    cold_s: float | None
    end_s: float


class Oracle(Policy):
    """Knows all requests, service times and cold starts: nobody waits, with the fewest pod-seconds for that; see `not_the_bound`.

    A pod that will be needed again is kept while that is not dearer than to start another one.
    """

    name = "oracle"
    source = "perfect foresight"
    packs = True

    def __init__(self, changes: list[tuple[float, int]], cold_starts: Iterator[float], drain_s: float) -> None:
        pods = plan(changes, cold_starts, drain_s)
        self.initial = sum(pod.cold_s is None for pod in pods)
        starts = sorted((pod.ready_s - _EARLY_S - pod.cold_s, pod.cold_s) for pod in pods if pod.cold_s is not None)
        events = sorted([(at, 1) for at, _ in starts] + [(pod.end_s, -1) for pod in pods])
        self._events = deque(events)
        self._cold_starts = deque(cold_s for _, cold_s in starts)
        self._wanted = self.initial

    def decide(self, now: float, sample: Sample) -> int | None:
        """According to plan."""
        before, started = self._wanted, 0
        while self._events and self._events[0][0] <= now:
            change = self._events.popleft()[1]
            self._wanted += change
            started += change > 0
        # Where one ends just as another one starts, the pod stays: its start does not take place.
        for _ in range(started - max(0, self._wanted - before)):
            self._cold_starts.popleft()
        return self._wanted

    def next_s(self, now: float, idle: bool) -> float:
        """When the plan says."""
        return self._events[0][0] if self._events else math.inf

    def cold_start_s(self) -> float | None:
        """As it was planned."""
        return self._cold_starts.popleft() if self._cold_starts else None


def at_once(model: FunctionModel) -> list[int]:
    """Values of containerConcurrency to have foresight with: fewer than the model's only where requests slow each other down.

    With 1 nobody is slowed down; more at once are slower, and as long as that is worth it, cheaper.
    """
    most = model.concurrency
    if most == 1 or not model.batch_slowdown:
        return [most]
    return [*(2**power for power in range(_POWERS) if 2**power < (most or math.inf)), most]


def not_the_bound(model: FunctionModel, nodes: Nodes) -> list[str]:
    """The settings for which somebody might let nobody wait, and slow nobody down, for less than the oracle with the first of `at_once`.

    Where several requests share a pod and cannot move, it is hard to say who is to go where; and it does not plan for the other ones.
    """
    settings = {
        "concurrency": at_once(model)[0] > 1,
        "drain_s": model.drain_s > 0,
        "pod_mtbf_s": math.isfinite(model.pod_mtbf_s),
        "rollouts": bool(model.rollouts),
        "nodes.count": nodes.count > 0,
    }
    return [name for name, is_in_the_way in settings.items() if is_in_the_way]


def plan(changes: list[tuple[float, int]], cold_starts: Iterator[float], drain_s: float) -> list[_Pod]:
    """The pods that satisfy a demand at least cost: the k-th is needed whenever k are, and kept in between unless a restart is cheaper."""
    pods: list[_Pod] = []
    levels: list[_Pod] = []  # of each level the pod that was needed last; with `end_s` inf while it is needed
    count = 0
    for now, needed in changes:
        for level in range(count, needed):
            cold_s = next(cold_starts)
            if level < len(levels):
                last = levels[level]
                if now - last.end_s <= cold_s + drain_s + _EARLY_S:
                    levels[level] = last._replace(end_s=math.inf)
                    continue
                pods.append(last)
                levels[level] = _Pod(now, cold_s, math.inf)
            else:
                levels.append(_Pod(now, None if now <= cold_s + _EARLY_S else cold_s, math.inf))
        for level in range(needed, count):
            levels[level] = levels[level]._replace(end_s=now)
        count = needed
    return pods + levels


def cold_starts(stages: ColdStart, seed: int, index: int) -> Iterator[float]:
    """Starts on a node that has image and weights, one after the other."""
    rng = np.random.default_rng(seeds(seed, index).spawn(4)[3])
    parts = (stages.schedule, stages.weights_cache, stages.imports, stages.load)
    while True:
        yield from sum(part.sample(rng, 256) for part in parts).tolist()  # type: ignore[union-attr]


def make_schedule(knobs: Knobs, settings: Mapping[str, str], model: FunctionModel, history: Source | None, seed: int) -> Schedule:
    """Knobs: `quantile` of each hour's time, `lead`; the others are the KPA's."""
    quantile = knobs.number("quantile", 0.95, high=1)
    lead_s = knobs.seconds("lead", 60.0)
    if history is None:
        raise PolicyError("schedule: it learns from an earlier trace: give one (--history FILE)")
    own = ("quantile", "lead")
    kpa = Kpa.make({name: value for name, value in settings.items() if name not in own}, model.concurrency)
    return Schedule(by_hour(demand(history, model, seed), quantile), kpa, lead_s)
