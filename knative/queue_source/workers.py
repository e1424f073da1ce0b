"""Threads that work items off, no more of them awake than are needed."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Workers(Generic[T]):
    """At most `limit` threads, started when there is work for them.

    An item wakes one thread, which wakes the next one when it has taken its own and there are more. So a crowd of items that each take a
    moment does not wake a crowd of threads, and items that take long are all being worked on at once.
    """

    def __init__(self, work: Callable[[T], None], *, limit: int, spawn: Callable[[str, Callable[[], None]], object]) -> None:
        """spawn: starts a thread."""
        self._work = work
        self._limit = limit
        self._spawn = spawn
        self._changed = threading.Condition()  # guards what follows
        self._items: deque[T] = deque()
        self._idle = 0
        self._started = 0
        self._stopping = False

    def put(self, items: Sequence[T]) -> None:
        """They are worked off as soon as a thread is free."""
        with self._changed:
            self._items.extend(items)
            self._wake()

    def stop(self) -> None:
        """The threads end, each after what it works on; what nobody has begun is left."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _wake(self) -> None:
        """One more thread, if there is something for it."""
        if not self._items:
            return
        if self._idle:
            self._changed.notify()
        elif self._started < self._limit and not self._stopping:
            self._started += 1
            self._spawn("work", self._run)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._items and not self._stopping:
                    self._idle += 1
                    self._changed.wait()
                    self._idle -= 1
                if self._stopping:
                    return
                item = self._items.popleft()
                self._wake()
            self._work(item)
