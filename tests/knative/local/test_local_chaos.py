"""Everything that can die dies at random, manifests change, and Services go to zero and back: no caller is left without a true answer."""

import contextlib
import json
import random
import re
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from os import kill
from pathlib import Path
from typing import Any

import pytest

from tests.knative.local.running import Platform, platform_running, service
from tests.support import request, wait_until

JOURNAL = str(Path(__file__).parent / "pods" / "journal.py")
# What of a process's command line tells what it is.
FUNCTION, SIDECAR, STORE = "pods/journal.py", "weights_cache serve", "knative.local.embedded_server"
SETTINGS = {
    "AWS_ENDPOINT_URL": "http://object-store.relight.localhost",
    "AWS_ACCESS_KEY_ID": "relight",
    "AWS_SECRET_ACCESS_KEY": "relight-local",
}
SETTINGS |= {"WEIGHTS_URI": "s3://models/small", "WEIGHTS_CACHE_DIR": "/notes/cache", "WEIGHTS_PORT": "8090"}
WEIGHTS = {
    "name": "weights-cache",
    "command": ["python", "-m", "weights_cache", "serve"],
    "env": [{"name": name, "value": value} for name, value in SETTINGS.items()],
    "volumeMounts": [{"name": "notes", "mountPath": "/notes"}],
}
FAILS = {"command": ["python", "-c", "raise SystemExit(3)"]}


def steady(number: int, *traffic: Any, fails: bool = False) -> dict[str, Any]:
    """Called all the time, and rolled."""
    container = FAILS if fails else {"command": ["python", JOURNAL]}
    document = service(
        "steady",
        WEIGHTS,
        scale={"initial-scale": "1", "max-scale": "3", "window": "6s"},
        spec={"containerConcurrency": 4},
        container=container,
        env={"VERSION": str(number)},
        progress_deadline="2s" if fails else "60s",
    )
    document["spec"]["traffic"] = list(traffic)
    return document


def bursty() -> dict[str, Any]:
    """Called now and then by many at once, and at zero in between."""
    spec = {"containerConcurrency": 2}
    return service(
        "bursty", scale={"max-scale": "4", "window": "6s"}, spec=spec, container={"command": ["python", JOURNAL]}, env={"SECONDS": "0.1"}
    )


@dataclass
class Client:
    """Calls, and keeps each answer."""

    platform: Platform
    numbers: Iterator[int] = field(default_factory=count)
    answers: dict[str, list[tuple[str, int, bytes]]] = field(default_factory=lambda: {"steady": [], "bursty": []})

    def call(self, name: str) -> None:
        path = f"/{name}/{next(self.numbers)}"
        body = b"x" * 1000 if zlib.crc32(path.encode()) % 2 else None
        reply = self.platform.call(name, path, "POST" if body else "GET", body)
        self.answers[name].append((path, reply.status, reply.body))

    def go_on(self, name: str, until: Callable[[], bool]) -> None:
        while not until():
            self.call(name)
            time.sleep(0.02)


class Chaos:
    """Does harm, the same for the same seed as far as there is something to be harmed."""

    def __init__(self, platform: Platform, seed: int) -> None:
        self._platform = platform
        self._random = random.Random(seed)
        self._version = 1
        # Not while it is to go to zero: one that is killed when nobody calls is, as in Knative, kept until it has been ready again.
        self.spared = {"bursty"}
        self.done: Counter[str] = Counter()

    def go_on(self, until: Callable[[], bool]) -> None:
        harm = [(self.kill, FUNCTION), (self.kill, SIDECAR), (self.kill, STORE), (self.roll, "roll")]
        turn = count()
        while not until():
            time.sleep(self._random.uniform(0.2, 1.0))
            # Each in its turn at first, so that a short run has all of them.
            act, what = harm[number] if (number := next(turn)) < len(harm) else self._random.choice(harm)
            act(what)

    def kill(self, what: str) -> None:
        if found := processes(self._platform, what, self.spared):
            with contextlib.suppress(ProcessLookupError):  # one that has just ended by itself
                kill(self._random.choice(found), signal.SIGKILL)
                self.done[what] += 1

    def roll(self, _: str) -> None:
        kind = self._random.choice(["new", "new", "split", "broken", "not YAML"])
        self.done[kind] += 1
        if kind == "not YAML":
            (self._platform.state / "manifests.yaml").write_text("a: [1\n")
            return
        self._version += 1
        known = [revision["name"] for revision in self._platform.service("steady")["revisions"] if revision["percent"]]
        traffic = [{"revisionName": known[0], "percent": 40}, {"percent": 60, "tag": "new"}] if kind == "split" else []
        self._platform.rewrite(steady(self._version, *traffic, fails=kind == "broken"), bursty())

    def end(self) -> None:
        """A last good version."""
        self._version += 1
        self._platform.rewrite(steady(self._version), bursty())
        wait_until("taken", lambda: self._platform.status()["manifests"]["problem"] is None)
        self._platform.wait_for("steady", "rolled", lambda found: not found["rollout"] and found["state"] == "ready", 60)


def processes(platform: Platform, what: str, spared: set[str]) -> list[int]:
    """Those that the platform has started, by what their command line says, and not of these Services; oldest first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # gone, or not ours
            continue
        if parent == platform.server.process.pid and what in words and not {f"K_SERVICE={name}" for name in spared} & set(environment):
            found.append(int(folder.name))
    return sorted(found)


def journals(platform: Platform, name: str) -> list[list[str]]:
    """What each process of the Service has written down."""
    return [path.read_text().splitlines() for path in platform.volume(name).glob("journal-*")]


def run(state: Path, seed: int, seconds: float) -> Counter[str]:
    """The whole story, with one burst of calls after another for so long, one at least; what harm was done."""
    weights = state / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    with platform_running(state, [steady(1), bursty()], "--seed", f"{weights}=s3://models/small") as platform:
        platform.wait_for("steady", "ready", lambda found: found["state"] == "ready")
        client, chaos, over = Client(platform), Chaos(platform, seed), threading.Event()
        with ThreadPoolExecutor(16) as threads:
            work = [threads.submit(client.go_on, "steady", over.is_set) for _ in range(4)]
            work.append(threads.submit(chaos.go_on, over.is_set))
            try:
                until = time.monotonic() + seconds
                is_first = True
                while is_first or time.monotonic() < until:
                    is_first = False
                    end = time.monotonic() + 3
                    chaos.spared.clear()
                    burst = [threads.submit(client.go_on, "bursty", lambda end=end: time.monotonic() > end) for _ in range(8)]  # type: ignore[misc]
                    for caller in burst:
                        caller.result()
                    chaos.spared.add("bursty")
                    platform.wait_for("bursty", "at zero", lambda found: not found["pods"], 60)
            finally:
                over.set()
            for one in work:
                one.result()
        chaos.end()
        client.call("bursty")
        client.call("steady")
        for name, at_once in (("steady", 4), ("bursty", 2)):
            check(platform, name, client.answers[name], most_failed=at_once * chaos.done[FUNCTION])
        assert "Traceback" not in platform.server.said()
        return chaos.done


def check(platform: Platform, name: str, answers: list[tuple[str, int, bytes]], most_failed: int) -> None:
    """Whether each caller was told the truth. most_failed: requests that the pods had which were killed."""
    got: Counter[str] = Counter()
    for lines in journals(platform, name):
        told = lines.index("told to stop") if "told to stop" in lines else len(lines)
        assert not [line for line in lines[told:] if line.startswith("got")], f"{name}: handed to a pod after it was told to stop"
        got.update(line.removeprefix("got ") for line in lines if line.startswith("got"))
    assert set(got.values()) <= {1}, f"{name}: handed over twice: {[path for path, times in got.items() if times > 1]}"
    for path, status, body in answers:
        if status == 200:
            assert (body.decode(), got[path]) == (path, 1)
        else:
            assert status == 502, (path, status, body)  # a pod had it that died: nobody is refused, nor waits in vain
            error = json.loads(body)["error"]
            # A pod that dies with a request is the one reason that there may be: who reached none is held until there is another.
            assert error["type"] == "bad_gateway", (path, error)
            assert "ended the connection before it had answered" in error["message"], (path, error)
    assert sum(status != 200 for _, status, _ in answers) <= most_failed, Counter(status for _, status, _ in answers)
    assert answers[-1][1] == 200
    found = platform.service(name)
    assert (found["requests_total"], found["concurrency"], found["queued"]) == (len(answers), 0, 0)
    metrics = request(platform.admin_port, "GET", "/metrics").body.decode()
    assert f'relight_request_seconds_count{{namespace="default",service="{name}"}} {len(answers)}.0' in metrics
    by_status = Counter(str(status) for _, status, _ in answers)
    for code, number in re.findall(rf'relight_requests_total{{code="(\w+)",namespace="default",service="{name}",.*}} (\d+)\.0', metrics):
        by_status[code] -= int(number)
    assert set(by_status.values()) == {0}, by_status


def test_no_caller_is_lost_while_everything_dies_and_rolls(tmp_path: Path) -> None:
    done = run(tmp_path, seed=5, seconds=0)
    assert {FUNCTION, SIDECAR, STORE} <= done.keys()
    assert done.keys() - {FUNCTION, SIDECAR, STORE}


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2])
def test_no_caller_is_lost_in_a_minute_in_which_everything_dies_and_rolls(tmp_path: Path, seed: int) -> None:
    done = run(tmp_path, seed, seconds=60)
    assert done.keys() >= {FUNCTION, SIDECAR, STORE, "new", "split", "broken", "not YAML"}
