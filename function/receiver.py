"""Takes what clients send, until the head of a request is there, or its body."""

import time

from function.connections import Connection, Connections, State
from function.errors import Unavailable

HEAD_S = 20.0  # for a request's head to come
RECEIVE_S = 30.0  # for head and body together, and beside that
RECEIVE_BYTES_PER_S = 64 * 1024  # the least that a body comes with
HEAD_BYTES = 64 * 1024
END = b"\r\n\r\n"  # of a head
EMPTY_LINES = b"\r\n"  # before a request: RFC 9112 wants them to be passed over
_READ_BYTES = 64 * 1024


class Receiver:
    """The loop's."""

    def __init__(self, connections: Connections, held_bytes: int) -> None:
        """held_bytes: of bodies that are not whole yet, beside small ones."""
        self._connections = connections
        self._held_bytes = held_bytes
        self._whole: list[Connection] = []

    def receive(self, conn: Connection) -> None:
        """Take what has come; see `take_whole`."""
        try:
            data = conn.raw.recv(_READ_BYTES)
        except BlockingIOError:
            self._connections.await_data(conn)
            return
        except OSError:
            data = b""
        if not data:
            self._connections.drop(conn)
        elif conn.state is not State.ENDING and (self._body(conn, data) if conn.body else self._head(conn, data)):
            self._whole.append(conn)
        else:
            self._connections.await_data(conn)

    def take_whole(self) -> list[Connection]:
        """Those whose head or body is whole with what has come since the last time."""
        whole, self._whole = self._whole, []
        return whole

    def _head(self, conn: Connection, data: bytes) -> bool:
        if conn.state is State.IDLE:
            conn.began = time.monotonic()
        conn.received = (conn.received + data).lstrip(EMPTY_LINES)
        if END in conn.received or has_head(conn.received):
            return True
        if conn.state is State.IDLE:
            self._connections.enter(conn, State.RECEIVING, HEAD_S)
        return False

    def _body(self, conn: Connection, data: bytes) -> bool:
        assert conn.body
        conn.received = conn.body.feed(data)
        conn.expires = conn.began + RECEIVE_S + conn.body.size / RECEIVE_BYTES_PER_S
        if conn.body.size > _READ_BYTES and self._holds_too_much():
            conn.body.fail(Unavailable("too many large bodies are on their way", retry_after_s=1))
        return conn.body.is_whole

    def _holds_too_much(self) -> bool:
        return sum(conn.body.size for conn in self._connections.at(State.RECEIVING) if conn.body) > self._held_bytes


def has_head(received: bytes) -> bool:
    """Whether it begins with a head, with more than a head may have, or with what can be none, such as TLS."""
    return END in received or len(received) > HEAD_BYTES or (received[:1] < b" " and received != b"")
