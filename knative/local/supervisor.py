"""What follows from what happens to a revision's pods: they become ready, fail, hang, are one too many, and go."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from knative.autoscaler.choice import READY
from knative.local.failures import Failures
from knative.local.pod import Pod
from knative.local.pods import PodSet
from knative.local.scale_loop import ScaleLoop
from knative.local.tasks import Tasks
from knative.local.trouble import Trouble

if TYPE_CHECKING:
    from knative.local.revision import Revision


class Watcher(Protocol):
    """Who wants to know what happens to a revision: the terminal."""

    def starting(self, revision: Revision, pod: Pod, waiting: int) -> None:
        """A pod was asked for."""

    def progress(self, revision: Revision, pod: Pod) -> None:
        """A pod's phase or its report changed."""

    def ready(self, revision: Revision, pod: Pod) -> None:
        """A pod takes requests."""

    def crashed(self, revision: Revision, pod: Pod, ended: str) -> None:
        """One of a pod's processes ended by itself and will be started again."""

    def hung(self, revision: Revision, pod: Pod, reason: str) -> None:
        """A pod answers nobody and is replaced."""

    def failed(self, revision: Revision, trouble: Trouble) -> None:
        """The revision could not be brought up."""

    def gave_up(self, revision: Revision, pod: Pod) -> None:
        """A pod that was idle goes, as another function needs its GPU."""

    def at_zero(self, revision: Revision, idle_s: float) -> None:
        """The last pod is gone, so long after the last request."""

    def about(self, service: str, text: str) -> None:
        """Something about the Service as a whole."""


class Supervisor:
    """Hears of everything that happens to the pods of one revision, sees to what follows, and tells the record and the watcher."""

    def __init__(
        self,
        revision: Revision,
        tasks: Tasks,
        make_pod: Callable[[Revision, str], Pod],
        watcher: Watcher,
        on_change: Callable[[Revision], object],
        is_outdated: Callable[[Revision], bool],
    ) -> None:
        """See Revision; its meter, its record and those who wait must be there."""
        self._revision = revision
        self._record = revision.record
        self._waiting = revision.waiting
        self._make_pod = make_pod
        self._watcher = watcher
        self._on_change = on_change
        self._is_outdated = partial(is_outdated, revision)
        service = revision.service
        self.pods = PodSet(service.spec.container_concurrency, self._make, tasks, self._pod_gone, self._cannot_make)
        self.failures = Failures(self.pods, self._waiting, self._failed)
        self.scaling = ScaleLoop(
            service, revision.meter, self.pods, self._waiting, self.failures, self._let_go, self._is_late, self._is_slow, self._is_outdated
        )

    def _make(self) -> Pod:
        pod = self._make_pod(self._revision, f"{self._revision.name}-{secrets.token_hex(3)}")
        pod.on_room = partial(self._has_room, pod)
        self._record.starting(pod, len(self._waiting))
        self._watcher.starting(self._revision, pod, len(self._waiting))
        return pod

    def _has_room(self, pod: Pod) -> None:
        self.pods.has_room(pod)
        self._waiting.serve(self.pods.take)

    def pod_changed(self, pod: Pod) -> None:
        """Called by a pod whose phase, report or trouble changed."""
        self._watcher.progress(self._revision, pod)
        if pod.phase == "ready" and not self._is_of_revision(pod):
            self._let_go(pod)  # whoever waits is answered by the revision that takes over
        if self.pods.follow(pod):
            self._readiness_changed(pod)
        if self.scaling.is_closed or pod not in self.pods.kept:
            return
        if pod.troubles.has_failed:
            self._start_failed(pod, pod.why_not_ready())
        elif pod.troubles.is_stuck:
            self.failures.pod_is_stuck()

    def _is_of_revision(self, pod: Pod) -> bool:
        """Whether a pod that is ready has started with the revision's code; what was changed after that does not count."""
        began_at = next((container.started_at for container in pod.containers if container.process.is_main), 0.0)
        if pod.proven_at != began_at and pod in self.pods.kept and not self.scaling.is_closed:
            if self._is_outdated():
                return False
            pod.proven_at = began_at
        return True

    def _readiness_changed(self, pod: Pod) -> None:
        if pod.phase == "ready":
            pod.breaker.reset()
            self.failures.succeeded()
            self._record.ended(pod, "ready")
            self._watcher.ready(self._revision, pod)
        if not self.scaling.is_closed:
            was_settled = self.scaling.scaler.settled
            self.scaling.readiness_changed()
            self._waiting.serve(self.pods.take)
            if self.scaling.scaler.settled and not was_settled:
                self._on_change(self._revision)

    def process_ended(self, pod: Pod, ended: str) -> None:
        """Called by a pod one of whose processes ended by itself."""
        if not pod.troubles.has_failed:  # which says how it ended
            self._watcher.crashed(self._revision, pod, ended)

    def timed_out(self, pod: Pod, had_s: float, limit_s: float) -> None:
        """A request that the pod had for `had_s` seconds got no byte of an answer within its `limit_s`; a pod that hangs is replaced.

        It takes no more requests, and those that it has may end (see Pod.drain).
        """
        if not pod.breaker.timed_out(had_s, limit_s) or pod not in self.pods.kept or self.scaling.is_closed:
            return
        self._let_go(pod)
        trouble, at_once = self.failures.pod_hangs(pod, limit_s)
        self._record.hung(pod, trouble.reason)
        self._watcher.hung(self._revision, pod, trouble.reason)
        if at_once and self.scaling.scaler.spec.reachable and not self.scaling.held and not self._is_outdated():
            self.pods.add()

    def needs_pod(self) -> bool:
        """Whether one that waits for a GPU is worth that another function gives its own up."""
        return bool(self._waiting) or self.pods.ready < max(1, self._revision.service.scale.min_scale)

    def spare_pods(self) -> list[Pod]:
        """Pods with a GPU that have nothing to do, beyond those that min-scale promises and one while there are requests."""
        if self._waiting:
            return []
        kept = self.pods.kept
        idle = [pod for pod in kept if pod.state == READY and not pod.in_flight and pod.plan.gpus]
        least = max(self._revision.service.scale.min_scale, 1 if any(pod.in_flight for pod in kept) else 0)
        return idle[: max(0, len(kept) - least)]

    def give_up(self, pod: Pod) -> None:
        """Let a pod go whose GPU another function needs."""
        self._watcher.gave_up(self._revision, pod)
        self._let_go(pod)

    def _let_go(self, pod: Pod) -> None:
        self._record.ended(pod, "dropped")
        self.pods.let_go(pod, self._revision.service.spec.timeout_seconds)

    def _pod_gone(self) -> None:
        if not self.pods and not self.failures.latest:
            self._watcher.at_zero(self._revision, time.monotonic() - self._revision.last_left)

    def _is_late(self, pod: Pod) -> None:
        self._start_failed(pod, self.failures.deadline(pod, self._revision.service.scale.progress_deadline_s))

    def _cannot_make(self, trouble: Trouble) -> None:
        self._record.failed_starts += 1
        self.failures.start_failed(trouble)

    def _is_slow(self, pod: Pod) -> None:
        if not pod.is_slow_told:
            pod.is_slow_told = True
            self._watcher.about(self._revision.service.name, pod.why_not_ready().reason)

    def _start_failed(self, pod: Pod, trouble: Trouble) -> None:
        """It will not be ready: it goes, and another one is tried after a pause."""
        self._record.ended(pod, "failed")
        self._let_go(pod)
        self.failures.start_failed(trouble)

    def _failed(self, trouble: Trouble) -> None:
        self._watcher.failed(self._revision, trouble)
        self._on_change(self._revision)
