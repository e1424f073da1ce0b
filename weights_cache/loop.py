"""One thread that owns listening sockets and all their connections, so that no client holds a thread, however slow it is.

A `Door` is a listening socket with a bound on its connections; when there are as many, the one that has been idle for longest gives way
to the new one. A `Peer` is one connection. Python's own servers have a thread for each connection, without a bound and without a time
limit, and asyncio's neither let an idle connection give way nor keep quiet when there are no descriptors left; of the servers that
packages bring, each takes longer to import than a sidecar takes to start.
"""

import contextlib
import errno
import logging
import os
import resource
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger("relight.weights")

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

ACCEPTS = 8  # in a row, before those that are there already get their turn
REST_S = 0.2  # without a descriptor, before the next try
SAY_S = 60.0  # between two lines of the log about the same
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RESERVED = 96  # descriptors for pulls: connections to the store, files that are filled, and what Python has open
_MOST_DESCRIPTORS = 1 << 16


def raise_descriptor_limit() -> int:
    """Let this process have as many descriptors as it may; returns how many it may use for connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(32, max(soft, allowed) - _RESERVED)


class Peer:
    """One connection. A subclass says what is done with what comes; every method is called in the loop's thread."""

    door: "Door"  # set when it comes in

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.since = time.monotonic()  # it has been as it is
        self.deadline: float | None = None  # when `expire` is called, if it is still as it is
        self.interest = READ  # what it waits for, READ or WRITE; 0: for what this process does

    def ready(self) -> None:
        """What it waits for has come. Raises OSError: it has gone."""
        raise NotImplementedError

    def expire(self) -> None:
        """Its time is over."""
        self.close()

    def rank(self) -> int | None:
        """The lower, the sooner it gives way to a new connection; None if it never does."""
        return 0

    def close(self) -> None:
        """End it, now."""
        self.door.loop.forget(self)
        self.sock.close()


@dataclass(eq=False)
class Door:
    """A listening socket, and the peers that came in through it."""

    loop: "Loop"
    sock: socket.socket
    meet: Callable[[socket.socket], Peer]
    most: int
    peers: set[Peer] = field(default_factory=set)
    rests_until: float = 0.0  # it is not listened to; 0: it is

    def ready(self) -> None:
        """Let in who is waiting, some at a time."""
        for _ in range(min(ACCEPTS, max(1, self.most // 4))):
            try:
                sock, _ = self.sock.accept()
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self.loop.exhausted(self, error)
                return  # nobody is waiting, or there is no descriptor for them
            sock.setblocking(False)
            if len(self.peers) >= self.most and not self.loop.make_way([self], f"{self.most} connections at once"):
                sock.close()
                continue
            peer = self.meet(sock)
            peer.door = self
            self.peers.add(peer)
            self.loop.attend(peer)  # what it asks for is often there already


class Loop:
    """Runs in one thread; `call` and `stop` may be called by any."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, READ, self._woken)
        self._doors: list[Door] = []
        self._registered: dict[Peer, int] = {}  # what each is watched for
        self._calls: deque[Callable[[], object]] = deque()
        self._is_over = False
        self._said: dict[str, float] = {}  # when, by what was said

    def listen(self, sock: socket.socket, meet: Callable[[socket.socket], Peer], most: int) -> None:
        """Let in who connects to a listening socket, which is the loop's to close. most: connections at once."""
        sock.setblocking(False)
        door = Door(self, sock, meet, most)
        self._doors.append(door)
        self._selector.register(sock, READ, door.ready)

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._is_over:
            for key, _ in self._selector.select(self._pause_s()):
                key.data()
            while self._calls:
                self._calls.popleft()()
            self._look_at_the_clock()

    def call(self, work: Callable[[], object]) -> None:
        """Have something done in the loop's thread, soon."""
        self._calls.append(work)
        with contextlib.suppress(OSError, ValueError):  # the loop has been closed
            os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Have `run` return soon; also for a handler of signals."""
        self._is_over = True
        with contextlib.suppress(OSError, ValueError):
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Close everything. `run` has returned, or is never called."""
        for door in self._doors:
            for peer in list(door.peers):
                peer.close()
            door.sock.close()
        self._selector.close()
        os.close(self._wake)
        self._wake = -1

    def attend(self, peer: Peer) -> None:
        """Have a peer do what it can, and wait for what it then waits for."""
        self._have(peer, peer.ready)

    def _have(self, peer: Peer, act: Callable[[], object]) -> None:
        """Have a peer act; whatever comes of it ends its connection at most."""
        try:
            if peer.sock.fileno() >= 0:  # else it gave way to another one in this very turn
                act()
        except OSError:
            peer.close()
        except Exception as error:
            if self._may_say("error"):
                log.exception("a connection failed unexpectedly: %s", error)
            peer.close()
        self.watch(peer)

    def watch(self, peer: Peer) -> None:
        """What a peer waits for has changed."""
        if peer not in peer.door.peers:
            return
        if (before := self._registered.get(peer, 0)) == peer.interest:
            return
        if not before:
            self._selector.register(peer.sock, peer.interest, lambda: self.attend(peer))
        elif peer.interest:
            self._selector.modify(peer.sock, peer.interest, lambda: self.attend(peer))
        else:
            self._selector.unregister(peer.sock)
        self._registered[peer] = peer.interest

    def forget(self, peer: Peer) -> None:
        """A peer is about to be closed."""
        peer.door.peers.discard(peer)
        if self._registered.pop(peer, 0):
            self._selector.unregister(peer.sock)

    def make_way(self, doors: "list[Door]", why: str) -> bool:
        """Close the connection that can best be spared; False if there is none."""
        known = [(rank, peer.since, peer) for door in doors for peer in door.peers if (rank := peer.rank()) is not None]
        if not known:
            return False
        if self._may_say(why):
            log.warning("%s: those that have been idle for longest give way (said once a minute at most)", why)
        min(known, key=lambda one: one[:2])[2].close()
        return True

    def exhausted(self, door: Door, error: OSError) -> None:
        """There was no descriptor for a new connection: free one, or wait for a moment."""
        if not self.make_way(self._doors, error.strerror or str(error)):
            if self._may_say("rest"):
                log.warning("no connection can be let in: %s", error.strerror)
            self._selector.unregister(door.sock)
            door.rests_until = time.monotonic() + REST_S

    def _may_say(self, what: str) -> bool:
        now = time.monotonic()
        if now < self._said.get(what, 0.0):
            return False
        self._said[what] = now + SAY_S
        return True

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _pause_s(self) -> float:
        ends = [door.rests_until for door in self._doors if door.rests_until]
        ends += [peer.deadline for door in self._doors for peer in door.peers if peer.deadline is not None]
        return 0.0 if self._calls else max(0.0, min(ends, default=time.monotonic() + 60) - time.monotonic())

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for door in self._doors:
            if door.rests_until and now >= door.rests_until:
                door.rests_until = 0.0
                self._selector.register(door.sock, READ, door.ready)
            for peer in [one for one in door.peers if one.deadline is not None and now >= one.deadline]:
                self._have(peer, peer.expire)
