"""RabbitMQ: quorum queues, whose `x-delivery-count` tells how often a message was delivered and whose `x-delivery-limit` parks it.

A message is ours until its channel closes, so a heartbeat has nothing to do here; but the broker closes a channel that owes it an answer
for too long (`consumer_timeout`, 30 minutes), and all that is held then is delivered again. So everything that was delivered, be it held,
waiting to be taken, or given back, is answered before. RabbitMQ cannot be asked to deliver a message later: one that is given back with a
delay stays here, unacknowledged, until then, and counts among those that this consumer may have.
"""

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pika
from pika.exceptions import AMQPError, ChannelClosedByBroker, NackError, UnroutableError

from knative.queue_source.errors import QueueSourceError, QueueUnavailable
from knative.queue_source.queue import Message, Outcome
from knative.queue_source.threads import Threads

log = logging.getLogger("relight.queue")

CONNECT_S = 5.0
CALL_S = 5.0
LONGEST_HOLD_S = 1700.0  # of the broker's 30 minutes
LOOK_S = 1.0  # between two looks whether something has waited too long to be taken
_NOT_FOUND = 404
_ERRORS = (AMQPError, OSError)


def parse(url: str) -> tuple[Any, str, str]:
    """(connection parameters, queue, the queue's URI without user and password) of `amqp(s)://user:password@host/vhost/queue`."""
    parts = urlsplit(url)
    names = parts.path.removeprefix("/").split("/")
    vhost, queue = ("%2F", names[0]) if len(names) == 1 else (names[0] or "%2F", "/".join(names[1:]))
    where = parts.netloc.rpartition("@")[2]
    parameters = pika.URLParameters(f"{parts.scheme}://{parts.netloc}/{vhost}")
    parameters.socket_timeout = parameters.stack_timeout = CONNECT_S
    parameters.blocked_connection_timeout = CALL_S
    return parameters, unquote(queue), f"{parts.scheme}://{where}/{vhost}/{quote(unquote(queue), safe='')}"


class RabbitQueue:
    """A queue that messages are received from, over one connection that a thread of its own looks after."""

    longest_hold_s = LONGEST_HOLD_S
    dead_letters: bool | None = None  # AMQP does not tell

    def __init__(self, url: str, *, prefetch: int, threads: Threads) -> None:
        """prefetch: the most messages that are unacknowledged at a time."""
        self._threads = threads
        self._parameters, self._name, self.source = parse(url)
        self._prefetch = prefetch
        self._lock = threading.Condition()  # guards what follows
        self._arrived: deque[Message] = deque()
        self._unsettled: set[tuple[int, int]] = set()  # handles; settling one twice would end the channel and all that is held with it
        self._connection: Any = None
        self._channel: Any = None
        self._era = 0  # grows with each connection: delivery tags are of one
        self._closing = False

    def open(self) -> None:
        """Connect and consume. Raises QueueSourceError if there is no such queue."""
        self._connect()
        self._threads.start("rabbitmq", self._serve)

    def receive(self, limit: int, wait_s: int) -> list[Message]:
        """At most `limit`, none after `wait_s` seconds."""
        with self._lock:
            self._lock.wait_for(lambda: self._arrived or self._connection is None or self._closing, wait_s)
            if self._connection is None and not self._closing:
                raise QueueUnavailable(f"{self.source}: not connected")
            return [self._arrived.popleft() for _ in range(min(limit, len(self._arrived)))]

    def extend(self, messages: Sequence[Message]) -> Outcome:
        """Tells which are of a connection that is gone, or were given back."""
        with self._lock:
            return Outcome(gone=[message for message in messages if message.handle not in self._unsettled])

    def delete(self, messages: Sequence[Message]) -> Outcome:
        """Acknowledge them."""
        return self._settle(messages, lambda channel, message: channel.basic_ack(message.handle[1]))

    def release(self, messages: Sequence[tuple[Message, float]]) -> Outcome:
        """Reject them, so that they are queued again, now or later, but before the broker loses patience."""
        now_s = time.monotonic()
        delays = {message: min(delay_s, message.received + self.longest_hold_s - now_s) for message, delay_s in messages}

        def reject(channel: Any, message: Message) -> None:
            def now() -> None:
                if channel.is_open:
                    channel.basic_nack(message.handle[1], requeue=True)

            if delays[message] > 0:
                channel.connection.call_later(delays[message], now)
            else:
                now()

        return self._settle(list(delays), reject)

    def close(self) -> None:
        """Close the connection; what is unacknowledged is queued again."""
        with self._lock:
            self._closing = True
            connection = self._connection
            self._lock.notify_all()
        if connection:
            try:
                connection.add_callback_threadsafe(connection.close)
            except _ERRORS:
                pass  # it is closed

    def _settle(self, messages: Sequence[Message], settle: Callable[[Any, Message], None]) -> Outcome:
        """Have the connection's thread do it to those that are of its connection, each once."""
        gone = list(self.extend(messages).gone)
        settled, failures = threading.Event(), []

        def run() -> None:
            try:
                for message in messages:
                    with self._lock:
                        is_ours, channel = message.handle in self._unsettled, self._channel
                        self._unsettled.discard(message.handle)
                    if is_ours:
                        settle(channel, message)
            except _ERRORS as error:
                failures.append(error)
            settled.set()

        if len(gone) < len(messages):
            with self._lock:
                connection = self._connection
            try:
                if connection is None:
                    raise QueueUnavailable(f"{self.source}: not connected")
                connection.add_callback_threadsafe(run)
            except _ERRORS as error:
                raise QueueUnavailable(f"{self.source}: {_text(error)}") from error
            if not settled.wait(CALL_S) or failures:
                raise QueueUnavailable(f"{self.source}: {_text(failures[0]) if failures else 'the connection does not answer'}")
        return Outcome(gone=gone)

    def _connect(self) -> None:
        try:
            connection = pika.BlockingConnection(self._parameters)
        except _ERRORS as error:
            raise QueueUnavailable(f"{self.source}: {_text(error)}") from error
        try:
            channel = connection.channel()
            channel.basic_qos(prefetch_count=self._prefetch)
            channel.queue_declare(self._name, passive=True)
            era = self._era + 1
            with self._lock:
                if self._closing:  # meanwhile, by somebody who did not know of this connection
                    raise QueueUnavailable("it is closed")
                self._connection, self._channel, self._era = connection, channel, era
            channel.basic_consume(self._name, lambda _, method, properties, body: self._arrive(era, method, properties, body))
        except ChannelClosedByBroker as error:
            _end(connection)
            if error.reply_code == _NOT_FOUND:
                raise QueueSourceError(f"{self.source}: there is no such queue; declare it, as a quorum queue") from error
            raise QueueUnavailable(f"{self.source}: {_text(error)}") from error
        except (QueueUnavailable, *_ERRORS) as error:
            _end(connection)
            raise QueueUnavailable(f"{self.source}: {_text(error)}") from error

    def _serve(self) -> None:
        """Look after the connection, and make another one when it or what it is for is gone."""
        pause_s = 0.2
        while not self._closing:
            try:
                if self._connection is None:
                    self._connect()
                pause_s = 0.2
                self._give_back_stale(self._channel)
                self._channel.start_consuming()  # until the connection or the channel is closed, or the queue deleted
                raise QueueUnavailable("the broker delivers nothing more")
            except (QueueSourceError, *_ERRORS) as error:
                if not self._closing:
                    log.warning("%s: %s; connecting again in %.1f s", self.source, _text(error), pause_s)
            with self._lock:
                connection, self._connection = self._connection, None
                self._arrived.clear()
                self._unsettled.clear()
                self._lock.notify_all()
            if connection:  # what ended may have been its channel alone
                _end(connection)
            with self._lock:
                self._lock.wait_for(lambda: self._closing, pause_s)
            pause_s = min(pause_s * 2, 5.0)

    def _give_back_stale(self, channel: Any) -> None:
        """Now and every moment: what nobody takes, because the sink is busy, is not to keep the broker waiting for too long."""
        if not channel.is_open:
            return
        before = time.monotonic() - self.longest_hold_s
        with self._lock:
            stale = []
            while self._arrived and self._arrived[0].received <= before:
                stale.append(self._arrived.popleft())
                self._unsettled.discard(stale[-1].handle)
        for message in stale:
            channel.basic_nack(message.handle[1], requeue=True)
        channel.connection.call_later(LOOK_S, lambda: self._give_back_stale(channel))

    def _arrive(self, era: int, method: Any, properties: Any, body: bytes) -> None:
        with self._lock:
            handle = (era, method.delivery_tag)
            self._arrived.append(message_of(self.source, handle, properties, body))
            self._unsettled.add(handle)
            self._lock.notify()


def message_of(source: str, handle: tuple[int, int], properties: Any, body: bytes) -> Message:
    """A delivery as a Message. The id is what the publisher gave it, or else follows from all that it sent."""
    headers: Mapping[str, Any] = properties.headers or {}
    attributes = {
        name: value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        for name, value in headers.items()
        if isinstance(value, str | int | float | bytes) and not name.startswith("x-")
    }
    for name, value in (("correlationid", properties.correlation_id), ("type", properties.type)):
        if value:
            attributes.setdefault(name, value)
    sent = properties.timestamp
    content = hashlib.sha256(repr((sorted(attributes.items()), sent)).encode() + body).hexdigest()
    return Message(
        key=f"{source} {handle[0]} {handle[1]}",
        id=properties.message_id or content,
        body=body,
        receives=int(headers.get("x-delivery-count", 0)) + 1,
        handle=handle,
        attributes=attributes,
        content_type=properties.content_type,
        sent=float(sent) if sent else None,
    )


class RabbitResults:
    """A queue that results are sent to; each is confirmed by the broker."""

    def __init__(self, url: str) -> None:
        self._parameters, self._name, self._shown = parse(url)
        self._lock = threading.Lock()  # guards what follows: a connection is for one thread at a time
        self._connection: Any = None
        self._channel: Any = None

    def open(self) -> None:
        """Connect. Raises QueueSourceError if there is no such queue."""
        with self._lock:
            try:
                self._connect()
            except ChannelClosedByBroker as error:
                raise QueueSourceError(f"{self._shown}: {_text(error)}") from error
            except _ERRORS as error:
                raise QueueUnavailable(f"{self._shown}: {_text(error)}") from error

    def send(self, result: bytes, request: Message, key: str) -> None:
        """Returns when the broker has it."""
        properties = pika.BasicProperties(
            content_type="application/cloudevents+json",
            delivery_mode=2,
            message_id=hashlib.sha256(key.encode()).hexdigest(),
            correlation_id=request.id,
            headers={name: request.attributes[name] for name in ("traceparent", "tracestate") if request.attributes.get(name)},
        )
        with self._lock:
            for fresh in (False, True):  # a connection that nobody used for a while is likely to be closed
                try:
                    if fresh or self._connection is None:
                        self._connect()
                    self._channel.basic_publish("", self._name, result, properties, mandatory=True)
                    return
                except (UnroutableError, NackError) as error:
                    raise QueueUnavailable(f"{self._shown}: the broker did not take it: {_text(error)}") from error
                except _ERRORS as error:
                    failure = error
                    self._connection = None
        raise QueueUnavailable(f"{self._shown}: {_text(failure)}") from failure

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            try:
                if self._connection:
                    self._connection.close()
            except _ERRORS:
                pass  # it is closed

    def _connect(self) -> None:
        connection = pika.BlockingConnection(self._parameters)
        try:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.queue_declare(self._name, passive=True)
        except _ERRORS:
            _end(connection)
            raise
        self._connection, self._channel = connection, channel


def _end(connection: Any) -> None:
    try:
        if connection.is_open:
            connection.close()
    except _ERRORS:
        pass  # it is closed


def _text(error: BaseException) -> str:
    """What an error says; pika's often say nothing but their name."""
    return str(error) or repr(error)
