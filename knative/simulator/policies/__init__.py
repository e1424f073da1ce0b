"""The policies by name."""

from __future__ import annotations

from collections.abc import Mapping

from knative.simulator.model import FunctionModel
from knative.simulator.policies.policy import Policy, Sample
from knative.simulator.trace import Source

__all__ = ["Policy", "Sample", "make_policy", "policy_names"]


def policy_names() -> list[str]:
    """The names for `--policy`."""
    return ["fixed", "kpa", "hpa", "keda-queue", "keda-http", "keep-alive", "rps-step", "hybrid-histogram", "schedule", "oracle"]


def make_policy(
    name: str,
    settings: Mapping[str, str],
    model: FunctionModel,
    *,
    history: Source | None = None,
    future: Source | None = None,
    seed: int = 0,
) -> Policy:
    """A policy for one simulation of `model`, with its knobs set.

    history: an earlier trace, which `schedule` learns from. future: the trace that will be simulated with this `seed`, which `oracle` needs.
    Raises PolicyError if the name, a knob or a value is not known or allowed, or what it needs is not there.
    """
    raise NotImplementedError
