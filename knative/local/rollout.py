"""Which revisions of a Service there are, which of them gets a request, and how a changed template becomes a new one.

changed template → a new revision starts → it is ready → the traffic moves → the old one finishes what its pods have, and goes to zero

The agent's code and its weights are a part of the template: no two pods of a revision run different ones. There is one version of the
files on this machine, so a revision whose code has changed cannot have another pod; where it would need one, a new revision takes over.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

from knative.local.errors import ManifestError
from knative.local.manifest import RECREATE, ROLLOUT, Service
from knative.local.pod import Pod
from knative.local.record import Record
from knative.local.revision import Revision
from knative.local.route import resolve
from knative.local.stale import Stale
from knative.local.supervisor import Watcher
from knative.local.tasks import Tasks
from knative.local.trouble import Trouble

KEPT = 10  # revisions without traffic, so that it can go back to them by name
LOOK_S = 0.05  # between two looks whether pods are gone


class Rollout:
    """The revisions of one Service, and the way of its requests to them."""

    def __init__(self, service: Service, make_pod: Callable[[Revision, str], Pod], watcher: Watcher, record: Record, tasks: Tasks) -> None:
        """make_pod: see Revision. tasks: the Service's. Raises ManifestError if `spec.traffic` names another revision than the first."""
        self.service = service
        self.revisions: dict[str, Revision] = {}  # by name, the oldest first
        self.forgotten_requests = 0  # of revisions that are forgotten
        self._make_pod = make_pod
        self._watcher = watcher
        self._record = record
        self._tasks = tasks
        self._created = 0
        self.stale = Stale(self, self._tell)
        self._check_names(service)
        self.latest = self._create(service)  # the latest that was ready, or the first
        self.next: Revision | None = None  # what is to become the latest
        self.next_failure: Trouble | None = None  # why it will not
        self.route = resolve(service.traffic, self.latest.name)

    @property
    def newest(self) -> Revision:
        """What is to become the latest, or the latest."""
        return self.next or self.latest

    def choose(self, tag: str | None = None) -> Revision:
        """The revision for one request. tag: of the Host or the header that it came with."""
        return self.revisions[self.route.choose(tag)]

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
            same is None or same is not self.newest or self.next_failure
        ):  # one that failed is tried again: what it refers to may have changed
            self._roll_out(same or self._create(service))
        if self.latest.failures.present and not self.latest.pods.ready:
            self._pass_over_latest()  # whoever calls waits for what may mend it
        self._reroute()

    def renew(self, service: Service, why: str) -> None:
        """Take a manifest that differs in its code alone from the one before, whose revision cannot have another pod."""
        same = self._same(service)
        if same is None or same is not self.newest:
            self.service = service
            same = same or self._create(service)
            self._tell(f"{why}: {same.name} takes over")
            self._roll_out(same)
        if not self.latest.pods.kept:  # nobody is served by the old one, nor will be
            self._pass_over_latest()
        self._reroute()
        if self.latest.waiting:
            self.latest.scaling.asked()

    def _pass_over_latest(self) -> None:
        """Have the next revision get the traffic though it is not ready, or will not be."""
        if self.next and (self.next_failure or not self.service.recreate):
            self.latest, self.next, self.next_failure = self.next, None, None

    def _create(self, service: Service) -> Revision:
        name = self._name(service)
        self._created += 1
        self.stale.files = []
        revision = Revision(
            service,
            self._make_pod,
            self._watcher,
            name=name,
            record=self._record,
            on_change=self._changed,
            is_outdated=self.stale.is_outdated,
        )
        self.revisions[name] = revision
        return revision

    def _name(self, service: Service) -> str:
        """What the next revision would be called. Where only code or weights have changed, the name of the template is taken."""
        numbered = (f"{service.name}-{number:05d}" for number in count(self._created + 1))
        wanted = service.template.metadata.name
        return wanted if wanted and wanted not in self.revisions else next(name for name in numbered if name not in self.revisions)

    def _same(self, service: Service) -> Revision | None:
        """The revision that runs the same already: one by its name, the newest, or the one that a roll-out has not yet replaced."""
        if not self.revisions:
            return None
        named = self.revisions.get(service.template.metadata.name)
        return next((found for found in (named, self.newest, self.latest) if found and found.service.runs_as(service)), None)

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
        if self.next and self.next is not revision:
            self.next.set_reachable(reachable=False)
        if revision is self.latest:  # back to what it was, before anything else was ready
            self.next = None
            return
        self.next, self.next_failure = revision, None
        revision.set_reachable(reachable=True)
        if self.service.recreate:
            self._tell(f"{revision.name} starts when {self.latest.name} is gone ({ROLLOUT}: {RECREATE})")
            revision.scaling.held = True
            self._tasks.start(self._start_after(revision), f"the start of {revision.name}")
        else:
            # Knative has a revision with initial-scale 0 be ready without a pod. Where somebody is served, one has to show that it can.
            self._begin(revision, least=1 if any(pod.phase == "ready" for pod in self.latest.pods) else 0)

    async def _start_after(self, revision: Revision) -> None:
        old = [other for other in self.revisions.values() if other is not revision and other.name not in self.route.names]
        while any(other.pods for other in old):
            await asyncio.sleep(LOOK_S)
        if revision is self.next:
            revision.scaling.held = False
            self._begin(revision, least=1 if revision.waiting else 0)

    def _begin(self, revision: Revision, least: int) -> None:
        revision.start(least)
        if revision.scaling.scaler.settled:
            self._changed(revision)

    def _changed(self, revision: Revision) -> None:
        """Called when a revision has become what it was started to be, or has failed."""
        if revision is not self.next or self.next_failure:
            return
        if revision.scaling.scaler.settled:
            self.latest, self.next = revision, None
            self._reroute()
        elif failure := revision.failures.present:
            self.next_failure = failure
            self._tell(self.stale.after_failure(revision, self.latest))
            if self.stale.is_gone(self.latest) and not self.latest.pods.ready:
                self._pass_over_latest()
            self._reroute()

    def _reroute(self) -> None:
        """Send requests where the manifest says, as far as that is ready; who gets none any more goes to zero."""
        going = self.next if self.next and not self.next_failure else None
        follows = going if going and self.service.recreate else self.latest
        route = resolve(self.service.traffic, follows.name)
        for name in route.names - self.route.names - {follows.name}:
            if not self.revisions[name].scaling.scaler.settled:
                self._tell(f"traffic stays as it is: {name} is not ready")
                route = self.route
        if route != self.route:
            self.route = route
            tags = [f"{tag} is {name}" for tag, name in route.tags.items()]
            self._tell("traffic: " + ", ".join([*(f"{percent} % {name}" for name, percent in route.shares.items()), *tags]))
        for revision in self.revisions.values():
            reachable = revision is going or revision.name in route.names
            if not reachable:
                revision.hand_over(self.choose)
            revision.scaling.keeps_one = bool(self.next and revision is self.latest and reachable and self.stale.is_gone(revision))
            revision.set_reachable(reachable=reachable)
        self._forget()

    def _forget(self) -> None:
        idle = [
            revision
            for revision in self.revisions.values()
            if not revision.reachable and revision not in (self.latest, self.next) and not revision.pods and not revision.meter.current
        ]
        for revision in idle[: max(0, len(idle) - KEPT)]:
            del self.revisions[revision.name]
            self.forgotten_requests += revision.meter.total
            self._tasks.start(revision.stop(), f"the end of {revision.name}")

    def _tell(self, text: str) -> None:
        self._watcher.about(self.service.name, text)

    @property
    def failure(self) -> Trouble | None:
        """What is wrong with those who get requests, or with the one that was to get them."""
        if self.next and (failure := self.next_failure):
            return replace(failure, reason=f"{self.next.name} failed; traffic stays on {self.latest.name}. {failure.reason}")
        return next((found for name in self.route.names if (found := self.revisions[name].failures.present)), None)

    def status(self) -> dict[str, Any] | None:
        """The entry `rollout` of `/api/status`: what is to become the latest revision, if one is."""
        if not self.next:
            return None
        trouble = self.next_failure or self.next.trouble
        return {
            "revision": self.next.name,
            "state": "failed" if self.next_failure else "waiting" if self.next.scaling.held else "starting",
            "trouble": trouble and trouble.reason,
        }
