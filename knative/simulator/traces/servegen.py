"""ServeGen's clients: for each and each window the rate, and how uneven the arrivals were (github.com/alibaba/ServeGen, Apache-2.0).

`client,t_s,rate_rps,cv,pattern,arg1,arg2`; Xiang et al., arXiv:2505.09999. The rate and the CV are measured, so these are what is sampled
from; the fit's own parameters (arg1, arg2) are not used.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from knative.simulator.traces import text
from knative.simulator.traces.errors import BadTrace
from knative.simulator.traces.opened import OpenTrace
from knative.simulator.traces.windows import GAMMA, MOST, WEIBULL, Window, known_only, sampled

COLUMNS = ("client", "t_s", "rate_rps", "cv", "pattern", "arg1", "arg2")
LOOKS = f"ServeGen's rates ({','.join(COLUMNS)})"


def is_it(head: text.Head) -> bool:
    """Whether a file that begins so is one of these."""
    return head.columns == COLUMNS


def open_trace(path: Path, head: text.Head, function: str | None, seed: int) -> OpenTrace:
    """The trace of one client, or of all together; sampled. Raises BadTrace."""
    found: list[tuple[str, float, float, float, str, int]] = []
    for line, (client, t_s, rate, cv, pattern, *_) in text.rows(path, COLUMNS):
        if pattern not in ("", GAMMA, WEIBULL):
            raise BadTrace(path, f"pattern = {pattern!r}, must be {GAMMA}, {WEIBULL} or empty", line)
        start_s, rate_rps = text.number(path, line, "t_s", t_s), text.number(path, line, "rate_rps", rate)
        found.append((client, start_s, rate_rps, text.number(path, line, "cv", cv), pattern or GAMMA, line))
    known = list(dict.fromkeys(row[0] for row in found))
    text.chosen(path, function, known)
    starts = sorted({row[1] for row in found})
    if len(starts) < 2:
        raise BadTrace(path, "needs two windows at least, from which their length is seen")
    length_s = min(after - before for before, after in pairwise(starts))
    for *_, rate_rps, _, _, line in found:
        if rate_rps * length_s > MOST:
            raise BadTrace(path, f"rate_rps = {rate_rps:g}, must be at most {MOST / length_s:g} in windows of {length_s:g} s", line)
    windows, left_out = known_only(
        [
            Window(t_s, length_s, rate, cv=cv, pattern=pattern, function=client)
            for client, t_s, rate, cv, pattern, _ in found
            if function in (None, client)
        ],
        length_s,
    )
    notes = [f"arrivals are sampled (seed {seed}): the file has rates and CVs of windows of {length_s:g} s, not requests"]
    if left_out:
        notes.append(f"{left_out:g} s of missing windows are unknown, not zero: the clock passes over them")
    name = path.name if function is None else f"{path.name}:{function}"
    return OpenTrace(name, lambda: sampled(windows, seed), tuple(notes), max(window.start_s for window in windows) + length_s)
