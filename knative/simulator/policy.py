"""What a policy is: samples in, pods wanted out. It reads no clock and has no pods of its own; all times are seconds of the trace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(slots=True)
class Sample:
    """What was measured of a function since the sample before, and what is now. Averages are over that time."""

    concurrency: float | None  # average of requests at once, waiting or with a pod; None: not measured
    rps: float  # requests that came per second
    busy_pods: float  # average of pods with at least one request
    peak: int  # most requests at once
    in_system: int  # requests now, waiting or with a pod
    queued: int  # of these, those that wait
    ready: int  # pods that take requests now
    pods: int  # these, and those that are starting or pending; none that drains


class Policy:
    """Decides how many pods one function is to have. Each simulation needs one of its own."""

    name: ClassVar[str]
    source: ClassVar[str]  # where the algorithm is described
    period_s: float = 1.0  # between samples
    initial: int = 0  # pods that are there, and ready, when the trace begins
    packs: ClassVar[bool] = False  # whether requests go where others are already, and idle pods go first (only foresight has that)
    hears_idle: ClassVar[bool] = False  # whether `pod_idle` is called

    def decide(self, now: float, sample: Sample) -> int | None:
        """The pods wanted at `now`; None: leave them as they are."""
        raise NotImplementedError

    def poke(self, now: float, in_system: int, pods: int) -> int | None:
        """As `decide`, for a request that has just come and found no room in any pod that is ready. `pods` as in Sample."""
        return None

    def pods_changed(self, now: float, ready: int) -> int | None:
        """As `decide`, as another pod is ready or gone."""
        return None

    def pod_idle(self, now: float, busy: int) -> int | None:
        """As `decide`, as a pod has just answered its last request and nobody waits; `busy`: pods with requests."""
        return None

    def next_s(self, now: float, idle: bool) -> float:
        """When to call `decide` next, after `now`; inf: not until something happens.

        idle: there is neither a pod nor a request, nor is a pod wanted. The next request ends that, and this is asked anew.
        """
        return math.inf if idle else (math.floor(now / self.period_s) + 1) * self.period_s

    def cold_start_s(self) -> float | None:
        """How long the pod takes that starts just now, if it is for the policy to say (only foresight has that); None: the model's."""
        return None
