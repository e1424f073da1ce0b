"""Many settings under one trace: which of them nobody beats in both cost and latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from knative.simulator.errors import SimulatorError
from knative.simulator.result import Result
from knative.simulator.runs import Run, results
from knative.simulator.slo import Slo

LIMIT = 10_000  # combinations


class SweepError(SimulatorError):
    """A sweep that cannot be read."""


@dataclass(frozen=True)
class Point:
    """One combination and what came of it."""

    settings: Mapping[str, str]
    result: Result
    latency_s: float  # the percentile that is compared, of all requests: inf if too many have no answer
    on_front: bool = False  # nobody else is as cheap and faster, or as fast and cheaper


@dataclass(frozen=True)
class Sweep:
    """All combinations, in order, and the bound that no policy can beat."""

    points: Sequence[Point]
    oracle: Point | None
    percentile: str  # the one that is compared


def parse_axis(text: str) -> tuple[str, list[str]]:
    """The name and the values of `window=30s,60s`. Commas inside brackets are part of a value. Raises SweepError."""
    name, equals, values = text.partition("=")
    found: list[str] = [""]
    depth = 0
    for sign in values:
        depth += (sign == "(") - (sign == ")")
        if sign == "," and not depth:
            found.append("")
        else:
            found[-1] += sign
    found = [value.strip() for value in found]
    if not equals or not name.strip() or not all(found):
        raise SweepError(f"--sweep {text}: must be like window=30s,60s,120s: a knob of the policy or of the model, or `policy`")
    return name.strip(), found


def combinations(axes: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, str]]:
    """Every choice of one value of each axis. Raises SweepError if an axis is there twice, or there are too many."""
    names = [name for name, _ in axes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SweepError(f"--sweep {twice}: is there twice; put all its values into one")
    if (count := math.prod(len(values) for _, values in axes)) > LIMIT:
        raise SweepError(f"--sweep: {count} combinations, at most {LIMIT}")
    return [dict(zip(names, values, strict=True)) for values in product(*(values for _, values in axes))]


def sweep(base: Run, axes: Sequence[tuple[str, Sequence[str]]], slo: Slo, done: Callable[[], object] = lambda: None) -> Sweep:
    """Simulate every combination, and the oracle. slo: whose percentile is compared. done: called after each. Raises SimulatorError."""
    chosen = combinations(axes)
    oracle = replace(base, policy="oracle", knobs={})
    *found, bound = results([*(base.with_settings(settings) for settings in chosen), oracle], done)
    points = [Point(settings, result, slo.latency_s(result)) for settings, result in zip(chosen, found, strict=True)]
    front = pareto([(point.result.cost, point.latency_s) for point in points])
    marked = [Point(one.settings, one.result, one.latency_s, at in front) for at, one in enumerate(points)]
    return Sweep(marked, Point({"policy": "oracle"}, bound, slo.latency_s(bound)), slo.name)


def pareto(points: Sequence[tuple[float, float]]) -> set[int]:
    """Which of (cost, latency) are on the front: no other is at least as good in both and better in one. Infinite latencies are on none."""
    front, best = set(), math.inf
    order = sorted(range(len(points)), key=lambda at: points[at])
    for at in order:
        cost, latency = points[at]
        if latency < best:
            front.add(at)
            best = latency
        elif latency == best < math.inf and any(points[other] == (cost, latency) for other in front):
            front.add(at)  # as good as one that is on it
    return front
