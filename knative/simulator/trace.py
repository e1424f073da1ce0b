"""What arrives: requests by time, in chunks of arrays, so that a week of them never has to be in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knative.simulator.errors import TraceError

CHUNK = 65_536  # requests; what a reader should hand over at a time


class Arrivals(NamedTuple):
    """A chunk of requests, sorted by time, none before those of the chunk before. All arrays have one length; see `arrivals`."""

    t_s: NDArray[np.float64]  # seconds from the start of the trace, at least 0
    prompt_tokens: NDArray[np.int64]  # 0: unknown
    output_tokens: NDArray[np.int64]  # 0: unknown
    service_s: NDArray[np.float64]  # seconds that a pod takes alone, as measured; nan: unknown, the model decides


Trace = Iterable[Arrivals]
Source = Callable[[], Iterator[Arrivals]]  # a trace that can be read from its start again


def arrivals(
    t_s: ArrayLike,
    prompt_tokens: ArrayLike | None = None,
    output_tokens: ArrayLike | None = None,
    service_s: ArrayLike | None = None,
) -> Arrivals:
    """A chunk of requests at `t_s`, with what is not given left unknown."""
    times = np.asarray(t_s, dtype=np.float64)
    return Arrivals(
        times,
        np.zeros(len(times), np.int64) if prompt_tokens is None else np.asarray(prompt_tokens, np.int64),
        np.zeros(len(times), np.int64) if output_tokens is None else np.asarray(output_tokens, np.int64),
        np.full(len(times), np.nan) if service_s is None else np.asarray(service_s, np.float64),
    )


def in_chunks(whole: Arrivals, size: int = CHUNK) -> Iterator[Arrivals]:
    """`whole` in chunks of at most `size` requests."""
    for begin in range(0, len(whole.t_s), size):
        yield Arrivals._make(column[begin : begin + size] for column in whole)


def checked(trace: Trace) -> Iterator[Arrivals]:
    """The chunks of `trace` that are not empty. Raises TraceError where one is not in order: that would spoil every average."""
    last = 0.0
    for chunk in trace:
        times = chunk.t_s
        if not len(times):
            continue
        if not np.isfinite(times).all() or times[0] < last or (np.diff(times) < 0).any():
            raise TraceError(f"the trace goes back in time, or holds a time below 0 or none at all, after t = {last:g} s")
        last = float(times[-1])
        yield chunk
