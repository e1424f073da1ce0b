"""The activator: finds the revision that a request is for, holds the request while there is no pod, and hands it over.

Host → Service → revision.slot(), the body read on meanwhile → pod → the answer, streamed back
"""

import asyncio
import json
import time
from collections import Counter
from contextlib import closing
from http import HTTPStatus

import aiohttp
from aiohttp import HttpVersion11, web
from multidict import CIMultiDict, MultiMapping
from yarl import URL

from knative.local.body import BadBody, Body, Room
from knative.local.descriptors import NoDescriptors
from knative.local.errors import BadGateway, PodUnreached, RequestError, TooSlow
from knative.local.meter import Load
from knative.local.origin import is_own_user
from knative.local.outcomes import ACTIVATOR, GONE, POD
from knative.local.pod import Pod
from knative.local.ports import Ports
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
HEADER_BYTES = 64 * 1024  # one, of an answer
MESSAGE_CHARACTERS = 200
READ_BYTES = 64 * 1024  # of an answer, that wait for the caller to read them; the double before the pod is held up
PAUSE_S, PAUSE_LIMIT_S = 0.05, 1.0  # until a descriptor is looked for again, doubling


class Activator:
    """Answers requests for all Services of the platform."""

    def __init__(self, router: Router, ports: Ports) -> None:
        """ports: they know how many file descriptors there are for the ways to pods."""
        self._router = router
        self._ports = ports
        self._room = Room()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request, from its headers to the last byte of its answer."""
        return await self.serve(request, self._router.find(_host(request), request.headers))

    async def serve(self, request: web.BaseRequest, revision: Revision) -> web.StreamResponse:
        """One request for a revision that is known; however it ends, the record of its Service has it."""
        call = _Call(request, revision, self._room)
        code, source = GONE, ACTIVATOR
        try:
            answer, error = await self._answer(call)
            code, source = (error.status, ACTIVATOR) if error else (answer.status, POD)
            return answer
        except Exception:
            code = HTTPStatus.INTERNAL_SERVER_ERROR  # a mistake of ours, which the server answers
            raise
        finally:
            if request.transport is None:  # the caller went away
                code, source = (call.answer.status, POD) if call.answer else (GONE, ACTIVATOR)
            revision.record.outcomes.add(time.monotonic(), code, source, revision.name)

    async def _answer(self, call: "_Call") -> tuple[web.StreamResponse, RequestError | None]:
        """What the caller gets, and the error that it stands for if it is not the pod's answer, or not the whole of it."""
        try:
            async with call.clock, call.revision.request() as load:
                call.is_sent(load)
                with closing(call.body):
                    return await self._forward(call), None
        except (TimeoutError, RequestError) as ended:
            error = call.explain(ended)
        whole = is_own_user(call.request.host, call.request.headers)
        if call.answer:
            return _cut(call.request, call.answer), error
        answer = error_response(error, whole=whole)
        if call.body.is_broken:
            answer.force_close()  # where its end is, nobody knows
        return answer, error

    async def _forward(self, call: "_Call") -> web.StreamResponse:
        """Hold the request until there is a pod, and hand it over; to another one if nothing of it has reached the first."""
        unreached: Counter[str] = Counter()
        pause_s = PAUSE_S
        while True:
            async with call.revision.slot(call.body.read_on) as pod:
                call.handed_to(pod)
                try:
                    return await _hand_over(call, pod)
                except NoDescriptors:
                    call.taken_back(is_short=True)
                except PodUnreached as error:
                    call.taken_back()
                    pod.unreached()
                    unreached[pod.name] += 1
                    if unreached[pod.name] == UNREACHED_TRIES:
                        raise BadGateway(f"{pod.name} says that it is ready, and nothing listens at its port {pod.plan.port}") from error
                    continue
            self._ports.miss_descriptor()
            async with call.body.read_on():
                await asyncio.sleep(pause_s)
            pause_s = min(PAUSE_LIMIT_S, pause_s * 2)


class _Call:
    """A request on its way, and its three limits (see PodSpec), which are Knative's activator's and queue-proxy's.

    It ends with a 504, or, once the caller has bytes of the answer, with the connection, where Knative appends its error to the answer as
    if it were a part of it. An upgraded connection ends at whichever limit comes first, also as in Knative, which does not look at the
    bytes on it.
    """

    def __init__(self, request: web.BaseRequest, revision: Revision, room: Room) -> None:
        now = asyncio.get_running_loop().time()
        spec = revision.service.spec
        self.request = request
        self.revision = revision
        self.body = Body(request.content, room, self._give_up)
        self.answer: web.StreamResponse | None = None  # once begun; after that only cutting the connection can say "no"
        self._first_byte_s, self._limit = spec.first_byte_limit()
        self._idle_s = spec.idle_timeout_seconds
        self._ends_at = now + spec.timeout_seconds
        self.clock = asyncio.timeout_at(now + self._first_byte_s)
        self._pod: Pod | None = None
        self._handed_at = now
        self._is_short = False
        self._load: Load

    def is_sent(self, load: Load) -> None:
        """It is load once all of it has come, or much, or it is answered: what a caller has yet to send asks nothing of anybody."""
        self._load = load
        self.body.on_much = load.count
        self.request.content.on_eof(load.count)

    def handed_to(self, pod: Pod) -> None:
        """It is the pod's turn."""
        self._pod = pod
        self._handed_at = asyncio.get_running_loop().time()
        self._is_short = False

    def taken_back(self, *, is_short: bool = False) -> None:
        """It was not reached; is_short: for want of a file descriptor."""
        self._pod = None
        self._is_short = is_short

    def begins(self, answer: web.StreamResponse) -> None:
        """The pod answers."""
        assert self._pod
        self._pod.breaker.answered()
        self._pod = None  # from here on it may be slow
        self._load.count()
        self.answer = answer

    def goes_on(self) -> None:
        """Bytes of the answer go to the caller."""
        if self._idle_s:
            self.clock.reschedule(min(self._ends_at, asyncio.get_running_loop().time() + self._idle_s))
        elif self.clock.when() != self._ends_at:
            self.clock.reschedule(self._ends_at)

    def _give_up(self) -> None:
        """There is nothing to wait for any more."""
        if not self.clock.expired():
            self.clock.reschedule(asyncio.get_running_loop().time())

    def explain(self, ended: TimeoutError | RequestError) -> RequestError:
        """Why there is no answer, or not the whole of one."""
        if self.body.is_broken:  # whatever has come of that
            return BadBody()
        return ended if isinstance(ended, RequestError) else self._too_slow()

    def _too_slow(self) -> TooSlow:
        """A limit has passed."""
        if self._pod and not self.body.awaited:
            since = max(self._handed_at, self.body.came_at)
            self.revision.timed_out(self._pod, asyncio.get_running_loop().time() - since, self._first_byte_s)
        text = f"{self.revision.service.name} did not answer within {self._first_byte_s} s ({self._limit}, cold start included)"
        if self._pod:  # what others wait for is not why
            return TooSlow(f"{text}; {self._pod.name} had the request")
        waits_for = "no file descriptor was left" if self._is_short else self.revision.waits_for
        return TooSlow(f"{text}; {waits_for}" if waits_for else text, trouble=self.revision.trouble)


async def _hand_over(call: _Call, pod: Pod) -> web.StreamResponse:
    """Send the request to the pod and stream its answer back. Raises PodUnreached, NoDescriptors or BadGateway."""
    request = call.request
    upgrade = _upgrade(request.headers) if request.version >= HttpVersion11 else ""
    headers = _headers(request, upgrade)
    if request.version >= HttpVersion11 and any(value.lower() == "100-continue" for value in request.headers.getall("Expect", ())):
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
            read_bufsize=READ_BYTES,
            max_field_size=HEADER_BYTES,
            trace_request_ctx=sent,
        ) as reply:
            if (coding := ",".join(reply.headers.getall("Transfer-Encoding", ("chunked",)))).lower() != "chunked":
                raise BadGateway(f"{pod.name} answered with Transfer-Encoding {coding[:MESSAGE_CHARACTERS]!r}; known is chunked")
            answer = web.StreamResponse(status=reply.status, reason=reply.reason, headers=_end_to_end(reply.headers))
            if reply.status == HTTPStatus.SWITCHING_PROTOCOLS:
                taken = _upgrade(reply.headers)
                if taken.lower() not in {name.strip().lower() for name in upgrade.split(",")} - {""}:
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
        raise _explain(error, call, pod, is_sent=sent.is_set()) from error


def _explain(error: Exception, call: _Call, pod: Pod, *, is_sent: bool) -> Exception:
    """What an error of the way to a pod means."""
    # It may have been sent over a connection that then broke, and aiohttp have found no other: that is no case for another pod.
    if isinstance(error, aiohttp.ClientConnectorError) and not is_sent:
        return NoDescriptors(str(error)) if NoDescriptors.explains(error.os_error) else PodUnreached(str(error))
    if isinstance(error, aiohttp.ClientResponseError):
        said = error.message.partition("\n")[0].partition(": b'")[0].rstrip(":")  # what is no HTTP is quoted behind it
        return BadGateway(f"what {pod.name} answered is no HTTP: {said[:MESSAGE_CHARACTERS]}")
    return BadGateway(f"{pod.name} ended the connection before it had answered: {str(error)[:MESSAGE_CHARACTERS] or type(error).__name__}")


def _headers(request: web.BaseRequest, upgrade: str) -> CIMultiDict[str]:
    """What the pod is sent of them, and of what we know. Each that is set here takes the place of all of its name."""
    headers = _end_to_end(request.headers)
    headers.popall("Expect", None)
    host = _host(request)
    if host:
        headers["Host"] = host
    headers["X-Forwarded-For"] = request.remote or ""
    headers["X-Forwarded-Host"] = host
    headers["X-Forwarded-Proto"] = request.scheme
    if upgrade:
        headers.update({"Connection": "Upgrade", "Upgrade": upgrade})
    return headers


def _upgrade(headers: MultiMapping[str]) -> str:
    """The protocols that a message asks to change to, or the one that it changes to; an empty text if none."""
    return ", ".join(headers.getall("Upgrade", ())) if "upgrade" in _options(headers) else ""


def _host(request: web.BaseRequest) -> str:
    """Who is asked: whom the target names if it names a host (RFC 9112, 3.2.2), else the Host."""
    if not request.raw_path.startswith("/") and (whole := URL(request.raw_path, encoded=True)).absolute:
        return whole.raw_authority
    return request.headers.get("Host", "")


def _target(request: web.BaseRequest, pod: Pod) -> URL:
    """The request's target at the pod, as it was sent: what it means to decode or shorten a path is for the function to say."""
    target = request.raw_path
    if not target.startswith("/"):
        whole = URL(target, encoded=True)  # from a client that takes us for its proxy; else it is the `*` of OPTIONS
        target = whole.raw_path_qs if whole.absolute else "/"
    return URL(pod.address + target, encoded=True)


def _end_to_end(headers: MultiMapping[str]) -> CIMultiDict[str]:
    """The headers that are for the other end."""
    options = _options(headers)
    dropped = _HOP_BY_HOP | options if options else _HOP_BY_HOP
    return CIMultiDict(
        [(name, value if value.isascii() else _text(value)) for name, value in headers.items() if name.lower() not in dropped]
    )


def _text(value: str) -> str:
    """A header's value that is sent on as UTF-8; bytes that are none are Latin-1, as they once were (RFC 9110, 5.5)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogateescape").decode("latin-1")
    return value


def _options(headers: MultiMapping[str]) -> set[str]:
    """What all Connection headers name, in small letters."""
    return {name.strip().lower() for field in headers.getall("Connection", ()) for name in field.split(",")}


def _cut(request: web.BaseRequest, begun: web.StreamResponse) -> web.StreamResponse:
    """An answer that was begun and cannot be completed: the caller must see that it is not whole."""
    if request.transport:
        request.transport.abort()
    return begun


def error_response(error: RequestError, *, whole: bool = False) -> web.Response:
    """What a caller is told by the platform itself. whole: it is who runs the platform, and may see logs."""
    body = json.dumps({"error": {"type": error.type, "message": error.whole if whole else str(error)}}).encode()
    headers = {} if error.retry_after_s is None else {"Retry-After": str(max(1, round(error.retry_after_s)))}
    return web.Response(status=error.status, body=body, content_type="application/json", headers=headers)
