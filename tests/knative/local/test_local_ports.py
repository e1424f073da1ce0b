"""The ports of the platform: who gives way, who is too late, and what is said of it. The clock is the test's own."""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

import pytest
from aiohttp import web

from knative.local import connections
from knative.local.connections import (
    FRESH_S,
    HEAD_BYTES,
    HEAD_S,
    HEADER_BYTES,
    HEADERS,
    KEEP_S,
    READ_S,
    TARGET_BYTES,
    Connections,
    State,
)
from knative.local.descriptors import QUIET_S, STEADY_S, Descriptors
from knative.local.errors import PlatformError
from knative.local.ports import Port, Ports
from tests.support import free_port

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
LARGE = 20_000_000  # much more than the buffers on the way hold


class Client:
    """One connection to a port."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def open(self) -> "Client":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**16)
        return self

    async def ask(self, sent: bytes = REQUEST) -> tuple[int, bytes]:
        """Status and body of one answer."""
        self.writer.write(sent)
        return await self.answer()

    async def answer(self) -> tuple[int, bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(line.split()[1]) for line in head.splitlines() if line.lower().startswith("content-length"))
        return int(head.split()[1]), await self.reader.readexactly(length)

    async def is_closed(self) -> bool:
        """Waits for that."""
        with contextlib.suppress(ConnectionError):
            return await self.reader.read(1) == b""
        return True


@dataclass
class Scene:
    """A port, and who answers there."""

    port: int
    ports: Ports
    connections: Connections
    clock: list[float]
    said: list[str]
    listening: Port = field(init=False)
    clients: list[Client] = field(default_factory=list)
    asked: int = 0
    open_gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def client(self) -> Client:
        self.clients.append(await Client(self.port).open())
        return self.clients[-1]

    async def at(self, state: State, count: int) -> None:
        """Returns once so many connections are at it."""
        while self.connections.count(state) != count:
            await asyncio.sleep(0.005)

    def later(self, seconds: float) -> None:
        """It is so much later, and somebody looks."""
        self.clock[0] += seconds
        self.connections.look()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked += 1
        if request.path == "/wait":
            await self.open_gate.wait()
        if request.path in ("/read", "/wait"):
            await request.read()
        if request.path == "/large":
            answer = web.StreamResponse(headers={"Content-Length": str(LARGE)})
            await answer.prepare(request)
            for _ in range(LARGE // 10_000):
                await answer.write(bytes(10_000))
            return answer
        if request.path == "/mistake":
            raise ValueError("a secret")
        return web.Response(body=b"here")


def play(scene: Callable[[Scene], Any], limit: int = 100) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), opened(limit) as found:
            await scene(found)

    asyncio.run(main())


@contextlib.asynccontextmanager
async def opened(limit: int) -> AsyncIterator[Scene]:
    clock, said, port = [1000.0], list[str](), free_port()
    platform = Ports(said.append)
    platform.calls = Connections(limit, lambda: clock[0])
    found = Scene(port, platform, platform.calls, clock, said)
    async with platform.call_port(port, lambda request: found.handle(request)) as found.listening:
        yield found
        for client in found.clients:
            client.writer.transport.abort()


def test_the_connection_that_has_been_at_rest_for_longest_gives_way_to_a_new_one() -> None:
    async def scene(found: Scene) -> None:
        old, young = await found.client(), await found.client()
        for client in (old, young):
            assert await client.ask() == (200, b"here")
        found.clock[0] += FRESH_S * 2
        new = await found.client()
        assert await new.ask() == (200, b"here")
        assert await old.is_closed()
        assert await young.ask() == (200, b"here")

    play(scene, limit=2)


def test_one_whose_next_request_is_there_already_does_not_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(found: Scene) -> None:
        old, young = await found.client(), await found.client()
        for client in (old, young):
            assert await client.ask() == (200, b"here")
        found.clock[0] += FRESH_S * 2
        raw = old.writer.get_extra_info("socket")
        new = socket.create_connection(("127.0.0.1", found.port))  # both come while nobody looks
        assert os.write(raw.fileno(), REQUEST) == len(REQUEST)
        assert await old.answer() == (200, b"here")
        assert await young.is_closed()
        new.close()

    play(scene, limit=2)


def test_half_open_connections_give_way_before_callers_who_ask_all_the_time_do() -> None:
    async def scene(found: Scene) -> None:
        caller, half = await found.client(), await found.client()
        half.writer.write(b"GET / HT")
        await found.at(State.RECEIVING, 2)
        found.clock[0] += FRESH_S * 2
        assert await caller.ask() == (200, b"here")
        for _ in range(3):
            half, before = await found.client(), half
            half.writer.write(b"GET / HT")
            assert await before.is_closed()
            assert await caller.ask() == (200, b"here")
            await found.at(State.RECEIVING, 1)
            found.clock[0] += FRESH_S * 2

    play(scene, limit=2)


def test_if_all_have_asked_just_now_somebody_has_to_go_in_the_end() -> None:
    async def scene(found: Scene) -> None:
        for _ in range(2):
            assert await (await found.client()).ask() == (200, b"here")
        new = await found.client()  # the clock of the others stands still
        assert await new.ask() == (200, b"here")
        assert await found.clients[0].is_closed()

    play(scene, limit=2)


def test_a_request_that_is_worked_on_never_gives_way_and_a_new_one_waits_for_the_end_of_one() -> None:
    async def scene(found: Scene) -> None:
        busy = [await found.client() for _ in range(2)]
        for client in busy:
            client.writer.write(REQUEST.replace(b"/ ", b"/wait "))
        await found.at(State.WORKING, 2)
        new = await found.client()  # connected by the kernel, and taken in by nobody
        new.writer.write(REQUEST)
        while found.listening._is_listening:
            await asyncio.sleep(0)  # it does not ask all the time
        assert found.asked == 2
        found.open_gate.set()
        assert await new.answer() == (200, b"here")
        assert (200, b"here") in await asyncio.gather(*(client.answer() for client in busy), return_exceptions=True)

    play(scene, limit=2)


def test_who_has_begun_a_body_and_sends_nothing_more_gives_way_last_of_all_and_who_goes_on_sending_does_not() -> None:
    async def scene(found: Scene) -> None:
        resting, sending = [await found.client() for _ in range(2)]
        for client in (resting, sending):
            client.writer.write(b"POST /read HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\n1")
        await found.at(State.WORKING, 2)
        while found.asked < 2:
            await asyncio.sleep(0.005)
        found.clock[0] += 5
        sending.writer.write(b"2")
        while not any(conn._came_at > 1000 for conn in found.connections._by_state[State.WORKING]):
            await asyncio.sleep(0.005)
        new = await found.client()
        new.writer.write(REQUEST)
        assert await new.answer() == (200, b"here")
        assert await resting.is_closed()
        sending.writer.write(b"3")
        assert await sending.answer() == (200, b"here")

    play(scene, limit=2)


@pytest.mark.parametrize("half", [b"GET /hea", b"GET / HTTP/1.1\r\nHost: x\r\n", b"\r\n"])
def test_half_a_head_is_a_408_in_the_end_and_nobodys_request(half: bytes) -> None:
    async def scene(found: Scene) -> None:
        client = await found.client()
        client.writer.write(half)
        await found.at(State.RECEIVING, 1)
        await asyncio.sleep(0.05)
        found.later(HEAD_S - 1)
        found.later(2)
        status, body = await client.answer()
        assert (status, json.loads(body)["error"]["type"]) == (408, "too_slow")
        assert await client.is_closed()
        assert found.asked == 0

    play(scene)


def test_a_head_that_comes_in_drops_does_not_get_more_time() -> None:
    async def scene(found: Scene) -> None:
        client = await found.client()
        for _ in range(4):
            client.writer.write(b"GET / HTTP/1.1\r\nX: " if not found.clock[0] % 1000 else b"a")
            await asyncio.sleep(0.02)
            found.later(HEAD_S / 3)
        assert (await client.answer())[0] == 408

    play(scene)


def test_who_says_nothing_is_let_go_without_a_word() -> None:
    async def scene(found: Scene) -> None:
        fresh, kept = await found.client(), await found.client()
        assert await kept.ask() == (200, b"here")
        await found.at(State.RECEIVING, 1)
        found.later(HEAD_S + 1)
        assert await fresh.is_closed()
        assert await kept.ask() == (200, b"here")
        found.later(KEEP_S - 1)
        assert await kept.ask() == (200, b"here")
        found.later(KEEP_S + 1)
        assert await kept.is_closed()

    play(scene)


def head(lines: int, size: int, target: int = 1) -> bytes:
    """With so many headers of so many bytes, `Host` among them, and a target of so many bytes."""
    more = b"".join(b"X-%03d: " % number + b"a" * (size - 7) + b"\r\n" for number in range(lines - 1))
    return b"GET /" + b"a" * (target - 1) + b" HTTP/1.1\r\nHost: x\r\n" + more + b"\r\n"


def filled(size: int) -> bytes:
    """A head of so many bytes in all."""
    rest = size - len(head(4, 20_000))
    return head(4, 20_000).replace(b"X-000: ", b"X-000: " + b"b" * rest)


@pytest.mark.parametrize(
    ("sent", "status", "number"),
    [
        pytest.param(filled(HEAD_BYTES), 200, None, id="all of it"),
        pytest.param(filled(HEAD_BYTES + 1), 431, HEAD_BYTES, id="more than all of it"),
        pytest.param(filled(HEAD_BYTES + 5000), 431, HEAD_BYTES, id="much more than all of it"),
        pytest.param(head(2, HEADER_BYTES), 200, None, id="a header"),
        pytest.param(head(2, HEADER_BYTES + 3), 431, HEADER_BYTES, id="a longer header"),
        pytest.param(head(HEADERS, 20), 200, None, id="headers"),
        pytest.param(head(HEADERS + 1, 20), 431, HEADERS, id="one more header"),
        pytest.param(head(2, 20, TARGET_BYTES), 200, None, id="a target"),
        pytest.param(head(2, 20, TARGET_BYTES + 1), 414, TARGET_BYTES, id="a longer target"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_too_much_of_a_head_is_told_with_its_bound(sent: bytes, status: int, number: int | None, *, at_once: bool) -> None:
    async def scene(found: Scene) -> None:
        client = await found.client()
        for piece in (sent,) if at_once else (sent[:-30], sent[-30:]):
            await asyncio.sleep(0.02)
            client.writer.write(piece)
        said, body = await client.answer()
        assert said == status
        assert found.asked == (status == 200)
        if number:
            assert str(number) in json.loads(body)["error"]["message"]
            assert await client.is_closed()

    play(scene)


def test_a_bad_body_that_nobody_reads_ends_the_connection_without_a_word_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(found: Scene) -> None:
        client = await found.client()
        client.writer.write(CHUNKED)
        assert await client.answer() == (200, b"here")
        client.writer.write(b"no chunk")
        assert await client.is_closed()

    play(scene)
    assert not caplog.records


@pytest.mark.parametrize("path", [b"/read", b"/wait"])
def test_a_bad_body_is_told_once_to_whom_it_is_from_and_to_who_reads_it(caplog: pytest.LogCaptureFixture, path: bytes) -> None:
    async def scene(found: Scene) -> None:
        client = await found.client()
        client.writer.write(CHUNKED.replace(b" / ", b" %s " % path))
        await found.at(State.WORKING, 1)
        client.writer.write(b"no chunk")
        await asyncio.sleep(0.05)
        found.open_gate.set()
        status, body = await client.answer()
        assert (status, json.loads(body)["error"]["type"]) == (400, "bad_request")
        assert await client.is_closed()

    play(scene)
    assert not caplog.records


def test_what_is_no_request_behind_one_does_that_one_no_harm() -> None:
    async def scene(found: Scene) -> None:
        client = await found.client()
        client.writer.write(CHUNKED.replace(b" / ", b" /wait ") + b"0\r\n\r\n")
        await found.at(State.WORKING, 1)
        client.writer.write(b"no request\r\n\r\n")
        await asyncio.sleep(0.05)
        found.open_gate.set()
        assert await client.answer() == (200, b"here")
        assert (await client.answer())[0] == 400

    play(scene)


@pytest.mark.parametrize("waiting", [1, 2])
def test_a_head_without_an_end_behind_requests_that_are_worked_on_is_not_kept(waiting: int) -> None:
    async def scene(found: Scene) -> None:
        client = await found.client()
        client.writer.write(REQUEST.replace(b"/ ", b"/wait ") * waiting)
        await found.at(State.WORKING, 1)
        client.writer.write(b"GET / HTTP/1.1\r\n")
        for piece in range(2 * HEAD_BYTES // 10_000):
            client.writer.write(b"X-%d: " % piece + b"a" * 9990 + b"\r\n")
            await asyncio.sleep(0.005)
        assert await client.is_closed()

    play(scene)


def test_a_large_head_is_a_431_in_however_small_pieces_it_comes() -> None:
    async def scene(found: Scene) -> None:
        client = await found.client()
        client.writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n")
        for number in range(HEAD_BYTES // 1000 + 1):
            client.writer.write(b"X-%d: " % number + b"a" * 990)
            await asyncio.sleep(0)
            client.writer.write(b"\r\n")
            await asyncio.sleep(0)
        assert (await client.answer())[0] == 431

    play(scene)


def test_a_reader_that_takes_nothing_of_its_answer_is_cut_off() -> None:
    async def scene(found: Scene) -> None:
        client = await found.client()
        client.writer.write(REQUEST.replace(b"/ ", b"/large "))
        while not found.connections._stalled:
            await asyncio.sleep(0.005)
        found.later(READ_S - 1)
        assert len(found.connections) == 1
        found.later(2)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await client.answer()

    play(scene)


def test_one_that_takes_a_little_is_not() -> None:
    now, wire = [0.0], Wire(100)
    all_of_them = Connections(10, lambda: now[0])
    one = Mock(state=State.WORKING, wire=wire)
    all_of_them.add(one)
    all_of_them.stalls(one)
    for left in (99, 98):
        now[0] += READ_S * 2
        wire.left = left
        all_of_them.look()
        assert not wire.is_aborted
    now[0] += READ_S * 2
    all_of_them.look()
    assert wire.is_aborted


class Wire:
    """A transport with so many bytes to send."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.left

    def is_reading(self) -> bool:
        return True

    def abort(self) -> None:
        self.is_aborted = True


def test_beyond_the_bound_on_unsent_bytes_whoever_has_not_read_for_longest_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(found: Scene) -> None:
        for count in (1, 2):
            (await found.client()).writer.write(REQUEST.replace(b"/ ", b"/large "))
            while len(found.connections._stalled) < count:
                await asyncio.sleep(0.005)
        _, second = found.connections._stalled
        monkeypatch.setattr(connections, "UNSENT_BYTES", second.wire.get_write_buffer_size())
        found.later(1)
        assert list(found.connections._stalled) == [second]

    play(scene)


def test_who_is_answered_before_its_body_is_sent_can_read_the_answer() -> None:
    async def scene(found: Scene) -> None:
        client = await found.client()
        client.writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % LARGE)
        for _ in range(LARGE // 100_000 - 1):
            client.writer.write(bytes(100_000))
            await client.writer.drain()
        assert await client.answer() == (200, b"here")
        await found.at(State.ENDING, 1)
        found.later(100)
        assert await client.is_closed()

    play(scene)


def test_a_mistake_is_a_500_that_tells_nothing_and_the_log_has_it_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(found: Scene) -> None:
        for _ in range(20):
            status, body = await (await found.client()).ask(REQUEST.replace(b"/ ", b"/mistake "))
            assert (status, json.loads(body)["error"]["type"]) == (500, "internal_error")
            assert b"secret" not in body

    play(scene)
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ValueError]


def test_a_port_that_is_taken_is_told() -> None:
    async def scene(found: Scene) -> None:
        with pytest.raises(PlatformError, match=rf"^port {found.port} on 127\.0\.0\.1 cannot be opened: Address already in use; choose"):
            async with found.ports.call_port(found.port, found.handle):
                pass

    play(scene)


def test_each_leaves_a_share_of_the_descriptors_to_others() -> None:
    with socket.socket() as probe:
        lowest = probe.fileno()  # that is free, once more
    descriptors = Descriptors(lambda _: None, 2 * lowest)
    assert not descriptors.has_room(1 / 2)
    assert descriptors.has_room(7 / 8)


def test_the_end_of_descriptors_is_said_once_and_so_is_the_end_of_that() -> None:
    said, clock = list[str](), [1000.0]
    descriptors = Descriptors(said.append, 128, lambda: clock[0])

    def later(seconds: float) -> None:
        clock[0] += seconds
        descriptors.look()

    for _ in range(1000):
        descriptors.missed()
        later(STEADY_S / 2)
    assert len(said) == 1
    assert "(ulimit -n: 128)" in said[0]
    later(STEADY_S)
    later(STEADY_S)
    assert said[1:] == ["there are file descriptors again"]
    descriptors.missed()
    assert len(said) == 2
    later(QUIET_S)
    descriptors.missed()
    assert len(said) == 3
