"""Recorded measurements through the autoscaler: a CSV of samples in, a CSV of decisions out.

Input columns: `t` (seconds from the start, not going back), and any of `concurrency` (summed over the pods), `activator` (concurrency at
the activator), `rps` (an empty cell is no sample in that second) and `ready` (ready pods from then on, empty for unchanged).
The spec is a JSON object: `container_concurrency`, `annotations`, `config_autoscaler` and `initial_ready`, each optional.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from knative.autoscaler.autoscaler import Autoscaler
from knative.autoscaler.decide import TICK_S, Decision
from knative.autoscaler.entries import MAX_INT32, parse_number
from knative.autoscaler.errors import ReplayError, SpecError
from knative.autoscaler.spec import ScaleSpec

INPUT_COLUMNS = ("t", "concurrency", "activator", "rps", "ready")
OUTPUT_COLUMNS = ("t", "kind", "ready", "stable", "panic_value", "valid", "desired", "ebc", "panic", "max_panic_pods", "bounded")

# A tick every 2 s from 0 on: dates instead of seconds from the start would mean hundreds of millions of them.
MAX_T_S = 366 * 86400


@dataclass(frozen=True)
class Sample:
    """What was measured at one time; None where nothing was."""

    t: float
    concurrency: float | None = None
    activator: float | None = None
    rps: float | None = None
    ready: int | None = None


@dataclass(frozen=True)
class Row:
    """One tick, or one poke, and what came of it."""

    t: float
    kind: str
    ready: int
    decision: Decision | None  # None: no data, no decision
    panic: bool
    max_panic_pods: int


def replay(spec: ScaleSpec, samples: Iterable[Sample], initial_ready: int = 0) -> Iterator[Row]:
    """Tick at 0, 2, 4 ... up to the last sample's time, and at once after a sample that needs a poke.

    Samples are recorded before a tick of the same time. Raises SpecError if the spec is not for the KPA.
    """
    return _rows(Autoscaler(spec, initial_ready, now=0.0), samples, initial_ready)


def _rows(autoscaler: Autoscaler, samples: Iterable[Sample], ready: int) -> Iterator[Row]:
    def row(t: float, kind: str) -> Row:
        decision = autoscaler.tick(t, ready)
        panic = autoscaler.state.panic
        return Row(t, kind, ready, decision, panic.since is not None, panic.max_pods)

    due, last = 0, None
    for sample in samples:
        while due < sample.t:
            yield row(due, "tick")
            due += TICK_S
        last = sample.t
        if sample.ready is not None:
            ready = sample.ready
        autoscaler.record(sample.t, concurrency=sample.concurrency, rps=sample.rps)
        autoscaler.record(sample.t, concurrency=sample.activator)
        if sample.activator is not None and autoscaler.needs_poke(sample.activator):
            yield row(sample.t, "poke")
    while last is not None and due <= last:
        yield row(due, "tick")
        due += TICK_S


def read_spec(path: Path) -> tuple[ScaleSpec, int]:
    """The spec and the pods ready at the start. Raises ReplayError if the file is not JSON of that form, or a setting is bad."""
    try:
        data = json.loads(_read_text(path))
    except (ValueError, RecursionError) as err:
        raise ReplayError(path, f"not JSON: {err}") from None
    if not isinstance(data, dict):
        raise ReplayError(path, f"expected a JSON object, got {type(data).__name__}")
    known = ("container_concurrency", "annotations", "config_autoscaler", "initial_ready")
    for name in data:
        if name not in known:
            raise ReplayError(path, f"unknown key {name!r}; known are {', '.join(known)}")
    initial_ready = data.get("initial_ready", 0)
    if type(initial_ready) is not int or not 0 <= initial_ready <= MAX_INT32:
        raise ReplayError(path, f"initial_ready = {initial_ready!r}, must be a whole number from 0 to {MAX_INT32}")
    annotations, config = _settings(path, data, "annotations"), _settings(path, data, "config_autoscaler")
    try:
        spec = ScaleSpec.parse(annotations, data.get("container_concurrency", 0), config)
    except SpecError as err:
        raise ReplayError(path, str(err)) from err
    return spec, initial_ready


def read_samples(path: Path) -> list[Sample]:
    """All samples of an input file. Raises ReplayError, which names the line, if it is not one."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        _check_header(path, header)
        samples: list[Sample] = []
        for cells in reader:
            if cells:
                samples.append(_sample(path, reader.line_num, header, cells))
                if len(samples) > 1 and samples[-1].t < samples[-2].t:
                    raise ReplayError(path, f"t = {samples[-1].t:g} goes back from {samples[-2].t:g}", reader.line_num)
    except csv.Error as err:
        raise ReplayError(path, f"not CSV: {err}", reader.line_num) from None
    return samples


def write_rows(rows: Iterable[Row], out: TextIO) -> None:
    """The rows as CSV with a header. Cells that only a decision has are empty without one."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(OUTPUT_COLUMNS)
    for row in rows:
        made = row.decision
        averages = (_text(made.stable), _text(made.panic_value)) if made else ("", "")
        counts = (made.desired, made.excess_burst_capacity) if made else ("", "")
        state = (_text(row.panic), row.max_panic_pods)
        bounded = made.bounded if made else ""
        writer.writerow((_text(row.t), row.kind, row.ready, *averages, _text(made is not None), *counts, *state, bounded))


def _text(value: float) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if value == int(value) else repr(value)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as err:
        raise ReplayError(path, err.strerror or str(err)) from None
    except UnicodeDecodeError as err:
        raise ReplayError(path, f"not UTF-8: {err.reason} at byte {err.start}") from None


def _settings(path: Path, data: dict[str, Any], key: str) -> dict[str, str]:
    settings = data.get(key, {})
    if not isinstance(settings, dict):
        raise ReplayError(path, f"{key} must be a JSON object of names and strings, got {type(settings).__name__}")
    return settings


def _check_header(path: Path, header: list[str]) -> None:
    for column in header:
        if column not in INPUT_COLUMNS:
            raise ReplayError(path, f"unknown column {column!r}; known are {', '.join(INPUT_COLUMNS)}", 1)
        if header.count(column) > 1:
            raise ReplayError(path, f"column {column!r} is there twice", 1)
    if "t" not in header:
        raise ReplayError(path, "there is no column 't'", 1)


def _sample(path: Path, line: int, header: list[str], cells: list[str]) -> Sample:
    if len(cells) != len(header):
        raise ReplayError(path, f"expected {len(header)} cells, got {len(cells)}", line)
    values: dict[str, float] = {}
    for column, cell in zip(header, cells, strict=True):
        if cell.strip():
            try:
                values[column] = _number(column, cell)
            except ValueError as err:
                raise ReplayError(path, f"{column} = {cell!r}, {err}", line) from None
    if "t" not in values:
        raise ReplayError(path, "t is empty", line)
    ready = values.pop("ready", None)
    return Sample(**values, ready=None if ready is None else int(ready))


def _number(column: str, cell: str) -> float:
    """The value of a cell. Raises ValueError with what is allowed there."""
    try:
        value = parse_number(cell.strip())
    except ValueError:
        raise ValueError("must be a finite number") from None
    if column == "t" and not 0 <= value <= MAX_T_S:
        raise ValueError(f"must be seconds from the start, from 0 to {MAX_T_S}")
    if column == "ready" and not (value == int(value) and 0 <= value <= MAX_INT32):
        raise ValueError(f"must be a whole number from 0 to {MAX_INT32}")
    return value
