"""`relight run` with few file descriptors: both ports answer, the terminal has a line, and pods have the limit that they would have had."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.knative.local.running import POD, Platform, command, manifests, service
from tests.support import clean_environment, free_port, request, running, wait_until

SHORT, ENOUGH = "file descriptors run out", "there are file descriptors again"
SOFT, HARD = 64, 128


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    told = ["bash", "-c", f'ulimit -Sn > "$NOTES/limit"; exec python {POD}']
    probe = {"exec": {"command": ["bash", "-c", 'ulimit -Sn > "$NOTES/probe-limit"']}}
    objects = [service("echo", container={"command": told, "startupProbe": probe})]
    (tmp_path / "manifests.yaml").write_text(manifests(*objects))
    port, admin_port = free_port(), free_port()
    limited = ["bash", "-c", f'ulimit -Sn {SOFT}; ulimit -Hn {HARD}; exec "$@"', "-", *command(tmp_path, port, admin_port)]
    with running(limited, tmp_path / "run.log", clean_environment()) as server:
        found = Platform(server, port, admin_port, tmp_path)
        wait_until("the platform", found.status)
        yield found


def opened(clients: contextlib.ExitStack, port: int, count: int) -> None:
    """So many connections that send nothing more, those beyond what the kernel takes left out."""
    for _ in range(count):
        with contextlib.suppress(OSError):
            clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)).sendall(b"GET / HT")


def test_without_descriptors_both_ports_answer_and_the_terminal_has_one_line_and_one_when_it_is_over(platform: Platform) -> None:
    with contextlib.ExitStack() as clients:
        opened(clients, platform.port, 2 * HARD)
        opened(clients, platform.admin_port, HARD)
        for _ in range(3):
            assert platform.call("echo").status == 200  # its pod starts meanwhile
            assert request(platform.admin_port, "GET", "/api/status").status == 200
        assert platform.server.said().count(SHORT) == 1
    wait_until("over", lambda: ENOUGH in platform.server.said())
    assert platform.call("echo").status == 200
    assert (platform.server.said().count(SHORT), platform.server.said().count(ENOUGH)) == (1, 1)
    assert "Traceback" not in platform.server.said()


def test_more_calls_at_once_than_there_are_descriptors_are_all_answered(platform: Platform) -> None:
    with platform.calls("echo", HARD, "/wait/open") as replies:
        platform.wait_for("echo", "full", lambda found: found["pods"] and found["pods"][0]["concurrency"] >= HARD // 8)
        platform.note("echo", "open")
        assert [reply.result().status for reply in replies] == [200] * HARD
    assert platform.pods("echo")[0]["restarts"] == {"function": 0}
    assert "Traceback" not in platform.server.said()


def test_pods_have_the_limit_that_they_would_have_had(platform: Platform) -> None:
    assert platform.call("echo").status == 200
    for what in ("limit", "probe-limit"):
        assert (platform.volume("echo") / what).read_text() == f"{SOFT}\n"
