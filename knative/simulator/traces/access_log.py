"""The log of our own function (`FUNCTION_ACCESS_LOG`): a line of JSON for each request, among whatever else a container writes.

A request came so long before its answer as the answer took. What it costs a pod is what it took but for its wait in the pod's queue; the
wait for a pod is not in a function's log. Calls that were the caller's mistake (4xx) are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from knative.simulator.trace import CHUNK, Arrivals, arrivals
from knative.simulator.traces import text
from knative.simulator.traces.errors import BadTrace
from knative.simulator.traces.opened import OpenTrace

LOOKS = "a function's log (lines of JSON with time, status and total_s)"

Request = tuple[float, float]  # when it came, what it costs a pod, in seconds


def is_it(head: text.Head) -> bool:
    """Whether a file that begins so is one of these."""
    return any(_line(line) is not None for line in head.lines)


def open_trace(path: Path, head: text.Head, function: str | None, seed: int) -> OpenTrace:
    """The trace; nothing of it is sampled. Raises BadTrace if there is no request in it."""
    text.chosen(path, function, ())
    began, longest = np.inf, 0.0
    for answered, came, _ in _requests(path):
        began, longest = min(began, came), max(longest, answered - came)
    if not np.isfinite(began):
        raise BadTrace(path, "there is no request in it that a function has taken")
    return OpenTrace(path.name, lambda: _read(path, float(began), longest))


def _read(path: Path, began: float, longest_s: float) -> Iterator[Arrivals]:
    """Answers are logged in order. No request that is still to be read came more than `longest_s` before the last answer."""
    held: list[Request] = []
    for answered, came, costs in _requests(path):
        held.append((came - began, costs))
        if len(held) >= 2 * CHUNK:
            held.sort()
            certain = answered - began - longest_s
            count = next((at for at, (came_s, _) in enumerate(held) if came_s >= certain), len(held))
            if count:
                yield _arrivals(held[:count])
                held = held[count:]
    if held:
        yield _arrivals(sorted(held))


def _arrivals(found: list[Request]) -> Arrivals:
    columns = np.array(found)
    return arrivals(columns[:, 0], service_s=columns[:, 1])


def _requests(path: Path) -> Iterator[tuple[float, float, float]]:
    """Of each: when it was answered, when it came, what it cost. Raises BadTrace where the log goes back in time."""
    last = -np.inf
    usual_s = 0.0  # what a request costs that was refused
    with text.opened(path) as file:
        for at, line in enumerate(file, 1):
            if (found := _line(line)) is None:
                continue
            try:
                answered = datetime.fromisoformat(found["time"]).timestamp()
                status, total_s, queue_s = int(found["status"]), float(found["total_s"]), float(found.get("queue_s", 0.0))
                took_s = float(found.get("first_piece_s", total_s))  # the line's time is that of the answer's head
                if not 0 <= queue_s <= total_s < np.inf:
                    raise ValueError("total_s and queue_s must be seconds")
            except (ValueError, TypeError) as err:
                raise BadTrace(path, f"not a request as a function logs it: {err}", at) from None
            if answered < last - 1:  # threads write a line a little after they took its time
                problem = f"goes back in time, by {last - answered:.3f} s: logs of several pods are to be sorted (`sort`) first"
                raise BadTrace(path, problem, at)
            last = max(last, answered)
            if status < 400:
                usual_s = total_s - queue_s
            if not 400 <= status < 500:
                yield last, answered - took_s, total_s - queue_s if status < 400 else usual_s


def _line(line: str) -> dict[str, Any] | None:
    """A request's line, or None."""
    if '"total_s"' not in line:
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None  # cut, or another program's
    return found if isinstance(found, dict) and {"time", "status", "total_s"} <= found.keys() else None
