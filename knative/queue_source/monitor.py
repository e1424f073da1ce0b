"""The port of the queue source: `/healthz`, `/readyz`, `/metrics`, for probes and Prometheus.

One thread, one loop, and one request a connection, which has a few seconds for all of it; of too many connections the oldest gives way.
So nobody who is slow or silent keeps a probe from its answer.
"""

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from knative.queue_source.errors import QueueSourceError
from knative.queue_source.threads import Threads

log = logging.getLogger("relight.queue")

CONNECTION_S = 10.0  # from its beginning to the end of its answer
CONNECTIONS = 64
LONGEST_HEAD = 16 << 10
_ACCEPTED = 8  # in one go; asyncio tries so often, too, when there is no descriptor left
_BACKLOG = 128

Route = Callable[[], tuple[int, bytes]]


class Monitor:
    """A small HTTP server in a thread of its own, from its making to `close`."""

    def __init__(
        self,
        host: str,
        port: int,
        threads: Threads,
        *,
        failure: Callable[[], str],
        is_ready: Callable[[], bool],
        metrics: Callable[[], bytes],
    ) -> None:
        """Listens. failure: why the process is to be replaced, nothing if it is not. Raises QueueSourceError if it cannot listen."""
        self.routes: dict[str, Route] = {
            "/healthz": lambda: (503, b"a thread has failed\n") if failure() else (200, b"ok\n"),
            "/readyz": lambda: (200, b"ready\n") if is_ready() else (503, b"the queue does not answer\n"),
            "/metrics": lambda: (200, metrics()),
        }
        self.connections: dict[_Connection, None] = {}  # the oldest first
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._failed)
        self._is_told = False
        self.most = max(4, min(CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listening.bind((host, port))
            self._listening.listen(_BACKLOG)
        except OSError as error:
            self._listening.close()
            self._loop.close()
            raise QueueSourceError(f"QUEUE_SOURCE_PORT={port}: cannot listen at {host}: {error.strerror or error}") from error
        self._stopped = asyncio.Event()
        self._thread = threads.start("monitor", self._run)

    def close(self) -> None:
        """Answer nobody any more."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()

    def give_way(self) -> None:
        """The oldest connection ends."""
        if self.connections:
            next(iter(self.connections)).end()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        server = await self._loop.create_server(lambda: _Connection(self), sock=self._listening, backlog=_ACCEPTED)
        self._listening.listen(_BACKLOG)
        await self._stopped.wait()
        server.close()
        for connection in list(self.connections):
            connection.end()
        await asyncio.sleep(0)  # for the ends of connections

    def _failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Of the loop: above all a caller who could not be let in, for want of a descriptor."""
        self.give_way()
        if not self._is_told:
            self._is_told = True
            log.warning("monitor: %s: %r", context["message"], context.get("exception"))


class _Connection(asyncio.Protocol):
    """One request."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._monitor.connections[self] = None
        self._ending = asyncio.get_running_loop().call_later(CONNECTION_S, self.end)
        if len(self._monitor.connections) > self._monitor.most:
            self._monitor.give_way()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ending.cancel()
        self._monitor.connections.pop(self, None)

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self._head += data
        if b"\r\n\r\n" in self._head:
            self._answer(*self._found())
        elif len(self._head) > LONGEST_HEAD:
            self._answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, b"the head of the request is too long\n", "")

    def end(self) -> None:
        """Now, whatever is still to be said."""
        self._monitor.connections.pop(self, None)
        self._transport.abort()

    def _found(self) -> tuple[int, bytes, str]:
        method, _, rest = self._head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, b"GET it\n", method
        route = self._monitor.routes.get(path)
        status, body = route() if route else (HTTPStatus.NOT_FOUND, b"there are /healthz, /readyz and /metrics\n")
        return status, body, method

    def _answer(self, status: int, body: bytes, method: str) -> None:
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "Content-Type: text/plain; version=0.0.4; charset=utf-8",
            f"Content-Length: {len(body)}",
            "Connection: close",
        )
        self._transport.write("\r\n".join([*head, "", ""]).encode() + (b"" if method == "HEAD" else body))
        self._transport.close()
