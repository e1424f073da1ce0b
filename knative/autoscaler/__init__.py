"""Knative's autoscaler (KPA) as pure functions: what a cluster would decide, on one machine or in a simulation.

    spec = ScaleSpec.parse({"autoscaling.knative.dev/window": "30s"}, container_concurrency=2)
    autoscaler = Autoscaler(spec, ready=0, now=0.0)
    autoscaler.record(0.0, concurrency=3.0)
    decision = autoscaler.tick(0.0, ready=0)  # 3 pods: 3 requests at once, 1.4 (70 % of 2) per pod

`Autoscaler` says how many pods are wanted; `reconcile` turns that into the pods to run, down to zero and back. Nothing here reads a clock
or does input and output, but `replay` and the command line, which are not imported from here. The decisions agree with those of Knative
Serving 1.23.
"""

from knative.autoscaler.autoscaler import Autoscaler
from knative.autoscaler.decide import TICK_S, Decision, bound
from knative.autoscaler.errors import AutoscalerError, ReplayError, SpecError
from knative.autoscaler.spec import ScaleSpec
from knative.autoscaler.zero import Activity, Status, Step, reconcile

__all__ = [
    "TICK_S",
    "Activity",
    "Autoscaler",
    "AutoscalerError",
    "Decision",
    "ReplayError",
    "ScaleSpec",
    "SpecError",
    "Status",
    "Step",
    "bound",
    "reconcile",
]
