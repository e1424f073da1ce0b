"""From a decision to the pods to run: bounds, and the way to zero and back.

The rules are Knative's (pkg/reconciler/autoscaling/kpa/scaler.go and kpa.go at knative/serving 98e5ef90aa), without a cluster:

1. Traffic ends. When no pod is wanted any more, a revision that has been active for less than its stable window keeps one pod.
2. It turns inactive. Its pods stay as they are until the activator has been in the request path for the grace period (so that no
   request can still be on its way to the last pod) and the retention period is over.
3. The last pod goes. A request at the activator makes the next decision ask for pods: the revision is activating.
4. Enough pods are ready: it is active. If that never happens, the pods are given up after the progress deadline.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from knative.autoscaler.decide import Decision, bound
from knative.autoscaler.spec import ScaleSpec

# So long after its progress deadline a revision that is still not ready is given up; the deadline itself is for reporting the failure.
ACTIVATION_BUFFER_S = 30.0
# When to look again where nothing but a little patience is needed.
SETTLE_S = 3.0
PROBE_S = 1.0


class Activity(Enum):
    """The condition `Active` of Knative's PodAutoscaler: Unknown, True or False."""

    ACTIVATING = "activating"
    ACTIVE = "active"
    INACTIVE = "inactive"


@dataclass(frozen=True)
class Status:
    """Where a revision stands. All times in seconds."""

    activity: Activity
    since: float  # when the activity began
    proxied_since: float | None  # when the activator entered the request path; None while requests go straight to the pods
    initialized: bool = False  # whether the revision has once had its initial scale ready

    @classmethod
    def initial(cls, now: float) -> Status:
        """The status of a revision created at `now`."""
        return cls(Activity.ACTIVATING, since=now, proxied_since=now)


@dataclass(frozen=True)
class Step:
    """What to do now. The caller acts on `pods`, keeps `status`, and comes back after `look_again_s` at the latest."""

    pods: int | None  # that are to run; None: leave them as they are
    status: Status
    look_again_s: float | None  # None: when there is a new decision, or another pod is ready or gone


def reconcile(spec: ScaleSpec, decision: Decision | None, status: Status, ready: int, now: float) -> Step:
    """The pods to run at `now`, given the latest decision (None: none yet) and the pods ready.

    To be called after each tick and whenever the number of ready pods changes; calling it more often does no harm.
    """
    step = _scale(spec, decision, status, now)
    next_status = _next_activity(spec, status, step.wanted, ready, now)
    burst = decision.excess_burst_capacity if decision else _initial_burst_capacity(spec)
    if step.wanted and burst >= 0:
        next_status = replace(next_status, proxied_since=None)
    elif next_status.proxied_since is None:
        next_status = replace(next_status, proxied_since=now)
    return Step(step.wanted if step.apply else None, next_status, step.look_again_s)


@dataclass(frozen=True)
class ZeroStep:
    """What the revision wants, which decides its activity, and whether its pods may already follow."""

    wanted: int | None  # pods; None: not known
    apply: bool
    look_again_s: float | None = None


def _scale(spec: ScaleSpec, decision: Decision | None, status: Status, now: float) -> ZeroStep:
    if decision is None and status.activity is not Activity.ACTIVATING:
        return ZeroStep(None, apply=False)
    wanted = bound(spec, decision.desired if decision else 0, status.initialized)
    return to_zero(spec, wanted, status, now)


def to_zero(spec: ScaleSpec, wanted: int, status: Status, now: float) -> ZeroStep:
    """How far on the way to zero the revision may be at `now`, where `wanted` pods (within bounds) are wanted."""
    if wanted > 0:
        return ZeroStep(wanted, apply=True)
    if not spec.enable_scale_to_zero:
        return ZeroStep(1, apply=True)
    elapsed_s = now - status.since
    if status.activity is Activity.ACTIVATING:
        return _while_activating(spec, elapsed_s)
    if status.activity is Activity.ACTIVE:
        return _while_active(spec, elapsed_s)
    return _while_inactive(spec, elapsed_s, status.proxied_since, now)


def _while_activating(spec: ScaleSpec, activating_s: float) -> ZeroStep:
    """No decision for zero counts until the revision was active once, or has taken too long to be."""
    timeout_s = spec.progress_deadline_s + ACTIVATION_BUFFER_S
    if activating_s > timeout_s:
        return ZeroStep(0, apply=True)
    return ZeroStep(None, apply=False, look_again_s=timeout_s)


def _while_active(spec: ScaleSpec, active_s: float) -> ZeroStep:
    """One pod for the rest of the first stable window; after it the revision turns inactive, its pods untouched for now."""
    left_s = spec.stable_window_s - active_s
    if left_s > 0:
        return ZeroStep(1, apply=True, look_again_s=left_s)
    return ZeroStep(0, apply=False, look_again_s=SETTLE_S)


def _while_inactive(spec: ScaleSpec, inactive_s: float, proxied_since: float | None, now: float) -> ZeroStep:
    """The pods go once the activator has been in the path for the grace period, but not before the retention period is over.

    Waiting for the longer of both periods is enough too: in that time the activator has certainly been reached by all.
    """
    if proxied_since is None and spec.target_burst_capacity != -1:
        return ZeroStep(0, apply=False, look_again_s=PROBE_S)
    grace_s = spec.scale_to_zero_grace_period_s
    # Nobody will come back to an unreachable revision.
    retention_s = spec.scale_to_zero_pod_retention_period_s if spec.reachable else 0.0
    if inactive_s >= max(grace_s, retention_s):
        return ZeroStep(0, apply=True)
    if inactive_s < retention_s:
        return ZeroStep(0, apply=False, look_again_s=retention_s - inactive_s)
    proxied_s = 0.0 if proxied_since is None else now - proxied_since
    if proxied_s >= grace_s:
        return ZeroStep(0, apply=True)
    return ZeroStep(0, apply=False, look_again_s=grace_s - proxied_s)


def _next_activity(spec: ScaleSpec, status: Status, wanted: int | None, ready: int, now: float) -> Status:
    """The status after it was found that `wanted` pods are wanted and `ready` are ready."""
    least = _active_threshold(spec, status)
    if ready >= least:
        status = replace(status, initialized=True)
    if wanted == 0 or least == 0:
        activity = Activity.INACTIVE
    elif status.activity is Activity.INACTIVE and wanted is None:
        # Nothing is known of the load: an inactive revision (a new one with initial scale 0, say) sleeps on.
        activity = Activity.INACTIVE
    else:
        activity = Activity.ACTIVATING if ready < least else Activity.ACTIVE
    return status if activity is status.activity else replace(status, activity=activity, since=now)


def _active_threshold(spec: ScaleSpec, status: Status) -> int:
    """Pods that must be ready for the revision to be active; 0 only for a new one that starts with none."""
    return max(spec.min_scale if spec.reachable else 0, 1 if status.initialized else spec.initial_scale)


def _initial_burst_capacity(spec: ScaleSpec) -> int:
    """Excess burst capacity before the first decision: that of the initial scale without any load."""
    if spec.target_burst_capacity in (-1, 0):
        return int(spec.target_burst_capacity)
    return int(spec.initial_scale * spec.total - spec.target_burst_capacity)
