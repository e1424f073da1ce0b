"""`relight run` and an agent that has processes of its own: in a fresh process as in a forked one, and when its worker is killed."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from function import children
from tests.knative.local.running import Platform, platform_running, service
from tests.support import wait_until

AGENT = """
import multiprocessing, os, time

class Keeps:
    def load(self, weights, device):
        context = multiprocessing.get_context("fork")
        self.children = [context.Process(target=time.sleep, args=(600,), daemon=daemon) for daemon in (False, True)]
        for child in self.children:
            child.start()

    def predict(self, inputs):
        with multiprocessing.Pool(2) as pool:
            assert pool.map(abs, [1, -2]) == [1, 2]
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
        child.terminate()
        child.join()
        told = {"worker": os.getpid(), "children": [kept.pid for kept in self.children], "exit_code": child.exitcode}
        return [told for _ in inputs]
"""


def ask(platform: Platform) -> Any:
    reply = platform.call("keeps", "/", "POST", {"instances": [1]})
    assert reply.status == 200, reply.body
    return reply.json()["predictions"][0]


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


@pytest.mark.parametrize("options", [(), ("--no-fork-server",)], ids=["forked", "fresh"])
def test_an_agents_children_are_plain_and_end_with_it_and_a_killed_worker_is_told(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "keeping_agent.py").write_text(AGENT)
    container = {"command": ["python", "-m", "function"], "readinessProbe": {"httpGet": {"path": "/readyz"}}}
    keeps = service("keeps", container={**container, "env": [{"name": "FUNCTION_AGENT", "value": "keeping_agent:Keeps"}]})
    with platform_running(tmp_path, [keeps], *options, PYTHONPATH=str(tmp_path)) as platform:
        if not options:
            wait_until("a fork server", lambda: platform.status()["fork_server"]["warm"])
        first = ask(platform)
        assert platform.pods("keeps")[0]["forked"] is not bool(options)
        assert first["exit_code"] == -15
        os.kill(first["worker"], signal.SIGKILL)
        wait_until("the end", lambda: not any(is_running(pid) for pid in first["children"]))
        wait_until("a start", lambda: platform.pods("keeps")[0]["restarts"]["function"] == 1)
        assert platform.pods("keeps")[0]["exits"]["function"] == "ended with status 137 (SIGKILL)"
        second = ask(platform)
        assert (second["worker"] != first["worker"], second["exit_code"]) == (True, -15)
        everything = children.descendants(platform.server.process.pid)
        assert everything.issuperset(second["children"])
        platform.server.signal(signal.SIGTERM)
        platform.server.wait()
        assert not any(is_running(pid) for pid in everything)
