"""What became of events, by who sent what: so that one that is delivered twice is worked on once.

Deliveries repeat themselves: a queue, a broker or a client that did not hear the answer sends the event again. One that comes while the
first is worked on waits for the same outcome; one that comes later gets the reply that the first one got, for as long as it is kept.
What failed is not kept, since it was sent again to be tried again.

The memory is the process's own: it goes with the pod, and other pods have theirs.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

_OVERHEAD_BYTES = 1000  # what an entry takes, at most, beside what its reply counts

Key = bytes  # a digest of all that makes two deliveries the same: it is of one size, whatever a sender sends


class Sized(Protocol):
    """A reply that knows how large it is."""

    @property
    def size_bytes(self) -> int:
        """Bytes that it holds on to."""


R = TypeVar("R", bound=Sized)


class Work(Generic[R]):
    """One event's: whoever began it ends it, others wait for that."""

    __slots__ = ("_is_over", "_over", "error", "forget_at", "key", "reply")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.reply: R | None = None
        self.error: Exception | None = None  # why there is no reply, if that holds for those who wait, too
        self.forget_at = 0.0
        self._is_over = False
        self._over = threading.Lock()  # held until it has ended; a tenth of the size of an Event, of which thousands would be kept
        self._over.acquire()

    def end(self, reply: R | None, error: Exception | None) -> None:
        """Tell those who wait."""
        self.reply, self.error = reply, error
        self._is_over = True
        self._over.release()

    def is_over(self) -> bool:
        """Whether it has ended."""
        return self._is_over

    def wait(self, timeout_s: float) -> bool:
        """Until it has ended; False if it has not after so long."""
        if not self._is_over and self._over.acquire(timeout=max(0.0, timeout_s)):
            self._over.release()  # for the next one who waits
        return self._is_over


class Memory(Generic[R]):
    """The events that are being worked on, and the last ones that were finished; used from any thread."""

    def __init__(self, *, entries: int, size_bytes: int, keep_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """entries, size_bytes: the most that is kept; with 0 entries every event is worked on. keep_s: how long, from when it was done."""
        self._entries = entries
        self._size_bytes = size_bytes
        self._keep_s = keep_s
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows
        self._running: dict[Key, Work[R]] = {}
        self._kept: OrderedDict[Key, Work[R]] = OrderedDict()  # the oldest first
        self._kept_bytes = 0

    def claim(self, key: Key) -> tuple[Work[R], bool]:
        """The work on an event, and whether it is the caller's to do: then it calls `finish` or `fail`, whatever happens."""
        if not self._entries:
            return Work(key), True
        with self._lock:
            self._forget()
            if found := self._kept.get(key) or self._running.get(key):
                return found, False
            work = self._running[key] = Work(key)
            return work, True

    def finish(self, work: Work[R], reply: R) -> None:
        """Done: those who wait have the reply, and so have those who ask later."""
        with self._lock:
            work.end(reply, None)
            if self._running.pop(work.key, None) and _size(work) <= self._size_bytes:
                work.forget_at = self._clock() + self._keep_s
                self._kept[work.key] = work
                self._kept_bytes += _size(work)
                self._forget()

    def fail(self, work: Work[R], error: Exception | None = None) -> None:
        """It failed, and whoever sends it again has it tried again.

        error: what those who wait are told; None if it is no concern of theirs, as when the caller's own time was up: they begin anew.
        """
        with self._lock:
            self._running.pop(work.key, None)
        work.end(None, error)

    def kept(self) -> tuple[int, int]:
        """How many finished events are kept, and their bytes."""
        with self._lock:
            self._forget()
            return len(self._kept), self._kept_bytes

    def _forget(self) -> None:
        """What is too old, and the oldest of what is too much."""
        now = self._clock()
        while self._kept:
            oldest = next(iter(self._kept.values()))
            if now < oldest.forget_at and len(self._kept) <= self._entries and self._kept_bytes <= self._size_bytes:
                return
            del self._kept[oldest.key]
            self._kept_bytes -= _size(oldest)


def _size(work: Work[R]) -> int:
    assert work.reply is not None
    return _OVERHEAD_BYTES + work.reply.size_bytes
