"""Azure's LLM inference traces: one row for each request, with its tokens.

Two forms: as published (`TIMESTAMP,ContextTokens,GeneratedTokens`, github.com/Azure/AzurePublicDataset, CC-BY 4.0; Patel et al., Splitwise,
ISCA 2024), and with several services in one file (`t_s,service,context_tokens,generated_tokens`). There are no latencies in them: how long
a request takes follows from its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np

from knative.simulator.trace import CHUNK, Arrivals, arrivals
from knative.simulator.traces import text
from knative.simulator.traces.errors import BadTrace
from knative.simulator.traces.opened import OpenTrace

PUBLISHED = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MERGED = ("t_s", "service", "context_tokens", "generated_tokens")
LOOKS = f"Azure's LLM traces ({','.join(PUBLISHED)} or {','.join(MERGED)})"


def is_it(head: text.Head) -> bool:
    """Whether a file that begins so is one of these."""
    return head.columns in (PUBLISHED, MERGED)


def open_trace(path: Path, head: text.Head, function: str | None, seed: int) -> OpenTrace:
    """The trace; nothing of it is sampled. Raises BadTrace if there is no such function."""
    if head.columns == PUBLISHED:
        text.chosen(path, function, ())
        return OpenTrace(path.name, lambda: _read(path, _published(path)))
    if function is None:
        return OpenTrace(path.name, lambda: _read(path, _merged(path, None)))
    known = list(dict.fromkeys(cells[1] for _, cells in text.rows(path, MERGED)))
    text.chosen(path, function, known)
    return OpenTrace(f"{path.name}:{function}", lambda: _read(path, _merged(path, function)))


Row = tuple[int, float, int, int]  # the line, the time, tokens in and out


def _read(path: Path, rows: Iterator[Row]) -> Iterator[Arrivals]:
    times: list[float] = []
    tokens: list[tuple[int, int]] = []
    last = 0.0
    for line, t_s, prompt, output in rows:
        if t_s < last:
            raise BadTrace(path, f"goes back in time, by {last - t_s:g} s: sort it first", line)
        last = t_s
        times.append(t_s)
        tokens.append((prompt, output))
        if len(times) == CHUNK:
            yield _arrivals(times, tokens)
            times, tokens = [], []
    if times:
        yield _arrivals(times, tokens)


def _arrivals(times: list[float], tokens: list[tuple[int, int]]) -> Arrivals:
    counts = np.array(tokens, dtype=np.int64)
    return arrivals(np.array(times), prompt_tokens=counts[:, 0], output_tokens=counts[:, 1])


def _merged(path: Path, function: str | None) -> Iterator[Row]:
    for line, (t_s, service, prompt, output) in text.rows(path, MERGED):
        if function in (None, service):
            row = text.number(path, line, "t_s", t_s)
            yield line, row, text.whole(path, line, MERGED[2], prompt), text.whole(path, line, MERGED[3], output)


def _published(path: Path) -> Iterator[Row]:
    """Times from the first row on."""
    began: datetime | None = None
    for line, (timestamp, prompt, output) in text.rows(path, PUBLISHED):
        moment = _moment(path, line, timestamp)
        if began is None:
            began = moment
        try:
            t_s = (moment - began).total_seconds()
        except TypeError:
            raise BadTrace(path, f"TIMESTAMP = {timestamp!r}, must have a time zone in all rows or in none", line) from None
        yield line, t_s, text.whole(path, line, PUBLISHED[1], prompt), text.whole(path, line, PUBLISHED[2], output)


def _moment(path: Path, line: int, timestamp: str) -> datetime:
    """The files have seven digits of a second; Python reads six, and leaves the rest out."""
    try:
        return datetime.fromisoformat(timestamp)
    except ValueError:
        raise BadTrace(path, f"TIMESTAMP = {timestamp!r}, must be like 2023-11-16 18:15:46.6805900", line) from None
