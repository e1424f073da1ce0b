"""The four decisions of a tick, each on its own and together."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knative.autoscaler import ScaleSpec, bound
from knative.autoscaler.decide import (
    Decision,
    Load,
    Panic,
    Slot,
    State,
    Wanted,
    decide,
    delay_scale_down,
    excess_burst_capacity,
    hold_in_panic,
    next_panic,
    want,
)

STEADY = settings(derandomize=True, deadline=None, max_examples=300)

# Two requests at once per pod, all of it aimed at.
SPEC = ScaleSpec(target=2, total=2)


@pytest.mark.parametrize(
    ("spec", "load", "wanted"),
    [
        pytest.param(SPEC, Load(0, 0, 0), Wanted(0, 0, False), id="no load wants no pods"),
        pytest.param(SPEC, Load(0.001, 0, 0), Wanted(1, 0, False), id="any load wants one"),
        pytest.param(SPEC, Load(4, 4, 2), Wanted(2, 2, False), id="load at the target wants what there is"),
        pytest.param(SPEC, Load(4.000001, 4, 2), Wanted(3, 2, False), id="a little more wants another pod"),
        pytest.param(SPEC, Load(0, 0, 5), Wanted(2, 2, False), id="at most half of the pods go in one tick"),
        pytest.param(SPEC, Load(0, 0, 1), Wanted(0, 0, False), id="the last pod may go at once"),
        pytest.param(SPEC, Load(9e5, 9e5, 3), Wanted(3000, 3000, True), id="a thousand times the pods come at most"),
        pytest.param(replace(SPEC, max_scale_up_rate=1.1), Load(6, 6, 2), Wanted(3, 3, False), id="a low rate still allows one more"),
        pytest.param(replace(SPEC, max_scale_down_rate=1.1), Load(0, 0, 2), Wanted(1, 1, False), id="a low rate still allows one less"),
        pytest.param(replace(SPEC, reachable=False), Load(0, 0, 9), Wanted(0, 0, False), id="unreachable pods all go at once"),
        pytest.param(SPEC, Load(0, 8, 2), Wanted(1, 4, True), id="twice the ready pods is over the threshold"),
        pytest.param(SPEC, Load(0, 6, 2), Wanted(1, 3, False), id="less is not"),
        pytest.param(SPEC, Load(0, 2, 0), Wanted(0, 1, False), id="without ready pods one is assumed"),
        pytest.param(replace(SPEC, max_scale_up_rate=1.5), Load(0, 8, 2), Wanted(1, 3, True), id="the threshold knows no rates"),
        pytest.param(replace(SPEC, activation_scale=3), Load(1, 0, 0), Wanted(3, 0, False), id="activation scale raises any but zero"),
        pytest.param(
            replace(SPEC, activation_scale=9, max_scale_up_rate=1.1), Load(1, 1, 1), Wanted(9, 9, False), id="and knows no rates either"
        ),
    ],
)
def test_each_window_wants_pods_within_the_rates(spec: ScaleSpec, load: Load, wanted: Wanted) -> None:
    assert want(spec, load) == wanted


@pytest.mark.parametrize(
    ("over", "panic", "now", "after"),
    [
        pytest.param(True, Panic(), 5, Panic(5), id="over the threshold panic begins"),
        pytest.param(True, Panic(5, 7), 9, Panic(9, 7), id="still over it panic is extended"),
        pytest.param(False, Panic(5, 7), 65, Panic(5, 7), id="for a stable window after the last time panic goes on"),
        pytest.param(False, Panic(5, 7), 65.1, Panic(), id="then it ends and its pods are forgotten"),
        pytest.param(False, Panic(), 5, Panic(), id="under the threshold nothing happens"),
        pytest.param(True, Panic(0, 7), 60.5, Panic(60.5, 7), id="an old panic that flares up keeps its pods"),
    ],
)
def test_panic_begins_and_ends(over: bool, panic: Panic, now: float, after: Panic) -> None:
    assert next_panic(SPEC, over, panic, now) == after


@pytest.mark.parametrize(
    ("wanted", "panic", "pods", "after"),
    [
        pytest.param(Wanted(2, 9, True), Panic(), 2, Panic(), id="out of panic the stable window decides"),
        pytest.param(Wanted(2, 9, True), Panic(0), 9, Panic(0, 9), id="in panic the larger of both"),
        pytest.param(Wanted(9, 2, False), Panic(0), 9, Panic(0, 9), id="whichever it is"),
        pytest.param(Wanted(1, 2, False), Panic(0, 9), 9, Panic(0, 9), id="and never less than before"),
    ],
)
def test_panic_never_scales_down(wanted: Wanted, panic: Panic, pods: int, after: Panic) -> None:
    assert hold_in_panic(wanted, panic) == (pods, after)


@pytest.mark.parametrize(
    ("delay_s", "counts", "delayed"),
    [
        pytest.param(0, [(0, 9), (2, 1)], [9, 1], id="no delay"),
        pytest.param(1, [(0, 9), (1, 1)], [9, 9], id="the shortest delay holds within its slot"),
        pytest.param(1, [(1, 9), (2, 1)], [9, 1], id="and not beyond"),
        pytest.param(5, [(0, 9), (2, 1), (4, 1), (6, 1)], [9, 9, 9, 1], id="5 s are three slots"),
        pytest.param(6, [(0, 9), (4, 1), (5.99, 1), (6, 1)], [9, 9, 9, 1], id="as are 6 s"),
        pytest.param(6, [(0, 9), (2, 5), (4, 3), (6, 1), (8, 1), (10, 1)], [9, 9, 9, 5, 3, 1], id="a descent follows step by step"),
        pytest.param(60, [(0, 3), (2, 9), (4, 4)], [3, 9, 9], id="scaling up is not delayed"),
        pytest.param(6, [(0, 3), (0, 1), (1, 2)], [3, 3, 3], id="the largest count of a slot counts"),
        pytest.param(6, [(0, 9), (100, 1)], [9, 1], id="a jump in time forgets all"),
    ],
)
def test_scale_down_waits_for_its_delay(delay_s: float, counts: list[tuple[float, int]], delayed: list[int]) -> None:
    spec, got = replace(SPEC, scale_down_delay_s=delay_s), []
    slots: tuple[Slot, ...] = ()
    for now, pods in counts:
        pods, slots = delay_scale_down(spec, pods, slots, now)
        got.append(pods)
    assert got == delayed


def test_an_unreachable_revision_is_not_held_up() -> None:
    spec = replace(SPEC, scale_down_delay_s=60, reachable=False)
    assert delay_scale_down(spec, 1, (Slot(0, 9),), 0) == (1, (Slot(0, 9),))


@pytest.mark.parametrize(
    ("burst", "load", "capacity"),
    [
        pytest.param(0, Load(0, 99, 1), 0, id="no burst expected"),
        pytest.param(-1, Load(0, 0, 99), -1, id="unlimited burst"),
        pytest.param(211, Load(0, 0, 0), -211, id="no pods"),
        pytest.param(10, Load(99, 3.5, 10), 6, id="room left over, rounded down"),
        pytest.param(10, Load(0, 10.5, 10), -1, id="not quite enough"),
        pytest.param(10, Load(0, 10, 10), 0, id="just enough"),
    ],
)
def test_excess_burst_capacity_is_what_the_ready_pods_have_left(burst: float, load: Load, capacity: int) -> None:
    assert excess_burst_capacity(replace(SPEC, target_burst_capacity=burst), load) == capacity


@pytest.mark.parametrize(
    ("spec", "pods", "initialized", "bounded"),
    [
        pytest.param(ScaleSpec(), 7, True, 7, id="no bounds"),
        pytest.param(ScaleSpec(min_scale=2, max_scale=5), 1, True, 2, id="at least the minimum"),
        pytest.param(ScaleSpec(min_scale=2, max_scale=5), 6, True, 5, id="at most the maximum"),
        pytest.param(ScaleSpec(min_scale=2, reachable=False), 0, True, 0, id="unreachable has no minimum"),
        pytest.param(ScaleSpec(initial_scale=3), 1, False, 3, id="a new revision has its initial scale"),
        pytest.param(ScaleSpec(initial_scale=2), 1, False, 2, id="from two on"),
        pytest.param(ScaleSpec(initial_scale=3), 1, True, 1, id="only until it was reached"),
        pytest.param(ScaleSpec(initial_scale=1), 0, False, 0, id="an initial scale of one does not keep a pod"),
        pytest.param(ScaleSpec(initial_scale=3, reachable=False), 0, False, 0, id="nor any for an unreachable revision"),
        pytest.param(ScaleSpec(initial_scale=3, max_scale=2), 1, False, 3, id="the initial scale wins over the maximum"),
    ],
)
def test_pods_stay_within_bounds(spec: ScaleSpec, pods: int, initialized: bool, bounded: int) -> None:
    assert bound(spec, pods, initialized) == bounded


@pytest.mark.parametrize(
    ("load", "state", "now", "desired", "panics"),
    [
        pytest.param(Load(0, 0, 1), State(), 0, 0, False, id="idle goes to zero"),
        pytest.param(Load(2, 8, 1), State(), 0, 4, True, id="surge enters panic"),
        pytest.param(Load(1, 1, 4), State(Panic(0, 4)), 30, 4, True, id="panic never scales down"),
        pytest.param(Load(1, 1, 4), State(Panic(0, 4)), 61, 2, False, id="after panic it does"),
        pytest.param(Load(1, 1, 4), State(delay=(Slot(15, 3),)), 30, 3, False, id="the delay applies to what is left"),
    ],
)
def test_a_tick_decides_all_of_it(load: Load, state: State, now: float, desired: int, panics: bool) -> None:
    spec = replace(SPEC, scale_down_delay_s=10) if state.delay else SPEC
    decision, _ = decide(spec, load, state, now)
    assert (decision.desired, decision.panic) == (desired, panics)


def test_a_decision_is_bounded_by_minimum_and_maximum_alone() -> None:
    decision, _ = decide(replace(SPEC, initial_scale=5, max_scale=3), Load(8, 8, 2), State(), 0)
    assert (decision.desired, decision.bounded) == (4, 3)
    decision, _ = decide(replace(SPEC, initial_scale=5), Load(2, 2, 1), State(), 0)
    assert (decision.desired, decision.bounded) == (1, 1)


@pytest.mark.parametrize(("ready", "panic"), [(0, Panic(None, 0)), (1, Panic(None, 1)), (2, Panic(7, 2))])
def test_an_autoscaler_that_finds_several_pods_begins_in_panic(ready: int, panic: Panic) -> None:
    assert State.initial(ready, 7).panic == panic


SPECS = st.builds(
    ScaleSpec,
    target=st.sampled_from([0.01, 0.7, 2.0, 70.0]),
    total=st.sampled_from([1.0, 3.0, 100.0]),
    stable_window_s=st.sampled_from([6, 20, 60]),
    panic_threshold=st.sampled_from([1.1, 2.0, 10.0]),
    max_scale_up_rate=st.sampled_from([1.1, 2.0, 1000.0]),
    max_scale_down_rate=st.sampled_from([1.1, 2.0, 10.0]),
    scale_down_delay_s=st.sampled_from([0.0, 1.0, 5.0, 30.0]),
    activation_scale=st.sampled_from([0, 2, 5]),
    target_burst_capacity=st.sampled_from([-1.0, 0.0, 10.0, 211.0]),
    min_scale=st.sampled_from([0, 1, 3]),
    max_scale=st.sampled_from([0, 3, 10]),
)
LOADS = st.builds(Load, st.floats(0, 500), st.floats(0, 500), st.integers(0, 20))
TICKS = st.lists(st.tuples(st.sampled_from([0, 1, 2, 2, 2, 20, 90]), LOADS), min_size=1, max_size=40)


def decisions(spec: ScaleSpec, ticks: list[tuple[int, Load]]) -> list[Decision]:
    state, now, made = State(), 0, []
    for step, load in ticks:
        now += step
        decision, state = decide(spec, load, state, now)
        made.append(decision)
    return made


@STEADY
@given(SPECS, TICKS)
def test_bounds_are_respected_whatever_happens(spec: ScaleSpec, ticks: list[tuple[int, Load]]) -> None:
    for decision in decisions(spec, ticks):
        assert spec.min_scale <= decision.bounded
        assert spec.max_scale == 0 or decision.bounded <= spec.max_scale
        assert decision.desired == decision.bounded or not spec.min_scale <= decision.desired <= (spec.max_scale or decision.desired)


@STEADY
@given(SPECS, TICKS)
def test_within_a_panic_the_count_never_falls(spec: ScaleSpec, ticks: list[tuple[int, Load]]) -> None:
    made = decisions(replace(spec, scale_down_delay_s=0.0), ticks)
    for before, after in pairwise(made):
        assert not (before.panic and after.panic) or after.desired >= before.desired
        assert after.panic or after.max_panic_pods == 0


@STEADY
@given(SPECS, TICKS)
def test_a_delay_only_ever_adds_pods_and_never_more_than_were_wanted_lately(spec: ScaleSpec, ticks: list[tuple[int, Load]]) -> None:
    delayed, prompt = decisions(spec, ticks), decisions(replace(spec, scale_down_delay_s=0.0), ticks)
    now, wanted = 0, []
    for (step, _), late, soon in zip(ticks, delayed, prompt, strict=True):
        now += step
        wanted.append((now, soon.desired))
        # A slot is two seconds, so the delay reaches up to two seconds further back.
        reach = [pods for t, pods in wanted if t >= now - spec.scale_down_delay_s - 2]
        assert soon.desired <= late.desired <= max(reach)


@STEADY
@given(SPECS, LOADS, st.floats(0, 100))
def test_more_load_never_wants_fewer_pods(spec: ScaleSpec, load: Load, more: float) -> None:
    less, greater = want(spec, load), want(spec, replace(load, stable=load.stable + more, panic=load.panic + more))
    assert less.stable <= greater.stable
    assert less.panic <= greater.panic
    assert less.over_threshold <= greater.over_threshold
