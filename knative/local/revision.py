"""A revision: its pods, the requests that wait for one, and the beat that scales it. Which revision a request is for: see rollout.py.

A request arrives, is admitted to a pod with room or waits; each second the load is sampled, every two seconds the autoscaler decides,
and a request that finds no pod pokes it at once.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

from knative.local.errors import RevisionFailed, Stopping
from knative.local.manifest import Service
from knative.local.meter import ConcurrencyMeter, Load
from knative.local.pod import Pod
from knative.local.record import Record
from knative.local.supervisor import Supervisor, Watcher
from knative.local.tasks import Tasks
from knative.local.trouble import Trouble
from knative.local.waiting import Turn, Waiting

BEAT = "the autoscaler's beat"

State = Literal["zero", "starting", "ready", "draining", "failed"]


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
        is_outdated: Callable[["Revision"], bool] = lambda _: False,
    ) -> None:
        """make_pod(revision, name): a pod that has not been started. record: the Service's. on_change: called when it settles or fails.

        is_outdated: see Rollout; asked before a pod starts, and when it is ready.
        """
        self.service = service
        self.name = name or f"{service.name}-00001"
        self.record = record or Record()
        self.last_left = time.monotonic()  # when the last request was answered
        self._tasks = Tasks(self._task_failed)
        self._beating: asyncio.Task[None] | None = None
        self.meter = ConcurrencyMeter(self.last_left)
        self.waiting = Waiting(service.name)
        self.supervisor = Supervisor(self, self._tasks, make_pod, watcher, on_change, is_outdated)
        self.pods = self.supervisor.pods
        self.failures = self.supervisor.failures
        self.scaling = self.supervisor.scaling

    def start(self, least: int = 0) -> None:
        """Begin to beat, and bring up the pods that the revision starts with, at least so many; again, if that has failed."""
        scaler = self.scaling.scaler
        if scaler.settled and self._beating:
            return
        scaler.start(least)
        self.failures.forget()
        self.scaling.scale_to(scaler.first)
        if not self._beating:
            self._beat()

    def _beat(self) -> None:
        self._beating = self._tasks.start(self.scaling.run(), BEAT)

    def configure(self, service: Service) -> None:
        """Take a manifest with the same template; the ConfigMaps and Secrets that came with it are for the pods that start from now on."""
        scaler = self.scaling.scaler
        if service.scale != self.service.scale:
            scaler.change(replace(service.scale, reachable=self.reachable), self.pods.ready)
        self.service = service
        self.failures.forget()  # what a start failed for may be mended

    def set_reachable(self, *, reachable: bool) -> None:
        """Whether any request can come here. If not, those who are here already are served, and then there are no pods."""
        scaler = self.scaling.scaler
        if reachable == self.reachable:
            return
        scaler.change(replace(scaler.spec, reachable=reachable), self.pods.ready)
        if not reachable:
            self.scaling.retreat()
        elif scaler.spec.min_scale and self._beating:
            self.scaling.scale_to(max(scaler.spec.min_scale, len(self.pods.kept)))

    def close(self) -> None:
        """Take no more requests, and answer those who wait."""
        self.scaling.is_closed = True
        self.waiting.fail(Stopping("the platform is shutting down"))

    async def stop(self) -> None:
        """Close, and end every pod."""
        self.close()
        await self._tasks.stop()
        await self.pods.stop()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[Load]:
        """For as long as it is entered, the revision has one request more; it is load once that is counted."""
        arrived = time.monotonic()
        load = Load(self.meter, time.monotonic)
        try:
            yield load
        finally:
            self.last_left = load.end()
            self.record.latencies.add(self.last_left, self.last_left - arrived)

    @asynccontextmanager
    async def slot(self, held: Callable[[], AbstractAsyncContextManager[object]] = nullcontext) -> AsyncIterator[Pod]:
        """A ready pod with room for one request more, waiting for one if there is none.

        held: entered while it waits. Raises Overloaded, RevisionFailed or Stopping instead.
        """
        if self.scaling.is_closed:
            raise Stopping("the platform is shutting down")
        pod = None if self.waiting else self.pods.take()
        if pod:
            pod.enter()
        try:
            if pod is None:
                self._check()
                async with held():
                    pod = await self.waiting.wait(self.scaling.asked)
            yield pod
        finally:
            if pod:
                pod.leave()

    def _check(self) -> None:
        """Whether there is any use in waiting for a pod. Raises RevisionFailed if not."""
        try:
            self.failures.check()
        except RevisionFailed:
            code = self.service.code
            if self.pods.kept or code is None or not code.is_gone():
                raise
            self.failures.forget()  # perhaps that is mended: with the code that there is now another revision takes over

    def hand_over(self, choose: Callable[[], "Revision"]) -> None:
        """Have each of those who wait here wait for the revision that is chosen now: nothing of their requests has reached a pod."""
        for turn in self.waiting.leave():
            choose().receive(turn)

    def receive(self, turn: Turn) -> None:
        """One more who waits, who has waited for another revision until now."""
        try:
            self._check()
        except RevisionFailed as error:
            if not turn.done():
                turn.set_exception(error)
            return
        self.waiting.join(turn)
        self.waiting.serve(self.pods.take)
        if self.waiting:
            self.scaling.asked()

    def timed_out(self, pod: Pod, had_s: float, limit_s: float) -> None:
        """See Supervisor."""
        self.supervisor.timed_out(pod, had_s, limit_s)

    def _task_failed(self, what: str, error: Exception) -> None:
        self.failures.task_failed(what, error)
        if what == BEAT:
            self._beat()

    @property
    def state(self) -> State:
        """How it stands, in one word."""
        if self.pods.ready:
            return "ready"
        if self.failures.present:
            return "failed"
        if self.pods.kept:
            return "starting"
        return "draining" if self.pods else "zero"

    @property
    def reachable(self) -> bool:
        """Whether any request can come here."""
        return self.scaling.scaler.spec.reachable

    @property
    def trouble(self) -> Trouble | None:
        """Why it has failed, or what keeps its pods from being ready until now."""
        return self.failures.present or self.pods.trouble()

    @property
    def waits_for(self) -> str | None:
        """What whoever waits waits for, as far as that is known."""
        if self.pods.ready:
            return None
        kept = self.pods.kept
        trouble = self.trouble or (kept[0].why_not_ready() if kept else None)
        return trouble.reason if trouble else None

    def status(self) -> dict[str, Any]:
        """Its entry among its Service's revisions in `/api/status`."""
        failure, trouble = self.failures.present, self.trouble
        return {
            "name": self.name,
            "state": self.state,
            **self.scaling.scaler.status(),
            "desired": self.scaling.desired,
            "ready": self.pods.ready,
            "requests_total": self.meter.total,
            "concurrency": self.meter.current,
            "queued": len(self.waiting),
            "failure": failure and failure.reason,
            "failure_log": failure and failure.log(),
            "trouble": trouble and trouble.reason,
        }
