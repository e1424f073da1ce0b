"""What can be wrong with a trace's file."""

from __future__ import annotations

from pathlib import Path

from knative.simulator.errors import TraceError


class BadTrace(TraceError):
    """A trace that cannot be read; `line` counts from 1, None when the whole is meant."""

    def __init__(self, path: str | Path, problem: str, line: int | None = None) -> None:
        text = f"{path}: {problem}" if line is None else f"{path}, line {line}: {problem}"
        super().__init__("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text))  # a file may hold anything
        self.path = path
        self.problem = problem
        self.line = line


class NoFunctions(BadTrace):
    """One of several functions is asked for, and the trace has requests of one only, which has no name."""
