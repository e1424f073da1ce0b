"""What the tests of the simulator share."""

from collections.abc import Iterable, Sequence

import numpy as np

from knative.simulator import Finished, FunctionModel, Nodes, Policy, Result, arrivals, simulate
from knative.simulator.engine import ROOMY
from knative.simulator.model import make_model
from knative.simulator.policy import Sample
from knative.simulator.trace import Arrivals, in_chunks


def model_of(**settings: object) -> FunctionModel:
    """A model whose pods start in 10 s at once, unless the settings (`__` for a dot) say otherwise."""
    texts = {"cold_start.schedule": "0", "cold_start.weights_store": "0", "cold_start.weights_cache": "0"}
    texts |= {"cold_start.imports": "10", "cold_start.load": "0", "service": "1"}
    return make_model(texts | {name.replace("__", "."): str(value) for name, value in settings.items()})[0]


def trace_of(times: Iterable[float], service_s: Sequence[float] | None = None, chunk: int = 1_000) -> list[Arrivals]:
    return list(in_chunks(arrivals(np.array(list(times), np.float64), service_s=service_s), chunk))


def poisson(rps: float, count: int, seed: int = 1) -> list[Arrivals]:
    return trace_of(np.cumsum(np.random.default_rng(seed).exponential(1 / rps, count)), chunk=65_536)


class Script(Policy):
    """Wants what it is told at each time."""

    name = "script"

    def __init__(self, initial: int = 0, **at: int) -> None:
        """at: t5=3 for three pods from 5 s on."""
        self.initial = initial
        self._at = sorted((float(name.removeprefix("t")), pods) for name, pods in at.items())
        self.seen: list[tuple[float, Sample]] = []

    def decide(self, now: float, sample: Sample) -> int | None:
        self.seen.append((now, sample))
        past = [pods for at, pods in self._at if at <= now]
        return past[-1] if past else None

    def next_s(self, now: float, idle: bool) -> float:
        return super().next_s(now, False)


def finished(
    trace: Iterable[Arrivals],
    model: FunctionModel,
    policy: Policy,
    *,
    nodes: Nodes = ROOMY,
    horizon_s: float | None = None,
    seed: int = 1,
) -> tuple[list[Finished], Result]:
    """Each request's end, in the order of arrival, and the result."""
    seen: list[Finished] = []
    result = simulate(trace, model, policy, seed=seed, nodes=nodes, horizon_s=horizon_s, observe=seen.append)
    return sorted(seen, key=lambda one: one.arrived_s), result
