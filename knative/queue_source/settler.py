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
LINGER_S = 0.02
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 2.0


class Settler(Generic[T]):
    """Takes items one by one and hands them on in batches; what did not work is tried again, after a pause that grows.

    What is there goes at once if no call is under way, and otherwise when ten are there, a call returns, or LINGER_S is over. So nothing
    waits for long, for what is done and not yet deleted would be repeated if the process died now, and calls are full while much happens.
    """

    def __init__(self, name: str, settle: Callable[[Sequence[T]], Sequence[T]], *, threads: int) -> None:
        """settle: one call; returns the items to be tried again. Raises QueueUnavailable: all of them are."""
        self._name = name
        self._settle = settle
        self._threads = threads
        self._changed = threading.Condition()  # guards what follows
        self._items: deque[T] = deque()
        self._calls = 0  # under way
        self._since = 0.0  # when the first of the items came, or the last batch was taken
        self._is_watched = False  # a thread is on its way to the items, or waits until they are due
        self._stopping = threading.Event()

    def start(self, spawn: Callable[[str, Callable[[], None]], object]) -> None:
        """Work in threads of its own, which `spawn` starts."""
        for _ in range(self._threads):
            spawn(self._name, self._run)

    def put(self, items: Sequence[T]) -> None:
        """They are settled soon."""
        with self._changed:
            if not self._items:
                self._since = time.monotonic()
            self._items.extend(items)
            self._wake()

    def stop(self) -> None:
        """The threads end, each after its call; what is left is not settled."""
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while batch := self._take():
            try:
                again = self._settle(batch)
            except QueueUnavailable as error:
                again = batch
                log.warning("%s: %s; again in %.2f s", self._name, error, pause_s)
            with self._changed:
                self._calls -= 1
            if again:
                self._stopping.wait(pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
                self.put(again)
            else:
                pause_s = FIRST_PAUSE_S

    def _wake(self) -> None:
        if self._items and (not self._is_watched or len(self._items) >= MOST):
            self._is_watched = True
            self._changed.notify()

    def _wait_s(self) -> float | None:
        """Seconds until what is there is due; None if nothing is there."""
        if not self._items:
            return None
        if not self._calls or len(self._items) >= MOST:
            return 0.0
        return max(self._since + LINGER_S - time.monotonic(), 0.0)

    def _take(self) -> list[T]:
        """The next ones; none when it is time to stop."""
        with self._changed:
            while not self._stopping.is_set() and (wait_s := self._wait_s()) != 0.0:
                self._is_watched = wait_s is not None
                self._changed.wait(wait_s)
            if self._stopping.is_set():
                return []
            self._calls += 1
            batch = [self._items.popleft() for _ in range(min(MOST, len(self._items)))]
            self._since = time.monotonic()
            self._is_watched = False
            self._wake()
            return batch
