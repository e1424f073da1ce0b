"""HTTP byte by byte, for tests of what clients do to the function's server."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support import Reply


@contextmanager
def connected(port: int, timeout: float = 20) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def post(body: str, *headers: str, path: str = "/") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", body]).encode()


def head_of(connection: socket.socket) -> bytes:
    """Of one reply."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):  # byte by byte, as more than one reply may have come
        piece = connection.recv(1)
        assert piece, f"closed after {head!r}"
        head += piece
    return head


def answer(connection: socket.socket) -> Reply:
    """One reply, whose length is told."""
    status, *lines = head_of(connection).decode().rstrip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = b""
    while len(body) < int(headers["content-length"]):
        piece = connection.recv(int(headers["content-length"]) - len(body))
        assert piece, f"closed after {body!r:.200}"
        body += piece
    return Reply(int(status.split()[1]), headers, body)


def ended(connection: socket.socket) -> bytes:
    """All that comes until the function closes the connection."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def reset(connection: socket.socket) -> None:
    """End it with an RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
