"""One connection to the store: it is kept, it survives what servers and proxies do to it, and it goes the way that is configured."""

import base64
import contextlib
import email.utils
import http.client
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support import free_port, wait_until
from tests.weights_cache.conftest import content, noise
from tests.weights_cache.stores import Bucket, Proxy
from weights_cache import connection
from weights_cache.cache import NodeCache
from weights_cache.connection import Connection
from weights_cache.errors import StoreError, StoreUnavailable
from weights_cache.fetch import Puller
from weights_cache.store import Store
from weights_cache.uri import WeightsUri

MIB = 1 << 20

Answers = Callable[..., "Server"]


class Server:
    """Answers each request of each connection with the next of some bytes; None ends the connection instead."""

    def __init__(self, answers: list[bytes | None]) -> None:
        self.answers = answers
        self.connections = 0
        self.requests: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}/bucket/a?signed"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                found, _ = self._socket.accept()
                self.connections += 1
                self._open.append(found)
                while request := found.recv(65536):
                    self.requests.append(request)
                    answer = self.answers.pop(0)
                    if answer is None:
                        break
                    found.sendall(answer)
                    if b"Connection: close" in answer:
                        break
                found.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for found in self._open:
            with contextlib.suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server() -> Iterator[Answers]:
    """server(*answers): one that answers so."""
    with contextlib.ExitStack() as started:

        def start(*answers: bytes | None) -> Server:
            return started.enter_context(contextlib.closing(Server(list(answers))))

        yield start


@pytest.fixture
def client(aws: None) -> Iterator[Connection]:
    found = Connection(Store(WeightsUri("bucket", "model")))
    yield found
    found.close()


def answer(body: bytes, *headers: str, status: str = "206 Partial Content") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read(client: Connection, address: str, count: int) -> bytes:
    body = bytearray(count)
    client.get(address, {"Range": f"bytes=0-{count - 1}"}).readinto(memoryview(body))
    return bytes(body)


# Being kept


def test_a_connection_is_used_again(server: Answers, client: Connection) -> None:
    found = server(answer(b"one"), answer(b"two"), answer(b""), answer(b"four"))
    assert [read(client, found.address, count) for count in (3, 3, 0, 4)] == [b"one", b"two", b"", b"four"]
    assert found.connections == 1
    assert found.requests[0].startswith(b"GET /bucket/a?signed HTTP/1.1\r\n")
    assert b"\r\nRange: bytes=0-2\r\n" in found.requests[0]


def test_one_that_the_store_has_closed_meanwhile_is_no_error(server: Answers, client: Connection) -> None:
    found = server(answer(b"one"), None, answer(b"two"))
    assert [read(client, found.address, 3) for _ in range(2)] == [b"one", b"two"]
    assert found.connections == 2


def test_one_that_the_store_says_it_closes_is_not_used_again(server: Answers, client: Connection) -> None:
    found = server(answer(b"one", "Connection: close"), answer(b"two"))
    assert [read(client, found.address, 3) for _ in range(2)] == [b"one", b"two"]
    assert found.connections == 2
    assert len(found.requests) == 2


def test_one_with_an_answer_not_read_to_its_end_is_not_used_again(server: Answers, client: Connection) -> None:
    found = server(answer(b"much more than is read"), answer(b"two"))
    assert read(client, found.address, 4) == b"much"
    assert read(client, found.address, 3) == b"two"


def test_a_store_that_closes_a_new_connection_is_not_asked_at_once_again(server: Answers, client: Connection) -> None:
    found = server(None, answer(b"x"))
    with pytest.raises(StoreUnavailable, match=r"no answer from 127\.0\.0\.1:\d+: "):
        client.get(found.address, {})
    assert found.connections == 1
    assert read(client, found.address, 1) == b"x"


def test_a_pull_opens_no_more_connections_than_it_uses(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Callable[..., Puller]
) -> None:
    opened: list[socket.socket] = []
    proxy.opened = opened.append  # type: ignore[assignment,method-assign]
    bucket.put({"a": noise(8 * MIB)})
    puller(bucket.uri, connections=2).run()
    assert len(proxy.asked) == 8
    assert len(opened) <= 2 + 1  # and that of boto3, which lists


# What an answer may be


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"220 mail.example.com ESMTP\r\n\r\n", id="another protocol"),
        pytest.param(b"HTTP/1.1 206\r\nContent-Le", id="half a head"),
        pytest.param(b"HTTP/1.1 206 " + b"x" * 100_000, id="a head without end"),
        pytest.param(b"\0" * 100_000, id="zeros"),
    ],
)
def test_an_answer_that_is_none_is_worth_another_try(server: Answers, client: Connection, odd: bytes) -> None:
    found = server(odd + b"Connection: close")
    with pytest.raises(StoreUnavailable, match="no answer from"):
        client.get(found.address, {})


def test_a_body_that_ends_early_is_an_error_of_the_connection(server: Answers, client: Connection) -> None:
    found = server(answer(b"x" * 10, "Connection: close").replace(b"Content-Length: 10", b"Content-Length: 11"))
    reply = client.get(found.address, {})
    with pytest.raises(ConnectionError, match="1 bytes early"):
        reply.readinto(memoryview(bytearray(11)))


def test_the_code_of_an_error_is_found_however_it_is_sent(server: Answers, client: Connection) -> None:
    said = b"<Error><Code>SlowDown</Code></Error>"
    chunked = b"HTTP/1.1 503 Slow Down\r\nTransfer-Encoding: chunked\r\n\r\n" + f"{len(said):x}\r\n".encode() + said + b"\r\n0\r\n\r\n"
    to_the_end = b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\n\r\n" + said
    found = server(answer(said, status="503 Slow Down"), chunked, to_the_end, answer(b"", status="403 Forbidden"))
    for expected in ("SlowDown", "SlowDown", "SlowDown", ""):
        assert client.get(found.address, {}).error_code() == expected
        client.close()


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        ("3", 3.0),
        ("0", 0.0),
        ("0.5", 0.5),
        ("-1", 0.0),
        ("soon", 0.0),
        ("1 h", 0.0),
        ("", 0.0),
        ("Wed, 99 Xyz 2024", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    ],
)
def test_how_long_a_store_asks_to_be_left_alone(server: Answers, client: Connection, told: str, seconds: float) -> None:
    found = server(answer(b"", f"Retry-After: {told}", status="503 Slow Down"))
    assert client.get(found.address, {}).retry_after() == seconds


def test_it_may_say_until_when(server: Answers, client: Connection) -> None:
    until = email.utils.formatdate(time.time() + 100, usegmt=True)
    found = server(answer(b"", f"Retry-After: {until}", status="503 Slow Down"))
    assert 90 < client.get(found.address, {}).retry_after() <= 100


def test_silence_ends_after_a_while_and_says_so(server: Answers, client: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    stall_s = connection.STALL_S
    monkeypatch.setattr(connection, "STALL_S", 0.2)
    found = server(b"")
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"no answer from .*: (timed out|nothing came)"):
        client.get(found.address, {})
    assert 0.15 < time.monotonic() - began < stall_s


def test_a_store_that_is_not_there_is_unavailable(client: Connection) -> None:
    port = free_port()
    with pytest.raises(StoreUnavailable, match=rf"no answer from 127\.0\.0\.1:{port}: .*refused"):
        client.get(f"http://127.0.0.1:{port}/bucket/a?signed", {})


def test_who_waits_for_an_answer_can_be_stopped(server: Answers, client: Connection) -> None:
    found = server(b"")

    def stop() -> None:
        wait_until("the question", lambda: found.requests)
        client.abort()

    stopper = threading.Thread(target=stop)
    stopper.start()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        client.get(found.address, {})
    assert time.monotonic() - began < connection.STALL_S
    stopper.join()


# Through a proxy


class _Relay(http.server.BaseHTTPRequestHandler):
    """A forward proxy for http, as companies have them."""

    relay: "Relay"

    def do_GET(self) -> None:
        self.relay.asked.append((self.path, self.headers.get("Proxy-Authorization")))
        host, _, path = self.path.removeprefix("http://").partition("/")
        with contextlib.closing(http.client.HTTPConnection(host, timeout=20)) as up:
            hop = ("connection", "proxy-connection", "proxy-authorization")
            up.request(self.command, f"/{path}", headers={name: value for name, value in self.headers.items() if name.lower() not in hop})
            reply = up.getresponse()
            body = reply.read()
            length = reply.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815  the base class's names

    def log_message(self, format: str, *args: object) -> None:
        pass


class Relay:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        handler = type("Handler", (_Relay,), {"relay": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """A forward proxy that nothing in the environment leads to yet."""
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    found = Relay()
    serving = threading.Thread(target=found.server.serve_forever, args=(0.02,))
    serving.start()
    yield found
    found.server.shutdown()
    serving.join()
    found.server.server_close()


def test_a_pull_goes_through_the_proxy_that_is_configured(
    bucket: Bucket, cache: NodeCache, puller: Callable[..., Puller], relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = noise(2 * MIB)
    bucket.put({"a": data})
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{relay.port}")
    assert content(cache, puller(bucket.uri).run()) == {"a": data}
    read = [path for path, _ in relay.asked if "/model/a?" in path]
    assert len(read) >= 2


def test_a_proxy_is_told_who_asks(
    bucket: Bucket, cache: NodeCache, puller: Callable[..., Puller], relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put({"a": b"x"})
    monkeypatch.setenv("http_proxy", f"http://ann:p%40ss@127.0.0.1:{relay.port}")
    assert content(cache, puller(bucket.uri).run()) == {"a": b"x"}
    assert {told for _, told in relay.asked} == {"Basic " + base64.b64encode(b"ann:p@ss").decode()}


def test_no_proxy_is_asked_for_what_it_is_not_for(
    bucket: Bucket, cache: NodeCache, puller: Callable[..., Puller], relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put({"a": b"x"})
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{relay.port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert content(cache, puller(bucket.uri).run()) == {"a": b"x"}
    assert relay.asked == []


def test_a_proxy_that_is_not_there_is_an_error(
    bucket: Bucket, puller: Callable[..., Puller], relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put({"a": b"x"})
    port = free_port()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    with pytest.raises(StoreError, match=f"{port}"):
        puller(bucket.uri).run()


def test_an_answer_whose_head_comes_a_byte_at_a_time_is_given_up(client: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as door:

        def drip() -> None:
            found, _ = door.accept()
            with found, contextlib.suppress(OSError):
                found.sendall(b"HTTP/1.1 200 OK\r\nA: ")
                while True:
                    found.sendall(b"b")
                    time.sleep(0.01)

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(StoreUnavailable, match=r"an answer of which the head is not there after 0.1 s"):
            client.get(f"http://127.0.0.1:{door.getsockname()[1]}/a?b", {})
        thread.join()
