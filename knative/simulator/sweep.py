"""Many settings under one trace: which of them nobody beats in both cost and latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from knative.simulator.errors import SimulatorError
from knative.simulator.model import SETTINGS
from knative.simulator.policies.foresight import not_the_bound
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

    @property
    def name(self) -> str:
        """Its settings in words."""
        return ", ".join(value if name == "policy" else f"{name} {value}" for name, value in self.settings.items())


@dataclass(frozen=True)
class Sweep:
    """All combinations, in order, and what perfect foresight makes of the same models."""

    points: Sequence[Point]
    oracles: Sequence[Point]  # those that no other of them beats, by cost; several where models or the requests at once in a pod differ
    percentile: str  # the one that is compared
    not_the_bound: Sequence[str]  # settings with which somebody might be as fast as an oracle, and cheaper


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


def sweep(
    base: Run,
    axes: Sequence[tuple[str, Sequence[str]]],
    slo: Slo,
    told: Callable[[int], object] = lambda count: None,
    done: Callable[[], object] = lambda: None,
) -> Sweep:
    """Simulate every combination, and the oracle for each model in them.

    slo: whose percentile is compared. told: is handed how many simulations that are; done: called after each. Raises SimulatorError.
    """
    chosen = combinations(axes)
    models = {tuple(of_model.items()): of_model for of_model in map(_of_model, chosen)}
    foreseen: list[tuple[dict[str, str], Run]] = []
    in_the_way: dict[str, None] = {}
    for of_model in models.values():
        run = base.with_settings(of_model)
        counts = run.foreseen()
        for count, oracle in counts.items():
            at_once = {"concurrency": str(count)} if len(counts) > 1 else {}
            foreseen.append(({"policy": "oracle", **of_model, **at_once}, oracle))
        in_the_way |= dict.fromkeys(not_the_bound(*run.read_model()))
    told(len(chosen) + len(foreseen))
    found = results([*(base.with_settings(settings) for settings in chosen), *(run for _, run in foreseen)], done)
    points = _marked(chosen, found[: len(chosen)], slo)
    oracles = _marked([settings for settings, _ in foreseen], found[len(chosen) :], slo)
    best = [point for point in oracles if point.on_front] or oracles
    return Sweep(points, sorted(best, key=lambda point: point.result.cost), slo.name, list(in_the_way))


def _of_model(settings: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if name in SETTINGS}


def _marked(settings: Sequence[Mapping[str, str]], found: Sequence[Result], slo: Slo) -> list[Point]:
    latencies = [slo.latency_s(result) for result in found]
    front = pareto([(result.cost, latency_s) for result, latency_s in zip(found, latencies, strict=True)])
    rows = enumerate(zip(settings, found, latencies, strict=True))
    return [Point(named, result, latency_s, at in front) for at, (named, result, latency_s) in rows]


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
