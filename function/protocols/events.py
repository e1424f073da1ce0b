"""CloudEvents at `POST /`: an event in, a reply event out, in the request's mode.

The same event is one that has the same `source`, `id`, `type` and data and comes from the same caller: one that was finished is answered
with the reply that it got, one that is being worked on waits for that, and neither reaches the model again (see `memory`). Whoever sends
other data, or has another key or token, gets an answer of their own.

Statuses are what Knative acts upon: 2xx only when the work is done, 400 for what would fail again (it is not sent again), 503, 504 and
429 for what may go well later.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import flask

from function.batcher import CallContext
from function.errors import AgentFailed, BadInput, ClientGone, FunctionError, TimedOut, Unavailable, UnsupportedMediaType
from function.http import Function
from function.memory import Memory, Work
from function.priority import Priority
from function.protocols.cloudevents import (
    BATCH,
    BATCH_PREFIX,
    EVENT,
    PREFIX,
    Event,
    Reply,
    canonical,
    from_batch,
    from_http,
    from_json,
    reply_to,
    short,
)

_LOOK_S = 1.0  # how often who waits for somebody else's outcome looks whether its own caller is still there

Outcome = Reply | FunctionError
_WorkOn = Callable[[list[int]], Iterator[tuple[int, Outcome]]]  # events, by their numbers, to what becomes of each


class Events:
    """Answers the events that come to one function."""

    def __init__(self, function: Function, source: str) -> None:
        """source: the replies' own."""
        settings = function.settings
        self._function = function
        self._source = source
        self._memory: Memory[Reply] = Memory(
            entries=settings.event_memory, size_bytes=settings.event_memory_bytes, keep_s=settings.event_memory_s
        )
        self._waiting = threading.BoundedSemaphore(settings.queue_limit)  # duplicates that wait for the first one's outcome
        function.metrics.watch_memory(self._memory.kept)

    def answer(self) -> flask.Response:
        """The reply to the request's events.

        Raises BadInput, UnsupportedMediaType for an event format other than JSON, and what Function.body and Model.predict do. Of a batch
        all is done, or it raises: BadInput if an event is not valid (then none was run) or the agent cannot use one, otherwise Unavailable.
        """
        kind = flask.request.mimetype
        if not kind.startswith(PREFIX):
            return self._one(from_http(flask.request.headers, self._function.body(), self._function.parse)).in_binary()
        if kind not in (PREFIX, EVENT, BATCH_PREFIX, BATCH):
            raise UnsupportedMediaType(f"events in the format {kind!r} are not understood here; send {EVENT} or {BATCH}")
        document = self._function.parse(self._function.body())
        if not kind.startswith(BATCH_PREFIX):
            return flask.Response(self._one(from_json(document, self._function.parse)).in_json(), content_type=EVENT)
        replies = [reply.in_json() for reply in self._all(from_batch(document, self._function.parse))]
        return flask.Response(b"[" + b",".join(replies) + b"]", content_type=BATCH)

    def _one(self, event: Event) -> Reply:
        """The reply to an event that came alone."""
        patience = _Patience(self._function.context(event.urgency))

        def work(_: list[int]) -> Iterator[tuple[int, Outcome]]:
            try:
                outputs = self._function.predict(event.question, patience.context())
                yield 0, reply_to(self._source, event, outputs)
            except FunctionError as error:
                yield 0, error

        (outcome,) = self._outcomes([event], patience, work)
        if isinstance(outcome, FunctionError):
            raise outcome
        return outcome

    def _all(self, events: Sequence[Event]) -> list[Reply]:
        """The reply to each event of a batch, all within the one deadline of the request."""
        total, most = sum(len(event.question.inputs) for event in events), self._function.settings.max_inputs
        if total > most:
            raise BadInput(f"{total} inputs in one batch of events; at most {most} (FUNCTION_MAX_INPUTS)")
        patience = _Patience(self._function.context())
        outcomes = self._outcomes(events, patience, lambda numbers: self._work(events, numbers, patience))
        failed = {number: outcome for number, outcome in enumerate(outcomes) if isinstance(outcome, FunctionError)}
        if not failed:
            return [outcome for outcome in outcomes if isinstance(outcome, Reply)]
        bad = {number: error for number, error in failed.items() if isinstance(error, BadInput)}
        if bad:
            raise BadInput(f"{_told(events, bad)}; leave out what is bad and send the rest of the batch again")
        retry_after_s = max(error.retry_after_s or 1 for error in failed.values())
        raise Unavailable(f"{_told(events, failed)}; send the batch again", retry_after_s)

    def _outcomes(self, events: Sequence[Event], patience: "_Patience", work: "_WorkOn") -> list[Outcome]:
        """What became of each event: `work` is asked for those that nobody has begun, the others are looked up or awaited.

        Ours are done before any is awaited, so that two batches that have events in common do not wait for each other; and each is
        remembered as soon as it is done, whatever becomes of the rest.
        """
        found: dict[int, Outcome] = {}
        keys = [event.key(patience.sender(flask.g.caller)) for event in events]
        while left := [number for number in range(len(events)) if number not in found]:
            begun = {number: self._memory.claim(keys[number]) for number in left}
            ours = {number: one for number, (one, is_ours) in begun.items() if is_ours}
            try:
                for number, outcome in work(list(ours)) if ours else ():
                    found[number] = outcome
                    self._settle(ours.pop(number), outcome)
            finally:
                for one in ours.values():
                    self._memory.fail(one)
            for number, (one, is_ours) in begun.items():
                if not is_ours and (awaited := self._await(one, patience)):
                    found[number] = awaited
        return [found[number] for number in range(len(events))]

    def _settle(self, work: Work[Reply], outcome: Outcome) -> None:
        if isinstance(outcome, Reply):
            self._memory.finish(work, outcome)
        else:  # who was impatient, or has gone, speaks for itself alone
            self._memory.fail(work, None if isinstance(outcome, TimedOut | ClientGone) else outcome)

    def _await(self, work: Work[Reply], patience: "_Patience") -> Outcome | None:
        """What becomes of an event that came before; None if that was given up, and it is ours to do. Raises ClientGone."""
        metrics, limit = self._function.metrics, self._function.settings.queue_limit
        how = "remembered" if work.is_over() else "joined"
        if not work.is_over():
            if not self._waiting.acquire(blocking=False):
                return Unavailable(
                    f"{limit} repeated events are waiting already for what becomes of the first ones (FUNCTION_QUEUE_LIMIT)", 1
                )
            try:
                with metrics.duplicates_waiting.track_inprogress():
                    if late := patience.wait(work):
                        return late
            finally:
                self._waiting.release()
        if work.reply:
            metrics.duplicates.labels(how).inc()
            return work.reply
        return work.error if isinstance(work.error, FunctionError) else None

    def _work(self, events: Sequence[Event], numbers: Sequence[int], patience: "_Patience") -> Iterator[tuple[int, Outcome]]:
        """What becomes of these events of a batch: they go to the model in whole batches of its own, interactive ones first."""
        self._function.metrics.instances.inc(sum(len(events[number].question.inputs) for number in numbers))
        for priority in Priority:
            chosen = [number for number in numbers if patience.priority_of(events[number]) is priority]
            for group in _groups(events, chosen, self._function.settings.max_batch):
                yield from self._group(events, group, patience, priority)

    def _group(self, events: Sequence[Event], group: list[int], patience: "_Patience", priority: Priority) -> Iterator[tuple[int, Outcome]]:
        """The reply to each event of a group, or the error it fails with; halved until the culprit is alone. Raises ClientGone."""
        inputs, parameters = [item for number in group for item in events[number].question.inputs], events[group[0]].question.parameters
        try:
            outputs = iter(self._function.model.predict(inputs, patience.context(priority), parameters))
        except ClientGone:
            raise
        except (BadInput, AgentFailed) as error:
            if len(group) == 1:
                yield group[0], error
                return
            half = len(group) // 2
            yield from self._group(events, group[:half], patience, priority)
            yield from self._group(events, group[half:], patience, priority)
        except FunctionError as error:
            yield from ((number, patience.late() if isinstance(error, TimedOut) else error) for number in group)
        else:
            for number in group:
                share = [next(outputs) for _ in events[number].question.inputs]
                yield number, reply_to(self._source, events[number], share)


def _groups(events: Sequence[Event], numbers: Sequence[int], room: int) -> Iterator[list[int]]:
    """Events of the same parameters that fill a batch of the model together; one that is larger stands alone."""
    group: list[int] = []
    taken = 0
    for number in numbers:
        asked = events[number].question
        size = len(asked.inputs)
        if group and (taken + size > room or canonical(asked.parameters) != canonical(events[group[0]].question.parameters)):
            yield group
            group, taken = [], 0
        group.append(number)
        taken += size
    if group:
        yield group


class _Patience:
    """One deadline for all that is done and awaited for a request."""

    def __init__(self, context: CallContext) -> None:
        self._context = context
        self._began = time.monotonic()
        self._is_whole = True  # nothing of the time is used up

    def sender(self, caller: str) -> str:
        """Who has called with which of the headers that the agent asks for: with others its answer may be another."""
        headers = self._context.headers
        return f"{caller}\0{canonical(headers)}" if headers else caller

    def priority_of(self, event: Event) -> Priority:
        """Whether it may wait for interactive ones. The request's own priority counts where the event's is silent."""
        return self._context.priority if event.urgency is None else Priority.of_urgency(event.urgency)

    def context(self, priority: Priority | None = None) -> CallContext:
        """For the next call; others may have used up some of the time. Raises TimedOut when it is up."""
        context = self._context if priority is None else replace(self._context, priority=priority)
        if self._is_whole:
            self._is_whole = False
            return context
        left_s = self._left_s()
        if left_s <= 0:
            raise self.late()
        return replace(context, timeout_s=left_s, is_own_deadline=False)

    def wait(self, work: Work[Reply]) -> TimedOut | None:
        """Until it is over, or else what is said when the time is up. Raises ClientGone."""
        self._is_whole = False
        while not work.wait(min(_LOOK_S, self._left_s())):
            if self._context.is_gone():
                raise ClientGone("the caller has hung up")
            if self._left_s() <= 0:
                return self.late()
        return None

    def late(self) -> TimedOut:
        """What is said when the time is up."""
        return self._context.late()

    def _left_s(self) -> float:
        return self._began + self._context.timeout_s - time.monotonic()


def _told(events: Sequence[Event], failed: Mapping[int, FunctionError]) -> str:
    """Which events failed and why; the first few."""
    said = [f"event {number} (id {short(events[number].attributes['id'])}): {error}" for number, error in list(failed.items())[:5]]
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    return f"{len(failed)} of the {len(events)} events failed (they count from 0): " + "; ".join(said) + more
