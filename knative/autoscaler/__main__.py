"""`python -m knative.autoscaler replay INPUT.csv --spec SPEC.json`: what Knative's autoscaler would have decided."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from knative.autoscaler.errors import AutoscalerError
from knative.autoscaler.replay import read_samples, read_spec, replay, write_rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0, or 2 for a file that cannot be used, with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m knative.autoscaler", description="Knative's autoscaler (KPA), without a cluster.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("replay", help="decide on recorded samples", description="Print, as CSV, the decision at each tick.")
    command.add_argument("input", metavar="INPUT.csv", type=Path, help="samples: t, concurrency, activator, rps, ready")
    command.add_argument("--spec", metavar="SPEC.json", type=Path, required=True, help="annotations and cluster settings")
    options = parser.parse_args(arguments)
    try:
        spec, initial_ready = read_spec(options.spec)
        write_rows(replay(spec, read_samples(options.input), initial_ready), sys.stdout)
        sys.stdout.flush()
    except AutoscalerError as err:
        print(f"knative.autoscaler: {err}", file=sys.stderr)  # noqa: T201 (a command line's own output)
        return 2
    except BrokenPipeError:
        # The reader has seen enough. Nothing more can be written, so keep the interpreter from trying at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
