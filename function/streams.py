"""Answers that are made piece by piece, as the caller's thread and the model's see them.

The model's thread runs all sequences together, a step at a time (iteration-level scheduling as in Orca, OSDI 2022): they join and leave
between steps. When interactive ones want the places of batch work, that is left out of steps until there is a place again: its sequences
stay as they are, with what memory they have (preemption as in Orca's successors, without recomputing or swapping). So there are at most
twice as many sequences as share a step: batch work begins only where there is a place for it beside all others.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from function.batcher import CallContext, Span, StreamCall
from function.cost import Recent
from function.errors import ClientGone, FunctionError, NoPlace, TimedOut, TooSlow
from function.guarded_agent import GuardedAgent, Sequence_, Usage
from function.priority import Priority

log = logging.getLogger("relight.function")

AHEAD = 256  # pieces that nobody has read yet; then the stream waits for its reader
PATIENCE_S = 5.0  # with a reader who does not read, while others wait for the place
LOOKS = 16  # at the clock per deadline, while a whole answer is gathered

_END = object()


class Stream:
    """One answer; iterate over it for its pieces, and close it. The caller's side."""

    def __init__(self, context: CallContext, on_timeout: Callable[[], object] = lambda: None) -> None:
        """on_timeout: is called when the server's own deadline ends it between two pieces, and not for want of a place."""
        self.context = context
        self.began = math.inf  # to be made, on `time.monotonic`'s clock
        self.is_held = False  # others have all the places; the model's thread says so
        self.behind_since = math.inf  # its reader, as the model's thread has seen it
        self.usage = Usage()  # what the agent tells of it so far
        self.wake: Callable[[], object] = lambda: None  # is called when there is something to read, in the model's thread
        self.is_over = False  # its last piece has been read, by `taken`
        self._pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._on_timeout = on_timeout
        self._first: Any = None
        self._opened = time.monotonic()

    def wait_first(self) -> None:
        """Wait for the first piece. Raises what `pieces` does."""
        self._first = self._next(self.context.timeout_s)

    def pieces(self, gap_s: float | None = None) -> Iterator[Any]:
        """What the agent makes, as it is made; None whenever nothing came for `gap_s` seconds. Call it once, after `wait_first`.

        Raises AgentFailed, BadInput or, when a piece takes longer than the deadline, TimedOut.
        """
        piece = self._first
        while piece is not _END:
            yield piece
            left_s = self.context.timeout_s
            while gap_s and left_s > gap_s:
                try:
                    piece = self._next(gap_s, is_deadline=False)
                    break
                except queue.Empty:
                    left_s -= gap_s
                    yield None
            else:
                piece = self._next_by(left_s)

    def taken(self) -> Iterator[Any]:
        """What the agent has made by now, without waiting; for who does not call `pieces`. Call `wait_first` before, or not.

        Raises what `pieces` does but TimedOut, see `overdue`.
        """
        piece, self._first = self._first, None
        while piece is not _END:
            if piece is not None:
                yield piece
            try:
                piece = self._next(0, is_deadline=False)
            except queue.Empty:
                return
        self.is_over = True

    def overdue(self) -> TimedOut:
        """Ends it, as its next piece has taken longer than the deadline: what its caller is told."""
        self.close()
        error = self.late()
        if self.context.is_own_deadline and not isinstance(error, NoPlace):
            self._on_timeout()
        return error

    def whole(self, late: str) -> list[Any]:
        """All its pieces, for a caller who wants the answer in one go; ends the stream. Call it once, after `wait_first`.

        late: what to say when the whole is not there by the deadline, whose seconds are its {}. Raises what `pieces` does.
        """
        found: list[Any] = []
        try:
            for piece in self.pieces(self.context.timeout_s / LOOKS):
                if time.monotonic() > self._opened + self.context.timeout_s:
                    raise TimedOut(late.format(f"{self.context.timeout_s:g}"))
                if piece is not None:
                    found.append(piece)
        finally:
            self.close()
        return found

    def _next_by(self, timeout_s: float) -> Any:
        """The next piece, or _END, by the deadline."""
        try:
            return self._next(timeout_s, is_deadline=False)
        except queue.Empty:
            raise self.overdue() from None

    def _next(self, timeout_s: float, *, is_deadline: bool = True) -> Any:
        """The next piece, or _END. Raises its error, and at the deadline TimedOut; queue.Empty if it is not the deadline."""
        try:
            piece = self._pieces.get(timeout=timeout_s) if timeout_s > 0 else self._pieces.get_nowait()
        except queue.Empty:
            if not is_deadline:
                raise
            self.close()
            raise self.late() from None
        if isinstance(piece, Exception):
            raise piece
        return piece

    def late(self) -> TimedOut:
        """What the caller is told at the deadline."""
        return self.context.late("place among the streams", NoPlace) if self.is_held else self.context.late("piece")

    def close(self) -> None:
        """No more pieces are wanted; its place is free before the next step."""
        self._closed.set()

    # The model's side

    def is_wanted(self) -> bool:
        """Whether somebody still reads."""
        return not (self._closed.is_set() or self.context.is_gone())

    def is_ahead(self) -> bool:
        """Whether its reader has to catch up first."""
        return self._pieces.qsize() >= AHEAD

    def put(self, piece: Any) -> None:
        """Hand over a piece."""
        self._pieces.put(piece)
        self.wake()

    def end(self, error: Exception | None = None) -> None:
        """That was all."""
        self._pieces.put(error or _END)
        self.wake()


_Entry = tuple[Stream, Sequence_]


def is_empty(piece: Any) -> bool:
    """Whether it is a text without any: a sign of life, while text is held back or a prompt is taken in."""
    return type(piece) is str and not piece  # of a Piece something is told, if not in its text


def _is_for_caller(piece: Any) -> bool:
    return piece is not None and not is_empty(piece) and not isinstance(piece, FunctionError)


class Made(NamedTuple):
    """What a step made."""

    sequences: int  # that shared it
    pieces: int  # for callers; neither an end nor an empty text is one


class Streams:
    """The streams that are being made; used by the model's thread, others only ask how many, and how long one more will wait."""

    def __init__(self, agent: GuardedAgent, limit: int) -> None:
        """limit: of sequences that share a step."""
        self._agent = agent
        self._limit = limit if agent.shares_steps else 1
        self._active: list[_Entry] = []  # in the order they began in
        self._took_s = Recent()  # those that ended, from start to end

    def room(self) -> tuple[int, int]:
        """How many more may start, by priority; `step` holds batch work for interactive ones.

        An agent that streams one caller at a time goes on with that one to its end.
        """
        free = self._limit - len(self._active)
        if not self._agent.shares_steps:
            return free, free
        return self._limit - sum(stream.context.priority is Priority.INTERACTIVE for stream, _ in self._active), free

    @property
    def active(self) -> int:
        """How many are being made."""
        return len(self._active)

    def has_due(self) -> bool:
        """Whether there is one to go on with; the others wait for their readers."""
        return bool(self._active) and any(not stream.is_ahead() for stream, _ in self._active)

    def wait_s(self, waiting: int) -> float:
        """How long it will be until so many have found places: as places were left of late, or not left until now."""
        oldest = next((stream.began for stream, _ in self._active), math.inf)
        return waiting / self._limit * max(self._took_s.value, time.monotonic() - oldest)

    def start(self, stream_call: StreamCall) -> None:
        """Let one join."""
        stream: Stream = stream_call.stream
        stream.is_held = False
        stream.began = now = time.monotonic()
        context = stream_call.context
        context.timing.setdefault("queue", now - stream_call.arrived)
        if context.spans is not None:
            context.spans.append(Span("queue", stream_call.arrived, now))
        make = self._agent.start if self._agent.shares_steps else self._agent.stream
        self._agent.serving = [context]
        try:
            self._active.append((stream, make(stream_call.input, context.headers)))
        except FunctionError as error:
            stream.end(error)

    def step(self) -> Made:
        """One piece more for each whose reader keeps up; interactive ones first, if there are too many."""
        self._drop_unwanted()
        now = time.monotonic()
        for stream, _ in self._active:
            stream.behind_since = min(stream.behind_since, now) if stream.is_ahead() else math.inf
        due = [entry for entry in self._active if not entry[0].is_ahead()]
        if not due:
            return Made(0, 0)
        due.sort(key=lambda entry: entry[0].context.priority)  # those of a class stay in the order they came in
        for at, (stream, _) in enumerate(due):
            stream.is_held = at >= self._limit
        del due[self._limit :]
        pieces = self._next(due)
        self._hand_over(due, pieces)
        return Made(len(due), sum(_is_for_caller(piece) for piece in pieces))

    def _next(self, entries: list[_Entry]) -> list[Any]:
        """The next piece of each of these: None at its end, or why there is none."""
        self._agent.serving = [stream.context for stream, _ in entries]
        try:
            if not self._agent.shares_steps:
                return [self._agent.advance(entries[0][1])]
            return self._agent.step([sequence for _, sequence in entries])
        except FunctionError as error:
            return [error] if len(entries) == 1 else self._step_apart(entries)

    def _step_apart(self, entries: list[_Entry]) -> list[Any]:
        """Find the culprit: what one sequence does is no business of the others."""
        log.warning("a step of %d sequences failed; taking them one at a time", len(entries))
        return [piece for entry in entries for piece in self._next([entry])]

    def _hand_over(self, entries: list[_Entry], pieces: list[Any]) -> None:
        """Give the pieces to their readers, and forget the streams that have ended."""
        ended: list[_Entry] = []
        for entry, piece in zip(entries, pieces, strict=True):
            stream, sequence = entry
            stream.usage = sequence.usage
            if piece is None or isinstance(piece, FunctionError):
                ended.append(entry)
                stream.end(piece)
            else:
                stream.put(piece)
        self._forget(ended)

    def _drop_unwanted(self) -> None:
        unwanted = [entry for entry in self._active if not entry[0].is_wanted()]
        for stream, _ in unwanted:
            stream.end(ClientGone("the caller has hung up"))
        self._forget(unwanted)

    def _forget(self, entries: list[_Entry]) -> None:
        """Their places are free; what the agent holds for them is freed now, whether they came to their end or not."""
        if entries:
            self._active = [entry for entry in self._active if entry not in entries]
        for stream, sequence in entries:
            self._took_s.add(time.monotonic() - stream.began)
            self._agent.drop(sequence)

    def make_room(self) -> None:
        """Others wait for a place: end the stream whose reader has not read for longest, if that is too long."""
        if self._active:
            slowest = min(self._active, key=lambda entry: entry[0].behind_since)
            if time.monotonic() - slowest[0].behind_since > PATIENCE_S:
                slowest[0].end(TooSlow("the stream was not read while others waited for its place"))
                self._forget([slowest])

    def end(self, error: FunctionError) -> None:
        """End all of them, as the agent is about to go."""
        for stream, _ in self._active:
            stream.end(error)
        self._forget(list(self._active))
