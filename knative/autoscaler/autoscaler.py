"""One revision's autoscaler: samples in, decisions out."""

from __future__ import annotations

import math

from knative.autoscaler.config import KPA
from knative.autoscaler.decide import Decision, Load, State, decide
from knative.autoscaler.errors import SpecError
from knative.autoscaler.spec import RPS, WEIGHTED_EXPONENTIAL, ScaleSpec
from knative.autoscaler.window import LinearWindow, WeightedWindow


class Autoscaler:
    """The KPA of one revision, without a clock and without pods of its own.

    The owner records what it measures, about once a second; calls `tick` every TICK_S, and at once after a sample for which `needs_poke`
    is true; and sees to it that as many pods run as were desired. All times are seconds since a moment of the owner's choice; `now` may
    not be NaN, and is expected not to go backwards. Not for use from several threads at once.
    """

    def __init__(self, spec: ScaleSpec, ready: int, now: float) -> None:
        """`ready`: pods ready at `now`. Raises SpecError if the spec is not for this class of autoscaler."""
        if spec.autoscaler_class != KPA:
            raise SpecError("class", spec.autoscaler_class, f"must be {KPA} to be decided here")
        window = WeightedWindow if spec.aggregation == WEIGHTED_EXPONENTIAL else LinearWindow
        self.spec = spec
        self.state = State.initial(ready, now)
        self.last: Decision | None = None  # the latest decision; it stands while there is no data for a newer one
        self._stable = window(spec.stable_window_s)
        self._panic = window(spec.panic_window_s)

    def record(self, now: float, *, concurrency: float | None = None, rps: float | None = None) -> None:
        """Take a sample of the whole revision; those of one second add up, so each source is to be recorded once a second.

        concurrency: requests being handled or waiting, averaged over the second, each counted in one place only.
        rps: requests that came within the second.
        Only the metric of the spec is kept. None says that there is no sample, which is not the same as 0.
        Raises ValueError if the sample is not finite: it would spoil every average from then on.
        """
        value = rps if self.spec.metric == RPS else concurrency
        if value is None:
            return
        if not math.isfinite(value):
            raise ValueError(f"a sample of {self.spec.metric} must be finite, got {value}")
        self._stable.record(now, value)
        self._panic.record(now, value)

    def tick(self, now: float, ready: int) -> Decision | None:
        """Decide with `ready` pods at `now`; None if there is no data to decide by."""
        # With an unlimited target burst every request passes the activator, whose silence means that there are none.
        if self._stable.is_empty(now) and self.spec.target_burst_capacity != -1:
            return None
        load = Load(self._stable.average(now), self._panic.average(now), ready)
        self.last, self.state = decide(self.spec, load, self.state, now)
        return self.last

    def needs_poke(self, concurrency: float) -> bool:
        """Whether requests at the activator cannot wait for the next tick: the latest decision was that there be no pods."""
        return concurrency != 0 and self.last is not None and self.last.desired == 0
