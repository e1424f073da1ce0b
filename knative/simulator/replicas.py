"""The pods of one function: as many as are wanted, from their start to their end, through roll-outs and failures.

scale_to -> cluster.ask -> start -> _become_ready -> let_go -> drained -> _go
"""

from __future__ import annotations

import math
import random
from typing import Protocol

import numpy as np

from knative.autoscaler.choice import DRAINING, GONE, PENDING, READY, STARTING, rooms, victims
from knative.simulator.clock import ENDS, EXPIRES, READIES, SAMPLES, Clock
from knative.simulator.model import FunctionModel
from knative.simulator.nodes import Cluster
from knative.simulator.pod import Pod
from knative.simulator.policy import Policy
from knative.simulator.record import Steps

# A scale-down that is followed by a scale-up within so long was a mistake: whatever it saved, a cold start followed.
FLAP_S = 60.0
PROGRESS_DEADLINE_S = 600.0  # Knative's default: a new revision that is not ready by then has failed


class Owner(Protocol):
    """The function that the pods are of."""

    def pods_changed(self, now: float) -> None:
        """Another pod is ready, or has failed."""

    def lose(self, now: float, pod: Pod) -> None:
        """A pod has failed, with all its requests."""


class Replicas:
    """See above. `kept`: those of the present revision that are not to go, ready or not; what a policy's number is compared with."""

    def __init__(
        self,
        name: str,
        model: FunctionModel,
        policy: Policy,
        clock: Clock,
        cluster: Cluster,
        owner: Owner,
        rng: np.random.Generator,
        chance: random.Random,
    ) -> None:
        self.name = name
        self.gpus = model.gpus
        self.rooms = rooms(model.concurrency, chance, packed=policy.packs)
        self.kept = 0
        self.flaps = 0
        self.running, self.ready = Steps(), Steps()
        self.wanted = Steps(policy.initial)
        self._model = model
        self._policy = policy
        self._clock = clock
        self._cluster = cluster
        self._owner = owner
        self._rng = rng
        self._pods: dict[int, Pod] = {}  # all that are not gone, by number
        self._asked = 0
        self._fell_s = -math.inf  # when less was last wanted
        self._generation = 0
        self._target = 0  # new pods that must be ready before the old ones go; 0: no roll-out is on
        self._held: int | None = None  # pods to start when the old ones are gone

    def begin(self) -> None:
        """Those that are there, and ready, from the beginning."""
        for at in self._model.rollouts:
            self._clock.when(at, SAMPLES, self._roll_out)
        for _ in range(self.wanted.value):
            self._add(0.0, warm=True)

    def __bool__(self) -> bool:
        return bool(self._pods)

    def follow(self, now: float, wanted: int | None) -> None:
        """Have so many, unless that is None."""
        if wanted is not None:
            self.scale_to(now, wanted)

    def scale_to(self, now: float, wanted: int) -> None:
        """Have so many, as soon as may be."""
        before = self.wanted.value
        if wanted != before:
            if wanted < before:
                self._fell_s = now
            elif now - self._fell_s <= FLAP_S:
                self.flaps += 1
                self._fell_s = -math.inf
            self.wanted.set(now, wanted)
        if self._held is not None:
            self._held = wanted
            return
        for _ in range(wanted - self.kept):
            self._add(now)
        if wanted < self.kept:
            for pod in self._victims(self.kept - wanted):
                self._let_go(now, pod)
            self._check_roll_out(now)

    def start(self, now: float, pod: Pod) -> None:
        """The cluster has a place for it."""
        assert pod.node is not None
        pod.state = STARTING
        self._change_running(now, 1)
        if pod.ready_s < 0:
            self._become_ready(now, pod)
            return
        cold_s = self._policy.cold_start_s()
        if cold_s is None:
            cold_s = self._cluster.cold_start_s(now, self.name, pod.node, self._model.cold_start, self._rng)
        self._clock.when(now + cold_s, READIES, self._become_ready, pod)

    def drained(self, now: float, pod: Pod) -> None:
        """One that was told to go has no more requests."""
        at = pod.told_s + self._model.drain_s
        if at > now:
            self._clock.when(at, ENDS, self._end_drain, pod)
        else:
            self._go(now, pod)

    def _victims(self, count: int) -> list[Pod]:
        kept = [pod for pod in self._pods.values() if pod.generation == self._generation and pod.state != DRAINING]
        if not self._policy.packs:
            return victims(kept, count)
        return sorted(kept, key=lambda pod: (pod.state != READY, pod.in_flight, -pod.number))[:count]

    def _add(self, now: float, *, warm: bool = False) -> None:
        self._asked += 1
        pod = self._pods[self._asked] = Pod(self._asked, self._generation)
        self.kept += 1
        if warm:
            pod.ready_s = -math.inf
        self._cluster.ask(now, self, pod)

    def _become_ready(self, now: float, pod: Pod) -> None:
        if pod.state != STARTING:
            return
        pod.state = READY
        if pod.ready_s >= 0:
            pod.ready_s = now
        pod.at_s = now
        self.ready.set(now, self.ready.value + 1)
        self.rooms.add(pod)
        if math.isfinite(self._model.pod_mtbf_s):
            self._clock.when(now + self._rng.exponential(self._model.pod_mtbf_s), ENDS, self._fail, pod)
        self._check_roll_out(now)
        self._owner.pods_changed(now)

    def _let_go(self, now: float, pod: Pod) -> None:
        """It answers what it has, and goes."""
        self.kept -= pod.generation == self._generation
        if pod.state == PENDING:
            pod.state = GONE
            del self._pods[pod.number]
            self._cluster.forget(pod)
            self._start_held(now)
        elif pod.state == STARTING:
            self._go(now, pod)
        else:
            self._take_no_more(now, pod)
            pod.state = DRAINING
            pod.told_s = now
            if not pod.in_flight:
                self.drained(now, pod)

    def _take_no_more(self, now: float, pod: Pod) -> None:
        self.rooms.drop(pod)
        self.ready.set(now, self.ready.value - 1)

    def _end_drain(self, now: float, pod: Pod) -> None:
        if pod.state == DRAINING:
            self._go(now, pod)

    def _go(self, now: float, pod: Pod) -> None:
        pod.state = GONE
        del self._pods[pod.number]
        self._change_running(now, -1)
        self._start_held(now)
        self._cluster.release(now, self.gpus, pod)

    def _change_running(self, now: float, change: int) -> None:
        for steps in (self.running, self._clock.pods):
            steps.set(now, steps.value + change)

    def _fail(self, now: float, pod: Pod) -> None:
        """It fails with all its requests; another one is started in its place, unless it was to go."""
        if pod.state not in (READY, DRAINING):
            return
        replaced = pod.state == READY and pod.generation == self._generation
        if pod.state == READY:
            self._take_no_more(now, pod)
            self.kept -= replaced
        self._go(now, pod)
        self._owner.lose(now, pod)
        if replaced and self._held is None:
            self._add(now)
        self._owner.pods_changed(now)

    def _roll_out(self, now: float, _: object) -> None:
        """A new revision: at zero that is all; else as many new pods as there are."""
        count = self.kept
        if not count or self._target or self._held is not None:
            return
        if self._model.rollout == "recreate":
            self._held = count
            for pod in [pod for pod in self._pods.values() if pod.state != DRAINING]:
                self._let_go(now, pod)
            return
        self._generation += 1
        self.kept = 0
        self._target = count
        for _ in range(count):
            self._add(now)
        self._clock.when(now + PROGRESS_DEADLINE_S, EXPIRES, self._give_up_roll_out, self._generation)

    def _check_roll_out(self, now: float) -> None:
        """The old pods go once as many new ones are ready as there were of them, or as are still wanted."""
        if not self._target:
            return
        new = sum(pod.state == READY and pod.generation == self._generation for pod in self._pods.values())
        if new < min(self._target, self.kept):
            return
        self._target = 0
        for pod in [pod for pod in self._pods.values() if pod.generation < self._generation and pod.state != DRAINING]:
            self._let_go(now, pod)

    def _give_up_roll_out(self, now: float, generation: object) -> None:
        """The new pods were not ready in time (no GPU was free for them, say): the old ones stay."""
        if not self._target or generation != self._generation:
            return
        self._target = 0
        for pod in [pod for pod in self._pods.values() if pod.generation == generation and pod.state != DRAINING]:
            self._let_go(now, pod)
        self._generation -= 1
        self.kept = sum(pod.generation == self._generation and pod.state != DRAINING for pod in self._pods.values())

    def _start_held(self, now: float) -> None:
        """The old ones are gone: the new ones may come."""
        if self._held is not None and not self._pods:
            count, self._held = self._held, None
            self._generation += 1
            self.kept = 0
            for _ in range(count):
                self._add(now)
