"""What waits for the model, and which of it is next.

Calls wait in two classes, interactive and batch; a batch of inputs is made of one class only, interactive while there is any, so that
batch work delays an interactive caller by the one batch that is running at most. A long call is taken in pieces of a batch each. Streams
of the two classes share steps, see there.

Of an agent that tells how large inputs are, such a batch is cut into parts of like sizes where that saves time, as it is measured: nobody
pays for another's padding, and nobody is computed behind who came after the batch was full. A long call is sorted, too.

Nobody is waited for unless company is likely: if the last batch held several calls, its callers are about to ask again (adaptive batching
as in Clipper, NSDI 2017). That is worth what sharing saves: the part of a batch's time that does not depend on how many are in it. Where
callers take longer than that to be back, they are computed in two halves, one while the other is answered and asks again.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from function.cost import Cost, Recent
from function.errors import ClientGone, TimedOut
from function.parts import Parts, Slice, Taken
from function.priority import Priority

SWEEP_S = 0.02  # between two looks at all that wait for those who do not any more


class Span(NamedTuple):
    """A stretch of a request's time, on `time.monotonic`'s clock."""

    name: str
    began: float
    ended: float
    inputs: int = 0  # that shared it, if it was a batch


@dataclass(slots=True)
class CallContext:
    """What a request says beside its input. Nobody changes it; it is not frozen, as that makes one for each request three times as slow."""

    timeout_s: float
    is_own_deadline: bool = True  # the server's own; False if the caller asked for a shorter one
    priority: Priority = Priority.INTERACTIVE
    is_gone: Callable[[], bool] = lambda: False  # whether the caller has hung up
    request_id: str = ""  # as the log has it
    timing: dict[str, float] = field(default_factory=dict)  # seconds in the queue and in the model, noted as they pass
    spans: list[Span] | None = None  # the same one by one; None if nobody wants to know
    headers: Mapping[str, str] | None = None  # those that the agent asks for, by name in small letters
    sizes: Sequence[float | None] | None = None  # of its inputs, noted once they are answered, if the agent told them

    def late(self, lacking: str = "answer", kind: type[TimedOut] = TimedOut) -> TimedOut:
        """What the caller is told at the deadline."""
        return kind(f"no {lacking} within {self.timeout_s:g} s" + (" (FUNCTION_TIMEOUT_S)" if self.is_own_deadline else ""))


class Reply:
    """What one thread waits for and another one gives, once. Half the price of a Future, which is felt in small calls."""

    __slots__ = ("_claimed", "_given", "_then", "error", "outputs")

    def __init__(self, then: Callable[[], object] | None = None) -> None:
        """then: is called, in the thread that gives, once there is something; without it somebody waits for the `result`."""
        self._claimed = threading.Lock()  # held by whoever settled it
        self._given = threading.Lock()  # held until there is something
        self._given.acquire()
        self._then: Callable[[], object] = then or self._given.release
        self.outputs: list[Any] = []
        self.error: Exception | None = None

    def set(self, outputs: list[Any], error: Exception | None = None) -> None:
        """Give it, unless it is settled."""
        if self._claimed.acquire(blocking=False):
            self.outputs, self.error = outputs, error
            then, self._then = self._then, _nothing  # which may refer to us: it is not left to the garbage collector
            then()

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._claimed.acquire(blocking=False)

    def is_settled(self) -> bool:
        """Whether it was given or cancelled."""
        return self._claimed.locked()

    def result(self, timeout_s: float) -> list[Any]:
        """The outputs. Raises the error that was given, or TimeoutError."""
        if not self._given.acquire(timeout=timeout_s):
            raise TimeoutError
        if self.error:
            raise self.error
        return self.outputs


def _nothing() -> None:
    """Once a reply is given."""


@dataclass(eq=False)
class Call:
    """Inputs that want outputs."""

    inputs: Sequence[Any]
    context: CallContext
    arrived: float
    outputs: list[Any] = field(default_factory=list)
    answered: int = 0  # inputs that have their output
    taken: int = 0  # inputs that were handed to the model, or are about to be
    sizes: Sequence[float | None] | None = None  # of its inputs, once they are told; None of one that is not known
    order: Sequence[int] | None = None  # in which its inputs are taken, if it is not their own
    reply: Reply = field(default_factory=Reply)
    parameters: Mapping[str, Any] | None = None  # what the request says in "parameters"
    group: bytes = b""  # which parameters and headers these are: calls in a batch have the same

    def is_over(self, now: float) -> bool:
        """Whether nobody waits for it any more; says so to whoever does."""
        if self.reply.is_settled():
            return True
        if self.context.is_gone():
            self.fail(ClientGone("the caller has hung up"))
        elif now >= self.arrived + self.context.timeout_s:
            self.fail(self.context.late())
        return self.reply.is_settled()

    def add(self, outputs: Sequence[Any], at: Sequence[int] | None = None) -> None:
        """The outputs of the inputs at these places, or else the next ones; with the last one the caller is answered."""
        self.outputs = self.outputs or [None] * len(self.inputs)
        for place, output in zip(at if at is not None else range(self.answered, self.answered + len(outputs)), outputs, strict=True):
            self.outputs[place] = output
        self.answered += len(outputs)
        if self.answered == len(self.inputs):
            self.reply.set(self.outputs)

    def fail(self, error: Exception) -> None:
        """Tell the caller, if it has not given up."""
        self.reply.set([], error)


@dataclass(eq=False)
class StreamCall:
    """An input that wants a stream."""

    input: Any
    context: CallContext
    arrived: float
    stream: Any

    def is_over(self, now: float) -> bool:
        """Whether nobody waits for it any more; says so to whoever does."""
        if not self.stream.is_wanted():
            self.stream.end(ClientGone("the caller has hung up"))
        elif now >= self.arrived + self.context.timeout_s:
            self.stream.end(self.stream.late())
        else:
            return False
        return True


class Batcher:
    """The queue in front of one model: filled from any thread, emptied by the model's."""

    def __init__(self, *, max_batch: int, wait_s: float, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """max_batch: inputs; wait_s: the longest wait for company; limit: calls of each class, streams too, that may wait, beside what is
        computed: batch work keeps no interactive caller out."""
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._limit = limit
        self._clock = clock
        self._lock = threading.Condition()  # guards what follows
        self._calls: tuple[deque[Call], deque[Call]] = deque(), deque()  # by priority, as all of these
        self._stream_calls: tuple[deque[StreamCall], deque[StreamCall]] = deque(), deque()
        self._inputs = [0, 0]  # that wait
        self._is_stopped = False
        self._swept = -math.inf  # when those who do not wait any more were last looked for
        self._is_idle = True  # nothing is being computed, so that the model takes what comes at once
        self._company = 1  # calls in the last batch
        self._others = 0  # calls that waited at its end
        self._away = 0  # of its callers, those who have not asked again since
        self._ended = 0.0  # when it was computed
        self._back_s = Recent()  # from there until all had asked again
        self._cost = Cost()
        self.places = max_batch  # streams that an idle model lets begin at once
        self.parts = Parts()  # of batches that were taken; the model's thread's

    def put(self, item: Call | StreamCall) -> bool:
        """Queue it; False if too many wait already."""
        with self._lock:
            priority = item.context.priority
            if self.is_full(priority):
                return False
            if isinstance(item, Call):
                self._calls[priority].append(item)
                self._inputs[priority] += len(item.inputs)
                self._away -= 1
                if self._away == 0:
                    self._back_s.add(self._clock() - self._ended)
            else:
                self._stream_calls[priority].append(item)
            self._lock.notify_all()
            return True

    def is_full(self, priority: Priority) -> bool:
        """Whether no more of a class may wait. What an idle model takes at once does not count, although on a busy machine its thread
        comes late."""
        if self._waiting_of(priority) < self._limit:
            return False
        with self._lock:
            self._sweep()
            return self._waiting_of(priority) - self._taken_at_once(priority) >= self._limit

    def _taken_at_once(self, priority: Priority) -> int:
        """How many of those of a class that wait an idle model takes together: those that fit into its next batch, or else the streams
        there is a place for."""
        if not self._is_idle or any(self._waiting_of(first) for first in Priority if first < priority):
            return 0
        room, calls = self._max_batch, 0
        for call in self._calls[priority]:
            room -= len(call.inputs) - call.taken
            if room < 0:
                break
            calls += 1
        return calls or min(len(self._stream_calls[priority]), self.places)

    def _waiting_of(self, priority: Priority) -> int:
        return len(self._calls[priority]) + len(self._stream_calls[priority])

    def waiting(self) -> int:
        """Calls and stream_calls that wait."""
        (interactive, batch), (first, last) = self._calls, self._stream_calls
        return len(interactive) + len(batch) + len(first) + len(last)  # asked several times for each request

    def ahead(self, priority: Priority) -> tuple[int, int]:
        """Inputs and stream calls that wait, and that would be before one more of a class."""
        return sum(self._inputs[: priority + 1]), sum(map(len, self._stream_calls[: priority + 1]))

    def wait(self) -> None:
        """Until something is there, or nothing will come any more; the model is idle."""
        with self._lock:
            self._is_idle = not self.parts
            self._lock.wait_for(lambda: self._is_stopped or bool(self.parts) or any(self._calls) or any(self._stream_calls))

    def wait_for_calls(self, seconds: float) -> None:
        """The same for a moment, while it has streams that wait for their readers: those that want to begin may find no place."""
        with self._lock:
            self._is_idle = not self.parts
            self._lock.wait_for(lambda: self._is_stopped or bool(self.parts) or any(self._calls), seconds)

    def stop(self) -> None:
        """Nothing will come any more: nobody waits for it."""
        with self._lock:
            self._is_stopped = True
            self._lock.notify_all()

    def computed(self, inputs: int, seconds: float, *, is_idle: bool) -> None:
        """A batch is done; its callers are about to be told. is_idle: the model takes the next at once."""
        self._cost.add(inputs, seconds)
        self.parts.computed(seconds)
        with self._lock:
            self._others, self._away, self._ended = sum(map(len, self._calls)), self._company, self._clock()
            self._is_idle = is_idle and not self.parts

    def batch(self, *, may_wait: bool) -> list[Slice]:
        """The next inputs for the model, empty if none wait. may_wait: for company, if it is likely; otherwise there are none until it is
        there, or has had its time, as the model has something else to do."""
        parts = self.parts
        with self._lock:
            most = self._max_batch if parts else self._gather(may_wait=may_wait)
            for priority in Priority:
                taken = [] if parts.of(priority) else list(self._take(priority, most))
                if taken or parts.of(priority):
                    break
            self._is_idle = self._is_idle and not taken
            if self.waiting():  # whose turn may be far off
                self._sweep()
        if taken:
            parts.add(priority, taken)
        slices = parts.next(priority, self._clock())
        self._company = len(slices) or self._company
        return slices

    def _gather(self, *, may_wait: bool) -> int:
        """Wait for company, if that is likely; returns of how many calls a batch is to be at most, 0 if it has to wait longer."""
        if self._company < 2 or not any(self._calls):
            return self._max_batch
        everybody, fixed_s = self._company + self._others, self.parts.fixed_s
        saved_s = self._cost.fixed_s if fixed_s is None else fixed_s
        patience_s = min(self._wait_s, saved_s)
        if not may_wait:
            return self._max_batch if self._clock() >= self._ended + patience_s or self._are_here(everybody) else 0
        if not self.parts.was_cut and saved_s < self._back_s.value < self._cost.mean_s:
            return math.ceil(everybody / 2)
        # Not from when the oldest call came: one that missed the last batch would then be taken alone, and its company after it, for ever
        # in turn, although all are there within a moment.
        self._lock.wait_for(lambda: self._are_here(everybody), patience_s)
        return self._max_batch

    def _are_here(self, everybody: int) -> bool:
        return sum(map(len, self._calls)) >= everybody or sum(self._inputs) >= self._max_batch

    def _sweep(self) -> None:
        """Drop what nobody waits for any more, wherever it stands: it would keep others out."""
        now = self._clock()
        if now < self._swept + SWEEP_S:
            return
        self._swept = now
        for priority, calls in enumerate(self._calls):
            self._inputs[priority] -= sum(len(call.inputs) - call.taken for call in _sift(calls, now))
        for stream_calls in self._stream_calls:
            _sift(stream_calls, now)

    def _take(self, priority: Priority, most: int) -> Iterator[Taken]:
        """What fits into a batch, of so many calls at most, all of one group: calls, and from which of its inputs up to which."""
        queue, room, now = self._calls[priority], self._max_batch, self._clock()
        first: Call | None = None
        while queue and room and most:
            call = queue[0]
            if call.is_over(now):
                self._inputs[priority] -= len(call.inputs) - call.taken
                queue.popleft()
                continue
            if first and first.group != call.group:
                return
            first = first or call
            most -= 1
            start, call.taken = call.taken, min(call.taken + room, len(call.inputs))
            room -= call.taken - start
            self._inputs[priority] -= call.taken - start
            if call.taken == len(call.inputs):
                queue.popleft()
            yield call, start, call.taken

    def has_stream_calls(self) -> bool:
        """Whether streams wait for a place."""
        return any(self._stream_calls)

    def stream_calls(self, room: Sequence[int]) -> list[StreamCall]:
        """The next streams to start. room: by priority, so many at most once there is one of that class among them."""
        taken: list[StreamCall] = []
        if not any(self._stream_calls):
            return taken
        with self._lock:
            now = self._clock()
            for queue, most in zip(self._stream_calls, room, strict=True):
                while queue and len(taken) < most:
                    stream_call = queue.popleft()
                    if not stream_call.is_over(now):
                        taken.append(stream_call)
                for stream_call in queue:
                    stream_call.stream.is_held = True
            self._is_idle = self._is_idle and not taken
            return taken


_Item = TypeVar("_Item", Call, StreamCall)


def _sift(queue: deque[_Item], now: float) -> list[_Item]:
    """Take those out that are over; returns them."""
    kept: list[_Item] = []
    over: list[_Item] = []
    for item in queue:
        (over if item.is_over(now) else kept).append(item)
    if over:
        queue.clear()
        queue.extend(kept)
    return over
