"""What becomes of each request that the loop has received: who answers it.

Probes, what is refused and ordinary predictions are answered in the loop; all else by the WSGI app, in a thread.
"""

import io
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gunicorn import http

from function import fast_path
from function.connections import Connection, State
from function.errors import FunctionError, HttpError, Unavailable
from function.fast_path import FastPath, Head
from function.http_loop import HttpLoop
from function.incoming import Body, ChunkedBody
from function.outbox import CONTINUE
from function.priority import Priority
from function.receiver import HEAD_BYTES
from function.refusals import Refusals
from function.replies import Replies

log = logging.getLogger("relight.function")

_ASIDE = re.compile(rb"(?:GET|HEAD) /(?:metrics|v2/health/live|v2/health/ready)[ ?]")
_HEADER = re.compile(rb"\r\n(priority|ce-priority):([^\r\n]*)(?=\r\n)", re.IGNORECASE)


@dataclass(frozen=True)
class Answerers:
    """Who makes answers."""

    fast_path: FastPath
    app: Callable[[Any, Connection], bool]  # answers gunicorn's request; whether another can follow
    pool: ThreadPoolExecutor  # where it does
    aside: ThreadPoolExecutor  # the same for what is answered without the model, and without waiting for its callers
    admit: Callable[[Priority], None]  # raises what a call that came now would be refused with


class RequestHandler:
    """One server's; the loop's, but for what is said to be in a thread."""

    def __init__(self, loop: HttpLoop, answerers: Answerers, config: Any, *, most_working: int, max_body_bytes: int) -> None:
        """config: gunicorn's. most_working: requests that may be worked on at a time."""
        self._loop = loop
        self._answerers = answerers
        self._fast_path = answerers.fast_path
        self._config = config
        self._most_working = most_working
        self._max_body_bytes = max_body_bytes
        self._working: set[Connection] = set()  # whose request has a thread, or waits for one, or for the model
        self._replies = Replies(loop, config)
        self.refusals = Refusals(self._fast_path.access, self._replies.send)

    def is_busy(self) -> bool:
        """Whether there are requests that were let in, on their way or being answered."""
        return bool(self._working or self._loop.connections.at(State.SENDING) or self._loop.bodies())

    def end(self) -> None:
        """The time is up: tell those who can be told."""
        self.refusals.tell_all()
        for conn in self._loop.bodies():
            self.on_late(conn, _ending())

    # A request has come; called by the loop

    def on_head(self, conn: Connection, end: int) -> None:
        """See `http_loop.Handler`, for this and what follows."""
        data = conn.received
        head = fast_path.read(data)
        asked = head or fast_path.glance(data)
        answer = self._fast_path.probe(asked) if asked and asked.method != "POST" else None
        self._separate(conn, end)
        conn.is_last = not end or bool(asked and asked.is_last and (answer or head))
        if answer:
            self._replies.reply(conn, answer)
        elif _ASIDE.match(data):
            self._serve_by(self._answerers.aside, conn)
        elif error := self._refusal(conn, head):
            self._refuse(conn, error, head)
        elif head and head.is_ordinary and head.length <= min(len(conn.received), self._max_body_bytes):  # it is all there
            conn.head, conn.content, conn.received = head, conn.received[: head.length], conn.received[head.length :]
            self._begin(conn)
        else:
            self._expect_body(conn, head)

    def on_body(self, conn: Connection) -> None:
        """Begin to make the answer."""
        assert conn.body
        if conn.body.error:
            self.on_late(conn, conn.body.error)
            return
        conn.content, conn.body = conn.body.take(), None
        self._begin(conn)

    def _begin(self, conn: Connection) -> None:
        conn.sock.interim = CONTINUE if conn.head or conn.request.version >= (1, 1) else b""  # which knows of it
        self._working.add(conn)
        if not self._submit(conn):
            self._serve_by(self._answerers.pool, conn)

    def _serve_by(self, pool: ThreadPoolExecutor, conn: Connection) -> None:
        """Have a thread make the answer."""
        try:
            pool.submit(self._serve, conn)
        except RuntimeError as error:  # no thread can be started
            if pool._threads:  # noqa: SLF001  it is in the queue, and one of these takes it
                return
            pool._work_queue.get_nowait()  # noqa: SLF001
            log.error("a request cannot be answered: %s", error)
            conn.is_last = True
            self._working.discard(conn)
            self._replies.tell(conn, Unavailable("no thread can be started for this request; ask again", retry_after_s=1))

    def on_late(self, conn: Connection, error: FunctionError) -> None:
        """Say so."""
        conn.is_last, began = True, conn.began
        if conn.parsed:
            self.refusals.answer(conn, error, began)
        else:
            self._replies.tell(conn, error)

    def on_drop(self, conn: Connection) -> None:
        """Nobody works on it."""
        self._working.discard(conn)

    def _separate(self, conn: Connection, end: int) -> None:
        """The head from what is behind it; all is head if it has no end."""
        conn.parsed, conn.received = (conn.received[:end], conn.received[end:]) if end else (conn.received, b"")
        self._loop.connections.enter(conn, State.WORKING)

    def _refusal(self, conn: Connection, head: Head | None) -> FunctionError | None:
        """Why a request is not even read, from its head."""
        if self._loop.is_ending:
            return _ending()
        if not conn.parsed.startswith(b"POST "):
            return None
        if len(self._working) >= self._most_working:
            return Unavailable(f"{len(self._working)} requests are being worked on already", retry_after_s=1)
        headers = head.headers if head else {name.lower().decode(): value.decode("latin-1") for name, value in _HEADER.findall(conn.parsed)}
        try:
            self._answerers.admit(Priority.of_request(headers))
        except FunctionError as error:
            return error
        return None

    def _refuse(self, conn: Connection, error: FunctionError, head: Head | None) -> None:
        """Another request can follow if the body is there and it is known where it ends."""
        conn.is_last = conn.is_last or self._loop.is_ending or head is None or len(conn.received) < head.length
        conn.received = b"" if conn.is_last or head is None else conn.received[head.length :]
        self.refusals.add(conn, error)

    def _expect_body(self, conn: Connection, head: Head | None) -> None:
        """Which body is to come; by gunicorn's rules where the request is not ordinary."""
        if head and head.is_ordinary:
            conn.head, conn.body = head, Body(head.length, self._max_body_bytes)
        else:
            try:
                conn.request = self._parsed(conn)
                conn.body = self._body_of(conn)
            except Exception as error:  # noqa: BLE001  told there
                self._replies.tell(conn, error)
                return
        self._loop.await_body(conn)

    def _parsed(self, conn: Connection) -> Any:
        """gunicorn's request, of a head that is all there. Raises what gunicorn does for one that is not HTTP."""
        if len(conn.parsed) > HEAD_BYTES or not conn.parsed.endswith(b"\r\n\r\n"):
            raise _no_head(conn.parsed)
        return next(http.get_parser(self._config, [conn.parsed], conn.client))

    def _body_of(self, conn: Connection) -> Body:
        request, most = conn.request, self._max_body_bytes
        reader = request.body.reader
        body = ChunkedBody(most) if isinstance(reader, http.body.ChunkedReader) else Body(getattr(reader, "length", 0), most)
        is_asked, request._expected_100_continue = request._expected_100_continue, False  # noqa: SLF001  gunicorn says it too late
        if is_asked and not conn.received and not body.is_whole:
            with suppress(OSError):  # it is gone, as is found next
                conn.sock.sendall(CONTINUE)
        return body

    # A prediction, which the model's thread makes

    def _submit(self, conn: Connection) -> bool:
        """Begin it; False if it is not an ordinary one."""
        if conn.head is None:
            return False
        put = self._loop.inbox.put
        call = conn.fast_call = self._fast_path.submit(conn.head, conn.content, conn.sock, lambda: put(conn, self._finish))
        if call and call.failed:
            self._finish(conn)
        return call is not None

    def _finish(self, conn: Connection) -> None:
        """Answer it."""
        self._working.discard(conn)
        conn.note = conn.fast_call.note
        self._replies.reply(conn, self._fast_path.answer(conn.fast_call))

    # All else, in a thread

    def _serve(self, conn: Connection) -> None:
        """Answer a request, and hand the connection back."""
        is_open = False
        failed: Exception | None = None
        try:
            is_open = self._answer(conn)
        except StopIteration:  # gunicorn has logged what broke
            pass
        except OSError as error:
            log.debug("a connection ended: %s", error)
        except Exception as error:  # noqa: BLE001  told there
            failed = error
        self._loop.inbox.put(conn, lambda conn: self._served(conn, failed, is_open=is_open))

    def _answer(self, conn: Connection) -> bool:
        """Returns whether another request can follow."""
        request = conn.request
        if request is None:
            request = self._parsed(conn)
            if not conn.head and not isinstance(request.body.reader, http.body.EOFReader):
                request.force_close()  # nobody has looked where its body ends
        if conn.is_last:
            request.force_close()
        request.body = io.BytesIO(conn.content)
        return self._answerers.app(request, conn)

    def _served(self, conn: Connection, failed: Exception | None, *, is_open: bool) -> None:
        """In the loop again."""
        self._working.discard(conn)
        if failed:
            self._replies.tell(conn, failed)
        else:
            self._loop.conclude(conn, is_open=is_open)


def _ending() -> Unavailable:
    return Unavailable("the function is ending; ask again, another one will answer", retry_after_s=1)


def _no_head(data: bytes) -> Exception:
    """Why this is the head of no request."""
    if len(data) > HEAD_BYTES:
        return http.errors.LimitRequestHeaders("the head is too large")  # type: ignore[no-any-return]  # gunicorn has no types
    if data.startswith(b"\x16\x03"):
        return HttpError(400, "bad_request", "this port speaks HTTP, not TLS: ask http://, or give TLS to what is in front of the function")
    return HttpError(400, "bad_request", f"this is not HTTP: it begins with {data[:8]!r}")
