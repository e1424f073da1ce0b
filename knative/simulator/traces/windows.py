"""Arrivals from what is known of windows: how many requests there were, or their rate and how uneven it was.

A window that is not known is not zero. It is left out of the clock, which goes on at the next known one; inventing traffic for it would be
no better than inventing silence.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from knative.simulator.trace import CHUNK, Arrivals, arrivals

MOST = 10_000_000  # requests in one window; more is a mistake of units, and would not fit into memory
GAMMA, WEIBULL = "Gamma", "Weibull"

Times = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Window:
    """Part of a function's traffic. cv: coefficient of variation of the gaps between requests; 1 is a Poisson process."""

    start_s: float
    length_s: float
    rate_rps: float
    requests: int | None = None  # exactly so many, at any time within the window
    cv: float = 1.0
    pattern: str = GAMMA  # how the gaps are distributed
    function: str = ""


def known_only(windows: Sequence[Window], length_s: float) -> tuple[list[Window], float]:
    """The windows on a clock from 0 that passes over what is not known between them, and how many seconds that is. They are in order."""
    starts = sorted({window.start_s for window in windows})
    moved, left_out = {starts[0]: 0.0}, 0.0
    for before, after in pairwise(starts):
        left_out += max(0.0, after - before - length_s)
        moved[after] = after - starts[0] - left_out
    return [replace(window, start_s=moved[window.start_s]) for window in windows], left_out


def sampled(windows: Sequence[Window], seed: int) -> Iterator[Arrivals]:
    """Requests in all windows, in order of time. What is sampled for a window depends on the seed, its function and its start alone."""
    ready: list[Times] = []
    for _, together in groupby(sorted(windows, key=lambda window: window.start_s), key=lambda window: window.start_s):
        ready.append(np.sort(np.concatenate([_sample(window, seed) for window in together]), kind="stable"))
        if sum(map(len, ready)) >= CHUNK:
            yield arrivals(np.concatenate(ready))
            ready = []
    if sum(map(len, ready)):
        yield arrivals(np.concatenate(ready))


def _sample(window: Window, seed: int) -> Times:
    if window.requests == 0 or (window.requests is None and window.rate_rps == 0):
        return np.empty(0)
    rng = np.random.default_rng([seed, zlib.crc32(window.function.encode()), round(window.start_s * 1000)])
    if window.requests is not None:
        within = rng.random(window.requests) * window.length_s
    elif window.cv == 1:
        within = rng.random(rng.poisson(window.rate_rps * window.length_s)) * window.length_s
    else:
        within = _renewal(window, rng)
    return window.start_s + np.sort(within)


def _renewal(window: Window, rng: np.random.Generator) -> Times:
    """Gaps with the window's mean and CV, looked at from any moment on: the first one is what is left of a gap that was under way.

    So the number of requests is right on average, which it would not be if a gap began with the window.
    """
    mean_s = 1 / window.rate_rps
    if window.cv == 0:
        return np.arange(rng.random() * mean_s, window.length_s, mean_s)
    if window.pattern == WEIBULL:
        shape = _weibull_shape(window.cv)
        scale = mean_s / math.gamma(1 + 1 / shape)
        # A gap met by chance is likelier the longer it is; of a Weibull's, x^shape is then Gamma distributed.
        first = scale * rng.gamma(1 + 1 / shape) ** (1 / shape)
    else:
        shape = 1 / window.cv**2
        scale = mean_s / shape
        first = rng.gamma(shape + 1) * scale
    found, at = [], first * rng.random()
    while at < window.length_s:
        count = int((window.length_s - at) * window.rate_rps * 1.1) + 16
        gaps = rng.weibull(shape, count) if window.pattern == WEIBULL else rng.gamma(shape, size=count)
        times = at + np.concatenate([[0.0], np.cumsum(gaps * scale)])
        found.append(times[:-1])
        at = float(times[-1])
    times = np.concatenate(found) if found else np.empty(0)
    return times[times < window.length_s]


@lru_cache(maxsize=4096)
def _weibull_shape(cv: float) -> float:
    """Of the Weibull distribution with this CV."""
    low, high, wanted = 0.05, 100.0, math.log1p(cv**2)
    for _ in range(60):
        middle = math.sqrt(low * high)
        if math.lgamma(1 + 2 / middle) - 2 * math.lgamma(1 + 1 / middle) > wanted:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
