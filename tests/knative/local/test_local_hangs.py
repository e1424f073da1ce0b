"""Pods that hang, really: who is replaced, and who is left alone."""

from collections.abc import Iterator

import pytest

from knative.local.breaker import TIME_OUTS
from tests.knative.local.running import Platform, platform_running, service
from tests.support import request, wait_until


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    services = [
        service("frozen", spec={"timeoutSeconds": 2}),
        service("stuck", spec={"responseStartTimeoutSeconds": 1}),
        service("slow", spec={"timeoutSeconds": 1}),
    ]
    with platform_running(tmp_path_factory.mktemp("hangs"), services) as running:
        yield running


def bring_up(platform: Platform, name: str) -> None:
    """Have a pod: its cold start counts against time-outs that are as short as these, and a busy machine takes longer."""
    wait_until(f"{name} answers", lambda: platform.call(name, "/echo").status == 200)


def test_a_pod_that_hangs_is_replaced(platform: Platform) -> None:
    bring_up(platform, "frozen")
    (frozen,) = platform.pods("frozen")
    with platform.calls("frozen", TIME_OUTS, "/freeze") as calls:
        assert [call.result().status for call in calls] == [504] * TIME_OUTS
    bring_up(platform, "frozen")
    found = platform.service("frozen")
    assert [event["pod"] for event in found["hung"]] == [frozen["name"]]
    reason = f"{frozen['name']} answers nobody: 3 requests in a row timed out (2 s); it is replaced"
    assert found["hung"][0]["reason"] == reason
    assert f"frozen hangs: {reason}" in platform.server.said()
    assert (
        'relight_hung_pods_total{namespace="default",service="frozen"} 1.0' in request(platform.admin_port, "GET", "/metrics").body.decode()
    )
    platform.wait_for("frozen", "the old pod gone", lambda found: frozen["name"] not in [pod["name"] for pod in found["pods"]])


def test_what_a_pod_has_begun_to_answer_may_end_when_it_is_replaced(platform: Platform) -> None:
    bring_up(platform, "stuck")
    with platform.connection("stuck", "/pieces/the-end") as connection:
        reply = connection.getresponse()
        assert reply.read(6) == b"first\n"
        (stuck,) = platform.pods("stuck")
        with platform.calls("stuck", TIME_OUTS, "/wait/the-end") as calls:
            assert [call.result().status for call in calls] == [504] * TIME_OUTS
        bring_up(platform, "stuck")
        old = next(pod for pod in platform.pods("stuck") if pod["name"] == stuck["name"])
        assert (old["phase"], old["concurrency"]) == ("draining", 1)
        platform.note("stuck", "the-end")
        assert reply.read() == b"second\n"
    platform.wait_for("stuck", "the old pod gone", lambda found: [pod["phase"] for pod in found["pods"]] == ["ready"])


def test_a_pod_that_is_slow_for_some_and_answers_others_is_left_alone(platform: Platform) -> None:
    bring_up(platform, "slow")
    pid = platform.call("slow", "/echo").json()["pid"]
    for _ in range(TIME_OUTS):
        assert platform.call("slow", "/wait/never").status == 504
        assert platform.call("slow", "/echo").json()["pid"] == pid
    platform.note("slow", "never")
    assert platform.service("slow")["hung"] == []
