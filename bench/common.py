"""What the benchmarks share: the peers' virtual environments, the machine in words, medians, what runs beside a measurement."""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

INSTALL_LIMIT_S = 300


class Background:
    """Does something in a thread of its own for the length of a `with`: `work`, which is to return soon after `over` is set."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._thread = threading.Thread(target=self.work, daemon=True)

    def work(self) -> None:
        """What it does; a subclass says."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._thread.join()


def main(about: str | None, measure: Callable[[int], Any], table: Callable[[Any], str]) -> None:
    """A benchmark's command line: `--rounds` of `measure`, printed as `table` makes it, and with `--json` also written as they are."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    found = measure(arguments.rounds)
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


class Failed(Exception):
    """A contender could not be installed or did not fetch; the text says why."""


def make_venv(folder: Path, requirements: Sequence[str], *, sees_project: bool = False, with_dependencies: bool = True) -> Path:
    """The interpreter of a virtual environment that has `requirements`, made unless it is there.

    sees_project: it may import what the project's environment has and it has not.
    """
    python, marker = folder / "bin/python", folder / "requirements.txt"
    wanted = "\n".join([*requirements, f"# of {sys.executable}"])  # whose packages it may see, and which may be gone
    if marker.exists() and marker.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    print(f"making the environment {folder.name}: {' '.join(requirements)}", file=sys.stderr)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    if not with_dependencies:
        install.append("--no-deps")
    for command in ([sys.executable, "-m", "venv", str(folder)], install):
        try:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=INSTALL_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"cannot be installed: not done after {INSTALL_LIMIT_S} s") from None
        if done.returncode:
            raise Failed(f"cannot be installed: {reason(done.stderr)}")
    if sees_project:
        theirs, ours = (next((top / "lib").glob("python*/site-packages")) for top in (folder, Path(sys.prefix)))
        (theirs / "project.pth").write_text(f"{ours}\n")
    marker.write_text(wanted)
    return python


def reason(text: str) -> str:
    """What a program that failed said last: the exception if there is a traceback, else its last line."""
    lines = text.strip().splitlines() or ["no message"]
    after_traceback = text.rpartition("Traceback (most recent call last):\n")[2].splitlines()
    found = next((line for line in after_traceback if line.strip() and not line.startswith(" ")), "") if "Traceback" in text else lines[-1]
    return found.strip().replace("|", "/")[:200]


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{os.cpu_count()} cores, {memory / 2**30:.0f} GiB of memory, Linux {kernel}, Python {platform.python_version()}"
