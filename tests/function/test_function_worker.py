"""The function under load, in trouble and at its end: what `python -m function` does with connections."""

import json
import re
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from function.streams import AHEAD
from tests.function.wire import answer, connected, ended, post, reset
from tests.support import BIN, Reply, Server, clean_environment, free_port, request, running, wait_until

AGENT = """
import os, time

class Gated:
    # Answers when a file appears; "hang" never comes back. A stream counts its steps; the third waits for the file, too.
    def load(self, weights, device):
        self.seen = []
        self.steps = 0
    def predict(self, inputs):
        self.seen += inputs
        if inputs == ["seen"]:
            return [self.seen[:-1]]
        if inputs == ["steps"]:
            return [self.steps]
        if "hang" in inputs:
            time.sleep(3600)
        while "wait" in inputs and not os.path.exists(os.environ["GATE"]):
            time.sleep(0.005)
        return [{"input": item, "batch": len(inputs)} for item in inputs]
    def start(self, input):
        return iter(range(1, 1 + int(input["text_input"])))
    def step(self, sequences):
        self.steps += 1
        while self.steps == 3 and not os.path.exists(os.environ["GATE"]):
            time.sleep(0.005)
        return [next(sequence, None) for sequence in sequences]
"""
STREAM = "/v2/models/m/generate_stream"

StartFunction = Callable[..., Server]


@pytest.fixture(scope="module")
def start_for_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartFunction]:
    folder = tmp_path_factory.mktemp("worker")
    (folder / "gated_agent.py").write_text(AGENT)
    with ExitStack() as stack:

        def begin(gate: Path = folder / "no-gate", **more: Any) -> Server:
            port = free_port()
            env = clean_environment(PYTHONPATH=str(folder), PORT=str(port), FUNCTION_HOST="127.0.0.1", GATE=str(gate))
            env |= {"FUNCTION_AGENT": "gated_agent:Gated", "FUNCTION_MODEL_NAME": "m", **{name: str(value) for name, value in more.items()}}
            return stack.enter_context(running([str(BIN / "python"), "-m", "function"], folder / f"{port}.log", env, port)).ready()

        yield begin


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def start(start_for_all: StartFunction, gate: Path) -> Iterator[StartFunction]:
    """start(**settings): a function of this test's own, whose model waits for `gate`."""
    made: list[Server] = []

    def begin(**more: Any) -> Server:
        made.append(start_for_all(gate, **more))
        return made[-1]

    yield begin
    for server in made:
        server.kill()


@pytest.fixture(scope="module")
def function(start_for_all: StartFunction) -> Server:
    """One that all tests may ask, and none disturbs."""
    return start_for_all(FUNCTION_MAX_BODY_BYTES=100_000)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


def lines(function: Server) -> list[dict[str, Any]]:
    """Of its log, those about requests."""
    return [json.loads(line) for line in function.said().splitlines() if line.startswith("{")]


def gauge(port: int, name: str) -> float:
    lines = request(port, "GET", "/metrics").body.decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def ask(pool: ThreadPoolExecutor, port: int, item: Any, **headers: str) -> "Future[Reply]":
    return pool.submit(request, port, "POST", "/", item, {name.replace("_", "-"): value for name, value in headers.items()})


def occupied(pool: ThreadPoolExecutor, port: int, *, waiting: int = 0, **headers: str) -> "list[Future[Reply]]":
    """The model is at one call until the gate opens, and so many more wait behind it, one after the other; the answers to be."""
    kept = [ask(pool, port, "wait")]
    wait_until("the model is at it", lambda: gauge(port, "function_instances_total") == 1 and gauge(port, "function_waiting") == 0)
    for number in range(1, waiting + 1):
        kept.append(ask(pool, port, "wait", **headers))
        wait_until("the queue", lambda number=number: gauge(port, "function_waiting") == number)  # type: ignore[misc]
    return kept


# More callers than the model can serve


def test_beyond_the_queue_callers_are_told_at_once_and_when_to_come_back(
    start: StartFunction, gate: Path, pool: ThreadPoolExecutor
) -> None:
    port = start(FUNCTION_MAX_BATCH=1, FUNCTION_QUEUE_LIMIT=2).port
    kept = occupied(pool, port, waiting=2)
    for _ in range(20):
        began = time.monotonic()
        refused = request(port, "POST", "/", "wait")
        assert (refused.status, refused.json()["error"]["type"]) == (503, "unavailable")
        assert "FUNCTION_QUEUE_LIMIT" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert time.monotonic() - began < 1
    gate.touch()
    assert [future.result().status for future in kept] == [200, 200, 200]


def test_a_refused_caller_has_an_id_and_a_line_in_the_log_too(start: StartFunction, gate: Path, pool: ThreadPoolExecutor) -> None:
    function = start(FUNCTION_MAX_BATCH=1, FUNCTION_QUEUE_LIMIT=1)
    port = function.port
    kept = occupied(pool, port, waiting=1)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    told = request(port, "POST", "/v2/models/m/infer?x=1", "a", {"X-Request-Id": "mine", "traceparent": trace})
    assert (told.status, told.headers["x-request-id"]) == (503, "mine")
    assert "FUNCTION_QUEUE_LIMIT" in told.json()["error"]
    assert re.fullmatch(r"total;dur=[\d.]+", told.headers["server-timing"])
    with connected(port) as connection:
        connection.sendall(post('"a"', "X-Request-Id: not one\x07", "traceparent: " + "é" * 20_000, path="/" + "\x01" * 20_000))
        made = answer(connection)
    assert made.status == 503
    assert re.fullmatch("[0-9a-f]{32}", made.headers["x-request-id"])
    first, second = wait_until("both lines", lambda: len(found := lines(function)) == 2 and found)
    about = {name: first[name] for name in ("request_id", "traceparent", "method", "path", "status")}
    assert about == {"request_id": "mine", "traceparent": trace, "method": "POST", "path": "/v2/models/m/infer", "status": 503}
    assert first["total_s"] >= 0
    assert second["request_id"] == made.headers["x-request-id"]
    assert max(map(len, function.log.read_bytes().splitlines())) < select.PIPE_BUF  # the loop would wait for a longer one
    assert gauge(port, 'function_requests_total{code="503",route="*"}') == 2
    gate.touch()
    assert [future.result().status for future in kept] == [200, 200]


def test_a_refused_caller_may_ask_again_over_the_same_connection(start: StartFunction, gate: Path, pool: ThreadPoolExecutor) -> None:
    port = start(FUNCTION_MAX_BATCH=1, FUNCTION_QUEUE_LIMIT=1).port
    kept = occupied(pool, port, waiting=1)
    with connected(port) as connection:
        for _ in range(3):
            connection.sendall(post('"again"'))
            assert answer(connection).status == 503
        gate.touch()
        for future in kept:
            future.result()
        connection.sendall(post('"again"'))
        assert answer(connection).json()["input"] == "again"


def test_batch_work_is_refused_by_its_own_limit_and_interactive_callers_are_not(
    start: StartFunction, gate: Path, pool: ThreadPoolExecutor
) -> None:
    port = start(FUNCTION_MAX_BATCH=1, FUNCTION_QUEUE_LIMIT=1).port
    kept = occupied(pool, port, waiting=1, priority="u=6")
    refused = request(port, "POST", "/", b"no JSON at all", {"Priority": "i, u=5"})  # it is not looked at
    assert (refused.status, refused.json()["error"]["message"]) == (
        503,
        "1 requests of batch work are waiting already (FUNCTION_QUEUE_LIMIT)",
    )
    kept.append(ask(pool, port, "wait"))
    wait_until("it is let in", lambda: gauge(port, "function_waiting") == 2)
    assert request(port, "POST", "/", {"instances": ["more"]}).json()["error"]["message"].startswith("1 requests are waiting already")
    gate.touch()
    assert [future.result().status for future in kept] == [200, 200, 200]


def test_a_refused_caller_who_is_still_sending_reads_why(start: StartFunction, gate: Path, pool: ThreadPoolExecutor) -> None:
    port = start(FUNCTION_MAX_BATCH=1, FUNCTION_QUEUE_LIMIT=1).port
    kept = occupied(pool, port, waiting=1)
    with connected(port) as connection:
        connection.sendall(post('"' + "a" * 1_000_000 + '"'))
        refused = answer(connection)
        assert (refused.status, refused.headers["connection"]) == (503, "close")
    gate.touch()
    assert [future.result().status for future in kept] == [200, 200]


def test_probes_answer_while_every_thread_waits_for_the_model(start: StartFunction, gate: Path, pool: ThreadPoolExecutor) -> None:
    port = start(FUNCTION_MAX_BATCH=1, FUNCTION_QUEUE_LIMIT=40).port
    kept = occupied(pool, port)
    kept += [ask(pool, port, "wait") for _ in range(59)]
    wait_until("the queue", lambda: gauge(port, "function_waiting") == 40)
    for path in ("/healthz", "/readyz", "/metrics"):
        began = time.monotonic()
        assert request(port, "GET", path).status == 200
        assert time.monotonic() - began < 0.5
    gate.touch()
    statuses = [future.result().status for future in kept]
    assert (statuses.count(200), statuses.count(503)) == (41, 19)


ODD_PROBES = (
    b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n",
    b"GET /readyz HTTP/1.1\r\nContent-Length: 10\r\n\r\n",
    b"GET /readyz HTTP/1.1\r\nTransfer-Encoding: chunked\r\nX_Y: \xff\r\n\r\n",
    b"GET /healthz HTTP/1.0\r\n\r\n",
    b"HEAD /healthz?verbose HTTP/1.1\r\nHost: x\r\nHost: y\r\nConnection: close\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nContent-Length: 10\r\n\r\n",
)


def test_probes_that_are_odd_are_answered_at_once_whatever_others_do_to_those_who_answer(function: Server) -> None:
    with ExitStack() as stack:
        for _ in range(8):  # each of which announces a body that does not come
            stack.enter_context(connected(function.port)).sendall(b"GET /metrics HTTP/1.1\r\nContent-Length: 10\r\n\r\n")
        began = time.monotonic()
        for sent in ODD_PROBES:
            connection = stack.enter_context(connected(function.port))
            connection.sendall(sent)
            head, _, body = ended(connection).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"connection: close" in head.lower()
            assert (body == b"") == sent.startswith(b"HEAD")
        assert time.monotonic() - began < 4  # such a body is waited for for 5 s


def test_a_head_probe_keeps_its_connection(function: Server) -> None:
    with connected(function.port) as connection:
        for _ in range(2):
            connection.sendall(b"HEAD /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += connection.recv(1)
            assert b" 200 " in head
        connection.sendall(post('"a"'))
        assert answer(connection).json()["input"] == "a"


def test_connections_that_send_nothing_take_no_threads(start: StartFunction) -> None:
    port = start(FUNCTION_MAX_BATCH=1, FUNCTION_QUEUE_LIMIT=1).port
    with ExitStack() as stack:
        for number in range(100):
            idle = stack.enter_context(connected(port))
            if number % 2:
                idle.sendall(b"POST / HTTP/1.1\r\nHost: ")
        assert request(port, "POST", "/", "a").json()["input"] == "a"


def test_batch_work_waits_for_interactive_callers(start: StartFunction, gate: Path, pool: ThreadPoolExecutor) -> None:
    port = start(FUNCTION_MAX_BATCH=1).port
    futures = [ask(pool, port, "wait")]
    for number, (item, priority) in enumerate((("b1", "u=5"), ("b2", "u=7, i"), ("i1", "u=4"), ("i2", "nonsense")), 1):
        wait_until("the one before", lambda number=number: gauge(port, "function_instances_total") == number)  # type: ignore[misc]
        wait_until("it is in the queue", lambda number=number: gauge(port, "function_waiting") == number - 1)  # type: ignore[misc]
        futures.append(ask(pool, port, item, Priority=priority))
    wait_until("all", lambda: gauge(port, "function_waiting") == 4)
    gate.touch()
    for future in futures:
        assert future.result().status == 200
    assert request(port, "POST", "/", "seen").json() == ["wait", "i1", "i2", "b1", "b2"]


# Callers who leave, or have little time


def test_nothing_is_computed_for_a_caller_who_has_hung_up(start: StartFunction, gate: Path, pool: ThreadPoolExecutor) -> None:
    port = start(FUNCTION_MAX_BATCH=1).port
    running_one = ask(pool, port, "wait")
    wait_until("the model is at it", lambda: gauge(port, "function_instances_total") == 1)
    with connected(port) as connection:
        connection.sendall(post('"gone"'))
        wait_until("it is in the queue", lambda: gauge(port, "function_waiting") == 1)
    time.sleep(0.05)  # nobody is taken to have left within the first moment
    gate.touch()
    assert running_one.result().status == 200
    assert request(port, "POST", "/", "seen").json() == ["wait"]


def pieces(connection: socket.socket, count: int) -> bytes:
    """What comes of a stream until it has so many pieces."""
    data = b""
    while data.count(b"text_output") < count:
        piece = connection.recv(4096)
        assert piece, data
        data += piece
    return data


def test_who_hangs_up_within_a_stream_leaves_once_the_next_piece_cannot_be_sent(start: StartFunction, gate: Path) -> None:
    port = start(FUNCTION_MAX_BATCH=1).port
    with connected(port) as connection:
        connection.sendall(post('{"text_input": "1000000"}', path=STREAM))
        pieces(connection, 2)
        time.sleep(0.05)  # nobody is taken to have left within the first moment
    gate.touch()
    wait_until("its place", lambda: gauge(port, "function_active_streams") == 0, 20)
    assert request(port, "POST", "/", "steps").json() < 3 + 2 * AHEAD  # how many an agent makes that is quicker than its reader


def test_a_caller_may_set_a_shorter_deadline_which_says_nothing_about_the_model(start: StartFunction, gate: Path) -> None:
    port = start(FUNCTION_BREAKER_THRESHOLD=1).port
    late = request(port, "POST", "/", "wait", {"X-Request-Timeout-Ms": "100"})
    assert (late.status, late.json()["error"]) == (504, {"type": "timed_out", "message": "no answer within 0.1 s"})
    gate.touch()
    assert request(port, "GET", "/readyz").status == 200
    assert request(port, "POST", "/", "a").status == 200
    for wrong in ("0", "-1", "soon", "nan", "inf"):
        refused = request(port, "POST", "/", "a", {"X-Request-Timeout-Ms": wrong})
        assert (refused.status, refused.json()["error"]["type"]) == (400, "bad_input")


# A model that hangs


def test_a_model_that_hangs_is_cut_off_and_in_the_end_given_up(start: StartFunction) -> None:
    port = start(FUNCTION_TIMEOUT_S=0.5, FUNCTION_BREAKER_THRESHOLD=2, FUNCTION_BREAKER_RESET_S=0.6).port
    assert request(port, "POST", "/", "hang").status == 504
    assert request(port, "GET", "/healthz").status == 200
    assert request(port, "POST", "/", "a").status == 504
    refused = request(port, "POST", "/", "a")
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    ready = request(port, "GET", "/readyz")
    assert (ready.status, ready.json()["phase"]) == (503, "tripped")
    wait_until("half-open", lambda: request(port, "GET", "/readyz").status == 200, 5)
    assert request(port, "POST", "/", "a").status == 504  # the trial
    assert request(port, "GET", "/readyz").json()["phase"] == "tripped"
    assert gauge(port, "function_breaker_trips_total") == 2
    stuck = wait_until("given up", lambda: (found := request(port, "GET", "/healthz")).status == 503 and found, 5)
    assert stuck.json()["error"]["type"] == "stuck"


def test_a_model_that_comes_back_is_used_again(start: StartFunction, gate: Path) -> None:
    port = start(FUNCTION_TIMEOUT_S=0.3, FUNCTION_BREAKER_THRESHOLD=1, FUNCTION_BREAKER_RESET_S=0.3).port
    assert request(port, "POST", "/", "wait").status == 504
    gate.touch()
    wait_until("half-open", lambda: request(port, "GET", "/readyz").status == 200, 5)
    assert request(port, "POST", "/", "a").status == 200
    assert gauge(port, 'function_breaker_state{model="m",state="closed"}') == 1


# The end


def test_told_to_end_it_refuses_new_callers_finishes_the_others_and_leaves_at_once(
    start: StartFunction, gate: Path, pool: ThreadPoolExecutor
) -> None:
    function = start()
    in_flight = [ask(pool, function.port, "wait") for _ in range(2)]
    with connected(function.port) as idle:
        idle.sendall(post('"a"'))
        wait_until("both", lambda: gauge(function.port, "function_instances_total") == 3)
        function.signal(signal.SIGTERM)
        wait_until("draining", lambda: request(function.port, "GET", "/readyz").json()["phase"] == "draining", 5)
        assert request(function.port, "GET", "/healthz").status == 200
        refused = request(function.port, "POST", "/", "late")
        assert (refused.status, refused.headers["connection"], refused.headers["retry-after"]) == (503, "close", "1")
        gate.touch()
        assert [future.result().status for future in in_flight] == [200, 200]
        assert answer(idle).status == 200
    began = time.monotonic()
    assert function.wait(5) == 0
    assert time.monotonic() - began < 1  # 0.2 s on a machine that has nothing else to do; the grace time is 60 s


def test_told_to_end_it_finishes_a_stream_and_leaves_at_once(start: StartFunction, gate: Path) -> None:
    function = start()
    with connected(function.port) as connection:
        connection.sendall(post('{"text_input": "5"}', "Connection: close", path=STREAM))
        pieces(connection, 2)
        function.signal(signal.SIGTERM)
        wait_until("draining", lambda: request(function.port, "GET", "/readyz").json()["phase"] == "draining", 5)
        gate.touch()
        assert ended(connection).count(b"text_output") == 3
    began = time.monotonic()
    assert function.wait(5) == 0
    assert time.monotonic() - began < 1  # 0.2 s on a machine that has nothing else to do


def test_with_nothing_to_finish_it_leaves_at_once(start: StartFunction) -> None:
    function = start()
    with connected(function.port) as idle:
        idle.sendall(post('"a"'))
        answer(idle)
        function.signal(signal.SIGTERM)
        assert function.wait(5) == 0


def test_what_does_not_finish_in_time_is_cut_off(start: StartFunction, pool: ThreadPoolExecutor) -> None:
    function = start(FUNCTION_DRAIN_S=1)
    in_flight = ask(pool, function.port, "hang")
    wait_until("it is in", lambda: gauge(function.port, "function_instances_total") == 1)
    function.signal(signal.SIGTERM)
    assert function.wait(10) == 0
    with pytest.raises((OSError, Exception)):
        in_flight.result()


# HTTP as it comes over the wire


def test_requests_that_come_together_are_answered_one_after_the_other(function: Server) -> None:
    with connected(function.port) as connection:
        connection.sendall(post('"a"') + post('"b"') + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + post('"c"'))
        assert [answer(connection).json().get("input") for _ in range(4)] == ["a", "b", None, "c"]


def test_a_request_that_comes_byte_by_byte_is_understood(function: Server) -> None:
    with connected(function.port) as connection:
        for byte in post('"slow"'):
            connection.sendall(bytes([byte]))
            time.sleep(0.0005)
        assert answer(connection).json()["input"] == "slow"


def test_who_wants_to_be_asked_for_the_body_is(function: Server) -> None:
    with connected(function.port) as connection:
        head, _, body = post('"a"', "Expect: 100-continue").partition(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert answer(connection).status == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 431),
        (post('"' + "a" * 200_000 + '"'), 413),
        (post("[" * 5000), 400),
        (post("[" * 201 + "]" * 201), 400),
        (post('"\\ud800"'), 400),
        (post("NaN"), 400),
    ],
)
def test_what_is_not_understood_is_said_in_json(function: Server, sent: bytes, status: int) -> None:
    with connected(function.port) as connection:
        connection.sendall(sent)
        reply = answer(connection)
        assert (reply.status, reply.headers["content-type"]) == (status, "application/json")
        assert set(reply.json()["error"]) == {"type", "message"}


def test_a_connection_reset_in_the_middle_of_a_body_harms_nobody(function: Server) -> None:
    for _ in range(20):
        with connected(function.port) as connection:
            connection.sendall(post('"' + "a" * 1000 + '"')[:-500])
            reset(connection)
    assert request(function.port, "POST", "/", "a").status == 200
    assert 'code="500"' not in request(function.port, "GET", "/metrics").body.decode()


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=100).map(lambda junk: post('"a"')[:40] + junk),
        st.builds(lambda cut, junk: post('"abc"')[:cut] + junk + b"\r\n\r\n", st.integers(0, 90), st.binary(max_size=60)),
    )
)
@example(post('"a"')[:4] + b"HTTP/1.1\r\n\r\n")  # of which the answer has a part
def test_no_junk_gives_another_5xx_than_503_or_a_hang(function: Server, junk: bytes) -> None:
    with connected(function.port) as connection:
        connection.sendall(junk)
        connection.shutdown(socket.SHUT_WR)
        data = b""
        try:
            while piece := connection.recv(65536):
                data += piece
        except ConnectionResetError:
            pass
    if data:
        status = int(data.split()[1])
        assert status < 500 or status in (503, 504), data
        head, _, rest = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        if status >= 400 and length and len(rest) >= int(length[1]):  # it may have been cut off by the end of the connection
            json.loads(rest[: int(length[1])])
    assert request(function.port, "GET", "/healthz").status == 200
