"""The gunicorn worker: gunicorn's threads and parser, in a loop of our own.

Where gunicorn's gthread falls short for a model function:

- Ordinary predictions and probes take no thread at all: the loop reads them and answers (see `fast_path`), the model's thread computes.
- Any other connection takes a thread only once a request's head is there; slow clients wait with the kernel's poller.
- Probes are answered by the loop however odd they are, metrics by threads of their own: at once, however many callers wait for the model.
- What would be refused anyway is refused from the loop, before a thread is taken and without looking at the body: at once, but not more
  than a thousand a second, since who is refused and asks again at once takes the processor from those who are served.
- A thread that has answered hands its connection back to the poller itself, and looks for the next request for a moment before: a thread
  switch less for each request, two for a caller who asks on.
- Told to end, it goes on listening, so that callers get a 503 rather than a connection that nobody answers; it leaves as soon as the last
  running request is answered.
"""

import functools
import logging
import os
import re
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from gunicorn import SERVER, http, util
from gunicorn.workers.gthread import TConn, ThreadWorker

from function import access, fast_path
from function.errors import Unavailable
from function.fast_path import Answer, FastCall, FastPath, Request
from function.http import is_batch_work, reply, retry_after
from function.http import refusal as shaped

log = logging.getLogger("relight.function")

HOT_S = 0.002  # how long a thread stays with a connection that it has just answered
HEAD_S = 20.0  # for a request's head to come
STALL_S = 30  # without a byte of a body, or with nothing read of an answer
REFUSALS_PER_S = 1000.0
REFUSALS_AT_ONCE = 100
LINGER_S = 2.0  # for a client to read what it was told, although it has not sent everything
HEAD_BYTES = 64 * 1024  # then gunicorn says what is wrong with it
TICK_S = 1.0
ACCEPT_AT_ONCE = 64
_READ_BYTES = 64 * 1024
_ONCE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT
_ASIDE = re.compile(rb"(?:GET|HEAD) /(?:metrics|v2/health/live|v2/health/ready)[ ?]")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)
_PRIORITY = re.compile(rb"\r\npriority:([^\r\n]*)\r\n", re.IGNORECASE)
_STATUSES = {http.errors.LimitRequestLine: 414, http.errors.ExpectationFailed: 417, http.errors.LimitRequestHeaders: 431}


class Refusal(Protocol):
    """Why a call that came now would be refused, None if it would not."""

    def __call__(self, *, is_batch: bool) -> Unavailable | None:
        """is_batch: whether it is batch work."""


class Connection(TConn):  # type: ignore[misc]  # gunicorn has no types
    """One client's. It is with the poller, or with one thread."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sock.setblocking(True)  # the loop says for each read that it does not want to wait
        self.head = b""  # what has come of the next request while the poller had it
        self.note: access.Note | None = None  # of the prediction that the loop is answering
        self.is_registered = False
        self.is_last = False  # no request can follow the one that is being answered
        self.is_ending = False  # whatever still comes is thrown away
        self.expires = 0.0


class FunctionWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """One process, one model. What follows is set before it runs."""

    fast_path: FastPath
    refusal: Refusal = staticmethod(lambda *, is_batch: None)
    last_words: Callable[[], object] | None = None  # what is to be done after the last answer, within the grace time

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._aside = ThreadPoolExecutor(2, "aside")  # for what is answered without the model, and without waiting for its callers
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._polled: dict[int, Connection] = {}  # by file descriptor: those that are with the poller
        self._refused: deque[tuple[Connection, Unavailable, float]] = deque()  # who is still to be told, and since when
        self._tellable = 0.0  # how many may be told now
        self._inbox: deque[Callable[[], object]] = deque()  # what other threads want the loop to do
        self._is_woken = False  # and will look into it
        self._stderr = select.poll()
        self._stderr.register(2, select.POLLOUT)
        self._date = (0, "")  # the second, and how HTTP says it
        self._lock = threading.Lock()  # guards the two counts
        self._busy = 0  # requests that have a thread, or wait for one
        self._open = 0  # connections

    # The loop

    def run(self) -> None:
        """Serve until told to end, then until the last running request is answered."""
        listeners = {listener.fileno(): listener for listener in self.sockets}
        for fd, listener in listeners.items():
            listener.setblocking(False)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it, and what follows
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # the kernel's, as gunicorn resets Python's
                listener.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", STALL_S, 0))
            self._epoll.register(fd, select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)
        deadline: float | None = None
        ticked = told = time.monotonic()
        while deadline is None or (self._busy and time.monotonic() < deadline):
            come: list[Connection] = []
            for fd, _ in self._epoll.poll(self._patience_s()):
                if fd in listeners:
                    self._accept(listeners[fd])
                elif fd == self._wake:
                    self._do_what_is_wanted()
                elif (conn := self._polled.pop(fd, None)) and self._receive(conn):
                    come.append(conn)
            # Only now, as receiving lets other threads in: the model's finds all of them at once, instead of one after the other.
            for conn in come:
                self._dispatch(conn)
            now = time.monotonic()
            self.fast_path.expire(now)
            self._tellable = min(self._tellable + (now - told) * REFUSALS_PER_S, REFUSALS_AT_ONCE)
            told = now
            self._tell(int(self._tellable))
            if now - ticked >= TICK_S:
                ticked = now
                self.notify()
                if not self.is_parent_alive():
                    break
                self._close_expired(now)
            if not self.alive and deadline is None:
                deadline = now + self.cfg.graceful_timeout
            if deadline is not None and self.last_words and not self._busy:
                with self._lock:
                    self._busy += 1  # so that whoever asks meanwhile is still told
                self.tpool.submit(self._say, self.last_words)
                self.last_words = None
        self._tell(len(self._refused))
        logging.shutdown()
        sys.stderr.flush()
        os._exit(0)  # the model's thread may be in a call that never returns, and the interpreter would wait for its threads

    def handle_exit(self, sig: int, frame: object) -> None:
        """SIGTERM: serve what is there, and leave."""
        self.alive = False
        os.eventfd_write(self._wake, 1)

    def _patience_s(self) -> float:
        """How long the loop may wait for something to come."""
        if self._refused:
            return 0.01
        return min(TICK_S, max(0.0, self.fast_path.wake_at - time.monotonic()))

    def _soon(self, wish: Callable[[], object]) -> None:
        """Have the loop do something; called from any thread."""
        self._inbox.append(wish)
        if not self._is_woken:
            self._is_woken = True
            os.eventfd_write(self._wake, 1)

    def _do_what_is_wanted(self) -> None:
        os.eventfd_read(self._wake)
        self._is_woken = False  # first, so that nothing that is put in meanwhile is overlooked
        for _ in range(len(self._inbox)):
            self._inbox.popleft()()

    def _accept(self, listener: socket.socket) -> None:
        """Take in who has come: many at once, as a probe waits behind them."""
        here = listener.getsockname()
        for _ in range(ACCEPT_AT_ONCE):
            try:
                client, address = listener.accept()
            except OSError:
                return
            if self._open >= self.worker_connections:
                client.close()
                continue
            with self._lock:
                self._open += 1
            self._poll(Connection(self.cfg, client, address, here), HEAD_S)

    def _poll(self, conn: Connection, seconds: float) -> None:
        """Leave a connection to the poller until something comes, so long at most. Called from any thread, as the last thing."""
        conn.expires = time.monotonic() + seconds
        fd = conn.sock.fileno()
        self._polled[fd] = conn
        if conn.is_registered:
            self._epoll.modify(fd, _ONCE)
        else:
            conn.is_registered = True
            self._epoll.register(fd, _ONCE)

    def _drop(self, conn: Connection) -> None:
        with self._lock:
            self._open -= 1
        conn.close()

    def _close_expired(self, now: float) -> None:
        for fd, conn in list(self._polled.items()):
            if conn.expires < now:
                del self._polled[fd]  # by this thread alone; the others only add to it
                self._drop(conn)

    def _receive(self, conn: Connection) -> bool:
        """Take what has come; returns whether the head of a request is there. If not, the connection is looked after."""
        try:
            data = conn.sock.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._poll(conn, conn.expires - time.monotonic())
            return False
        except OSError:
            data = b""
        if not data:
            self._drop(conn)
            return False
        left_s = conn.expires - time.monotonic() if conn.head or conn.is_ending else HEAD_S
        if not conn.is_ending:
            conn.head += data
            if b"\r\n\r\n" in conn.head or len(conn.head) > HEAD_BYTES:
                return True
        self._poll(conn, left_s)
        return False

    # A request whose head is there

    def _dispatch(self, conn: Connection) -> None:
        request = fast_path.read(conn.head)
        if request and (answer := self.fast_path.probe(request)):
            conn.head = request.rest
            self._reply(conn, answer)
        elif not request and (asked := fast_path.glance(conn.head)) and (answer := self.fast_path.probe(asked)):
            conn.head, conn.is_last = asked.rest, asked.is_last
            self._reply(conn, answer)
        elif _ASIDE.match(conn.head):
            self._aside.submit(self._serve, conn)
        elif refusal := self._refusal(conn):
            self._refused.append((conn, refusal, time.monotonic()))
        else:
            with self._lock:
                self._busy += 1
            if not (request and self._begin(conn, request)):
                self.tpool.submit(self._serve_call, conn)

    def _begin(self, conn: Connection, request: Request) -> bool:
        """Begin a prediction, which is finished once the model has made it; False if it is not an ordinary one."""
        fast_call = self.fast_path.submit(request, conn.sock, lambda fast_call: self._soon(lambda: self._finish(conn, fast_call)))
        if fast_call:
            conn.head = request.rest
            if fast_call.failed:
                self._finish(conn, fast_call)
        return fast_call is not None

    def _finish(self, conn: Connection, fast_call: FastCall) -> None:
        """Answer a prediction."""
        conn.note = fast_call.note
        self._reply(conn, self.fast_path.answer(fast_call))

    def _reply(self, conn: Connection, answer: Answer) -> None:
        """Send an answer from the loop, which does not wait: what the client does not take at once is left to a thread."""
        second = int(time.time())
        if self._date[0] != second:
            self._date = second, util.http_date()
        headers = [("Server", SERVER), ("Date", self._date[1]), *answer.headers]
        data = wire(answer.status, headers, answer.body, close=conn.is_last or not self.alive)
        try:
            sent = conn.sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._replied(conn, is_whole=False)
            return
        if sent < len(data):
            self.tpool.submit(self._send_rest, conn, data[sent:])
        else:
            self._replied(conn, is_whole=True)

    def _send_rest(self, conn: Connection, data: bytes) -> None:
        """Send for as long as the client goes on to take it; in a thread."""
        is_whole = True
        try:
            conn.sock.sendall(data)
        except OSError as error:
            log.debug("a connection ended: %s", error)
            is_whole = False
        self._soon(lambda: self._replied(conn, is_whole=is_whole))

    def _replied(self, conn: Connection, *, is_whole: bool) -> None:
        """An answer of the loop's is out, or nobody takes it."""
        note, conn.note = conn.note, None
        if note:
            with self._lock:
                self._busy -= 1
            if note.is_wanted and self._stderr.poll(0):
                access.finish(note)
            elif note.is_wanted:  # who reads the log is late; that is not to stop the loop
                self.tpool.submit(access.finish, note)
        self._go_on(conn, is_open=is_whole and self.alive and not conn.is_last)

    def _go_on(self, conn: Connection, *, is_open: bool) -> None:
        """After an answer: the next request, if there is to be one."""
        if not is_open:
            self._linger(conn)
        elif b"\r\n\r\n" in conn.head:
            self._soon(lambda: self._dispatch(conn))
        else:
            self._poll(conn, HEAD_S if conn.head else self.cfg.keepalive)

    def _refusal(self, conn: Connection) -> Unavailable | None:
        if not self.alive:
            return Unavailable("the function is ending; ask again, another one will answer", retry_after_s=1)
        if not conn.head.startswith(b"POST "):
            return None
        if self._busy >= self.cfg.threads:
            return Unavailable(f"{self._busy} requests are being worked on already", retry_after_s=1)
        priority = _PRIORITY.search(conn.head)
        return self.refusal(is_batch=priority is not None and is_batch_work(priority[1].decode("latin-1")))

    def _tell(self, count: int) -> None:
        for _ in range(min(count, len(self._refused))):
            self._tellable -= 1
            self._refuse(*self._refused.popleft())

    def _refuse(self, conn: Connection, refusal: Unavailable, began: float) -> None:
        """Say no; the connection is used again if all of the request has come."""
        head, _, rest = conn.head.partition(b"\r\n\r\n")
        length = _LENGTH.search(head + b"\r\n")
        is_whole = self.alive and b"chunked" not in head.lower() and len(rest) == (int(length[1]) if length else 0)
        conn.head = b""
        note, headers = self.fast_path.refused(head, began)
        wait_s = retry_after(refusal.retry_after_s or 1)
        said = refusal_reply(str(refusal), wait_s, is_v2=note.path.startswith("/v2/"), close=not is_whole)
        status, _, others = said.partition(b"\r\n")
        own = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
        try:
            # It fits into the socket's buffer, which is empty: one request at a time.
            conn.sock.send(status + b"\r\n" + own + others, socket.MSG_DONTWAIT)
        except OSError:
            self._drop(conn)
        else:
            if is_whole:
                self._poll(conn, self.cfg.keepalive)
            else:
                self._linger(conn)
        if note.is_wanted:
            if not self._stderr.poll(0):  # who reads the log is late; as many as are refused may not wait for that
                note.line = None
            access.finish(note)

    def _linger(self, conn: Connection) -> None:
        """Close so that the client can still read what it was told."""
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(conn)
            return
        conn.is_ending = True
        self._poll(conn, LINGER_S)

    # In a thread

    def _serve_call(self, conn: Connection) -> None:
        try:
            self._serve(conn)
        finally:
            if not self.alive:
                os.eventfd_write(self._wake, 1)

    def _say(self, last_words: Callable[[], object]) -> None:
        try:
            last_words()
        finally:
            with self._lock:
                self._busy -= 1
            os.eventfd_write(self._wake, 1)

    def _serve(self, conn: Connection) -> None:
        """Answer the connection's request, and more for as long as they come at once; then leave it to the poller."""
        is_call = not _ASIDE.match(conn.head)
        poll: select.poll | None = None
        while True:
            is_open = self._answer(conn, may_wait=is_call) and self.alive
            conn.head = conn.parser.unreader.take_buffered()  # the next request's, if it came with the last
            if is_open and not conn.head and is_call and self._busy <= 1:
                if poll is None:
                    poll = select.poll()
                    poll.register(conn.sock, select.POLLIN)
                if poll.poll(HOT_S * 1000):
                    continue
            break
        if is_call:
            with self._lock:
                self._busy -= 1
        self._go_on(conn, is_open=is_open)

    def _answer(self, conn: Connection, *, may_wait: bool) -> bool:
        """One request, whose head may be in `conn.head`; returns whether another one can follow. may_wait: for a body that nobody read."""
        request = None
        try:
            if conn.parser is None:
                conn.parser = http.get_parser(self.cfg, conn.sock, conn.client)
            if conn.head:
                conn.parser.unreader.unread(conn.head)
                conn.head = b""
            request = next(conn.parser)
            if request and not may_wait and _is_left(request):
                request.force_close()
            if not (request and self.handle_request(request, conn)):
                return False
            return not _is_left(request) or self._keepalive_after(conn, True)
        except StopIteration:
            return False
        except OSError as error:  # gunicorn's NoMoreData is one, too
            log.debug("a connection ended: %s", error)
            return False
        except Exception as error:  # noqa: BLE001  told there
            self.handle_error(request, conn.sock, conn.client, error)
            return False

    def handle_error(self, req: Any, client: socket.socket, addr: Any, error: Exception) -> None:
        """What is no HTTP request, and what went wrong in gunicorn or the app."""
        if isinstance(error, http.errors.ParseException):
            status = _STATUSES.get(type(error), 400)
            said = shaped(status, "bad_request", f"this is not an HTTP request that is understood here: {error}")
        else:
            log.error("a request failed", exc_info=error)
            said = shaped(500, "internal_error", "the function failed on this request; its log says why")
        try:
            client.sendall(wire(said.status, said.headers, said.get_data(), close=True))
        except OSError:
            pass  # it is not there any more


def _is_left(request: Any) -> bool:
    """Whether there may be something of its body that nobody has read."""
    return getattr(request.body.reader, "length", None) != 0


@functools.lru_cache(64)
def refusal_reply(message: str, retry_after_s: str, *, is_v2: bool, close: bool) -> bytes:
    """A whole HTTP reply; is_v2: in the shape that the Open Inference Protocol has for errors."""
    response = reply({"error": message}, Unavailable.status) if is_v2 else shaped(Unavailable.status, Unavailable.type, message)
    response.headers["Retry-After"] = retry_after_s
    return wire(response.status, response.headers, response.get_data(), close=close)


def wire(status: str, headers: Iterable[tuple[str, str]], body: bytes, *, close: bool) -> bytes:
    """An answer as it goes over the wire."""
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers), f"Connection: {'close' if close else 'keep-alive'}"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
