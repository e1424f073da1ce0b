"""Connections that are upgraded, through a running platform: WebSocket client and pod are real, and so is another protocol."""

import asyncio
import contextlib
import http.client
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import WSMsgType

from tests.knative.local.running import Platform, platform_running, service
from tests.support import wait_until

SOCKETS = {"command": ["python", str(Path(__file__).parent / "pods" / "sockets.py")]}
LARGE = 8_000_000  # much more than the buffers on the way hold
Call = aiohttp.ClientWebSocketResponse
SHOUT = ("Connection: Upgrade", "Upgrade: shout")


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    services = [
        service("talk", container=SOCKETS),
        service("lone", container=SOCKETS, spec={"containerConcurrency": 1}, scale={"max-scale": "1"}),
        service("brief", container=SOCKETS, spec={"timeoutSeconds": 2}),
        service("idle", container=SOCKETS, spec={"idleTimeoutSeconds": 2}),
        service("raw"),
    ]
    with platform_running(tmp_path_factory.mktemp("tunnel"), services) as running:
        yield running


@contextlib.asynccontextmanager
async def talking(platform: Platform, name: str, path: str = "/talk") -> AsyncIterator[Call]:
    """A WebSocket to a Service; its greeting is still to be read."""
    url = f"http://127.0.0.1:{platform.port}{path}"
    headers = {"Host": f"{name}.default.localhost"}
    async with aiohttp.ClientSession() as session, session.ws_connect(url, headers=headers, max_msg_size=0, protocols=["talk"]) as call:
        yield call


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(90):
            await scene()

    asyncio.run(main())


def in_flight(platform: Platform, name: str) -> list[int]:
    return [pod["concurrency"] for pod in platform.pods(name)]


def shouting(platform: Platform, path: str, *headers: str) -> socket.socket:
    """A connection over which this request was sent."""
    connection = socket.create_connection(("127.0.0.1", platform.port), timeout=30)
    lines = [f"GET {path} HTTP/1.1", "Host: raw.default.localhost", *headers, "", ""]
    connection.sendall("\r\n".join(lines).encode())
    return connection


def head(connection: socket.socket) -> str:
    """The head of an answer, and nothing behind it."""
    received = b""
    while not received.endswith(b"\r\n\r\n"):
        received += connection.recv(1)
    return received.decode()


def test_a_websocket_is_held_while_there_is_no_pod_and_then_carries_messages_both_ways(platform: Platform) -> None:
    async def scene() -> None:
        async with talking(platform, "talk") as call:
            assert call.protocol == "talk"  # the pod's choice
            assert (await call.receive_str()).startswith("hello from ")  # sent right behind the 101
            for text in ("one", "two", ""):
                await call.send_str(text)
                assert await call.receive_str() == text
            await call.ping(b"still there")
            await call.send_bytes(b"\0\xff")
            assert await call.receive_bytes() == b"\0\xff"

    play(scene)
    assert "open talk.default.localhost 127.0.0.1" in platform.seen("talk")


def test_a_message_that_is_larger_than_every_buffer_arrives_whole(platform: Platform) -> None:
    async def scene() -> None:
        async with talking(platform, "talk") as call:
            await call.receive_str()
            sent = bytes(range(256)) * (LARGE // 256)
            sending = asyncio.create_task(call.send_bytes(sent))
            assert await call.receive_bytes() == sent
            await sending

    play(scene)


def test_who_closes_and_why_is_seen_at_the_other_side(platform: Platform) -> None:
    async def scene() -> None:
        async with talking(platform, "talk") as call:
            await call.receive_str()
            await call.send_str("close 4002")
            closed = await call.receive()
            assert (closed.type, closed.data, closed.extra) == (WSMsgType.CLOSE, 4002, "as you wish")
        async with talking(platform, "talk") as call:
            await call.receive_str()
            await call.close(code=4001)

    play(scene)
    wait_until("seen", lambda: "closed 4001" in platform.seen("talk"))
    wait_until("out of the pod", lambda: in_flight(platform, "talk") == [0])


def test_a_client_that_vanishes_is_seen_at_the_pod_and_leaves_its_place(platform: Platform) -> None:
    async def scene() -> None:
        async with talking(platform, "talk") as call:
            await call.receive_str()
            transport = call._conn.transport if call._conn else None
            assert transport
            transport.abort()

    play(scene)
    wait_until("seen", lambda: "closed 1006" in platform.seen("talk"))
    wait_until("out of the pod", lambda: in_flight(platform, "talk") == [0])


def test_a_pod_that_dies_ends_the_connection(platform: Platform) -> None:
    async def scene() -> None:
        async with talking(platform, "talk") as call:
            await call.receive_str()
            await call.send_str("die")
            assert (await call.receive()).type in (WSMsgType.CLOSED, WSMsgType.ERROR)
            assert call.close_code == 1006

    play(scene)
    platform.wait_for("talk", "another start", lambda found: found["state"] == "ready" and any(found["pods"][0]["restarts"].values()))
    assert platform.call("talk").status == 200


def test_an_upgraded_connection_is_a_request_in_flight_as_long_as_it_lasts(platform: Platform) -> None:
    async def scene() -> None:
        async with talking(platform, "lone") as call:
            await call.receive_str()
            assert in_flight(platform, "lone") == [1]
            second = asyncio.create_task(asyncio.to_thread(platform.call, "lone"))
            await asyncio.to_thread(platform.wait_for, "lone", "the second held", lambda found: found["queued"] == 1)
            await call.send_str("still mine")
            assert await call.receive_str() == "still mine"
            await call.close()
            assert (await second).status == 200

    play(scene)
    wait_until("out of the pod", lambda: in_flight(platform, "lone") == [0])


def test_an_upgrade_that_the_pod_refuses_is_an_ordinary_answer_on_a_connection_that_stays(platform: Platform) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", platform.port, timeout=30)
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "A" * 22 + "=="}
    for _ in range(2):
        connection.request("GET", "/refuse", headers={"Host": "talk.default.localhost", **upgrade})
        reply = connection.getresponse()
        assert (reply.status, reply.headers["X-Reason"], reply.read()) == (403, "taste", b"not you")
    connection.request("GET", "/", headers={"Host": "talk.default.localhost"})
    assert connection.getresponse().read().startswith(b"hello from ")
    connection.close()


def test_a_connection_may_be_upgraded_to_any_protocol(platform: Platform) -> None:
    with shouting(platform, "/shout", *SHOUT) as connection:
        told = head(connection)
        assert told.startswith("HTTP/1.1 101 Switching Protocols\r\n")
        assert "\r\nConnection: Upgrade\r\n" in told
        assert "\r\nUpgrade: shout\r\n" in told
        assert connection.recv(1024) == b"GO ON"  # sent in one piece with the 101
        for said in (b"hello", b"GET / http/1.1\r\n\r\n"):
            connection.sendall(said)
            assert connection.recv(1024) == said.upper()
        connection.sendall(b"bye")
        assert connection.recv(1024) == b""


def test_a_message_right_behind_the_request_for_a_websocket_is_not_lost(platform: Platform) -> None:
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {'A' * 22}==")
    frame = b"\x81\x85" + bytes(4) + b"early"
    with socket.create_connection(("127.0.0.1", platform.port), timeout=30) as connection:
        connection.sendall("\r\n".join(["GET /talk HTTP/1.1", "Host: talk.default.localhost", *upgrade, "", ""]).encode() + frame)
        head(connection)
        received = b""
        while not received.endswith(b"early"):  # it is sent back
            piece = connection.recv(1024)
            assert piece, received
            received += piece


def test_a_pod_may_choose_among_the_protocols_of_all_upgrade_headers(platform: Platform) -> None:
    asked = ("Connection: keep-alive", "Upgrade: whisper", "Connection: upgrade", "Upgrade: mumble, Shout")
    with shouting(platform, "/shout", *asked) as connection:
        assert head(connection).startswith("HTTP/1.1 101 ")


@pytest.mark.parametrize("asked", [(), ("Connection: Upgrade", "Upgrade: whisper"), ("Upgrade: shout",)])
def test_a_pod_that_changes_to_a_protocol_that_nobody_asked_for_is_a_502(platform: Platform, asked: tuple[str, ...]) -> None:
    with shouting(platform, "/shout", *asked) as connection:
        assert head(connection).startswith("HTTP/1.1 502 ")
    wait_until("out of the pod", lambda: in_flight(platform, "raw") == [0])


@pytest.mark.parametrize("name", ["brief", "idle"])
def test_an_upgraded_connection_ends_at_the_first_limit_whatever_goes_over_it(platform: Platform, name: str) -> None:
    platform.call(name)

    async def scene() -> None:
        async with talking(platform, name) as call:
            await call.receive_str()
            with contextlib.suppress(ConnectionError):
                while not call.closed:
                    await call.send_str("again")
                    if (await call.receive()).type is not WSMsgType.TEXT:
                        break
            assert call.close_code in (1006, None)

    play(scene)
