"""The loop that all connections belong to: it takes them in, reads requests whole, and sends what clients are slow to take.

No client holds a thread, however slow it sends or reads. What a request means is for its `Handler` to say.
"""

import logging
import select
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from function.connections import Connection, Connections, Listener, State
from function.errors import FunctionError, TooSlow
from function.inbox import Inbox, Wish
from function.receiver import EMPTY_LINES, END, HEAD_BYTES, HEAD_S, RECEIVE_S, Receiver, has_head

log = logging.getLogger("relight.function")

LINGER_S = 2.0  # for a client to read what it was told, although it has not sent everything
TICK_S = 1.0
ACCEPT_AT_ONCE = 64
UNSENT_BYTES = 256 << 20  # of all connections; beyond it those go that have been sending for longest


class Handler(Protocol):
    """Who answers. All methods are called in the loop, and do not wait."""

    def on_head(self, conn: Connection, end: int) -> None:
        """The head of a request is there, the first `end` bytes of what was received; or what can be none, and end is 0."""

    def on_body(self, conn: Connection) -> None:
        """Its body is whole, or there will be none."""

    def on_late(self, conn: Connection, error: FunctionError) -> None:
        """What has begun to come, a head or a body, does not go on: tell the client."""

    def on_drop(self, conn: Connection) -> None:
        """It was closed before its answer was made, as something went wrong here."""


class HttpLoop:
    """One process's."""

    def __init__(self, sockets: Sequence[socket.socket], limit: int, keepalive_s: float, held_bytes: int) -> None:
        """limit: of connections; held_bytes: of bodies that are not whole yet."""
        self.is_ending = False  # no request can follow one that is answered now
        self._epoll = select.epoll()
        self.inbox = Inbox()
        self._wake = self.inbox.fileno()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._listeners = {one.fileno(): one for one in (Listener(sock, self._epoll) for sock in sockets)}
        self.connections = Connections(self._epoll, limit)
        self._receiver = Receiver(self.connections, held_bytes)
        self._keepalive_s = keepalive_s
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
        come: list[Listener] = []
        for fd, _ in self._epoll.poll(min(patience_s, TICK_S)):
            if fd == self._wake:
                for one, wish in self.inbox.take():
                    self._attempt(one, wish)
            elif conn := self.connections.get(fd):
                self._attempt(conn, self._flush if conn.state >= State.SENDING else self._receiver.receive)
            elif fd in self._listeners:
                come.append(self._listeners[fd])
        # Only now, as receiving lets other threads in: the model's finds all of them at once, instead of one after the other.
        for conn in self._receiver.take_whole():
            self._attempt(conn, self._take)
        for listener in come:  # last, as those who come may take the place of one that was at rest
            self._accept(listener)

    def tick(self, now: float) -> None:
        """What is to be done from time to time."""
        for listener in self._listeners.values():
            listener.resume()
        for conn in self.connections.expired(now):
            self._attempt(conn, self._expire)

    def _attempt(self, conn: Connection, wish: Wish) -> None:
        """What goes wrong with one connection ends that one, not the process."""
        if not conn.is_open:
            return
        try:
            wish(conn)
        except Exception:
            log.exception("a connection was closed")
            self.connections.drop(conn)
            self._handler.on_drop(conn)

    def _accept(self, listener: Listener) -> None:
        """Take in who has come: many at once, as a probe waits behind them."""
        try:
            for sock, client, server in listener.accept(ACCEPT_AT_ONCE, self.connections.evict):
                conn = Connection(sock, client, server, lambda conn: self.inbox.put(conn, self._await_room))
                self.connections.add(conn)
                conn.expires = time.monotonic() + HEAD_S
                self._attempt(conn, self.connections.await_data)
        except MemoryError:
            log.error("no memory for another connection")

    # A request

    def _take(self, conn: Connection) -> None:
        """Hand over what is whole."""
        if conn.body:
            self._hand_over(conn)
            return
        end = conn.received.find(END, 0, HEAD_BYTES)
        self._handler.on_head(conn, end + len(END) if end >= 0 else 0)

    def _hand_over(self, conn: Connection) -> None:
        self.connections.enter(conn, State.WORKING)
        self._handler.on_body(conn)

    def await_body(self, conn: Connection) -> None:
        """The handler knows what body is to come (`conn.body`), of which some may have been received with the head."""
        assert conn.body
        if conn.received:
            conn.received = conn.body.feed(conn.received)
        if conn.body.is_whole:
            self._hand_over(conn)
        else:
            self.connections.enter(conn, State.RECEIVING)
            conn.expires = conn.began + RECEIVE_S
            self.connections.await_data(conn)

    def bodies(self) -> list[Connection]:
        """Those whose request's body is on its way."""
        return [conn for conn in self.connections.at(State.RECEIVING) if conn.body]

    # Its answer

    def conclude(self, conn: Connection, *, is_open: bool) -> None:
        """The answer has been written. is_open: whether another request may follow."""
        conn.is_last = conn.is_last or not is_open
        conn.forget_request()
        if not conn.sock.size:
            self._sent(conn)
            return
        self.connections.enter(conn, State.SENDING)
        self.connections.await_room(conn)
        while self.connections.unsent_bytes() > UNSENT_BYTES and (slowest := self.connections.slowest()):
            self.connections.drop(slowest)

    def _await_room(self, conn: Connection) -> None:
        if conn.sock.size:
            self.connections.await_room(conn)

    def _flush(self, conn: Connection) -> None:
        if not conn.sock.flush():
            self.connections.await_room(conn)
        elif conn.state is State.SENDING:
            self._sent(conn)

    def _sent(self, conn: Connection) -> None:
        """An answer is out, or nobody takes it."""
        if conn.note:
            conn.finish_note()
        if conn.sock.is_broken:
            self.connections.drop(conn)
        elif conn.is_last or self.is_ending:
            self._linger(conn)
        else:
            self._await_request(conn)

    def _await_request(self, conn: Connection) -> None:
        """The next one, of which some may be there, or all."""
        conn.received = conn.received.lstrip(EMPTY_LINES)
        if not conn.received:
            self.connections.enter(conn, State.IDLE, self._keepalive_s)
            self.connections.await_data(conn)
            return
        conn.began = time.monotonic()
        self.connections.enter(conn, State.RECEIVING, HEAD_S)
        if has_head(conn.received):
            self.inbox.put(conn, self._take)
        else:
            self.connections.await_data(conn)

    def _linger(self, conn: Connection) -> None:
        """Close so that the client can still read what it was told."""
        try:
            conn.raw.shutdown(socket.SHUT_WR)
        except OSError:
            self.connections.drop(conn)
            return
        conn.received = b""
        self.connections.enter(conn, State.ENDING, LINGER_S)
        self.connections.await_data(conn)

    def _expire(self, conn: Connection) -> None:
        if conn.state is State.WORKING:
            conn.sock.give_up()  # whoever writes is told
        elif conn.state is State.RECEIVING:
            self.connections.enter(conn, State.WORKING)
            self._handler.on_late(conn, TooSlow(f"the {'body' if conn.body else 'head'} of the request did not come in time"))
        else:
            self.connections.drop(conn)
