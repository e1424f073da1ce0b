"""The activator: finds the revision that a request is for, holds the request while there is no pod, and hands it over.

Host → Service → revision.slot(), the body read on meanwhile → pod → the answer, streamed back
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing
from io import FileIO
from tempfile import TemporaryFile

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from knative.local.errors import BadGateway, Overloaded, PodUnreached, RequestError, TooSlow
from knative.local.pod import Pod
from knative.local.revision import Revision
from knative.local.router import Router

# RFC 9110, 7.6.1: of one connection, not of the message.
_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
_AUTOMATIC = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")  # what aiohttp would add to a request that has none
UNREACHED_TRIES = 3
PIECE_BYTES = 256 * 1024


class Activator:
    """Answers requests for all Services of the platform."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request, from its headers to the last byte of its answer."""
        revision = self._router.find(request.host, request.headers)
        response: list[web.StreamResponse] = []  # what has been begun; after that only cutting the connection can say "no"
        try:
            async with asyncio.timeout(revision.service.spec.timeout_seconds), revision.request():
                return await self._forward(request, revision, response)
        except TimeoutError:
            limit_s = revision.service.spec.timeout_seconds
            error: RequestError = TooSlow(
                f"{revision.service.name} did not answer within {limit_s} s (timeoutSeconds, cold start included)"
            )
        except RequestError as refused:
            error = refused
        if response:
            return _cut(request, response[0])
        return error_response(error)

    async def _forward(self, request: web.BaseRequest, revision: Revision, response: list[web.StreamResponse]) -> web.StreamResponse:
        with closing(_Body(request.content)) as body:
            for _ in range(UNREACHED_TRIES):
                async with _slot(revision, body) as pod:
                    try:
                        return await _hand_over(request, body, pod, response)
                    except PodUnreached:
                        await asyncio.sleep(0.1)  # until its readiness probe finds out too
        raise BadGateway(f"no pod of {revision.service.name} could be reached; they may be crashing, see their logs")


class _Body:
    """The body of a request that may have to wait.

    While it waits it is read into a file: that a client went away is only seen by who reads on, as the end of a connection comes after
    everything that was sent over it.
    """

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content
        self._early: FileIO | None = None  # of no name; what came while nobody took it

    @asynccontextmanager
    async def read_on(self) -> AsyncIterator[None]:
        """For as long as it is entered, what comes is kept. Raises Overloaded if that was not possible."""
        keeping = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            keeping.cancel()
            (ended,) = await asyncio.gather(keeping, return_exceptions=True)
        if isinstance(ended, RequestError):
            raise ended

    async def _keep(self) -> None:
        async for piece in self._content.iter_any():
            try:
                self._early = self._early or TemporaryFile(buffering=0)  # noqa: SIM115  see close()
                rest = memoryview(piece)
                while rest:
                    rest = rest[self._early.write(rest) :]
            except OSError as error:
                raise Overloaded(f"the body cannot be kept until a pod is ready: {error.strerror or error}", retry_after_s=10) from error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._early:
            self._early.seek(0)
            while piece := self._early.read(PIECE_BYTES):
                yield piece
        async for piece in self._content.iter_any():
            yield piece

    def close(self) -> None:
        """Forget what was kept."""
        if self._early:
            self._early.close()


@asynccontextmanager
async def _slot(revision: Revision, body: _Body) -> AsyncIterator[Pod]:
    """A slot of the revision, the body read on until there is one."""
    async with AsyncExitStack() as slot:
        async with body.read_on():
            pod = await slot.enter_async_context(revision.slot())
        yield pod


async def _hand_over(request: web.BaseRequest, body: _Body, pod: Pod, response: list[web.StreamResponse]) -> web.StreamResponse:
    """Send the request to the pod and stream its answer back. Raises PodUnreached or BadGateway."""
    headers = _end_to_end(request.headers)
    headers["X-Forwarded-For"] = request.remote or ""
    headers["X-Forwarded-Host"] = request.host
    headers["X-Forwarded-Proto"] = request.scheme
    if headers.popall("Expect", None):
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    sent = asyncio.Event()
    try:
        async with pod.connections.request(
            request.method,
            _target(request, pod),
            headers=headers,
            data=body if request.body_exists else None,
            skip_auto_headers=_AUTOMATIC,
            allow_redirects=False,
            trace_request_ctx=sent,
        ) as reply:
            answer = web.StreamResponse(status=reply.status, reason=reply.reason, headers=_end_to_end(reply.headers))
            await answer.prepare(request)
            response.append(answer)
            async for piece in reply.content.iter_any():
                await answer.write(piece)
            await answer.write_eof()
            return answer
    except (aiohttp.ClientError, ConnectionError) as error:
        # It may have been sent over a connection that then broke, and aiohttp have found no other: that is no case for another pod.
        if isinstance(error, aiohttp.ClientConnectorError) and not sent.is_set():
            raise PodUnreached(str(error)) from error
        raise BadGateway(f"{pod.name} ended the connection before it had answered: {error or type(error).__name__}") from error


def _target(request: web.BaseRequest, pod: Pod) -> URL:
    """The request's target at the pod, as it was sent: what it means to decode or shorten a path is for the function to say."""
    target = request.raw_path
    if not target.startswith("/"):
        whole = URL(target, encoded=True)  # from a client that takes us for its proxy; else it is the `*` of OPTIONS
        target = whole.raw_path_qs if whole.absolute else "/"
    return URL(pod.address + target, encoded=True)


def _end_to_end(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The headers that are for the other end."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _HOP_BY_HOP and name.lower() not in named)


def _cut(request: web.BaseRequest, begun: web.StreamResponse) -> web.StreamResponse:
    """An answer that was begun and cannot be completed: the caller must see that it is not whole."""
    if request.transport:
        request.transport.abort()
    return begun


def error_response(error: RequestError) -> web.Response:
    """What a caller is told by the platform itself."""
    body = json.dumps({"error": {"type": error.type, "message": str(error)}}).encode()
    headers = {} if error.retry_after_s is None else {"Retry-After": str(max(1, round(error.retry_after_s)))}
    return web.Response(status=error.status, body=body, content_type="application/json", headers=headers)
