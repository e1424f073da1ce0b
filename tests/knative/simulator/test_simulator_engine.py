"""The engine: requests, pods, nodes; conservation laws, and queues whose averages are known."""

import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knative.simulator import Function, ModelError, Nodes, TraceError, arrivals, make_policy, policy_names, simulate, simulate_many
from knative.simulator.trace import Arrivals
from tests.knative.simulator.sims import Script, finished, model_of, poisson, trace_of

STEADY = settings(derandomize=True, deadline=None, max_examples=60)


# --- one request after the other


def test_a_request_finds_a_ready_pod() -> None:
    (one,), result = finished(trace_of([3.0]), model_of(), Script(1))
    assert (one.waited_s, one.latency_s, one.outcome, one.cold) == (0, 1, "answered", False)
    assert (result.requests, result.cold_start_share, result.peak_pods) == (1, 0, 1)


def test_a_request_waits_for_a_start_and_is_cold() -> None:
    (one,), result = finished(trace_of([3.5]), model_of(), Script(0, t4=1))
    assert (one.waited_s, one.latency_s, one.cold) == (10.5, 11.5, True)
    assert result.cold_start_share == 1


def test_a_request_that_waits_for_its_turn_is_not_cold() -> None:
    (_, two), result = finished(trace_of([3.0, 3.5]), model_of(), Script(1))
    assert (two.waited_s, two.latency_s, two.cold) == (0.5, 1.5, False)
    assert result.latency_s == {"p50": 1.0, "p95": 1.5, "p99": 1.5, "max": 1.5}


def test_who_waits_longer_than_the_timeout_gets_none() -> None:
    ends, result = finished(trace_of([0.0, 1.0, 15.0]), model_of(timeout_s=20), Script(0, t12=1))
    assert [(one.outcome, one.latency_s, one.waited_s) for one in ends[:2]] == [("timed_out", 20.0, 20.0)] * 2
    assert (ends[2].outcome, result.timed_out, result.cold_starts) == ("answered", 2, 1)


def test_a_request_that_takes_longer_than_the_timeout_leaves_its_pod_to_the_next() -> None:
    (one, two), result = finished(trace_of([0.0, 15.0], [50.0, 1.0]), model_of(timeout_s=20), Script(1))
    assert (one.outcome, one.latency_s) == ("timed_out", 20.0)
    assert (two.outcome, two.waited_s) == ("answered", 5.0)
    assert result.timed_out == 1


def test_one_more_than_the_queue_holds_is_rejected_at_once() -> None:
    ends, result = finished(trace_of([0.0, 0.1, 0.2, 0.3]), model_of(queue_limit=2), Script(1))
    assert [one.outcome for one in ends] == ["answered", "answered", "answered", "rejected"]
    assert (result.rejected, ends[3].latency_s) == (1, 0)


def test_a_pod_takes_as_many_at_once_as_it_may() -> None:
    ends, _ = finished(trace_of([0.0, 0.0, 0.0, 0.0, 0.0]), model_of(concurrency=2), Script(2))
    assert [one.waited_s for one in ends] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(("slowdown", "latency_s"), [(0, 1.0), (0.5, 2.0), (1, 3.0)])
def test_requests_in_one_pod_slow_each_other_down(slowdown: float, latency_s: float) -> None:
    ends, _ = finished(trace_of([0.0, 0.0, 0.0]), model_of(concurrency=4, batch_slowdown=slowdown), Script(1))
    assert [one.latency_s for one in ends] == pytest.approx([latency_s] * 3)


def test_who_comes_later_shares_the_pod_from_then_on() -> None:
    """Half of the first is done when the second comes; both are half as fast until the first is done."""
    ends, _ = finished(trace_of([0.0, 0.5]), model_of(concurrency=2, batch_slowdown=1), Script(1))
    assert [one.latency_s for one in ends] == pytest.approx([1.5, 1.5])


def test_a_request_that_times_out_among_others_lets_them_go_on_faster() -> None:
    ends, _ = finished(trace_of([0.0, 2.0], [9.0, 2.0]), model_of(concurrency=2, batch_slowdown=1, timeout_s=4), Script(1))
    assert [(one.outcome, one.latency_s) for one in ends] == [("timed_out", 4.0), ("answered", pytest.approx(3.0))]


def test_service_times_come_from_tokens_where_the_trace_has_them() -> None:
    trace = [arrivals([0.0, 10.0], [100, 0], [20, 0], [math.nan, 3.0])]
    ends, _ = finished(trace, model_of(service="tokens(prefill=100, decode=10)"), Script(1))
    assert [one.latency_s for one in ends] == [3.0, 3.0]
    with pytest.raises(ModelError, match="the request at 5 s has no tokens"):
        finished([arrivals([5.0])], model_of(service="tokens(prefill=100, decode=10)"), Script(1))


def test_a_trace_that_goes_back_is_refused() -> None:
    with pytest.raises(TraceError, match="goes back in time"):
        finished([arrivals([5.0]), arrivals([4.0])], model_of(), Script(1))


def test_a_trace_without_requests_is_nothing() -> None:
    _, result = finished([], model_of(), Script(1))
    assert (result.requests, result.pod_seconds, result.latency_s["p99"]) == (0, 0, None)


# --- pods


def test_pod_seconds_count_from_the_start_of_a_start_to_the_end_of_the_drain() -> None:
    policy = Script(1, t10=2, t40=0)
    _, result = finished([], model_of(drain_s=5), policy, horizon_s=100.0)
    assert result.pod_seconds == pytest.approx(45 + 35)
    assert result.peak_pods == 2


def test_a_pod_that_is_told_to_go_answers_first() -> None:
    (one,), result = finished(trace_of([4.0], [20.0]), model_of(), Script(1, t5=0), horizon_s=60.0)
    assert one.outcome == "answered"
    assert [result.pod_seconds, result.utilisation] == pytest.approx([24, 20 / 24])


def test_a_start_that_is_no_longer_wanted_ends_at_once() -> None:
    _, result = finished([], model_of(), Script(0, t2=1, t5=0), horizon_s=60.0)
    assert result.pod_seconds == pytest.approx(3)


def test_the_stages_of_a_start_add_up_and_one_node_downloads_once() -> None:
    """The first pod fetches 20 s; the second, 4 s later, waits for the end of the same download; the third finds the weights there."""
    stages = {"schedule": 1, "image": 2, "weights_store": 20, "weights_cache": 1, "imports": 5, "load": 3}
    model = model_of(**{f"cold_start__{stage}": seconds for stage, seconds in stages.items()})
    policy = Script(0, t2=1, t6=2, t50=3)
    _, result = finished([], model, policy, nodes=Nodes(warm=False), horizon_s=100.0)
    assert [min(now for now, sample in policy.seen if sample.ready >= count) for count in (1, 2, 3)] == [34, 34, 60]
    assert result.peak_pods == 3


def test_pods_that_find_no_gpu_are_pending_and_cost_nothing() -> None:
    policy = Script(2, t10=4, t20=1, t30=3)
    _, result = finished([], model_of(gpus=2), policy, nodes=Nodes(count=1, gpus=4), horizon_s=50.0)
    assert result.peak_pods == 2
    assert result.pod_seconds == pytest.approx(20 * 2 + 10 * 1 + 20 * 2)
    assert result.gpu_hours == pytest.approx(2 * result.pod_seconds / 3600)


def test_functions_share_the_gpus_and_who_has_waited_longest_is_next() -> None:
    policies = [Script(1, t20=0), Script(0, t5=1), Script(0, t6=1)]
    functions = [Function(name, [], model_of(), policy) for name, policy in zip("abc", policies, strict=True)]
    results = simulate_many(functions, seed=1, nodes=Nodes(count=1, gpus=1), horizon_s=60.0)
    assert {name: result.pod_seconds for name, result in results.functions.items()} == {"a": 20, "b": 40, "c": 0}
    assert (results.total.peak_pods, results.total.pod_seconds) == (1, 60)


def test_a_pending_pod_that_is_no_longer_wanted_never_starts() -> None:
    functions = [Function("a", [], model_of(), Script(1, t50=0)), Function("b", [], model_of(), Script(0, t5=1, t20=0))]
    results = simulate_many(functions, seed=1, nodes=Nodes(count=1, gpus=1), horizon_s=100.0)
    assert (results.functions["a"].pod_seconds, results.functions["b"].pod_seconds) == (50, 0)


def test_a_small_pod_may_start_before_a_large_one_that_does_not_fit() -> None:
    functions = [
        Function("holds", [], model_of(gpus=1), Script(2, t30=1, t60=0)),
        Function("large", [], model_of(gpus=2), Script(0, t5=1)),
        Function("small", [], model_of(gpus=1), Script(0, t6=1)),
    ]
    results = simulate_many(functions, seed=1, nodes=Nodes(count=1, gpus=2), horizon_s=100.0)
    assert [result.pod_seconds for result in results.functions.values()] == [90, 0, 70]


def test_a_roll_out_with_a_surge_takes_twice_the_pods_until_the_new_ones_are_ready() -> None:
    ends, result = finished(trace_of(np.arange(0, 60, 0.5), [0.2] * 120), model_of(rollouts="20"), Script(2), horizon_s=60.0)
    assert result.peak_pods == 4
    assert result.pod_seconds == pytest.approx(2 * 60 + 2 * 10, abs=0.5)
    assert max(one.waited_s for one in ends) == 0


def test_a_roll_out_that_recreates_holds_callers_and_needs_no_more_pods() -> None:
    ends, result = finished(
        trace_of(np.arange(0, 60, 0.5), [0.2] * 120), model_of(rollouts="20", rollout="recreate"), Script(2), horizon_s=60.0
    )
    assert result.peak_pods == 2
    assert max(one.waited_s for one in ends) == pytest.approx(10, abs=0.5)
    assert {one.outcome for one in ends} == {"answered"}


def test_a_surge_without_gpus_for_it_is_given_up_and_the_old_pods_stay() -> None:
    trace = trace_of(np.arange(0, 1000, 10.0), [0.2] * 100)
    ends, result = finished(trace, model_of(rollouts="20"), Script(2), nodes=Nodes(count=1, gpus=2), horizon_s=1000.0)
    assert [result.peak_pods, result.pod_seconds] == pytest.approx([2, 2_000])
    assert max(one.waited_s for one in ends) == 0


@pytest.mark.parametrize(
    ("gpus", "policy", "pod_seconds"),
    [
        pytest.param(6, Script(3, t25=0), 3 * 25 + 3 * 5, id="none is wanted: the old pods go at once, and the new ones with them"),
        pytest.param(4, Script(3, t35=1), 3 * 35 + 1 * 80, id="one is, and the new one that had room is ready"),
        pytest.param(6, Script(3, t25=1), 3 * 30 + 2 * 5 + 1 * 80, id="one is: the old ones stay until it is ready"),
    ],
)
def test_old_pods_go_once_the_new_revision_has_what_is_wanted_meanwhile(gpus: int, policy: Script, pod_seconds: float) -> None:
    _, result = finished([], model_of(rollouts="20"), policy, nodes=Nodes(count=1, gpus=gpus), horizon_s=100.0)
    assert result.pod_seconds == pytest.approx(pod_seconds)


def test_a_pod_that_fails_takes_its_requests_along_and_is_replaced() -> None:
    ends, result = finished(poisson(2, 2_000), model_of(pod_mtbf_s=60, concurrency=4, service=2), Script(3))
    assert 0 < result.failed < 200
    assert result.failed == sum(one.outcome == "failed" for one in ends)
    assert all(one.latency_s - one.waited_s < 2 for one in ends if one.outcome == "failed")
    assert result.series.ready[10:].mean() < 3


# --- what must hold for every model, policy and trace

TRACES = st.lists(st.integers(0, 6_000).map(lambda n: n / 20), max_size=60).map(sorted)
MODELS = st.fixed_dictionaries(
    {
        "concurrency": st.sampled_from([0, 1, 2, 5]),
        "batch_slowdown": st.sampled_from([0, 0.3]),
        "timeout_s": st.sampled_from([5, 40, 300]),
        "queue_limit": st.sampled_from([0, 3, 10_000]),
        "service": st.sampled_from(["0.5", "exponential(mean=3)", "lognormal(p50=2, p99=30)"]),
        "drain_s": st.sampled_from([0, 3]),
        "pod_mtbf_s": st.sampled_from([30, 1e9]),
        "rollouts": st.sampled_from(["", "50", "50,150.5"]),
        "rollout": st.sampled_from(["surge", "recreate"]),
        "cold_start__imports": st.sampled_from(["0", "7", "uniform(low=1, high=20)"]),
    }
)
NODES = st.sampled_from([Nodes(), Nodes(count=1, gpus=2, warm=False), Nodes(count=2, gpus=3)])


@settings(derandomize=True, deadline=None, max_examples=150)
@given(TRACES, MODELS, NODES, st.sampled_from(policy_names()), st.none() | st.integers(1, 400))
def test_every_request_becomes_one_thing_and_pod_seconds_are_the_integral_of_pods(
    times: list[float], choice: dict[str, object], nodes: Nodes, name: str, horizon: int | None
) -> None:
    model, trace = model_of(**choice), trace_of(times)
    policy = make_policy(name, {}, model, history=lambda: iter(trace), future=lambda: iter(trace), seed=7)
    ends, result = finished(trace, model, policy, nodes=nodes, horizon_s=horizon, seed=7)
    counted = result.answered + result.timed_out + result.rejected + result.failed
    assert counted + result.in_system == result.requests == sum(at <= (horizon or math.inf) for at in times)
    assert len(ends) == counted
    assert horizon or not result.in_system
    series = result.series
    assert float((series.pods * series.step_s).sum()) == pytest.approx(result.pod_seconds)
    in_system_s = sum(one.latency_s for one in ends)
    if not result.in_system:
        assert float((series.load * series.step_s).sum()) == pytest.approx(in_system_s, abs=1e-6)
    assert (series.ready <= series.pods + 1e-9).all()
    assert (series.queue <= series.load + 1e-9).all()
    assert 0 <= result.utilisation <= 1 + 1e-9
    assert result.peak_pods <= (nodes.count * nodes.gpus or math.inf)
    again = finished(
        trace_of(times, chunk=7),
        model,
        make_policy(name, {}, model, history=lambda: iter(trace), future=lambda: iter(trace), seed=7),
        nodes=nodes,
        horizon_s=horizon,
        seed=7,
    )
    assert again[0] == ends
    assert json.dumps(again[1].to_json()) == json.dumps(result.to_json())


def test_another_seed_is_another_chance() -> None:
    model = model_of(service="exponential(mean=1)")
    one, other = (simulate(poisson(1, 100), model, Script(2), seed=seed).latency_s["p95"] for seed in (1, 2))
    assert one != other


# --- queues that are understood


@pytest.mark.parametrize(("pods", "rps"), [(1, 0.7), (4, 3.2), (20, 18.0)])
def test_waiting_is_as_erlang_says(pods: int, rps: float) -> None:
    """M/M/c with a mean service time of 1 s: P(wait) is Erlang's C, the mean wait C / (c - load)."""
    inverse = sum(math.factorial(pods) / math.factorial(k) / rps ** (pods - k) for k in range(pods))
    erlang_c = 1 / (1 + (1 - rps / pods) * inverse)
    ends, _ = finished(poisson(rps, 100_000), model_of(service="exponential(mean=1)"), Script(pods))
    waits = np.array([one.waited_s for one in ends])
    assert (waits > 0).mean() == pytest.approx(erlang_c, rel=0.06)
    assert waits.mean() == pytest.approx(erlang_c / (pods - rps), rel=0.12)


def test_a_pod_that_is_shared_is_as_processor_sharing_says() -> None:
    """M/M/1 processor sharing at a load of 0.6: 1 / (1 - 0.6) of the service time, on average."""
    ends, _ = finished(poisson(0.6, 60_000), model_of(service="exponential(mean=1)", concurrency=0, batch_slowdown=1), Script(1))
    assert np.mean([one.latency_s for one in ends]) == pytest.approx(2.5, rel=0.06)


# --- long traces


def test_a_trace_is_read_as_it_is_needed() -> None:
    """No chunk is asked for before the last request of the one before has come."""
    arrived: list[float] = []

    def chunks() -> Iterator[Arrivals]:
        for number in range(20):
            begin = number * 100.0
            assert not number or arrived[-1] >= begin - 3
            yield arrivals(begin + np.arange(100.0))

    result = simulate(chunks(), model_of(), Script(2), seed=1, observe=lambda one: arrived.append(one.arrived_s))
    assert result.requests == 2_000


def test_the_course_of_a_long_trace_has_a_bounded_resolution() -> None:
    policy = Script(1, t1000=3)
    _, result = finished([], model_of(), policy, horizon_s=20_000.0)
    series = result.series
    assert 1_000 < len(series.t_s) <= 2_048
    assert float(series.step_s.sum()) == pytest.approx(20_000)
    assert float((series.pods * series.step_s).sum()) == pytest.approx(1_000 + 3 * 19_000)
