"""One function in a simulation: its requests, its pods, and the policy that scales them.

arrive -> a pod with room -> serve -> leave
       -> the activator's queue -> a pod is ready or has room -> serve; or time-out, or rejected
tick, poke, pods_changed: the policy -> scale_to -> the cluster -> start -> pod_ready -> ... -> let_go -> gone
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from knative.simulator.model import FunctionModel
from knative.simulator.nodes import Cluster
from knative.simulator.pod import DRAINING, GONE, PENDING, READY, STARTING, Job, Pod
from knative.simulator.policy import Policy, Sample
from knative.simulator.record import Course, Steps
from knative.simulator.result import Latencies, Result
from knative.simulator.rooms import rooms
from knative.simulator.trace import Arrivals, Trace, checked, in_chunks

# A scale-down that is followed by a scale-up within so long was a mistake: whatever it saved, a cold start followed.
FLAP_S = 60.0
PIECE = 4_096  # requests that are unpacked at a time: Python's own numbers take four times the room
PROGRESS_DEADLINE_S = 600.0  # Knative's default: a new revision that is not ready by then has failed

# What happens first of what happens at one time: a place is free before it is looked for, and a sample has what came before it.
ENDS, READIES, SAMPLES, COMES, EXPIRES = (kind << 48 for kind in range(5))


class Finished(NamedTuple):
    """One request, when it is over; what `observe` is called with."""

    function: str
    arrived_s: float
    waited_s: float  # until a pod took it, or until it was over
    latency_s: float  # until it was over
    outcome: str  # answered, timed_out, rejected or failed
    cold: bool  # its pod was not ready yet when it came


Handler = Callable[[float, object], None]


class Clock:
    """The events to come, in order; `when` makes one. Those of one time come in the order of their kind, then as they were made."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Callable[..., None], object]] = []
        self.made = 0
        self.live = 0  # functions with requests to come, or on their way
        self.pods = Steps()  # of all functions

    def when(self, at: float, kind: int, handler: Callable[..., None], about: object = None) -> None:
        """Have `handler(at, about)` called at `at`."""
        self.made = made = self.made + 1
        heappush(self.heap, (at, kind + made, handler, about))


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
        self.model = model
        self.policy = policy
        self._clock = clock
        self._cluster = cluster
        self._observe = observe
        self._chunks: Iterator[Arrivals] = (piece for chunk in checked(trace) for piece in in_chunks(chunk, PIECE))
        self._service_rng = np.random.default_rng(services)
        self._pod_rng = np.random.default_rng(pods)
        self._rooms = rooms(model.concurrency, random.Random(int(chance.generate_state(1)[0])), packed=policy.packs)
        self._slows = model.batch_slowdown > 0 and model.concurrency != 1

        self._times: list[float] = []  # the present chunk
        self._services: list[float] = []
        self._next = 0  # of the chunk
        self._more = True  # whether requests are still to come

        self._waiting: deque[tuple[float, float]] = deque()  # arrived, service
        self._expiry_set = False
        self._deadlines: deque[tuple[float, Pod, Job]] = deque()  # only where requests slow each other down
        self._deadline_set = False

        self._pods: set[Pod] = set()  # all that are not gone
        self._kept = 0  # of the present generation, those that are not to go
        self._asked = 0
        self._generation = 0
        self._target = 0  # new pods that must be ready before the old ones go; 0: no roll-out is on
        self._held: int | None = None  # pods to start when the old ones are gone
        self._wanted_before = 0
        self._fell_s = -math.inf

        # Requests in the system and busy pods, as areas since `_base`: leaving adds what coming has taken.
        self._count = 0
        self._area = 0.0
        self._busy = 0
        self._busy_area = 0.0
        self._base = 0.0
        self._areas_before = 0.0
        self._busy_before = 0.0
        self._arrived = 0
        self._peak = 0
        self._asleep = False
        self._tick_version = 0

        self._queue, self._running, self._ready, self._wanted = Steps(), Steps(), Steps(), Steps()
        self._course = Course()
        self._latencies = Latencies()
        self._requests = self._answered = self._timed_out = self._rejected = self._failed = 0
        self._cold_starts = self._flaps = 0

    # --- requests

    def begin(self) -> None:
        """Put the first events into the clock, with the pods that are there already."""
        self._clock.live += 1
        for at in self.model.rollouts:
            self._clock.when(at, SAMPLES, self._roll_out)
        self._wanted_before = self.policy.initial
        self._wanted.set(0.0, self.policy.initial)
        for _ in range(self.policy.initial):
            self._add_pod(0.0, warm=True)
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
        self._services = self.model.services(chunk, self._service_rng).tolist()
        self._next = 0
        self._clock.when(self._times[0], COMES, self._arrive)

    def _arrive(self, now: float, _: object) -> None:
        index = self._next
        service_s = self._services[index]
        self._requests += 1
        self._arrived += 1
        self._count = count = self._count + 1
        if self._asleep:
            self._wake(now)
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
        if len(self._waiting) >= self.model.queue_limit:
            self._rejected += 1
            self._over(now, now, now, "rejected", cold=False)
            return
        self._waiting.append((now, service_s))
        self._queue.set(now, len(self._waiting))
        if not self._expiry_set:
            self._expiry_set = True
            self._clock.when(now + self.model.timeout_s, EXPIRES, self._expire_waiting)
        self._follow(now, self.policy.poke(now, self._count, self._kept))

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
        if self._slows:
            self._serve_together(now, arrived_s, service_s, pod)
            return
        end, limit = now + service_s, arrived_s + self.model.timeout_s
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
            elif idle and self.policy.hears_idle:
                self._follow(now, self.policy.pod_idle(now, self._busy))
        elif idle:
            self._drained(now, pod)

    def _over(self, now: float, arrived_s: float, taken_s: float, outcome: str, cold: bool) -> None:
        """A request is over, and counted as what it became."""
        self._count -= 1
        self._area += now - self._base
        if self._observe:
            self._observe(Finished(self.name, arrived_s, taken_s - arrived_s, now - arrived_s, outcome, cold))
        if not (self._count or self._more):
            self._clock.live -= 1

    def _expire_waiting(self, now: float, _: object) -> None:
        waiting, timeout_s = self._waiting, self.model.timeout_s
        while waiting and waiting[0][0] + timeout_s <= now:
            arrived_s, _service_s = waiting.popleft()
            self._timed_out += 1
            self._over(now, arrived_s, now, "timed_out", cold=False)
        self._queue.set(now, len(waiting))
        self._expiry_set = bool(waiting)
        if waiting:
            self._clock.when(waiting[0][0] + timeout_s, EXPIRES, self._expire_waiting)

    # --- requests that slow each other down: all in a pod advance alike, slower the more they are

    def _serve_together(self, now: float, arrived_s: float, service_s: float, pod: Pod) -> None:
        job = Job(arrived_s, now)
        pod.in_flight -= 1
        self._advance(now, pod)
        pod.in_flight += 1
        self._clock.made += 1
        heappush(pod.jobs, (pod.work_s + service_s, self._clock.made, job))
        self._expect(now, pod)
        # First come, first served: who comes later has to be done later.
        self._deadlines.append((arrived_s + self.model.timeout_s, pod, job))
        if not self._deadline_set:
            self._deadline_set = True
            self._clock.when(max(now, self._deadlines[0][0]), EXPIRES, self._expire_served)

    def _slowness(self, pod: Pod) -> float:
        return 1.0 + self.model.batch_slowdown * (pod.in_flight - 1)

    def _advance(self, now: float, pod: Pod) -> None:
        if pod.in_flight:
            pod.work_s += (now - pod.at_s) / self._slowness(pod)
        pod.at_s = now

    def _expect(self, now: float, pod: Pod) -> None:
        """Make the event of the request that will be done next, if no other comes in between."""
        jobs = pod.jobs
        while jobs and jobs[0][2].done:
            heappop(jobs)
        pod.version += 1
        if jobs:
            in_s = max(0.0, jobs[0][0] - pod.work_s) * self._slowness(pod)
            self._clock.when(now + in_s, ENDS, self._done, (pod, pod.version))

    def _done(self, now: float, about: tuple[Pod, int]) -> None:
        pod, version = about
        if pod.state == GONE or version != pod.version:
            return
        self._advance(now, pod)
        pod.work_s, _, job = heappop(pod.jobs)
        job.done = True
        self._end_together(now, pod, job, self._answer)

    def _expire_served(self, now: float, _: object) -> None:
        deadlines = self._deadlines
        while deadlines and (deadlines[0][2].done or deadlines[0][0] <= now):
            _, pod, job = deadlines.popleft()
            if not job.done:
                self._advance(now, pod)
                job.done = True
                self._end_together(now, pod, job, self._cut)
        self._deadline_set = bool(deadlines)
        if deadlines:
            self._clock.when(max(now, deadlines[0][0]), EXPIRES, self._expire_served)

    def _end_together(self, now: float, pod: Pod, job: Job, end: Callable[[float, tuple[Pod, float, float]], None]) -> None:
        end(now, (pod, job.arrived_s, job.taken_s))
        if pod.state != GONE:
            self._expect(now, pod)

    # --- pods

    def scale_to(self, now: float, wanted: int) -> None:
        """Have so many pods, as soon as may be."""
        before = self._wanted_before
        if wanted != before:
            if wanted < before:
                self._fell_s = now
            elif now - self._fell_s <= FLAP_S:
                self._flaps += 1
                self._fell_s = -math.inf
            self._wanted_before = wanted
            self._wanted.set(now, wanted)
        if self._held is not None:
            self._held = wanted
            return
        for _ in range(wanted - self._kept):
            self._add_pod(now)
        if wanted < self._kept:
            for pod in self._victims(self._kept - wanted):
                self._let_go(now, pod)

    def _follow(self, now: float, wanted: int | None) -> None:
        if wanted is not None:
            self.scale_to(now, wanted)

    def _victims(self, count: int) -> list[Pod]:
        """Which pods to let go: those not ready first, then the least busy, then the youngest; the busiest stay, as in `relight run`."""
        kept = [pod for pod in self._pods if pod.generation == self._generation and pod.state != DRAINING]
        if self.policy.packs:
            kept.sort(key=lambda pod: (pod.state != READY, pod.in_flight, -pod.number))
        else:
            kept.sort(key=lambda pod: (pod.state, pod.in_flight, -pod.number))
        return kept[:count]

    def _add_pod(self, now: float, *, warm: bool = False) -> None:
        self._asked += 1
        pod = Pod(self._asked, self._generation)
        self._pods.add(pod)
        self._kept += 1
        if warm:
            pod.ready_s = -math.inf
        self._cluster.ask(now, self, pod)

    def start(self, now: float, pod: Pod) -> None:
        """The cluster has a place for it."""
        assert pod.node is not None
        pod.state = STARTING
        self._change_pods(now, 1)
        if pod.ready_s < 0:
            self._pod_ready(now, pod)
            return
        cold_s = self.policy.cold_start_s()
        if cold_s is None:
            cold_s = self._cluster.cold_start_s(now, self.name, pod.node, self.model.cold_start, self._pod_rng)
        self._clock.when(now + cold_s, READIES, self._pod_ready, pod)

    def _change_pods(self, now: float, change: int) -> None:
        self._running.set(now, self._running.value + change)
        self._clock.pods.set(now, self._clock.pods.value + change)

    def _pod_ready(self, now: float, pod: Pod) -> None:
        if pod.state != STARTING:
            return
        pod.state = READY
        if pod.ready_s >= 0:
            pod.ready_s = now
        pod.at_s = now
        self._ready.set(now, self._ready.value + 1)
        self._rooms.add(pod)
        if math.isfinite(self.model.pod_mtbf_s):
            self._clock.when(now + self._pod_rng.exponential(self.model.pod_mtbf_s), ENDS, self._fail, pod)
        if self._target and self._ready_of(self._generation) >= min(self._target, self._kept):
            self._finish_roll_out(now)
        self._follow(now, self.policy.pods_changed(now, self._ready.value))
        self._dispatch(now)

    def _let_go(self, now: float, pod: Pod) -> None:
        """It serves what it has, and goes."""
        if pod.generation == self._generation:
            self._kept -= 1
        if pod.state == PENDING:
            pod.state = GONE
            self._pods.discard(pod)
            self._check_held(now)
        elif pod.state == STARTING:
            self._gone(now, pod)
        else:
            self._rooms.drop(pod)
            self._ready.set(now, self._ready.value - 1)
            pod.state = DRAINING
            pod.told_s = now
            if not pod.in_flight:
                self._drained(now, pod)

    def _drained(self, now: float, pod: Pod) -> None:
        """It has no more requests."""
        at = pod.told_s + self.model.drain_s
        if at > now:
            self._clock.when(at, ENDS, self._end_of_drain, pod)
        else:
            self._gone(now, pod)

    def _end_of_drain(self, now: float, pod: Pod) -> None:
        if pod.state == DRAINING:
            self._gone(now, pod)

    def _gone(self, now: float, pod: Pod) -> None:
        pod.state = GONE
        self._pods.discard(pod)
        self._change_pods(now, -1)
        self._check_held(now)
        self._cluster.release(now, self.model.gpus, pod)

    def _fail(self, now: float, pod: Pod) -> None:
        """It fails with all its requests; another one is started in its place, unless it was to go."""
        if pod.state not in (READY, DRAINING):
            return
        if pod.in_flight:
            self._busy -= 1
            self._busy_area += now - self._base
        lost = self._lost(pod)
        wanted = pod.state == READY
        if wanted:
            self._rooms.drop(pod)
            self._ready.set(now, self._ready.value - 1)
            self._kept -= pod.generation == self._generation
        self._gone(now, pod)
        for arrived_s, taken_s in lost:
            self._failed += 1
            self._over(now, arrived_s, taken_s, "failed", pod.ready_s > arrived_s)
        if wanted and pod.generation == self._generation:
            self._add_pod(now)
            self._follow(now, self.policy.pods_changed(now, self._ready.value))

    def _lost(self, pod: Pod) -> list[tuple[float, float]]:
        """When the requests that a pod has came, and were taken. Looks at all events to come: failures are rare."""
        if self._slows:
            jobs = [job for _, _, job in pod.jobs if not job.done]
            for job in jobs:
                job.done = True
            return [(job.arrived_s, job.taken_s) for job in jobs]
        ends = (self._answer, self._cut)
        found: list[tuple[Pod, float, float]] = [about for _, _, handler, about in self._clock.heap if handler in ends]  # type: ignore[misc]
        return sorted((arrived_s, taken_s) for one, arrived_s, taken_s in found if one is pod)

    # --- roll-outs

    def _ready_of(self, generation: int) -> int:
        return sum(pod.state == READY and pod.generation == generation for pod in self._pods)

    def _roll_out(self, now: float, _: object) -> None:
        """A new revision: at zero that is all; else as many new pods as there are."""
        count = self._kept
        if not count or self._target or self._held is not None:
            return
        if self.model.rollout == "recreate":
            old = [pod for pod in self._pods if pod.state != DRAINING]
            self._held = count
            for pod in old:
                self._let_go(now, pod)
            return
        self._generation += 1
        self._kept = 0
        self._target = count
        for _ in range(count):
            self._add_pod(now)
        self._clock.when(now + PROGRESS_DEADLINE_S, EXPIRES, self._give_up_roll_out, self._generation)

    def _finish_roll_out(self, now: float) -> None:
        self._target = 0
        for pod in [pod for pod in self._pods if pod.generation < self._generation and pod.state != DRAINING]:
            self._let_go(now, pod)

    def _give_up_roll_out(self, now: float, generation: object) -> None:
        """The new pods were not ready in time (no GPU was free for them, say): the old ones stay."""
        if not self._target or generation != self._generation:
            return
        self._target = 0
        for pod in [pod for pod in self._pods if pod.generation == generation]:
            self._let_go(now, pod)
        self._generation -= 1
        self._kept = sum(pod.generation == self._generation and pod.state != DRAINING for pod in self._pods)

    def _check_held(self, now: float) -> None:
        if self._held is not None and not self._pods:
            count, self._held = self._held, None
            self._generation += 1
            self._kept = 0
            for _ in range(count):
                self._add_pod(now)

    # --- the policy

    def _tick(self, now: float, version: object) -> None:
        if version != self._tick_version:
            return
        self._follow(now, self.policy.decide(now, self._sample(now)))
        self._schedule_tick(now)

    def _schedule_tick(self, now: float) -> None:
        self._asleep = not (self._count or self._pods or self._wanted_before)
        at = self.policy.next_s(now, self._asleep)
        self._tick_version += 1
        if at < math.inf:
            self._clock.when(at, SAMPLES, self._tick, self._tick_version)

    def _wake(self, now: float) -> None:
        """The first request after there was nothing: samples are taken again, the first one of the period that it came in."""
        self._asleep = False
        at = self.policy.next_s(now, False)
        self._tick_version += 1
        if at < math.inf:
            self._clock.when(at, SAMPLES, self._tick, self._tick_version)
            self._base = max(self._base, at - self.policy.period_s)

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
            ready=self._ready.value,
            pods=self._kept,
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
        return load, *(steps.integral(now) for steps in (self._queue, self._running, self._ready, self._wanted))

    def look(self, now: float) -> float:
        """Close a step of its course; when to close the next one."""
        return self._course.add(now, self._integrals(now))

    def result(self, now: float) -> Result:
        """What came of it by `now`, the end."""
        self._latencies.settle(1)
        pod_seconds = self._running.integral(now)
        gpu_hours = pod_seconds * self.model.gpus / 3600
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
            cost=gpu_hours * self.model.price_per_gpu_hour,
            peak_pods=self._running.most,
            busy_seconds=self._busy_before + self._busy_area + self._busy * (now - self._base),
            flaps=self._flaps,
            horizon_s=now,
            series=self._course.series(now, self._integrals(now)),
        )
