"""A revision: its pods, the requests that wait for one, and the beat that scales it. Which revision a request is for: see service.py.

A request arrives, is admitted to a pod with room or waits; each second the load is sampled, every two seconds the autoscaler decides,
and a request that finds no pod pokes it at once.
"""

import asyncio
import itertools
import math
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from knative.autoscaler import TICK_S, Activity, Autoscaler, ScaleSpec, Status, reconcile
from knative.local.breaker import TIME_OUTS
from knative.local.errors import Overloaded, RevisionFailed, Stopping
from knative.local.manifest import Service
from knative.local.meter import ConcurrencyMeter
from knative.local.pod import Pod
from knative.local.record import Record

SAMPLE_S = 1.0
QUEUE_LIMIT = 10_000  # requests that may wait for a pod, as in Knative's activator
RETRY_S, RETRY_LIMIT_S = 10.0, 300.0  # after a failed start, until the next is tried


State = Literal["zero", "starting", "ready", "draining", "failed"]


class Watcher(Protocol):
    """Who wants to know what happens to a revision: the terminal."""

    def starting(self, revision: "Revision", pod: Pod, waiting: int) -> None:
        """A pod was asked for."""

    def progress(self, revision: "Revision", pod: Pod) -> None:
        """A pod's phase or its report changed."""

    def ready(self, revision: "Revision", pod: Pod) -> None:
        """A pod takes requests."""

    def crashed(self, revision: "Revision", pod: Pod, ended: str) -> None:
        """One of a pod's processes ended by itself and will be started again."""

    def hung(self, revision: "Revision", pod: Pod, reason: str) -> None:
        """A pod answers nobody and is replaced."""

    def failed(self, revision: "Revision", reason: str) -> None:
        """The revision could not be brought up."""

    def gave_up(self, revision: "Revision", pod: Pod) -> None:
        """A pod that was idle goes, as another function needs its GPU."""

    def at_zero(self, revision: "Revision", idle_s: float) -> None:
        """The last pod is gone, so long after the last request."""

    def about(self, service: str, text: str) -> None:
        """Something about the Service as a whole."""


@dataclass(frozen=True)
class Failure:
    """Why the last start failed, and until when no other is tried."""

    reason: str
    until: float


class Revision:
    """One revision of a Service. Everything here runs in one event loop."""

    def __init__(
        self,
        service: Service,
        make_pod: Callable[["Revision", str], Pod],
        watcher: Watcher,
        *,
        name: str = "",
        record: Record | None = None,
        on_change: Callable[["Revision"], object] = lambda _: None,
    ) -> None:
        """make_pod(revision, name): a pod that has not been started. record: the Service's. on_change: called when it settles or fails."""
        now = time.monotonic()
        self.service = service
        self.name = name or f"{service.name}-00001"
        self.meter = ConcurrencyMeter(now)
        self.record = record or Record()
        self.pods: list[Pod] = []
        self.concurrency = self.rps = 0.0  # of the last second
        self.held = False  # no pods yet, whoever waits
        self.trouble: str | None = None  # how one of its processes ended last, until a pod is ready
        self._ready: set[Pod] = set()
        self._going: set[Pod] = set()  # chosen to go, though the one or other may not know it yet
        self._make_pod = make_pod
        self._watcher = watcher
        self._on_change = on_change
        self._scale = service.scale
        self._autoscaler = Autoscaler(service.scale, ready=0, now=now)
        # On one machine every request has always come through this activator: there is no ingress to be told first.
        self._status = replace(Status.initial(now), proxied_since=-math.inf)
        self._waiting: deque[asyncio.Future[Pod]] = deque()
        self._last_left = now
        self._has_gpus = any(container.resources.gpus for container in service.spec.containers)
        self._poked = 0.0  # concurrency already recorded by a poke in the present second
        self._failure: Failure | None = None
        self._retries = 0
        self._hung = 0  # pods in a row that hung while none had ever answered
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = itertools.count()
        self._beating = False

    def start(self, least: int = 0) -> None:
        """Begin to beat, and bring up the pods that the revision starts with, at least so many; again, if that has failed."""
        if self.settled and self._beating:
            return
        self._rescale(replace(self._scale, initial_scale=max(self._scale.initial_scale, least)))
        self._status = replace(self._status, since=time.monotonic())
        self._failure = None
        self._scale_to(max(self._scale.initial_scale, self._scale.min_scale))
        if not self._beating:
            self._beating = True
            self._spawn(self._beat())

    def configure(self, service: Service) -> None:
        """Take a manifest with the same template; the ConfigMaps and Secrets that came with it are for the pods that start from now on."""
        if service.scale != self.service.scale:
            self._rescale(replace(service.scale, reachable=self.reachable))
        self.service = service

    def set_reachable(self, *, reachable: bool) -> None:
        """Whether any request can come here. If not, those who are here already are served, and then there are no pods."""
        if reachable == self.reachable:
            return
        self._rescale(replace(self._scale, reachable=reachable))
        if not reachable:
            self._retreat()
        elif self._scale.min_scale and self._beating:
            self._scale_to(max(self._scale.min_scale, len(self._kept())))

    def _rescale(self, scale: ScaleSpec) -> None:
        now = time.monotonic()
        windows = scale.stable_window_s, scale.panic_window_s, scale.aggregation
        if windows != (self._scale.stable_window_s, self._scale.panic_window_s, self._scale.aggregation):
            self._autoscaler = Autoscaler(scale, len(self._ready), now)
        self._autoscaler.spec = self._scale = scale

    def close(self) -> None:
        """Take no more requests, and answer those who wait."""
        self._stopping = True
        self._fail_waiting(Stopping("the platform is shutting down"))

    async def stop(self) -> None:
        """Close, and end every pod."""
        self.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(pod.drain(0) for pod in self.pods))
        self.pods.clear()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """For as long as it is entered, the revision has one request more."""
        arrived = time.monotonic()
        self.meter.arrive(arrived)
        try:
            yield
        finally:
            self._last_left = time.monotonic()
            self.meter.leave(self._last_left)
            self.record.latencies.add(self._last_left, self._last_left - arrived)

    @asynccontextmanager
    async def slot(self, held: Callable[[], AbstractAsyncContextManager[object]] = nullcontext) -> AsyncIterator[Pod]:
        """A ready pod with room for one request more, waiting for one if there is none.

        held: entered while it waits. Raises Overloaded, RevisionFailed or Stopping instead.
        """
        pod = self._take()
        try:
            if pod is None:
                async with held():
                    pod = await self._wait()
            yield pod
        finally:
            if pod:
                pod.leave()

    def _take(self) -> Pod | None:
        """A pod with room, if there is one now and nobody waits."""
        pod = None if self._waiting or self._stopping else self._pick()
        if pod:
            pod.in_flight += 1
        return pod

    async def _wait(self) -> Pod:
        if self._stopping:
            raise Stopping("the platform is shutting down")
        if (failure := self._failure) and not self._ready:
            if (left_s := failure.until - time.monotonic()) > 0:
                raise RevisionFailed(failure.reason, retry_after_s=left_s)
            self._failure = None
        if len(self._waiting) >= QUEUE_LIMIT:
            raise Overloaded(f"{QUEUE_LIMIT} requests are waiting for {self.service.name} already", retry_after_s=1)
        turn: asyncio.Future[Pod] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._poke()
        self._ask_for_devices()
        try:
            return await turn
        except asyncio.CancelledError:
            # The caller went away: forget it, or pass on the place that it was just given.
            if turn.done() and not turn.cancelled() and not turn.exception():
                turn.result().leave()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def hand_over(self, choose: Callable[[], "Revision"]) -> None:
        """Have each of those who wait here wait for the revision that is chosen now: nothing of their requests has reached a pod."""
        while self._waiting:
            choose().receive(self._waiting.popleft())

    def receive(self, turn: "asyncio.Future[Pod]") -> None:
        """One more who waits, who has waited for another revision until now."""
        self._waiting.append(turn)
        turn.add_done_callback(self._forget)
        self._dispatch()
        if self._waiting:
            self._poke()
            self._ask_for_devices()

    def _forget(self, turn: "asyncio.Future[Pod]") -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)

    def _dispatch(self) -> None:
        """Give every pod that has room to those who wait, first come first served."""
        while self._waiting and (pod := self._pick()):
            turn = self._waiting.popleft()
            if not turn.done():
                pod.in_flight += 1
                turn.set_result(pod)

    def _pick(self) -> Pod | None:
        ready = [pod for pod in self.pods if pod in self._ready]
        return pick(ready, self.service.spec.container_concurrency, next(self._turn))

    def _fail_waiting(self, error: Exception) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(error)

    async def _beat(self) -> None:
        began = time.monotonic()
        for beat in itertools.count(1):
            await asyncio.sleep(max(0.0, began + beat * SAMPLE_S - time.monotonic()))
            now = time.monotonic()
            self._sample(now)
            self._check_deadline(now)
            self._ask_for_devices()
            self._retreat()
            if beat % round(TICK_S / SAMPLE_S) == 0:
                self._decide(now)

    def _sample(self, now: float) -> None:
        self.concurrency, self.rps = self.meter.report(now)
        # What a poke has recorded is not to be counted twice; with no pods and no requests there is nobody to report a zero.
        if self.pods or self.concurrency:
            concurrency, rps = (max(0.0, value - self._poked) for value in (self.concurrency, self.rps))
            self._autoscaler.record(now, concurrency=concurrency, rps=rps)
        self._poked = 0.0

    def _poke(self) -> None:
        """The first request at zero does not wait for the beat."""
        if self._poked or self._kept():
            return
        now = time.monotonic()
        self._poked = 1.0
        self._autoscaler.record(now, concurrency=1.0, rps=1.0)
        self._decide(now)

    def _decide(self, now: float) -> None:
        self._autoscaler.tick(now, len(self._ready))
        self._reconcile(now)

    def _reconcile(self, now: float) -> None:
        step = reconcile(self._scale, self._autoscaler.last, self._status, len(self._ready), now)
        self._status = step.status
        if step.pods is not None:
            self._scale_to(step.pods)

    def _retreat(self) -> None:
        if not self.reachable and not self._waiting:
            self._scale_to(0)

    def _kept(self) -> list[Pod]:
        return [pod for pod in self.pods if pod not in self._going and pod.phase != "draining"]

    def _scale_to(self, wanted: int) -> None:
        if self._stopping or self.held:
            return
        if self._waiting:
            wanted = max(wanted, 1)  # also for those who came from another revision, whom the autoscaler does not know
        elif not self.reachable:
            wanted = 0
        kept = self._kept()
        if self._has_gpus and self.settled and not self.meter.current and not self._waiting:
            # A pod that has given its GPU up is not wanted back before somebody calls.
            wanted = min(wanted, max(len(kept), self._scale.min_scale))
        if wanted > len(kept) and not (self._failure and self._failure.until > time.monotonic()):
            for _ in range(wanted - len(kept)):
                self._add_pod()
        for pod in victims(kept, len(kept) - wanted):
            self._let_go(pod)

    def _add_pod(self) -> None:
        pod = self._make_pod(self, f"{self.name}-{secrets.token_hex(3)}")
        pod.on_room = self._dispatch
        self.pods.append(pod)
        self.record.starting(pod, len(self._waiting))
        self._watcher.starting(self, pod, len(self._waiting))
        self._spawn(pod.start())

    def _let_go(self, pod: Pod) -> None:
        if pod not in self._going:
            self._going.add(pod)
            self._spawn(self._remove(pod))

    def _ask_for_devices(self) -> None:
        """Of its pods that wait for a GPU, some may need it by now."""
        for pod in self.pods:
            if pod.phase == "pending":
                pod.ask_for_devices()

    def needs(self, pod: Pod) -> bool:
        """Whether a pod that waits for a GPU is worth that another function gives its own up."""
        return bool(self._waiting) or len(self._ready) < max(1, self.service.scale.min_scale)

    def spare_pods(self) -> list[Pod]:
        """Pods with a GPU that have nothing to do, beyond those that min-scale promises and one while there are requests."""
        kept = self._kept()
        idle = [pod for pod in kept if pod in self._ready and not pod.in_flight and pod.plan.gpus]
        beyond = len(kept) - max(self.service.scale.min_scale, 1 if any(pod.in_flight for pod in kept) else 0)
        return [] if self._waiting else idle[: max(0, beyond)]

    def give_up(self, pod: Pod) -> None:
        """Let a pod go whose GPU another function needs."""
        self._watcher.gave_up(self, pod)
        self._let_go(pod)

    @property
    def going(self) -> list[Pod]:
        """Pods that serve what they have, and go."""
        kept = self._kept()
        return [pod for pod in self.pods if pod not in kept]

    @property
    def last_left(self) -> float:
        """When the last request was answered, on time.monotonic's clock."""
        return self._last_left

    @property
    def waits_for(self) -> str | None:
        """What keeps its pods from being started, if anything does."""
        return None if self._ready else next((f"{pod.name} {pod.waits_for}" for pod in self.pods if pod.waits_for), None)

    async def _remove(self, pod: Pod) -> None:
        self.record.ended(pod, "dropped")
        await pod.drain(self.service.spec.timeout_seconds)
        self._going.discard(pod)
        if pod in self.pods:
            self.pods.remove(pod)
        if not self.pods and not self._failure:
            self._watcher.at_zero(self, time.monotonic() - self._last_left)
        self._dispatch()

    def pod_changed(self, pod: Pod) -> None:
        """Called by a pod whose phase or report changed."""
        self._watcher.progress(self, pod)
        if (pod.phase == "ready") == (pod in self._ready):
            return
        if pod.phase == "ready":
            pod.breaker.reset()
            self._ready.add(pod)
            self._failure, self._retries, self.trouble = None, 0, None
            self.record.ended(pod, "ready")
            self._watcher.ready(self, pod)
        else:
            self._ready.remove(pod)
        if not self._stopping:
            was_settled = self.settled
            self._reconcile(time.monotonic())
            self._dispatch()
            if self.settled and not was_settled:
                self._on_change(self)

    def process_ended(self, pod: Pod, ended: str) -> None:
        """Called by a pod one of whose processes ended by itself."""
        self.trouble = f"{pod.name}: {ended}"
        self._watcher.crashed(self, pod, ended)

    def timed_out(self, pod: Pod, had_s: float, limit_s: float) -> None:
        """A request that the pod had for `had_s` seconds got no byte of an answer within its `limit_s`; a pod that hangs is replaced.

        It takes no more requests, and those that it has may end (see Pod.drain). Another one is started at once, unless the one before
        hung too and none has answered anybody: then after the pause that also follows a failed start.
        """
        if not pod.breaker.timed_out(had_s, limit_s) or pod not in self._kept() or self._stopping:
            return
        answered = any(other.breaker.has_answered for other in self.pods)
        self._hung = 0 if answered else self._hung + 1
        reason = f"{pod.name} answers nobody: {TIME_OUTS} requests in a row timed out ({limit_s:g} s); it is replaced"
        self.record.hung(pod, reason)
        self._watcher.hung(self, pod, reason)
        self._ready.discard(pod)
        self._let_go(pod)
        if self._hung > 1:
            self._fail(reason, self._hung - 2)
        elif self.reachable and not self.held:
            self._add_pod()

    def _fail(self, reason: str, earlier: int) -> None:
        """No start for a while, the longer the more have failed before; who waits is told, unless there is a pod to wait for."""
        pause_s = min(RETRY_LIMIT_S, RETRY_S * 2**earlier)
        self._failure = Failure(reason, time.monotonic() + pause_s)
        if not self._ready:
            self._fail_waiting(RevisionFailed(reason, retry_after_s=pause_s))

    def _check_deadline(self, now: float) -> None:
        """A pod that is not ready by its progress deadline has failed, and with it the start of the revision."""
        limit_s = self.service.scale.progress_deadline_s
        late = [
            pod for pod in self.pods if pod.phase in ("pending", "starting") and pod.unready_since and now - pod.unready_since > limit_s
        ]
        for pod in late:
            reason = f"{pod.name} was not ready within {limit_s:g} s (progress-deadline). The last it said:\n{pod.last_words()}"
            self.record.ended(pod, "failed")
            self._watcher.failed(self, reason)
            self._let_go(pod)
            self._fail(reason, self._retries)
            self._retries += 1
        if late:
            self._on_change(self)

    @property
    def state(self) -> State:
        """How it stands, in one word."""
        if self._ready:
            return "ready"
        if self._failure:
            return "failed"
        if self._kept():
            return "starting"
        return "draining" if self.pods else "zero"

    @property
    def reachable(self) -> bool:
        """Whether any request can come here."""
        return self._scale.reachable

    @property
    def settled(self) -> bool:
        """Whether it once had as many pods ready as it starts with."""
        return self._status.initialized or not max(self._scale.initial_scale, self._scale.min_scale)

    @property
    def failure(self) -> str | None:
        """Why its last start failed, if it did."""
        return self._failure.reason if self._failure else None

    @property
    def ready(self) -> int:
        """How many pods are ready."""
        return len(self._ready)

    @property
    def queued(self) -> int:
        """How many requests wait for a pod."""
        return len(self._waiting)

    @property
    def desired(self) -> int:
        """How many pods the autoscaler last wanted."""
        if not self.reachable and not self._waiting:
            return 0
        last = self._autoscaler.last
        return last.bounded if last else len(self.pods)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def status(self) -> dict[str, Any]:
        """Its entry among its Service's revisions in `/api/status`."""
        last = self._autoscaler.last
        return {
            "name": self.name,
            "state": self.state,
            "mode": "panic" if last and last.panic else "stable",
            "active": self._status.activity is not Activity.INACTIVE,
            "desired": self.desired,
            "ready": self.ready,
            "stable_concurrency": abs(round(last.stable, 6)) if last else 0.0,
            "panic_concurrency": abs(round(last.panic_value, 6)) if last else 0.0,
            "requests_total": self.meter.total,
            "concurrency": self.meter.current,
            "queued": self.queued,
            "failure": self.failure,
            "trouble": self.trouble,
        }


def pick(ready: Sequence[Pod], container_concurrency: int, turn: int) -> Pod | None:
    """The pod that the next request goes to, or None if none has room; the choice is Knative's activator's.

    containerConcurrency 0: the less busy of two at random; up to 3: the first with room; above: each in its turn.
    """
    if not ready:
        return None
    if container_concurrency == 0:
        return min(random.sample(ready, min(2, len(ready))), key=lambda pod: pod.in_flight)
    start = 0 if container_concurrency <= 3 else turn % len(ready)
    for offset in range(len(ready)):
        pod = ready[(start + offset) % len(ready)]
        if pod.in_flight < container_concurrency:
            return pod
    return None


def victims(pods: Sequence[Pod], count: int) -> list[Pod]:
    """Which pods to let go: those not ready first, then the least busy, then the youngest."""
    ordered = sorted(pods, key=lambda pod: (pod.phase == "ready", pod.in_flight, -pod.asked_at))
    return list(ordered[: max(0, count)])
