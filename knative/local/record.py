"""What a revision remembers for whoever looks: latencies, cold starts, where weights came from, the last minutes by the second."""

import time
from collections import Counter, deque
from typing import Any, Literal, NamedTuple

from knative.local.latency import Histogram, Latencies
from knative.local.outcomes import Outcomes
from knative.local.pod import Pod

COLD_STARTS = 8  # kept of each Service
HUNG = 8  # likewise
HISTORY = 300  # samples, one a second

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
        self.cold_start_s = Histogram()
        self.weights: Counter[str] = Counter()  # pods that became ready, by where their weights came from
        self.samples: deque[Sample] = deque(maxlen=HISTORY)
        self.hung_total = 0  # pods that answered nobody any more and were replaced
        self._cold_starts: deque[ColdStart] = deque(maxlen=COLD_STARTS)
        self._hung: deque[dict[str, Any]] = deque(maxlen=HUNG)

    def starting(self, pod: Pod, waiting: int) -> None:
        """A pod was asked for."""
        self._cold_starts.append(ColdStart(pod, waiting))

    def ended(self, pod: Pod, outcome: Outcome) -> None:
        """A pod has become ready, or will not any more; only the first time counts."""
        start = next((start for start in self._cold_starts if start.pod is pod), None)
        if start is None:
            return
        if outcome == "ready":
            self.cold_start_s.add(pod.stages["ready"])
            if pod.report.weights:
                self.weights[pod.report.weights.source] += 1
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
