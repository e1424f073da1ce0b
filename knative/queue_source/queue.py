"""The queue port: what the source needs of a queue, and nothing of SQS or RabbitMQ."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One delivery of a message."""

    key: str  # two deliveries with one key are the same message
    id: str  # the event's id: the same on every delivery
    body: bytes
    receives: int  # how often it was delivered, this time included
    handle: Any  # what the queue knows this delivery by
    attributes: Mapping[str, str] = field(default_factory=dict)
    content_type: str | None = None  # if the queue knows it
    sent: float | None = None  # seconds since the epoch
    group: str | None = None  # messages of one group are delivered one after the other
    sequence: str | None = None  # its place in the group
    received: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What did not work, of a call for several messages."""

    again: Sequence[Message] = ()  # to be tried again
    gone: Sequence[Message] = ()  # no longer ours: deleted, or its visibility ran out


class Queue(Protocol):
    """A queue that messages are taken from. Its methods are called from several threads, and raise QueueUnavailable."""

    source: str  # the events' source
    longest_hold_s: float  # from a receive; what is not deleted by then comes back, whatever is done
    dead_letters: bool | None  # whether messages that fail too often go to a queue for them; None: not known

    def open(self) -> None:
        """Connect, and find out about the queue. Raises QueueSourceError if there is none."""

    def receive(self, limit: int, wait_s: int) -> list[Message]:
        """At most `limit` messages, none after `wait_s` seconds; they are ours until their visibility runs out."""

    def extend(self, messages: Sequence[Message]) -> Outcome:
        """Keep messages for another visibility time from now."""

    def delete(self, messages: Sequence[Message]) -> Outcome:
        """They are done."""

    def release(self, messages: Sequence[tuple[Message, float]]) -> Outcome:
        """Give messages back, each to be delivered again after so many seconds."""

    def close(self) -> None:
        """Let go of the connection."""


class Results(Protocol):
    """A queue that results are sent to."""

    def open(self) -> None:
        """Connect. Raises QueueSourceError if there is no such queue."""

    def send(self, result: bytes, request: Message, key: str) -> None:
        """Send an event in JSON. key: the same for each result of one request, for queues that leave out duplicates.

        Raises QueueUnavailable, or ResultRefused for one that is never taken.
        """

    def close(self) -> None:
        """Let go of the connection."""
