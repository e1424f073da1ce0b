"""What a revision remembers for whoever looks: latencies, cold starts, where weights came from, the last minutes by the second."""

import time
from collections import Counter, deque
from typing import Any, Literal, NamedTuple

from knative.local.latency import Histogram, Latencies
from knative.local.outcomes import Outcomes
from knative.local.pod import Pod
from knative.local.series import ErrorSeries

COLD_STARTS = 8  # kept of each Service
HUNG = 8  # likewise
HISTORY = 300  # samples, one a second
_SOURCES = ("cache", "store", "resident")  # of weights; each is a series, and a probe may answer anything

Outcome = Literal["starting", "ready", "failed", "dropped"]


class Sample(NamedTuple):
    """One second of a revision. `time`: seconds since the epoch; latencies in seconds, None when nobody was answered lately."""

    time: float
    concurrency: float
    rps: float
    ready: int
    desired: int
    queued: int
    p50: float | None
    p95: float | None
    p99: float | None
    errors: int  # answers that were errors


class ColdStart:
    """One pod's way from asked for to ready, or to whatever came instead."""

    def __init__(self, pod: Pod, waiting: int) -> None:
        """waiting: how many requests waited when the pod was asked for."""
        self.pod: Pod | None = pod  # until it is over
        self._waiting = waiting
        self._document: dict[str, Any] = {}

    def end(self, outcome: Outcome) -> None:
        """It is over; later calls change nothing."""
        if self.pod:
            self._document = self._describe(self.pod, outcome)
            self.pod = None

    def document(self) -> dict[str, Any]:
        """Its entry in `/api/status`."""
        return self._describe(self.pod, "starting") if self.pod else self._document

    def _describe(self, pod: Pod, outcome: Outcome) -> dict[str, Any]:
        weights = pod.report.weights
        return {
            "pod": pod.name,
            "outcome": outcome,
            "started_at": round(pod.started_at, 3),
            "seconds": None if outcome == "starting" else pod.stages.get("ready", round(time.monotonic() - pod.asked_at, 4)),
            "waiting": self._waiting,
            "phase": pod.report.phase or pod.phase,
            "stages": pod.stages_so_far(),
            "restored_bytes": pod.report.restored_bytes,
            "total_bytes": pod.report.total_bytes,
            "weights": weights.model_dump() if weights else None,
        }


class Record:
    """The memory of one revision; bounded, and cheap to keep."""

    def __init__(self) -> None:
        self.latencies = Latencies()
        self.outcomes = Outcomes()
        self.errors = ErrorSeries(self.outcomes)
        self.cold_start_s = Histogram()
        self.weights: Counter[str] = Counter()  # pods that became ready, by where their weights came from
        self.samples: deque[Sample] = deque(maxlen=HISTORY)
        self.failed_starts = 0  # pods that did not become ready, for the first time or again, and were given up
        self.hung_total = 0  # pods that answered nobody any more and were replaced
        self._cold_starts: deque[ColdStart] = deque(maxlen=COLD_STARTS)
        self._hung: deque[dict[str, Any]] = deque(maxlen=HUNG)
        self._sampled_errors = 0  # those that the samples have

    def sample(self, now: float, *, concurrency: float, rps: float, ready: int, desired: int, queued: int) -> None:
        """One second more; `now` on `time.monotonic`'s clock."""
        errors, self._sampled_errors = self.outcomes.errors - self._sampled_errors, self.outcomes.errors
        self.samples.append(
            Sample(
                time=round(time.time(), 3),
                concurrency=round(concurrency, 3),
                rps=round(rps, 3),
                ready=ready,
                desired=desired,
                queued=queued,
                errors=errors,
                **self.latencies.percentiles(now),
            )
        )

    def starting(self, pod: Pod, waiting: int) -> None:
        """A pod was asked for."""
        self._cold_starts.append(ColdStart(pod, waiting))

    def ended(self, pod: Pod, outcome: Outcome) -> None:
        """A pod has become ready, or will not any more; only the first time ends its cold start.

        One that was ready and fails as it starts again is a failed start, too. Each pod fails once.
        """
        if outcome == "failed":
            self.failed_starts += 1
        start = next((start for start in self._cold_starts if start.pod is pod), None)
        if start is None:
            return
        if outcome == "ready":
            self.cold_start_s.add(pod.stages["ready"])
            if pod.report.weights:
                source = pod.report.weights.source
                self.weights[source if source in _SOURCES else "other"] += 1
        start.end(outcome)

    def hung(self, pod: Pod, reason: str) -> None:
        """A pod is replaced because it answers nobody."""
        self.hung_total += 1
        self._hung.append({"pod": pod.name, "time": round(time.time(), 3), "reason": reason})

    def history(self) -> list[dict[str, Any]]:
        """The last minutes, oldest first."""
        return [sample._asdict() for sample in self.samples]

    def status(self, now: float) -> dict[str, Any]:
        """What it adds to the revision's entry in `/api/status`; `now` on `time.monotonic`'s clock."""
        return {
            "latency": self.latencies.percentiles(now),
            "sample": self.samples[-1]._asdict() if self.samples else None,
            "weights": dict(self.weights),
            "cold_starts": [start.document() for start in reversed(self._cold_starts)],  # the latest first
            "hung": list(reversed(self._hung)),
            **self.outcomes.status(now),
        }
