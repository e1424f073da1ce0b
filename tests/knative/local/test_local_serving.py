"""Requests through a running platform: held, routed, handed over, streamed back."""

import concurrent.futures
import contextlib
import gzip
import hashlib
import http.client
import json
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from knative.local.body import EACH_BYTES
from tests.knative.local.running import Platform, platform_running, service
from tests.support import request, wait_until

GATED = {"GATE": "open"}  # such a pod opens its port only when the test lets it
LARGE = 20_000_000  # much more than the buffers on the way hold


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    services = [
        service("echo"),
        service("other"),
        service("crowd", env=GATED),
        service("left", env=GATED),
        service("returning", scale={"window": "6s"}),
        service("left-large", env=GATED),
        service("upload", env=GATED),
        service("upload-slow", env=GATED),
        service("narrow", spec={"containerConcurrency": 1}, scale={"max-scale": "3"}),
        service("brief", spec={"timeoutSeconds": 1}),
        service("prompt", spec={"responseStartTimeoutSeconds": 1}),
        service("steady", spec={"idleTimeoutSeconds": 2}),
        service("idle", container={"args": ["--scratch", "/scratch"]}),
        service("warm", scale={"min-scale": "1", "window": "6s"}),
    ]
    with platform_running(tmp_path_factory.mktemp("serving"), services, FUNCTION_AGENT="callers.own:Agent") as running:
        yield running


def bare(method: str, target: str, *headers: str) -> bytes:
    """A request to `echo` with nothing in it that is not named here."""
    lines = [f"{method} {target} HTTP/1.1", "Host: echo.default.localhost", *headers, "Connection: close", "", ""]
    return "\r\n".join(lines).encode()


@contextlib.contextmanager
def begun(platform: Platform, name: str, path: str, header: str, body: bytes, patience_s: float = 10) -> Iterator[socket.socket]:
    """A request as far as its body goes, or is let through within so many seconds."""
    with socket.create_connection(("127.0.0.1", platform.port), timeout=10) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: {name}.default.localhost\r\nConnection: close\r\n{header}\r\n\r\n".encode())
        connection.settimeout(patience_s)
        with contextlib.suppress(TimeoutError):
            connection.sendall(body)
        connection.settimeout(30)
        yield connection


def rest(connection: socket.socket) -> bytes:
    """What comes until the connection is closed."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def exchange(platform: Platform, sent: bytes) -> bytes:
    """What comes back for these very bytes."""
    with socket.create_connection(("127.0.0.1", platform.port), timeout=30) as connection:
        connection.sendall(sent)
        return rest(connection)


def echoed(received: bytes) -> Any:
    """The pod's own account of a request."""
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), received
    return json.loads(body)


def test_a_service_stands_at_zero_until_somebody_calls_and_the_first_request_is_answered(platform: Platform) -> None:
    assert platform.service("other")["pods"] == []
    assert platform.call("other", "/first").json()["path"] == "/first"
    (pod,) = platform.pods("other")
    assert pod["phase"] == "ready"
    assert 0 < pod["stages"]["spawn"] < pod["stages"]["ready"]


def test_twenty_requests_during_a_cold_start_are_all_held_and_answered_by_one_pod(platform: Platform) -> None:
    with platform.calls("crowd", 20, "/echo") as replies:
        platform.wait_for("crowd", "all held", lambda found: found["queued"] == 20)
        assert [pod["phase"] for pod in platform.pods("crowd")] == ["starting"]
        assert not any(reply.done() for reply in replies)
        platform.note("crowd", "open")
        answers = [reply.result().json() for reply in replies]
    assert len({answer["pid"] for answer in answers}) == 1
    assert platform.service("crowd")["requests_total"] == 20
    assert len(list((platform.state / "logs" / "default").glob("crowd-*"))) == 1


def test_a_body_that_was_sent_to_nobody_yet_reaches_the_pod_whole(platform: Platform) -> None:
    body = b"weights " * 500_000
    with ThreadPoolExecutor(1) as thread:
        reply = thread.submit(platform.call, "upload", "/echo", "POST", body)
        platform.wait_for("upload", "held", lambda found: found["queued"] == 1)
        platform.note("upload", "open")
        told = reply.result().json()
    assert (told["bytes"], told["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())


def test_a_client_that_goes_away_while_it_is_held_is_forgotten(platform: Platform) -> None:
    with platform.connection("left", "/gone"), platform.connection("left", "/gone", "POST"):
        platform.wait_for("left", "both held", lambda found: found["queued"] == 2)
    platform.wait_for("left", "both forgotten", lambda found: found["queued"] == 0)
    platform.note("left", "open")
    assert platform.call("left", "/patient").status == 200
    assert platform.seen("left") == ["/patient"]


@pytest.mark.parametrize("size", [5, EACH_BYTES + 100_000])
def test_a_client_that_ends_its_side_of_the_connection_while_it_is_held_is_forgotten(platform: Platform, size: int) -> None:
    with begun(platform, "left-large", "/ended", f"Content-Length: {size}", bytes(size)) as connection:
        platform.wait_for("left-large", "held", lambda found: found["queued"] == 1)
        connection.shutdown(socket.SHUT_WR)
        platform.wait_for("left-large", "forgotten", lambda found: found["queued"] == 0)


def test_a_client_that_goes_away_while_its_large_body_is_held_is_forgotten(platform: Platform) -> None:
    length = f"Content-Length: {LARGE}"
    sent = [
        ("/whole", length, bytes(LARGE)),
        ("/half", length, bytes(LARGE // 2)),
        ("/little", length, bytes(LARGE // 50)),
        ("/chunks", "Transfer-Encoding: chunked", b"%x\r\n" % LARGE + bytes(LARGE // 2)),
    ]
    with contextlib.ExitStack() as clients:
        for path, header, body in sent:
            connection = clients.enter_context(begun(platform, "left-large", path, header, body, patience_s=0.5))
            # As what it has sent is not taken, its end would wait behind that; a reset does not.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        platform.wait_for("left-large", "all held", lambda found: found["queued"] == len(sent))
    platform.wait_for("left-large", "all forgotten", lambda found: found["queued"] == 0)
    platform.note("left-large", "open")
    assert platform.call("left-large", "/patient").status == 200
    assert platform.seen("left-large") == ["/patient"]


def test_a_sender_is_held_up_while_it_is_held_and_its_body_reaches_the_pod_whole(platform: Platform) -> None:
    body = b"weights " * (LARGE // 8)
    with begun(platform, "upload-slow", "/", f"Content-Length: {LARGE}", b"") as connection, ThreadPoolExecutor(1) as thread:
        sending = thread.submit(connection.sendall, body)
        platform.wait_for("upload-slow", "held", lambda found: found["queued"] == 1)
        assert not concurrent.futures.wait([sending], timeout=0.5).done
        platform.note("upload-slow", "open")
        told = echoed(rest(connection))
    assert (told["bytes"], told["sha256"]) == (LARGE, hashlib.sha256(body).hexdigest())


@pytest.mark.parametrize(
    ("path", "header", "body"),
    [
        ("/length", f"Content-Length: {LARGE}", bytes(LARGE // 2)),
        ("/in-a-chunk", "Transfer-Encoding: chunked", b"%x\r\n" % LARGE + bytes(LARGE // 2)),
        ("/after-a-chunk", "Transfer-Encoding: chunked", b"%x\r\n" % LARGE + bytes(LARGE) + b"\r\n"),
    ],
)
def test_a_body_that_is_cut_off_on_its_way_is_not_whole_for_the_pod_either(platform: Platform, path: str, header: str, body: bytes) -> None:
    with begun(platform, "other", path, header, body):
        platform.wait_for("other", "in its pod", lambda found: [pod["concurrency"] for pod in found["pods"]] == [1])
    wait_until("cut off", lambda: f"{path} cut off" in platform.seen("other"))
    assert path not in platform.seen("other")


def test_a_client_that_goes_away_while_it_is_answered_leaves_its_place(platform: Platform) -> None:
    with platform.connection("other", "/wait/never-mind"):
        platform.wait_for("other", "in its pod", lambda found: [pod["concurrency"] for pod in found["pods"]] == [1])
    platform.wait_for("other", "out of it", lambda found: [pod["concurrency"] for pod in found["pods"]] == [0])
    platform.note("other", "never-mind")


def test_a_container_concurrency_of_1_is_never_exceeded_while_more_pods_come_up(platform: Platform) -> None:
    with platform.calls("narrow", 7, "/wait/seven") as replies:
        full = platform.wait_for("narrow", "at max-scale", lambda found: [pod["concurrency"] for pod in found["pods"]] == [1, 1, 1])
        assert full["queued"] == 4
        platform.note("narrow", "seven")
        answers = [reply.result().json() for reply in replies]
    assert {answer["most_busy"] for answer in answers} == {1}
    assert len({answer["pid"] for answer in answers}) == 3
    assert len(platform.pods("narrow")) == 3


def test_an_answer_is_passed_on_as_it_is_made(platform: Platform) -> None:
    with platform.connection("echo", "/pieces/go-on") as connection:
        reply = connection.getresponse()
        assert reply.read(6) == b"first\n"
        platform.note("echo", "go-on")  # the rest exists only from now on
        assert reply.read() == b"second\n"


@pytest.mark.parametrize(
    "target",
    [
        "/plain",
        "/query?a=1&b=two&b=&flag",
        "/plus+and%20space?q=a+b%20c",
        "/percent%2Fslash/%7Etilde/caf%C3%A9",
        "/dots/./and/../more",
        "/two//slashes//",
        "/signs;a=1,2:3@4!$'()*",
        "/{braces}|and|pipes",
        "/bad%zz%escape",
    ],
)
def test_a_path_reaches_the_pod_as_it_was_sent(platform: Platform, target: str) -> None:
    assert echoed(exchange(platform, bare("GET", target)))["path"] == target


def test_a_target_with_a_host_in_it_is_for_that_path(platform: Platform) -> None:
    target = f"http://echo.default.localhost:{platform.port}/through?a=proxy"
    assert echoed(exchange(platform, bare("GET", target)))["path"] == "/through?a=proxy"


def test_a_question_about_the_server_itself_is_for_its_root(platform: Platform) -> None:
    assert echoed(exchange(platform, bare("OPTIONS", "*")))["path"] == "/"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_a_method_reaches_the_pod_as_it_was_sent(platform: Platform, method: str) -> None:
    assert platform.call("echo", method=method).json()["method"] == method


@pytest.mark.parametrize("size", [0, 1, 70_000, 20_000_000])
def test_a_body_reaches_the_pod_whole(platform: Platform, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    told = platform.call("echo", method="POST", body=body).json()
    assert (told["bytes"], told["sha256"]) == (size, hashlib.sha256(body).hexdigest())
    assert ["Content-Length", str(size)] in told["headers"]


def test_a_body_of_unknown_length_reaches_the_pod_whole(platform: Platform) -> None:
    pieces = [b"one ", b"two ", b"x" * 100_000, b" end"]
    connection = http.client.HTTPConnection("127.0.0.1", platform.port, timeout=30)
    connection.request("POST", "/", iter(pieces), {"Host": "echo.default.localhost", "Transfer-Encoding": "chunked"}, encode_chunked=True)
    told = json.loads(connection.getresponse().read())
    connection.close()
    assert (told["bytes"], told["sha256"]) == (100_012, hashlib.sha256(b"".join(pieces)).hexdigest())


def test_a_body_that_is_compressed_reaches_the_pod_as_it_was_sent(platform: Platform) -> None:
    body = gzip.compress(b"weights " * 1000)
    told = platform.call("echo", method="POST", body=body, headers={"Content-Encoding": "gzip"}).json()
    assert (told["bytes"], told["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())


def test_a_client_that_waits_for_100_continue_gets_it(platform: Platform) -> None:
    with socket.create_connection(("127.0.0.1", platform.port), timeout=30) as connection:
        connection.sendall(bare("POST", "/", "Content-Length: 2", "Expect: 100-continue"))
        assert connection.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"hi")
        assert echoed(rest(connection))["bytes"] == 2


def test_headers_for_the_pod_reach_it_and_those_for_the_connection_do_not(platform: Platform) -> None:
    sent = {
        "X-Mine": "kept",
        "Cookie": "a=1; b=2",
        "Accept-Encoding": "br",
        "Connection": "close, X-Hop",
        "X-Hop": "here only",
        "TE": "trailers",
    }
    told = dict(platform.call("echo", headers=sent).json()["headers"])
    assert told.items() >= {"X-Mine": "kept", "Cookie": "a=1; b=2", "Accept-Encoding": "br"}.items()
    assert not told.keys() & {"X-Hop", "TE"}
    assert told["Host"] == told["X-Forwarded-Host"] == f"echo.default.localhost:{platform.port}"
    assert (told["X-Forwarded-For"], told["X-Forwarded-Proto"]) == ("127.0.0.1", "http")


def test_what_any_connection_header_names_does_not_reach_the_pod(platform: Platform) -> None:
    named = ["Connection: keep-alive", "Connection: X-One, X-Two", "X-One: 1", "X-Two: 2", "connection: x-three", "X-Three: 3", "X-Four: 4"]
    told = {name for name, _ in echoed(exchange(platform, bare("GET", "/", *named)))["headers"]}
    assert {name for name in told if name.startswith("X-") and not name.startswith("X-Forwarded")} == {"X-Four"}


def test_what_the_platform_says_of_a_request_is_said_once(platform: Platform) -> None:
    forged = [f"{name}: forged" for name in ("X-Forwarded-For", "x-forwarded-for", "X-Forwarded-Host", "X-Forwarded-Proto")]
    told = echoed(exchange(platform, bare("GET", "/", *forged, *forged)))["headers"]
    assert sorted(pair for pair in map(tuple, told) if pair[0].startswith("X-Forwarded")) == [
        ("X-Forwarded-For", "127.0.0.1"),
        ("X-Forwarded-Host", "echo.default.localhost"),
        ("X-Forwarded-Proto", "http"),
    ]


def test_a_target_that_names_a_host_counts_in_place_of_the_host(platform: Platform) -> None:
    told = echoed(exchange(platform, bare("GET", "http://other.default.localhost:8080/as-a-proxy")))
    assert (told["path"], dict(told["headers"])["Host"]) == ("/as-a-proxy", "other.default.localhost:8080")
    assert "/as-a-proxy" in platform.seen("other")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: elsewhere:443\r\n\r\n", 405, id="as a proxy"),
        pytest.param(bare("POST", "/", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n", 501, id="a coding that nobody takes off"),
        pytest.param(bare("POST", "/", "Transfer-Encoding: chunked") + b"1\r\nx\r\nno chunk\r\n", 400, id="no chunks"),
        pytest.param(bare("POST", "/", "Transfer-Encoding: chunked", "Content-Length: 3") + b"0\r\n\r\n", 400, id="two lengths"),
        pytest.param(bare("POST", "/", "Content-Length: 2", "Content-Length: 3") + b"abc", 400, id="two other lengths"),
        pytest.param(bare("GET", "/", "Host: other.default.localhost"), 400, id="two hosts"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, id="HTTP/2"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), 400, id="TLS"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 4000) for n in range(17)), 431, id="a large head"),
        pytest.param(b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n", 414, id="a long line"),
    ],
)
@pytest.mark.parametrize("is_admin", [False, True])
def test_what_is_no_request_is_refused_by_every_port_and_no_line_is_said(
    platform: Platform, sent: bytes, status: int, *, is_admin: bool
) -> None:
    before, said = platform.seen("echo"), platform.server.said()
    with socket.create_connection(("127.0.0.1", platform.admin_port if is_admin else platform.port), timeout=30) as connection:
        connection.sendall(sent)
        head, _, body = rest(connection).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, head
    assert json.loads(body)["error"]["type"]
    assert (platform.seen("echo"), platform.server.said()) == (before, said)


def test_nothing_is_added_that_the_client_did_not_send(platform: Platform) -> None:
    told = echoed(exchange(platform, bare("POST", "/", "Content-Length: 0")))
    names = {name for name, _ in told["headers"]}
    assert names <= {"Host", "Content-Length", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Connection"}


@pytest.mark.parametrize("status", [204, 304, 302, 404, 418, 500, 503])
def test_a_status_is_passed_on_with_its_headers(platform: Platform, status: int) -> None:
    head = exchange(platform, bare("GET", f"/status/{status}")).decode().splitlines()
    assert head[0].startswith(f"HTTP/1.1 {status} ")
    assert "Location: /elsewhere" in head
    assert [line for line in head if line.startswith("Set-Cookie")] == ["Set-Cookie: colour=blue", "Set-Cookie: size=small"]


def test_a_cookie_that_one_caller_was_given_is_not_sent_for_another(platform: Platform) -> None:
    platform.call("echo", "/status/200")
    assert "Cookie" not in dict(platform.call("echo").json()["headers"])


def test_the_answer_to_head_has_the_length_and_no_body(platform: Platform) -> None:
    head, _, body = exchange(platform, bare("HEAD", "/")).partition(b"\r\n\r\n")
    assert b"Content-Length: " in head
    assert b"Transfer-Encoding" not in head
    assert body == b""


@pytest.mark.parametrize(
    ("host", "answers"),
    [
        ("other.default.localhost", "other"),
        ("other.default.localhost:8080", "other"),
        ("Other.Default.LOCALHOST", "other"),
        ("other.default.localhost.", "other"),
        ("echo.default.localhost", "echo"),
        ("127.0.0.1:8080", "echo"),
        ("localhost", "echo"),
        ("example.org", "echo"),
        ("other.elsewhere.localhost", "echo"),
        ("other.default.example", "echo"),
    ],
)
def test_the_host_names_the_service_and_any_other_host_is_for_the_first(platform: Platform, host: str, answers: str) -> None:
    path = f"/host/{host}"
    assert request(platform.port, "GET", path, headers={"Host": host}).status == 200
    assert (path in platform.seen("other"), path in platform.seen("echo")) == (answers == "other", answers == "echo")


def bring_up(platform: Platform, name: str) -> None:
    """Have a pod: its cold start counts against limits that are as short as these, and a busy machine takes longer."""
    wait_until(f"{name} answers", lambda: platform.call(name).status == 200)


def test_an_answer_that_takes_too_long_is_a_504_that_says_so(platform: Platform) -> None:
    bring_up(platform, "brief")
    reply = platform.call("brief", "/wait/for-ever")
    assert reply.status == 504
    assert reply.json()["error"]["type"] == "timed_out"
    message = reply.json()["error"]["message"]
    assert message.startswith("brief did not answer within 1 s (timeoutSeconds, cold start included); brief-00001-")
    assert message.endswith(" had the request")
    platform.note("brief", "for-ever")
    assert platform.call("brief").status == 200


def test_an_answer_that_was_begun_and_takes_too_long_is_cut_off(platform: Platform) -> None:
    bring_up(platform, "brief")
    with platform.connection("brief", "/pieces/never") as connection:
        reply = connection.getresponse()
        assert (reply.status, reply.read(6)) == (200, b"first\n")
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            reply.read()
    platform.note("brief", "never")


def test_an_answer_that_is_begun_in_time_may_take_longer_than_its_beginning(platform: Platform) -> None:
    bring_up(platform, "prompt")
    with platform.connection("prompt", "/pieces/later") as connection:
        reply = connection.getresponse()
        late = platform.call("prompt", "/wait/later")  # begun after the other one
        assert late.status == 504
        assert "prompt did not answer within 1 s (responseStartTimeoutSeconds, cold start included)" in late.json()["error"]["message"]
        platform.note("prompt", "later")
        assert reply.read() == b"first\nsecond\n"


def test_an_answer_may_take_as_long_as_it_likes_between_its_pieces_up_to_the_idle_limit(platform: Platform) -> None:
    bring_up(platform, "steady")
    assert platform.call("steady", "/drip/10/0.3").body == b"x" * 10
    with platform.connection("steady", "/pieces/for-ever") as connection:
        reply = connection.getresponse()
        late = platform.call("steady", "/wait/for-ever")
        assert late.status == 504
        assert "steady did not answer within 2 s (idleTimeoutSeconds, cold start included)" in late.json()["error"]["message"]
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            reply.read()
    platform.note("steady", "for-ever")


def test_a_pod_has_what_its_manifest_says_and_not_what_configures_its_caller(platform: Platform) -> None:
    told = platform.call("idle", "/environment").json()
    (pod,) = platform.pods("idle")
    assert told["env"]["NOTES"] == str(platform.volume("idle"))
    assert told["env"]["PORT"] == pod["address"].rpartition(":")[2]
    assert told["env"]["K_SERVICE"] == "idle"
    assert "FUNCTION_AGENT" not in told["env"]
    assert told["args"] == ["--scratch", str(platform.state / "pods" / pod["name"] / "volumes" / "scratch")]


def test_a_service_without_calls_returns_to_zero_and_relights(platform: Platform) -> None:
    platform.call("returning", "/before")
    (pod,) = platform.pods("returning")
    assert (platform.state / "pods" / pod["name"]).is_dir()
    platform.wait_for("returning", "zero pods", lambda found: not found["pods"])

    # What was the pod's is gone; its log and what is on a claim are kept.
    wait_until("its folder gone", lambda: not (platform.state / "pods" / pod["name"]).exists())
    assert "a pod of its own" in (platform.state / "logs" / "default" / pod["name"] / "function.log").read_text()
    assert "/before" in platform.seen("returning")
    assert "returning scaled to zero" in platform.server.said()

    assert platform.call("returning", "/after").status == 200
    (again,) = platform.pods("returning")
    assert again["name"] != pod["name"]


def test_a_min_scale_of_1_keeps_one_pod_without_any_calls(platform: Platform) -> None:
    platform.wait_for("warm", "ready", lambda found: found["state"] == "ready")
    # Another one, that had a pod later than that and which nobody calls any more either, goes to zero.
    platform.call("returning")
    platform.wait_for("returning", "zero pods", lambda found: not found["pods"])
    found = platform.service("warm")
    assert (len(found["pods"]), found["pods"][0]["phase"], found["requests_total"]) == (1, "ready", 0)


def test_the_status_document_has_what_was_promised(platform: Platform) -> None:
    platform.call("echo")
    found = platform.service("echo")
    promised = "name namespace url address mode desired stable_concurrency panic_concurrency requests_total queued pods"
    assert found.keys() >= set(promised.split())
    assert (found["name"], found["namespace"]) == ("echo", "default")
    assert found["url"] == f"http://echo.default.localhost:{platform.port}/"
    assert found["address"] == f"http://127.0.0.1:{platform.port}/"
    assert found["mode"] in ("stable", "panic")
    (pod,) = found["pods"]
    assert pod.keys() >= {"name", "phase", "concurrency", "started_at", "stages"}
    assert pod["phase"] == "ready"


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/api/nothing", 404, "no route /api/nothing; there are /, /api/status"),
        ("POST", "/api/status", 405, "GET it"),
    ],
)
def test_the_admin_port_says_what_there_is(platform: Platform, method: str, path: str, status: int, said: str) -> None:
    reply = request(platform.admin_port, method, path)
    assert reply.status == status
    assert reply.headers["content-type"].startswith("application/json")
    assert said in reply.json()["error"]["message"]
