"""What Prometheus answers to a range query for a rate of requests: `/api/v1/query_range?query=sum(rate(…_requests_total[1m]))&step=60`.

The value at a time is taken for the rate of the step that ends there. Where there is none, the rate is not known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from knative.simulator.traces import text
from knative.simulator.traces.errors import BadTrace
from knative.simulator.traces.opened import OpenTrace
from knative.simulator.traces.windows import MOST, Window, known_only, sampled

LOOKS = 'a range query\'s answer from Prometheus ({"status":"success","data":{"resultType":"matrix", …}})'


def is_it(head: text.Head) -> bool:
    """Whether a file that begins so is one of these."""
    return head.text.lstrip().startswith("{") and '"resultType"' in head.text[:4096]


def open_trace(path: Path, head: text.Head, function: str | None, seed: int) -> OpenTrace:
    """The trace of one series, or of all together; sampled as a Poisson process with that rate. Raises BadTrace."""
    series = dict(_series(path))
    text.chosen(path, function, list(series))
    times = sorted({time for values in series.values() for time, _ in values})
    if len(times) < 2:
        raise BadTrace(path, "needs two values at least, from which the step is seen")
    step_s = min(after - before for before, after in pairwise(times))
    windows = []
    for name, values in series.items():
        if function not in (None, name):
            continue
        for time, rate in values:
            if rate * step_s > MOST:
                problem = f"{name}: {rate:g} requests/s at {time:g}, must be at most {MOST / step_s:g}"
                raise BadTrace(path, f"{problem}; ask for a rate, such as rate(requests_total[1m]), not for the counter itself")
            windows.append(Window(time - step_s, step_s, rate, function=name))
    if not windows:
        raise BadTrace(path, "there is no value in it that is a number")
    windows, left_out = known_only(windows, step_s)
    notes = [f"arrivals are sampled (seed {seed}) as a Poisson process: the file has rates in steps of {step_s:g} s, not requests"]
    if left_out:
        notes.append(f"{left_out:g} s without a value are unknown, not zero: the clock passes over them")
    name = path.name if function is None else f"{path.name}:{function}"
    return OpenTrace(name, lambda: sampled(windows, seed), tuple(notes), max(window.start_s for window in windows) + step_s)


def _series(path: Path) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Each series' name and its values, NaNs left out. Raises BadTrace if the file is not such an answer."""
    with text.opened(path) as file:
        try:
            document = json.load(file)
        except (ValueError, RecursionError) as err:
            raise BadTrace(path, f"not JSON: {err}", getattr(err, "lineno", None)) from None
    data = document.get("data")  # the file begins with a brace
    if document.get("status") != "success" or not isinstance(data, dict):
        raise BadTrace(path, f"it is not a successful answer: status = {document.get('status')!r}, error = {document.get('error')!r}")
    if data.get("resultType") != "matrix":
        raise BadTrace(path, f"resultType = {data.get('resultType')!r}, must be 'matrix': ask /api/v1/query_range")
    for at, one in enumerate(data.get("result") or ()):
        try:
            labels = {str(name): str(value) for name, value in one["metric"].items() if name != "__name__"}
            values = [(float(time), float(value)) for time, value in one["values"]]
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise BadTrace(path, f'data.result[{at}]: must have metric and values of [time, "number"]: {err!r}') from None
        name = ",".join(f"{name}={value}" for name, value in sorted(labels.items())) or "all"
        known = [(time, value) for time, value in values if math.isfinite(value)]
        if wrong := next((pair for pair in known if pair[1] < 0), None):
            raise BadTrace(path, f"data.result[{at}]: {wrong[1]:g} requests/s at {wrong[0]:g}, must be at least 0")
        yield name, known
