"""A discrete-event simulation of functions that scale from zero: how slow and how dear a policy is under a trace.

    policy = make_policy("kpa", {"window": "30s"}, model)
    result = simulate(trace, model, policy, seed=1)

trace -> arrivals -> activator queue -> pods -> samples -> policy -> pods. The policy `kpa` is `knative.autoscaler` itself.
"""

from knative.simulator.engine import Function, Results, simulate, simulate_many
from knative.simulator.errors import ModelError, PolicyError, SimulatorError, TraceError
from knative.simulator.model import FunctionModel, Nodes, read_model
from knative.simulator.policies import Policy, make_policy, policy_names
from knative.simulator.result import Latencies, Result, Series
from knative.simulator.running import Finished
from knative.simulator.trace import Arrivals, Source, Trace, arrivals

__all__ = [
    "Arrivals",
    "Finished",
    "Function",
    "FunctionModel",
    "Latencies",
    "ModelError",
    "Nodes",
    "Policy",
    "PolicyError",
    "Result",
    "Results",
    "Series",
    "SimulatorError",
    "Source",
    "Trace",
    "TraceError",
    "arrivals",
    "make_policy",
    "policy_names",
    "read_model",
    "simulate",
    "simulate_many",
]
