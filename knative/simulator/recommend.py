"""The cheapest annotations that keep a goal for latency, and how sure that is.

They are chosen on the first part of a trace and judged on the rest, which had no say in the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from knative.simulator.errors import SimulatorError
from knative.simulator.policies import make_policy
from knative.simulator.result import Result
from knative.simulator.runs import Run, results
from knative.simulator.slo import Confidence, Requests, Slo

TRAIN_SHARE = 0.6  # of the trace's time
HOLDS = ("0s", "5m", "15m", "1h")  # how long pods stay for what comes back; Knative allows no more than an hour
UTILIZATIONS = ("50", "70", "85")
WINDOWS = ("30s", "60s", "5m")
ALIKE = 2.0  # ratio of the two parts' traffic; beyond it the one says little about the other
FEW = 20  # cold starts; an estimate that rests on fewer is a guess
DAY_S = 86_400.0

Knobs = Mapping[str, str]
Key = tuple[tuple[str, str], ...]


class RecommendError(SimulatorError):
    """A trace that tells too little."""


@dataclass(frozen=True)
class Recommendation:
    """What to set, and what came of it on the part of the trace that chose it and on the other one."""

    slo: Slo
    annotations: Knobs  # without their prefix
    container_concurrency: int
    train: Result
    test: Result
    oracle: Result  # on the same part as `test`: the cheapest that keeps the goal with perfect foresight
    confidence: Confidence
    tried: int  # settings
    train_s: float
    test_s: float

    @property
    def is_met(self) -> bool:
        """Whether the goal holds on the part that had no say."""
        return self.slo.is_met(self.train) and self.slo.is_met(self.test)

    @property
    def are_alike(self) -> bool:
        """Whether the two parts have about as much traffic for their length."""
        before, after = self.train.requests / self.train_s, self.test.requests / self.test_s
        return before <= ALIKE * after and after <= ALIKE * before

    @property
    def certainty(self) -> str:
        """In one word: high, fair or low."""
        if not self.is_met or self.confidence.share_met < 0.8:
            return "low"
        # Without a minimum, what is slow is a cold start, of which there must be enough to know them.
        has_few = self.test.cold_starts < FEW and self.annotations["min-scale"] == "0"
        return "fair" if self.confidence.share_met < 0.95 or has_few or not self.are_alike else "high"


def recommend(run: Run, slo: Slo, told: Callable[[int], object], done: Callable[[], object]) -> Recommendation:
    """Try settings of the KPA on `run`'s trace. told: is handed how many more will be tried; done: called after each.

    Raises SimulatorError for whatever in `run` is not known or allowed.
    """
    begin_s, end_s = run.part or (0.0, math.nextafter(run.open().span_s(), math.inf))
    middle_s = begin_s + TRAIN_SHARE * (end_s - begin_s)
    train, test = replace(run, policy="kpa", part=(begin_s, middle_s)), replace(run, policy="kpa", part=(middle_s, end_s))
    model, _ = run.read_model()
    for part, share in ((train, "first 60"), (test, "last 40")):
        if not any(len(chunk.t_s) for chunk in part.open()):
            raise RecommendError(f"{run.trace}: there is no request in the {share} % of its time, so nothing can be learnt or judged there")
    tried: dict[Key, Result] = {}

    def best(candidates: Iterable[Knobs]) -> Knobs:
        """Of all that have been tried, these included: the cheapest that keeps the goal, else the fastest."""
        new = [dict(key) for key in dict.fromkeys(map(_key, candidates)) if key not in tried]
        told(len(new))
        found = results([replace(train, knobs=knobs) for knobs in new], done) if new else []
        for knobs, result in zip(new, found, strict=True):
            tried[_key(knobs)] = result
        _, chosen = min((_rank(slo, result), key) for key, result in tried.items())
        return dict(chosen)

    start = {
        "target": str(model.concurrency or 100),
        "target-utilization-percentage": "70",
        "window": "60s",
        "min-scale": "0",
        "scale-down-delay": "0s",
        "scale-to-zero-pod-retention-period": "0s",
        **run.knobs,
    }
    make_policy("kpa", start, model)  # what the caller has set is checked before anything is tried
    foreseen = list(test.foreseen().values())
    told(2 + len(foreseen))
    (bound,) = results([replace(train, policy="oracle", knobs={})], done)
    free = [name for name in start if name not in run.knobs]  # what the caller has set, stays
    most = int(run.knobs.get("max-scale", "0")) or math.inf
    least = sorted({0, 1, 2, 3, *(math.ceil(bound.peak_pods * share) for share in (0.25, 0.5, 1.0))})
    least = [pods for pods in least if pods <= most]
    chosen: Knobs = start
    for pods in least if "min-scale" in free else [0]:
        if tried and _rank(slo, tried[_key(chosen)]) < (False, pods * (middle_s - begin_s)):
            break  # so many would be dearer even if no other were ever needed
        chosen = best(_varied(start, free, [pods], HOLDS))
    chosen = best({**chosen, **some} for some in _others(free))
    near = {pods for step in (-1, 0, 1) if 0 <= (pods := int(chosen["min-scale"]) + step) <= most}
    chosen = best(_varied(chosen, free, sorted(near), HOLDS))

    judged = tried[_key(chosen)]
    if "max-scale" not in run.knobs:
        chosen = {**chosen, "max-scale": str(max(2 * judged.peak_pods, int(chosen["min-scale"]), 1))}
    requests = Requests()
    tested = replace(test, knobs=chosen).result(requests.add)
    done()
    oracle = min(results(foreseen, done), key=lambda result: _rank(slo, result))
    confidence = requests.confidence(slo, run.seed)
    lengths = middle_s - begin_s, end_s - middle_s
    return Recommendation(slo, chosen, model.concurrency, judged, tested, oracle, confidence, len(tried), *lengths)


def _key(knobs: Knobs) -> Key:
    return tuple(sorted(knobs.items()))


def _rank(slo: Slo, result: Result) -> tuple[bool, float, float]:
    """Those that keep the goal first, by their cost; the others by how close they come."""
    latency_s = slo.latency_s(result)
    return (False, result.pod_seconds, latency_s) if latency_s <= slo.limit_s else (True, latency_s, result.pod_seconds)


def _varied(start: Knobs, free: Sequence[str], least: Sequence[int], holds: Sequence[str]) -> Iterable[Knobs]:
    """Pods that are always there, and how long the others stay."""
    for pods in least:
        for hold in holds:
            wanted = {"min-scale": str(pods), "scale-down-delay": hold, "scale-to-zero-pod-retention-period": hold if pods == 0 else "0s"}
            yield {**start, **{name: value for name, value in wanted.items() if name in free}}


def _others(free: Sequence[str]) -> Iterable[Knobs]:
    """How full a pod is to be, and over how long load is averaged."""
    for utilization in UTILIZATIONS:
        for window in WINDOWS:
            wanted = {"target-utilization-percentage": utilization, "window": window}
            yield {name: value for name, value in wanted.items() if name in free}
