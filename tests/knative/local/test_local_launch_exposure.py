"""Which processes other machines can reach."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from knative.local import procfs
from knative.local.exposure import exposed
from tests.knative.local.running import platform_running, service
from tests.knative.local.test_local_launch import env, process
from tests.support import wait_until


@contextmanager
def listening(host: str, *, v6_only: bool = True) -> Iterator[int]:
    """A socket of this process; its port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as sock:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6_only))
        try:
            sock.bind((host, 0))
        except OSError as error:
            pytest.skip(f"{host} cannot be bound here: {error}")
        sock.listen()
        yield sock.getsockname()[1]


def test_a_socket_of_all_interfaces_can_be_reached() -> None:
    with listening("0.0.0.0") as port:
        assert f"0.0.0.0:{port}" in procfs.exposed([os.getpid()])
    assert f"0.0.0.0:{port}" not in procfs.exposed([os.getpid()])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "::ffff:127.0.0.1"])
def test_a_socket_of_loopback_cannot(host: str) -> None:
    with listening(host, v6_only=False) as port:
        assert not [place for place in procfs.exposed([os.getpid()]) if place.endswith(f":{port}")]


def test_a_socket_of_all_interfaces_of_both_kinds_can() -> None:
    with listening("::", v6_only=False) as port:
        assert f"[::]:{port}" in procfs.exposed([os.getpid()])


SERVE = "import socket, sys; s = socket.create_server((sys.argv[1], 0)); print(s.getsockname()[1], flush=True); input()"


@pytest.mark.parametrize(
    ("host", "variables", "is_told"),
    [
        pytest.param("0.0.0.0", {}, True, id="on all interfaces"),
        pytest.param("127.0.0.1", {}, False, id="on loopback"),
        pytest.param("0.0.0.0", {"FUNCTION_HOST": "0.0.0.0"}, False, id="as the manifest says"),
    ],
)
def test_a_person_is_told_of_a_container_that_other_machines_can_reach(host: str, variables: dict[str, str], is_told: bool) -> None:
    """Also where it is a child of the container's process that listens."""
    command = ["sh", "-c", '"$0" "$@"; true', sys.executable, "-c", SERVE, host]
    planned = process({"name": "vllm", "env": env(**variables)}, pod=f"pod-{os.getpid()}")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=planned.env) as child:
        assert child.stdout
        port = int(child.stdout.readline())
        told = exposed(planned)
        child.communicate(b"\n")
    expected = f"vllm listens at 0.0.0.0:{port}, where other machines can reach it; have its command say --host 127.0.0.1"
    assert (told or "").startswith(expected if is_told else "") is True
    assert bool(told) == is_told


def test_a_connection_is_not_what_listens_and_others_sockets_are_not_ours() -> None:
    with listening("0.0.0.0") as port, closing(socket.create_connection(("127.0.0.1", port))):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        try:
            assert procfs.exposed([child.pid]) == []
            assert procfs.exposed([os.getpid()]).count(f"0.0.0.0:{port}") == 1
        finally:
            child.communicate(b"\n")
    assert procfs.exposed([child.pid]) == []  # it is gone


def test_the_terminal_tells_of_it_once_for_each_workload(tmp_path: Path) -> None:
    """The sidecar, twice: of two pods, one is looked at."""
    serve = {"name": "open", "command": [sys.executable, "-c", SERVE.replace("input()", "__import__('time').sleep(600)"), "0.0.0.0"]}
    sources = [service("echo", serve, scale={"min-scale": "2"}), service("closed")]
    with platform_running(tmp_path, sources) as platform:
        assert platform.call("closed").status == 200
        platform.wait_for("echo", "two pods", lambda found: sum(one["phase"] == "ready" for one in found["pods"]) == 2)
        wait_until("the line", lambda: "where other machines can reach it" in platform.server.said())
    said = platform.server.said()
    assert len(re.findall(r"open listens at 0\.0\.0\.0:\d+, where other machines can reach it; have its command say", said)) == 1
    assert said.count("other machines") == 1
