"""The platform's ports: each takes in who comes, and pauses when there is no room for more, until there is."""

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from aiohttp import HttpVersion10, HttpVersion11, hdrs, web

from knative.local.connections import (
    FRESH_S,
    HEAD_BYTES,
    HEAD_TOO_LARGE,
    HEADER_BYTES,
    HEADER_TOO_LARGE,
    HEADERS,
    TARGET_BYTES,
    Connection,
    Connections,
)
from knative.local.descriptors import NO_ROOM, Descriptors
from knative.local.errors import PlatformError
from knative.local.tasks import Tasks

HOST = "127.0.0.1"
CALLS = 10_000  # connections of callers: as many as may wait for a pod
ADMIN_CALLS = 256
# Of the file descriptors: callers leave as many for the ways to pods and some for pods and their logs, all of them some for the admin port.
CALL_SHARE, ADMIN_SHARE = 7 / 16, 15 / 16
BACKLOG = 1024
ACCEPT_AT_ONCE = 64
LOOK_S = 1.0
WAIT_S = FRESH_S  # until it is looked whether somebody gives way by now
STOP_S = 2.0  # for answers that are on their way
READ_BYTES = 32 << 10  # of a body, that wait for whoever reads it; the double before its sender is held up

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Ports:
    """All of them: those of callers share one bound, the admin port has its own, and all have the process's descriptors in common."""

    def __init__(self, say: Callable[[str], object]) -> None:
        """say: tells the user that file descriptors have run out, and when that is over."""
        self.descriptors = Descriptors(say)
        self.calls = Connections(CALLS)
        self.admin = Connections(ADMIN_CALLS)

    def call_port(self, port: int, handle: Handler) -> "Port":
        """Where callers come."""
        return Port(port, handle, self.calls, self, CALL_SHARE)

    def admin_port(self, port: int, handle: Handler) -> "Port":
        """Where the user looks; it has a part of the descriptors that callers leave."""
        return Port(port, handle, self.admin, self, ADMIN_SHARE, "the admin port {} on {}", "--admin-port")

    def miss_descriptor(self) -> bool:
        """Somebody needs one, and there is none: whoever has been at rest for longest gives way; False if nobody is at rest."""
        self.descriptors.missed()
        return self.calls.evict() or self.admin.evict()


class Port(AbstractAsyncContextManager["Port"]):
    """One that is open as long as it is entered. Raises PlatformError if it cannot be opened."""

    def __init__(
        self,
        port: int,
        handle: Handler,
        connections: Connections,
        ports: Ports,
        share: float,
        called: str = "port {} on {}",
        option: str = "",
    ) -> None:
        """called, option: for the error; how the user knows it, and by what another one is chosen."""
        self._port = port
        self._called = called.format(port, HOST)
        self._remedy = f"choose another with {option}" if option else "choose another"
        self._handle = handle
        self._connections = connections
        self._ports = ports
        self._share = share
        self._tasks = Tasks(lambda _, error: connections.report(error))
        self._is_listening = self._is_closed = False
        self._waits_since: float | None = None  # that nobody was let in although somebody was there, on the loop's clock

    async def __aenter__(self) -> "Port":
        self._loop = asyncio.get_running_loop()
        self._sock = socket.socket()
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._sock.setblocking(False)
            self._sock.bind((HOST, self._port))
            self._sock.listen(BACKLOG)
        except OSError as error:
            self._sock.close()
            reason = os.strerror(error.errno or 0)
            raise PlatformError(f"{self._called} cannot be opened: {reason}; {self._remedy}") from error
        # handler_cancellation: a client that goes away is forgotten, also while it is held.
        self._server = web.Server(self._serve, handler_cancellation=True)
        self._listen()
        self._looking = self._loop.call_later(LOOK_S, self._look)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_closed = True
        self._pause()
        self._looking.cancel()
        self._sock.close()
        await asyncio.sleep(0)  # whose request has come just now is still answered
        self._server.pre_shutdown()
        await self._server.shutdown(STOP_S)
        await self._tasks.stop()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.work()
        try:
            return _refusal(request) or await self._handle(request)
        finally:
            connection.rest(request)

    def _listen(self) -> None:
        if not self._is_listening and not self._is_closed:
            self._is_listening = True
            self._loop.add_reader(self._sock, self._accept)

    def _pause(self) -> None:
        if self._is_listening:
            self._is_listening = False
            self._loop.remove_reader(self._sock)

    def _accept(self) -> None:
        """Take in who has come; called again soon if there are more, or if one has to go first."""
        for number in range(ACCEPT_AT_ONCE):
            if not self._has_room():
                if not number:  # so that somebody waits, which is not known of those behind the first
                    self._make_room()
                return
            try:
                raw, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in NO_ROOM:
                    self._make_room()
                else:
                    self._pause()
                return
            self._waits_since = None
            raw.setblocking(False)
            self._tasks.start(self._take_in(raw), "a connection")

    def _has_room(self) -> bool:
        return len(self._connections) < self._connections.limit and self._ports.descriptors.has_room(self._share)

    def _make_room(self) -> None:
        """Have one give way, whose place is free in the loop's next turn; if there is none, look again soon."""
        is_full = len(self._connections) >= self._connections.limit
        if not (self._connections.evict() if is_full else self._ports.miss_descriptor()):
            self._pause()
            self._waits_since = self._waits_since or self._loop.time()
            self._connections.await_room(self._listen)
            self._loop.call_later(WAIT_S, self._listen)

    async def _take_in(self, raw: socket.socket) -> None:
        def protocol() -> Connection:
            # auto_decompress: a body is passed on as it was sent.
            return Connection(
                self._connections,
                raw,
                self._server,
                loop=self._loop,
                access_log=None,
                auto_decompress=False,
                read_bufsize=READ_BYTES,
                max_line_size=TARGET_BYTES,
                max_field_size=HEADER_BYTES,
                max_headers=HEADERS,
            )

        try:
            await self._loop.connect_accepted_socket(protocol, raw)
        except OSError:
            raw.close()  # whoever it was is gone already

    def _look(self) -> None:
        self._looking = self._loop.call_later(LOOK_S, self._look)
        self._connections.look()
        self._ports.descriptors.look()
        if self._waits_since and self._loop.time() - self._waits_since > LOOK_S:
            self._connections.evict(is_last_resort=True)  # those who wait are to have their turn, too
        self._listen()


def _coding(request: web.BaseRequest) -> str:
    return ",".join(request.headers.getall(hdrs.TRANSFER_ENCODING)).lower()


def _too_large(request: web.BaseRequest) -> str:
    """What is said of a head that has come whole and is too large; of blanks before a header's value one counts, as aiohttp drops them."""
    if any(len(name) + len(value) > HEADER_BYTES for name, value in request.raw_headers):
        return HEADER_TOO_LARGE
    first = len(f"{request.method} {request.raw_path} HTTP/1.1\r\n".encode("utf-8", "surrogateescape"))
    size = first + sum(len(name) + len(value) + 4 for name, value in request.raw_headers) + 2
    return HEAD_TOO_LARGE if size > HEAD_BYTES else ""


def _refusal(request: web.BaseRequest) -> web.Response | None:
    """What no port does."""
    if request.version not in (HttpVersion10, HttpVersion11):
        status, kind, message = 505, "bad_request", "HTTP/1.1 and HTTP/1.0 are spoken here"
    elif too_large := _too_large(request):
        status, kind, message = 431, "bad_request", too_large
    elif request.method == hdrs.METH_CONNECT:
        status, kind, message = 405, "method_not_allowed", "CONNECT is for proxies, and this is none"
    elif hdrs.TRANSFER_ENCODING in request.headers and (coding := _coding(request)) != "chunked":
        status, kind, message = 501, "not_implemented", f"Transfer-Encoding: found {coding[:100]!r}; known is chunked"
    else:
        return None
    answer = web.Response(status=status, body=json.dumps({"error": {"type": kind, "message": message}}).encode())
    answer.content_type = "application/json"
    answer.force_close()
    return answer
