"""What becomes of pods that do not start, or hang: who is told, and how long nothing is tried after it."""

import time
from collections.abc import Callable
from dataclasses import replace

from knative.local.breaker import TIME_OUTS
from knative.local.errors import RevisionFailed
from knative.local.pod import Pod
from knative.local.pods import PodSet
from knative.local.tasks import describe
from knative.local.trouble import Trouble
from knative.local.waiting import Waiting

RETRY_S, RETRY_LIMIT_S = 10.0, 300.0  # after a failed start, until the next is tried
STUCK_RETRY_S = 5.0  # when to come again to pods that cannot become ready and go on trying


class Failures:
    """The failed starts of one revision: after each nothing is tried for a while, the longer the more have failed before.

    Whoever waits is told of one, unless there is a pod to wait for.
    """

    def __init__(self, pods: PodSet, waiting: Waiting, tell: Callable[[Trouble], object]) -> None:
        """tell: called with each failure."""
        self.latest: Trouble | None = None  # why the last start failed, until one succeeds or is to be tried again
        self._pods = pods
        self._waiting = waiting
        self._tell = tell
        self._until = 0.0
        self._count = 0  # of starts that failed since one succeeded
        self._stuck: Trouble | None = None  # what was told of pods that cannot become ready, since one did
        self._hung = 0  # pods in a row that hung while none had ever answered

    @property
    def pause_s(self) -> float:
        """Seconds until the next start may be tried; 0 if it may now."""
        return max(0.0, self._until - time.monotonic()) if self.latest else 0.0

    @property
    def present(self) -> Trouble | None:
        """Why the last start failed, or none of the pods there are can become ready, or why they could not before they went."""
        return self.latest or (self._pods.stuck() if self._pods.kept else self._stuck)

    def check(self) -> None:
        """Whether there is any use in waiting for a pod. Raises RevisionFailed if not."""
        if self._pods.ready:
            return
        if self.latest and (pause_s := self.pause_s):
            raise RevisionFailed(self.latest, retry_after_s=pause_s)
        self.latest = None
        if stuck := self._pods.stuck():
            raise RevisionFailed(stuck, retry_after_s=STUCK_RETRY_S)

    def succeeded(self) -> None:
        """A pod is ready."""
        self.latest, self._count, self._stuck = None, 0, None

    def forget(self) -> None:
        """The next start may be tried at once."""
        self.latest = self._stuck = None

    def start_failed(self, trouble: Trouble) -> None:
        """A pod will not be ready; it is for the caller to let it go first."""
        self._fail(trouble, self._count)
        self._count += 1

    def pod_is_stuck(self) -> None:
        """A pod cannot become ready, and goes on trying."""
        if stuck := self._pods.stuck():
            self._waiting.fail(RevisionFailed(stuck, retry_after_s=STUCK_RETRY_S))
            is_news, self._stuck = not self._stuck, stuck
            if is_news:
                self._tell(stuck)

    def pod_hangs(self, pod: Pod, limit_s: float) -> tuple[Trouble, bool]:
        """A pod answers nobody; what is said of it, and whether another one may be started at once.

        Not if the one before hung too and none has answered anybody: then after the pause that also follows a failed start.
        """
        trouble = Trouble(f"{pod.name} answers nobody: {TIME_OUTS} requests in a row timed out ({limit_s:g} s); it is replaced")
        self._hung = 0 if any(other.breaker.has_answered for other in self._pods) else self._hung + 1
        if self._hung > 1:
            self._fail(trouble, self._hung - 2)
        return trouble, self._hung <= 1

    def task_failed(self, what: str, error: Exception) -> None:
        """Something that is done for the revision has failed by a mistake of ours: nobody is to wait for it in vain."""
        self.start_failed(Trouble(describe(what, error)))

    def deadline(self, pod: Pod, limit_s: float) -> Trouble:
        """What is said of a pod that was not ready in time."""
        found = pod.why_not_ready()
        why = found.reason.removeprefix(f"{pod.name}: ")
        return replace(found, reason=f"{pod.name} was not ready within {limit_s:g} s (progress-deadline): {why}")

    def _fail(self, trouble: Trouble, earlier: int) -> None:
        self.latest = trouble
        self._until = time.monotonic() + min(RETRY_LIMIT_S, RETRY_S * 2.0**earlier)
        if not self._pods.ready:
            self._waiting.fail(RevisionFailed(trouble, retry_after_s=self.pause_s))
        self._tell(trouble)
