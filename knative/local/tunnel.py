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

    feed_data = data_received  # what aiohttp calls for the bytes that came right behind the 101

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
    connection = reply.connection
    client = request.transport
    if not connection or not isinstance(connection.transport, asyncio.Transport) or not connection.protocol:
        raise BadGateway("the pod closed the connection that it had just upgraded")
    pod = connection.transport
    if not isinstance(client, asyncio.Transport):
        raise ConnectionResetError("the client is gone")
    at_client, at_pod = _End(request.protocol, pod), _End(connection.protocol, client)
    await answer.prepare(request)
    client.set_protocol(at_client)
    connection.protocol.set_parser(at_pod, None)
    pod.set_protocol(at_pod)
    try:
        await at_client.lost.wait()
    finally:
        if not at_pod.lost.is_set() and not pod.is_closing():
            pod.abort()  # too late, or we end
