"""The loop that gives a revision as many pods as are wanted."""

import asyncio
import time
from collections.abc import Callable

from knative.autoscaler import TICK_S
from knative.local.failures import Failures
from knative.local.manifest import Service
from knative.local.meter import ConcurrencyMeter
from knative.local.pod import Pod
from knative.local.pods import PodSet
from knative.local.scaler import Scaler
from knative.local.waiting import Waiting

SAMPLE_S = 1.0
SLOW_S = 10.0  # of a start, until it is said what it waits for


class ScaleLoop:
    """Carries out what the scaler decides, within what else there is to mind: who waits, what has failed, GPUs that were given up."""

    def __init__(
        self,
        service: Service,
        meter: ConcurrencyMeter,
        pods: PodSet,
        waiting: Waiting,
        failures: Failures,
        let_go: Callable[[Pod], object],
        is_late: Callable[[Pod], object],
        is_slow: Callable[[Pod], object],
        is_outdated: Callable[[], bool] = lambda: False,
    ) -> None:
        """let_go: called with each pod that is one too many. is_late: with each that was not ready by its progress deadline.

        is_slow: each second with each that was not ready for SLOW_S. is_outdated: whether no pod may start, as another revision takes over.
        """
        self.scaler = Scaler(service.scale, meter, time.monotonic())
        self.held = False  # no pods yet, whoever waits
        self.keeps_one = False  # of those that are ready, though nobody wants it: there could be no other one
        self.is_closed = False  # and none any more
        self._meter = meter
        self._pods = pods
        self._waiting = waiting
        self._failures = failures
        self._let_go = let_go
        self._is_late = is_late
        self._is_slow = is_slow
        self._is_outdated = is_outdated
        self._has_gpus = any(container.resources.gpus for container in service.spec.containers)

    @property
    def desired(self) -> int:
        """How many pods the autoscaler last wanted."""
        if not self.scaler.spec.reachable and not self._waiting:
            return 0
        return len(self._pods) if self.scaler.wanted is None else max(self.scaler.wanted, self._least)

    @property
    def _least(self) -> int:
        return int(self.keeps_one and self._pods.ready > 0)

    async def run(self) -> None:
        """Sample each second, decide every two."""
        began = time.monotonic()
        beats = 0  # since then, whether there was one or not
        while True:
            beats = max(beats, int((time.monotonic() - began) / SAMPLE_S)) + 1  # those that were missed are not made up for
            await asyncio.sleep(max(0.0, began + beats * SAMPLE_S - time.monotonic()))
            self.beat(decides=beats % round(TICK_S / SAMPLE_S) == 0)

    def beat(self, *, decides: bool) -> None:
        """What there is to do each second."""
        now = time.monotonic()
        self.scaler.sample(now, has_pods=bool(self._pods))
        for pod in self._pods.late(now, SLOW_S):
            self._is_slow(pod)
        for pod in self._pods.late(now, self.scaler.spec.progress_deadline_s):
            self._is_late(pod)
        self.ask_for_devices()
        self.retreat()
        if decides:
            self.apply(self.scaler.decide(now, self._pods.ready))

    def asked(self) -> None:
        """Somebody has begun to wait for a pod."""
        if not self._pods.kept:
            self.apply(self.scaler.poke(time.monotonic(), self._pods.ready))
        self.ask_for_devices()

    def readiness_changed(self) -> None:
        """Another pod is ready, or is not any more."""
        self.apply(self.scaler.reconcile(time.monotonic(), self._pods.ready))

    def ask_for_devices(self) -> None:
        """Of its pods that wait for a GPU, some may need it by now."""
        for pod in self._pods:
            if pod.phase == "pending":
                pod.devices.look()

    def retreat(self) -> None:
        """Where no request can come, there are no pods once nobody waits."""
        if not self.scaler.spec.reachable and not self._waiting:
            self.scale_to(0)

    def apply(self, wanted: int | None) -> None:
        """Have so many pods, unless that is None."""
        if wanted is not None:
            self.scale_to(wanted)

    def scale_to(self, wanted: int) -> None:
        """Have so many pods, as far as that is allowed."""
        if self.is_closed or self.held:
            return
        if self._waiting:
            wanted = max(wanted, 1)  # also for those who came from another revision, whom the autoscaler does not know
        elif not self.scaler.spec.reachable:
            wanted = 0
        wanted = max(wanted, self._least)
        kept = len(self._pods.kept)
        if self._has_gpus and self.scaler.settled and not self._meter.current and not self._waiting:
            # A pod that has given its GPU up is not wanted back before somebody calls.
            wanted = min(wanted, max(kept, self.scaler.spec.min_scale))
        if wanted > kept and not self._failures.pause_s and not self._is_outdated():
            for _ in range(wanted - kept):
                self._pods.add()
        for pod in self._pods.surplus(wanted):
            self._let_go(pod)
