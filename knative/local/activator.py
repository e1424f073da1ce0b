"""The activator: finds the revision that a request is for, holds the request while there is no pod, and hands it over.

Host → Service → revision.slot(), the body read on meanwhile → pod → the answer, streamed back
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from http import HTTPStatus
from io import FileIO
from tempfile import TemporaryFile

import aiohttp
from aiohttp import HttpVersion11, web
from multidict import CIMultiDict
from yarl import URL

from knative.local.errors import BadGateway, Overloaded, PodUnreached, RequestError, TooSlow
from knative.local.outcomes import ACTIVATOR, GONE, POD
from knative.local.pod import Pod
from knative.local.revision import Revision
from knative.local.router import Router
from knative.local.tunnel import tunnel

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
UNREACHED_TRIES = 3  # of one pod
PIECE_BYTES = 256 * 1024


class Activator:
    """Answers requests for all Services of the platform."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request, from its headers to the last byte of its answer."""
        return await serve(request, self._router.find(request.host, request.headers))


async def serve(request: web.BaseRequest, revision: Revision) -> web.StreamResponse:
    """One request for a revision that is known; however it ends, the record of its Service has it."""
    call = _Call(request, revision)
    code, source = GONE, ACTIVATOR
    try:
        answer, error = await _answer(call)
        code, source = (error.status, ACTIVATOR) if error else (answer.status, POD)
        return answer
    except Exception:
        code = HTTPStatus.INTERNAL_SERVER_ERROR  # a mistake of ours, which the server answers
        raise
    finally:
        if request.transport is None:  # the caller went away
            code, source = (call.answer.status, POD) if call.answer else (GONE, ACTIVATOR)
        revision.record.outcomes.add(time.monotonic(), code, source, revision.name)


async def _answer(call: "_Call") -> tuple[web.StreamResponse, RequestError | None]:
    """What the caller gets, and the error that it stands for if it is not the pod's answer, or not the whole of it."""
    try:
        async with call.clock, call.revision.request():
            return await _forward(call), None
    except TimeoutError:
        error: RequestError = call.too_slow()
    except RequestError as refused:
        error = refused
    return _cut(call.request, call.answer) if call.answer else error_response(error), error


class _Call:
    """A request on its way, and its three limits (see PodSpec), which are Knative's activator's and queue-proxy's.

    It ends with a 504, or, once the caller has bytes of the answer, with the connection, where Knative appends its error to the answer as
    if it were a part of it. An upgraded connection ends at whichever limit comes first, also as in Knative, which does not look at the
    bytes on it.
    """

    def __init__(self, request: web.BaseRequest, revision: Revision) -> None:
        now = asyncio.get_running_loop().time()
        spec = revision.service.spec
        self.request = request
        self.revision = revision
        self.body = _Body(request.content)
        self.answer: web.StreamResponse | None = None  # once begun; after that only cutting the connection can say "no"
        self._first_byte_s, self._limit = spec.first_byte_limit()
        self._idle_s = spec.idle_timeout_seconds
        self._ends_at = now + spec.timeout_seconds
        self.clock = asyncio.timeout_at(now + self._first_byte_s)
        self._pod: Pod | None = None
        self._handed_at = now

    def handed_to(self, pod: Pod | None) -> None:
        """It is the pod's turn, or nobody's."""
        self._pod = pod
        self._handed_at = asyncio.get_running_loop().time()

    def begins(self, answer: web.StreamResponse) -> None:
        """The pod answers."""
        assert self._pod
        self._pod.breaker.answered()
        self._pod = None  # from here on it may be slow
        self.answer = answer

    def goes_on(self) -> None:
        """Bytes of the answer go to the caller."""
        if self._idle_s:
            self.clock.reschedule(min(self._ends_at, asyncio.get_running_loop().time() + self._idle_s))
        elif self.clock.when() != self._ends_at:
            self.clock.reschedule(self._ends_at)

    def too_slow(self) -> TooSlow:
        """A limit has passed."""
        if self._pod and not self.body.awaited:
            since = max(self._handed_at, self.body.came_at)
            self.revision.timed_out(self._pod, asyncio.get_running_loop().time() - since, self._first_byte_s)
        name, waits_for = self.revision.service.name, self.revision.waits_for
        text = f"{name} did not answer within {self._first_byte_s} s ({self._limit}, cold start included)"
        return TooSlow(f"{text}; {waits_for}" if waits_for else text)


async def _forward(call: _Call) -> web.StreamResponse:
    """Hold the request until there is a pod, and hand it over; to another one if nothing of it has reached the first."""
    unreached: Counter[str] = Counter()
    with closing(call.body):
        while True:
            async with call.revision.slot(call.body.read_on) as pod:
                call.handed_to(pod)
                try:
                    return await _hand_over(call, pod)
                except PodUnreached as error:
                    call.handed_to(None)
                    pod.unreached()
                    unreached[pod.name] += 1
                    if unreached[pod.name] == UNREACHED_TRIES:
                        raise BadGateway(f"{pod.name} says that it is ready, and nothing listens at its port {pod.plan.port}") from error


class _Body:
    """The body of a request that may have to wait.

    While it waits it is read into a file: that a client went away is only seen by who reads on, as the end of a connection comes after
    everything that was sent over it.
    """

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self.awaited = False  # whether somebody who takes it waits for the client to send more
        self.came_at = 0.0  # on the loop's clock: when somebody who takes it last got something from the client
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
        clock = asyncio.get_running_loop().time
        self.awaited = True
        async for piece in self._content.iter_any():
            self.awaited, self.came_at = False, clock()
            yield piece
            self.awaited = True
        self.awaited, self.came_at = False, clock()

    def close(self) -> None:
        """Forget what was kept."""
        if self._early:
            self._early.close()


async def _hand_over(call: _Call, pod: Pod) -> web.StreamResponse:
    """Send the request to the pod and stream its answer back. Raises PodUnreached or BadGateway."""
    request = call.request
    upgrade = _upgrade(request.headers) if request.version >= HttpVersion11 else ""
    headers = _end_to_end(request.headers)
    headers["X-Forwarded-For"] = request.remote or ""
    headers["X-Forwarded-Host"] = request.host
    headers["X-Forwarded-Proto"] = request.scheme
    if upgrade:
        headers.update({"Connection": "Upgrade", "Upgrade": upgrade})
    if headers.popall("Expect", None):
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    sent = asyncio.Event()
    try:
        async with pod.connections.request(
            request.method,
            _target(request, pod),
            headers=headers,
            data=call.body if request.body_exists else None,
            skip_auto_headers=_AUTOMATIC,
            allow_redirects=False,
            trace_request_ctx=sent,
        ) as reply:
            answer = web.StreamResponse(status=reply.status, reason=reply.reason, headers=_end_to_end(reply.headers))
            if reply.status == HTTPStatus.SWITCHING_PROTOCOLS:
                taken = _upgrade(reply.headers)
                if not upgrade or taken.lower() != upgrade.lower():
                    raise BadGateway(f"{pod.name} switched to the protocol {taken!r}; {upgrade or 'no other'} was asked for")
                answer.headers.update({"Connection": "Upgrade", "Upgrade": taken})
                call.begins(answer)
                await tunnel(request, answer, reply)
                return answer
            call.begins(answer)
            call.goes_on()
            await answer.prepare(request)
            async for piece in reply.content.iter_any():
                call.goes_on()
                await answer.write(piece)
            await answer.write_eof()
            return answer
    except (aiohttp.ClientError, ConnectionError) as error:
        # It may have been sent over a connection that then broke, and aiohttp have found no other: that is no case for another pod.
        if isinstance(error, aiohttp.ClientConnectorError) and not sent.is_set():
            raise PodUnreached(str(error)) from error
        raise BadGateway(f"{pod.name} ended the connection before it had answered: {error or type(error).__name__}") from error


def _upgrade(headers: Mapping[str, str]) -> str:
    """The protocol that a message asks to change to, or changes to; an empty text if none."""
    named = (name.strip().lower() for name in headers.get("Connection", "").split(","))
    return headers.get("Upgrade", "") if "upgrade" in named else ""


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
