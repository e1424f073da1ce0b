"""Knative's own autoscaler."""

from __future__ import annotations

import math
from collections.abc import Mapping

from knative.autoscaler import TICK_S, Activity, Autoscaler, ScaleSpec, SpecError, Status, reconcile
from knative.autoscaler.config import SETTINGS
from knative.simulator.errors import PolicyError
from knative.simulator.policy import Policy, Sample


class Kpa(Policy):
    """The KPA, driven as `relight run` drives it: sampled each second, deciding every two, poked by a request at zero."""

    name = "kpa"
    source = "knative.autoscaler, which agrees with knative/serving 98e5ef90aa"

    def __init__(self, spec: ScaleSpec, ready: int = 0) -> None:
        """`ready`: pods that a new autoscaler finds; the function itself is taken to have been there for long, at its minimum."""
        self.initial = spec.min_scale
        self.spec = spec
        self.autoscaler = Autoscaler(spec, ready, now=0.0)
        activity = Activity.ACTIVE if spec.min_scale else Activity.INACTIVE
        self._status = Status(activity, since=-math.inf, proxied_since=-math.inf, initialized=True)
        self._poked = 0.0  # concurrency already recorded by a poke in the present second

    @classmethod
    def make(cls, settings: Mapping[str, str], concurrency: int) -> Kpa:
        """With annotations, their prefix left out, and settings of config-autoscaler. A name that is both is the annotation."""
        annotations: dict[str, str] = {}
        config: dict[str, str] = {}
        for name, value in settings.items():
            try:
                ScaleSpec.parse({name: value}, concurrency)
            except SpecError as err:
                belongs_to_config = name in SETTINGS and "config-autoscaler" in err.problem
            else:
                belongs_to_config = False
            (config if belongs_to_config else annotations)[name] = value
        try:
            spec = ScaleSpec.parse(annotations, concurrency, config)
            return cls(spec)
        except SpecError as err:
            raise PolicyError(f"kpa: {err}") from None

    def decide(self, now: float, sample: Sample) -> int | None:
        """Record what was measured in the last second; every other second, decide."""
        if sample.pods or sample.concurrency:  # else there is nobody to report a zero
            concurrency = None if sample.concurrency is None else max(0.0, sample.concurrency - self._poked)
            self.autoscaler.record(now, concurrency=concurrency, rps=max(0.0, sample.rps - self._poked))
        self._poked = 0.0
        return self.tick(now, sample.ready) if math.floor(now) % TICK_S == 0 else None

    def tick(self, now: float, ready: int) -> int | None:
        """Decide, with so many pods ready."""
        self.autoscaler.tick(now, ready)
        return self.pods_changed(now, ready)

    def poke(self, now: float, in_system: int, pods: int) -> int | None:
        """The first request at zero does not wait for the next tick."""
        if self._poked or pods:
            return None
        self._poked = 1.0
        self.autoscaler.record(now, concurrency=1.0, rps=1.0)
        return self.tick(now, 0)

    def pods_changed(self, now: float, ready: int) -> int | None:
        """From the latest decision to pods: bounds, and the way to zero."""
        step = reconcile(self.spec, self.autoscaler.last, self._status, ready, now)
        self._status = step.status
        return step.pods
