"""The policies by name. Each is a small class; the decisions themselves are functions of what was measured and the time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

from knative.simulator.errors import PolicyError
from knative.simulator.model import FunctionModel
from knative.simulator.policies.foresight import Oracle, cold_starts, demand, make_schedule
from knative.simulator.policies.histogram import HybridHistogram
from knative.simulator.policies.hpa import Hpa
from knative.simulator.policies.keda import KedaHttp, KedaQueue
from knative.simulator.policies.knobs import Knobs
from knative.simulator.policies.kpa import Kpa
from knative.simulator.policies.simple import Fixed, KeepAlive, RpsStep
from knative.simulator.policy import Policy, Sample
from knative.simulator.trace import Source

__all__ = ["Policy", "Sample", "make_policy", "policy_names"]


class _Given(NamedTuple):
    """What a policy may be made from."""

    knobs: Knobs
    settings: Mapping[str, str]
    model: FunctionModel
    history: Source | None
    future: Source | None
    seed: int
    number: int


def _oracle(given: _Given) -> Policy:
    if given.future is None:
        raise PolicyError("oracle: it needs the trace that will be simulated")
    changes = demand(given.future, given.model, given.seed, given.number)
    return Oracle(changes, cold_starts(given.model.cold_start, given.seed, given.number), given.model.drain_s)


_MAKERS: dict[str, Callable[[_Given], Policy]] = {
    "fixed": lambda given: Fixed(given.knobs),
    "kpa": lambda given: Kpa.make(given.settings, given.model.concurrency),
    "hpa": lambda given: Hpa(given.knobs, given.model.concurrency),
    "keda-queue": lambda given: KedaQueue(given.knobs),
    "keda-http": lambda given: KedaHttp(given.knobs, given.model.concurrency),
    "keep-alive": lambda given: KeepAlive(given.knobs, given.model.concurrency),
    "rps-step": lambda given: RpsStep(given.knobs),
    "hybrid-histogram": lambda given: HybridHistogram(given.knobs, given.model.concurrency),
    "schedule": lambda given: make_schedule(given.knobs, given.settings, given.model, given.history, given.seed),
    "oracle": _oracle,
}
_OF_KPA = ("kpa", "schedule")  # whose knobs are checked by the KPA's own rules


def policy_names() -> list[str]:
    """The names for `--policy`."""
    return list(_MAKERS)


def make_policy(
    name: str,
    settings: Mapping[str, str],
    model: FunctionModel,
    *,
    history: Source | None = None,
    future: Source | None = None,
    seed: int = 0,
    index: int = 0,
) -> Policy:
    """A policy for one simulation of `model`, with its knobs set.

    history: an earlier trace, which `schedule` learns from. future: the trace that will be simulated with this `seed`, as function
    number `index` of simulate_many, which `oracle` needs.
    Raises PolicyError if the name, a knob or a value is not known or allowed, or what it needs is not there.
    """
    if name not in _MAKERS:
        close = get_close_matches(name, _MAKERS, 1)
        known = f"did you mean {close[0]}?" if close else f"known are {', '.join(_MAKERS)}"
        raise PolicyError(f"there is no policy {name!r}; {known}")
    knobs = Knobs(name, settings)
    policy = _MAKERS[name](_Given(knobs, settings, model, history, future, seed, index))
    if name not in _OF_KPA:
        knobs.done()
    return policy
