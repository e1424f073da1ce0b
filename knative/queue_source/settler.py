"""Calls for several items at once, without keeping one waiting for others."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from knative.queue_source.errors import QueueUnavailable

log = logging.getLogger("relight.queue")

T = TypeVar("T")
MOST = 10  # items of one call
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0


class Settler(Generic[T]):
    """Takes items one by one and hands them on in batches; what did not work is tried again, after a pause that grows.

    What is there goes at once if no call is under way, and otherwise when ten are there or the call returns. So nothing waits while little
    happens, for what is done and not yet deleted would be repeated if the process died now, and calls are full while much happens.
    """

    def __init__(self, name: str, settle: Callable[[Sequence[T]], Sequence[T]], *, threads: int) -> None:
        """settle: one call; returns the items to be tried again. Raises QueueUnavailable: all of them are."""
        self._name = name
        self._settle = settle
        self._threads = threads
        self._changed = threading.Condition()  # guards what follows
        self._items: deque[T] = deque()
        self._calls = 0  # under way

    def start(self, spawn: Callable[[str, Callable[[], None]], object]) -> None:
        """Work in threads of its own, which `spawn` starts."""
        for _ in range(self._threads):
            spawn(self._name, self._run)

    def put(self, items: Sequence[T]) -> None:
        """They are settled soon."""
        with self._changed:
            self._items.extend(items)
            if not self._calls or len(self._items) >= MOST:
                self._changed.notify()

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            batch = self._take()
            try:
                again = self._settle(batch)
            except QueueUnavailable as error:
                again = batch
                log.warning("%s: %s; again in %.2f s", self._name, error, pause_s)
            with self._changed:
                self._calls -= 1
                if self._items:
                    self._changed.notify()
            if again:
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
                self.put(again)
            else:
                pause_s = FIRST_PAUSE_S

    def _take(self) -> list[T]:
        with self._changed:
            while len(self._items) < (MOST if self._calls else 1):
                self._changed.wait()
            self._calls += 1
            return [self._items.popleft() for _ in range(min(MOST, len(self._items)))]
