"""What can go wrong in this package, and who is told.

annotations, config-autoscaler -> spec      SpecError    the author of the manifest
input file, spec file          -> replay    ReplayError  whoever runs the replay
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the sole need of it, and not worth its time to import
    from pathlib import Path


class AutoscalerError(Exception):
    """Base of every error this package raises on purpose."""


class SpecError(AutoscalerError):
    """A setting that Knative would refuse, or a name that it would silently ignore.

    `name` is the setting as its author wrote it, `value` what was found there, `problem` what is allowed instead.
    """

    def __init__(self, name: str, value: object, problem: str) -> None:
        # A name from a file may hold anything, and the message is to stay one line.
        super().__init__(f"{name if name.isprintable() else repr(name)} = {value!r}, {problem}")
        self.name = name
        self.value = value
        self.problem = problem


class ReplayError(AutoscalerError):
    """A file that cannot be replayed; `line` counts from 1, None when the whole file is meant."""

    def __init__(self, path: Path, problem: str, line: int | None = None) -> None:
        super().__init__(f"{path}: {problem}" if line is None else f"{path}, line {line}: {problem}")
        self.path = path
        self.problem = problem
        self.line = line
