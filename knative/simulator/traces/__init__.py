"""Traces of requests, in the formats that exist: one module for each.

    trace = open_trace("azure_llm_2023_first30min.csv", function="code")
    for arrivals in trace.chunks(): ...

Requests that were logged one by one are taken as they are. Where a file only tells how many there were in a window, arrivals are sampled,
the same ones for the same seed, and the trace's `notes` say so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from knative.simulator.traces import access_log, azure, counts, prometheus, servegen, synthetic
from knative.simulator.traces.errors import BadTrace, NoFunctions
from knative.simulator.traces.opened import OpenTrace
from knative.simulator.traces.text import SNIFF_LINES, Head, read_head

__all__ = ["BadTrace", "NoFunctions", "OpenTrace", "open_trace"]


class Format(Protocol):
    """What each module of a format has."""

    LOOKS: str

    def is_it(self, head: Head) -> bool:
        """Whether a file that begins so has this format."""

    def open_trace(self, path: Path, head: Head, function: str | None, seed: int) -> OpenTrace:
        """See `open_trace` below."""


_FORMATS: tuple[Format, ...] = (azure, counts, servegen, prometheus, access_log)


def open_trace(path: str | Path, *, function: str | None = None, seed: int = 0) -> OpenTrace:
    """The trace in a file, or the one that `synthetic:KIND?…` describes; which format it is, is seen from its first lines.

    function: whose requests, where the file has several functions'; None takes all of them as requests of one.
    seed: of what is sampled.
    Raises BadTrace if the file cannot be read or is in no known format, NoFunctions if it has none to choose from; what is wrong further
    down is raised on the way.
    """
    if str(path).startswith(synthetic.PREFIX):
        if function is not None:
            raise NoFunctions(str(path), f"it has no functions to choose {function!r} from")
        return synthetic.open_trace(str(path), seed)
    path = Path(path)
    head = read_head(path)
    for form in _FORMATS:
        if form.is_it(head):
            return form.open_trace(path, head, function, seed)
    raise BadTrace(path, _not_known(head))


def _not_known(head: Head) -> str:
    known = "; ".join(form.LOOKS for form in _FORMATS)
    found = f"it begins with {head.lines[0][:80]!r}" if head.lines else "it is empty"
    return f"in no known format: {found}, and there is nothing known in its first {SNIFF_LINES} lines. Known are {known}; {synthetic.LOOKS}"
