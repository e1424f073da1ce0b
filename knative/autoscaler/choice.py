"""Which pod a request goes to, and which pods go when there are too many: for `relight run` and the simulator alike.

A request goes where Knative's activator would send it, in constant or logarithmic time. containerConcurrency 0: the less busy of two at
random; up to 3: the first with room; above: each in its turn.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Iterable
from typing import Any, Generic, Protocol, TypeVar

PENDING, STARTING, READY, DRAINING, GONE = range(5)  # the states of a pod, in the order in which it has them


class Candidate(Protocol):
    """What the choice looks at in a pod, and keeps there."""

    number: int  # in the order in which they were asked for
    state: int
    in_flight: int
    listed: bool  # among those that have room
    rank: int  # in the order in which they got the first of the requests that they have


P = TypeVar("P", bound=Candidate)


def victims(pods: Iterable[P], count: int) -> list[P]:
    """So many pods that are missed least: those not ready first, then the least busy, then the youngest."""
    return sorted(pods, key=lambda pod: (pod.state, pod.in_flight, -pod.number))[: max(0, count)]


class Rooms(Protocol[P]):
    """The ready pods that have room for one request more."""

    def add(self, pod: P) -> None:
        """It is ready, or has room again."""

    def take(self) -> P | None:
        """A pod for one request, which the caller hands it at once; None if none has room."""

    def drop(self, pod: P) -> None:
        """It takes no more requests."""


class FirstWithRoom(Generic[P]):
    """Always the oldest with room."""

    def __init__(self, concurrency: int) -> None:
        self._limit = concurrency or math.inf
        self._heap: list[tuple[int, P]] = []

    def add(self, pod: P) -> None:
        """See Rooms."""
        if not pod.listed:
            pod.listed = True
            heapq.heappush(self._heap, (pod.number, pod))

    def take(self) -> P | None:
        """See Rooms."""
        heap = self._heap
        while heap:
            pod = heap[0][1]
            if pod.state == READY and pod.in_flight < self._limit:
                return pod
            heapq.heappop(heap)
            pod.listed = False
        return None

    def drop(self, pod: P) -> None:
        """Nothing to do: its state says so."""


class BusyFirst(Generic[P]):
    """Of the pods with requests the one that has had some for longest; one without only where no other has room."""

    def __init__(self, concurrency: int) -> None:
        self._limit = concurrency or math.inf
        self._busy: list[tuple[int, P]] = []  # by `rank`; an entry whose pod has another one by now is void
        self._idle: list[tuple[int, P]] = []
        self._ranks = itertools.count(1)

    def add(self, pod: P) -> None:
        """See Rooms."""
        if not pod.in_flight:
            pod.rank = 0
            heapq.heappush(self._idle, (pod.number, pod))
        elif not pod.listed:
            self._list(pod)

    def take(self) -> P | None:
        """See Rooms."""
        busy, idle = self._busy, self._idle
        while busy:
            rank, pod = busy[0]
            if rank == pod.rank:
                if pod.state == READY and pod.in_flight < self._limit:
                    return pod
                pod.listed = False
            heapq.heappop(busy)
        while idle:
            _, pod = heapq.heappop(idle)
            if pod.state == READY:
                pod.rank = next(self._ranks)
                self._list(pod)
                return pod
        return None

    def drop(self, pod: P) -> None:
        """Nothing to do: its state says so."""

    def _list(self, pod: P) -> None:
        pod.listed = True
        heapq.heappush(self._busy, (pod.rank, pod))


class EachInTurn(Generic[P]):
    """Round robin over those with room."""

    def __init__(self, concurrency: int) -> None:
        self._limit = concurrency
        self._turn: deque[P] = deque()

    def add(self, pod: P) -> None:
        """See Rooms."""
        if not pod.listed:
            pod.listed = True
            self._turn.append(pod)

    def take(self) -> P | None:
        """See Rooms."""
        turn = self._turn
        while turn:
            pod = turn.popleft()
            if pod.state == READY and pod.in_flight < self._limit:
                turn.append(pod)
                return pod
            pod.listed = False
        return None

    def drop(self, pod: P) -> None:
        """Nothing to do: its state says so."""


class LessBusyOfTwo(Generic[P]):
    """Of two chosen at random the one with fewer requests; every pod has room."""

    def __init__(self, rng: random.Random) -> None:
        self._random = rng.random
        self._pods: list[P] = []

    def add(self, pod: P) -> None:
        """See Rooms."""
        if not pod.listed:
            pod.listed = True
            self._pods.append(pod)

    def take(self) -> P | None:
        """See Rooms."""
        pods = self._pods
        count = len(pods)
        if count < 2:
            return pods[0] if pods else None
        first = int(self._random() * count)
        second = int(self._random() * (count - 1))
        one, other = pods[first], pods[second + (second >= first)]
        return other if other.in_flight < one.in_flight else one

    def drop(self, pod: P) -> None:
        """See Rooms."""
        if pod.listed:
            pod.listed = False
            self._pods.remove(pod)


def rooms(concurrency: int, rng: random.Random, *, packed: bool = False) -> Rooms[Any]:
    """For pods that take so many requests at once (0: no limit); packed: so that few pods have requests, whatever the number."""
    if packed and concurrency != 1:
        return BusyFirst(concurrency)
    if 0 < concurrency <= 3:
        return FirstWithRoom(concurrency)
    return EachInTurn(concurrency) if concurrency else LessBusyOfTwo(rng)
