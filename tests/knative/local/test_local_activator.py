"""Requests on their way through the activator, without a platform."""

import asyncio
import contextlib
import errno
import io
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import aiohappyeyeballs
import aiohttp
import pytest
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from yarl import URL

from knative.local import activator, body, waiting
from knative.local.body import Body, Room
from knative.local.breaker import TIME_OUTS
from knative.local.launch import PodPlan
from knative.local.ports import Ports
from knative.local.revision import Revision
from knative.local.router import Router
from knative.local.service import LiveService
from tests.knative.local.fakes import Events, FakePod, fake, parsed
from tests.support import free_port

LARGE = 20_000_000  # much more than the buffers on the way hold


def unread() -> StreamReader:
    loop = asyncio.get_running_loop()
    return StreamReader(BaseProtocol(loop), 65536, loop=loop)


def body_of(content: StreamReader, room: Room) -> Body:
    return Body(content, room, lambda: None)


def test_what_came_while_nobody_took_it_comes_first() -> None:
    async def scenario() -> None:
        content, room = unread(), Room()
        held = body_of(content, room)
        for piece in (b"one ", b"two "):
            content.feed_data(piece)
            async with held.read_on():
                await asyncio.sleep(0.01)
        assert room.taken == 8
        content.feed_data(b"three")
        content.feed_eof()
        assert b"".join([piece async for piece in held]) == b"one two three"
        assert room.taken == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(("each", "everything"), [(1000, 10_000), (10_000, 1000)])
def test_no_more_is_read_ahead_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch, each: int, everything: int) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(body, "EACH_BYTES", each)
        content, room = unread(), Room(everything)
        content.feed_data(bytes(5000))
        held = body_of(content, room)
        async with held.read_on():
            await asyncio.sleep(0.01)
        assert room.taken == 1000
        content.feed_eof()
        assert sum([len(piece) async for piece in held]) == 5000
        assert room.taken == 0

    asyncio.run(scenario())


def test_a_request_that_is_over_gives_its_room_back() -> None:
    async def scenario() -> None:
        content, room = unread(), Room()
        content.feed_data(bytes(5000))
        with contextlib.closing(body_of(content, room)) as held:
            async with held.read_on():
                await asyncio.sleep(0.01)
            assert room.taken == 5000
        assert room.taken == 0

    asyncio.run(scenario())


def test_a_body_can_be_sent_again_as_long_as_all_of_it_is_kept() -> None:
    async def scenario() -> None:
        content = unread()
        content.feed_data(b"kept")
        held = body_of(content, Room())
        async with held.read_on():
            await asyncio.sleep(0.01)
        content.feed_data(b" and passed on")
        content.feed_eof()
        first = aiter(held)
        assert await anext(first) == b"kept"
        second = aiter(held)
        assert [await anext(second), await anext(second)] == [b"kept", b" and passed on"]
        with pytest.raises(ConnectionError):
            await anext(aiter(held))

    asyncio.run(scenario())


class Pod:
    """What stands at a pod's port: answers what a test tells it to, when it is told to."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.asked = self.lost = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked += 1
        try:
            if request.path == "/early":
                answer = web.StreamResponse()
                await answer.prepare(request)
                await answer.write(b"begun")
                await request.read()
            await self.answers.wait()
            return web.Response(body=await request.read())
        except asyncio.CancelledError:
            self.lost += 1
            raise


@contextlib.asynccontextmanager
async def listening(handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> AsyncIterator[int]:
    runner = web.ServerRunner(web.Server(handle, handler_cancellation=True), shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def setting(
    container_concurrency: int = 0, timeout_s: int = 300, ports: Ports | None = None
) -> AsyncIterator[tuple[Revision, Pod, str]]:
    """A revision with one ready pod, what stands at its port, and the activator's address."""
    pod = Pod()
    live = LiveService(parsed(container_concurrency, scale={"initial-scale": "1"}, timeout_s=timeout_s), FakePod, Events())
    revision = live.choose()
    router = Router()
    router.update([live], live, by_header=False)
    live.start()
    ports, own = ports or Ports(lambda _: None), free_port()
    async with listening(pod.handle) as port, ports.call_port(own, activator.Activator(router, ports).handle):
        while not revision.pods or revision.pods[0].phase == "pending":
            await asyncio.sleep(0)
        revision.pods[0].plan = PodPlan(port, ())
        fake(revision.pods[0]).become("ready")
        connections = revision.pods[0].connections
        try:
            yield revision, pod, f"http://127.0.0.1:{own}/"
        finally:
            pod.answers.set()
            await connections.close()
            await live.stop()


def test_a_full_queue_is_a_503_that_says_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "QUEUE_LIMIT", 2)

    async def scenario() -> None:
        async with setting(container_concurrency=1) as (revision, pod, address), aiohttp.ClientSession() as client:
            calls = [asyncio.create_task(client.get(address)) for _ in range(3)]
            while (revision.pods[0].in_flight, len(revision.waiting)) != (1, 2):
                await asyncio.sleep(0.01)
            async with client.get(address) as refused:
                assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
                assert (await refused.json())["error"] == {"type": "overloaded", "message": "2 requests are waiting for hello already"}
            pod.answers.set()
            assert [(await call).status for call in calls] == [200, 200, 200]

    asyncio.run(scenario())


async def stand_still(bodies: Sequence[io.BytesIO]) -> None:
    """Returns once no more of these bodies is taken: on their way every buffer is full."""
    taken, looks = [-1], 0
    while looks < 30:
        await asyncio.sleep(0.01)
        now = [body.tell() for body in bodies]
        taken, looks = now, looks + 1 if now == taken else 0


@pytest.mark.parametrize(("size", "hangs"), [(0, True), (10, True), (LARGE, True), (None, False)])
def test_a_pod_does_not_hang_if_it_waits_for_what_the_client_does_not_send(
    monkeypatch: pytest.MonkeyPatch, size: int | None, hangs: bool
) -> None:
    """size: bytes that are sent whole; None for a body that stalls."""

    async def stalling() -> AsyncIterator[bytes]:
        yield b"some"
        await asyncio.Event().wait()

    async def scenario() -> None:
        loop, patient = asyncio.get_running_loop(), aiohttp.ClientTimeout(total=None)
        async with setting(timeout_s=300) as (revision, pod, address), aiohttp.ClientSession(timeout=patient) as client:
            bodies = [io.BytesIO(bytes(size or 0)) for _ in range(TIME_OUTS)]

            async def call(body: io.BytesIO) -> int:
                async with client.post(address, data=stalling() if size is None else body) as reply:
                    return reply.status

            calls = asyncio.gather(*map(call, bodies))
            while pod.asked < TIME_OUTS:
                await asyncio.sleep(0.01)
            await stand_still(bodies)
            clock = loop.time
            monkeypatch.setattr(loop, "time", lambda: clock() + 301)
            assert await calls == [504] * TIME_OUTS
            assert revision.record.hung_total == hangs

    asyncio.run(scenario())


def test_a_pod_that_is_not_reached_for_want_of_a_descriptor_is_not_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    missed = []

    async def scenario() -> None:
        ports = Ports(lambda _: None)
        monkeypatch.setattr(ports, "miss_descriptor", lambda: missed.append(True))
        async with setting(ports=ports) as (revision, pod, address), aiohttp.ClientSession() as client:
            pod.answers.set()
            connect = aiohappyeyeballs.start_connection

            async def none_left(addr_infos: Any, **options: Any) -> socket.socket:
                if addr_infos[0][4][1] == revision.pods[0].plan.port and len(missed) < 2:
                    raise OSError(errno.EMFILE, "Too many open files")
                return await connect(addr_infos=addr_infos, **options)

            monkeypatch.setattr(aiohappyeyeballs, "start_connection", none_left)
            async with client.post(address, data=b"held meanwhile") as reply:
                assert (reply.status, await reply.read()) == (200, b"held meanwhile")
            assert revision.pods[0].phase == "ready"

    asyncio.run(scenario())
    assert len(missed) == 2


def test_who_waited_for_a_descriptor_in_vain_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with setting(timeout_s=1) as (_, __, address), aiohttp.ClientSession() as client:
            connect = aiohappyeyeballs.start_connection

            async def none_left(addr_infos: Any, **options: Any) -> socket.socket:
                if addr_infos[0][4][1] != URL(address).port:
                    raise OSError(errno.EMFILE, "Too many open files")
                return await connect(addr_infos=addr_infos, **options)

            monkeypatch.setattr(aiohappyeyeballs, "start_connection", none_left)
            async with client.get(address) as reply:
                assert (reply.status, (await reply.json())["error"]["type"]) == (504, "timed_out")
                assert "no file descriptor was left" in (await reply.json())["error"]["message"]

    asyncio.run(scenario())


CHUNKED = b"POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"


async def until(holds: Callable[[], object]) -> None:
    while not holds():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("path", [b"/", b"/early"])
def test_a_body_that_turns_bad_at_its_pod_is_told_and_gives_the_place_back(path: bytes) -> None:
    """Before the pod has begun to answer, and after."""

    async def scenario() -> None:
        async with setting(container_concurrency=1) as (revision, pod, address), asyncio.timeout(60):
            reader, writer = await asyncio.open_connection("127.0.0.1", URL(address).port)
            writer.write(CHUNKED % path)
            await until(lambda: pod.asked)
            if path == b"/early":
                await reader.readuntil(b"begun\r\n")
            writer.write(b"no chunk")
            said = b""
            with contextlib.suppress(ConnectionError):
                said = await reader.read()  # to the end of the connection
            assert said.startswith(b"HTTP/1.1 400 ") == (path == b"/")
            assert said.count(b"HTTP/") == (path == b"/")
            await until(lambda: pod.lost)
            assert revision.record.outcomes.counts[400, "activator"] == 1
            pod.answers.set()
            async with aiohttp.ClientSession() as client, client.post(address, data=b"next") as reply:
                assert (reply.status, await reply.read()) == (200, b"next")
            writer.close()

    asyncio.run(scenario())


def test_a_body_that_turns_bad_while_it_is_held_waits_for_no_pod() -> None:
    async def scenario() -> None:
        async with setting() as (revision, pod, address), asyncio.timeout(60):
            fake(revision.pods[0]).become("starting")
            reader, writer = await asyncio.open_connection("127.0.0.1", URL(address).port)
            writer.write(CHUNKED % b"/")
            await until(lambda: revision.status()["queued"])
            writer.write(b"no chunk")
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
            assert revision.record.outcomes.counts[400, "activator"] == 1
            assert not pod.asked
            writer.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("is_held", [True, False], ids=["held", "at its pod"])
def test_a_request_that_is_not_sent_to_its_end_is_no_load(is_held: bool) -> None:
    async def scenario() -> None:
        async with setting() as (revision, pod, address):
            if is_held:
                fake(revision.pods[0]).become("starting")
            reader, writer = await asyncio.open_connection("127.0.0.1", URL(address).port)
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\nhal")
            while not (len(revision.waiting) if is_held else revision.pods[0].in_flight):
                await asyncio.sleep(0.01)
            assert revision.meter.current == 0
            writer.write(b"ves")
            while revision.meter.current == 0:
                await asyncio.sleep(0.01)
            fake(revision.pods[0]).become("ready")
            pod.answers.set()
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            while revision.meter.current:
                await asyncio.sleep(0.01)
            assert revision.meter.total == 1
            writer.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_what_is_long_or_answered_before_its_end_is_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "EACH_BYTES", 100)

    async def scenario(path: bytes, sent: int) -> None:
        async with setting() as (revision, _, address):
            _, writer = await asyncio.open_connection("127.0.0.1", URL(address).port)
            writer.write(b"POST /" + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b"x" * sent)
            while revision.meter.current == 0:
                await asyncio.sleep(0.01)
            writer.close()

    asyncio.run(asyncio.wait_for(scenario(b"", 200), 60))
    asyncio.run(asyncio.wait_for(scenario(b"early", 1), 60))
