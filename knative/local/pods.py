"""The pods of one revision: those that take requests, those that start, and those that go."""

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

from knative.autoscaler.choice import DRAINING, PENDING, READY, STARTING, Rooms, rooms, victims
from knative.local.errors import PlatformError
from knative.local.pod import Pod
from knative.local.tasks import Tasks, describe
from knative.local.trouble import Trouble

_STATES = {"pending": PENDING, "starting": STARTING, "ready": READY, "draining": DRAINING}


class PodSet:
    """All pods that are not gone, the oldest first."""

    def __init__(
        self,
        container_concurrency: int,
        make: Callable[[], Pod],
        tasks: Tasks,
        gone: Callable[[], object],
        failed: Callable[[Trouble], object],
    ) -> None:
        """container_concurrency: requests that a pod takes at once, 0 for no limit. make: a pod that has not been started.

        tasks: for their starts and ends. gone: called when one is gone. failed: called when one could not be made.
        """
        self._make = make
        self._tasks = tasks
        self._gone = gone
        self._failed = failed
        self._pods: list[Pod] = []
        self._numbers = itertools.count(1)
        self._rooms: Rooms[Any] = rooms(container_concurrency, random.Random())

    def __getitem__(self, index: int) -> Pod:
        return self._pods[index]

    def __iter__(self) -> Iterator[Pod]:
        return iter(list(self._pods))

    def __len__(self) -> int:
        return len(self._pods)

    @property
    def ready(self) -> int:
        """How many take requests."""
        return sum(pod.state == READY for pod in self._pods)

    @property
    def kept(self) -> list[Pod]:
        """Those that are not to go."""
        return [pod for pod in self._pods if pod.state != DRAINING]

    @property
    def going(self) -> list[Pod]:
        """Those that serve what they have, and go."""
        return [pod for pod in self._pods if pod.state == DRAINING]

    def add(self) -> None:
        """Start one more."""
        try:
            pod = self._make()
        except Exception as error:  # noqa: BLE001  no port is free, say
            self._failed(_trouble("another pod", error))
            return
        pod.number = next(self._numbers)
        self._pods.append(pod)
        self._tasks.start(self._start(pod), f"the start of {pod.name}")

    async def _start(self, pod: Pod) -> None:
        try:
            await pod.start()
        except Exception as error:  # noqa: BLE001  whatever it is, it becomes why the pod has failed
            pod.fail(_trouble(f"the start of {pod.name}", error))

    def let_go(self, pod: Pod, patience_s: float) -> None:
        """It takes no more requests; those that it has may end within `patience_s`, then it goes."""
        if pod.state == DRAINING:
            return
        self._set(pod, DRAINING)
        self._tasks.start(self._end(pod, patience_s), f"the end of {pod.name}")

    async def _end(self, pod: Pod, patience_s: float) -> None:
        try:
            await pod.drain(patience_s)
        except Exception:
            self._pods.remove(pod)
            raise
        self._pods.remove(pod)  # not if we are cancelled: then `stop` has yet to end it
        self._gone()

    async def stop(self) -> None:
        """End all that are left."""
        await asyncio.gather(*(pod.drain(0) for pod in self._pods))
        self._pods.clear()

    def follow(self, pod: Pod) -> bool:
        """Take the pod's phase; whether it has begun or ceased to take requests. One that is to go stays so."""
        before = pod.state
        if before != DRAINING:
            self._set(pod, _STATES[pod.phase])
        return (before == READY) != (pod.state == READY)

    def _set(self, pod: Pod, state: int) -> None:
        before, pod.state = pod.state, state
        if state == READY:
            self._rooms.add(pod)
        elif before == READY:
            self._rooms.drop(pod)

    def take(self) -> Pod | None:
        """The pod for the next request, which is to enter it at once; None if none has room."""
        pod: Pod | None = self._rooms.take()
        return pod

    def has_room(self, pod: Pod) -> None:
        """It has room for one request more."""
        if pod.state == READY:
            self._rooms.add(pod)

    def surplus(self, wanted: int) -> list[Pod]:
        """Those to let go, so that so many are kept."""
        kept = self.kept
        return victims(kept, len(kept) - wanted)

    def late(self, now: float, limit_s: float) -> list[Pod]:
        """Those that have not been ready for longer than they may."""
        starting = [pod for pod in self._pods if pod.state in (PENDING, STARTING)]
        return [pod for pod in starting if pod.unready_since and now - pod.unready_since > limit_s]

    def trouble(self) -> Trouble | None:
        """What keeps one of them from being ready, if none is."""
        kept = self.kept
        if any(pod.state == READY for pod in kept):
            return None
        return next((pod.why_not_ready() for pod in kept if pod.trouble), None)

    def stuck(self) -> Trouble | None:
        """The same, if none of them will be ready unless something changes."""
        kept = self.kept
        return self.trouble() if kept and all(pod.troubles.is_stuck for pod in kept) else None


def _trouble(what: str, error: Exception) -> Trouble:
    """An error that is meant for the user says all; of a mistake of ours it is said where it was made."""
    return Trouble(str(error) if isinstance(error, PlatformError) else describe(what, error))
