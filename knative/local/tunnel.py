"""An upgraded connection, such as a WebSocket's: after the pod's 101 it carries bytes, both ways, and no HTTP."""

import asyncio

import aiohttp
from aiohttp import web

from knative.local.errors import BadGateway


class _End(asyncio.Protocol):
    """One end: what arrives here is written to the other one, and not read faster than that one takes it."""

    def __init__(self, owner: asyncio.BaseProtocol, other: asyncio.Transport) -> None:
        """owner: aiohttp's part, which is to learn that the connection is gone."""
        self.lost = asyncio.Event()
        self._owner = owner
        self._other = other

    def data_received(self, data: bytes) -> None:
        self._other.write(data)

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """What aiohttp calls for the bytes that came right behind the request, or the 101."""
        self._other.write(data)
        return False, b""

    def feed_eof(self) -> None:
        """What aiohttp calls once the connection is gone, which we know."""

    def pause_writing(self) -> None:
        self._other.pause_reading()

    def resume_writing(self) -> None:
        self._other.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
        self._other.close()  # once it has sent what it was given
        self._owner.connection_lost(exc)


async def tunnel(request: web.BaseRequest, answer: web.StreamResponse, reply: aiohttp.ClientResponse) -> None:
    """Send `answer`, the pod's 101, and pass bytes on until either side closes. Raises BadGateway if the pod is gone already."""
    connection, client = reply.connection, request.transport
    pod, protocol = (connection.transport, connection.protocol) if connection else (None, None)
    if pod is None or protocol is None:
        raise BadGateway("the pod closed the connection that it had just upgraded")
    if client is None:
        raise ConnectionResetError("the client is gone")
    assert isinstance(pod, asyncio.Transport)
    at_client, at_pod = _End(request.protocol, pod), _End(protocol, client)
    await answer.prepare(request)
    request.protocol.set_parser(at_client)  # type: ignore[arg-type]  # hands on what has come already
    client.set_protocol(at_client)
    protocol.set_parser(at_pod, None)  # the same
    pod.set_protocol(at_pod)
    try:
        await at_client.lost.wait()
    finally:
        if not at_pod.lost.is_set() and not pod.is_closing():
            pod.abort()  # too late, or we end
