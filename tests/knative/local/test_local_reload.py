"""Code that changes while its function runs."""

import random
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.knative.local.running import Platform, platform_running, service
from tests.knative.local.test_local_rolling import is_ready, steady
from tests.support import request, wait_until

AGENT = """
import os
import time
import word

class Teller:
    def load(self, weights, device):
        pass

    def predict(self, inputs):
        if "die" in inputs:
            os._exit(1)
        time.sleep(0.02)
        return [{"revision": os.environ["K_REVISION"], "word": word.WORD} for _ in inputs]
"""
FUNCTION: dict[str, Any] = {"command": ["python", "-m", "function"], "readinessProbe": {"httpGet": {"path": "/readyz"}}}


def say(platform_or_folder: Path, text: str) -> None:
    """Save the module that the agent imports, as editors do."""
    new = platform_or_folder / "word.py.new"
    new.write_text(text)
    new.replace(platform_or_folder / "word.py")


@contextmanager
def telling(folder: Path, *options: str, initial_scale: str = "1", spec: Mapping[str, Any] | None = None) -> Iterator[Platform]:
    """A platform with the function `teller`, whose agent lies beside the manifest."""
    (folder / "teller.py").write_text(AGENT)
    say(folder, "WORD = 1")
    container = FUNCTION | {"env": [{"name": "FUNCTION_AGENT", "value": "teller:Teller"}]}
    document = service("teller", scale={"initial-scale": initial_scale}, container=container, spec=spec)
    with platform_running(folder, [document], "--no-fork-server", *options) as platform:
        yield platform


def told(platform: Platform) -> Any:
    reply = platform.call("teller", "/", "POST", {"instances": [0]})
    assert reply.status == 200, f"{reply.body!r}; {platform.server.said()}"
    return reply.json()["predictions"][0]["word"]


def test_saved_code_takes_over_while_callers_are_served_and_broken_code_does_not(tmp_path: Path) -> None:
    with telling(tmp_path, "--reload") as platform:
        platform.wait_for("teller", "ready", is_ready)
        assert told(platform) == 1
        with steady(platform, "teller") as statuses:
            say(tmp_path, "WORD = 2")
            platform.wait_for("teller", "the new code", lambda found: found["revision"] == "teller-00002" and is_ready(found))
            assert told(platform) == 2
            say(tmp_path, "WORD = (")
            found = platform.wait_for("teller", "failed", lambda found: (found["rollout"] or {}).get("state") == "failed")
            assert found["failure"].startswith("teller-00003 failed; traffic stays on teller-00002. ")
            assert "SyntaxError" in found["failure_log"]["lines"][-1]
            assert told(platform) == 2
            say(tmp_path, "WORD = 4")
            platform.wait_for("teller", "mended", lambda found: found["revision"] == "teller-00004" and is_ready(found))
            assert told(platform) == 4
        assert set(statuses) == {404}  # of a path that no function has: what matters is that each call had an answer of a pod
        assert "word.py changed\n" in platform.server.said()


def test_without_reload_running_pods_go_on_and_no_other_pod_of_theirs_starts_with_other_code(tmp_path: Path) -> None:
    with telling(tmp_path, initial_scale="0") as platform:
        say(tmp_path, "WORD = (")  # from zero it is simply another revision
        broken = platform.call("teller", "/", "POST", {"instances": [0]})
        assert broken.status == 503
        assert "SyntaxError" in broken.json()["error"]["message"]
        say(tmp_path, "WORD = 2")  # which nothing has to go for
        wait_until("the mended code", lambda: "word.py changed\n" in platform.server.said())
        assert told(platform) == 2
        assert [(pod["revision"], pod["phase"]) for pod in platform.pods("teller")] == [("teller-00003", "ready")]
        say(tmp_path, "WORD = 3")
        platform.wait_for("teller", "what has changed", lambda found: found["changed"] == ["word.py"])
        assert told(platform) == 2
        assert "word.py changed since teller-00003 was made, which goes on as it is" in platform.server.said()
        assert request(platform.admin_port, "POST", "/api/reload").status == 403
        assert request(platform.admin_port, "POST", "/api/reload", headers={"X-Relight": "1"}).status == 202
        platform.wait_for("teller", "the new code", lambda found: found["revision"] == "teller-00004" and is_ready(found))
        assert told(platform) == 3
        assert not platform.service("teller")["changed"]
        say(tmp_path, "WORD = 4")
        platform.server.signal(signal.SIGHUP)
        platform.wait_for("teller", "SIGHUP", lambda found: found["revision"] == "teller-00005" and is_ready(found))
        say(tmp_path, "WORD = 5")
        assert platform.call("teller", "/", "POST", {"instances": ["die"]}).status == 502
        wait_until("its end", lambda: "function ended with status 1" in platform.server.said())  # until then its port may be open
        assert told(platform) == 5  # and not by the pod that has died, whose container starts again
        assert {pod["revision"] for pod in platform.pods("teller") if pod["phase"] == "ready"} == {"teller-00006"}


@pytest.mark.soak
@pytest.mark.parametrize("options", [["--reload"], []], ids=["reload", "no reload"])
def test_whatever_is_saved_and_whoever_dies_all_pods_of_a_revision_answer_alike(tmp_path: Path, options: list[str]) -> None:
    chance = random.Random(7)
    answers: dict[str, set[int]] = {}
    over = time.monotonic() + 20
    with telling(tmp_path, *options, spec={"containerConcurrency": 1}) as platform:

        def call() -> None:
            while time.monotonic() < over:
                reply = platform.call("teller", "/", "POST", {"instances": [0]})
                if reply.status == 200:
                    (answer,) = reply.json()["predictions"]
                    answers.setdefault(answer["revision"], set()).add(answer["word"])
                else:
                    assert reply.status in (502, 503), reply.body  # of a pod that has died, or of code that cannot start

        with ThreadPoolExecutor(6) as threads:
            callers = [threads.submit(call) for _ in range(6)]
            number = 1
            while time.monotonic() < over:
                number += 1
                say(tmp_path, f"WORD = {number}" if number % 6 else "WORD = (")
                time.sleep(chance.choice([0, 0.2, 2.0, 3.0]))
                if chance.random() < 0.3:
                    platform.call("teller", "/", "POST", {"instances": ["die"]})
            for caller in callers:
                caller.result()
    assert len(answers) > 1
    assert {revision: words for revision, words in answers.items() if len(words) > 1} == {}
