"""How many requests there were in each window: `t_s,requests`, as load balancers count them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from knative.simulator.traces import text
from knative.simulator.traces.errors import BadTrace
from knative.simulator.traces.opened import OpenTrace
from knative.simulator.traces.windows import MOST, Window, known_only, sampled

COLUMNS = ("t_s", "requests")
LOOKS = f"requests counted by window ({','.join(COLUMNS)})"


def is_it(head: text.Head) -> bool:
    """Whether a file that begins so is one of these."""
    return head.columns == COLUMNS


def open_trace(path: Path, head: text.Head, function: str | None, seed: int) -> OpenTrace:
    """The trace: as many requests in each window as the file says, at times that are sampled. Raises BadTrace."""
    text.chosen(path, function, ())
    windows: list[Window] = []
    for line, (t_s, requests) in text.rows(path, COLUMNS):
        start_s, count = text.number(path, line, "t_s", t_s), text.whole(path, line, "requests", requests)
        if windows and start_s <= windows[-1].start_s:
            raise BadTrace(path, f"t_s = {t_s}, must be later than the row before", line)
        if count > MOST:
            raise BadTrace(path, f"requests = {count}, must be at most {MOST}", line)
        windows.append(Window(start_s, 0.0, 0.0, count))
    length_s = _length(path, windows)
    windows, left_out = known_only([Window(window.start_s, length_s, 0.0, window.requests) for window in windows], length_s)
    notes = [f"times within each window of {length_s:g} s are sampled (seed {seed}); the file has counts"]
    if left_out:
        notes.append(f"{left_out:g} s of missing windows are unknown, not zero: the clock passes over them")
    return OpenTrace(path.name, lambda: sampled(windows, seed), tuple(notes), len(windows) * length_s)


def _length(path: Path, windows: Sequence[Window]) -> float:
    """Of a window: the shortest step from one to the next. Raises BadTrace if there are not two."""
    if len(windows) < 2:
        raise BadTrace(path, "needs two rows at least, from which the length of a window is seen")
    return min(after.start_s - before.start_s for before, after in pairwise(windows))
