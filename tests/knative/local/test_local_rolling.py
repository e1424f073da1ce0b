"""A running platform whose manifests change."""

import contextlib
import os
import pty
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from knative.local.manifest import OBJECT_STORE
from tests.knative.local.running import Platform, command, manifests, platform_running, service
from tests.support import BIN, clean_environment, free_port, request, running, wait_until

BROKEN = {"command": ["python", "-c", "print('there is no model'); raise SystemExit(3)"]}


def version(name: str, number: int, *traffic: Any, **options: Any) -> dict[str, Any]:
    document = service(name, scale={"initial-scale": "1"}, env={"VERSION": str(number)}, **options)
    document["spec"]["traffic"] = list(traffic)
    return document


def versions(platform: Platform, name: str, calls: int = 1, **headers: str) -> set[str]:
    """Which ones answer."""
    found = [platform.call(name, "/environment", headers=headers).json()["env"] for _ in range(calls)]
    return {env["VERSION"] for env in found}


def is_ready(found: Any) -> bool:
    return found["state"] == "ready" and not found["rollout"]


@contextlib.contextmanager
def steady(platform: Platform, name: str) -> Iterator[list[int]]:
    """A client that never stops calling; the statuses it was answered."""
    statuses: list[int] = []
    over = threading.Event()

    def call() -> None:
        while not over.is_set():
            statuses.append(platform.call(name, "/echo").status)

    with ThreadPoolExecutor(1) as thread:
        calling = thread.submit(call)
        yield statuses
        over.set()
        calling.result()


def test_a_changed_template_takes_over_without_a_failed_request_and_the_old_pods_go(tmp_path: Path) -> None:
    with platform_running(tmp_path, [version("hello", 1)]) as platform:
        platform.wait_for("hello", "ready", is_ready)
        with steady(platform, "hello") as statuses:
            wait_until("some calls", lambda: len(statuses) > 5)
            platform.rewrite(version("hello", 2))
            platform.wait_for("hello", "the new one", lambda found: found["revision"] == "hello-00002")
            platform.wait_for("hello", "only its pod", lambda found: {pod["revision"] for pod in found["pods"]} == {"hello-00002"})
        assert set(statuses) == {200}
        assert versions(platform, "hello", 3) == {"2"}
        found = platform.service("hello")
        assert [(revision["name"], revision["percent"], revision["state"]) for revision in found["revisions"]] == [
            ("hello-00001", 0, "zero"),
            ("hello-00002", 100, "ready"),
        ]
        assert found["requests_total"] == len(statuses) + 3
        metrics = request(platform.admin_port, "GET", "/metrics").body.decode()
        labels = 'code="200",namespace="default",service="hello",source="pod"'
        assert f"relight_requests_total{{{labels}}} {len(statuses) + 3}.0" in metrics
        assert 'relight_revision_traffic_percent{namespace="default",revision="hello-00002",service="hello"} 100.0' in metrics


def test_a_new_revision_that_fails_leaves_the_traffic_where_it_is_and_says_why_everywhere(tmp_path: Path) -> None:
    with platform_running(tmp_path, [version("hello", 1)]) as platform:
        platform.wait_for("hello", "ready", is_ready)
        platform.rewrite(version("hello", 2, container=BROKEN, progress_deadline="2s"))
        trouble = platform.wait_for("hello", "its trouble", lambda found: found["rollout"] and found["rollout"]["trouble"])["rollout"]
        assert trouble["revision"] == "hello-00002"
        found = platform.wait_for("hello", "failed", lambda found: found["rollout"]["state"] == "failed")
        assert found["failure"].startswith("hello-00002 failed; traffic stays on hello-00001. ")
        assert "there is no model" in found["failure_log"]["lines"][-1]
        assert "hello hello-00002 failed; traffic stays on hello-00001" in platform.server.said()
        assert versions(platform, "hello") == {"1"}
        platform.wait_for("hello", "its pods gone", lambda found: {pod["revision"] for pod in found["pods"]} == {"hello-00001"})
        platform.rewrite(version("hello", 3))
        platform.wait_for("hello", "mended", lambda found: found["revision"] == "hello-00003" and not found["failure"])
        assert versions(platform, "hello") == {"3"}


def test_traffic_is_split_and_a_tag_has_its_own_host(tmp_path: Path) -> None:
    with platform_running(tmp_path, [version("hello", 1)]) as platform:
        platform.wait_for("hello", "ready", is_ready)
        platform.rewrite(version("hello", 2, {"revisionName": "hello-00001", "percent": 50}, {"percent": 50, "tag": "next"}))
        platform.wait_for("hello", "two", lambda found: [revision["percent"] for revision in found["revisions"]] == [50, 50])
        assert versions(platform, "hello", 40) == {"1", "2"}
        assert versions(platform, "next-hello", 10) == {"2"}
        tagged = request(
            platform.admin_port, "POST", "/api/invoke?service=hello&tag=next&method=GET&path=/environment", b"", {"X-Relight": "1"}
        )
        assert tagged.json()["env"]["VERSION"] == "2"
        refused = request(platform.admin_port, "POST", "/api/invoke?service=hello&tag=last", b"", {"X-Relight": "1"})
        assert (refused.status, refused.json()["error"]["message"]) == (404, "no tag 'last' in the traffic of hello; there are next")
        platform.rewrite(version("hello", 2, {"revisionName": "hello-00001", "percent": 100}))
        platform.wait_for("hello", "back", lambda found: [revision["percent"] for revision in found["revisions"]] == [100, 0])
        assert versions(platform, "hello", 10) == {"1"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\n", "line 2: not YAML"),
        ("a: !!timestamp 2020\n", "manifests"),
        ("a: !!bool maybe\n", "manifests"),
        ("- " * 5000, "manifests"),
        (manifests(service("hello", container={"resources": {"limits": {"nvidia.com/gpu": "1e400"}}})), "manifests"),
        ("", "found no serving.knative.dev/v1 Service"),
        (
            manifests(service("hello", spec={"containerConcurrency": -1})),
            "spec.template.spec.containerConcurrency: Input should be greater",
        ),
        (
            manifests(service("hello", container={"envFrom": [{"secretRef": {"name": "lost"}}]})),
            "secretRef: found Secret 'lost', which is in no manifest here",
        ),
        (
            manifests(version("new", 1), version("hello", 2, {"percent": 100, "revisionName": "hello-7"})),
            "(Service hello): spec.traffic[0].revisionName: found 'hello-7'; the revisions of this run are hello-00001, hello-00002",
        ),
    ],
    ids=[
        "no YAML",
        "no time",
        "no truth",
        "too deep",
        "too many GPUs",
        "empty",
        "a mistake",
        "a Secret that is missing",
        "a revision that is not there",
    ],
)
def test_broken_manifests_change_nothing_and_are_told_in_one_line(shared: Platform, text: str, said: str) -> None:
    before = shared.service("hello")
    good = shared.state / "manifests.yaml"
    kept = good.read_text()
    good.write_text(text)
    problem = wait_until("its problem", lambda: shared.status()["manifests"]["problem"])
    assert said in problem
    assert f"nothing was changed: {problem}" in [line.partition(" ")[2] for line in shared.server.said().splitlines()]
    after = shared.service("hello")
    assert [service["name"] for service in shared.status()["services"]] == ["hello"]
    assert (after["revision"], after["pods"][0]["name"]) == (before["revision"], before["pods"][0]["name"])
    good.write_text(kept)
    wait_until("no problem", lambda: shared.status()["manifests"]["problem"] is None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with platform_running(tmp_path_factory.mktemp("broken"), [version("hello", 1)]) as platform:
        platform.wait_for("hello", "ready", is_ready)
        yield platform


def test_services_come_and_go_with_the_files(tmp_path: Path) -> None:
    with platform_running(tmp_path, [version("first", 1), version("second", 1)]) as platform:
        platform.wait_for("second", "ready", is_ready)
        with platform.calls("first", 1, "/wait/finish") as calls:
            platform.wait_for("first", "in its pod", lambda found: [pod["concurrency"] for pod in found["pods"]] == [1])
            platform.rewrite(version("second", 1), version("third", 1))
            platform.wait_for("third", "ready", is_ready)
            assert [found["name"] for found in platform.status()["services"]] == ["second", "third"]
            platform.note("first", "finish")
            assert calls[0].result().status == 200
        wait_until("its pods gone", lambda: not list((platform.state / "pods").glob("first-*")))
        assert versions(platform, "third") == {"1"}
        assert platform.call("first", "/default").status == 200
        assert platform.seen("second") == ["/default"]  # which is the first in the files now


def test_what_changes_in_a_secret_makes_no_new_revision_and_sighup_reads_again_too(tmp_path: Path) -> None:
    def secret(value: str) -> dict[str, Any]:
        return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"KEY": value}}

    hello = service("hello", container={"envFrom": [{"secretRef": {"name": "key"}}]})
    with platform_running(tmp_path, [hello, secret("old")]) as platform:
        assert platform.call("hello", "/environment").json()["env"]["KEY"] == "old"
        platform.rewrite(hello, secret("new"))
        wait_until("read again", lambda: "manifests read again\n" in platform.server.said())
        platform.server.signal(signal.SIGHUP)
        wait_until("and again", lambda: "manifests read again (SIGHUP)\n" in platform.server.said())
        assert platform.call("hello", "/environment").json()["env"]["KEY"] == "old"
        assert len(platform.service("hello")["revisions"]) == 1


def test_what_was_piped_in_cannot_be_read_again_and_sighup_is_told_so(tmp_path: Path) -> None:
    port, admin = free_port(), free_port()
    (tmp_path / "hello.yaml").write_text(manifests(service("hello")))
    script = ["sh", "-c", f'cat "$0/hello.yaml" | exec {" ".join(command(tmp_path, port, admin, file="-"))}', str(tmp_path)]
    with running(script, tmp_path / "run.log", clean_environment()) as server:
        wait_until("the platform", lambda: request(admin, "GET", "/api/status").status == 200)
        os.killpg(server.process.pid, signal.SIGHUP)
        wait_until("told", lambda: "SIGHUP: the manifests came from standard input, which cannot be read again" in server.said())
        assert request(port, "GET", "/", headers={"Host": "hello.default.localhost"}).status == 200


def test_a_terminal_that_is_closed_ends_the_platform(tmp_path: Path) -> None:
    (tmp_path / "manifests.yaml").write_text(manifests(service("hello")))
    port, admin = free_port(), free_port()
    child, terminal = pty.fork()
    if not child:
        os.execve(BIN / "relight", command(tmp_path, port, admin), clean_environment())  # noqa: S606
    try:
        wait_until("the platform", lambda: request(admin, "GET", "/api/status").status == 200)
        os.close(terminal)
        wait_until("its end", lambda: os.waitpid(child, os.WNOHANG)[0] == child)
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        raise
    assert not (tmp_path / "platform.json").exists()


def test_a_store_that_a_change_names_for_the_first_time_is_started(tmp_path: Path) -> None:
    with platform_running(tmp_path, [service("hello")]) as platform:
        assert "object store" not in platform.server.said()
        platform.rewrite(service("hello", env={"AWS_ENDPOINT_URL": OBJECT_STORE}))
        platform.wait_for("hello", "the new one", lambda found: found["revision"] == "hello-00002")
        address = platform.call("hello", "/environment").json()["env"]["AWS_ENDPOINT_URL"]
        assert f"object store at {address}, in memory" in platform.server.said()
