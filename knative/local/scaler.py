"""How many pods a revision wants: its load is sampled, and the autoscaler decides."""

import math
import time
from dataclasses import replace
from typing import Any

from knative.autoscaler import Activity, Autoscaler, ScaleSpec, Status, reconcile
from knative.local.meter import ConcurrencyMeter


class Scaler:
    """Knative's autoscaler with its clock, its load and the revision's activity. `now` is on time.monotonic's clock."""

    def __init__(self, spec: ScaleSpec, meter: ConcurrencyMeter, now: float) -> None:
        self.concurrency = self.rps = 0.0  # of the last second
        self._meter = meter
        self._spec = spec
        self._autoscaler = Autoscaler(spec, ready=0, now=now)
        # On one machine every request has always come through this activator: there is no ingress to be told first.
        self._status = replace(Status.initial(now), proxied_since=-math.inf)
        self._poked = 0.0  # concurrency already recorded by a poke in the present second

    @property
    def spec(self) -> ScaleSpec:
        """What it goes by."""
        return self._spec

    @property
    def first(self) -> int:
        """How many pods the revision starts with."""
        return max(self._spec.initial_scale, self._spec.min_scale)

    @property
    def settled(self) -> bool:
        """Whether the revision once had as many pods ready as it starts with."""
        return self._status.initialized or not self.first

    @property
    def wanted(self) -> int | None:
        """How many pods were wanted last, if that was decided yet."""
        last = self._autoscaler.last
        return last.bounded if last else None

    def start(self, least: int) -> None:
        """The revision is to start, again perhaps, with at least so many pods."""
        self._take(replace(self._spec, initial_scale=max(self._spec.initial_scale, least)))
        self._status = replace(self._status, since=time.monotonic())

    def change(self, spec: ScaleSpec, ready: int) -> None:
        """Go by another spec from now on; what was seen of the load counts for it too, unless it has other windows."""
        windows = spec.stable_window_s, spec.panic_window_s, spec.aggregation
        if windows != (self._spec.stable_window_s, self._spec.panic_window_s, self._spec.aggregation):
            self._autoscaler = Autoscaler(spec, ready, time.monotonic())
        self._take(spec)

    def _take(self, spec: ScaleSpec) -> None:
        self._autoscaler.spec = self._spec = spec

    def sample(self, now: float, *, has_pods: bool) -> None:
        """The load of the second that is over."""
        self.concurrency, self.rps = self._meter.report(now)
        # What a poke has recorded is not to be counted twice; with no pods and no requests there is nobody to report a zero.
        if has_pods or self.concurrency:
            concurrency, rps = (max(0.0, value - self._poked) for value in (self.concurrency, self.rps))
            self._autoscaler.record(now, concurrency=concurrency, rps=rps)
        self._poked = 0.0

    def poke(self, now: float, ready: int) -> int | None:
        """The first request at zero does not wait for the beat: the number of pods to have, or None if nothing is to change."""
        if self._poked:
            return None
        self._poked = 1.0
        self._autoscaler.record(now, concurrency=1.0, rps=1.0)
        return self.decide(now, ready)

    def decide(self, now: float, ready: int) -> int | None:
        """The number of pods to have, by the load until now; None if nothing is to change."""
        self._autoscaler.tick(now, ready)
        return self.reconcile(now, ready)

    def reconcile(self, now: float, ready: int) -> int | None:
        """The same by the latest decision, after another pod has become ready, or is not any more."""
        step = reconcile(self._spec, self._autoscaler.last, self._status, ready, now)
        self._status = step.status
        return step.pods

    def status(self) -> dict[str, Any]:
        """Its part of a revision's entry in `/api/status`."""
        last = self._autoscaler.last
        return {
            "mode": "panic" if last and last.panic else "stable",
            "active": self._status.activity is not Activity.INACTIVE,
            "stable_concurrency": abs(round(last.stable, 6)) if last else 0.0,
            "panic_concurrency": abs(round(last.panic_value, 6)) if last else 0.0,
        }
