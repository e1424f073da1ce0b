"""Latencies in bounded memory, and the promised keys."""

import numpy as np
import pytest

from knative.simulator import Latencies, simulate
from knative.simulator.result import EXACT_LIMIT
from tests.knative.simulator.sims import Script, model_of, trace_of


def latencies_of(values: np.ndarray) -> Latencies:
    latencies = Latencies()
    for part in np.array_split(values, 5):
        latencies.buffer.extend(part.tolist())
        latencies.settle()
    return latencies


def test_a_few_latencies_are_exact() -> None:
    latencies = latencies_of(np.arange(1.0, 101.0))
    assert [latencies.quantile(q) for q in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert Latencies().quantile(0.5) is None


@pytest.mark.parametrize("q", [0.01, 0.5, 0.95, 0.99, 0.9999])
def test_many_latencies_are_within_half_a_percent(q: float) -> None:
    values = np.random.default_rng(1).lognormal(-1, 2, 3 * EXACT_LIMIT)
    latencies = latencies_of(values)
    assert latencies.quantile(q) == pytest.approx(float(np.quantile(values, q, method="inverted_cdf")), rel=0.005)
    assert latencies.max_s == values.max()


@pytest.mark.parametrize("count", [1_000, 2 * EXACT_LIMIT])
def test_two_sets_of_latencies_make_one(count: int) -> None:
    values = np.random.default_rng(2).exponential(1.0, count)
    one, other = latencies_of(values[: count // 3]), latencies_of(values[count // 3 :])
    one.merge(other)
    assert (one.count, one.max_s) == (count, values.max())
    assert one.quantile(0.9) == pytest.approx(float(np.quantile(values, 0.9)), rel=0.006)


@pytest.mark.parametrize("count", [50, 5_000, 2 * EXACT_LIMIT])
def test_the_distribution_rises_to_one(count: int) -> None:
    values = np.random.default_rng(3).exponential(1.0, count)
    at, share = latencies_of(values).cdf(100)
    assert len(at) <= 101
    assert (np.diff(at) >= 0).all()
    assert (np.diff(share) > 0).all()
    assert share[-1] == pytest.approx(1)
    assert at[-1] == pytest.approx(values.max(), rel=0.01)


def test_the_promised_keys_are_there_and_no_other() -> None:
    found = simulate(trace_of([0.0, 1.0]), model_of(), Script(1), seed=1).to_json()
    assert list(found) == [
        *("requests", "cold_start_share", "latency_s", "timed_out", "rejected", "failed"),
        *("pod_seconds", "gpu_hours", "cost", "peak_pods", "utilisation", "flaps"),
    ]
    assert list(found["latency_s"]) == ["p50", "p95", "p99", "max"]
