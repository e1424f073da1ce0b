"""The simulation itself: one or several functions on shared nodes, event by event."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from heapq import heappop
from typing import NamedTuple

import numpy as np

from knative.simulator.model import FunctionModel, Nodes
from knative.simulator.nodes import Cluster
from knative.simulator.policies.policy import Policy
from knative.simulator.result import Result, total
from knative.simulator.running import EXPIRES, Clock, Finished, Running
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
    horizon_s: float | None = None,
    observe: Callable[[Finished], object] | None = None,
) -> Result:
    """One function under a trace; the same for the same seed.

    horizon_s: where it ends, whatever is still on its way; None: when the last request is over.
    observe: called with each request when it is over.
    Raises TraceError or ModelError where the trace is not in order or does not go with the model.
    """
    functions = [Function("function", trace, model, policy)]
    return simulate_many(functions, seed=seed, nodes=nodes, horizon_s=horizon_s, observe=observe).functions["function"]


def simulate_many(
    functions: Sequence[Function],
    *,
    seed: int,
    nodes: Nodes = ROOMY,
    horizon_s: float | None = None,
    observe: Callable[[Finished], object] | None = None,
) -> Results:
    """Several functions that share the nodes, each with a name and a policy of its own; otherwise as `simulate`."""
    clock, cluster = Clock(), Cluster(nodes)
    running = [
        Running(one.name, one.trace, one.model, one.policy, clock, cluster, seeds(seed, index), observe) for index, one in enumerate(functions)
    ]
    for one in running:
        one.begin()

    def look(now: float, _: object) -> None:
        clock.when(max(one.look(now) for one in running), EXPIRES, look)

    clock.when(1.0, EXPIRES, look)
    end = _run(clock, math.inf if horizon_s is None else horizon_s)
    results = {one.name: one.result(end) for one in running}
    return Results(results, total(results.values(), clock.pods.most))


def seeds(seed: int, index: int) -> np.random.SeedSequence:
    """What the chance of a simulation's function number `index` begins with."""
    return np.random.SeedSequence((seed, index))


def _run(clock: Clock, horizon_s: float) -> float:
    """Let everything happen up to the horizon, or until no request is left where there is none; when that was."""
    heap = clock.heap
    now = 0.0
    to_the_end = horizon_s < math.inf
    while heap and (clock.live or to_the_end):
        at, _, handler, about = heappop(heap)
        if at > horizon_s:
            break
        now = at
        handler(at, about)
    return horizon_s if to_the_end else now
