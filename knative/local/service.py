"""A Service that runs: its revisions, and what is counted over all of them. How it changes: see rollout.py."""

import asyncio
import time
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from knative.local.manifest import Service, tag_label
from knative.local.pod import Pod
from knative.local.record import Record
from knative.local.revision import Revision, State
from knative.local.rollout import LOOK_S, Rollout
from knative.local.scale_loop import SAMPLE_S
from knative.local.supervisor import Watcher
from knative.local.tasks import Tasks, describe

BEAT = "the samples of its history"


class LiveService:
    """One Service. Everything here runs in one event loop."""

    def __init__(self, service: Service, make_pod: Callable[[Revision, str], Pod], watcher: Watcher) -> None:
        """make_pod: see Revision. Raises ManifestError if `spec.traffic` names another revision than the first."""
        self.record = Record()
        self._watcher = watcher
        self._tasks = Tasks(self._task_failed)
        self.rollout = Rollout(service, make_pod, watcher, self.record, self._tasks)

    @property
    def service(self) -> Service:
        """Its manifest, as it was read last."""
        return self.rollout.service

    @property
    def revisions(self) -> Mapping[str, Revision]:
        """By name, the oldest first."""
        return self.rollout.revisions

    def start(self) -> None:
        """Begin with the first revision. What was before it is the first sample: a pod that starts quickly is seen to have come."""
        self._sample(time.monotonic())
        self.rollout.latest.start()
        self._tasks.start(self._beat(), BEAT)

    def choose(self, tag: str | None = None) -> Revision:
        """The revision for one request. tag: of the Host or the header that it came with."""
        return self.rollout.choose(tag)

    def leave(self) -> None:
        """It stands in no manifest any more: serve those who are here already, and have no pods after that."""
        for revision in self.revisions.values():
            revision.set_reachable(reachable=False)

    async def gone(self) -> None:
        """Returns once nobody is served and no pod is left."""
        while self.concurrency or any(True for _ in self.pods):
            await asyncio.sleep(LOOK_S)

    def close(self) -> None:
        """Take no more requests, and answer those who wait."""
        for revision in self.revisions.values():
            revision.close()

    async def stop(self) -> None:
        """Close, and end every pod."""
        await self._tasks.stop()
        await asyncio.gather(*(revision.stop() for revision in self.revisions.values()))

    @property
    def pods(self) -> chain[Pod]:
        """Those of all its revisions."""
        return chain.from_iterable(revision.pods for revision in self.revisions.values())

    @property
    def requests_total(self) -> int:
        """Requests that came since the start."""
        return self.rollout.forgotten_requests + sum(revision.meter.total for revision in self.revisions.values())

    @property
    def concurrency(self) -> int:
        """Requests that wait or are with a pod."""
        return sum(revision.meter.current for revision in self.revisions.values())

    @property
    def queued(self) -> int:
        """Requests that wait for a pod."""
        return sum(len(revision.waiting) for revision in self.revisions.values())

    @property
    def desired(self) -> int:
        """Pods that are wanted."""
        return sum(revision.scaling.desired for revision in self.revisions.values())

    @property
    def shares(self) -> dict[str, int]:
        """Percent of the requests, by revision; 0 for those that are kept, or start."""
        return {name: self.rollout.route.shares.get(name, 0) for name in self.revisions}

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self._sample(time.monotonic())

    def _sample(self, now: float) -> None:
        revisions = self.revisions.values()
        self.record.sample(
            now,
            concurrency=sum(revision.scaling.scaler.concurrency for revision in revisions),
            rps=sum(revision.scaling.scaler.rps for revision in revisions),
            ready=sum(revision.pods.ready for revision in revisions),
            desired=self.desired,
            queued=self.queued,
        )
        if news := self.record.errors.look(now):
            self._watcher.about(self.service.name, news)

    def _task_failed(self, what: str, error: Exception) -> None:
        self._watcher.about(self.service.name, describe(what, error))
        if what == BEAT:
            self._tasks.start(self._beat(), BEAT)

    @property
    def state(self) -> State:
        """How it stands, in one word: the best of the revisions that get requests, but starting before zero."""
        states = {self.revisions[name].state for name in self.rollout.route.names}
        order: tuple[State, ...] = ("ready", "starting", "failed", "draining", "zero")
        return next(state for state in order if state in states)

    def status(self, domain: str, address: str) -> dict[str, Any]:
        """Its entry in `/api/status`. domain: what follows a Service's own label in its URL."""
        revisions = [revision.status() for revision in self.revisions.values()]
        failure = self.rollout.failure
        tags = {name: [tag for tag, tagged in self.rollout.route.tags.items() if tagged == name] for name in self.revisions}
        for revision in revisions:
            revision["percent"] = self.shares[revision["name"]]
            revision["tags"] = {tag: f"http://{tag_label(tag, self.service.name)}.{domain}" for tag in tags[revision["name"]]}
        return {
            "name": self.service.name,
            "namespace": self.service.namespace,
            "revision": self.rollout.latest.name,
            "url": f"http://{self.service.name}.{domain}",
            "address": address,
            "state": self.state,
            "mode": "panic" if any(revision["mode"] == "panic" for revision in revisions) else "stable",
            "active": any(revision["active"] for revision in revisions),
            "desired": self.desired,
            "stable_concurrency": sum(revision["stable_concurrency"] for revision in revisions),
            "panic_concurrency": sum(revision["panic_concurrency"] for revision in revisions),
            "requests_total": self.requests_total,
            "concurrency": self.concurrency,
            "queued": self.queued,
            "failure": failure and failure.reason,
            "failure_log": failure and failure.log(),
            "example": self.service.example,
            "rollout": self.rollout.status(),
            "changed": self.rollout.stale.files,
            "revisions": revisions,
            "pods": [pod.status() | {"revision": revision.name} for revision in self.revisions.values() for pod in revision.pods],
            **self.record.status(time.monotonic()),
        }
