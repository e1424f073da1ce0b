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

    def receive(self, conn: Connection) -> bool:
        """Take what has come; whether a head or a body is whole with it. If not, the connection is looked after."""
        try:
            data = conn.raw.recv(_READ_BYTES)
        except BlockingIOError:
            self._connections.await_data(conn)
            return False
        except OSError:
            data = b""
        if not data:
            self._connections.drop(conn)
            return False
        is_whole = conn.state is not State.ENDING and (self._body(conn, data) if conn.body else self._head(conn, data))
        if not is_whole:
            self._connections.await_data(conn)
        return is_whole

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
