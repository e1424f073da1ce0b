"""Clients that do what HTTP has no rule for, or what breaks its rules: each is told, and nobody else notices."""

import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.function.wire import answer, connected, ended, head_of, post, reset
from tests.support import BIN, Reply, Server, clean_environment, free_port, request, running, wait_until

AGENT = """
import os, time

class Agent:
    # "big" is 10 MB, "wait" waits for a file; all else is an echo
    def load(self, weights, device): pass
    def predict(self, inputs):
        while "wait" in inputs and not os.path.exists(os.environ["GATE"]):
            time.sleep(0.005)
        return ["x" * 10_000_000 if item == "big" else item for item in inputs]
    def start(self, input): return iter(range(10))
    def step(self, sequences): return [next(sequence, None) for sequence in sequences]
"""
MOST = 4_000_000

StartFunction = Callable[..., Server]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rude")
    (folder / "rude_agent.py").write_text(AGENT)
    return folder


@pytest.fixture(scope="module")
def start(folder: Path) -> Iterator[StartFunction]:
    with ExitStack() as stack:

        def begin(command: tuple[str, ...] = (), **more: Any) -> Server:
            port = free_port()
            env = clean_environment(PYTHONPATH=str(folder), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_MODEL_NAME="m")
            env |= {"FUNCTION_AGENT": "rude_agent:Agent", "FUNCTION_MAX_BODY_BYTES": str(MOST), "GATE": str(folder / f"gate-{port}")}
            env |= {name: str(value) for name, value in more.items()}
            return stack.enter_context(
                running([*command, str(BIN / "python"), "-m", "function"], folder / f"{port}.log", env, port)
            ).ready()

        yield begin


@pytest.fixture(scope="module")
def function(start: StartFunction) -> Server:
    return start()


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does to the shared function, it is still there, and blames nobody."""
    yield
    if "function" in request.fixturenames:
        server: Server = request.getfixturevalue("function")
        assert ask(server, "still there").json() == "still there"
        assert "Traceback" not in server.said()


def ask(function: Server, item: Any, **headers: str) -> Reply:
    return request(function.port, "POST", "/", item, headers)


def said(function: Server, sent: bytes) -> Reply:
    with connected(function.port) as connection:
        connection.sendall(sent)
        return answer(connection)


def instances(port: int) -> float:
    lines = request(port, "GET", "/metrics").body.decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("function_instances_total"))


# Segments

CHUNKED = (
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'2;a=b\r\n"c\r\n2\r\nd"\r\n0\r\nT: u\r\n\r\n'
)
SEQUENCE = (
    post('"a"'),
    b"\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    CHUNKED,
    post('{"instances": ["b"]}', path="/v1/models/m:predict"),
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
    post('{"inputs": [{"name": "input", "shape": [1], "datatype": "BYTES", "data": ["e"]}]}', path="/v2/models/m/infer"),
    post('"' + "f" * 20_000 + '"'),
    b"HEAD /nowhere HTTP/1.1\r\nHost: x\r\n\r\n",
    post('"last"', "Connection: close"),
)


def outcome(data: bytes) -> list[tuple[int, Any]]:
    """Statuses and bodies of a sequence's answers; one of its requests is a HEAD, whose answer has no body."""
    found: list[tuple[int, Any]] = []
    for number in itertools.count():
        head, end, data = data.partition(b"\r\n\r\n")
        if not end:
            return found
        fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:])
        length = 0 if number == 7 else int(fields[b"content-length"])
        found.append((int(head.split()[1]), json.loads(data[:length]) if length else None))
        data = data[length:]
    raise AssertionError


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=8))
def test_a_sequence_of_requests_has_the_same_answers_in_any_segments(function: Server, cuts: list[int]) -> None:
    whole = b"".join(SEQUENCE)
    edges = [0, *sorted({cut % len(whole) for cut in cuts}), len(whole)]
    with connected(function.port) as connection:
        for begin, end in itertools.pairwise(edges):
            connection.sendall(whole[begin:end])
            time.sleep(0.002)  # so that it is a segment
        found = outcome(ended(connection))
    assert [status for status, _ in found] == [200, 200, 200, 200, 200, 200, 200, 404, 200]
    assert [found[number][1] for number in (0, 2, 3, 6, 8)] == ["a", "cd", {"predictions": ["b"]}, "f" * 20_000, "last"]
    assert found[5][1]["outputs"][0]["data"] == ["e"]


def test_fifty_requests_in_one_segment_are_answered_in_their_order(function: Server) -> None:
    probe = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(function.port) as connection:
        connection.sendall(b"".join(post(f'"{number}"') if number % 2 else probe for number in range(50)))
        found = [answer(connection).json() for _ in range(50)]
    assert found == [str(number) if number % 2 else {"status": "ok"} for number in range(50)]


# Lengths


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Content-Length: 3\r\nContent-Length: 3", 400),
        ("Content-Length: 3\r\nContent-Length: 4", 400),
        ("Content-Length: 3, 3", 400),
        ("Content-Length: -1", 400),
        ("Content-Length: +3", 400),
        ("Content-Length: 0x3", 400),
        ("Content-Length: 3.0", 400),
        ("Content-Length: ", 400),
        ("Content-Length: " + "9" * 15, 413),
        ("Content-Length: " + "9" * 100, 413),
        ("Content-Length: " + "9" * 5000, 400),
        ("Content-Length : 3", 400),
        ("Content-Length: 3\r\nTransfer-Encoding: chunked", 400),
        ("Transfer-Encoding: chunked, gzip", 400),
        ("Transfer-Encoding: xchunked", 400),
        ("Transfer-Encoding: identity, chunked, chunked", 400),
    ],
)
def test_a_length_that_can_be_read_in_two_ways_is_refused_and_the_connection_ends(function: Server, headers: str, status: int) -> None:
    with connected(function.port) as connection:
        connection.sendall(f'POST / HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n"a"'.encode() + post('"smuggled"'))
        reply = answer(connection)
        assert (reply.status, reply.headers["connection"]) in ((status, "close"), (501, "close"))
        assert ended(connection) == b""


@pytest.mark.parametrize("sent", [b"-1\r\n", b"fffffff\r\n" + b"a" * 100, b"5\r\nabcdefg\r\n0\r\n\r\n", b"1;" + b"x" * 70_000])
def test_chunks_that_lie_are_told_and_end_the_connection(function: Server, sent: bytes) -> None:
    head = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    reply = said(function, head + sent)
    assert (reply.status, reply.headers["connection"]) == (413 if b"fff" in sent else 400, "close")
    assert isinstance(reply.json()["error"], str)  # in the shape of its path


def test_what_is_behind_a_body_is_the_next_request_even_if_it_is_none(function: Server) -> None:
    with connected(function.port) as connection:
        connection.sendall(post('"a"') + b"more than was announced\r\n\r\n")
        assert answer(connection).json() == "a"
        assert answer(connection).status == 400
        assert ended(connection) == b""


def test_a_body_that_ends_too_soon_is_nobodys_request(function: Server) -> None:
    before = instances(function.port)
    with connected(function.port) as connection:
        connection.sendall(post('"abc"')[:-2])
        connection.shutdown(socket.SHUT_WR)
        assert ended(connection) == b""
    assert instances(function.port) == before


# Heads


def test_headers_of_sixteen_kilobytes_are_taken_on_every_route(function: Server) -> None:
    cookie = "Cookie: " + "a" * 16_000
    for path in ("/", "/v1/models/m:predict"):
        assert said(function, post('{"instances": ["a"]}', cookie, path=path)).status == 200
    assert said(function, f"GET /healthz HTTP/1.1\r\n{cookie}\r\n\r\n".encode()).status == 200


@pytest.mark.parametrize("size", [33_000, 65_536, 66_000, 200_000])
def test_longer_ones_are_refused_with_the_limits_in_bytes(function: Server, size: int) -> None:
    with connected(function.port) as connection:
        connection.sendall(post('"a"', "Cookie: " + "a" * size))
        reply = answer(connection)
        assert (reply.status, reply.headers["connection"]) == (431, "close")
        assert "65536 bytes in all, 32768 in each" in reply.json()["error"]["message"]
        ended(connection)


HEADERS = 100


@pytest.mark.parametrize(
    ("headers", "is_refused"),
    [
        pytest.param([16_000] * 4, False, id="in all"),
        pytest.param([16_400] * 4, True, id="more in all"),
        pytest.param([20_000] * 10, True, id="much more in all"),
        pytest.param([32_768], False, id="one"),
        pytest.param([32_769], True, id="a longer one"),
        pytest.param([30] * HEADERS, False, id="as many"),
        pytest.param([30] * (HEADERS + 1), True, id="more"),
    ],
)
@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/v2"])
def test_whatever_is_asked_for_has_the_same_bounds(function: Server, path: str, headers: list[int], *, is_refused: bool) -> None:
    """headers: how many bytes each has."""
    lines = "".join(f"X-{number:03}: {'a' * (size - 9)}\r\n" for number, size in enumerate(headers))
    with connected(function.port) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode())
        assert answer(connection).status == (431 if is_refused else 200)


def test_a_first_line_that_is_too_long_is_refused_with_the_limit_in_bytes(function: Server) -> None:
    reply = said(function, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (reply.status, "8190 bytes" in reply.json()["error"]["message"]) == (414, True)


def test_whoever_speaks_tls_is_told_at_once(function: Server) -> None:
    hello = bytes.fromhex("16030100c8010000c40303") + bytes(range(189))
    for sent in (hello, hello[:3]):
        with connected(function.port, timeout=10) as connection:  # a head that does not end is waited for for longer
            connection.sendall(sent)
            reply = answer(connection)
            assert (reply.status, "not TLS" in reply.json()["error"]["message"]) == (400, sent.startswith(b"\x16\x03"))
    if shutil.which("curl"):
        done = subprocess.run(["curl", "-sk", "--max-time", "20", f"https://127.0.0.1:{function.port}/"], check=False)
        assert done.returncode == 35  # it has read that this is no TLS


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /v1/models HTTP/1.0\r\n\r\n", 200),
        (b'POST / HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n"a"', 200),
        (b'POST / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n"a"', 200),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 200),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", None),
        (b"OPTIONS /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b'POST http://elsewhere.example/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n"a"', 200),
        (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", None),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", None),
        (b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"\r\n\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 200),
    ],
)
def test_requests_of_rare_shapes(function: Server, sent: bytes, status: int | None) -> None:
    reply = said(function, sent)
    assert reply.status == status if status else 400 <= reply.status < 500


def test_the_answer_to_a_head_request_has_the_length_and_no_body(function: Server) -> None:
    with connected(function.port) as connection:
        connection.sendall(b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\n" + post('"a"'))
        head = head_of(connection)
        assert b" 200 " in head.partition(b"\r\n")[0]
        assert b"content-length: " in head.lower()
        assert answer(connection).json() == "a"


# Expect


def test_who_wants_to_be_asked_for_a_large_body_is_asked_at_once(function: Server) -> None:
    body = '"' + "a" * 2_000_000 + '"'
    with connected(function.port) as connection:
        connection.sendall(post(body, "Expect: 100-continue").partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
        assert head_of(connection) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body.encode())
        assert answer(connection).json() == body[1:-1]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not there")
def test_curl_is_asked_for_a_large_body(function: Server, tmp_path: Path) -> None:
    (tmp_path / "body").write_text('"' + "a" * 2_000_000 + '"')
    command = ["curl", "-sv", "-H", "Expect: 100-continue", "-H", "Content-Type: application/json", "--expect100-timeout", "30"]
    done = subprocess.run(
        [*command, "--data-binary", f"@{tmp_path / 'body'}", f"127.0.0.1:{function.port}/"], capture_output=True, check=True
    )
    assert done.stderr.count(b"< HTTP/1.1 100 Continue") == 1
    assert len(json.loads(done.stdout)) == 2_000_000


@pytest.mark.parametrize("length", [MOST + 1, 9 * 10**14])
def test_who_would_send_too_much_is_not_asked_for_it(function: Server, length: int) -> None:
    reply = said(function, f"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n".encode())
    assert (reply.status, reply.headers["connection"]) == (413, "close")


def test_nobody_is_asked_for_a_body_while_the_queue_is_full(start: StartFunction, folder: Path) -> None:
    full = start(FUNCTION_MAX_BATCH=1, FUNCTION_QUEUE_LIMIT=1)
    with connected(full.port) as first, connected(full.port) as second, connected(full.port) as third:
        first.sendall(post('"wait"'))
        wait_until(
            "the model is at it",
            lambda: instances(full.port) == 1 and b'function_waiting{model="m"} 0' in request(full.port, "GET", "/metrics").body,
        )
        second.sendall(post('"wait"'))
        wait_until("it waits", lambda: b'function_waiting{model="m"} 1' in request(full.port, "GET", "/metrics").body)
        third.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2000000\r\n\r\n")
        assert answer(third).status == 503
        (folder / f"gate-{full.port}").touch()
        assert (answer(first).status, answer(second).status) == (200, 200)


def test_who_leaves_before_being_asked_harms_nobody(function: Server) -> None:
    for number in range(300):
        with connected(function.port) as connection:
            connection.sendall(
                b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 100000\r\n\r\n" + b"a" * (number % 2)
            )
            reset(connection)


# Clients that leave, or are done with sending


@pytest.mark.parametrize(
    "sent",
    [
        post('"wait"'),
        post('"wait"', "Priority: u=6"),
        post('{"inputs": [{"name": "input", "shape": [1], "datatype": "BYTES", "data": ["wait"]}]}', path="/v2/models/m/infer"),
        b'POST / HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 6\r\n\r\n"wait"',
        post('"wait"', "Connection: close"),
    ],
)
def test_a_client_that_is_done_with_sending_gets_its_answer(start: StartFunction, folder: Path, sent: bytes) -> None:
    waiting = start(FUNCTION_MAX_BATCH=1)
    with connected(waiting.port) as first, connected(waiting.port) as half:
        first.sendall(post('"wait"'))
        wait_until("the model is at it", lambda: instances(waiting.port) == 1)
        half.sendall(sent)
        half.shutdown(socket.SHUT_WR)
        wait_until("it waits", lambda: instances(waiting.port) == 2)
        time.sleep(0.1)  # those who wait are looked after from time to time
        (folder / f"gate-{waiting.port}").touch()
        found = ended(half)
    waiting.kill()
    assert re.match(rb"(HTTP/1.1 100 Continue\r\n\r\n)?HTTP/1.[01] 200 OK\r\n", found)  # a client passes over the first one
    assert b"wait" in found
    assert b"Continue" not in found or b"HTTP/1.0" not in sent  # which does not know of it


def test_a_stream_goes_on_for_a_client_that_is_done_with_sending(function: Server) -> None:
    with connected(function.port) as connection:
        connection.sendall(post('{"text_input": "a"}', path="/v2/models/m/generate_stream"))
        connection.shutdown(socket.SHUT_WR)
        assert ended(connection).count(b"text_output") == 10


def test_clients_that_reset_anywhere_harm_nobody(function: Server) -> None:
    whole = b"".join((post('"big"'), CHUNKED, post('{"text_input": "a"}', path="/v2/models/m/generate_stream")))
    for cut in range(0, len(whole), 7):
        connection = socket.create_connection(("127.0.0.1", function.port))
        connection.sendall(whole[:cut])
        if cut % 3 == 0:
            time.sleep(0.002)
        reset(connection)


def descriptors(server: Server) -> int:
    """Of the worker."""
    worker = int(Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()[0])
    return sum(1 for _ in Path(f"/proc/{worker}/fd").iterdir())


def open_and_close(server: Server, count: int) -> None:
    before = descriptors(server)
    for number in range(count):
        connection = socket.create_connection(("127.0.0.1", server.port))
        if number % 3:
            connection.sendall(b"GET /healthz HTTP/1.1\r\n" if number % 3 == 1 else post('"a"'))
        if number % 5 == 0:
            reset(connection)
        connection.close()
    wait_until("all are closed", lambda: descriptors(server) <= before)


def test_connections_that_are_opened_and_closed_leave_nothing(function: Server) -> None:
    open_and_close(function, 500)


@pytest.mark.soak
def test_ten_thousand_connections_that_are_opened_and_closed_leave_nothing(function: Server) -> None:
    open_and_close(function, 10_000)


# At the end


def test_clients_that_never_read_hold_the_end_up_for_the_grace_time_and_no_longer(start: StartFunction) -> None:
    server = start(FUNCTION_DRAIN_S=2)
    with ExitStack() as stack:
        for path in ("/", "/v1/models/m:predict"):
            connection = stack.enter_context(connected(server.port))
            connection.sendall(post('"big"' if path == "/" else '{"instances": ["big"]}', path=path))
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        server.signal(signal.SIGTERM)
        assert server.wait(60) == 0


def test_a_body_that_is_on_its_way_at_the_end_may_still_come(start: StartFunction) -> None:
    server = start()
    sent = post('"' + "a" * 100_000 + '"')
    with connected(server.port) as connection:
        connection.sendall(sent[:50_000])
        wait_until("it is received", lambda: request(server.port, "GET", "/healthz").status == 200)
        server.signal(signal.SIGTERM)
        wait_until("it drains", lambda: request(server.port, "GET", "/readyz").status == 503)
        connection.sendall(sent[50_000:])
        reply = answer(connection)
        assert (reply.status, reply.headers["connection"], len(reply.json())) == (200, "close", 100_000)
    assert server.wait(30) == 0


def test_a_body_that_does_not_come_before_the_end_is_refused(start: StartFunction) -> None:
    server = start(FUNCTION_DRAIN_S=1)
    with connected(server.port) as connection:
        connection.sendall(post('"' + "a" * 100_000 + '"')[:50_000])
        wait_until("it is received", lambda: request(server.port, "GET", "/healthz").status == 200)
        server.signal(signal.SIGTERM)
        reply = answer(connection)
        assert (reply.status, reply.headers["connection"], reply.headers["retry-after"]) == (503, "close", "1")
    assert server.wait(30) == 0
