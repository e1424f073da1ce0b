"""What came of a simulation: counts, latencies, costs, and how load and pods went over time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EXACT_LIMIT = 100_000  # latencies up to so many are kept as they are
GAMMA = 1.01  # ratio of a bucket's bounds beyond that: a quantile is off by half a percent at most
_LEAST_S = 1e-6  # shorter latencies share a bucket
_BUCKETS = 3_000  # up to 1e-6 * 1.01 ** 3000 s, years
_BUFFER = 8_192
_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


class Latencies:
    """Latencies in seconds: as they are up to EXACT_LIMIT, beyond it in buckets that are 1 % wide, so that memory is bounded."""

    def __init__(self) -> None:
        self.buffer: list[float] = []  # those that have not been counted; the engine appends, and calls `settle` now and then
        self.count = 0  # of those that have been counted, or kept
        self.max_s = 0.0
        self._kept: list[Floats] = []
        self._buckets: NDArray[np.int64] | None = None  # counts, once there are too many to keep

    def settle(self, least: int = _BUFFER) -> None:
        """Take what is in the buffer, if there are at least so many."""
        if len(self.buffer) >= max(1, least):
            self._take(np.array(self.buffer, np.float64))
            self.buffer.clear()

    def merge(self, other: Latencies) -> None:
        """Take all of another's too."""
        self.settle(1)
        other.settle(1)
        if other._buckets is None:
            for values in other._kept:
                self._take(values)
            return
        self._to_buckets()
        assert self._buckets is not None
        self._buckets += other._buckets
        self.count += other.count
        self.max_s = max(self.max_s, other.max_s)

    def quantile(self, q: float) -> float | None:
        """The least latency that a share `q` of all do not exceed; None of none. Within 0.5 % beyond EXACT_LIMIT of them."""
        self.settle(1)
        if not self.count:
            return None
        rank = min(self.count - 1, max(0, int(np.ceil(q * self.count)) - 1))
        if self._buckets is None:
            return float(np.partition(np.concatenate(self._kept), rank)[rank])
        bucket = int(np.searchsorted(np.cumsum(self._buckets), rank, side="right"))
        return min(float(_middle(np.array([bucket]))[0]), self.max_s)

    def cdf(self, points: int = 1_000) -> tuple[Floats, Floats]:
        """Latencies, rising, and the share of all that do not exceed each; at most so many points."""
        self.settle(1)
        if not self.count:
            return np.empty(0), np.empty(0)
        if self._buckets is None:
            values = np.sort(np.concatenate(self._kept))
            ranks = np.unique(np.linspace(0, len(values) - 1, min(points, len(values))).round().astype(int))
            return values[ranks], (ranks + 1) / len(values)
        buckets = np.flatnonzero(self._buckets)
        shares = np.cumsum(self._buckets[buckets]) / self.count
        step = max(1, -(-len(buckets) // points))
        chosen = np.unique(np.append(np.arange(0, len(buckets), step), len(buckets) - 1))
        return np.minimum(_middle(buckets[chosen]), self.max_s), shares[chosen]

    def _take(self, values: Floats) -> None:
        self.count += len(values)
        self.max_s = max(self.max_s, float(values.max()))
        if self._buckets is None:
            self._kept.append(values)
            if self.count > EXACT_LIMIT:
                self._to_buckets()
        else:
            self._buckets += _counts(values)

    def _to_buckets(self) -> None:
        if self._buckets is None:
            self._buckets = np.zeros(_BUCKETS, np.int64)
            for values in self._kept:
                self._buckets += _counts(values)
            self._kept.clear()


def _counts(values: Floats) -> NDArray[np.int64]:
    indices = np.log(np.maximum(values, _LEAST_S) / _LEAST_S) / np.log(GAMMA)
    return np.bincount(np.minimum(indices.astype(np.int64), _BUCKETS - 1), minlength=_BUCKETS)


def _middle(buckets: NDArray[np.int64]) -> Floats:
    """The value in each bucket that is off by the same factor from both bounds."""
    return np.asarray(_LEAST_S * GAMMA ** (buckets + 0.5))


class Series(NamedTuple):
    """How it went: averages over each step, so that the sum of `pods` x `step_s` is the pod-seconds. All arrays have one length.

    There are at most SERIES_POINTS steps (see record.py), of equal length but for the last one.
    """

    t_s: Floats  # where each step begins
    step_s: Floats
    load: Floats  # requests at once, waiting or with a pod
    queue: Floats  # of these, those that wait
    pods: Floats  # that hold their resources: starting, ready or draining
    ready: Floats  # of these, those that take requests
    wanted: Floats  # by the policy


@dataclass(frozen=True)
class Result:
    """One function's result, or the sum of several (see `total`).

    Every request is one of answered, timed_out, rejected, failed or in_system. Latencies are those of answered requests, from arrival to
    answer, and include the wait for a pod.
    """

    requests: int
    answered: int
    timed_out: int  # waiting, or with a pod, for longer than timeout_s
    rejected: int  # the activator's queue was full
    failed: int  # with a pod that failed
    in_system: int  # when the simulation ended
    cold_starts: int  # requests answered or tried by a pod that was not ready yet when they came
    latencies: Latencies
    pod_seconds: float  # from when a pod holds its resources until it is gone
    gpu_hours: float
    cost: float  # in the currency of price_per_gpu_hour
    peak_pods: int
    busy_seconds: float  # pod-seconds with at least one request
    flaps: int  # scale-downs taken back within FLAP_S (see replicas.py)
    horizon_s: float  # when the simulation ended
    series: Series

    @property
    def cold_start_share(self) -> float:
        """Of all requests, those that had to wait for a pod to start."""
        return self.cold_starts / self.requests if self.requests else 0.0

    @property
    def utilisation(self) -> float:
        """Share of the pod-seconds in which the pod had at least one request."""
        return self.busy_seconds / self.pod_seconds if self.pod_seconds else 0.0

    @property
    def latency_s(self) -> dict[str, float | None]:
        """p50, p95, p99 and max in seconds; None where nothing was answered."""
        quantiles = {name: self.latencies.quantile(q) for name, q in _QUANTILES.items()}
        return {**quantiles, "max": self.latencies.max_s if self.latencies.count else None}

    def to_json(self) -> dict[str, Any]:
        """The keys that `relight simulate --json` promises."""
        return {
            "requests": self.requests,
            "cold_start_share": self.cold_start_share,
            "latency_s": self.latency_s,
            "timed_out": self.timed_out,
            "rejected": self.rejected,
            "failed": self.failed,
            "pod_seconds": self.pod_seconds,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "peak_pods": self.peak_pods,
            "utilisation": self.utilisation,
            "flaps": self.flaps,
        }


def total(results: Iterable[Result], peak_pods: int) -> Result:
    """The sum of several functions' results, which ended at the same time; `peak_pods`: most pods of all together at once."""
    parts = list(results)
    latencies = Latencies()
    for part in parts:
        latencies.merge(part.latencies)
    counts = ("requests", "answered", "timed_out", "rejected", "failed", "in_system", "cold_starts", "flaps")
    amounts = ("pod_seconds", "gpu_hours", "cost", "busy_seconds")
    first = parts[0].series
    summed = ("load", "queue", "pods", "ready", "wanted")
    return Result(
        **{name: sum(getattr(part, name) for part in parts) for name in counts},
        **{name: sum(getattr(part, name) for part in parts) for name in amounts},
        latencies=latencies,
        peak_pods=peak_pods,
        horizon_s=max(part.horizon_s for part in parts),
        series=first._replace(**{name: np.sum([getattr(part.series, name) for part in parts], axis=0) for name in summed}),
    )
