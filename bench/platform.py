"""What the local platform adds and saves.

Starts: from zero with the fork server beside a fresh process, in turns, weights in the node's cache: two platforms side by side, one of
them with `--no-fork-server`, the same client, the same machine. First byte of the answer at the caller.

Way: what the activator adds to a request, beside calls of the pod itself, in turns: the echo agent, the same client with its connections
kept alive (bench/load_http.py, in a process of its own; its share of a core is told, so that one sees that it is not what is measured).

Idle: what 50 Services at zero cost the platform's process, beyond its children, the fork server and the embedded store.

    .venv/bin/python bench/platform.py [--rounds 5] [--json FILE]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # and not this folder, where we would be found in place of Python's own `platform`

import contextlib  # noqa: E402
import http.client  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator, Mapping, Sequence  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from typing import Any  # noqa: E402

import yaml  # noqa: E402

from bench.cold_start import BIN, SENTENCE, Platform, call  # noqa: E402
from bench.common import free_ports, machine, main, spread  # noqa: E402

TARGET_S, TARGET_RATIO = 0.3, 0.15
TARGET_ADDED_MS, TARGET_PER_SECOND = 1.0, 1500
TARGET_CORE, TARGET_BYTES = 0.05, 150e6
SETTLE_S = 0.5  # after the last pod is gone
PREDICT = "/v1/models/model:predict"
CROWD = 16  # requests at once when the throughput is measured
LOAD_S, WATCH_S = 3.0, 20.0
IDLE_SERVICES = 50
ANNOTATION = "autoscaling.knative.dev/"


# Starts


def first_byte(platform: Platform) -> float:
    """Seconds from the connection of a caller to the first byte of the answer; from zero, or not."""
    connection = http.client.HTTPConnection(platform.url.removeprefix("http://"), timeout=120)
    began = time.perf_counter()
    connection.request("POST", "/", json.dumps(SENTENCE), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    seconds = time.perf_counter() - began
    assert reply.status == 200, reply.read()
    connection.close()
    return seconds


def cold(platform: Platform, *, forked: bool) -> dict[str, Any]:
    """One start from zero."""
    platform.wait_for_zero()
    time.sleep(SETTLE_S)
    seconds = first_byte(platform)
    (pod,) = platform.service()["pods"]
    assert pod["forked"] is forked, pod
    assert pod["weights"]["source"] == "cache", pod
    return {"first_byte_s": seconds, "stages": pod["stages"]}


def warm_up(platform: Platform) -> None:
    """Fill the cache, and wait for the fork server."""
    platform.wait_for_zero()
    platform.encode()
    end = time.monotonic() + 120
    while (server := call(f"{platform.admin}/api/status")["fork_server"]) and not server["warm"]:
        if time.monotonic() > end:
            raise SystemExit("the fork server was not warm within 120 s")
        time.sleep(0.1)


def starts(rounds: int) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {"fork server": [], "fresh process": []}
    with tempfile.TemporaryDirectory(prefix="relight-bench-") as folder, ExitStack() as running:
        platforms = {}
        for name, options in (("fork server", []), ("fresh process", ["--no-fork-server"])):
            state = Path(folder) / name.replace(" ", "-")
            state.mkdir()
            platforms[name] = Platform(state, *options)
            running.callback(platforms[name].stop)
            warm_up(platforms[name])
        for number in range(rounds):
            for name, platform in platforms.items():
                # The other one has no pod meanwhile, and nothing else starts.
                for other in platforms.values():
                    other.wait_for_zero()
                found[name].append(cold(platform, forked=name == "fork server"))
            forked, fresh = (found[name][-1]["first_byte_s"] for name in found)
            print(f"round {number + 1}: forked {forked:.3f} s, fresh {fresh:.3f} s, ratio {forked / fresh:.3f}", file=sys.stderr)
    return found


def starts_table(found: dict[str, list[dict[str, Any]]]) -> str:
    rounds = len(found["fork server"])
    values = {name: [start["first_byte_s"] for start in starts] for name, starts in found.items()}
    ratios = [forked / fresh for forked, fresh in zip(values["fork server"], values["fresh process"], strict=True)]
    stages = sorted(found["fork server"][0]["stages"], key=lambda name: found["fork server"][0]["stages"][name])
    lines = [
        f"| seconds from zero, median (min–max) of {rounds} rounds | fork server | fresh process |",
        "| --- | ---: | ---: |",
        "| **first byte at the caller** | " + " | ".join(spread(values[name], ".3f") for name in found) + " |",
        *(
            f"| {stage} ended after | "
            + " | ".join(spread([start["stages"][stage] for start in found[name]], ".3f") for name in found)
            + " |"
            for stage in stages
        ),
        "",
        f"Ratio of the first bytes, in turn: {spread(ratios, '.3f')}. Wanted: ≤ {TARGET_S} s and ≤ {TARGET_RATIO}; "
        + verdict(statistics.median(values["fork server"]) <= TARGET_S and statistics.median(ratios) <= TARGET_RATIO),
    ]
    return "\n".join(lines)


# The way of a request, and doing nothing


def echo(name: str, scale: Mapping[str, str], env: Mapping[str, str]) -> dict[str, Any]:
    """A Service of the echo agent."""
    container = {
        "name": "function",
        "command": ["python", "-m", "function"],
        "ports": [{"containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/readyz"}},
        "env": [{"name": key, "value": value} for key, value in {"FUNCTION_AGENT": "function.agents.echo:Echo", **env}.items()],
    }
    annotations = {ANNOTATION + key: value for key, value in scale.items()}
    template = {"metadata": {"annotations": annotations}, "spec": {"containers": [container]}}
    return {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": {"name": name}, "spec": {"template": template}}


class Running:
    """`relight run` on manifests of our own."""

    def __init__(self, services: Sequence[Mapping[str, Any]], state: Path) -> None:
        self.port, admin = free_ports(2)
        self._status = f"http://127.0.0.1:{admin}/api/status"
        data = {"allow-zero-initial-scale": "true"}
        cluster = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "config-autoscaler"}, "data": data}
        (state / "manifests.yaml").write_text(yaml.safe_dump_all([*services, cluster]))
        ports = ["--port", str(self.port), "--admin-port", str(admin)]
        command = [str(BIN / "relight"), "run", str(state / "manifests.yaml"), *ports, "--state-dir", str(state)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)

    def status(self) -> Any:
        return call(self._status)

    def wait_for(self, what: str, probe: Callable[[Any], bool]) -> Any:
        """The status document, as soon as `probe` says so of it."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                if probe(found := self.status()):
                    return found
            time.sleep(0.1)
        raise SystemExit(f"{what}: not within 120 s")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@contextlib.contextmanager
def running(services: Sequence[Mapping[str, Any]]) -> Iterator[Running]:
    with tempfile.TemporaryDirectory(prefix="relight-bench-") as folder:
        platform = Running(services, Path(folder))
        try:
            yield platform
        finally:
            platform.stop()


def load(port: int, bodies: Path, concurrency: int) -> dict[str, Any]:
    """What the clients found; every answer was a good one."""
    command = [sys.executable, str(ROOT / "bench/load_http.py"), str(port), PREDICT, str(bodies)]
    command += ["--concurrency", str(concurrency), "--seconds", str(LOAD_S)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert set(found["statuses"]) == {"200"}, found
    assert not found["broken"], found
    return found


def way(rounds: int) -> list[dict[str, Any]]:
    service = echo("echo", {"min-scale": "1", "max-scale": "1"}, {"FUNCTION_ACCESS_LOG": "false"})
    found = []
    with running([service]) as platform, tempfile.TemporaryDirectory() as folder:
        bodies = Path(folder) / "bodies"
        bodies.write_text(json.dumps(SENTENCE) + "\n")
        status = platform.wait_for(
            "a pod and the fork server", lambda found: found["services"][0]["state"] == "ready" and found["fork_server"]["warm"]
        )
        pod = int(status["services"][0]["pods"][0]["address"].rpartition(":")[2])
        for number in range(rounds):
            row: dict[str, Any] = {}
            for concurrency in (1, CROWD):
                for name, port in (("pod", pod), ("activator", platform.port)):
                    row[f"{name} at {concurrency}"] = load(port, bodies, concurrency)
            found.append(row)
            added, rate = added_ms(row), row[f"activator at {CROWD}"]["per_second"]
            print(f"round {number + 1}: {added:.3f} ms added, {rate:.0f} requests/s", file=sys.stderr)
    return found


def added_ms(row: Mapping[str, Any]) -> float:
    """Of the medians at concurrency 1."""
    added: float = row["activator at 1"]["p50_ms"] - row["pod at 1"]["p50_ms"]
    return added


def way_table(found: Sequence[Mapping[str, Any]]) -> str:
    def row(title: str, concurrency: int, key: str, form: str) -> str:
        direct, through = ([one[f"{name} at {concurrency}"][key] for one in found] for name in ("pod", "activator"))
        ratios = [theirs / ours for ours, theirs in zip(direct, through, strict=True)]
        return f"| {title} | {spread(direct, form)} | {spread(through, form)} | {spread(ratios, '.2f')} |"

    added = [added_ms(one) for one in found]
    rates = [one[f"activator at {CROWD}"]["per_second"] for one in found]
    lines = [
        f"| echo, median (min–max) of {len(found)} rounds | the pod itself | through the activator | ratio |",
        "| --- | ---: | ---: | ---: |",
        row("p50 at concurrency 1, ms", 1, "p50_ms", ".3f"),
        row("p99 at concurrency 1, ms", 1, "p99_ms", ".3f"),
        row(f"requests/s at concurrency {CROWD}", CROWD, "per_second", ".0f"),
        row(f"client's share of a core at {CROWD}", CROWD, "client_cpu_share", ".2f"),
        "",
        f"Added at the median: {spread(added, '.3f')} ms. Wanted: ≤ {TARGET_ADDED_MS:g} ms and ≥ {TARGET_PER_SECOND} requests/s; "
        + verdict(statistics.median(added) <= TARGET_ADDED_MS and statistics.median(rates) >= TARGET_PER_SECOND),
    ]
    return "\n".join(lines)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss_bytes(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024


def idle() -> dict[str, Any]:
    """One that is called is among them, so that its pod comes and goes, and what that leaves behind is counted."""
    store = {"AWS_ENDPOINT_URL": "http://object-store.relight.localhost"}
    names = [f"idle-{number}" for number in range(IDLE_SERVICES)]
    with running([echo(name, {"initial-scale": "0", "window": "6s"}, store) for name in names]) as platform:
        platform.wait_for("the platform", bool)
        call(f"http://127.0.0.1:{platform.port}{PREDICT}", SENTENCE)  # for the first of them
        platform.wait_for("no pods, and the fork server", lambda found: found["fork_server"]["warm"] and not found["services"][0]["pods"])
        time.sleep(SETTLE_S)
        pid = platform.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        before, began = cpu_seconds(pid), time.monotonic()
        time.sleep(WATCH_S)
        return {
            "core": (cpu_seconds(pid) - before) / (time.monotonic() - began),
            "pss_bytes": pss_bytes(pid),
            "children_pss_bytes": [pss_bytes(int(child)) for child in children],
        }


def idle_table(found: Mapping[str, Any]) -> str:
    children = " and ".join(f"{size / 1e6:.0f}" for size in found["children_pss_bytes"])
    return (
        f"{IDLE_SERVICES} idle Services: {found['core']:.2%} of a core, {found['pss_bytes'] / 1e6:.0f} MB (PSS) for the platform's process;"
        f" the store and the fork server beside it have {children} MB. Wanted: ≤ {TARGET_CORE:.0%} and ≤ {TARGET_BYTES / 1e6:.0f} MB; "
        + verdict(found["core"] <= TARGET_CORE and found["pss_bytes"] <= TARGET_BYTES)
    )


def verdict(holds: bool) -> str:
    return "holds." if holds else "MISSED."


def measure(rounds: int) -> dict[str, Any]:
    return {"way": way(rounds), "idle": idle(), "starts": starts(rounds)}


def table(found: dict[str, Any]) -> str:
    parts = [way_table(found["way"]), idle_table(found["idle"]), starts_table(found["starts"]), f"{machine()}."]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main(__doc__, measure, table)
