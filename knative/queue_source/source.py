"""From the queue to the sink: who holds a message, for how long, and what becomes of it.

Pollers receive no more than there is room for. A worker has a message from then on: it makes the event, posts it, posts it again while the
sink is busy or away, and says what becomes of the message at last. Settlers delete, or give back, in batches. The keeper extends what is
held, from the receive until the queue has confirmed the end, and cuts posts that take too long. All measure time by the monotonic clock,
and each is a thread that ends with the source.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from knative.queue_source import event, results, unwrap, verdict
from knative.queue_source.claim import Claims, reference
from knative.queue_source.connection import Answer
from knative.queue_source.errors import (
    ClaimUnavailable,
    NoAnswer,
    QueueSourceError,
    QueueUnavailable,
    ResultRefused,
    SinkAway,
    Unacceptable,
)
from knative.queue_source.event import Event
from knative.queue_source.holding import Held, Holding, Lease
from knative.queue_source.keeper import Keeper
from knative.queue_source.metrics import Metrics
from knative.queue_source.queue import Message, Queue, Results
from knative.queue_source.settings import QueueSourceSettings
from knative.queue_source.settler import Settler
from knative.queue_source.sink import Call, Sink
from knative.queue_source.threads import Threads
from knative.queue_source.verdict import Verdict
from knative.queue_source.workers import Workers

log = logging.getLogger("relight.queue")

MOST = 10  # messages of one receive
MOST_POLLERS = 4
DELETERS = 2
LONGEST_POLL_PAUSE_S = 5.0
RELEASE_TRIES = 8  # then its visibility runs out by itself
LAST_S = 5.0  # at a stop, for giving back what was cut


def pollers(concurrency: int) -> int:
    """How many receives are under way at a time: while one brings ten messages, ten others are worked on; a few at most."""
    return min(-(-concurrency // (2 * MOST)), MOST_POLLERS)


class Source:
    """A running queue source, from `start` to `stop`."""

    def __init__(
        self,
        settings: QueueSourceSettings,
        messages: Queue,
        sink: Sink,
        *,
        claims: Claims | None = None,
        results: Results | None = None,
        threads: Threads | None = None,
    ) -> None:
        """claims: None leaves references to objects as they are. threads: the program's; the source's own if it is not given."""
        self._settings = settings
        self._queue = messages
        self._sink = sink
        self._claims = claims
        self._results = results
        self._layers = () if settings.unwrap == "none" else tuple(settings.unwrap.split(","))
        self._extensions = settings.extensions
        self._holding = Holding(settings.concurrency, settings.visibility_s, messages.longest_hold_s)
        self.metrics = Metrics(self._holding.gauges)
        self.threads = threads or Threads()
        self._workers = Workers(self._handle, limit=settings.concurrency, spawn=self.threads.start)
        self._deletes = Settler[Held]("delete", self._delete, threads=DELETERS)
        self._releases = Settler[_Release]("give back", self._release, threads=1)
        self._keeper = Keeper(self._holding, messages, self.metrics, settings.visibility_s)
        self._pollers: list[threading.Thread] = []
        self._stopped = threading.Event()
        self.is_ready = False  # the queue answers

    # From start to stop

    def start(self) -> None:
        """Begin to pull, from a queue that is open."""
        self.is_ready = True
        self._deletes.start(self.threads.start)
        self._releases.start(self.threads.start)
        self.threads.start("keep", self._keeper.run)
        for _ in range(pollers(self._settings.concurrency)):
            self._pollers.append(self.threads.start("poll", self._poll))

    def stop(self) -> None:
        """Pull nothing more, finish what can be finished within the time for it, give back the rest, and end the threads."""
        end = time.monotonic() + self._settings.drain_s
        self._holding.stop()
        self._stopped.set()
        for poller in self._pollers:  # what a long poll still brings is given back
            poller.join(max(end - time.monotonic(), self._settings.wait_s + 1.0))
        if not self._holding.wait_empty(max(end - time.monotonic(), 0)):
            for held in self._holding.all():
                if call := held.call:
                    call.cut()
            if not self._holding.wait_empty(LAST_S):
                log.warning("%d messages could not be given back; they come back when their visibility runs out", len(self._holding.all()))
        for part in (self._workers, self._deletes, self._releases, self._keeper):
            part.stop()
        self.threads.start("close", self._close).join(LAST_S)  # which a service that stalls does not answer

    def _close(self) -> None:
        self._sink.close()
        self._queue.close()
        if self._results:
            self._results.close()

    # Receiving

    def _poll(self) -> None:
        failures = 0
        while room := self._holding.take_room(MOST):
            found: list[Message] = []
            try:
                found = self._queue.receive(room, self._settings.wait_s)
                self.is_ready = True
                failures = 0
            except QueueUnavailable as error:
                self.is_ready = False
                failures += 1
                self.metrics.queue_errors.inc()
                pause_s = verdict.backoff_s(failures, 0.1, LONGEST_POLL_PAUSE_S)
                log.warning("receive: %s; again in %.2f s", error, pause_s)
                self._stopped.wait(pause_s)
            finally:
                self._holding.give_room(room - len(found))
            self._admit(found)

    def _admit(self, messages: Sequence[Message]) -> None:
        """Have them worked on, each once."""
        self.metrics.received.inc(len(messages))
        fresh = []
        for message in messages:
            added = self._holding.add(message)
            if added is None:  # the delete of an earlier delivery did not reach the queue, or came too late for it
                held = Held(message, self._settings.visibility_s, self._queue.longest_hold_s)
                held.lease = Lease.DELETING
                self._deletes.put([held])
            elif added[1]:
                fresh.append(added[0])
        self.metrics.repeated.inc(len(messages) - len(fresh))
        self._workers.put(fresh)

    # Working

    def _handle(self, held: Held) -> None:
        """See a message through."""
        try:
            made = self._event(held)
        except Unacceptable as error:
            self._poison(held, str(error))
            return
        except ClaimUnavailable as error:
            self._failed(held, str(error))
            return
        except Exception as error:  # a message that trips over a mistake of ours must not stop the others
            log.exception("%s: cannot be made an event", held.message.id)
            self._poison(held, repr(error))
            return
        if made is None:
            self._done(held)
        else:
            self._see_through(held, made)

    def _see_through(self, held: Held, made: Event) -> None:
        tries, not_before = 0, 0.0
        while self._holding.wait_turn(held, not_before):
            tries += 1
            try:
                answer = self._post(held, made)
            except SinkAway as error:
                not_before = self._turned_away(held, tries, None, str(error))
                continue
            except NoAnswer as error:
                self._failed(held, str(error))
                return
            decided = verdict.of_status(answer.status)
            if decided is Verdict.BUSY:
                asked_s = verdict.retry_after_s(answer.headers.get("retry-after"), answer.headers.get("date"), time.time())
                not_before = self._turned_away(held, tries, asked_s, f"the sink is busy ({answer.status})")
                continue
            self._holding.taken(held)
            if decided is Verdict.DONE:
                self._answered(held, answer, made)
            elif decided is Verdict.POISON:
                self._poison(held, f"the sink said {_said(answer)}")
            else:
                self._failed(held, f"the sink said {_said(answer)}")
            return
        self._give_back(held, 0.0)

    def _event(self, held: Held) -> Event | None:
        """The event of a message; None if it is nobody's work. Raises Unacceptable or ClaimUnavailable."""
        message = held.message
        content = unwrap.unwrap(unwrap.Content(message.body, message.attributes), self._layers)
        if content.is_test:
            return None
        data, content_type, attributes = content.data, None, content.attributes
        if self._claims and (uri := reference(data, attributes)):
            if not self._holding.reserve(held, self._claims.max_bytes):
                raise ClaimUnavailable(f"{uri}: not fetched before the end")
            data, content_type = self._claims.fetch(uri)
            self._holding.fetched(held, len(data))
            attributes = {**attributes, "dataref": uri}
        return event.make(
            message,
            source=self._queue.source,
            type=self._settings.type,
            extensions=self._extensions,
            data=data,
            content_type=content_type,
            subject=content.subject,
            attributes=attributes,
        )

    def _post(self, held: Held, made: Event) -> Answer:
        held.cut_at = time.monotonic() + self._settings.timeout_s
        held.call = Call()
        try:
            return self._sink.post(made, held.call)
        finally:
            held.call = None

    def _turned_away(self, held: Held, tries: int, asked_s: float | None, why: str) -> float:
        """The sink cannot take a message now; returns the time at which it is to be tried again."""
        pause_s = verdict.pause_s(tries, asked_s)
        self.metrics.retried.inc()
        log.log(logging.WARNING if tries == 1 else logging.INFO, "%s: %s; kept, again in %.1f s", held.message.id, why, pause_s)
        self._holding.turned_away(held, pause_s)
        return time.monotonic() + pause_s

    def _answered(self, held: Held, answer: Answer, made: Event) -> None:
        """The sink has done it: send its reply on, then delete the message."""
        try:
            if self._results and not self._sent(held, answer, made):
                self._give_back(held, 0.0)
                return
        except ResultRefused as error:
            self._poison(held, str(error))
            return
        self._done(held)

    def _sent(self, held: Held, answer: Answer, made: Event) -> bool:
        """Whether the reply is in the results queue, or there was none; False if it is time to stop. Raises ResultRefused."""
        assert self._results is not None
        reply = results.reply_event(answer.headers, answer.body)
        if reply is None:
            return True
        failures = 0
        while True:
            try:
                self._results.send(reply, held.message, f"{made.attributes['source']} {made.attributes['id']}")
            except QueueUnavailable as error:
                failures += 1
                self.metrics.queue_errors.inc()
                pause_s = verdict.backoff_s(failures, 0.1, LONGEST_POLL_PAUSE_S)
                log.warning("%s: its result could not be sent: %s; again in %.1f s", held.message.id, error, pause_s)
                if self._stopped.wait(pause_s) or held.lease is Lease.LOST:
                    return False
            else:
                self.metrics.results.inc()
                return True

    # What becomes of a message

    def _done(self, held: Held) -> None:
        held.lease = Lease.DELETING  # also what was lost: SQS takes an old receipt as long as nobody has a newer one
        self._deletes.put([held])

    def _poison(self, held: Held, why: str) -> None:
        """At once, so that the redrive policy has its say soon; slowly where there may be none, since it would go round for ever."""
        self.metrics.poison.inc()
        delay_s = 0.0 if self._queue.dead_letters else self._backoff_s(held)
        log.error("%s: can never succeed: %s; given back (receive %d)", held.message.id, why, held.message.receives)
        self._give_back(held, delay_s)

    def _failed(self, held: Held, why: str) -> None:
        delay_s = self._backoff_s(held)
        log.warning("%s: %s; given back for %.1f s (receive %d)", held.message.id, why, delay_s, held.message.receives)
        self._give_back(held, delay_s)

    def _backoff_s(self, held: Held) -> float:
        return verdict.backoff_s(held.message.receives, self._settings.backoff_s, self._settings.backoff_max_s)

    def _give_back(self, held: Held, delay_s: float) -> None:
        if held.lease is Lease.LOST:
            self._holding.remove([held])
            return
        held.lease = Lease.RELEASING
        self._releases.put([_Release(held, delay_s)])

    def _delete(self, batch: Sequence[Held]) -> list[Held]:
        by_message = {held.message: held for held in batch}
        outcome = self._queue.delete(list(by_message))
        again = {by_message[message] for message in outcome.again}
        done = [held for held in batch if held not in again]
        self.metrics.done.inc(len(done))
        self._holding.remove(done, done=True)
        return list(again)

    def _release(self, batch: Sequence["_Release"]) -> list["_Release"]:
        waiting = [item for item in batch if item.held.extending]  # a heartbeat that arrives later would undo it
        ready = {item.held.message: item for item in batch if not item.held.extending}
        again: list[_Release] = []
        if ready:
            try:
                outcome = self._queue.release([(message, item.delay_s) for message, item in ready.items()])
                again = [ready[message] for message in outcome.again]
            except QueueUnavailable as error:
                self.metrics.queue_errors.inc()
                log.warning("give back: %s", error)
                again = list(ready.values())
        for item in again:
            item.tries += 1
        again = [item for item in again if item.tries < RELEASE_TRIES]
        over = [item.held for item in ready.values() if item not in again]
        self.metrics.given_back.inc(len(over))
        self._holding.remove(over)
        return again + waiting


class _Release:
    """A message on its way back."""

    __slots__ = ("delay_s", "held", "tries")

    def __init__(self, held: Held, delay_s: float) -> None:
        self.held = held
        self.delay_s = delay_s
        self.tries = 0


def _said(answer: Answer) -> str:
    text = answer.body[:200].decode(errors="replace").strip()
    return f"{answer.status}" + (f" {text}" if text else "")


def open_until(opening: Callable[[], None], what: str, told_to_stop: threading.Event, threads: Threads) -> bool:
    """Open a queue, again and again while its service is away; False when it is time to stop.

    Raises QueueSourceError for what does not pass.
    """
    failures = 0
    while True:
        opened = _Opening(opening)
        thread = threads.start("open", opened.run)  # a service that stalls keeps it for longer than a stop may take
        while thread.is_alive():
            if told_to_stop.is_set():
                return False
            thread.join(0.05)
        if opened.is_open:
            return True
        if not opened.failure:
            raise QueueSourceError(f"{what}: cannot be opened: {threads.failure}")
        if not isinstance(opened.failure, QueueUnavailable):
            raise opened.failure
        failures += 1
        pause_s = verdict.backoff_s(failures, 0.5, LONGEST_POLL_PAUSE_S)
        log.warning("%s: %s; again in %.1f s", what, opened.failure, pause_s)
        if told_to_stop.wait(pause_s):
            return False


class _Opening:
    """One try."""

    def __init__(self, opening: Callable[[], None]) -> None:
        self.is_open = False
        self.failure: QueueSourceError | None = None
        self._opening = opening

    def run(self) -> None:
        try:
            self._opening()
            self.is_open = True
        except QueueSourceError as error:
            self.failure = error
