"""What a caller gets of answers that are odd or none, and a pod of headers that are: bytes as they are on the wire."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.knative.local.running import Platform, platform_running, service
from tests.support import wait_until

RAW = {"command": ["python", str(Path(__file__).parent / "pods" / "raw.py")]}


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with platform_running(tmp_path_factory.mktemp("answers"), [service("raw", container=RAW)]) as running:
        yield running


def exchange(platform: Platform, path: str, *headers: bytes) -> tuple[bytes, bytes]:
    """Head and body of what comes back."""
    with socket.create_connection(("127.0.0.1", platform.port), timeout=30) as connection:
        connection.sendall(b"\r\n".join([b"GET %b HTTP/1.1" % path.encode(), b"Host: raw.default.localhost", *headers, b"", b""]))
        received = b""
        while piece := connection.recv(65536):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize("path", ["/no-http", "/endless-head", "/two-lengths", "/no-chunk", "/coding"])
def test_what_is_no_answer_is_a_502_that_says_so_and_does_not_repeat_it(platform: Platform, path: str) -> None:
    head, body = exchange(platform, path, b"Connection: close")
    assert head.startswith(b"HTTP/1.1 502 ")
    error = json.loads(body)["error"]
    assert error["type"] == "bad_gateway"
    assert "no HTTP" in error["message"] or "known is chunked" in error["message"]
    assert "secret" not in error["message"]
    assert "127.0.0.1" not in error["message"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    ("path", "header"),
    [("/hints", b"Content-Length: 2"), ("/large-cookie", b"Set-Cookie: " + b"a" * 20_000), ("/latin", b"X: " + "café".encode())],
)
def test_an_answer_that_is_odd_is_passed_on(platform: Platform, path: str, header: bytes) -> None:
    head, body = exchange(platform, path, b"Connection: close")
    assert (head.split()[1], body) == (b"200", b"ok")
    assert header in head.split(b"\r\n")


def test_what_any_connection_header_of_an_answer_names_does_not_reach_the_caller(platform: Platform) -> None:
    head, _ = exchange(platform, "/hop-by-hop", b"Connection: close")
    names = {line.partition(b":")[0] for line in head.split(b"\r\n")}
    assert not names & {b"X-Hop", b"Keep-Alive", b"Trailer"}


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [(b"X: " + b"a" * 30_000,) * 2, (b"X: caf\xe9", b"X: " + "café".encode()), (b"X: " + "café".encode(),) * 2, (b"X:", b"X: ")],
    ids=["30 kB", "Latin-1", "UTF-8", "empty"],
)
def test_a_header_reaches_the_pod(platform: Platform, sent: bytes, arrives: bytes) -> None:
    _, told = exchange(platform, "/", b"Connection: close", sent)
    assert arrives in told.split(b"\r\n")


def test_a_pod_that_changes_the_protocol_and_ends_leaves_nothing_to_say(platform: Platform) -> None:
    head, _ = exchange(platform, "/upgrade", b"Connection: Upgrade", b"Upgrade: shout")
    assert head.startswith(b"HTTP/1.1 101 ")
    wait_until("out of the pod", lambda: [pod["concurrency"] for pod in platform.pods("raw")] == [0])
    assert "Traceback" not in platform.server.said()


@pytest.mark.parametrize("version", ["2.0", "0.9"])
def test_another_version_of_http_is_refused(platform: Platform, version: str) -> None:
    with socket.create_connection(("127.0.0.1", platform.port), timeout=30) as connection:
        connection.sendall(f"GET / HTTP/{version}\r\nHost: raw.default.localhost\r\n\r\n".encode())
        assert connection.recv(1024).split()[1] == b"505"
