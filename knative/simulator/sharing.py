"""Pods whose requests slow each other down: all in a pod advance alike, the slower the more they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

from knative.autoscaler.choice import GONE
from knative.simulator.clock import ENDS, EXPIRES, Clock
from knative.simulator.pod import Job, Pod

End = Callable[[float, tuple[Pod, float, float]], None]


class Sharing:
    """The requests of one function's pods. `answer` and `cut` are told (now, (pod, arrived, taken)) when one is done, or out of time."""

    def __init__(self, clock: Clock, slowdown: float, timeout_s: float, answer: End, cut: End) -> None:
        self._clock = clock
        self._slowdown = slowdown
        self._timeout_s = timeout_s
        self._answer = answer
        self._cut = cut
        self._deadlines: deque[tuple[float, Pod, Job]] = deque()  # first come, first served: who comes later may take longer
        self._deadline_set = False

    def serve(self, now: float, arrived_s: float, service_s: float, pod: Pod) -> None:
        """One request more in `pod`, which has counted it already."""
        pod.in_flight -= 1
        self._advance(now, pod)
        pod.in_flight += 1
        job = Job(arrived_s, now)
        self._clock.made += 1
        heappush(pod.jobs, (pod.work_s + service_s, self._clock.made, job))
        self._expect(now, pod)
        self._deadlines.append((arrived_s + self._timeout_s, pod, job))
        if not self._deadline_set:
            self._set_deadline(now)

    def lose(self, pod: Pod) -> list[tuple[float, float]]:
        """When the requests in a pod that has failed came, and were taken."""
        jobs = [job for _, _, job in pod.jobs if not job.done]
        for job in jobs:
            job.done = True
        return [(job.arrived_s, job.taken_s) for job in jobs]

    def _slowness(self, pod: Pod) -> float:
        return 1.0 + self._slowdown * (pod.in_flight - 1)

    def _advance(self, now: float, pod: Pod) -> None:
        if pod.in_flight:
            pod.work_s += (now - pod.at_s) / self._slowness(pod)
        else:
            pod.work_s = 0.0  # what was before is over, and would only be rounded into what comes
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
        self._end(now, pod, job, self._answer)

    def _expire(self, now: float, _: object) -> None:
        deadlines = self._deadlines
        while deadlines and (deadlines[0][2].done or deadlines[0][0] <= now):
            _, pod, job = deadlines.popleft()
            if not job.done:
                self._advance(now, pod)
                self._end(now, pod, job, self._cut)
        self._deadline_set = False
        if deadlines:
            self._set_deadline(now)

    def _set_deadline(self, now: float) -> None:
        self._deadline_set = True
        self._clock.when(max(now, self._deadlines[0][0]), EXPIRES, self._expire)

    def _end(self, now: float, pod: Pod, job: Job, end: End) -> None:
        job.done = True
        end(now, (pod, job.arrived_s, job.taken_s))
        if pod.state != GONE:
            self._expect(now, pod)
