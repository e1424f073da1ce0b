"""How many pods a revision is to have: Knative's `Scale`, as pure functions.

Each takes what is known and the time, and returns numbers and, where there is one, the state to pass in next time. Source of the rules:
pkg/autoscaler/scaling/autoscaler.go at knative/serving 98e5ef90aa, where one method makes all these decisions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from knative.autoscaler.spec import ScaleSpec

TICK_S = 2  # between decisions; the slots of the scale-down delay are as long


@dataclass(frozen=True)
class Load:
    """What is measured of a revision. No data is no Load, which is not the same as a Load of 0."""

    stable: float  # average over the stable window, all pods together
    panic: float  # average over the panic window
    ready: int  # pods


@dataclass(frozen=True)
class Panic:
    """Whether the revision is in panic, and what it may not fall below until that ends."""

    since: float | None = None  # seconds; when the threshold was last crossed, None out of panic
    max_pods: int = 0  # largest count wanted in this panic


class Slot(NamedTuple):
    """The largest count wanted within one tick's length of time; slots are numbered by time."""

    number: int
    pods: int


@dataclass(frozen=True)
class State:
    """What one decision leaves for the next. `delay`: counts that may yet hold a scale-down up, latest last, falling."""

    panic: Panic = field(default_factory=Panic)
    delay: tuple[Slot, ...] = ()

    @classmethod
    def initial(cls, ready: int, now: float) -> State:
        """The state of a new autoscaler.

        One that finds more than one pod begins in panic: it has lost (or never had) the history by which it could tell that fewer do.
        """
        return cls(Panic(now if ready > 1 else None, ready))


@dataclass(frozen=True)
class Decision:
    """What was decided at one tick, and what it was decided from."""

    desired: int  # pods
    bounded: int  # pods, within min-scale and max-scale
    stable: float  # average over the stable window
    panic_value: float  # average over the panic window
    excess_burst_capacity: int  # room for more load beyond the target burst; below 0 the activator should be in the path
    panic: bool
    max_panic_pods: int


def decide(spec: ScaleSpec, load: Load, state: State, now: float) -> tuple[Decision, State]:
    """The decision for `load` at `now` (seconds), and the state for the next one."""
    wanted = want(spec, load)
    panic = next_panic(spec, wanted.over_threshold, state.panic, now)
    desired, panic = hold_in_panic(wanted, panic)
    desired, delay = delay_scale_down(spec, desired, state.delay, now)
    decision = Decision(
        desired=desired,
        bounded=bound(spec, desired),
        stable=load.stable,
        panic_value=load.panic,
        excess_burst_capacity=excess_burst_capacity(spec, load),
        panic=panic.since is not None,
        max_panic_pods=panic.max_pods,
    )
    return decision, State(panic, delay)


class Wanted(NamedTuple):
    """Pods by the two windows, and whether the panic window asks for so many that it is time to panic."""

    stable: int
    panic: int
    over_threshold: bool


def want(spec: ScaleSpec, load: Load) -> Wanted:
    """The pods that would bring each to its target, no further from those ready now than the rates allow.

    Rounding is away from standing still. E.g. max-scale-up-rate 1.1 and 2 ready pods: 2.2 pods may be wanted, and that is 3.
    """
    ready = max(1, load.ready)
    most = math.ceil(spec.max_scale_up_rate * ready)
    # Nobody notices how fast an unreachable revision goes.
    least = math.floor(ready / spec.max_scale_down_rate) if spec.reachable else 0

    def limited(pods: int) -> int:
        within_rates = min(max(pods, least), most)
        return max(within_rates, spec.activation_scale) if pods > 0 else within_rates

    stable, surge = math.ceil(load.stable / spec.target), math.ceil(load.panic / spec.target)
    return Wanted(limited(stable), limited(surge), surge / ready >= spec.panic_threshold)


def next_panic(spec: ScaleSpec, over_threshold: bool, panic: Panic, now: float) -> Panic:
    """Panic begins, or begins anew, over the threshold, and ends a stable window after the last time: by then that window has seen it."""
    if over_threshold:
        return replace(panic, since=now)
    if panic.since is not None and panic.since + spec.stable_window_s < now:
        return Panic()
    return panic


def hold_in_panic(wanted: Wanted, panic: Panic) -> tuple[int, Panic]:
    """Pods desired: the stable count, or in panic the largest of both counts since panic began, for then nothing is scaled down."""
    if panic.since is None:
        return wanted.stable, panic
    pods = max(wanted.stable, wanted.panic, panic.max_pods)
    return pods, replace(panic, max_pods=pods)


def delay_scale_down(spec: ScaleSpec, pods: int, delay: tuple[Slot, ...], now: float) -> tuple[int, tuple[Slot, ...]]:
    """The largest count wanted within the scale-down delay, and the counts that may decide that later.

    A count is forgotten once a later one is as large. Slots begin at even seconds, so that a delay of 5 s reaches from 4 to 6 s back.
    """
    if not spec.scale_down_delay_s or not spec.reachable:
        return pods, delay
    number, slots = math.floor(now) // TICK_S, math.ceil(spec.scale_down_delay_s / TICK_S)
    kept = tuple(slot for slot in delay if slot.pods > pods and number - slot.number < slots)
    if not kept or kept[-1].number != number:  # else this slot has had a larger count already
        kept += (Slot(number, pods),)
    return kept[0].pods, kept


def excess_burst_capacity(spec: ScaleSpec, load: Load) -> int:
    """What the ready pods could take beyond the load of the panic window and the target burst.

    Always 0 where no burst is to be expected, always -1 where it is unlimited.
    """
    if spec.target_burst_capacity == 0:
        return 0
    if spec.target_burst_capacity < 0:
        return -1
    return math.floor(load.ready * spec.total - spec.target_burst_capacity - load.panic)


def bound(spec: ScaleSpec, pods: int, initialized: bool = True) -> int:
    """`pods` within min-scale and max-scale.

    Until the revision was once `initialized`, an initial scale above 1 is a minimum too. A minimum wins over max-scale.
    """
    least = spec.min_scale if spec.reachable else 0
    if spec.reachable and not initialized and spec.initial_scale > 1:
        least = max(least, spec.initial_scale)
    if pods < least:
        return least
    return min(pods, spec.max_scale) if spec.max_scale else pods
