"""The simulation itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from knative.simulator.model import FunctionModel, Nodes
from knative.simulator.policies.policy import Policy
from knative.simulator.result import Result
from knative.simulator.trace import Trace


class Finished(NamedTuple):
    """One request, when it is over; what `observe` is called with."""

    function: str
    arrived_s: float
    waited_s: float  # until a pod took it, or until it was over
    latency_s: float  # until it was over
    outcome: str  # answered, timed_out, rejected or failed
    cold: bool  # its pod was not ready yet when it came


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
    nodes: Nodes = Nodes(),
    horizon_s: float | None = None,
    observe: Callable[[Finished], object] | None = None,
) -> Result:
    """One function under a trace. horizon_s: where it ends, whatever is still on its way; None: when the last request is over."""
    raise NotImplementedError


def simulate_many(
    functions: Sequence[Function],
    *,
    seed: int,
    nodes: Nodes = Nodes(),
    horizon_s: float | None = None,
    observe: Callable[[Finished], object] | None = None,
) -> Results:
    """Several functions that share the nodes."""
    raise NotImplementedError
