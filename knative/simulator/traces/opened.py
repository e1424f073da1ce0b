"""A trace that is open: its name, what was done to it, and its requests as often as they are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from knative.simulator.trace import Arrivals, Source


@dataclass(frozen=True)
class OpenTrace:
    """Requests in order of time. Each iteration reads, or samples, the same ones anew, a chunk at a time."""

    name: str
    read: Source
    notes: tuple[str, ...] = ()  # what in it is not measured: to be said with every result
    duration_s: float | None = None  # where it is known without reading it; the last request comes before

    def __iter__(self) -> Iterator[Arrivals]:
        return self.read()

    def part(self, begin_s: float, end_s: float) -> OpenTrace:
        """What comes from `begin_s` on and before `end_s`, as a trace that starts at 0."""

        def read() -> Iterator[Arrivals]:
            for chunk in self.read():
                if len(chunk.t_s) and chunk.t_s[0] >= end_s:
                    return
                first, last = np.searchsorted(chunk.t_s, (begin_s, end_s))
                if first < last:
                    found = Arrivals._make(column[first:last] for column in chunk)
                    yield found._replace(t_s=found.t_s - begin_s)

        return OpenTrace(f"{self.name} from {begin_s:g} s to {end_s:g} s", read, self.notes, end_s - begin_s)

    def span_s(self) -> float:
        """How long it is: what is known, or the time of the last request, which reads it once."""
        if self.duration_s is not None:
            return self.duration_s
        return max((float(chunk.t_s[-1]) for chunk in self if len(chunk.t_s)), default=0.0)
