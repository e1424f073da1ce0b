"""What the loop answers itself: which requests are ordinary, and that they are answered as Flask answers them."""

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from function.fast_path import Head, glance, read
from tests.support import BIN, ROOT, Reply, Server, clean_environment, free_port, request, running, wait_until

AGENT = """
class Agent:
    def load(self, weights, device):
        pass
    def predict(self, inputs):
        from function.agent import BadInput
        for item in inputs:
            if item == "bad":
                raise BadInput("not this one")
            if item == "broken":
                raise RuntimeError("a secret")
        return [{"big": "x" * 30_000_000, "unsayable": object()}.get(item, item) if isinstance(item, str) else item for item in inputs]
"""


def sent(*lines: str, body: str = '"a"', first: str = "POST / HTTP/1.1") -> bytes:
    return "\r\n".join([first, *lines, f"Content-Length: {len(body)}", "", body]).encode()


def test_the_head_of_an_ordinary_request_is_read_whatever_follows_it() -> None:
    found = read(sent("Host: x", "X-Request-Id:  mine ") + b"POST / HT")
    assert found == Head("POST", "/", {"host": "x", "x-request-id": "mine", "content-length": "3"}, 3)
    assert read(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n") == Head("GET", "/readyz", {"host": "x"})
    assert read(b"HEAD /readyz HTTP/1.1\r\n\r\n") == Head("HEAD", "/readyz", {})
    assert read(sent("Connection: Keep-Alive")) is not None


@pytest.mark.parametrize(
    "data",
    [
        sent("Host: x", first="POST / HTTP/1.0"),
        sent("Host: x", first="PUT / HTTP/1.1"),
        sent("Host: x", first="POST http://x/ HTTP/1.1"),
        sent("Host: x", first="POST /  HTTP/1.1"),
        sent("Transfer-Encoding: chunked"),
        sent("Content-Length: 3"),
        sent("Host: x", "host: y"),
        sent("Connection: keep-alive, x"),
        sent("X_Y: 1"),
        sent("X : 1"),
        sent("X: a\tb"),
        sent("X: \x7f"),
        sent("X: a\n y: b"),
        sent("X: a", " folded"),
        sent("X: é"),
        sent(*(f"X-{number}: 1" for number in range(200))),
        sent("X: " + "a" * 5000),
        b"POST / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: +3\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nContent-Length:\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nContent-Length: \r\n\r\nabc",
        b"GET /readyz HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_what_needs_a_second_look_is_left_to_others(data: bytes) -> None:
    assert read(data) is None


@pytest.mark.parametrize("line", ["Expect: 100-continue", "Content-Encoding: gzip", "ce-id: 1", "TE: trailers"])
def test_where_a_request_ends_is_known_even_if_it_is_not_ordinary(line: str) -> None:
    found = read(sent("Host: x", line))
    assert found is not None
    assert (found.length, found.is_ordinary) == (3, False)


def test_a_client_that_wants_the_connection_to_end_is_ordinary() -> None:
    found = read(sent("Host: x", "Connection: Close"))
    assert found is not None
    assert (found.is_last, found.is_ordinary) == (True, True)


@given(st.binary(max_size=200), st.integers(0, 60))
def test_no_junk_is_taken_for_a_request(junk: bytes, at: int) -> None:
    data = sent("Host: x")
    for found in (read(junk), read(data[:at] + junk + data[at:])):
        assert found is None or (found.method, found.path[:1]) in (("POST", "/"), ("GET", "/"), ("HEAD", "/"))


def test_a_probe_is_known_at_a_glance_however_odd_the_rest_of_it_is() -> None:
    odd = b"HEAD /healthz?x HTTP/1.0\r\nConnection: close\r\nX_Y: \xff\r\nX-Request-Id: mine\r\nContent-Length: 10\r\n\r\nabc"
    found = glance(odd)
    assert found
    assert (found.method, found.path, found.headers["x-request-id"]) == ("HEAD", "/healthz", "mine")
    assert found.is_last
    for data in (b"GET /healthz HTTP/9.9\r\n\r\n", b"GET  /healthz HTTP/1.1\r\n\r\n", b"GET /healthz HTTP/1.1\r\nHost: x\r\n", sent()):
        assert glance(data) is None


@pytest.mark.parametrize(
    ("lines", "is_last"),
    [
        (b"", False),
        (b"TE: trailers\r\nHost: x\r\nHost: y\r\nX_Y: \xff\r\n", False),
        (b"connection: close\r\n", True),
        (b"Content-Length: 3\r\n", True),
        (b"Transfer-Encoding: chunked\r\n", True),
        (b"Transfer-Encoding : chunked\r\n", True),
        (b"X: y\r\n Transfer-Encoding: chunked\r\n", True),
        (b"X: y\rContent-Length: 3\r\n", True),
        (b"X: y\nContent-Length: 3\r\n", True),
        (b"nonsense\r\n", True),
        (b"\xc3\xa9: x\r\n", True),
    ],
)
def test_after_a_glance_another_request_follows_only_where_it_is_clear_where_this_one_ends(lines: bytes, is_last: bool) -> None:
    found = glance(b"GET /readyz HTTP/1.1\r\n" + lines + b"\r\n" + b"GET / HT")
    assert found
    assert found.is_last == is_last


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("fast_path"), free_port()
    (folder / "fast_path_agent.py").write_text(AGENT)
    keys = folder / "keys"
    keys.write_text("key\n")
    env = clean_environment(PYTHONPATH=str(folder), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT="fast_path_agent:Agent")
    env |= {"FUNCTION_MODEL_NAME": "m", "FUNCTION_MAX_INPUTS": "3", "FUNCTION_API_KEYS_FILE": str(keys), "FUNCTION_MAX_BODY_BYTES": "5000"}
    with running([str(BIN / "python"), "-m", "function"], folder / "log", env, port) as server:
        yield server.ready()


OURS = {"Authorization": "Bearer key", "X-Request-Id": "mine", "Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("path", "body", "more", "status"),
    [
        ("/", '"a"', {}, 200),
        ("/", '{"instances": [1, null]}', {}, 200),
        ("/v1/models/m:predict", '{"instances": ["é", {"a": 1}]}', {"Content-Type": "application/json; charset=utf-8"}, 200),
        ("/v1/models/m:predict", '"a"', {}, 400),
        ("/v1/models/m:predict", '{"instances": []}', {}, 400),
        ("/v1/models/other:predict", '{"instances": [1]}', {}, 404),
        ("/", '{"instances": [1, 2, 3, 4]}', {}, 400),
        ("/", "{", {}, 400),
        ("/", "", {}, 400),
        ("/", "[" * 201 + "]" * 201, {}, 400),
        ("/", '"' + "a" * 6000 + '"', {}, 413),
        ("/", '"bad"', {}, 400),
        ("/", '"broken"', {}, 500),
        ("/", '"unsayable"', {}, 500),
        ("/", '"a"', {"X-Request-Timeout-Ms": "soon"}, 400),
        ("/", '"a"', {"Content-Type": "text/plain"}, 415),
        ("/", '"a"', {"Authorization": "Bearer other"}, 401),
        ("/readyz", None, {}, 200),
        ("/healthz", None, {"Authorization": ""}, 200),
    ],
)
def test_the_loop_answers_as_flask_does(function: Server, path: str, body: str | None, more: dict[str, str], status: int) -> None:
    def ask(extra: dict[str, str]) -> Reply:
        data = None if body is None else body.encode()
        return request(function.port, "GET" if body is None else "POST", path, data, {**OURS, **more, **extra})

    before = counted(function)
    by_loop = ask({})
    between = counted(function)
    by_flask = ask({"TE": "trailers"})  # which has no meaning here
    after = counted(function)
    assert by_loop.status == by_flask.status == status
    if path != "/readyz":
        assert by_loop.body == by_flask.body
    changing = {"date", "server-timing", "content-length" if path == "/readyz" else ""}
    assert {name: value for name, value in by_loop.headers.items() if name not in changing} == {
        name: value for name, value in by_flask.headers.items() if name not in changing
    }
    assert names(by_loop) == names(by_flask)
    assert difference(before, between) == difference(between, after)


def names(reply: Reply) -> list[str]:
    """Of the parts that Server-Timing tells."""
    return [part.partition(";")[0] for part in reply.headers["server-timing"].split(", ")]


def counted(function: Server) -> dict[str, float]:
    text = request(function.port, "GET", "/metrics", headers=OURS).body.decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith(("function_requests_total", "function_instances_total"))]
    return {name: float(value) for name, _, value in lines if "/metrics" not in name}


def difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}


def test_who_does_not_read_a_long_answer_holds_nobody_up(function: Server) -> None:
    with socket.create_connection(("127.0.0.1", function.port), timeout=20) as slow:
        slow.sendall(sent("Authorization: Bearer key", body='"big"') * 2)
        assert select.select([slow], [], [], 20)[0]
        for _ in range(20):
            began = time.monotonic()
            assert request(function.port, "POST", "/", b'"a"', OURS).json() == "a"
            assert request(function.port, "GET", "/readyz").status == 200
            assert time.monotonic() - began < 1
        got = 0
        while got < 60_000_000:
            piece = slow.recv(1 << 20)
            assert piece
            got += len(piece)


def test_who_does_not_read_the_log_holds_nobody_up(tmp_path: Path) -> None:
    port = free_port()
    env = clean_environment(PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT="function.agents.echo:Echo")
    reading, writing = os.pipe()
    with subprocess.Popen([str(BIN / "python"), "-m", "function"], env=env, cwd=ROOT, stderr=writing) as process:
        os.close(writing)
        try:
            wait_until("ready", lambda: request(port, "GET", "/readyz").status == 200)
            trace = {"traceparent": "0" * 2000, "Content-Type": "application/json"}
            for _ in range(60):  # twice what the pipe holds
                assert request(port, "POST", "/", b'"a"', trace, timeout=5).json() == "a"
            assert request(port, "GET", "/readyz", timeout=5).status == 200
            said = b""
            while said.count(b'"status"') < 60:
                said += os.read(reading, 1 << 16)
            lines = [line for line in said.splitlines() if line.startswith(b"{")]
            assert all(json.loads(line)["status"] == 200 for line in lines[:60])
        finally:
            os.close(reading)
            process.kill()
