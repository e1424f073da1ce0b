"""Several streams of one request, read as one: the choices of an answer, or the answers to several prompts."""

import functools
import queue
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from function.batcher import CallContext
from function.errors import TimedOut
from function.guarded_agent import Usage
from function.streams import LOOKS, Stream, is_empty


class OpenStreams(Protocol):
    """`Model.streams`."""

    def __call__(self, calls: Sequence[tuple[Any, CallContext]], *, waits: bool) -> list[Stream]:
        """Streams, in the order of the calls."""


class Merged:
    """Iterate over it for the pieces of all, as they come, and close it. No more than so many are open at a time."""

    def __init__(self, calls: Sequence[tuple[Any, CallContext]], open_streams: OpenStreams, at_once: int) -> None:
        """Opens the first of them. open_streams: `Model.streams`. Raises what that does."""
        self.usages = [Usage()] * len(calls)
        self._open_streams = open_streams
        self._timeout_s = calls[0][1].timeout_s
        self._opened = time.monotonic()
        self._waiting = deque(enumerate(calls))
        self._streams: dict[int, Stream] = {}  # that are open
        self._heard: dict[int, float] = {}  # when each was last heard of
        self._ready: queue.SimpleQueue[int] = queue.SimpleQueue()  # those that have pieces
        self._open(at_once, waits=True)

    def _open(self, count: int, *, waits: bool) -> None:
        numbers, calls = zip(*(self._waiting.popleft() for _ in range(min(count, len(self._waiting)))), strict=True)
        for number, stream in zip(numbers, self._open_streams(calls, waits=waits), strict=True):
            self._streams[number] = stream
            self._heard[number] = time.monotonic()
            stream.wake = functools.partial(self._ready.put, number)
            self._ready.put(number)  # there may be something already

    def pieces(self, gap_s: float) -> Iterator[tuple[int, Any] | None]:
        """Which stream, and what it gave; None whenever nothing came for so many seconds. Raises what `Stream.pieces` does."""
        while self._streams:
            try:
                number = self._ready.get(timeout=gap_s)
            except queue.Empty:
                yield None
            else:
                if number in self._streams:
                    yield from self._taken(number)
            self._look_at_the_clock()

    def _taken(self, number: int) -> Iterator[tuple[int, Any]]:
        stream = self._streams[number]
        for piece in stream.taken():
            self._heard[number] = time.monotonic()
            if not is_empty(piece):
                yield number, piece
        self.usages[number] = stream.usage
        if stream.is_over:
            del self._streams[number]
            stream.close()
            if self._waiting:
                self._open(1, waits=False)

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for number, stream in self._streams.items():
            if now - self._heard[number] > stream.context.timeout_s:
                raise stream.overdue()

    def whole(self, late: str) -> list[list[Any]]:
        """The pieces of each, for a caller who wants the answers in one go; closes it.

        late: what to say when they are not all there by the deadline, whose seconds are its {}. Raises what `pieces` does.
        """
        found: list[list[Any]] = [[] for _ in self.usages]
        try:
            for told in self.pieces(self._timeout_s / LOOKS):
                if time.monotonic() > self._opened + self._timeout_s:
                    raise TimedOut(late.format(f"{self._timeout_s:g}"))
                if told is not None:
                    found[told[0]].append(told[1])
        finally:
            self.close()
        return found

    def close(self) -> None:
        """No more pieces are wanted."""
        for stream in self._streams.values():
            stream.close()
