"""The simulation itself: one or several functions on shared nodes, event by event."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop
from typing import NamedTuple

import numpy as np

from knative.simulator.clock import EXPIRES, Clock
from knative.simulator.model import FunctionModel, Nodes
from knative.simulator.nodes import Cluster
from knative.simulator.policy import Policy
from knative.simulator.result import Result, total
from knative.simulator.running import Finished, Running
from knative.simulator.trace import Trace

ROOMY = Nodes()


class Function(NamedTuple):
    """One of the functions of a simulation."""

    name: str
    trace: Trace
    model: FunctionModel
    policy: Policy


class Results(NamedTuple):
    """Of several functions that share nodes."""

    functions: dict[str, Result]
    total: Result


def simulate(
    trace: Trace,
    model: FunctionModel,
    policy: Policy,
    *,
    seed: int,
    nodes: Nodes = ROOMY,
    span_s: float = 0.0,
    horizon_s: float | None = None,
    observe: Callable[[Finished], object] | None = None,
    index: int = 0,
) -> Result:
    """One function under a trace; the same for the same seed.

    index: of which function of simulate_many it is to have the chance.
    It ends when the last request is over, and not before span_s: the length of the trace, whose end may be quiet.
    horizon_s: where it ends instead, whatever is still on its way.
    observe: called with each request when it is over.
    Raises TraceError or ModelError where the trace is not in order or does not go with the model.
    """
    functions = [Function("function", trace, model, policy)]
    return _simulate(functions, [seeds(seed, index)], nodes, span_s, horizon_s, observe).functions["function"]


def simulate_many(
    functions: Sequence[Function],
    *,
    seed: int,
    nodes: Nodes = ROOMY,
    span_s: float = 0.0,
    horizon_s: float | None = None,
    observe: Callable[[Finished], object] | None = None,
) -> Results:
    """Several functions that share the nodes, each with a name and a policy of its own; otherwise as `simulate`."""
    return _simulate(functions, [seeds(seed, index) for index in range(len(functions))], nodes, span_s, horizon_s, observe)


def _simulate(
    functions: Sequence[Function],
    chances: Sequence[np.random.SeedSequence],
    nodes: Nodes,
    span_s: float,
    horizon_s: float | None,
    observe: Callable[[Finished], object] | None,
) -> Results:
    clock, cluster = Clock(), Cluster(nodes)
    running = [
        Running(one.name, one.trace, one.model, one.policy, clock, cluster, chance, observe)
        for one, chance in zip(functions, chances, strict=True)
    ]
    for one in running:
        one.begin()

    def look(now: float, _: object) -> None:
        clock.when(max(one.look(now) for one in running), EXPIRES, look)

    clock.when(1.0, EXPIRES, look)
    end = _run(clock, span_s if horizon_s is None else horizon_s, cut=horizon_s is not None)
    results = {one.name: one.result(end) for one in running}
    return Results(results, total(results.values(), clock.pods.most))


def seeds(seed: int, index: int) -> np.random.SeedSequence:
    """What the chance of a simulation's function number `index` begins with."""
    return np.random.SeedSequence((seed, index))


def _run(clock: Clock, end_s: float, *, cut: bool) -> float:
    """Let everything happen up to `end_s`, and unless it is to be `cut` there, until no request is left; when that was."""
    heap = clock.heap
    now = 0.0
    while heap and (heap[0][0] <= end_s or (clock.live and not cut)):
        now, _, handler, about = heappop(heap)
        handler(now, about)
    return end_s if cut else max(now, end_s)
