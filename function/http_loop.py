"""The loop that all connections belong to: it takes them in, reads requests whole, and sends what clients are slow to take.

No client holds a thread, however slow it sends or reads. What a request means is for its `Handler` to say.
"""

import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from function.access import finish
from function.connections import Connection, Connections, Listener, State
from function.errors import FunctionError, TooSlow, Unavailable

HEAD_S = 20.0  # for a request's head to come
RECEIVE_S = 30.0  # for head and body together, and beside that
RECEIVE_BYTES_PER_S = 64 * 1024  # the least that a body comes with
LINGER_S = 2.0  # for a client to read what it was told, although it has not sent everything
HEAD_BYTES = 64 * 1024
TICK_S = 1.0
ACCEPT_AT_ONCE = 64
UNSENT_BYTES = 256 << 20  # of all connections; beyond it those go that have been sending for longest
_READ_BYTES = 64 * 1024
_READ_BODY_BYTES = 256 * 1024


class Handler(Protocol):
    """Who answers. All methods are called in the loop, and do not wait."""

    def on_head(self, conn: Connection, end: int) -> None:
        """The head of a request is there, the first `end` bytes of what was received; or too many bytes that are none, and end is 0."""

    def on_body(self, conn: Connection) -> None:
        """Its body is whole, or there will be none."""

    def on_late_body(self, conn: Connection, error: FunctionError) -> None:
        """Its body does not come: tell the client."""


class HttpLoop:
    """One process's."""

    def __init__(self, sockets: Sequence[socket.socket], limit: int, keepalive_s: float, held_bytes: int) -> None:
        """limit: of connections; held_bytes: of bodies that are not whole yet."""
        self.is_ending = False  # no request can follow one that is answered now
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._listeners = {one.fileno(): one for one in (Listener(sock, self._epoll) for sock in sockets)}
        self.connections = Connections(self._epoll, limit)
        self._keepalive_s = keepalive_s
        self._held_bytes = held_bytes
        self._inbox: deque[Callable[[], object]] = deque()  # what other threads want the loop to do
        self._is_woken = False  # and will look into it
        self._handler: Handler

    def handle(self, handler: Handler) -> None:
        """Who answers."""
        self._handler = handler

    def descriptors(self) -> Iterator[int]:
        """The file descriptors that are the loop's."""
        yield from (self._epoll.fileno(), self._wake, *self._listeners)
        yield from (conn.raw.fileno() for conn in self.connections)

    def turn(self, patience_s: float) -> None:
        """Do what there is to do, or wait for it for so long."""
        whole: list[Connection] = []
        for fd, _ in self._epoll.poll(min(patience_s, TICK_S)):
            if fd in self._listeners:
                self._accept(self._listeners[fd])
            elif fd == self._wake:
                self._run_inbox()
            elif conn := self.connections.get(fd):
                if conn.state in (State.SENDING, State.WORKING):
                    self._flush(conn)
                elif self._receive(conn):
                    whole.append(conn)
        # Only now, as receiving lets other threads in: the model's finds all of them at once, instead of one after the other.
        for conn in whole:
            self._take(conn)

    def tick(self, now: float) -> None:
        """What is to be done from time to time."""
        for listener in self._listeners.values():
            listener.resume(now)
        for conn in self.connections.expired(now):
            self._expire(conn)
        while self.connections.unsent_bytes() > UNSENT_BYTES and (slowest := self.connections.slowest()):
            self.connections.drop(slowest)

    def soon(self, wish: Callable[[], object]) -> None:
        """Have the loop do something; called from any thread."""
        self._inbox.append(wish)
        if not self._is_woken:
            self._is_woken = True
            self.wake()

    def wake(self) -> None:
        """Have the loop look again; also from a signal's handler."""
        os.eventfd_write(self._wake, 1)

    def _run_inbox(self) -> None:
        os.eventfd_read(self._wake)
        self._is_woken = False  # first, so that nothing that is put in meanwhile is overlooked
        for _ in range(len(self._inbox)):
            self._inbox.popleft()()

    def _accept(self, listener: Listener) -> None:
        """Take in who has come: many at once, as a probe waits behind them."""
        for sock, client, server in listener.accept(ACCEPT_AT_ONCE, self.connections.evict):
            conn = Connection(sock, client, server, lambda conn: self.soon(lambda: self._await_room(conn)))
            self.connections.add(conn)
            conn.expires = time.monotonic() + HEAD_S
            self.connections.await_data(conn)

    # A request

    def _receive(self, conn: Connection) -> bool:
        """Take what has come; whether a head or a body is whole with it. If not, the connection is looked after."""
        try:
            data = conn.raw.recv(_READ_BODY_BYTES if conn.body else _READ_BYTES)
        except BlockingIOError:
            self.connections.await_data(conn)
            return False
        except OSError:
            data = b""
        if not data:
            self.connections.drop(conn)
            return False
        if conn.state is State.ENDING:
            self.connections.await_data(conn)
            return False
        return self._receive_body(conn, data) if conn.body else self._receive_head(conn, data)

    def _receive_head(self, conn: Connection, data: bytes) -> bool:
        if conn.state is State.IDLE:
            conn.began = time.monotonic()
            self.connections.enter(conn, State.RECEIVING, HEAD_S)
        conn.received += data
        if b"\r\n\r\n" in conn.received or len(conn.received) > HEAD_BYTES:
            return True
        self.connections.await_data(conn)
        return False

    def _receive_body(self, conn: Connection, data: bytes) -> bool:
        assert conn.body
        conn.received = conn.body.feed(data)
        conn.expires = conn.began + RECEIVE_S + conn.body.size / RECEIVE_BYTES_PER_S
        if conn.body.size > _READ_BODY_BYTES and self._holds_too_much():
            conn.body.fail(Unavailable("too many large bodies are on their way", retry_after_s=1))
        if conn.body.is_whole:
            return True
        self.connections.await_data(conn)
        return False

    def _holds_too_much(self) -> bool:
        return sum(conn.body.size for conn in self.connections.at(State.RECEIVING) if conn.body) > self._held_bytes

    def _take(self, conn: Connection) -> None:
        """Hand over what is whole."""
        if conn.body:
            self._hand_over(conn)
        else:
            end = conn.received.find(b"\r\n\r\n")
            self._handler.on_head(conn, end + 4 if end >= 0 else 0)

    def _hand_over(self, conn: Connection) -> None:
        self.connections.enter(conn, State.WORKING)
        self._handler.on_body(conn)

    def await_body(self, conn: Connection) -> None:
        """The handler knows what body is to come (`conn.body`), of which some may have been received with the head."""
        assert conn.body
        conn.received = conn.body.feed(conn.received)
        if conn.body.is_whole:
            self._hand_over(conn)
        else:
            conn.expires = conn.began + RECEIVE_S
            self.connections.await_data(conn)

    # Its answer

    def conclude(self, conn: Connection, *, is_open: bool) -> None:
        """The answer has been written. is_open: whether another request may follow."""
        conn.is_last = conn.is_last or not is_open
        conn.head = conn.request = conn.body = None
        if conn.sock.size:
            self.connections.enter(conn, State.SENDING)
            self.connections.await_room(conn)
        else:
            self._sent(conn)

    def _await_room(self, conn: Connection) -> None:
        if conn.is_open and conn.sock.size:
            self.connections.await_room(conn)

    def _flush(self, conn: Connection) -> None:
        if not conn.sock.flush():
            self.connections.await_room(conn)
        elif conn.state is State.SENDING:
            self._sent(conn)

    def _sent(self, conn: Connection) -> None:
        """An answer is out, or nobody takes it."""
        note, conn.note = conn.note, None
        if note and note.is_wanted:
            finish(note)
        if conn.sock.is_broken:
            self.connections.drop(conn)
        elif conn.is_last or self.is_ending:
            self._linger(conn)
        elif b"\r\n\r\n" in conn.received:
            conn.began = time.monotonic()
            self.connections.enter(conn, State.RECEIVING, HEAD_S)
            self.soon(lambda: self._take(conn) if conn.is_open else None)
        elif conn.received:
            conn.began = time.monotonic()
            self.connections.enter(conn, State.RECEIVING, HEAD_S)
            self.connections.await_data(conn)
        else:
            self.connections.enter(conn, State.IDLE, self._keepalive_s)
            self.connections.await_data(conn)

    def _linger(self, conn: Connection) -> None:
        """Close so that the client can still read what it was told."""
        try:
            conn.raw.shutdown(socket.SHUT_WR)
        except OSError:
            self.connections.drop(conn)
            return
        conn.body, conn.received = None, b""
        self.connections.enter(conn, State.ENDING, LINGER_S)
        self.connections.await_data(conn)

    def _expire(self, conn: Connection) -> None:
        if conn.state is State.WORKING:
            conn.sock.give_up()  # whoever writes is told
        elif conn.state is State.RECEIVING and conn.body:
            self.connections.enter(conn, State.WORKING)
            self._handler.on_late_body(conn, TooSlow("the body did not come in time"))
        else:
            self.connections.drop(conn)
