"""The policies: what each decides, by the documents that it follows, and what comes of it in a simulation."""

import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knative.autoscaler.replay import read_samples, read_spec
from knative.simulator import Finished, FunctionModel, Nodes, PolicyError, Result, make_policy, policy_names, simulate
from knative.simulator.policies.foresight import Schedule, at_once, by_hour, demand, not_the_bound, plan
from knative.simulator.policies.histogram import IdleTimes
from knative.simulator.policies.hpa import Behavior, by_total, by_utilisation
from knative.simulator.policies.keda import activate
from knative.simulator.policies.kpa import Kpa
from knative.simulator.policies.simple import Most, needed, step
from knative.simulator.policy import Policy, Sample
from knative.simulator.trace import Arrivals
from knative.simulator.traces import open_trace
from tests.knative.simulator.sims import Script, finished, model_of, poisson, trace_of

ORACLE = Path(__file__).parents[1] / "autoscaler/data"  # recordings of Knative's own autoscaler; see test_autoscaler_replay.py


def sample_of(**values: float | None) -> Sample:
    measured = {"concurrency": 0.0, "rps": 0.0, "busy_pods": 0.0, "peak": 0, "in_system": 0, "queued": 0, "ready": 1, "pods": 1} | values
    return Sample(**measured)  # type: ignore[arg-type]


# --- kpa


@pytest.mark.parametrize("case", sorted(path.name.removesuffix(".spec.json") for path in ORACLE.glob("*.spec.json")))
def test_kpa_decides_as_knative_did_from_the_same_samples(case: str) -> None:
    spec, ready = read_spec(ORACLE / f"{case}.spec.json")
    policy = Kpa(spec, ready)
    got: dict[tuple[float, str], tuple[int, int]] = {}

    def note(now: float, kind: str) -> None:
        if last := policy.autoscaler.last:
            got[now, kind] = last.desired, last.bounded

    for measured in read_samples(ORACLE / f"{case}.input.csv"):
        now = measured.t
        ready = ready if measured.ready is None else measured.ready
        at_pods, at_activator = measured.concurrency, measured.activator
        concurrency = None if at_pods is None and at_activator is None else (at_pods or 0.0) + (at_activator or 0.0)
        if at_activator is not None and policy.autoscaler.needs_poke(at_activator):
            policy.autoscaler.record(now, concurrency=concurrency, rps=measured.rps)
            policy.tick(now, ready)
            note(now, "poke")
            concurrency = None  # it has been recorded
        policy.decide(now, sample_of(concurrency=concurrency, rps=measured.rps or 0.0, ready=ready, pods=max(1, ready)))
        if now % 2 == 0:
            note(now, "tick")
    rows = csv.DictReader((ORACLE / f"{case}.expected.csv").read_text().splitlines())
    want = {(float(row["t"]), row["kind"]): (int(row["desired"]), int(row["bounded"])) for row in rows if row["valid"] == "true"}
    assert {key: got[key] for key in want} == want


def test_kpa_takes_annotations_and_settings_of_the_cluster() -> None:
    policy = make_policy("kpa", {"window": "30s", "min-scale": "2", "max-scale-up-rate": "10", "stable-window": "40s"}, model_of())
    assert isinstance(policy, Kpa)
    spec = policy.spec
    assert (spec.stable_window_s, spec.min_scale, spec.max_scale_up_rate, policy.initial) == (30, 2, 10, 2)


def test_kpa_at_zero_is_poked_and_goes_back_to_zero_after_its_window() -> None:
    policy = make_policy("kpa", {"target-utilization-percentage": "100"}, model_of())
    ends, result = finished(trace_of([100.5]), model_of(), policy, horizon_s=300.0)
    assert ends[0].latency_s == pytest.approx(11)
    assert result.peak_pods == 1
    assert result.pod_seconds == pytest.approx(73, abs=3)


# --- hpa: the examples of its documentation, and its rules at the edges


@pytest.mark.parametrize(
    ("current", "total", "target", "wanted"),
    [
        pytest.param(1, 200, 100, 2, id="twice the target doubles"),
        pytest.param(2, 100, 100, 1, id="half the target halves"),
        pytest.param(4, 430, 100, 4, id="7 % above is within the tolerance"),
        pytest.param(4, 441, 100, 5, id="more than 10 % above is not"),
        pytest.param(10, 910, 100, 10, id="9 % below is within the tolerance"),
        pytest.param(10, 880, 100, 9, id="12 % below rounds up"),
        pytest.param(3, 0, 100, 0, id="no load wants none, which min forbids"),
    ],
)
def test_hpa_by_total(current: int, total: float, target: float, wanted: int) -> None:
    assert by_total(current, total, target) == wanted


@pytest.mark.parametrize(
    ("current", "ready", "used", "target", "wanted"),
    [
        pytest.param(4, 4, 4.0, 0.5, 8, id="all busy at a target of half"),
        pytest.param(4, 4, 2.1, 0.5, 4, id="within the tolerance"),
        pytest.param(4, 4, 1.0, 0.5, 2, id="half as busy as meant"),
        pytest.param(4, 2, 2.0, 0.5, 4, id="starting pods will take their share"),
        pytest.param(4, 3, 3.0, 0.5, 6, id="starting pods count as idle on the way up"),
        pytest.param(4, 2, 0.3, 0.5, 1, id="and not at all on the way down"),
        pytest.param(4, 0, 0.0, 0.5, 4, id="no metrics, no decision"),
        pytest.param(8, 2, 1.2, 0.5, 8, id="no change of direction by the starting ones"),
    ],
)
def test_hpa_by_utilisation(current: int, ready: int, used: float, target: float, wanted: int) -> None:
    assert by_utilisation(current, ready, used, target) == wanted


def test_hpa_adds_four_pods_or_doubles_every_fifteen_seconds() -> None:
    behavior, pods, course = Behavior(), 1, []
    for sync in range(5):
        pods = behavior.apply(sync * 15.0, pods, 1_000, 1, 60)
        course.append(pods)
    assert course == [5, 10, 20, 40, 60]


def test_hpa_counts_what_was_added_within_the_period() -> None:
    behavior = Behavior()
    assert behavior.apply(0.0, 10, 15, 1, 100) == 15
    assert behavior.apply(5.0, 15, 100, 1, 100) == 20
    assert behavior.apply(10.0, 20, 100, 1, 100) == 20
    assert behavior.apply(20.0, 20, 100, 1, 100) == 40


def test_hpa_scales_down_to_the_most_that_was_recommended_in_five_minutes() -> None:
    behavior, pods = Behavior(), 10
    recommended = {0: 10, 15: 4, 30: 8, 45: 2}
    course = {}
    for now in range(0, 400, 15):
        pods = behavior.apply(float(now), pods, recommended.get(now, 2), 1, 100)
        course[now] = pods
    assert (course[15], course[285], course[300], course[315], course[330], course[345]) == (10, 10, 8, 8, 2, 2)


@pytest.mark.parametrize(
    ("syncs", "course"),
    [
        pytest.param([(0, 10), (15, 2)], [5, 5], id="a rise that the rates cut short is not made up for on the way down"),
        pytest.param([(0, 100), (15, 4), (30, 3)], [5, 5, 5], id="more was recommended than there ever were: no pod is added for that"),
        pytest.param([(0, 10), (15, 12), (30, 2), (300, 2), (315, 2)], [5, 10, 10, 10, 2], id="until the rise is out of the window"),
        pytest.param([(0, 10), (15, 2), (30, 8)], [5, 5, 8], id="a rise is by what is recommended now"),
        pytest.param([(0, 5), (15, 3), (30, 5)], [5, 5, 5], id="what is there already is left"),
    ],
)
def test_hpa_stabilises_by_staying_where_it_is(syncs: list[tuple[int, int]], course: list[int]) -> None:
    """stabilizeRecommendationWithBehaviors: from the current count up to the least, or down to the most, that was recommended lately."""
    behavior, pods, found = Behavior(), 1, []
    for now, wanted in syncs:
        pods = behavior.apply(float(now), pods, wanted, 1, 100)
        found.append(pods)
    assert found == course


def test_hpa_may_take_back_at_once_what_it_removed_within_the_period() -> None:
    behavior = Behavior(stabilization_s=0.0)
    assert behavior.apply(0.0, 20, 2, 1, 100) == 2
    assert behavior.apply(10.0, 2, 100, 1, 100) == 40
    assert behavior.apply(30.0, 2, 100, 1, 100) == 6


def test_hpa_never_goes_to_zero_and_looks_every_fifteen_seconds() -> None:
    policy = make_policy("hpa", {"metric": "concurrency"}, model_of())
    assert policy.initial == 1
    assert policy.next_s(0.0, True) == math.inf
    assert [policy.next_s(now, False) for now in (0.0, 14.9, 15.0)] == [15, 15, 30]
    assert policy.decide(600.0, sample_of()) == 1


# --- keda


@pytest.mark.parametrize(
    ("pods", "active", "idle_s", "least", "wanted"),
    [
        pytest.param(0, True, 0, 0, 1, id="activation starts one"),
        pytest.param(0, True, 0, 3, 3, id="or the minimum"),
        pytest.param(2, True, 0, 0, None, id="above zero the HPA scales"),
        pytest.param(2, False, 300, 0, None, id="cooling down"),
        pytest.param(2, False, 301, 0, 0, id="to zero after the cooldown, from whatever count"),
        pytest.param(2, False, 999, 1, None, id="never below the minimum"),
        pytest.param(0, False, 999, 2, 2, id="up to the minimum"),
        pytest.param(0, False, 999, 0, None, id="zero stays"),
    ],
)
def test_keda_between_zero_and_one(pods: int, active: bool, idle_s: float, least: int, wanted: int | None) -> None:
    assert activate(pods, active, idle_s, 300.0, least) == wanted


def test_keda_queue_sees_a_message_at_its_next_poll() -> None:
    ends, _ = finished(trace_of([31.0]), model_of(), make_policy("keda-queue", {}, model_of()))
    assert ends[0].waited_s == pytest.approx(60 - 31 + 10)


def test_keda_queue_needs_more_than_the_activation() -> None:
    policy = make_policy("keda-queue", {"activation": "2"}, model_of())
    assert [policy.decide(30.0 * n, sample_of(in_system=n, ready=0, pods=0)) for n in (1, 2, 3)] == [None, None, 1]


def test_keda_s_hpa_does_not_add_pods_where_fewer_are_wanted() -> None:
    """Fifty messages at once: five pods of the ten that they want, as more are not allowed in 15 s; then eight messages are left."""
    policy = make_policy("keda-queue", {}, model_of())
    assert policy.decide(15.0, sample_of(in_system=50)) == 5
    assert policy.decide(45.0, sample_of(in_system=8, pods=5, ready=5)) == 5


def test_keda_queue_keeps_its_last_pod_for_the_cooldown() -> None:
    policy = make_policy("keda-queue", {}, model_of())
    assert policy.decide(30.0, sample_of(in_system=1, pods=0)) == 1
    decided = {now: policy.decide(float(now), sample_of()) for now in range(45, 400, 15)}
    assert [now for now, pods in decided.items() if pods == 0] == [360, 390]
    assert decided[345] == 1


def test_keda_http_is_told_at_once() -> None:
    ends, _ = finished(trace_of([31.0]), model_of(), make_policy("keda-http", {}, model_of()))
    assert ends[0].waited_s == pytest.approx(10)


def test_keda_http_by_rate_averages_over_its_window() -> None:
    policy = make_policy("keda-http", {"metric": "rate", "target": "1"}, model_of())
    wanted = [policy.decide(15.0 * n, sample_of(rps=8 if n == 1 else 0, in_system=1, pods=2, ready=2)) for n in range(1, 6)]
    assert wanted == [2, 2, 2, 2, 2]
    policy = make_policy("keda-http", {"metric": "rate", "target": "1", "stabilization": "0"}, model_of())
    assert [policy.decide(15.0 * n, sample_of(rps=8, in_system=1, pods=2, ready=2)) for n in range(1, 6)] == [2, 4, 6, 6, 6]


# --- the simple ones


@pytest.mark.parametrize(
    ("rps", "pods", "wanted"),
    [
        pytest.param(9, 4, 9, id="up at once"),
        pytest.param(4, 4, 4, id="at the threshold"),
        pytest.param(2.1, 4, 4, id="above half of it"),
        pytest.param(1.9, 4, 2, id="below half"),
        pytest.param(0, 4, 2, id="half of them at most"),
        pytest.param(0, 1, 0, id="the last one too"),
    ],
)
def test_rps_step(rps: float, pods: int, wanted: int) -> None:
    assert step(rps, pods, 1.0, 0.5, 0, 100) == wanted


def test_the_textbook_flaps_where_knative_does_not() -> None:
    """Fifty short requests in a few seconds, then five slow ones."""
    model, trace = model_of(cold_start__imports=1.3), open_trace("synthetic:teaching")
    flaps = {}
    for name in ("rps-step", "kpa"):
        flaps[name] = simulate(trace, model, make_policy(name, {}, model), seed=1, span_s=300).flaps
    assert flaps == {"rps-step": 4, "kpa": 0}


def test_the_most_of_the_last_seconds() -> None:
    most = Most(10.0)
    assert [most.add(now, number) for now, number in [(0, 3), (1, 5), (5, 2), (11, 1), (12, 1), (16, 0)]] == [3, 5, 5, 5, 2, 1]


@pytest.mark.parametrize(("requests", "concurrency", "pods"), [(0, 0, 0), (9, 0, 1), (0, 4, 0), (1, 4, 1), (9, 4, 3)])
def test_pods_that_give_each_request_a_place(requests: int, concurrency: int, pods: int) -> None:
    assert needed(requests, concurrency) == pods


def test_keep_alive_keeps_what_was_needed_at_once() -> None:
    ends, result = finished(
        trace_of([1.0, 1.0, 1.0, 200.0]), model_of(), make_policy("keep-alive", {"keep": "300s"}, model_of()), horizon_s=1_000.0
    )
    assert [one.cold for one in ends] == [True, True, True, False]
    assert result.pod_seconds == pytest.approx(3 * 312 + 189, abs=4)


def test_fixed_is_fixed() -> None:
    _, result = finished(poisson(1, 50), model_of(), make_policy("fixed", {"pods": "3"}, model_of()), horizon_s=100.0)
    assert (result.pod_seconds, result.peak_pods) == (300, 3)


# --- hybrid histogram


def idle_times(*minutes: float) -> IdleTimes:
    times = IdleTimes(4 * 3600.0, 2.0, 0.05, 0.99, 0.1)
    for minute in minutes:
        times.add(minute * 60)
    return times


def test_without_a_pattern_a_pod_is_kept_for_the_whole_range() -> None:
    assert idle_times().windows() == (0, 4 * 3600)
    assert idle_times(*(minute + 0.5 for minute in range(240))).windows() == (0, 4 * 3600)


def test_with_a_pattern_a_pod_is_there_from_the_fifth_to_the_99th_percentile_with_a_margin() -> None:
    prewarm_s, keep_s = idle_times(*[30.5] * 98, 29.5, 31.5).windows()
    assert prewarm_s == pytest.approx(30 * 60 * 0.9)
    assert prewarm_s + keep_s == pytest.approx(31 * 60 * 1.1)


def test_beyond_the_range_the_median_of_the_last_is_expected() -> None:
    prewarm_s, keep_s = idle_times(*[600.0] * 5, 10).windows()
    assert [prewarm_s, keep_s] == pytest.approx([0.85 * 36_000, 0.3 * 36_000])


def test_hybrid_histogram_learns_to_start_a_pod_ahead() -> None:
    """A request every half hour: after some of them the pod is gone for most of the time, and there when it is needed."""
    times = [1_800.0 * n + 20 for n in range(1, 40)]
    ends, result = finished(trace_of(times), model_of(), make_policy("hybrid-histogram", {}, model_of()))
    assert [one.cold for one in ends[:3]] == [True, False, False]
    assert not any(one.cold for one in ends[1:])
    late = simulate(trace_of(times[20:]), model_of(), make_policy("hybrid-histogram", {}, model_of()), seed=1)
    assert result.pod_seconds < 0.4 * times[-1]
    assert late.cold_starts == 1


# --- schedule


def test_hours_of_the_week_are_learnt_from_all_weeks() -> None:
    hour, week = 3_600.0, 604_800.0
    changes = [(0.0, 0), (9 * hour, 2), (10 * hour, 0), (week + 9 * hour, 4), (week + 9.5 * hour, 2), (week + 10 * hour, 0), (2 * week, 0)]
    assert {hour: pods for hour, pods in by_hour(changes, 0.5).items() if pods} == {9: 2}
    assert by_hour(changes, 0.99)[9] == 4


def test_schedule_has_pods_ready_ahead_of_the_hour_and_lets_them_go_after_it() -> None:
    policy = Schedule({1: 3}, make_policy("kpa", {}, model_of()), 60.0)  # type: ignore[arg-type]
    assert policy.next_s(10.0, True) == 3_540
    _, result = finished([], model_of(), policy, horizon_s=20_000.0)
    assert result.pod_seconds == pytest.approx(3 * 3_660, rel=0.03)


def test_schedule_needs_history() -> None:
    with pytest.raises(PolicyError, match="--history"):
        make_policy("schedule", {}, model_of())


# --- oracle


def test_demand_is_the_pods_with_requests_when_nobody_waits() -> None:
    trace = trace_of([0.0, 0.5, 5.0])
    assert demand(lambda: iter(trace), model_of(), 1) == [(0.0, 1), (0.5, 2), (1.0, 1), (1.5, 0), (5.0, 1), (6.0, 0)]
    assert max(pods for _, pods in demand(lambda: iter(trace), model_of(concurrency=2), 1)) == 1


def test_a_plan_keeps_a_pod_over_a_gap_that_is_shorter_than_a_start() -> None:
    changes = [(20.0, 1), (25.0, 0), (34.0, 1), (35.0, 0), (60.0, 1), (61.0, 0)]
    assert [tuple(pod) for pod in plan(changes, itertools.repeat(10.0), 0.0)] == [(20, 10, 35), (60, 10, 61)]
    assert [tuple(pod) for pod in plan(changes, itertools.repeat(30.0), 0.0)] == [(20, None, 61)]


TRACES = st.lists(
    st.tuples(st.integers(0, 2_000).map(lambda n: n / 10), st.integers(1, 200).map(lambda n: n / 10)), min_size=1, max_size=40
)


MODELS = st.tuples(
    st.sampled_from([0.0, 0.7, 8.0, 40.0]),  # a start
    st.sampled_from([0.0, 3.0]),  # a drain
    st.sampled_from(
        [(1, 0.0), (2, 0.0), (5, 0.0), (0, 0.0), (2, 0.4), (5, 1.0), (0, 0.1)]
    ),  # requests at once, and how they slow each other down
)


def foreseen(trace: list[Arrivals], model: FunctionModel, concurrency: int) -> tuple[list[Finished], Result]:
    """What the oracle makes of it, with so many requests at once in a pod."""
    model = replace(model, concurrency=concurrency)
    return finished(trace, model, make_policy("oracle", {}, model, future=lambda: iter(trace), seed=3), horizon_s=500.0, seed=3)


def by_arrival(ends: list[Finished]) -> list[tuple[float, float]]:
    return sorted((one.arrived_s, one.latency_s) for one in ends)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    TRACES,
    MODELS,
    st.sampled_from([*policy_names(), "peak", "script"]),
    st.lists(st.integers(0, 9), min_size=8, max_size=8),
)
def test_nobody_waits_for_the_oracle_nobody_is_faster_and_whoever_is_as_fast_is_no_cheaper(
    requests: list[tuple[float, float]], about: tuple[float, float, tuple[int, float]], name: str, script: list[int]
) -> None:
    times, services = zip(*sorted(requests), strict=True)
    trace = trace_of(times, services)
    cold_s, drain_s, (concurrency, slowdown) = about
    model = model_of(cold_start__imports=cold_s, drain_s=drain_s, concurrency=concurrency, batch_slowdown=slowdown)
    first, *others = at_once(model)
    oracle_ends, oracle = foreseen(trace, model, first)
    for ends, result in [(oracle_ends, oracle), *(foreseen(trace, model, count) for count in others)]:
        assert max(one.waited_s for one in ends) == 0
        assert result.cold_starts == 0
    assert [latency_s for _, latency_s in by_arrival(oracle_ends)] == pytest.approx([service_s for _, service_s in sorted(requests)])

    if name == "script":
        policy: Policy = Script(script[0], **{f"t{30 * n}": pods for n, pods in enumerate(script)})
    else:
        knobs = {"kpa": {"min-scale": "3"}, "keep-alive": {"min": "3"}, "hybrid-histogram": {"min": "3"}, "peak": {"pods": "9"}}
        made = name.replace("peak", "fixed")
        policy = make_policy(made, knobs.get(name, {}), model, history=lambda: iter(trace), future=lambda: iter(trace), seed=3)
    ends, result = finished(trace, model, policy, horizon_s=500.0, seed=3)
    slower_s = [mine - least for (_, mine), (_, least) in zip(by_arrival(ends), by_arrival(oracle_ends), strict=True)]
    assert min(slower_s) > -1e-6
    if max(slower_s) < 1e-6 and not not_the_bound(model, Nodes()):
        assert oracle.pod_seconds <= result.pod_seconds + 1e-3


@pytest.mark.parametrize(
    "requests",
    [
        pytest.param(
            [(4, 14.0), (15, 10.6), (17, 16.4), (30, 18.3), (34, 17.7), (50, 15.4), (59, 10.0)],
            id="a pod that is kept for later gets no request while another one has room, or it could not go when it is to",
        ),
        pytest.param(
            [(4, 9.0), (13, 6.3), (17, 2.4), (18, 14.1), (21, 19.4), (29, 9.8), (43, 13.2), (53, 1.5), (54, 18.9)],
            id="a request ends just when the next one comes, whatever the pod has done before",
        ),
    ],
)
def test_requests_that_slow_each_other_down_end_when_the_oracle_has_planned(requests: list[tuple[float, float]]) -> None:
    model = model_of(concurrency=2, batch_slowdown=0.5, cold_start__imports=8)
    times, services = zip(*requests, strict=True)
    ends, _ = foreseen(trace_of(times, services), model, 2)
    assert max(one.waited_s for one in ends) == 0


@pytest.mark.parametrize(
    ("settings", "counts", "beyond"),
    [
        ({}, [1], []),
        ({"concurrency": 8}, [8], ["concurrency"]),
        ({"concurrency": 0}, [0], []),
        ({"batch_slowdown": 0.1}, [1], []),
        ({"concurrency": 6, "batch_slowdown": 0.1}, [1, 2, 4, 6], []),
        ({"concurrency": 0, "batch_slowdown": 0.1}, [1, 2, 4, 8, 16, 32, 64, 128, 0], []),
        ({"drain_s": 5, "pod_mtbf_s": 60, "rollouts": "5"}, [1], ["drain_s", "pod_mtbf_s", "rollouts"]),
    ],
)
def test_where_the_oracle_is_the_bound_is_known(settings: dict[str, object], counts: list[int], beyond: list[str]) -> None:
    model = model_of(**settings)
    assert at_once(model) == counts
    assert not_the_bound(model, Nodes()) == beyond
    assert not_the_bound(model, Nodes(count=2)) == [*beyond, "nodes.count"]


@pytest.mark.parametrize("concurrency", [2, 8])
def test_the_oracle_fills_pods_that_take_several_at_once(concurrency: int) -> None:
    trace = poisson(5, 3_000)
    model = model_of(concurrency=concurrency, service="lognormal(p50=1, p99=9)", cold_start__imports="uniform(low=5, high=60)")
    ends, oracle = finished(trace, model, make_policy("oracle", {}, model, future=lambda: iter(trace), seed=5), seed=5)
    assert max(one.waited_s for one in ends) == 0
    peak = finished(trace, model, make_policy("fixed", {"pods": str(oracle.peak_pods)}, model), seed=5)[1]
    assert oracle.pod_seconds < peak.pod_seconds


# --- all of them


@pytest.mark.parametrize(
    ("name", "knobs", "problem"),
    [
        ("kpq", {}, "there is no policy 'kpq'; did you mean kpa?"),
        ("xyzzy", {}, "known are fixed, kpa, hpa, keda-queue"),
        ("fixed", {"pod": "3"}, "fixed: pod = '3', there is no such knob; known are pods"),
        ("fixed", {"pods": "-1"}, "fixed: pods = '-1', must be a whole number of at least 0"),
        ("hpa", {"target": "0"}, "hpa: target = '0', must be a number above 0"),
        ("hpa", {"min": "0"}, "hpa: min = '0', must be a whole number of at least 1"),
        ("hpa", {"metric": "rps"}, "hpa: metric = 'rps', must be cpu or concurrency"),
        ("hpa", {"min": "5", "max": "4"}, "hpa: max = '4', min (5) must be at most max (4)"),
        ("keep-alive", {"keep": "soon"}, "must be a duration"),
        ("kpa", {"windw": "30s"}, "kpa: windw = '30s', there is no such annotation; did you mean window?"),
        ("kpa", {"window": "3s"}, "kpa: window = '3s', must be a duration from 6s to 1h"),
        ("kpa", {"max-scale-up-rate": "1"}, "max-scale-up-rate = '1', must be"),
        ("oracle", {"x": "1"}, "oracle: x = '1', there is no such knob; it has none"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(name: str, knobs: dict[str, str], problem: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make_policy(name, knobs, model_of(), future=lambda: iter([]))
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", policy_names())
def test_each_policy_says_where_it_comes_from(name: str) -> None:
    policy = make_policy(name, {}, model_of(), history=lambda: iter([]), future=lambda: iter([]))
    assert policy.name == name
    assert policy.source
    assert policy.__doc__
