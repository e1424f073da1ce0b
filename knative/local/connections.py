"""The connections of the platform's ports: what each is at, how long it may be, and which one gives way when there are too many.

The rules, and most of the numbers, are those of the function's own server (function/connections.py); here aiohttp reads and writes.
"""

import asyncio
import enum
import itertools
import json
import logging
import math
import select
import socket
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, cast

from aiohttp import StreamReader, web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web_protocol import RequestHandler

HEAD_S = 20.0  # for the head of a request, from when its connection is there, or its first byte
KEEP_S = 75.0  # between two requests
END_S = 5.0  # for a client to read what it is told at last
READ_S = 60.0  # in which a client must take something of its answer
UNSENT_BYTES = 256 << 20  # of all connections; beyond it those go that have not read for longest
# Of the head of a request: all of it, its target, one header with its name, and how many headers.
HEAD_BYTES, TARGET_BYTES, HEADER_BYTES, HEADERS = 64 << 10, 8190, 32 << 10, 128
YOUNG_S = 1.0  # for which one at rest, or a request on its way, is taken to go on at once
FRESH_S = 0.05  # and for which it is left alone
PIECE_BYTES = 64 << 10  # read at a time
MESSAGE_CHARACTERS = 300
ERRORS_S = 10.0  # between two tracebacks
HEAD_TOO_LARGE = f"the head of the request has more than {HEAD_BYTES} bytes"
HEADER_TOO_LARGE = f"a header of the request has more than {HEADER_BYTES} bytes"
_HUNG_UP = select.POLLRDHUP | select.POLLHUP | select.POLLERR

log = logging.getLogger("relight.platform")


class State(enum.IntEnum):
    """What a connection is at."""

    ENDING = 0  # it is answered for the last time; whatever still comes is thrown away
    RESTING = 1  # between two requests
    RECEIVING = 2  # the head of a request is to come
    WORKING = 3  # a request is there, its body and answer on their way; it gives way to others only while its sender rests


_PATIENCE_S = {State.ENDING: END_S, State.RESTING: KEEP_S, State.RECEIVING: HEAD_S}


class Connection(RequestHandler):
    """One client's: aiohttp's part, which says what it is at."""

    __slots__ = ("_all", "_came_at", "_content", "_head_bytes", "_raw", "since", "state", "wire")

    wire: asyncio.Transport  # aiohttp forgets its own before it is closed

    def __init__(self, connections: "Connections", raw: socket.socket, server: web.Server, **options: Any) -> None:
        super().__init__(server, **options)
        self.state = State.RECEIVING
        self.since = 0.0  # when it came to that
        self._all = connections
        self._raw = raw
        self._head_bytes = 0
        self._content: StreamReader | None = None  # the body of the request that came last
        self._came_at = 0.0  # when something of it came

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there."""
        self.wire = cast(asyncio.Transport, transport)
        self.wire.max_size = PIECE_BYTES  # type: ignore[attr-defined]  # asyncio would allocate 256 KiB for each
        super().connection_made(transport)
        self._all.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is gone."""
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Something has come."""
        self._came_at = self._all.now()
        if self.state is State.RESTING and data:
            self._all.enter(self, State.RECEIVING)
        before = self._request_count
        is_head = not self._upgraded and (self._content is None or self._content.is_eof())
        super().data_received(data)
        if self._request_count != before:
            self._head_bytes = 0
            self._look_at_last(*self._messages[-1])
        elif is_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._end_head()

    def _end_head(self) -> None:
        """There is no end to it, and nobody keeps more; who waits for another answer cannot be told before that."""
        if self.state is State.RECEIVING:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, HEAD_TOO_LARGE)
        elif self.state is State.WORKING:
            self._all.drop(self)

    def _look_at_last(self, message: Any, content: StreamReader) -> None:
        """What cannot be read is an answer's turn after the others; if it is in a body, whoever reads that is to learn of it now."""
        if isinstance(message, RawRequestMessage):
            self._content = content
        elif self._content and not self._content.is_eof():
            self._content.set_exception(web.RequestPayloadError(message.message))

    def pause_writing(self) -> None:
        """The client is slow to take what it is sent."""
        super().pause_writing()
        self._all.stalls(self)

    def resume_writing(self) -> None:
        """It has taken most of it."""
        super().resume_writing()
        self._all.goes_on(self)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to what is no HTTP, or to a request that nobody could answer."""
        if request.writer.output_size:
            raise ConnectionError("an answer was begun that cannot be completed")
        if isinstance(exc, web.RequestPayloadError):
            status, message = HTTPStatus.BAD_REQUEST, "the body of the request is no chunks"
        elif status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._all.report(exc)
            message = "the platform has made a mistake; its terminal tells more"
        elif too_large := _too_large(exc):
            status, message = too_large
        answer = web.Response(status=status, body=_document(status, message or ""), content_type="application/json")
        answer.force_close()
        self._all.enter(self, State.ENDING)
        return answer

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Something else went wrong, or the client went away: aiohttp does not know which."""
        error = kw.get("exc_info")
        if not self.wire.is_closing() and not isinstance(error, web.RequestPayloadError):
            self._all.report(error)

    def work(self) -> None:
        """A request is there."""
        self._all.enter(self, State.WORKING)

    def rest(self, request: web.BaseRequest) -> None:
        """Its answer is made; what still comes of its body is thrown away for a while, so that the client reads the answer."""
        self._all.enter(self, State.RESTING if request.content.is_eof() else State.ENDING)

    def rests_in_body(self, since: float) -> bool:
        """Whether nothing has come of its request's body since then, though it is not whole, and would be read."""
        is_sending = self._content is not None and not self._content.is_eof() and self.wire.is_reading()
        return is_sending and self._came_at < since and not self.has_data()

    def has_data(self) -> bool:
        """Whether something has come that nobody has read."""
        try:
            return bool(self._raw.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def expire(self) -> None:
        """Its time is up."""
        if self.state is State.RECEIVING and self._head_bytes:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the head of the request did not come within {HEAD_S:g} s")
        else:
            self._all.drop(self)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Tell the client what is wrong with what it sends, and end."""
        body = _document(status, message)
        lines = [
            f"HTTP/1.1 {status} {status.phrase}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        self.wire.write("\r\n".join([*lines, "", ""]).encode() + body)
        self._all.enter(self, State.ENDING)
        self.force_close()


def _too_large(error: BaseException | None) -> tuple[HTTPStatus, str] | None:
    """What a client is told of a head that was not read to its end; None if it is none of that."""
    if isinstance(error, LineTooLong):
        if error.args[1] == TARGET_BYTES:
            return HTTPStatus.REQUEST_URI_TOO_LONG, f"the target of the request has more than {TARGET_BYTES} bytes"
        return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, HEADER_TOO_LARGE
    if isinstance(error, BadHttpMessage) and error.message.startswith("Too many headers"):  # aiohttp has no other name for it
        return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the request has more than {HEADERS} headers"
    return None


def _document(status: int, message: str) -> bytes:
    kind = "internal_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "bad_request"
    if status == HTTPStatus.REQUEST_TIMEOUT:
        kind = "too_slow"
    return json.dumps({"error": {"type": kind, "message": message.partition("\n")[0].rstrip(":")[:MESSAGE_CHARACTERS]}}).encode()


class Connections:
    """Those of one port, or of several that share a bound."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._by_state: tuple[dict[Connection, None], ...] = tuple({} for _ in State)  # each in the order they came to it
        self._stalled: dict[Connection, tuple[float, int]] = {}  # since when its client has taken nothing of so many bytes
        self._reported_at = -math.inf
        self._awaited: set[Callable[[], object]] = set()  # who waits for room

    def now(self) -> float:
        """On its clock."""
        return self._clock()

    def __len__(self) -> int:
        return sum(map(len, self._by_state))

    def count(self, state: State) -> int:
        """How many are at it."""
        return len(self._by_state[state])

    def add(self, conn: Connection) -> None:
        """A new one."""
        conn.since = self._clock()
        self._by_state[conn.state][conn] = None

    def remove(self, conn: Connection) -> None:
        """It is gone."""
        self._by_state[conn.state].pop(conn, None)
        self._stalled.pop(conn, None)
        self._tell_room()

    def enter(self, conn: Connection, state: State) -> None:
        """It is at something else now."""
        if conn in self._by_state[conn.state]:
            del self._by_state[conn.state][conn]
            conn.state, conn.since = state, self._clock()
            self._by_state[state][conn] = None
            if state is not State.WORKING:
                self._tell_room()

    def await_room(self, on_room: Callable[[], object]) -> None:
        """Have it called once, when a connection is gone or at rest."""
        self._awaited.add(on_room)

    def _tell_room(self) -> None:
        if self._awaited:
            awaited, self._awaited = self._awaited, set()
            for on_room in awaited:
                on_room()

    def drop(self, conn: Connection) -> None:
        """End it now, whatever is still to be sent."""
        self.remove(conn)
        conn.wire.abort()

    def evict(self, *, is_last_resort: bool = False) -> bool:
        """Close the one that is missed least; False if there is none, as all are being worked on or have just come.

        Last of all goes who has begun to send a body and has sent nothing for a while.
        Who asks for something all the time is missed more than who has been about to ask for a while. is_last_resort: however fresh it is.
        """
        now = self._clock()
        young, fresh = now - YOUNG_S, math.inf if is_last_resort else now - FRESH_S
        for state, since in (
            (State.ENDING, math.inf),
            (State.RESTING, young),
            (State.RECEIVING, young),
            (State.RECEIVING, fresh),
            (State.RESTING, fresh),
        ):
            if found := self._oldest(state, since):
                self.drop(found)
                return True
        if found := next((conn for conn in self._older(State.WORKING, young) if conn.rests_in_body(young)), None):
            self.drop(found)
            return True
        return False

    def _oldest(self, state: State, since: float) -> Connection | None:
        """The first one that came to this state before then, and of whom there is nothing to be read."""
        return next((conn for conn in self._older(state, since) if state is State.ENDING or not conn.has_data()), None)

    def _older(self, state: State, since: float) -> Iterator[Connection]:
        return itertools.takewhile(lambda conn: conn.since < since, self._by_state[state])

    def stalls(self, conn: Connection) -> None:
        """Its client does not take what it is sent."""
        self._stalled[conn] = self._clock(), conn.wire.get_write_buffer_size()

    def goes_on(self, conn: Connection) -> None:
        """It does again."""
        self._stalled.pop(conn, None)

    def look(self) -> None:
        """From time to time: end those whose time is up, and those whose client has hung up where nobody reads."""
        now = self._clock()
        for state, patience_s in _PATIENCE_S.items():
            for conn in list(self._older(state, now - patience_s)):
                conn.expire()
        self._look_at_stalled(now)
        for conn in self._hung_up():
            self.drop(conn)

    def _look_at_stalled(self, now: float) -> None:
        unsent = 0
        for conn, (since, then) in list(self._stalled.items()):
            left = conn.wire.get_write_buffer_size()
            if left < then:
                del self._stalled[conn]  # it is the last one to go now
                self.stalls(conn)
            elif now - since > READ_S:
                self.drop(conn)
                continue
            unsent += left
        for conn in list(self._stalled):
            if unsent <= UNSENT_BYTES:
                break
            unsent -= conn.wire.get_write_buffer_size()
            self.drop(conn)

    def _hung_up(self) -> list[Connection]:
        """Of those that are not read, as they have sent more than is taken: TCP tells of the end, if all that came before has arrived."""
        paused = {
            conn.wire.get_extra_info("socket").fileno(): conn
            for conn in self._by_state[State.WORKING]
            if not conn.wire.is_reading() and not conn.wire.is_closing() and conn.wire.get_protocol() is conn
        }
        if not paused:
            return []
        poll = select.poll()
        for number in paused:
            poll.register(number, _HUNG_UP)
        return [paused[number] for number, _ in poll.poll(0)]

    def report(self, error: BaseException | None) -> None:
        """A mistake of ours, for the log: not each time, as whoever has found it can send as many requests as they like."""
        if self._clock() - self._reported_at > ERRORS_S:
            self._reported_at = self._clock()
            log.error("a request could not be answered", exc_info=error)
