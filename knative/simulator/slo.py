"""A goal for latency, whether it is met, and how sure that is."""

from __future__ import annotations

import math
import re
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knative.simulator.distribution import parse_seconds
from knative.simulator.errors import SimulatorError
from knative.simulator.result import Result
from knative.simulator.running import Finished

_TEXT = re.compile(r"p(\d{1,2}(?:\.\d+)?)\s*=\s*(\S+)")
BLOCKS = 40  # that a trace is cut into, to see how much they differ
RESAMPLES = 1000
INTERVAL = 0.95
_RATIO = 1.02  # of neighbouring latencies that are not told apart
_LEAST_S, _BUCKETS = 1e-4, 1200  # up to 1e-4 * 1.02 ** 1200 s, a month; the last one is for requests without an answer


class SloError(SimulatorError):
    """A goal that cannot be read."""


@dataclass(frozen=True)
class Slo:
    """So large a share of all requests is to be answered within `limit_s`. One without an answer is later than any."""

    share: float
    limit_s: float

    @classmethod
    def parse(cls, text: str) -> Slo:
        """From `p99=2s` or `p99.9=500ms`. Raises SloError."""
        found = _TEXT.fullmatch(text.strip())
        if not found or not 0 < float(found[1]) < 100:
            raise SloError(f"--slo {text}: must be like p99=2s, with a percentile between 0 and 100")
        try:
            limit_s = parse_seconds("--slo", found[2])
        except SimulatorError:
            limit_s = 0.0
        if not limit_s:
            raise SloError(f"--slo {text}: {found[2]!r} must be a time above 0, such as 2s or 500ms")
        return cls(float(found[1]) / 100, limit_s)

    def __str__(self) -> str:
        return f"{self.name} ≤ {self.limit_s:g} s"

    @property
    def name(self) -> str:
        """The percentile's, such as p99."""
        return f"p{self.share * 100:.10g}"

    def latency_s(self, result: Result) -> float:
        """The percentile of all requests; inf if too many have no answer."""
        if not result.requests:
            return 0.0
        rank = self.share * result.requests / result.answered if result.answered else math.inf
        found = result.latencies.quantile(rank) if rank <= 1 else None
        return math.inf if found is None else found

    def is_met(self, result: Result) -> bool:
        """Whether it holds."""
        return self.latency_s(result) <= self.limit_s


@dataclass(frozen=True)
class Confidence:
    """What a percentile would be on other days like these: blocks of the trace, drawn again and again."""

    low_s: float
    high_s: float  # between these it lies with a probability of INTERVAL; inf: too many requests without an answer
    share_met: float  # of the draws in which the goal is met
    blocks: int
    block_s: float


class Requests:
    """Takes note of when requests came and how long they took; hand `add` to the simulation."""

    def __init__(self) -> None:
        self._arrived, self._latency = array("d"), array("d")

    def add(self, request: Finished) -> None:
        """One that is over."""
        self._arrived.append(request.arrived_s)
        self._latency.append(request.latency_s if request.outcome == "answered" else math.inf)

    def confidence(self, slo: Slo, seed: int) -> Confidence:
        """How sure the percentile is.

        Requests close in time share their fate (a burst, a cold start), so blocks of time are drawn and not requests; what happens only
        once in the whole trace, or never, no draw can tell.
        """
        arrived, latency = np.frombuffer(self._arrived), np.frombuffer(self._latency)
        span_s = float(arrived.max()) + 1e-9 if len(arrived) else 1.0
        block_s = span_s / BLOCKS
        counts = np.zeros((BLOCKS, _BUCKETS), np.int64)
        np.add.at(counts, (np.minimum((arrived / block_s).astype(int), BLOCKS - 1), _bucket(latency)), 1)
        drawn = np.random.default_rng(seed).multinomial(BLOCKS, np.full(BLOCKS, 1 / BLOCKS), RESAMPLES)
        totals = np.cumsum(drawn @ counts, axis=1)
        ranks = np.ceil(slo.share * totals[:, -1])
        found = _middle(np.minimum((totals < ranks[:, None]).sum(axis=1), _BUCKETS - 1))
        low_s, high_s = np.quantile(found, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], method="nearest")
        return Confidence(float(low_s), float(high_s), float((found <= slo.limit_s).mean()), BLOCKS, block_s)


def _bucket(latency: NDArray[np.float64]) -> NDArray[np.int64]:
    with np.errstate(divide="ignore"):
        steps = np.log(np.maximum(latency, _LEAST_S) / _LEAST_S) / math.log(_RATIO)
    return np.minimum(steps, _BUCKETS - 1).astype(np.int64)


def _middle(bucket: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(bucket == _BUCKETS - 1, np.inf, _LEAST_S * _RATIO ** (bucket + 0.5))
