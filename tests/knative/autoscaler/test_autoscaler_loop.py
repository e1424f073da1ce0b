"""One revision's autoscaler as its owner uses it: record, tick, poke."""

import math

import pytest

from knative.autoscaler import TICK_S, Activity, Autoscaler, ScaleSpec, SpecError, Status, reconcile

SPEC = ScaleSpec.parse({"window": "20s", "target": "1", "target-utilization-percentage": "100"})


def test_no_data_is_no_decision() -> None:
    assert Autoscaler(SPEC, ready=0, now=0).tick(0, ready=0) is None


def test_a_sample_of_0_is_data() -> None:
    autoscaler = Autoscaler(SPEC, ready=0, now=0)
    autoscaler.record(0, concurrency=0)
    decision = autoscaler.tick(0, ready=0)
    assert decision is not None
    assert decision.desired == 0


def test_with_an_unlimited_burst_silence_is_no_load() -> None:
    autoscaler = Autoscaler(ScaleSpec.parse({"target-burst-capacity": "-1"}), ready=0, now=0)
    decision = autoscaler.tick(0, ready=0)
    assert decision is not None
    assert (decision.desired, decision.excess_burst_capacity) == (0, -1)


def test_data_older_than_the_window_is_no_data_and_the_last_decision_stands() -> None:
    autoscaler = Autoscaler(SPEC, ready=0, now=0)
    autoscaler.record(0, concurrency=3)
    decision = autoscaler.tick(0, ready=0)
    at_the_edge = autoscaler.tick(20, ready=3)
    assert at_the_edge is not None
    assert at_the_edge.stable == 0
    assert autoscaler.tick(21, ready=3) is None
    assert autoscaler.last is at_the_edge
    assert decision is not None
    assert decision.desired == 3


def test_samples_of_one_second_add_up() -> None:
    autoscaler = Autoscaler(SPEC, ready=1, now=0)
    autoscaler.record(0, concurrency=1.5)
    autoscaler.record(0.9, concurrency=2.5)
    decision = autoscaler.tick(1, ready=1)
    assert decision is not None
    assert decision.stable == 4


def test_only_the_metric_of_the_spec_counts() -> None:
    by_rps = Autoscaler(ScaleSpec.parse({"metric": "rps", "target": "10"}), ready=0, now=0)
    by_rps.record(0, concurrency=99)
    assert by_rps.tick(0, ready=0) is None
    by_rps.record(0, concurrency=99, rps=14)
    decision = by_rps.tick(0, ready=0)
    assert decision is not None
    assert (decision.stable, decision.desired) == (14, 2)


def test_the_weighted_average_is_used_where_it_is_asked_for() -> None:
    spec = ScaleSpec.parse({"metric-aggregation-algorithm": "weighted-exponential"})
    autoscaler = Autoscaler(spec, ready=0, now=0)
    autoscaler.record(0, concurrency=10)
    decision = autoscaler.tick(0, ready=0)
    assert decision is not None
    assert decision.stable == pytest.approx(2.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_no_number_is_refused(value: float) -> None:
    autoscaler = Autoscaler(SPEC, ready=0, now=0)
    with pytest.raises(ValueError, match="a sample of concurrency must be finite"):
        autoscaler.record(0, concurrency=value)
    assert autoscaler.tick(0, ready=0) is None


def test_another_class_is_not_decided_here() -> None:
    with pytest.raises(SpecError, match=r"^class = 'hpa\.autoscaling\.knative\.dev', must be kpa"):
        Autoscaler(ScaleSpec.parse({"class": "hpa.autoscaling.knative.dev"}), ready=0, now=0)


def test_a_request_pokes_only_where_zero_was_decided() -> None:
    autoscaler = Autoscaler(SPEC, ready=0, now=0)
    assert not autoscaler.needs_poke(1), "nothing was decided yet"
    autoscaler.record(0, concurrency=0)
    autoscaler.tick(0, ready=0)
    assert autoscaler.needs_poke(0.01)
    assert not autoscaler.needs_poke(0), "there is no request"
    autoscaler.record(1, concurrency=1)
    autoscaler.tick(1, ready=0)
    assert not autoscaler.needs_poke(1), "pods are wanted already"


def test_zero_without_data_still_pokes() -> None:
    autoscaler = Autoscaler(SPEC, ready=0, now=0)
    autoscaler.record(0, concurrency=0)
    autoscaler.tick(0, ready=0)
    assert autoscaler.tick(1000, ready=0) is None
    assert autoscaler.needs_poke(1)


def test_a_function_wakes_serves_and_goes_back_to_zero() -> None:
    """The whole story, with requests from 20 s to 40 s and a pod that takes 3 s to start."""
    spec = ScaleSpec.parse({"window": "10s", "initial-scale": "0"}, 2, {"allow-zero-initial-scale": "true"})
    autoscaler, status = Autoscaler(spec, ready=0, now=0), Status.initial(0)
    pods, started = 0, 0
    story: list[tuple[int, int, Activity]] = []
    for now in range(121):
        ready = pods if now >= started + 3 else 0
        load = 1.0 if 21 <= now < 40 else 0.0
        autoscaler.record(now, concurrency=load)
        if now % TICK_S == 0 or autoscaler.needs_poke(load):
            autoscaler.tick(now, ready)
        step = reconcile(spec, autoscaler.last, status, ready, now)
        status = step.status
        if step.pods is not None and step.pods != pods:
            pods, started = step.pods, now
        if not story or story[-1][1:] != (pods, status.activity):
            story.append((now, pods, status.activity))
    assert story == [
        (0, 0, Activity.INACTIVE),
        (21, 1, Activity.ACTIVATING),  # a poke, for there is no tick at 21 s
        (24, 1, Activity.ACTIVE),
        (50, 1, Activity.INACTIVE),  # the first tick whose window has seen no request
        (51, 0, Activity.INACTIVE),  # the activator was in the path all along
    ]
