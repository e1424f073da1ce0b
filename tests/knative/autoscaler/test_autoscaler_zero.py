"""The way to zero and back: each wait on its own, whole lives as Knative's reconciler led them, and what always holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knative.autoscaler import Activity, Decision, ScaleSpec, Status, Step, reconcile
from knative.autoscaler.zero import ZeroStep, to_zero

STEADY = settings(derandomize=True, deadline=None, max_examples=200)

SPEC = ScaleSpec(stable_window_s=20, scale_to_zero_grace_period_s=30)
KEEPING = replace(SPEC, scale_to_zero_pod_retention_period_s=50)

# Lives of revisions, led by the reconciler of knative/serving 98e5ef90aa itself with its clock moved by hand.
LIVES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "reconcile.json").read_text())


def decision(desired: int, excess_burst_capacity: int = -1) -> Decision:
    return Decision(desired, desired, 0.0, 0.0, excess_burst_capacity, panic=False, max_panic_pods=0)


def activating(since: float = 0) -> Status:
    return Status(Activity.ACTIVATING, since, proxied_since=0, initialized=True)


def active(since: float = 0, proxied_since: float | None = 0) -> Status:
    return Status(Activity.ACTIVE, since, proxied_since, initialized=True)


def inactive(since: float = 0, proxied_since: float | None = 0) -> Status:
    return Status(Activity.INACTIVE, since, proxied_since, initialized=True)


@pytest.mark.parametrize(
    ("spec", "wanted", "status", "now", "step"),
    [
        pytest.param(SPEC, 3, inactive(), 0, ZeroStep(3, True), id="wanted pods are given at once"),
        pytest.param(replace(SPEC, enable_scale_to_zero=False), 0, inactive(), 99, ZeroStep(1, True), id="no scale to zero, one pod stays"),
        pytest.param(SPEC, 0, activating(), 630, ZeroStep(None, False, 630), id="a revision that starts is left to start"),
        pytest.param(SPEC, 0, activating(), 630.1, ZeroStep(0, True), id="30 s after the progress deadline it is given up"),
        pytest.param(SPEC, 0, active(), 15, ZeroStep(1, True, 5), id="one pod for the rest of the stable window"),
        pytest.param(SPEC, 0, active(), 19.5, ZeroStep(1, True, 0.5), id="to its very end"),
        pytest.param(SPEC, 0, active(), 20, ZeroStep(0, False, 3), id="then it turns inactive with its pods untouched"),
        pytest.param(SPEC, 0, inactive(15, 10), 20, ZeroStep(0, False, 20), id="the activator has not been in the path for long"),
        pytest.param(SPEC, 0, inactive(15, 10), 40, ZeroStep(0, True), id="a grace period in the path is long enough"),
        pytest.param(SPEC, 0, inactive(15, None), 90, ZeroStep(0, False, 1), id="without the activator in the path nothing goes"),
        pytest.param(
            replace(SPEC, target_burst_capacity=-1), 0, inactive(15, None), 45, ZeroStep(0, True), id="unless it is there by definition"
        ),
        pytest.param(
            replace(SPEC, target_burst_capacity=-1),
            0,
            inactive(15, None),
            20,
            ZeroStep(0, False, 30),
            id="which still takes the grace period",
        ),
        pytest.param(KEEPING, 0, inactive(15, 0), 60, ZeroStep(0, False, 5), id="the last pod is retained"),
        pytest.param(KEEPING, 0, inactive(15, 0), 65, ZeroStep(0, True), id="for the retention period"),
        pytest.param(replace(KEEPING, reachable=False), 0, inactive(15, 0), 60, ZeroStep(0, True), id="but not where it is unreachable"),
        pytest.param(
            replace(KEEPING, reachable=False), 0, inactive(15, 0), 15, ZeroStep(0, False, 15), id="where only the grace period counts"
        ),
        pytest.param(
            replace(SPEC, scale_to_zero_pod_retention_period_s=5),
            0,
            inactive(15, 12),
            25,
            ZeroStep(0, False, 17),
            id="a short retention does not shorten the grace period",
        ),
    ],
)
def test_a_revision_goes_to_zero_by_steps(spec: ScaleSpec, wanted: int, status: Status, now: float, step: ZeroStep) -> None:
    assert to_zero(spec, wanted, status, now) == step


@pytest.mark.parametrize("life", LIVES, ids=[life["title"] for life in LIVES])
def test_a_revision_lives_as_it_does_under_knative(life: dict[str, Any]) -> None:
    spec = replace(
        ScaleSpec.parse(life["annotations"], container_concurrency=2, config=life["config_autoscaler"]), reachable=life["reachable"]
    )
    status = Status.initial(0)
    for now, desired, burst, ready, *outcome in life["steps"]:
        step = reconcile(spec, None if desired is None else decision(desired, burst), status, ready, now)
        status = step.status
        got = [step.pods, status.activity.value, status.since, status.proxied_since is not None, status.initialized]
        assert got == outcome, f"at {now} s"


def test_requests_go_straight_to_the_pods_once_there_is_room_to_spare() -> None:
    beside = reconcile(SPEC, decision(2, excess_burst_capacity=0), active(0, 0), 2, 10).status
    assert beside.proxied_since is None
    assert reconcile(SPEC, decision(2, excess_burst_capacity=-1), beside, 2, 12).status.proxied_since == 12


@pytest.mark.parametrize(
    ("burst", "in_path"),
    [
        pytest.param(-1, True, id="an unlimited burst"),
        pytest.param(0, False, id="no burst"),
        pytest.param(299, False, id="what the initial scale can take"),
        pytest.param(301, True, id="more than the initial scale can take"),
    ],
)
def test_before_any_decision_the_initial_scale_tells_whether_the_activator_is_needed(burst: float, in_path: bool) -> None:
    spec = ScaleSpec(initial_scale=3, total=100, target_burst_capacity=burst)
    step = reconcile(spec, None, Status.initial(0), 0, 2)
    assert step.pods == 3
    assert (step.status.proxied_since is not None) is in_path


def test_the_activator_comes_back_into_the_path_when_none_is_wanted() -> None:
    step = reconcile(SPEC, decision(0, excess_burst_capacity=5), active(0, None), 1, 20)
    assert step == Step(None, Status(Activity.INACTIVE, since=20, proxied_since=20, initialized=True), 3)


def test_an_inactive_revision_without_a_decision_sleeps_on() -> None:
    assert reconcile(SPEC, None, inactive(), 0, 1000) == Step(None, inactive(), None)


def test_asking_again_changes_nothing() -> None:
    step = reconcile(SPEC, decision(1), activating(), 1, 5)
    assert reconcile(SPEC, decision(1), step.status, 1, 5) == step


SPECS = st.builds(
    ScaleSpec,
    stable_window_s=st.sampled_from([6, 20, 60]),
    scale_to_zero_grace_period_s=st.sampled_from([1.0, 30.0]),
    scale_to_zero_pod_retention_period_s=st.sampled_from([0.0, 10.0, 100.0]),
    target_burst_capacity=st.sampled_from([-1.0, 0.0, 211.0]),
    min_scale=st.sampled_from([0, 0, 2]),
    max_scale=st.sampled_from([0, 4]),
    initial_scale=st.sampled_from([0, 1, 3]),
    enable_scale_to_zero=st.booleans(),
)
MOMENTS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 2.0, 2.0, 10.0, 50.0]),
        st.none() | st.builds(decision, st.integers(0, 6), st.sampled_from([-5, 0])),
        st.integers(0, 5),
    ),
    max_size=60,
)


@STEADY
@given(SPECS, MOMENTS)
def test_the_last_pod_never_goes_early(spec: ScaleSpec, moments: list[tuple[float, Decision | None, int]]) -> None:
    status, now = Status.initial(0), 0.0
    for wait, made, ready in moments:
        now += wait
        step = reconcile(spec, made, status, ready, now)
        if step.pods == 0 and status.activity is Activity.INACTIVE:
            assert now - status.since >= spec.scale_to_zero_pod_retention_period_s
            assert status.proxied_since is not None
        if step.pods == 0:
            assert made is not None or status.activity is Activity.ACTIVATING
            assert spec.enable_scale_to_zero
            assert spec.min_scale == 0
            assert status.activity is not Activity.ACTIVE
        assert step.status.since <= now
        assert step.look_again_s is None or step.look_again_s > 0
        status = step.status


@STEADY
@given(SPECS.filter(lambda spec: spec.enable_scale_to_zero and not spec.min_scale), MOMENTS)
def test_without_traffic_every_revision_reaches_zero(spec: ScaleSpec, moments: list[tuple[float, Decision | None, int]]) -> None:
    status, now = Status.initial(0), 0.0
    for wait, made, ready in moments:
        now += wait
        status = reconcile(spec, made, status, ready, now).status
    pods: int | None = None
    # As many pods as it starts with, and then only waiting: to be active, inactive, retained, out of everybody's way.
    for _ in range(60):
        now += 5
        step = reconcile(spec, decision(0), status, max(1, spec.initial_scale), now)
        status, pods = step.status, step.pods
    assert pods == 0
