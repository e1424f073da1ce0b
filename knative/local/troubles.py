"""Why a pod does not come up: how its containers ended, and what they complain of."""

import time
from collections.abc import Sequence
from itertools import pairwise

from knative.local.launch import FUNCTION
from knative.local.plain import line
from knative.local.process import ContainerProcess, Ending
from knative.local.trouble import Trouble

STUCK_S = 5.0  # of a complaint, until it counts as one that stays
SAME_ENDS, ENDS = 2, 3  # a start that ends so often in the same way, or in any, has failed
KILLED_ENDS = 10  # and one that is killed from outside so often in a row: it may do that itself
YOUNG_S = 5.0  # what ends so soon after it was ready, and never had a request, was not: its port was open for a moment, say
LINES = 12  # of a log
SETTING = "ended with status 2"  # of our function: a setting is wrong, or what it names is not there, which another start would not change


class Troubles:
    """What is known of why one pod is not ready."""

    def __init__(self, containers: Sequence[ContainerProcess]) -> None:
        self._containers = containers
        self._final: Trouble | None = None  # it will not be ready
        self._ends: list[tuple[str, str]] = []  # of containers since the pod was asked for, or was of use last
        self._killed = 0  # starts that were killed from outside, likewise
        self._ready_at: float | None = None  # until it is of use, or one of its processes ends
        self._ended: Trouble | None = None
        self._complaint: tuple[ContainerProcess, str] | None = None
        self._complains_since = 0.0
        self._unready: dict[str, str] = {}  # why its readiness probe was not satisfied last, by container
        self._is_known_stuck = False  # what was told of it last

    @property
    def has_failed(self) -> bool:
        """Whether the pod's start has failed for good."""
        return self._final is not None

    @property
    def is_stuck(self) -> bool:
        """Whether something keeps it from being ready that has done so for a while; it goes on trying."""
        return self._complaint is not None and time.monotonic() - self._complains_since >= STUCK_S

    def fail(self, trouble: Trouble) -> None:
        """The pod will not be ready."""
        self._final = self._final or trouble

    def over(self) -> None:
        """The pod is ready."""
        self._ready_at = time.monotonic()
        self._unready.clear()
        self._ended = self._complaint = None

    def used(self) -> None:
        """The pod has a request: it did start."""
        self._ready_at = None
        self._clear()

    def _clear(self) -> None:
        self._ends.clear()
        self._killed = 0

    def ended(self, container: ContainerProcess, ending: Ending, *, is_starting: bool) -> None:
        """A container ended by itself. is_starting: before the pod was ready. One that was killed from outside is no start that ended."""
        if container.process.is_main:
            ready_at, self._ready_at = self._ready_at, None
            is_young = ready_at is not None and time.monotonic() - ready_at < YOUNG_S
            if ready_at is not None and not is_young:
                self._clear()
            counts = is_starting or is_young
        else:  # beside a pod that is ready it may end as it likes; what ends well has done what it was for
            counts = is_starting and not ending.text.endswith("status 0")
        name = container.process.container
        said = self._complaint[1] if self._complaint and self._complaint[0] is container else ""
        self._complaint = None
        why = f"its container {name} {ending.text}{f': {said}' if said else ''}"
        if counts and _is_wrongly_set(container, ending):
            self.fail(self._blame(container, why))
        elif counts and (often := self._count(name, ending)):
            why += f", {often} as it started"
            self.fail(self._blame(container, why))
        self._ended = self._blame(container, why)

    def _count(self, name: str, ending: Ending) -> str:
        """One start more that ended; how often that was, in words, if it was too often."""
        if not ending.is_own:
            self._killed += 1
            return f"{self._killed} times" if self._killed >= KILLED_ENDS else ""
        self._ends.append((name, ending.text))
        same = self._ends.count((name, ending.text))
        if same < SAME_ENDS and len(self._ends) < ENDS:
            return ""
        return "twice" if same == SAME_ENDS == len(self._ends) else "again and again"

    def complained(self, container: ContainerProcess, error: str) -> bool:
        """What a container says is wrong now, nothing if `error` is empty; whether that changes anything."""
        before = self._complaint
        if not error:
            if before and before[0] is container:
                self._complaint = None
        elif before is None or not container.process.is_main:  # what a sidecar complains of, the function passes on
            if before is None:
                self._complains_since = time.monotonic()
            self._complaint = container, line(error, 300)
        was_known, self._is_known_stuck = self._is_known_stuck, self.is_stuck
        return before != self._complaint or was_known != self._is_known_stuck

    def probed(self, container: ContainerProcess, why: str) -> None:
        """A container's readiness probe was not satisfied."""
        self._unready[container.process.container] = why

    def latest(self) -> Trouble | None:
        """What is known, if anything is."""
        if self._final:
            return self._final
        if self._complaint:
            container, error = self._complaint
            return self._blame(container, f"its container {container.process.container} says: {error}")
        return self._ended

    def guess(self, phase: str, since: float) -> Trouble:
        """The same; without anything known, a container that is not ready, or has at least written something, is to blame.

        phase: where the user container says that it is, since then.
        """
        if found := self.latest():
            return found
        suspects = [container for container in self._containers if container.process.container in self._unready or container.tail(1)]
        if not suspects:
            return Trouble("its containers wrote nothing")
        last = max(suspects, key=lambda container: (container.process.container in self._unready, container.process.is_main))
        name = last.process.container
        if last.process.is_main and phase not in ("", "ready"):
            return self._blame(last, f"its container {name} has been {line(phase, 40)} for {time.monotonic() - since:.0f} s")
        why = self._unready.get(name)
        return self._blame(last, f"its container {name} does not say that it is ready{f': {line(why, 300)}' if why else ''}")

    def _blame(self, container: ContainerProcess, reason: str) -> Trouble:
        return Trouble(reason, container.process.container, tuple(line(text, 300) for text in container.tail(LINES)))


def _is_wrongly_set(container: ContainerProcess, ending: Ending) -> bool:
    return ending.text == SETTING and FUNCTION in pairwise(container.process.argv)
