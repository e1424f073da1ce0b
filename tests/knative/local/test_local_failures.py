"""What callers, the terminal and the other pods notice when a container misbehaves."""

import http.client
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.knative.local.running import POD, Platform, platform_running, service
from tests.support import wait_until

# Asked only once it is up, however long that takes.
LIVENESS = {
    "startupProbe": {"httpGet": {"path": "/healthz"}, "periodSeconds": 1, "failureThreshold": 60},
    "livenessProbe": {"httpGet": {"path": "/healthz"}, "periodSeconds": 1, "failureThreshold": 1, "timeoutSeconds": 30},
}
# Says no once each time that the test has put down the file.
MORTAL = {
    "livenessProbe": {
        "exec": {"command": ["sh", "-c", '! rm "$NOTES/end"']},
        "periodSeconds": 1,
        "failureThreshold": 1,
        "timeoutSeconds": 30,
    }
}
FRAGILE_SIDECAR = {
    "name": "helper",
    "command": ["sh", "-c", 'until [ -e "$NOTES/break" ]; do sleep 0.05; done; exit 1'],
    "env": [{"name": "NOTES", "value": "/notes"}],
    "volumeMounts": [{"name": "notes", "mountPath": "/notes"}],
}
TALKS_AND_NEVER_OPENS_ITS_PORT = "for n in $(seq 30); do echo line $n of [bold]my[/bold] app.py:100: log; done; exec sleep 600"


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    state = tmp_path_factory.mktemp("failures")
    services = [
        service("frail"),
        service("half"),
        service("deaf", container=MORTAL),
        service("sworn", container={"readinessProbe": {"exec": {"command": ["true"]}}}),
        service("twins", scale={"min-scale": "2"}, container={"readinessProbe": {"httpGet": {"path": "/healthz"}, "periodSeconds": 60}}),
        service("sick", container=LIVENESS),
        service("assisted", FRAGILE_SIDECAR),
        service("absent", container={"command": [str(state / "program"), "--fast"]}, progress_deadline="2s"),
        service("mute", container={"command": ["sh", "-c", TALKS_AND_NEVER_OPENS_ITS_PORT]}, progress_deadline="3s"),
    ]
    with platform_running(state, services) as running:
        yield running


def test_a_command_that_is_not_there_is_a_503_that_says_so_and_when_to_come_again(platform: Platform) -> None:
    with platform.calls("absent", 3) as calls:
        replies = [call.result() for call in calls]
    for reply in replies:
        assert reply.status == 503
        error = reply.json()["error"]
        assert error["type"] == "revision_failed"
        assert "its container function could not be started: No such file or directory, twice as it started" in error["message"]
        assert f"cannot start {platform.state}/program: " in error["message"]
        assert "No such file or directory" in error["message"]
        assert 1 <= int(reply.headers["retry-after"]) <= 10
    assert f"cannot start {platform.state}/program: " in platform.server.said()


def test_a_container_that_never_becomes_ready_is_a_503_with_the_last_lines_of_its_log(platform: Platform) -> None:
    message = platform.call("mute").json()["error"]["message"]
    assert "line 30 of [bold]my[/bold] app.py:100: log" in message
    assert "line 19 of" in message
    assert "line 18 of" not in message
    reason, _, lines = message.partition("\nthe last lines of function:\n")
    assert platform.service("mute")["failure"] == reason
    assert platform.service("mute")["failure_log"] == {"container": "function", "lines": [line[2:] for line in lines.split("\n")]}
    # The terminal has the same, sign for sign, its lines set off.
    said = platform.server.said()
    assert reason in said
    assert "line 30 of [bold]my[/bold] app.py:100: log" in said


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "203.0.113.7"},
        {"Forwarded": "for=203.0.113.7"},
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
    ids=["a proxy", "a proxy by RFC 7239", "another site", "another site says the browser"],
)
def test_a_stranger_is_told_the_reason_without_the_log(platform: Platform, headers: dict[str, str]) -> None:
    message = platform.call("mute", headers=headers).json()["error"]["message"]
    assert "was not ready within 3 s (progress-deadline)" in message
    assert "line " not in message


def test_the_next_caller_within_the_pause_is_told_at_once(platform: Platform) -> None:
    first = platform.call("mute")
    starts = platform.service("mute")["cold_starts"]
    second = platform.call("mute")
    assert platform.service("mute")["cold_starts"] == starts  # it has waited for no other start
    assert (first.status, second.status) == (503, 503)
    assert second.body == first.body
    assert int(second.headers["retry-after"]) <= int(first.headers["retry-after"])


def test_nothing_is_left_of_a_pod_that_failed_but_its_log(platform: Platform) -> None:
    platform.call("mute")
    platform.wait_for("mute", "no pods", lambda found: not found["pods"])
    wait_until("their folders gone", lambda: not list((platform.state / "pods").glob("mute-*")))
    logs = list((platform.state / "logs" / "default").glob("mute-*/function.log"))
    assert {len(log.read_text().splitlines()) for log in logs} == {30}


def test_a_pod_that_dies_with_a_request_is_a_502_and_the_next_request_finds_it_started_again(platform: Platform) -> None:
    first = platform.call("frail", "/echo").json()["pid"]
    reply = platform.call("frail", "/die")
    assert reply.status == 502
    assert reply.json()["error"]["type"] == "bad_gateway"
    assert "ended the connection before it had answered" in reply.json()["error"]["message"]
    second = platform.call("frail", "/echo").json()["pid"]
    assert second != first
    (pod,) = platform.pods("frail")
    assert pod["restarts"] == {"function": 1}
    assert platform.seen("frail") == ["/echo", "/die", "/echo"]


def test_an_answer_that_was_begun_by_a_pod_that_died_is_cut_off(platform: Platform) -> None:
    with platform.connection("half", "/half") as connection:
        reply = connection.getresponse()
        assert reply.read(9) == b"only this"
        platform.note("half", "half-read")
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            reply.read()


def deafen(platform: Platform, name: str) -> str:
    """Have one pod close its port and live on; its name."""
    platform.call(name, "/deafen")
    return str(wait_until("a port closed", lambda: next((pod["name"] for pod in platform.pods(name) if not is_open(port_of(pod))), None)))


def port_of(pod: Any) -> int:
    return int(pod["address"].rpartition(":")[2])


def test_a_request_that_reaches_nobody_waits_until_somebody_listens_again(platform: Platform) -> None:
    first = platform.call("deaf", "/echo").json()["pid"]
    deafen(platform, "deaf")
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(platform.call, "deaf", "/kept", "POST", b"whole")
        platform.wait_for("deaf", "it waits", lambda found: found["queued"] == 1)
        platform.note("deaf", "end")  # its container is started again
        reply = call.result()
    assert (reply.status, reply.json()["path"], reply.json()["bytes"]) == (200, "/kept", 5)
    assert reply.json()["pid"] != first
    assert platform.seen("deaf") == ["/echo", "/deafen", "/kept"]


def test_a_request_that_reaches_nobody_is_given_to_another_pod_and_none_is_given_to_that_one(platform: Platform) -> None:
    platform.wait_for("twins", "two pods", lambda found: [pod["phase"] for pod in found["pods"]] == ["ready"] * 2)
    deaf = deafen(platform, "twins")
    paths: list[str] = []
    # Of two that are idle a request goes to either: sooner or later one is for the pod that does not listen.
    while not paths or {pod["name"]: pod["phase"] for pod in platform.pods("twins")}[deaf] == "ready":
        paths.append(f"/n{len(paths)}")
        assert platform.call("twins", paths[-1], "POST").status == 200
    replies = [platform.call("twins", f"/after{number}", "POST") for number in range(6)]
    assert [reply.status for reply in replies] == [200] * 6
    assert len({reply.json()["pid"] for reply in replies}) == 1
    assert sorted(platform.seen("twins")) == sorted(["/deafen", *paths, *(f"/after{number}" for number in range(6))])
    assert {pod["name"]: pod["phase"] for pod in platform.pods("twins")}[deaf] == "starting"


def test_a_pod_that_says_it_is_ready_and_cannot_be_reached_is_a_502_and_its_requests_are_nowhere(platform: Platform) -> None:
    wait_until("it listens, whatever its probe says", lambda: platform.call("sworn", "/echo").status == 200)
    deaf = deafen(platform, "sworn")
    reply = platform.call("sworn", "/lost", "POST")
    assert (reply.status, reply.json()["error"]["type"]) == (502, "bad_gateway")
    assert f"{deaf} says that it is ready, and nothing listens at its port" in reply.json()["error"]["message"]
    assert "/lost" not in platform.seen("sworn")


def is_open(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def test_a_sidecar_that_crashes_again_and_again_does_not_take_its_function_out_of_the_traffic(platform: Platform) -> None:
    first = platform.call("assisted", "/echo").json()["pid"]
    platform.note("assisted", "break")
    while platform.pods("assisted")[0]["restarts"]["helper"] < 1:
        assert platform.call("assisted", "/echo").json()["pid"] == first
    (pod,) = platform.pods("assisted")
    assert (pod["phase"], pod["restarts"]["function"]) == ("ready", 0)


def test_a_container_that_says_it_is_not_well_is_started_again(platform: Platform) -> None:
    first = platform.call("sick", "/echo").json()["pid"]
    platform.call("sick", "/sicken")
    platform.wait_for("sick", "its restart", lambda found: found["pods"][0]["restarts"] == {"function": 1})
    assert platform.call("sick", "/echo").json()["pid"] != first


def test_a_command_that_was_not_there_is_tried_again_after_the_pause(platform: Platform) -> None:
    assert platform.call("absent").status == 503
    program = platform.state / "new"
    program.write_text(f"#!/bin/sh\nexec python {POD}\n")
    program.chmod(0o755)
    program.rename(platform.state / "program")
    wait_until("an answer", lambda: platform.call("absent").status == 200)
    found = platform.service("absent")
    assert (found["failure"], [pod["phase"] for pod in found["pods"]]) == (None, ["ready"])
