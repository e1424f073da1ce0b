"""The gunicorn worker: gunicorn's gthread, where that falls short for a model function.

- A connection takes a thread only once a request's head is there; slow clients wait with the poller.
- Probes have threads of their own: they answer in milliseconds however many callers wait for the model.
- What would be refused anyway is refused from the main loop, before a thread is taken and without looking at the body.
- A thread that has answered looks for the connection's next request for a moment: two thread switches less for a caller who asks on.
- Told to end, it goes on listening, so that callers get a 503 rather than a connection that nobody answers; it leaves as soon as the last
  running request is answered.
"""

import logging
import os
import re
import select
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import flask
from gunicorn import http
from gunicorn.workers.gthread import TConn, ThreadWorker

from function.errors import Unavailable
from function.http import refusal as shaped
from function.http import reply, retry_after

log = logging.getLogger("relight.function")

HOT_S = 0.002  # how long a thread stays with a connection that has just been answered
HEAD_S = 20.0  # for a request's head to come
STALL_S = 30  # without a byte of a body, or with nothing read of an answer
HEAD_BYTES = 64 * 1024  # then gunicorn says what is wrong with it
LINGER_S = 2.0  # for a client to read a refusal while it is still sending
_READ_BYTES = 64 * 1024
_PROBES = re.compile(rb"(?:GET|HEAD) /(?:healthz|readyz|metrics|v2/health/live|v2/health/ready)[ ?]")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)

_STATUSES = {http.errors.LimitRequestLine: 414, http.errors.ExpectationFailed: 417, http.errors.LimitRequestHeaders: 431}

Refusal = Callable[[], Unavailable | None]


class Connection(TConn):  # type: ignore[misc]  # gunicorn has no types
    """One client's; `head` is what has come of its next request while the poller had it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.parser: Any
        self.head = b""
        self.since = time.monotonic()  # it last became idle, or the head began

    def hand_over(self) -> None:
        """Let gunicorn's parser have what has come, and go on from there."""
        if self.parser is None:
            self.initialized = True
            self.parser = http.get_parser(self.cfg, self.sock, self.client)
        self.parser.unreader.unread(self.head)
        self.head = b""


class FunctionWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """One process, one model. `refusal` and `on_refused` are set before it runs."""

    refusal: Refusal = staticmethod(lambda: None)  # why a call that came now would be refused
    on_refused: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._probes = ThreadPoolExecutor(2, "probe")
        self._waiting: dict[Connection, None] = {}  # with the poller, oldest first
        self._busy = 0  # requests that have a thread, or wait for one
        self._looked_at = 0.0

    # The loop

    def run(self) -> None:
        """Serve until told to end, then until the last running request is answered."""
        self.poller.register(self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks)
        self.set_accept_enabled(True)
        deadline: float | None = None
        while deadline is None or (self._busy and time.monotonic() < deadline):
            self.notify()
            self.wait_for_and_dispatch_events(timeout=1.0)
            if not self.is_parent_alive():
                break
            self._close_expired()
            if not self.alive and deadline is None:
                deadline = time.monotonic() + self.cfg.graceful_timeout
        logging.shutdown()
        sys.stderr.flush()
        os._exit(0)  # the model's thread may be in a call that never returns, and the interpreter would wait for its threads

    def accept(self, listener: socket.socket) -> None:
        """Called by the loop."""
        try:
            client, address = listener.accept()
        except OSError:
            return
        if self.nr_conns >= self.worker_connections:
            client.close()
            return
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # the kernel's, as gunicorn resets Python's
            client.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", STALL_S, 0))
        self.nr_conns += 1
        self._await(Connection(self.cfg, client, address, listener.getsockname()))

    def _await(self, conn: Connection) -> None:
        conn.sock.setblocking(False)
        conn.since = time.monotonic()
        self._waiting[conn] = None
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._on_readable, conn))

    def _leave(self, conn: Connection) -> None:
        self._waiting.pop(conn, None)
        self.poller.unregister(conn.sock)

    def _drop(self, conn: Connection) -> None:
        self.nr_conns -= 1
        conn.close()

    def _on_readable(self, conn: Connection, _: socket.socket) -> None:
        try:
            data = conn.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._leave(conn)
            self._drop(conn)
            return
        if not conn.head:
            conn.since = time.monotonic()
        conn.head += data
        if b"\r\n\r\n" in conn.head or len(conn.head) > HEAD_BYTES:
            self._leave(conn)
            self._dispatch(conn)

    def _close_expired(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < 1:
            return
        self._looked_at = now
        expired = [
            conn for conn in self._waiting if now - conn.since > (HEAD_S if conn.head or not conn.initialized else self.cfg.keepalive)
        ]
        for conn in expired:
            self._leave(conn)
            self._drop(conn)

    # A request whose head is there

    def _dispatch(self, conn: Connection) -> None:
        if _PROBES.match(conn.head):
            self._submit(self._probes, conn)
        elif refusal := self._refusal(conn):
            self._refuse(conn, refusal)
        else:
            self._busy += 1
            self._submit(self.tpool, conn)

    def _submit(self, pool: ThreadPoolExecutor, conn: Connection) -> None:
        future = pool.submit(self.handle, conn)
        future.add_done_callback(lambda done: self.method_queue.defer(self._finish, conn, done, pool))

    def _refusal(self, conn: Connection) -> Unavailable | None:
        if not self.alive:
            return Unavailable("the function is ending; ask again, another one will answer", retry_after_s=1)
        if not conn.head.startswith(b"POST "):
            return None
        if self._busy >= self.cfg.threads:
            return Unavailable(f"{self._busy} requests are being worked on already", retry_after_s=1)
        return self.refusal()

    def _refuse(self, conn: Connection, refusal: Unavailable) -> None:
        """Say no from the loop; the connection is used again if all of the request has come."""
        head, _, rest = conn.head.partition(b"\r\n\r\n")
        length = _LENGTH.search(head + b"\r\n")
        is_whole = self.alive and b"chunked" not in head.lower() and len(rest) == (int(length[1]) if length else 0)
        path = head.split(b" ", 2)[1].decode("latin-1") if head.count(b" ") > 1 else "/"
        said = refusal_reply(path, refusal, close=not is_whole)
        conn.head = b""
        self.on_refused()
        try:
            conn.sock.send(said)  # it fits into the socket's buffer, which is empty: one request at a time
        except OSError:
            self._drop(conn)
            return
        if is_whole:
            conn.initialized = True
            conn.parser = conn.parser or http.get_parser(conn.cfg, conn.sock, conn.client)
            self._await(conn)
        else:
            self._linger(conn)

    def _linger(self, conn: Connection) -> None:
        """Close so that the client can still read what it was told, although it has not sent everything."""
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(conn)
            return
        conn.initialized, conn.head = False, b""
        conn.since = time.monotonic() - HEAD_S + LINGER_S
        self._waiting[conn] = None

        def swallow(_: object) -> None:
            try:
                if conn.sock.recv(_READ_BYTES):
                    return
            except BlockingIOError:
                return
            except OSError:
                pass
            self._leave(conn)
            self._drop(conn)

        self.poller.register(conn.sock, selectors.EVENT_READ, swallow)

    def handle(self, conn: Connection) -> bool:
        """Serve the connection's requests for as long as they come at once; returns whether it can be used on. Runs in a thread."""
        while True:
            conn.hand_over()
            is_open = bool(super().handle(conn))
            if not (is_open and self.alive) or conn.parser.unreader.buf.getvalue():
                return is_open
            poll = select.poll()
            poll.register(conn.sock, select.POLLIN)
            if self._busy > 1 or not poll.poll(HOT_S * 1000):
                return True

    def _finish(self, conn: Connection, done: "Future[bool]", pool: ThreadPoolExecutor) -> None:
        """A thread is done with a connection. Runs in the loop."""
        if pool is self.tpool:
            self._busy -= 1
        try:
            is_open = done.result()
        except Exception:
            self.log.exception("a connection failed")
            is_open = False
        if not is_open:
            self._linger(conn)
            return
        conn.head = conn.parser.unreader.take_buffered()  # the next request's, if it came with the last
        if b"\r\n\r\n" in conn.head:
            self._dispatch(conn)
        else:
            self._await(conn)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, error: Exception) -> None:
        """Called by gunicorn for what is no HTTP request, and for what went wrong in itself."""
        if isinstance(error, http.errors.ParseException):
            status = _STATUSES.get(type(error), 400)
            reply = whole_reply(shaped(status, "bad_request", f"this is not an HTTP request that is understood here: {error}"), close=True)
        else:
            log.error("a request failed", exc_info=error)
            reply = whole_reply(shaped(500, "internal_error", "the function failed on this request; its log says why"), close=True)
        try:
            client.sendall(reply)
        except OSError:
            pass  # it is not there any more


def refusal_reply(path: str, refusal: Unavailable, *, close: bool) -> bytes:
    """A whole HTTP reply, in the shape that the path's protocol has for errors."""
    if path.startswith("/v2/"):
        response = reply({"error": str(refusal)}, refusal.status)
        response.headers["Retry-After"] = retry_after(refusal.retry_after_s or 1)
    else:
        response = shaped(refusal.status, refusal.type, str(refusal), refusal.retry_after_s)
    return whole_reply(response, close=close)


def whole_reply(response: flask.Response, *, close: bool) -> bytes:
    """As it goes over the wire."""
    response.headers["Connection"] = "close" if close else "keep-alive"
    lines = [f"HTTP/1.1 {response.status}", *(f"{name}: {value}" for name, value in response.headers)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + response.get_data()
