"""The gunicorn worker: gunicorn's parser and threads, in a loop of our own.

Where gunicorn's gthread falls short for a model function:

- All connections belong to the loop (see `http_loop`): it reads requests whole, bodies too, and sends what clients are slow to take, so
  that a slow client holds no thread.
- Ordinary predictions and probes take no thread at all: the loop reads them and answers (see `fast_path`), the model's thread computes.
- Probes are answered by the loop however odd they are, metrics by threads of their own: at once, however many callers wait for the model.
- What would be refused anyway is refused from the loop, before its body is looked at (see `refusals`).
- Told to end, it goes on listening, so that callers get a 503 rather than a connection that nobody answers; it leaves as soon as the last
  running request is answered.
"""

import io
import logging
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gunicorn import SERVER, http, util
from gunicorn.workers.gthread import ThreadWorker

from function import error_shapes, fast_path
from function.connections import Connection, State
from function.errors import FunctionError, HttpError, Unavailable
from function.fast_path import Answer, FastCall, FastPath
from function.http import written
from function.http_loop import HttpLoop
from function.incoming import Body, ChunkedBody
from function.outbox import Outbox
from function.priority import Priority
from function.refusals import Refusals, wire

log = logging.getLogger("relight.function")

TICK_S = 1.0
HELD_BODIES = 8  # bodies of the largest size that may be on their way
SPARE_FILES = 64  # descriptors that are left to the agent and the rest of us, where the limit is low
_ASIDE = re.compile(rb"(?:GET|HEAD) /(?:metrics|v2/health/live|v2/health/ready)[ ?]")
_HEADER = re.compile(rb"\r\n(priority|ce-priority):([^\r\n]*)(?=\r\n)", re.IGNORECASE)
_STATUSES = {http.errors.LimitRequestLine: 414, http.errors.ExpectationFailed: 417, http.errors.LimitRequestHeaders: 431}


class FunctionWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """One process, one model. What follows is set before it runs."""

    fast_path: FastPath
    max_body_bytes: int
    admit: Callable[[Priority], None] = staticmethod(lambda priority: None)  # raises what a call that came now would be refused with
    last_words: Callable[[], object] | None = None  # what is to be done after the last answer, within the grace time
    leave: Callable[[int], object] = staticmethod(os._exit)  # end the process: threads may be in calls that never return

    def run(self) -> None:
        """Serve until told to end, then until the last running request is answered."""
        self._loop = HttpLoop(self.sockets, self._most_connections(), self.cfg.keepalive, HELD_BODIES * self.max_body_bytes)
        self._loop.handle(self)
        conclude = lambda conn, is_open: self._loop.conclude(conn, is_open=is_open)  # noqa: E731
        self._refusals = Refusals(self.fast_path.access, conclude, lambda: not self.alive)
        self._aside = ThreadPoolExecutor(2, "aside")  # for what is answered without the model, and without waiting for its callers
        self._working = 0  # requests that have a thread, or wait for one, or for the model
        self._date = (0, "")  # the second, and how HTTP says it
        deadline: float | None = None
        ticked = 0.0
        while deadline is None or (self._is_busy() and time.monotonic() < deadline):
            self._loop.turn(self._patience_s())
            now = time.monotonic()
            self.fast_path.expire(now)
            self._refusals.tell(now)
            if now - ticked >= TICK_S:
                ticked = now
                self.notify()
                if not self.is_parent_alive():
                    break
                self._loop.tick(now)
            if not self.alive:
                self._loop.is_ending = True
                deadline = deadline or now + self.cfg.graceful_timeout
                self._say_last_words()
        self._refusals.tell_all()
        self.leave(0)

    def handle_exit(self, sig: int, frame: object) -> None:
        """SIGTERM: serve what is there, and leave."""
        self.alive = False
        if hasattr(self, "_loop"):  # it runs already
            self._loop.wake()

    def descriptors(self) -> Iterator[int]:
        """The file descriptors of the server's own, which no child of the agent's is to have."""
        return self._loop.descriptors()

    def _most_connections(self) -> int:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY:
            return int(self.worker_connections)
        return max(16, min(int(self.worker_connections), limit - len(list(Path("/proc/self/fd").iterdir())) - SPARE_FILES))

    def _patience_s(self) -> float:
        """How long the loop may wait for something to come."""
        if self._refusals:
            return 0.01
        return min(TICK_S, max(0.0, self.fast_path.wake_at - time.monotonic()))

    def _is_busy(self) -> bool:
        return bool(self._working or self._loop.connections.at(State.SENDING))

    def _say_last_words(self) -> None:
        if self.last_words and not self._is_busy():
            self._working += 1  # so that whoever asks meanwhile is still told
            self.tpool.submit(self._say, self.last_words)
            self.last_words = None

    def _say(self, last_words: Callable[[], object]) -> None:
        try:
            last_words()
        finally:
            self._loop.soon(self._worked)

    def _worked(self) -> None:
        self._working -= 1

    # A request, in the loop

    def on_head(self, conn: Connection, end: int) -> None:
        """Called by the loop, as what follows."""
        data = conn.received
        head = fast_path.read(data)
        if (asked := head or fast_path.glance(data)) and (answer := self.fast_path.probe(asked)):
            conn.received, conn.is_last = b"" if asked.is_last else data[end:], asked.is_last
            self._loop.connections.enter(conn, State.WORKING)
            self._reply(conn, answer)
        elif _ASIDE.match(data):
            conn.parsed, conn.received, conn.body = data[:end], data[end:], Body(0, 0)
            self._loop.connections.enter(conn, State.WORKING)
            self._aside.submit(self._serve, conn, is_call=False)
        elif error := self._refusal(data):
            self._loop.connections.enter(conn, State.WORKING)
            self._refusals.add(conn, error)
        else:
            conn.head, conn.parsed, conn.received = head, data[:end] if end else data, data[end:] if end else b""
            if self._find_end(conn):
                self._loop.await_body(conn)

    def _refusal(self, data: bytes) -> FunctionError | None:
        """Why a request is not even read, from its head."""
        if not self.alive:
            return Unavailable("the function is ending; ask again, another one will answer", retry_after_s=1)
        if not data.startswith(b"POST "):
            return None
        if self._working >= self.cfg.threads:
            return Unavailable(f"{self._working} requests are being worked on already", retry_after_s=1)
        head = data.partition(b"\r\n\r\n")[0] + b"\r\n"
        try:
            self.admit(Priority.of_request({name.lower().decode(): value.decode("latin-1") for name, value in _HEADER.findall(head)}))
        except FunctionError as error:
            return error
        return None

    def _find_end(self, conn: Connection) -> bool:
        """Find out which body is to come, by gunicorn's rules where the request is not ordinary; False if it is no HTTP request."""
        if conn.head:
            conn.body = Body(conn.head.length, self.max_body_bytes)
            return True
        try:
            conn.request = self._parsed(conn)
        except Exception as error:  # noqa: BLE001  told there
            self._loop.connections.enter(conn, State.WORKING)
            self.handle_error(None, conn.sock, conn.client, error)
            self._loop.conclude(conn, is_open=False)
            return False
        reader = conn.request.body.reader
        is_chunked = isinstance(reader, http.body.ChunkedReader)
        conn.body = ChunkedBody(self.max_body_bytes) if is_chunked else Body(getattr(reader, "length", 0), self.max_body_bytes)
        if conn.request._expected_100_continue and not conn.body.is_whole:  # noqa: SLF001  gunicorn says it when the body was to be there
            conn.request._expected_100_continue = False  # noqa: SLF001
            conn.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _parsed(self, conn: Connection) -> Any:
        """gunicorn's request, of a head that is all there. Raises what gunicorn does for one that is not HTTP."""
        try:
            return next(http.get_parser(self.cfg, [conn.parsed], conn.client))
        except (http.errors.NoMoreData, StopIteration):
            raise http.errors.LimitRequestHeaders(f"the head has no end within {len(conn.parsed)} bytes") from None

    def on_body(self, conn: Connection) -> None:
        """Begin to make the answer."""
        self._working += 1
        if not self._submit(conn):
            self.tpool.submit(self._serve, conn)

    def on_late_body(self, conn: Connection, error: FunctionError) -> None:
        """Say so."""
        self._refusals.answer(conn, error, conn.began, conn.parsed.removesuffix(b"\r\n\r\n"))

    def _submit(self, conn: Connection) -> bool:
        """Begin a prediction, which is finished once the model has made it; False if it is not an ordinary one."""
        head, body = conn.head, conn.body
        if head is None or body is None or body.error or body.size > fast_path.MOST_BYTES:
            return False
        data = body.take()
        fast_call = self.fast_path.submit(head, data, conn.sock, lambda done: self._loop.soon(lambda: self._finish(conn, done)))
        if fast_call is None:
            body.put_back(data)
        elif fast_call.failed:
            self._finish(conn, fast_call)
        return fast_call is not None

    def _finish(self, conn: Connection, fast_call: FastCall) -> None:
        """Answer a prediction."""
        self._working -= 1
        conn.note = fast_call.note
        self._reply(conn, self.fast_path.answer(fast_call))

    def _reply(self, conn: Connection, answer: Answer) -> None:
        """Send an answer from the loop, which does not wait."""
        second = int(time.time())
        if self._date[0] != second:
            self._date = second, util.http_date()
        headers = [("Server", SERVER), ("Date", self._date[1]), *answer.headers]
        try:
            conn.sock.sendall(wire(answer.status, headers, answer.body, close=conn.is_last or not self.alive))
        except OSError as error:
            log.debug("a connection ended: %s", error)
        self._loop.conclude(conn, is_open=self.alive)

    # In a thread

    def _serve(self, conn: Connection, *, is_call: bool = True) -> None:
        """Answer a request, and hand the connection back."""
        is_open = False
        try:
            is_open = self._answer(conn, is_left=not is_call)
        finally:
            self._loop.soon(lambda: self._served(conn, is_open=is_open, is_call=is_call))

    def _served(self, conn: Connection, *, is_open: bool, is_call: bool) -> None:
        self._working -= is_call
        self._loop.conclude(conn, is_open=is_open)

    def _answer(self, conn: Connection, *, is_left: bool) -> bool:
        """Returns whether another request can follow. is_left: nobody has looked whether there is a body."""
        request = None
        try:
            request = conn.request or self._parsed(conn)
            body = conn.body
            assert body
            if body.error or (is_left and (body.size or not isinstance(request.body.reader, http.body.EOFReader))):
                request.force_close()
            request.body = _Input(body)
            return bool(self.handle_request(request, conn))
        except StopIteration:
            return False
        except OSError as error:
            log.debug("a connection ended: %s", error)
            return False
        except Exception as error:  # noqa: BLE001  told there
            self.handle_error(request, conn.sock, conn.client, error)
            return False

    def handle_error(self, req: Any, client: Outbox, addr: Any, error: Exception) -> None:
        """What is no HTTP request, and what went wrong in gunicorn or the app."""
        if isinstance(error, http.errors.ParseException):
            status = _STATUSES.get(type(error), 400)
            said = HttpError(status, "bad_request", f"this is not an HTTP request that is understood here: {_reason(error)}")
        else:
            log.error("a request failed", exc_info=error)
            said = HttpError(500, "internal_error", "the function failed on this request; its log says why")
        answer = written(said, error_shapes.own)
        try:
            client.sendall(wire(answer.status, answer.headers, answer.get_data(), close=True))
        except OSError:
            pass  # it is not there any more


def _reason(error: Exception) -> str:
    """What gunicorn says is wrong; of a header only its name, since its value may be a key."""
    if isinstance(error, http.errors.InvalidHeader):
        return f"Invalid HTTP header: {''.join(str(error.hdr).split()[:1])!r:.60}"
    return f"{error!s:.200}"


class _Input(io.BytesIO):
    """A body as WSGI has it: all there, or the reason why it is not."""

    def __init__(self, body: Body) -> None:
        self._error = body.error
        super().__init__(body.take())

    def read(self, size: int | None = -1) -> bytes:
        """Raises what is wrong with the body."""
        if self._error:
            raise self._error
        return super().read(size)
