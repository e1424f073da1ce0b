"""Reading text and CSV line by line, with errors that name the line."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from knative.simulator.traces.errors import BadTrace, NoFunctions

SNIFF_LINES = 100
SNIFF_CHARACTERS = 65536


@dataclass(frozen=True)
class Head:
    """How a file begins."""

    text: str
    lines: Sequence[str]

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the first line, if it is a CSV's."""
        return tuple(self.lines[0].split(",")) if self.lines else ()


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """The file as text. Raises BadTrace where it cannot be read or is not UTF-8."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except OSError as err:
        raise BadTrace(path, err.strerror or str(err)) from None
    except UnicodeDecodeError as err:
        raise BadTrace(path, f"not UTF-8: {err.reason}") from None


def read_head(path: Path) -> Head:
    """The first lines of a file. Raises BadTrace if it cannot be read."""
    with opened(path) as file:
        text = file.read(SNIFF_CHARACTERS)
    return Head(text, text.splitlines()[:SNIFF_LINES])


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The rows below a CSV's header with their line numbers. Raises BadTrace for one that has not as many cells as there are columns."""
    with opened(path) as file:
        reader = csv.reader(file, strict=True)
        try:
            next(reader, None)
            for cells in reader:
                if len(cells) != len(columns):
                    if not cells:
                        continue
                    raise BadTrace(path, f"expected {len(columns)} cells ({','.join(columns)}), got {len(cells)}", reader.line_num)
                yield reader.line_num, cells
        except csv.Error as err:
            raise BadTrace(path, f"not CSV: {err}", reader.line_num) from None


def number(path: Path, line: int, column: str, cell: str, *, low: float = 0.0) -> float:
    """A cell's value. Raises BadTrace if it is not a finite number of at least `low`."""
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= low):
        raise BadTrace(path, f"{column} = {cell!r}, must be a finite number of at least {low:g}", line)
    return value


def whole(path: Path, line: int, column: str, cell: str) -> int:
    """The same of a count. Raises BadTrace if it is not a whole number of at least 0."""
    value = int(cell) if cell.isascii() and cell.isdigit() and len(cell) <= 12 else -1
    if value < 0:
        raise BadTrace(path, f"{column} = {cell!r}, must be a whole number from 0 to 999999999999", line)
    return value


def chosen(path: Path, function: str | None, known: Sequence[str]) -> None:
    """Raises BadTrace if that function is asked for and not among those that the file has; NoFunctions where none has a name."""
    if function is None or function in known:
        return
    if not known:
        raise NoFunctions(path, f"no function {function!r}; it has one, which has no name")
    raise BadTrace(path, f"no function {function!r}; it has {', '.join(known)}")
