"""What the sidecar and the node's agent take, and what their probes see, whatever is asked of them. Prints the tables of docs/limits.md.

First 500 addresses, of which half are nowhere, are asked for through the agent's socket, and it is told to end in the middle of pulls from
a store that stalls. Then idle and half-open connections are made to each of their sockets, without a bound on descriptors and with few of
them, while a probe asks for /healthz. About 2 minutes; loopback only.

    .venv/bin/python bench/holds_agent.py [--addresses 500] [--probes 200] [--ends 5]
"""

import argparse
import contextlib
import http.client
import json
import math
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

import boto3  # noqa: E402

from bench.common import machine  # noqa: E402  found through the line above
from tests.support import clean_environment, free_port, request, wait_until  # noqa: E402

AGENT_SOCKET = "agent.sock"
KINDS = {"2000 idle connections": (2000, b""), "500 half-open connections": (500, b"GET /hea")}
LIMITS = (None, 1024, 128)
PAUSE_S = 0.005  # between two probes
SETTLE_S = 1.5  # until a sidecar has read in what it needs to ask the store
STARTED = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class Program:
    """A sidecar or an agent."""

    process: "subprocess.Popen[bytes]"
    port: int
    cache: Path
    log: Path

    def figures(self) -> tuple[float, int, int, int]:
        """MB of memory, descriptors, threads, and metric series."""
        of = Path(f"/proc/{self.process.pid}")
        memory = next(int(line.split()[1]) / 1024 for line in (of / "status").read_text().splitlines() if line.startswith("VmRSS:"))
        lines = request(self.port, "GET", "/metrics").body.decode().splitlines()
        series = sum(not line.startswith("#") for line in lines)
        return memory, len(list((of / "fd").iterdir())), len(list((of / "task").iterdir())), series

    def metric(self, name: str) -> float:
        lines = request(self.port, "GET", "/metrics").body.decode().splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " "))

    def connect(self, door: str) -> socket.socket:
        """A connection to its port, or to the socket of that name."""
        if door == "port":
            return socket.create_connection(("127.0.0.1", self.port), timeout=10)
        found = socket.socket(socket.AF_UNIX)
        found.connect(str(self.cache / door))  # with a time-out it would be an error that others are waiting, too
        found.settimeout(10)
        return found

    def ask(self, method: str, path: str, body: bytes | None = None, *, door: str = AGENT_SOCKET) -> int:
        """The status of an answer."""
        connection = http.client.HTTPConnection("localhost", timeout=10)
        with contextlib.closing(connection):
            connection.sock = self.connect(door)
            connection.request(method, path, body)
            reply = connection.getresponse()
            reply.read()
            return reply.status


@contextlib.contextmanager
def program(endpoint: str, *options: str, uri: str = "", files: int | None = None) -> Iterator[Program]:
    with tempfile.TemporaryDirectory(prefix="relight-") as name:
        port, cache, log = free_port(), Path(name) / "cache", Path(name) / "log"
        ours = {"WEIGHTS_HOST": "127.0.0.1", "WEIGHTS_PORT": str(port), "WEIGHTS_CACHE_DIR": str(cache), "AWS_ENDPOINT_URL": endpoint}
        env = clean_environment(**STARTED, **ours, **({"WEIGHTS_URI": uri} if uri else {}))
        few = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
        command = [sys.executable, "-m", "weights_cache", "serve", *options]
        with log.open("wb") as out, subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, preexec_fn=few) as process:
            found = Program(process, port, cache, log)
            try:
                wait_until("/healthz", lambda: request(port, "GET", "/healthz").status == 200)
                yield found
            finally:
                process.kill()


@contextlib.contextmanager
def store() -> Iterator[str]:
    """The address of an S3 server that is there."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until("the store", lambda: request(port, "GET", "/"))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@contextlib.contextmanager
def stalled() -> Iterator[str]:
    """The address of one that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as door:
        yield f"http://127.0.0.1:{door.getsockname()[1]}"


def ask_for(endpoint: str, addresses: int) -> list[str]:
    """Rows of the table: an agent before and after so many addresses, of which half are nowhere."""
    s3 = boto3.session.Session("test", "test", region_name="us-east-1").client("s3", endpoint_url=endpoint)
    s3.create_bucket(Bucket="models")
    for number in range(0, addresses, 2):
        s3.put_object(Bucket="models", Key=f"m{number}/model.bin", Body=os.urandom(100_000))
    rows = []
    with program(endpoint, "--agent") as agent:
        rows.append(("before", *agent.figures()))
        refused = 0
        for number in range(addresses):
            while agent.ask("POST", "/v1/snapshots", json.dumps({"uri": f"s3://models/m{number}"}).encode()) == 503:
                refused += 1
                time.sleep(0.1)

        def is_over() -> bool:
            return agent.metric("weights_cache_failures_total") + agent.metric("weights_cache_misses_total") == addresses

        wait_until("the last pull", is_over, 600)
        time.sleep(1)
        rows.append((f"after {addresses} addresses, {refused} times refused with 503", *agent.figures()))
    return [f"| {what} | {memory:.1f} | {files} | {threads} | {series} |" for what, memory, files, threads, series in rows]


def end(times: int, options: tuple[str, ...], uri: str) -> list[float]:
    """Seconds from SIGTERM to its end, in the middle of pulls from a store that stalls."""
    took = []
    for _ in range(times):
        with stalled() as endpoint, program(endpoint, *options, uri=uri) as found:
            for number in range(20 if options else 0):
                found.ask("POST", "/v1/snapshots", json.dumps({"uri": f"s3://models/m{number}"}).encode())
            time.sleep(1)
            began = time.monotonic()
            found.process.send_signal(signal.SIGTERM)
            assert found.process.wait(60) == 0
            took.append(time.monotonic() - began)
    return took


@dataclass
class Seen:
    """What probes saw."""

    took_s: list[float] = field(default_factory=list)
    failed: int = 0

    def row(self, what: str, lines: int) -> str:
        ordered = sorted(self.took_s) or [math.nan]
        p99 = ordered[math.ceil(len(ordered) * 0.99) - 1]
        return f"| {what} | {statistics.median(ordered) * 1e3:.1f} | {p99 * 1e3:.1f} | {ordered[-1] * 1e3:.1f} | {self.failed} | {lines} |"


def look(probes: int, ask: Callable[[], int]) -> Seen:
    seen = Seen()
    for _ in range(probes):
        began = time.monotonic()
        try:
            status = ask()
        except (OSError, http.client.HTTPException):
            status = 0
        if status == 200:
            seen.took_s.append(time.monotonic() - began)
        else:
            seen.failed += 1
        time.sleep(PAUSE_S)
    return seen


def disturbed(found: Program, door: str, count: int, sent: bytes, probes: int) -> tuple[Seen, int]:
    """What probes of one of its sockets see while that is disturbed, and how many lines the log has more."""
    before = len(found.log.read_bytes().splitlines())
    with contextlib.ExitStack() as held:
        for _ in range(count):
            sock = held.enter_context(found.connect(door))
            with contextlib.suppress(OSError):  # it may have given way already
                sock.sendall(sent) if sent else None
        seen = look(probes, lambda: found.ask("GET", "/healthz", door=door))
    return seen, len(found.log.read_bytes().splitlines()) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--addresses", type=int, default=500)
    parser.add_argument("--probes", type=int, default=200)
    parser.add_argument("--ends", type=int, default=5)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"{machine()}.\n")
    print("| the agent | memory, MB | descriptors | threads | metric series |")
    print("| --- " * 5 + "|")
    with store() as endpoint:
        print("\n".join(ask_for(endpoint, options.addresses)), flush=True)
    for what, arguments, uri in (("a sidecar", (), "s3://models/m"), ("an agent with 20 asks", ("--agent",), "")):
        took = end(options.ends, arguments, uri)
        print(
            f"\nSIGTERM to the end of {what}, while the store stalls: {statistics.median(took):.2f} s, {max(took):.2f} s at most",
            flush=True,
        )
    print("\n| | `/healthz` p50, ms | p99 | most | failed | lines in the log |")
    print("| --- " * 6 + "|")
    with stalled() as endpoint:
        for name, arguments, uri, door in (
            ("sidecar, port", (), "s3://models/m", "port"),
            ("agent, port", ("--agent",), "", "port"),
            (f"agent, {AGENT_SOCKET}", ("--agent",), "", AGENT_SOCKET),
        ):
            for files in LIMITS:
                with program(endpoint, *arguments, uri=uri, files=files) as found:
                    time.sleep(SETTLE_S)
                    within = f", `RLIMIT_NOFILE` {files}" if files else ""
                    print(look(options.probes, lambda: found.ask("GET", "/healthz", door=door)).row(f"{name}{within}", 0), flush=True)  # noqa: B023
                    for kind, (count, sent) in KINDS.items():
                        print(Seen.row(*_named(disturbed(found, door, count, sent, options.probes), kind)), flush=True)


def _named(found: tuple[Seen, int], kind: str) -> tuple[Seen, str, int]:
    return found[0], f"… {kind}", found[1]


if __name__ == "__main__":
    main()
