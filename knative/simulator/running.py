"""One function in a simulation: its requests, and the policy that scales its pods.

arrive -> a pod with room -> serve -> answer
       -> the activator's queue -> a pod is ready, or has room -> serve; or time-out, or rejected
tick, poke, pods_changed -> the policy -> replicas.scale_to
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappush
from typing import NamedTuple

import numpy as np

from knative.autoscaler.choice import GONE, READY
from knative.simulator.clock import COMES, ENDS, EXPIRES, SAMPLES, Clock
from knative.simulator.model import FunctionModel
from knative.simulator.nodes import Cluster
from knative.simulator.pod import Pod
from knative.simulator.policy import Policy, Sample
from knative.simulator.record import Course, Steps
from knative.simulator.replicas import Replicas
from knative.simulator.result import Latencies, Result
from knative.simulator.sharing import Sharing
from knative.simulator.trace import Arrivals, Trace, checked, in_chunks

PIECE = 4_096  # requests that are unpacked at a time: Python's own numbers take four times the room


class Finished(NamedTuple):
    """One request, when it is over; what `observe` is called with."""

    function: str
    arrived_s: float
    waited_s: float  # until a pod took it, or until it was over
    latency_s: float  # until it was over
    outcome: str  # answered, timed_out, rejected or failed
    cold: bool  # its pod was not ready yet when it came


class Running:
    """One function while it is simulated."""

    def __init__(
        self,
        name: str,
        trace: Trace,
        model: FunctionModel,
        policy: Policy,
        clock: Clock,
        cluster: Cluster,
        seeds: np.random.SeedSequence,
        observe: Callable[[Finished], object] | None,
    ) -> None:
        services, pods, chance = seeds.spawn(3)
        self.name = name
        self._model = model
        self._policy = policy
        self._clock = clock
        self._observe = observe
        self._chunks: Iterator[Arrivals] = (piece for chunk in checked(trace) for piece in in_chunks(chunk, PIECE))
        self._service_rng = np.random.default_rng(services)
        pod_rng, coin = np.random.default_rng(pods), random.Random(int(chance.generate_state(1)[0]))
        self._replicas = Replicas(name, model, policy, clock, cluster, self, pod_rng, coin)
        self._rooms = self._replicas.rooms
        self._sharing: Sharing | None = None
        if model.batch_slowdown and model.concurrency != 1:
            self._sharing = Sharing(clock, model.batch_slowdown, model.timeout_s, self._answer, self._cut)

        self._times: list[float] = []  # of the present piece of the trace
        self._services: list[float] = []
        self._next = 0
        self._more = True  # whether requests are still to come
        self._waiting: deque[tuple[float, float]] = deque()  # arrived, service
        self._expiry_set = False

        # Requests in the system and pods with requests, as areas since `_base`: leaving adds what coming has taken.
        self._count = self._busy = 0
        self._area = self._busy_area = 0.0
        self._base = 0.0
        self._areas_before = self._busy_before = 0.0  # up to `_base`
        self._arrived = 0  # since the last sample
        self._peak = 0
        self._asleep = False  # there is nothing, and no sample is taken
        self._ticks = 0  # number of the latest tick that was set; earlier ones do not count

        self._queue = Steps()
        self._course = Course()
        self._latencies = Latencies()
        self._requests = self._answered = self._timed_out = self._rejected = self._failed = 0
        self._cold_starts = 0

    # --- requests

    def begin(self) -> None:
        """Put the first events into the clock, with the pods that are there already."""
        self._clock.live += 1
        self._replicas.begin()
        self._next_chunk()
        self._schedule_tick(0.0)

    def _next_chunk(self) -> None:
        self._latencies.settle()
        chunk = next(self._chunks, None)
        if chunk is None:
            self._more = False
            self._times = []
            if not self._count:
                self._clock.live -= 1
            return
        self._times = chunk.t_s.tolist()
        self._services = self._model.services(chunk, self._service_rng).tolist()
        self._next = 0
        self._clock.when(self._times[0], COMES, self._arrive)

    def _arrive(self, now: float, _: object) -> None:
        index = self._next
        service_s = self._services[index]
        self._requests += 1
        self._arrived += 1
        self._count = count = self._count + 1
        if self._asleep:
            self._schedule_tick(now, woken=True)
        self._area -= now - self._base
        if count > self._peak:
            self._peak = count
        self._next = index = index + 1
        if index < len(self._times):
            clock = self._clock
            clock.made = made = clock.made + 1
            heappush(clock.heap, (self._times[index], COMES + made, self._arrive, None))
        else:
            self._next_chunk()
        pod = None if self._waiting else self._rooms.take()
        if pod is None:
            self._wait(now, service_s)
        else:
            self._serve(now, now, service_s, pod)

    def _wait(self, now: float, service_s: float) -> None:
        if len(self._waiting) >= self._model.queue_limit:
            self._rejected += 1
            self._over(now, now, now, "rejected", cold=False)
            return
        self._waiting.append((now, service_s))
        self._queue.set(now, len(self._waiting))
        if not self._expiry_set:
            self._expiry_set = True
            self._clock.when(now + self._model.timeout_s, EXPIRES, self._expire_waiting)
        self._replicas.follow(now, self._policy.poke(now, self._count, self._replicas.kept))

    def _dispatch(self, now: float) -> None:
        """Give every pod that has room to those who wait, first come first served."""
        waiting = self._waiting
        while waiting and (pod := self._rooms.take()):
            arrived_s, service_s = waiting.popleft()
            self._serve(now, arrived_s, service_s, pod)
        self._queue.set(now, len(waiting))

    def _serve(self, now: float, arrived_s: float, service_s: float, pod: Pod) -> None:
        pod.in_flight += 1
        if pod.in_flight == 1:
            self._busy += 1
            self._busy_area -= now - self._base
        if pod.ready_s > arrived_s:
            self._cold_starts += 1
        if self._sharing:
            self._sharing.serve(now, arrived_s, service_s, pod)
            return
        end, limit = now + service_s, arrived_s + self._model.timeout_s
        clock = self._clock
        clock.made = made = clock.made + 1
        if end <= limit:
            heappush(clock.heap, (end, ENDS + made, self._answer, (pod, arrived_s, now)))
        else:
            heappush(clock.heap, (max(limit, now), ENDS + made, self._cut, (pod, arrived_s, now)))

    def _answer(self, now: float, about: tuple[Pod, float, float]) -> None:
        pod, arrived_s, taken_s = about
        if pod.state == GONE:
            return
        self._answered += 1
        self._latencies.buffer.append(now - arrived_s)
        self._leave(now, pod)
        self._over(now, arrived_s, taken_s, "answered", pod.ready_s > arrived_s)

    def _cut(self, now: float, about: tuple[Pod, float, float]) -> None:
        """The time of a request in a pod is over; the pod is free for another."""
        pod, arrived_s, taken_s = about
        if pod.state == GONE:
            return
        self._timed_out += 1
        self._leave(now, pod)
        self._over(now, arrived_s, taken_s, "timed_out", pod.ready_s > arrived_s)

    def _leave(self, now: float, pod: Pod) -> None:
        pod.in_flight -= 1
        idle = not pod.in_flight
        if idle:
            self._busy -= 1
            self._busy_area += now - self._base
        if pod.state == READY:
            self._rooms.add(pod)
            if self._waiting:
                self._dispatch(now)
            elif idle and self._policy.hears_idle:
                self._replicas.follow(now, self._policy.pod_idle(now, self._busy))
        elif idle:
            self._replicas.drained(now, pod)

    def _over(self, now: float, arrived_s: float, taken_s: float, outcome: str, cold: bool) -> None:
        """A request is over, and counted as what it became."""
        self._count -= 1
        self._area += now - self._base
        if self._observe:
            self._observe(Finished(self.name, arrived_s, taken_s - arrived_s, now - arrived_s, outcome, cold))
        if not (self._count or self._more):
            self._clock.live -= 1

    def _expire_waiting(self, now: float, _: object) -> None:
        waiting, timeout_s = self._waiting, self._model.timeout_s
        while waiting and waiting[0][0] + timeout_s <= now:
            arrived_s, _service_s = waiting.popleft()
            self._timed_out += 1
            self._over(now, arrived_s, now, "timed_out", cold=False)
        self._queue.set(now, len(waiting))
        self._expiry_set = bool(waiting)
        if waiting:
            self._clock.when(waiting[0][0] + timeout_s, EXPIRES, self._expire_waiting)

    # --- pods, and the policy that says how many

    def pods_changed(self, now: float) -> None:
        """Another pod is ready, or has failed."""
        self._replicas.follow(now, self._policy.pods_changed(now, self._replicas.ready.value))
        self._dispatch(now)

    def lose(self, now: float, pod: Pod) -> None:
        """A pod has failed, with all its requests."""
        if pod.in_flight:
            self._busy -= 1
            self._busy_area += now - self._base
        for arrived_s, taken_s in self._sharing.lose(pod) if self._sharing else _requests_of(pod, self._clock, (self._answer, self._cut)):
            self._failed += 1
            self._over(now, arrived_s, taken_s, "failed", pod.ready_s > arrived_s)

    def _tick(self, now: float, version: object) -> None:
        if version != self._ticks:
            return
        self._replicas.follow(now, self._policy.decide(now, self._sample(now)))
        self._schedule_tick(now)

    def _schedule_tick(self, now: float, *, woken: bool = False) -> None:
        """woken: by the first request after there was nothing. Samples are taken again, the first one of the period that it came in."""
        self._asleep = not (woken or self._count or self._replicas or self._replicas.wanted.value)
        at = self._policy.next_s(now, self._asleep)
        self._ticks += 1
        if at < math.inf:
            self._clock.when(at, SAMPLES, self._tick, self._ticks)
            if woken:
                self._base = max(self._base, at - self._policy.period_s)

    def _sample(self, now: float) -> Sample:
        span_s = now - self._base
        area = self._area + self._count * span_s
        busy = self._busy_area + self._busy * span_s
        over = 1.0 / span_s if span_s > 0 else 0.0
        sample = Sample(
            concurrency=area * over,
            rps=self._arrived * over,
            busy_pods=busy * over,
            peak=self._peak,
            in_system=self._count,
            queued=len(self._waiting),
            ready=self._replicas.ready.value,
            pods=self._replicas.kept,
        )
        self._areas_before += area
        self._busy_before += busy
        self._area = self._busy_area = 0.0
        self._base = now
        self._arrived = 0
        self._peak = self._count
        return sample

    # --- what came of it

    def _integrals(self, now: float) -> tuple[float, ...]:
        load = self._areas_before + self._area + self._count * (now - self._base)
        replicas = self._replicas
        return load, *(steps.integral(now) for steps in (self._queue, replicas.running, replicas.ready, replicas.wanted))

    def look(self, now: float) -> float:
        """Close a step of its course; when to close the next one."""
        return self._course.add(now, self._integrals(now))

    def result(self, now: float) -> Result:
        """What came of it by `now`, the end."""
        self._latencies.settle(1)
        pod_seconds = self._replicas.running.integral(now)
        gpu_hours = pod_seconds * self._model.gpus / 3600
        return Result(
            requests=self._requests,
            answered=self._answered,
            timed_out=self._timed_out,
            rejected=self._rejected,
            failed=self._failed,
            in_system=self._count,
            cold_starts=self._cold_starts,
            latencies=self._latencies,
            pod_seconds=pod_seconds,
            gpu_hours=gpu_hours,
            cost=gpu_hours * self._model.price_per_gpu_hour,
            peak_pods=self._replicas.running.most,
            busy_seconds=self._busy_before + self._busy_area + self._busy * (now - self._base),
            flaps=self._replicas.flaps,
            horizon_s=now,
            series=self._course.series(now, self._integrals(now)),
        )


def _requests_of(pod: Pod, clock: Clock, ends: tuple[Callable[[float, tuple[Pod, float, float]], None], ...]) -> list[tuple[float, float]]:
    """When the requests that a pod has came, and were taken. Looks at all events to come: failures are rare."""
    found: list[tuple[Pod, float, float]] = [about for _, _, handler, about in clock.heap if handler in ends]  # type: ignore[misc]
    return sorted((arrived_s, taken_s) for one, arrived_s, taken_s in found if one is pod)
