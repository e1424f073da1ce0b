"""What is held: how many messages and bytes, for how long, and whether more may be pulled."""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum, auto

from knative.queue_source.queue import Message
from knative.queue_source.sink import Call

PATIENCE_S = 0.05  # a receive of one message costs as much as one of ten
REMEMBERED = 10_000  # keys of messages that were done lately
MOST_BYTES = 256 << 20  # of messages and fetched objects: nothing more is pulled or fetched until there are fewer


class Lease(Enum):
    """Whether a message is ours."""

    KEPT = auto()
    DELETING = auto()
    RELEASING = auto()
    LOST = auto()  # somebody else may have it


class Held:
    """A message that is held."""

    __slots__ = ("call", "cut_at", "extending", "has_object", "lease", "longest_s", "message", "renew_at", "since", "size")

    def __init__(self, message: Message, visibility_s: float, longest_s: float) -> None:
        """longest_s: from a receive, the seconds for which the queue lets it be held."""
        self.message = message  # its latest delivery
        self.longest_s = longest_s
        self.since = message.received
        self.size = 0  # bytes that it counts for: its own, and those of an object that was fetched for it
        self.has_object = False
        self.lease = Lease.KEPT
        self.extending = False  # a heartbeat is on its way: whatever gives it back waits for that
        self.call: Call | None = None  # while it is being posted
        self.cut_at = 0.0
        self.extended(message.received, visibility_s)

    def extended(self, at: float, visibility_s: float) -> None:
        """It is ours for another visibility time from `at`."""
        self.renew_at = min(at + visibility_s / 3, self.message.received + self.longest_s)


class Holding:
    """All that is held. Pollers take room before they ask the queue, so that there are never more than `limit`."""

    def __init__(self, limit: int, visibility_s: float, longest_s: float = math.inf, most_bytes: int = MOST_BYTES) -> None:
        """longest_s: for which the queue lets a message be held, whatever its visibility."""
        self.stopping = False
        self._visibility_s = visibility_s
        self._longest_s = longest_s
        self._lock = threading.Lock()  # guards what follows
        self._room_made = threading.Condition(self._lock)
        self._turn = threading.Condition(self._lock)
        self._free = limit
        self._limit = limit
        self._most_bytes = most_bytes
        self._bytes = 0
        self._objects = 0
        self._held: dict[str, Held] = {}
        self._turned_away: set[str] = set()
        self._paused_until = 0.0
        self._done: OrderedDict[str, None] = OrderedDict()

    # For pollers

    def take_room(self, most: int) -> int:
        """Room for some messages, `most` if that is there soon; 0 when it is time to stop.

        There is none while the sink is busy: until the messages that it has turned away were taken.
        """
        want = min(most, self._limit)
        until = math.inf  # then less than `want` will do
        with self._lock:
            while not self.stopping:
                now = time.monotonic()
                if self._paused_until > now:
                    self._room_made.wait(self._paused_until - now)
                elif self._turned_away or self._bytes >= self._most_bytes:
                    self._room_made.wait()
                elif self._free >= want or (self._free and now >= until):
                    taken = min(self._free, want)
                    self._free -= taken
                    return taken
                elif self._free:
                    until = min(until, now + PATIENCE_S)
                    self._room_made.wait(until - now)
                else:
                    self._room_made.wait()
            return 0

    def give_room(self, count: int) -> None:
        """What was taken and is not needed."""
        if count:
            with self._lock:
                self._free += count
                self._room_made.notify_all()

    def add(self, message: Message) -> tuple[Held, bool] | None:
        """A message for which room was taken: (it, whether it is new).

        None if it was done just now: then it only has to be deleted. A second delivery of what is held replaces the first one.
        """
        with self._lock:
            found = self._held.get(message.key)
            if found and found.lease is not Lease.RELEASING:
                found.message = message
                found.extended(message.received, self._visibility_s)
                if found.lease is Lease.LOST:
                    found.lease = Lease.KEPT
                self._make_room()
                return found, False
            if message.key in self._done:
                return None
            held = self._held[message.key] = Held(message, self._visibility_s, self._longest_s)
            self._charge(held, len(message.body))
            return held, True

    # For workers

    def reserve(self, held: Held, size: int) -> bool:
        """Wait until there is room for an object that is to be fetched for a message; False if it is not to be fetched any more.

        There is for one object in any case, so that the largest has its turn.
        """
        with self._lock:
            while not self.stopping and held.lease is Lease.KEPT:
                if not self._objects or self._bytes + size <= self._most_bytes:
                    held.has_object = True
                    self._objects += 1
                    self._charge(held, held.size + size)
                    return True
                self._turn.wait()
            return False

    def fetched(self, held: Held, size: int) -> None:
        """The object has come, and is no larger than this."""
        with self._lock:
            self._charge(held, len(held.message.body) + size)

    def remove(self, over: Sequence[Held], *, done: bool = False) -> None:
        """They are no longer held. done: and are not to be done again."""
        with self._lock:
            for held in over:
                key = held.message.key
                if self._held.get(key) is held:  # else it was received again while it was given back
                    del self._held[key]
                    self._settled(key)
                self._charge(held, 0)
                if done:
                    self._done[key] = None
                    if len(self._done) > REMEMBERED:
                        self._done.popitem(last=False)
                self._make_room()

    def _charge(self, held: Held, size: int) -> None:
        """It counts for so many bytes from now on."""
        was_full = self._bytes >= self._most_bytes
        self._bytes += size - held.size
        if size < held.size and self._objects:
            self._turn.notify_all()
        held.size = size
        if not size and held.has_object:
            held.has_object = False
            self._objects -= 1
        if was_full and self._bytes < self._most_bytes:
            self._room_made.notify_all()

    def _make_room(self) -> None:
        """Wake a poller when it is worth it: it waits for room for ten, or a moment for more than one."""
        self._free += 1
        if self.stopping:  # then somebody waits for the last one
            self._room_made.notify_all()
        elif self._free == 1 or self._free >= min(10, self._limit):
            self._room_made.notify()

    def turned_away(self, held: Held, pause_s: float) -> None:
        """The sink is busy or away: nothing is posted for so many seconds, and nothing pulled until it has taken this."""
        with self._lock:
            self._turned_away.add(held.message.key)
            self._paused_until = max(self._paused_until, time.monotonic() + pause_s)

    def taken(self, held: Held) -> None:
        """The sink has said something else about a message that it had turned away."""
        with self._lock:
            self._settled(held.message.key)

    def _settled(self, key: str) -> None:
        if key in self._turned_away:
            self._turned_away.remove(key)
            self._room_made.notify_all()

    def wait_turn(self, held: Held, not_before: float) -> bool:
        """Wait until it may be posted; False if it is not to be, since it is no longer ours or it is time to stop."""
        with self._lock:
            while not self.stopping and held.lease is Lease.KEPT:
                left_s = max(not_before, self._paused_until) - time.monotonic()
                if left_s <= 0:
                    return True
                self._turn.wait(left_s)
            return False

    # For the rest

    def stop(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            self.stopping = True
            self._room_made.notify_all()
            self._turn.notify_all()

    def lose(self, held: Held) -> None:
        """It is no longer ours."""
        with self._lock:
            if held.lease is Lease.KEPT:
                held.lease = Lease.LOST
                self._turn.notify_all()

    def wait_empty(self, seconds: float) -> bool:
        """Whether nothing is held, within so many seconds."""
        with self._lock:
            return self._room_made.wait_for(lambda: not self._held, seconds)

    def all(self) -> list[Held]:
        """What is held now."""
        with self._lock:
            return list(self._held.values())

    def gauges(self) -> dict[str, float]:
        """What the metrics tell."""
        now = time.monotonic()
        with self._lock:
            held = list(self._held.values())
            paused = bool(self._turned_away) or self._paused_until > now
        return {
            "held": len(held),
            "busy": sum(one.call is not None for one in held),
            "oldest_held_seconds": max((now - one.since for one in held), default=0.0),
            "held_bytes": sum(one.size for one in held),
            "paused": paused,
        }
