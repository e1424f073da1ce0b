"""Calls for several messages at once, made as soon as there is one and nothing else is under way."""

import logging
import queue
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from knative.queue_source.errors import QueueUnavailable

log = logging.getLogger("relight.queue")

T = TypeVar("T")
MOST = 10  # items of one call
LINGER_S = 0.003
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0


class Settler(Generic[T]):
    """Takes items one by one and hands them on in batches; what did not work is tried again, after a pause that grows.

    An item is not kept waiting for others, but for LINGER_S while many are about to come: what is done and not deleted yet would be
    repeated if the process died now.
    """

    def __init__(self, name: str, settle: Callable[[Sequence[T]], Sequence[T]], *, threads: int, are_coming: Callable[[], bool]) -> None:
        """settle: one call; returns the items to be tried again. Raises QueueUnavailable: all of them are.

        are_coming: whether enough others are about to come that waiting a moment saves a call.
        """
        self._name = name
        self._settle = settle
        self._threads = threads
        self._are_coming = are_coming
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()

    def start(self, spawn: Callable[[str, Callable[[], None]], object]) -> None:
        """Work in threads of its own, which `spawn` starts."""
        for _ in range(self._threads):
            spawn(self._name, self._run)

    def put(self, item: T) -> None:
        """It is settled soon."""
        self._items.put(item)

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            batch = self._gather()
            try:
                again = self._settle(batch)
            except QueueUnavailable as error:
                again = batch
                log.warning("%s: %s; again in %.2f s", self._name, error, pause_s)
            if not again:
                pause_s = FIRST_PAUSE_S
                continue
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
            for item in again:
                self._items.put(item)

    def _gather(self) -> list[T]:
        batch = [self._items.get()]
        until = time.monotonic() + LINGER_S
        while len(batch) < MOST:
            try:
                batch.append(self._items.get_nowait())
            except queue.Empty:
                left_s = until - time.monotonic()
                if left_s <= 0 or not self._are_coming():
                    break
                try:
                    batch.append(self._items.get(timeout=left_s))
                except queue.Empty:
                    break
        return batch
