"""Batches of like size: how a batch is cut, what that must not do to anybody, and what an agent tells of sizes."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from function.batcher import Batcher, Call, CallContext
from function.cost import SizedCost, padded
from function.errors import ClientGone
from function.guarded_agent import GuardedAgent
from function.parts import Slice
from function.priority import Priority


def cost(fixed_s: float, each_s: float) -> SizedCost:
    """It, after batches that took exactly so long."""
    found = SizedCost()
    for size in (10.0, 1000.0, 100.0, 4000.0) * 5:
        found.add(size, fixed_s + each_s * size)
    return found


def seconds(parts: Sequence[Sequence[int]], sizes: Sequence[float], fixed_s: float, each_s: float) -> float:
    return sum(fixed_s + each_s * padded([sizes[index] for index in part]) for part in parts)


def test_what_is_fixed_is_told_from_what_sizes_cost() -> None:
    assert cost(0.004, 0.001).line() == pytest.approx((0.004, 0.001))
    assert cost(0.01, 0.0).line() == pytest.approx((0.01, 0.0))
    assert cost(0.0, 0.001).line() == pytest.approx((0.0, 0.001), abs=1e-12)


def test_nothing_is_told_apart_by_batches_that_are_all_alike() -> None:
    found = SizedCost()
    assert found.line() is None
    for _ in range(50):
        found.add(100.0, 0.1)
    assert (found.line(), found.fixed_s) == (None, float("inf"))


MIXED = [5.0, 250.0, 7.0, 240.0, 6.0, 245.0, 8.0, 255.0]


def test_a_batch_is_cut_where_padding_costs_more_than_another_batch() -> None:
    assert cost(0.2, 0.001).parts(MIXED) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_batch_stays_whole_where_another_one_costs_more_than_padding() -> None:
    assert cost(1.0, 0.0001).parts(MIXED) == [list(range(8))]
    assert cost(0.01, 0.001).parts([10.0, 12.0, 9.0, 11.0]) == [[0, 1, 2, 3]]  # hardly less
    assert cost(0.001, 0.001).parts([40.0] * 8) == [list(range(8))]
    assert cost(0.001, 0.001).parts([0.0] * 3) == [[0, 1, 2]]


def test_while_nothing_is_known_much_padding_is_cut_once_to_learn_what_that_saves() -> None:
    found = SizedCost()
    assert found.parts(MIXED) == [list(range(8))]
    found.add(padded(MIXED), 0.1)
    assert found.parts([200.0, 190.0, 210.0]) == [[0, 1, 2]]
    parts = found.parts(MIXED)
    assert parts == [[0, 2, 4, 6], [1, 3, 5, 7]]
    for part in parts:
        found.add(padded([MIXED[index] for index in part]), 0.1)  # as long as the whole: all of it is fixed
    assert found.parts(MIXED) == [list(range(8))]


def test_only_as_many_are_sorted_as_it_takes() -> None:
    """The two halves are alike inside already, so that nobody need be computed before who came earlier."""
    parts = cost(0.001, 0.001).parts([10.0] * 8 + [500.0] * 8)
    assert [index for part in parts for index in part] == list(range(16))


@given(
    st.lists(st.floats(0, 1e4), min_size=1, max_size=70),
    st.floats(1e-6, 1),
    st.floats(1e-6, 1),
)
def test_a_cut_takes_no_longer_than_the_whole_and_leaves_nobody_out(sizes: list[float], fixed_s: float, each_s: float) -> None:
    found = cost(fixed_s, each_s)
    parts = found.parts(sizes)
    assert sorted(index for part in parts for index in part) == list(range(len(sizes)))
    assert all(part == sorted(part) for part in parts)
    line = found.line()
    assert line
    assert seconds(parts, sizes, *line) <= seconds([range(len(sizes))], sizes, *line) * (1 + 1e-9)


def batcher(max_batch: int = 8, sized: SizedCost | None = None, limit: int = 1000) -> Batcher:
    """One of an agent whose inputs are their own sizes; an input below 0 has none."""
    found = Batcher(max_batch=max_batch, wait_s=0, limit=limit)
    found.parts.measure = lambda inputs: [float(item) if item >= 0 else None for item in inputs]
    found.parts._cost = sized or cost(0.2, 0.001)
    return found


def call(*inputs: float, group: bytes = b"", **ask: Any) -> Call:
    return Call(inputs, CallContext(60.0, **ask), time.monotonic(), group=group)


def batches(of: Batcher) -> list[list[Slice]]:
    """All that is computed; each input is answered with itself."""
    found = []
    while of.waiting() or of.parts:
        slices = of.batch(may_wait=False)
        found.append(slices)
        for part in slices:
            part.call.add(part.inputs, part.at)
    return found


def inputs(slices: Sequence[Slice]) -> list[float]:
    return [item for part in slices for item in part.inputs]


def test_calls_of_like_size_are_computed_together() -> None:
    queue = batcher()
    for size in MIXED:
        queue.put(call(size))
    assert [inputs(slices) for slices in batches(queue)] == [[5, 7, 6, 8], [250, 240, 245, 255]]


def test_a_long_call_is_sorted_and_answered_in_its_own_order() -> None:
    queue, long = batcher(max_batch=4), call(5, 250, 7, 240, 6, 245, 8, 255)
    queue.put(long)
    assert [inputs(slices) for slices in batches(queue)] == [[255, 250, 245, 240], [8, 7, 6, 5]]
    assert long.reply.result(0) == [5, 250, 7, 240, 6, 245, 8, 255]


def test_each_size_is_asked_for_once_however_long_the_call_is() -> None:
    asked: list[float] = []
    queue = batcher(max_batch=2)

    def measure(items: Sequence[float]) -> list[float | None]:
        asked.extend(items)
        return [1.0] * len(items)

    queue.parts.measure = measure
    for item in (call(1, 2, 3, 4, 5), call(6)):
        queue.put(item)
    batches(queue)
    assert asked == [1, 2, 3, 4, 5, 6]


def test_a_batch_of_which_one_size_is_not_known_stays_as_it_is() -> None:
    queue, long = batcher(), call(5, 250, -1, 6)
    for item in (long, call(250), call(5)):
        queue.put(item)
    assert [inputs(slices) for slices in batches(queue)] == [[5, 250, -1, 6, 250, 5]]
    assert long.reply.result(0) == [5, 250, -1, 6]


def test_who_has_left_is_not_computed_with_the_parts_that_are_left() -> None:
    has_left = False
    queue = batcher()
    gone = call(250, is_gone=lambda: has_left)
    for item in (call(5), gone, call(6), call(245)):
        queue.put(item)
    assert inputs(queue.batch(may_wait=False)) == [5, 6]
    has_left = True
    assert inputs(queue.batch(may_wait=False)) == [245]
    with pytest.raises(ClientGone):
        gone.reply.result(0)


def test_interactive_callers_do_not_wait_for_the_parts_of_batch_work() -> None:
    queue = batcher()
    for size in (5, 250, 6, 245):
        queue.put(call(size, priority=Priority.BATCH))
    assert inputs(queue.batch(may_wait=False)) == [5, 6]
    queue.put(call(77))
    assert [inputs(slices) for slices in batches(queue)] == [[77], [250, 245]]


def test_a_model_with_parts_before_it_is_not_idle_and_does_not_wait() -> None:
    queue = batcher(limit=1, sized=cost(0.05, 0.001))
    assert queue.put(call(5))
    assert queue.put(call(250))  # an idle model takes both
    assert inputs(queue.batch(may_wait=False)) == [5]
    queue.computed(1, 0.01, is_idle=True)
    queue.wait()  # comes back at once
    assert queue.put(call(1))
    assert not queue.put(call(2))


CALLS = st.lists(
    st.tuples(st.lists(st.integers(-1, 300), min_size=1, max_size=9), st.booleans(), st.sampled_from([b"", b"g"])), min_size=1, max_size=25
)


@given(CALLS, st.integers(1, 9), st.floats(0.0, 1.0), st.lists(st.integers(0, 3), min_size=25, max_size=25))
def test_nobody_is_overtaken_by_who_would_not_have_shared_the_batch(
    calls: list[tuple[list[int], bool, bytes]], max_batch: int, fixed_s: float, arrivals: list[int]
) -> None:
    """Beside a batcher that knows no sizes, whose batches the parts are of. Calls come while others are computed."""
    sized, plain = batcher(max_batch, cost(fixed_s, 0.001)), Batcher(max_batch=max_batch, wait_s=0, limit=1000)
    ours = [call(*sizes, priority=Priority(is_batch), group=group) for sizes, is_batch, group in calls]
    theirs = [call(*sizes, priority=Priority(is_batch), group=group) for sizes, is_batch, group in calls]
    come = 0
    waiting: dict[Priority, list[int]] = {priority: [] for priority in Priority}
    while come < len(calls) or any(waiting.values()):
        for _ in range(arrivals[come % 25] if any(waiting.values()) else 1):
            if come < len(calls):
                sized.put(ours[come])
                waiting[ours[come].context.priority].append(come)
                come += 1
        slices = sized.batch(may_wait=False)
        if not slices:
            continue
        chosen = [ours.index(part.call) for part in slices]
        assert len(inputs(slices)) <= max_batch
        assert len({(ours[number].context.priority, ours[number].group) for number in chosen}) == 1
        priority = ours[chosen[0]].context.priority
        assert waiting[priority][0] in chosen  # the oldest of its class is always in the next batch
        for part in slices:
            part.call.add(part.inputs, part.at)
            if part.call.reply.is_settled():
                waiting[priority].remove(ours.index(part.call))
    for mine, (sizes, _, _) in zip(ours, calls, strict=True):
        assert mine.reply.result(0) == sizes
    # All at once: batch by batch, the same calls have as many inputs in it, in however many parts.
    again = batcher(max_batch, cost(fixed_s, 0.001))
    for mine, other in zip([call(*one.inputs, priority=one.context.priority, group=one.group) for one in theirs], theirs, strict=True):
        again.put(mine)
        plain.put(other)
        mine.parameters = other.parameters = {"number": len(again._calls[0]) + len(again._calls[1])}
    parts = iter(batches(again))
    for whole in batches(plain):
        wanted, found = counted(whole), Counter[int]()
        while found.total() < wanted.total():
            found += counted(next(parts))
        assert found == wanted
    assert next(parts, None) is None


def counted(slices: Sequence[Slice]) -> Counter[int]:
    """How many inputs each call has in a batch, by the call's number."""
    return Counter({part.call.parameters["number"]: len(part.inputs) for part in slices if part.call.parameters})


# What the agent tells


class Sized:
    def load(self, weights: Any, device: str) -> None:
        pass

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return inputs

    def size(self, input: Any) -> Any:
        if isinstance(input, Exception):
            raise input
        return input


@pytest.mark.parametrize(("told", "size"), [(3, 3.0), (2.5, 2.5), (True, 1.0), (0, 0.0)])
def test_a_number_is_a_size(told: Any, size: float) -> None:
    assert GuardedAgent(Sized()).sizes([told]) == [size]


@pytest.mark.parametrize(
    "told", [-1, float("nan"), float("inf"), None, "many", [1], ValueError("no"), SystemExit(3)], ids=lambda told: repr(told)
)
def test_what_is_no_size_is_not_known_and_the_log_says_so_once(told: Any, caplog: pytest.LogCaptureFixture) -> None:
    agent = GuardedAgent(Sized())
    with caplog.at_level(logging.ERROR):
        assert agent.sizes([told, 2, told]) == [None, 2.0, None]
        assert agent.sizes([told]) == [None]
    assert [record.getMessage()[:29] for record in caplog.records] == ["the agent's size() failed; su"]
    assert agent.busy_since is None


def test_an_agent_need_not_tell_sizes() -> None:
    class Unsized(Sized):
        size: Any = None

    assert not GuardedAgent(Unsized()).tells_sizes
    assert GuardedAgent(Sized()).tells_sizes


def test_where_eight_neighbours_bring_nearly_all_there_is_to_gain_no_more_of_them_are_sorted() -> None:
    sizes = [20 + 37 * number % 230 for number in range(32)]
    parts = cost(1e-5, 1e-4).parts(sizes)
    assert sorted(index for part in parts for index in part) == list(range(32))
    assert len(parts) > 4
    assert all(part[0] // 8 == part[-1] // 8 for part in parts)
