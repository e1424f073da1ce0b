"""What ordinary callers and probes of a function see while others are slow, idle or half gone. Prints the table of docs/limits.md.

The agent takes 20 ms for a batch, so that it bounds the rate: what is lost of it, the others have taken. Each kind of disturbance is on
and off by turns; the figures are medians of the windows. About 5 minutes; loopback only.

    .venv/bin/python bench/holds.py [--rounds 5] [--seconds 4]
"""

import argparse
import math
import os
import resource
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

from bench.common import machine  # noqa: E402  found through the line above
from tests.function.disturbances import AGENT, CALLERS, KINDS, Seen, disturbed, look  # noqa: E402
from tests.support import BIN, clean_environment, free_port, request, wait_until  # noqa: E402

FEW_FILES = 256
SETTLE_S = 3.0  # until what slow readers have asked for is made


class Function:
    """One server, whose log is read while `is_read` is set."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.port = port
        self.is_read = threading.Event()
        self.is_read.set()
        self._process = process
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stderr
        while self.is_read.wait() and os.read(self._process.stderr.fileno(), 65536):
            pass

    def ready(self) -> "Function":
        """Itself, once it is."""
        wait_until("ready", lambda: request(self.port, "GET", "/readyz").status == 200)
        return self


@contextmanager
def function(folder: Path, files: int | None = None) -> Iterator[Function]:
    (folder / "holds_agent.py").write_text(AGENT)
    port = free_port()
    env = clean_environment(PYTHONPATH=str(folder), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_MODEL_NAME="m")
    command = [str(BIN / "python"), "-m", "function"]
    few = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
    with subprocess.Popen(
        command, cwd=ROOT, env=env | {"FUNCTION_AGENT": "holds_agent:Agent"}, stderr=subprocess.PIPE, preexec_fn=few
    ) as process:
        found = Function(process, port)
        try:
            yield found.ready()
        finally:
            found.is_read.set()
            process.terminate()


@contextmanager
def unread(server: Function) -> Iterator[None]:
    """Nobody reads its log."""
    server.is_read.clear()
    look(server.port, 1.0)  # until the pipe is full
    yield
    server.is_read.set()


def measured(server: Function, names: tuple[str, ...], rounds: int, seconds: float, *, is_unread: bool = False) -> list[tuple[Seen, Seen]]:
    """Windows without and with what disturbs, by turns."""
    pairs = []
    for number in range(rounds):
        quiet = look(server.port, seconds) if number % 2 == 0 else None
        with ExitStack() as stack:
            if is_unread:
                stack.enter_context(unread(server))
            if names:
                stack.enter_context(disturbed(server.port, *names))
                time.sleep(SETTLE_S)
            loud = look(server.port, seconds)
        pairs.append((quiet or look(server.port, seconds), loud))
    return pairs


def row(what: str, pairs: list[tuple[Seen, Seen]]) -> str:
    quiet, loud = [first for first, _ in pairs], [second for _, second in pairs]
    ratios = [second.rate / first.rate for first, second in pairs]
    rates = f"{statistics.median(one.rate for one in quiet):.0f} | {statistics.median(one.rate for one in loud):.0f}"
    probes = " | ".join(f"{_percentile(kind):.0f}" for kind in (quiet, loud))
    return f"| {what} | {rates} | {statistics.median(ratios):.2f} | {probes} | {sum(len(one.failed) for one in loud)} |"


def _percentile(windows: list[Seen]) -> float:
    """The 99th, in ms, of the probes of a window; the median window's."""
    found = [sorted(one.probes_s) for one in windows]
    return statistics.median(one[math.ceil(len(one) * 0.99) - 1] for one in found) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    print(
        f"{machine()}; {CALLERS} callers, an agent that takes 20 ms for a batch, {options.rounds} windows of {options.seconds:g} s each.\n"
    )
    print("| | calls/s undisturbed | disturbed | ratio | `/healthz` p99, ms, undisturbed | disturbed | failed |")
    print("| --- " * 7 + "|")
    with tempfile.TemporaryDirectory() as name, function(Path(name)) as server, function(Path(name), FEW_FILES) as small:
        everything = tuple(KINDS)
        for kind in everything:
            print(row(f"{KINDS[kind].count} {kind}", measured(server, (kind,), options.rounds, options.seconds)), flush=True)
        idle = measured(small, ("idle connections",), options.rounds, options.seconds)
        print(row(f"2000 idle connections, `RLIMIT_NOFILE` {FEW_FILES}", idle), flush=True)
        print(row("stderr is a pipe that nobody reads", measured(server, (), options.rounds, options.seconds, is_unread=True)), flush=True)
        together = measured(small, everything, options.rounds, options.seconds, is_unread=True)
        print(row(f"all together, `RLIMIT_NOFILE` {FEW_FILES}", together), flush=True)


if __name__ == "__main__":
    main()
