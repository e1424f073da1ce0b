"""A Service that runs: its revisions, which of them gets a request, and how a changed template becomes a new one.

changed template → a new revision starts → it is ready → the traffic moves → the old one finishes what its pods have, and goes to zero
"""

import asyncio
import time
from collections.abc import Callable
from itertools import chain, count
from typing import Any

from knative.local.errors import ManifestError
from knative.local.manifest import RECREATE, ROLLOUT, Service, tag_label
from knative.local.pod import Pod
from knative.local.record import Record, Sample
from knative.local.revision import SAMPLE_S, Revision, State, Watcher
from knative.local.route import resolve

KEPT = 10  # revisions without traffic, so that it can go back to them by name
LOOK_S = 0.05  # between two looks whether pods are gone


class LiveService:
    """One Service. Everything here runs in one event loop."""

    def __init__(self, service: Service, make_pod: Callable[[Revision, str], Pod], watcher: Watcher) -> None:
        """make_pod: see Revision. Raises ManifestError if `spec.traffic` names another revision than the first."""
        self.service = service
        self.record = Record()
        self.revisions: dict[str, Revision] = {}  # by name, the oldest first
        self._make_pod = make_pod
        self._watcher = watcher
        self._created = 0
        self._forgotten_requests = 0  # of revisions that are forgotten
        self._tasks: set[asyncio.Task[None]] = set()
        self._check_names(service)
        self._latest = self._create(service)  # the latest that was ready, or the first
        self._next: Revision | None = None  # what is to become the latest
        self._next_failed = False
        self._route = resolve(service.traffic, self._latest.name)

    def start(self) -> None:
        """Begin with the first revision. What was before it is the first sample: a pod that starts quickly is seen to have come."""
        self._sample(time.monotonic())
        self._latest.start()
        self._spawn(self._beat())

    def choose(self, tag: str | None = None) -> Revision:
        """The revision for one request. tag: of the Host or the header that it came with."""
        return self.revisions[self._route.choose(tag)]

    def check(self, service: Service) -> None:
        """Whether `apply` can take this manifest. Raises ManifestError."""
        name = service.template.metadata.name
        if name and (known := self.revisions.get(name)) and known.service.template != service.template:
            raise ManifestError(
                service.file,
                f"{service.where}: spec.template.metadata.name",
                f"found {name!r}, the name of a revision with another template; a changed template needs another name, or none",
            )
        self._check_names(service)

    def apply(self, service: Service) -> None:
        """Take a manifest that `check` has found to be right: traffic at once, a changed template as soon as its revision is ready."""
        self.service = service
        same = self._same(service)
        if same:
            same.configure(service)
        if (
            same is None or same is not self._newest or self._next_failed
        ):  # one that failed is tried again: what it refers to may have changed
            self._roll_out(same or self._create(service))
        self._reroute()

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
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(revision.stop() for revision in self.revisions.values()))

    @property
    def pods(self) -> chain[Pod]:
        """Those of all its revisions."""
        return chain.from_iterable(revision.pods for revision in self.revisions.values())

    @property
    def requests_total(self) -> int:
        """Requests that came since the start."""
        return self._forgotten_requests + sum(revision.meter.total for revision in self.revisions.values())

    @property
    def concurrency(self) -> int:
        """Requests that wait or are with a pod."""
        return sum(revision.meter.current for revision in self.revisions.values())

    @property
    def queued(self) -> int:
        """Requests that wait for a pod."""
        return sum(revision.queued for revision in self.revisions.values())

    @property
    def desired(self) -> int:
        """Pods that are wanted."""
        return sum(revision.desired for revision in self.revisions.values())

    @property
    def shares(self) -> dict[str, int]:
        """Percent of the requests, by revision; 0 for those that are kept, or start."""
        return {name: self._route.shares.get(name, 0) for name in self.revisions}

    @property
    def _newest(self) -> Revision:
        return self._next or self._latest

    def _create(self, service: Service) -> Revision:
        name = self._name(service)
        self._created += 1
        revision = Revision(service, self._make_pod, self._watcher, name=name, record=self.record, on_change=self._changed)
        self.revisions[name] = revision
        return revision

    def _name(self, service: Service) -> str:
        """What the next revision would be called."""
        numbered = (f"{service.name}-{number:05d}" for number in count(self._created + 1))
        return service.template.metadata.name or next(name for name in numbered if name not in self.revisions)

    def _same(self, service: Service) -> Revision | None:
        """The revision that has this template already: one by its name, the newest, or the one that a roll-out has not yet replaced."""
        if not self.revisions:
            return None
        if named := self.revisions.get(service.template.metadata.name):
            return named
        return next((revision for revision in (self._newest, self._latest) if revision.service.template == service.template), None)

    def _check_names(self, service: Service) -> None:
        """Whether each revision that the traffic names is there, or comes with this very manifest."""
        known = [*self.revisions, *([] if self._same(service) else [self._name(service)])]
        for number, target in enumerate(service.traffic):
            if target.revision_name and target.revision_name not in known:
                raise ManifestError(
                    service.file,
                    f"{service.where}: spec.traffic[{number}].revisionName",
                    f"found {target.revision_name!r}; the revisions of this run are {', '.join(known)}",
                )

    def _roll_out(self, revision: Revision) -> None:
        """Bring up a revision that is to become the latest."""
        if self._next and self._next is not revision:
            self._next.set_reachable(reachable=False)
        if revision is self._latest:  # back to what it was, before anything else was ready
            self._next = None
            return
        self._next, self._next_failed = revision, False
        revision.set_reachable(reachable=True)
        if self.service.recreate:
            self._tell(f"{revision.name} starts when {self._latest.name} is gone ({ROLLOUT}: {RECREATE})")
            revision.held = True
            self._spawn(self._start_after(revision))
        else:
            # Knative has a revision with initial-scale 0 be ready without a pod. Where somebody is served, one has to show that it can.
            self._begin(revision, least=1 if any(pod.phase == "ready" for pod in self._latest.pods) else 0)

    async def _start_after(self, revision: Revision) -> None:
        old = [other for other in self.revisions.values() if other is not revision and other.name not in self._route.names]
        while any(other.pods for other in old):
            await asyncio.sleep(LOOK_S)
        if revision is self._next:
            revision.held = False
            self._begin(revision, least=1 if revision.queued else 0)

    def _begin(self, revision: Revision, least: int) -> None:
        revision.start(least)
        if revision.settled:
            self._changed(revision)

    def _changed(self, revision: Revision) -> None:
        """Called when a revision has become what it was started to be, or has failed."""
        if revision is not self._next or self._next_failed:
            return
        if revision.settled:
            self._latest, self._next = revision, None
            self._reroute()
        elif revision.failure:
            self._next_failed = True
            self._tell(f"{revision.name} failed; traffic stays on {self._latest.name}")
            self._reroute()

    def _reroute(self) -> None:
        """Send requests where the manifest says, as far as that is ready; who gets none any more goes to zero."""
        going = self._next if self._next and not self._next_failed else None
        follows = going if going and self.service.recreate else self._latest
        route = resolve(self.service.traffic, follows.name)
        for name in route.names - self._route.names - {follows.name}:
            if not self.revisions[name].settled:
                self._tell(f"traffic stays as it is: {name} is not ready")
                route = self._route
        if route != self._route:
            self._route = route
            tags = [f"{tag} is {name}" for tag, name in route.tags.items()]
            self._tell("traffic: " + ", ".join([*(f"{percent} % {name}" for name, percent in route.shares.items()), *tags]))
        for revision in self.revisions.values():
            reachable = revision is going or revision.name in route.names
            if not reachable:
                revision.hand_over(self.choose)
            revision.set_reachable(reachable=reachable)
        self._forget()

    def _forget(self) -> None:
        idle = [
            revision
            for revision in self.revisions.values()
            if not revision.reachable and revision not in (self._latest, self._next) and not revision.pods and not revision.meter.current
        ]
        for revision in idle[: max(0, len(idle) - KEPT)]:
            del self.revisions[revision.name]
            self._forgotten_requests += revision.meter.total
            self._spawn(revision.stop())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self._sample(time.monotonic())

    def _sample(self, now: float) -> None:
        revisions = self.revisions.values()
        self.record.samples.append(
            Sample(
                time=round(time.time(), 3),
                concurrency=round(sum(revision.concurrency for revision in revisions), 3),
                rps=round(sum(revision.rps for revision in revisions), 3),
                ready=sum(revision.ready for revision in revisions),
                desired=self.desired,
                queued=self.queued,
                **self.record.latencies.percentiles(now),
            )
        )

    def _tell(self, text: str) -> None:
        self._watcher.about(self.service.name, text)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def state(self) -> State:
        """How it stands, in one word: the best of the revisions that get requests, but starting before zero."""
        states = {self.revisions[name].state for name in self._route.names}
        order: tuple[State, ...] = ("ready", "starting", "failed", "draining", "zero")
        return next(state for state in order if state in states)

    @property
    def failure(self) -> str | None:
        """What is wrong with those who get requests, or with the one that was to get them."""
        if self._next and self._next_failed:
            return f"{self._next.name} failed; traffic stays on {self._latest.name}. {self._next.failure or self._next.trouble}"
        return next((found for name in self._route.names if (found := self.revisions[name].failure)), None)

    def status(self, domain: str, address: str) -> dict[str, Any]:
        """Its entry in `/api/status`. domain: what follows a Service's own label in its URL."""
        revisions = [revision.status() for revision in self.revisions.values()]
        tags = {name: [tag for tag, tagged in self._route.tags.items() if tagged == name] for name in self.revisions}
        for revision in revisions:
            revision["percent"] = self.shares[revision["name"]]
            revision["tags"] = {tag: f"http://{tag_label(tag, self.service.name)}.{domain}" for tag in tags[revision["name"]]}
        return {
            "name": self.service.name,
            "namespace": self.service.namespace,
            "revision": self._latest.name,
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
            "failure": self.failure,
            "example": self.service.example,
            "rollout": self._rollout(),
            "revisions": revisions,
            "pods": [pod.status() | {"revision": revision.name} for revision in self.revisions.values() for pod in revision.pods],
            **self.record.status(time.monotonic()),
        }

    def _rollout(self) -> dict[str, Any] | None:
        if not self._next:
            return None
        return {
            "revision": self._next.name,
            "state": "failed" if self._next_failed else "waiting" if self._next.held else "starting",
            "trouble": self._next.failure or self._next.trouble,
        }
