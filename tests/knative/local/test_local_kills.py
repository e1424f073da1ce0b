"""A function's workers, masters and sidecars are killed at random while callers go on: they are held, and nobody is refused."""

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.knative.local.running import Platform, platform_running, service
from tests.support import wait_until

CALLERS = 4
AGENT = """
class Linear:
    def load(self, weights, device):
        tensors = dict(weights.to(device))
        self.weight, self.bias = tensors["weight"], tensors["bias"]

    def predict(self, inputs):
        import torch
        return (torch.tensor(inputs, dtype=torch.float32) @ self.weight + self.bias).tolist()
"""
CACHE = {"WEIGHTS_URI": "s3://models/linear", "WEIGHTS_CACHE_DIR": "/notes/cache"}
STORE = {
    "AWS_ENDPOINT_URL": "http://object-store.relight.localhost",
    "AWS_ACCESS_KEY_ID": "relight",
    "AWS_SECRET_ACCESS_KEY": "relight-local",
    "WEIGHTS_PORT": "8090",
}


def function(name: str) -> dict[str, Any]:
    mounts = [{"name": "notes", "mountPath": "/notes"}, {"name": "scratch", "mountPath": "/scratch"}]
    sidecar = {
        "name": "weights-cache",
        "command": ["python", "-m", "weights_cache", "serve"],
        "env": [{"name": key, "value": value} for key, value in (CACHE | STORE).items()],
        "volumeMounts": mounts,
    }
    env = {"FUNCTION_AGENT": "kills_agent:Linear", "FUNCTION_MODEL_NAME": name, **CACHE}
    main = {
        "command": ["python", "-m", "function"],
        "env": [{"name": key, "value": value} for key, value in env.items()],
        "readinessProbe": {"httpGet": {"path": "/readyz"}},
        "volumeMounts": mounts,
    }
    return service(name, sidecar, scale={"initial-scale": "1"}, container=main, spec={"timeoutSeconds": 60})


def victims(platform: Platform) -> list[int]:
    """The processes below the platform that are a function's master or worker, or a sidecar; the fork server and its spare, too."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != platform.server.process.pid:
            ancestor = parents[ancestor]
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if ancestor == platform.server.process.pid and ("-m function" in words or "weights_cache serve" in words):
                found.append(pid)
    return sorted(found)


class Callers:
    """Go on until so many requests are answered and so many kills were made."""

    def __init__(self, platform: Platform, calls: int, kills: int, seed: int) -> None:
        self.answers: Counter[int] = Counter()
        self.messages: Counter[str] = Counter()
        self.wrong: list[tuple[int, bytes]] = []
        self.kills = 0
        self._platform = platform
        self._calls, self._least_kills = calls, kills
        self._random = random.Random(seed)
        self._numbers: Iterator[int] = count()
        self._over = threading.Event()

    def run(self) -> None:
        with ThreadPoolExecutor(CALLERS + 1) as threads:
            work = [threads.submit(self._call) for _ in range(CALLERS)]
            killing = threads.submit(self._kill)
            try:
                for one in work:
                    one.result()
            finally:
                self._over.set()
            killing.result()

    def _call(self) -> None:
        while (number := next(self._numbers)) < self._calls or self.kills < self._least_kills:
            body = json.dumps({"instances": [[number, 1]]}).encode()
            reply = self._platform.call("linear", "/", "POST", body, {"Content-Type": "application/json"}, timeout=90)
            self.answers[reply.status] += 1
            if reply.status != 200:
                self.messages[str(reply.json()["error"]["message"])[:200]] += 1
            elif reply.json()["predictions"] != [2.0 * number + 4]:
                self.wrong.append((number, reply.body))
            time.sleep(0.02)

    def _kill(self) -> None:
        answered = 0
        while not self._over.wait(self._random.uniform(0.2, 1.5)):
            # Mostly what has come back since the last kill, else nothing would ever be up on a slow machine; now and then what just starts.
            if self.answers[200] == answered and self._random.random() > 0.2:
                continue
            if found := victims(self._platform):
                answered = self.answers[200]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._random.choice(found), signal.SIGKILL)
                    self.kills += 1


def check(tmp_path: Path, calls: int, kills: int, seed: int) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    save_file({"weight": torch.tensor([2.0, 3.0]), "bias": torch.tensor(1.0)}, weights / "model.safetensors")
    (tmp_path / "kills_agent.py").write_text(AGENT)
    options = ("--seed", f"{weights}=s3://models/linear")
    with platform_running(tmp_path / "state", [function("linear")], *options, PYTHONPATH=str(tmp_path)) as platform:
        platform.wait_for("linear", "ready", lambda found: found["state"] == "ready", 120)
        callers = Callers(platform, calls, kills, seed)
        callers.run()
        said = f"{callers.kills} kills: {dict(callers.answers)} {dict(callers.messages)}"
        assert (callers.wrong, set(callers.answers) - {200, 502}) == ([], set()), said
        assert callers.answers[502] <= CALLERS * callers.kills, said
        assert callers.answers[200] >= calls - CALLERS * callers.kills, said
        platform.wait_for("linear", "ready at the end", lambda found: found["state"] == "ready", 120)
        wait_until("all answered", lambda: platform.service("linear")["concurrency"] == 0)
        print(said)


def test_whoever_calls_a_function_whose_processes_are_killed_is_held_and_answered(tmp_path: Path) -> None:
    check(tmp_path, calls=100, kills=4, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_of_two_thousand_calls_among_twenty_kills_none_is_refused(tmp_path: Path, seed: int) -> None:
    check(tmp_path, calls=2000, kills=20, seed=seed)
