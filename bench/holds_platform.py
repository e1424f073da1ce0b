"""What ordinary callers and watchers of `relight run` see while others are slow, idle or half gone. Prints the tables of docs/limits.md.

The agent takes 20 ms for a batch, so that it bounds the rate: what is lost of it, the others have taken. Each kind of disturbance is on
and off by turns; the figures are medians of the windows. Then what is kept of bodies whose callers wait for a pod that does not come.
About 6 minutes; loopback only.

    .venv/bin/python bench/holds_platform.py [--rounds 3] [--seconds 3]
"""

import argparse
import contextlib
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

from bench.common import free_ports, machine  # noqa: E402  found through the line above
from tests.function.disturbances import AGENT, CALLERS, KINDS, Seen, disturbed  # noqa: E402
from tests.function.disturbances import look as calls_and_probes  # noqa: E402
from tests.support import BIN, clean_environment, request, wait_until  # noqa: E402

SETTLE_S = 3.0
PROBE_S = 0.02
WAITING, WAITING_BYTES = 200, 20_000_000
MANIFEST = """
apiVersion: serving.knative.dev/v1
kind: Service
metadata: {name: m}
spec:
  template:
    metadata: {annotations: {autoscaling.knative.dev/min-scale: "1", autoscaling.knative.dev/max-scale: "1"}}
    spec:
      containers:
        - name: function
          command: [python, -m, function]
          env:
            - {name: FUNCTION_AGENT, value: "holds_agent:Agent"}
            - {name: FUNCTION_MODEL_NAME, value: m}
            - {name: FUNCTION_ACCESS_LOG, value: "false"}
            - {name: PYTHONPATH, value: "FOLDER"}
          readinessProbe: {httpGet: {path: /readyz}}
"""


class Running:
    """One platform, what it says, and whether somebody reads that."""

    def __init__(self, folder: Path, files: int | None = None, agent: str = AGENT) -> None:
        folder.mkdir()
        (folder / "holds_agent.py").write_text(agent)
        (folder / "m.yaml").write_text(MANIFEST.replace("FOLDER", str(folder)))
        self.port, self.admin = free_ports(2)
        self.lines = 0
        self.is_read = threading.Event()
        self.is_read.set()
        command = [str(BIN / "relight"), "run", str(folder / "m.yaml"), "--port", str(self.port), "--admin-port", str(self.admin)]
        self.process = subprocess.Popen(
            [*command, "--state-dir", str(folder / "state"), "--no-fork-server"],
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        while self.is_read.wait() and (piece := os.read(self.process.stdout.fileno(), 65536)):
            self.lines += piece.count(b"\n")

    def ready(self) -> "Running":
        """Itself, once its pod is."""
        wait_until("ready", lambda: request(self.port, "GET", "/readyz").status == 200)
        return self

    def memory_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS:"))

    def end(self) -> None:
        self.is_read.set()
        self.process.terminate()
        self.process.wait(60)


@contextmanager
def platform(files: int | None = None, agent: str = AGENT) -> Iterator[Running]:
    with tempfile.TemporaryDirectory(prefix="relight-bench-") as name:
        running = Running(Path(name) / "platform", files, agent)
        try:
            yield running
        finally:
            running.end()


@contextmanager
def unread(running: Running) -> Iterator[None]:
    """Nobody reads what it says, of which there is enough to fill the pipe."""
    running.is_read.clear()
    for _ in range(400):
        running.process.send_signal(1)  # SIGHUP: the manifests are read again, and that is said
        time.sleep(0.01)
    yield
    running.is_read.set()


def look(running: Running, seconds: float) -> Seen:
    """Call and watch for so long."""
    return calls_and_probes(running.port, seconds, "/api/status", running.admin)


def row(what: str, running: Running, rounds: int, seconds: float, *names: str, is_admin: bool = False, is_unread: bool = False) -> str:
    """Windows without and with what disturbs, by turns."""
    pairs, before = [], running.lines
    for _ in range(rounds):
        quiet = look(running, seconds)
        with ExitStack() as stack:
            if is_unread:
                stack.enter_context(unread(running))
            if names:
                stack.enter_context(disturbed(running.admin if is_admin else running.port, *names))
                time.sleep(SETTLE_S)
            pairs.append((quiet, look(running, seconds)))
        time.sleep(1.0)  # until those are gone
    lines = "" if is_unread else str(running.lines - before)
    cells = [
        what,
        f"{statistics.median(quiet.rate for quiet, _ in pairs):.0f}",
        f"{statistics.median(loud.rate for _, loud in pairs):.0f}",
        f"{statistics.median(loud.rate / quiet.rate for quiet, loud in pairs):.2f}",
        f"{statistics.median(quiet.p99_ms for quiet, _ in pairs):.0f}",
        f"{statistics.median(loud.p99_ms for _, loud in pairs):.0f}",
        str(sum(len(loud.failed) for _, loud in pairs)),
        lines,
    ]
    return f"| {' | '.join(cells)} |"


def waiting() -> str:
    """So many callers send so much each, for a pod that does not become ready."""
    slow = AGENT.replace("def load(self, weights, device): pass", "def load(self, weights, device): time.sleep(600)")
    with platform(agent=slow) as running, ExitStack() as stack:
        wait_until("it", lambda: request(running.admin, "GET", "/api/status").status == 200)
        before, sent = running.memory_mb(), 0
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % WAITING_BYTES
        callers = [stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=5)) for _ in range(WAITING)]
        for caller in callers:
            caller.sendall(head)
            caller.setblocking(False)
        for _ in range(100):
            for caller in callers:
                with contextlib.suppress(BlockingIOError):
                    sent += caller.send(bytes(1 << 20))
            time.sleep(0.05)
        status = request(running.admin, "GET", "/api/status").json()["services"][0]
        return (
            f"{status['queued']} callers who wait and send {WAITING_BYTES / 1e6:.0f} MB each: "
            f"{running.memory_mb() - before:.0f} MB more memory, {sent / 1e6:.0f} MB taken from them in all, the kernel's buffers included."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    each = options.rounds, options.seconds
    print(f"{machine()}; {CALLERS} callers, an agent that takes 20 ms for a batch, {each[0]} windows of {each[1]:g} s each.\n")
    print("| | calls/s undisturbed | disturbed | ratio | `/api/status` p99, ms, undisturbed | disturbed | failed | lines said |")
    print("| --- " * 8 + "|")
    idle, half = "idle connections", "half-open connections"
    for files in (None, 1024, 128):
        with platform(files) as running:
            running.ready()
            few = f", `RLIMIT_NOFILE` {files}" if files else ""
            for kind in (idle, half) if files else KINDS:
                print(row(f"{KINDS[kind].count} {kind}{few}", running, *each, kind), flush=True)
            print(row(f"2000 {idle} and 500 {half} at the admin port{few}", running, *each, idle, half, is_admin=True), flush=True)
            if not files:
                print(row("what it says is a pipe that nobody reads", running, *each, is_unread=True), flush=True)
    print(f"\n{waiting()}")


if __name__ == "__main__":
    main()
