"""The admin port of a running platform: what it tells, what it does, and for whom it does not."""

import contextlib
import http.client
import json
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from knative.local.admin import VIEWERS, Admin
from knative.local.queue_watch import QueueWatch
from knative.local.sent_headers import FIELD, to_field
from tests.knative.local.running import Platform, platform_running, service
from tests.support import Reply, request, wait_until

ORDER = {"X-Relight": "1"}
EXAMPLE = '{"instances": ["an example"]}'


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    echo = service("echo")
    echo["metadata"]["annotations"] = {"relight/example": EXAMPLE}
    with platform_running(tmp_path_factory.mktemp("admin"), [echo, service("idle")]) as running:
        running.call("echo")
        yield running


def invoke(platform: Platform, query: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
    return request(platform.admin_port, "POST", f"/api/invoke?{query}", body, ORDER | (headers or {}))


@contextlib.contextmanager
def opened(platform: Platform, path: str) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", platform.admin_port, timeout=60)
    try:
        connection.request("GET", path)
        yield connection.getresponse()
    finally:
        connection.close()


def next_event(reply: http.client.HTTPResponse) -> Any:
    line = reply.readline()
    assert line.startswith(b"data: "), line
    assert reply.readline() == b"\n"
    return json.loads(line.removeprefix(b"data: "))


def test_the_status_document_tells_state_latencies_and_cold_starts(platform: Platform) -> None:
    found, idle = platform.service("echo"), platform.service("idle")
    assert (found["state"], idle["state"]) == ("ready", "zero")
    assert 0 < found["latency"]["p50"] <= found["latency"]["p99"]
    assert idle["latency"] == {"p50": None, "p95": None, "p99": None}
    assert found["cold_starts"][0]["outcome"] == "ready"
    assert found["cold_starts"][0]["pod"] == platform.pods("echo")[0]["name"]
    assert found["cold_starts"][0]["waiting"] == 1
    assert found["example"] == EXAMPLE
    assert platform.status()["queue_sources"] == []


def test_events_begin_with_the_status_document_and_go_on_at_a_bounded_rate(platform: Platform) -> None:
    began = time.monotonic()
    with opened(platform, "/api/events") as reply:
        assert reply.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        assert {service["name"] for service in next_event(reply)["services"]} == {"echo", "idle"}
        before = platform.service("echo")["requests_total"]
        for _ in range(20):
            platform.call("echo")
        seen = 0
        while next_event(reply)["services"][0]["requests_total"] < before + 20:
            seen += 1
        assert seen <= 1 + 4 * (time.monotonic() - began)


def test_history_has_a_sample_for_each_second(platform: Platform) -> None:
    def samples() -> Any:
        return request(platform.admin_port, "GET", "/api/history").json()["services"]["default/echo"]

    first = wait_until("a sample", samples)[0]
    assert first.keys() == {"time", "concurrency", "rps", "ready", "desired", "queued", "p50", "p95", "p99", "errors"}
    assert abs(first["time"] - time.time()) < 600


def test_metrics_are_prometheus_text_with_latencies_and_cold_starts_of_each_service(platform: Platform) -> None:
    reply = request(platform.admin_port, "GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    found = {
        (
            sample.name,
            sample.labels["service"],
            sample.labels.get("phase") or sample.labels.get("le") or sample.labels.get("code", ""),
        ): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }
    assert found["relight_requests_total", "echo", "200"] >= 1
    assert found["relight_requests_total", "idle", "503"] == 0  # there before the first, so that a rate sees it
    assert found["relight_request_seconds_bucket", "echo", "+Inf"] == found["relight_request_seconds_count", "echo", ""] >= 1
    assert found["relight_cold_start_seconds_count", "echo", ""] >= 1
    assert found["relight_pods", "echo", "ready"] == 1
    assert found["relight_pods", "idle", "ready"] == 0


def test_a_test_request_without_a_body_is_the_services_example(platform: Platform) -> None:
    told = invoke(platform, "service=echo").json()
    assert (told["method"], told["path"], told["bytes"]) == ("POST", "/", len(EXAMPLE))
    headers = dict(told["headers"])
    assert (headers["Host"], headers["Content-Type"]) == (f"echo.default.localhost:{platform.port}", "application/json")


def test_a_test_request_with_a_body_and_a_path_is_passed_on_as_it_is(platform: Platform) -> None:
    told = invoke(platform, "service=echo&path=/echo/a%2520b&method=PUT", b"\0raw", {"Content-Type": "application/octet-stream"}).json()
    assert (told["method"], told["path"], told["bytes"]) == ("PUT", "/echo/a%20b", 4)
    assert dict(told["headers"])["Content-Type"] == "application/octet-stream"


def test_a_test_request_has_the_headers_that_are_named(platform: Platform) -> None:
    told = invoke(
        platform, "service=echo", headers={FIELD: to_field([("Authorization", "Bearer a"), ("Content-Type", "text/plain")])}
    ).json()
    found = [value for name, value in told["headers"] if name in ("Authorization", "Content-Type")]
    assert sorted(found) == ["Bearer a", "text/plain"]


@pytest.mark.parametrize("field", ["{}", "[", '[["a"]]', '[["Host", "elsewhere"]]', '[["X", "a\\nb"]]', "1", "[" * 4000])
def test_headers_that_cannot_be_sent_are_refused(platform: Platform, field: str) -> None:
    assert invoke(platform, "service=echo", headers={FIELD: field}).status == (200 if field == "{}" else 400)


def test_an_error_of_the_function_is_passed_on_as_one_and_what_it_sends_does_nothing_in_a_browser(platform: Platform) -> None:
    reply = invoke(platform, "service=echo&path=/status/418&method=GET")
    assert reply.status == 418
    assert "sandbox" in reply.headers["content-security-policy"]
    assert "set-cookie" not in reply.headers


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ("service=nobody", 404, "no Service 'nobody' in namespace 'default'; there are echo, idle"),
        ("service=echo&path=elsewhere", 400, "the path must begin with /"),
        ("service=echo&path=/%0d%0aX:1", 400, "the path must begin with /"),
        ("service=echo&method=GE%20T", 400, "method and path"),
    ],
)
def test_a_test_request_to_nobody_is_refused(platform: Platform, query: str, status: int, said: str) -> None:
    reply = invoke(platform, query)
    assert (reply.status, said in reply.json()["error"]["message"]) == (status, True)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="a form of another site, which cannot set a header"),
        pytest.param(ORDER | {"Origin": "http://evil.example"}, id="a script of another site"),
        pytest.param(ORDER | {"Origin": "null"}, id="a page in a sandbox"),
        pytest.param(ORDER | {"Origin": "http://localhost:3000"}, id="a page of another port of this machine"),
        pytest.param(ORDER | {"Sec-Fetch-Site": "same-site"}, id="a page that the browser says is another"),
        pytest.param(ORDER | {"Host": "evil.example"}, id="a name that was made to lead here"),
        pytest.param(ORDER | {"Host": "evil.example", "Origin": "http://evil.example"}, id="a page under such a name"),
    ],
)
def test_no_other_site_can_have_a_request_sent(platform: Platform, headers: dict[str, str]) -> None:
    before = platform.service("idle")["requests_total"]
    reply = request(platform.admin_port, "POST", "/api/invoke?service=idle", b"", headers)
    assert (reply.status, reply.json()["error"]["type"]) == (403, "forbidden")
    assert platform.service("idle")["requests_total"] == before


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1", 200),
        ("[::1]:9000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("localhost.evil.example", 403),
        ("192.168.1.2", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/status", "/metrics"])
def test_only_names_of_this_machines_loopback_are_answered(platform: Platform, host: str, status: int, path: str) -> None:
    assert request(platform.admin_port, "GET", path, headers={"Host": host}).status == status


def raw(platform: Platform, sent: bytes) -> bytes:
    """All that comes back for these very bytes."""
    with socket.create_connection(("127.0.0.1", platform.admin_port), timeout=30) as connection:
        connection.sendall(sent)
        received = b""
        while piece := connection.recv(65536):
            received += piece
        return received


ORDERED = b"POST /api/invoke?service=idle HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Relight: 1\r\nContent-Length: 0\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(ORDERED + b"Origin: http://127.0.0.1\r\nOrigin: http://evil.example\r\n\r\n", id="a second Origin"),
        pytest.param(ORDERED + b"Sec-Fetch-Site: none\r\nSec-Fetch-Site: cross-site\r\n\r\n", id="a second Sec-Fetch-Site"),
        pytest.param(ORDERED + b"Host: evil.example\r\n\r\n", id="a second Host"),
        pytest.param(ORDERED.replace(b"/api", b"http://evil.example/api") + b"\r\n", id="a target of another site"),
        pytest.param(ORDERED.replace(b"127.0.0.1", b"127.0.0.1@evil.example") + b"\r\n", id="a Host with a user"),
        pytest.param(ORDERED.replace(b"127.0.0.1", b"127.0.0.1 evil.example") + b"\r\n", id="a Host with a space"),
        pytest.param(ORDERED.replace(b"127.0.0.1", b"2130706433") + b"\r\n", id="a Host that is a number"),
        pytest.param(ORDERED.replace(b"POST", b"GET") + b"\r\n", id="GET"),
        pytest.param(ORDERED.replace(b"POST", b"GET") + b"X-HTTP-Method-Override: POST\r\n\r\n", id="GET that says that it is a POST"),
        pytest.param(ORDERED.replace(b"/api", b"/./api") + b"\r\n", id="a path that is another's"),
        pytest.param(ORDERED.replace(b"/api", b"//api") + b"\r\n", id="two slashes"),
        pytest.param(ORDERED.replace(b"X-Relight: 1\r\n", b"X-Relight : 1\r\n") + b"\r\n", id="a space behind a name"),
        pytest.param(ORDERED.replace(b"X-Relight: 1", b"X: 1\r\n X-Relight: 1") + b"\r\n", id="a header in a header's second line"),
        pytest.param(
            ORDERED.replace(b"Content-Length: 0", b"Content-Length: 1\r\nTransfer-Encoding: chunked") + b"\r\n0\r\n\r\n", id="two ends"
        ),
        pytest.param(
            b"POST /api/logs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/plain\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%b\r\n" % (len(ORDERED) + 2, ORDERED),
            id="a request that is the body of a form",
        ),
        pytest.param(
            b"OPTIONS /api/invoke?service=idle HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://evil.example\r\nConnection: close\r\n"
            b"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: x-relight\r\n\r\n",
            id="asking for leave",
        ),
        pytest.param(
            b"GET /api/events HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://evil.example\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
            id="a WebSocket",
        ),
    ],
)
def test_an_attack_is_refused_and_nothing_is_told_or_done(platform: Platform, sent: bytes) -> None:
    before = platform.service("idle")["requests_total"]
    received = raw(platform, sent.replace(b"Connection: Upgrade", b"Connection: Upgrade, close"))
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.split()[1] in (b"400", b"403", b"404", b"405"), received
    assert received.count(b"HTTP/1.") == 1, received
    assert b"access-control" not in head.lower()
    assert json.loads(body).keys() == {"error"}
    assert platform.service("idle")["requests_total"] == before


def test_a_head_has_the_bounds_of_the_other_ports(platform: Platform) -> None:
    sent = b"GET /api/status HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"".join(b"X-%d: %b\r\n" % (number, b"a" * 23_300) for number in range(3))
    received = raw(platform, sent + b"\r\n")
    assert received.startswith(b"HTTP/1.1 431 ")
    assert b"65536 bytes" in received


def test_a_test_request_whose_body_turns_bad_is_its_senders_mistake(platform: Platform) -> None:
    with socket.create_connection(("127.0.0.1", platform.admin_port), timeout=60) as connection:
        head = ORDERED.replace(b"idle", b"echo").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        connection.sendall(head + b"\r\n1\r\nx\r\n")
        time.sleep(0.3)  # so that it is on its way; if it is not yet, the answer is the same
        connection.sendall(b"no chunk")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_those_who_watch_leave_room_for_those_who_ask(platform: Platform) -> None:
    (pod,) = platform.pods("echo")
    paths = ["/api/events", f"/api/logs?pod={pod['name']}&follow=1"]
    with contextlib.ExitStack() as watching:
        replies = [watching.enter_context(opened(platform, path)) for path in paths * (VIEWERS // 2)]
        assert [reply.status for reply in replies] == [200] * VIEWERS
        for path in paths:
            refused = request(platform.admin_port, "GET", path)
            assert (refused.status, refused.json()["error"]["type"]) == (503, "overloaded")
        assert platform.service("echo")["state"] == "ready"
    wait_until("left", lambda: request(platform.admin_port, "GET", f"/api/logs?pod={pod['name']}").status == 200)


def test_the_page_may_be_linked_to_but_not_asked_for_data_by_others(platform: Platform) -> None:
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    assert request(platform.admin_port, "GET", "/", headers=elsewhere).status == 200
    assert request(platform.admin_port, "GET", "/api/events", headers=elsewhere).status == 403


def test_the_page_is_one_file_under_a_strict_policy(platform: Platform) -> None:
    reply = request(platform.admin_port, "GET", "/")
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert not [word for word in (b"<script src", b'<link rel="stylesheet', b"@import", b"innerHTML", b' style="') if word in reply.body]


def test_the_log_of_a_pod_is_listed_read_and_followed(platform: Platform) -> None:
    (pod,) = platform.pods("echo")
    listed = request(platform.admin_port, "GET", "/api/logs").json()["logs"]
    assert [log["container"] for log in listed if log["pod"] == pod["name"]] == ["function"]
    reply = request(platform.admin_port, "GET", f"/api/logs?pod={pod['name']}")
    assert (reply.headers["content-type"], reply.body) == ("text/plain; charset=utf-8", b"a pod of its own\n")
    with opened(platform, f"/api/logs?pod={pod['name']}&tail=0&follow=1") as following:
        platform.call("echo", "/say", "POST", b"good morning")
        assert following.readline() == b"good morning\n"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("pod=nobody", 404),
        ("pod=..&namespace=..&container=run", 404),
        ("pod=%2e%2e&container=..%2f..%2frun", 404),
        ("pod=POD&tail=-1", 400),
        ("pod=POD&tail=10001", 400),
        ("pod=POD&tail=x", 400),
    ],
)
def test_nothing_but_the_log_of_a_pod_is_read(platform: Platform, query: str, status: int) -> None:
    (pod,) = platform.pods("echo")
    assert request(platform.admin_port, "GET", f"/api/logs?{query.replace('POD', pod['name'])}").status == status


def test_weights_are_told_although_there_are_none(platform: Platform) -> None:
    assert request(platform.admin_port, "GET", "/api/weights").json() == {"caches": [], "sidecars": []}


def test_a_platform_that_ends_does_not_wait_for_those_who_watch(tmp_path: Any) -> None:
    with platform_running(tmp_path / "state", [service("echo")]) as platform:
        platform.call("echo")
        (pod,) = platform.pods("echo")
        with opened(platform, "/api/events") as events, opened(platform, f"/api/logs?pod={pod['name']}&follow=1") as log:
            next_event(events)
            assert (platform.state / "platform.json").exists()
            platform.server.signal(2)
            assert platform.server.wait() == 0
            # Each stream has an end: one that the port had waited for in vain is cut off, and to read it would raise IncompleteRead.
            assert log.read().startswith(b"a pod of its own\n")
            events.read()
        assert not (platform.state / "platform.json").exists()


def test_on_a_machine_with_few_descriptors_fewer_may_watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for limit, most in ((20, 4), (128, 16), (1 << 20, VIEWERS)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        session = cast(aiohttp.ClientSession, None)
        assert Admin({}, cast(QueueWatch, None), dict, print, tmp_path, session, 1)._most_lasting == most
