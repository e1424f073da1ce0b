"""Which calls are next, and who is waited for."""

import math
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from function.batcher import Batcher, Call, CallContext, StreamCall
from function.cost import Cost
from function.errors import ClientGone, TimedOut
from function.parts import Slice
from function.priority import Priority
from function.streams import Stream
from tests.support import wait_until


def queue(max_batch: int = 4, wait_s: float = 0.0, limit: int = 1000) -> Batcher:
    return Batcher(max_batch=max_batch, wait_s=wait_s, limit=limit)


def call(*inputs: Any, timeout_s: float = 60.0, **ask: Any) -> Call:
    return Call(inputs, CallContext(timeout_s, **ask), time.monotonic())


def stream_call(name: Any, timeout_s: float = 60.0, **ask: Any) -> StreamCall:
    found = CallContext(timeout_s, **ask)
    return StreamCall(name, found, time.monotonic(), Stream(found))


def at_once(batcher: Batcher) -> Sequence[Slice]:
    """The next batch, of a batcher that may wait for an hour; it must not."""
    found: list[Sequence[Slice]] = []
    threading.Thread(target=lambda: found.append(batcher.batch(may_wait=True)), daemon=True).start()
    return wait_until("the batch", lambda: found)[0]


def batches(batcher: Batcher) -> list[list[Any]]:
    """What the model is given, until nothing is left; each input is answered with itself."""
    found = []
    while slices := batcher.batch(may_wait=False):
        found.append([item for part in slices for item in part.inputs])
        for part in slices:
            part.call.add(part.inputs)
    return found


def test_inputs_are_counted_not_calls() -> None:
    batcher = queue(max_batch=4)
    for item in (call(1, 2, 3), call(4, 5), call(6)):
        assert batcher.put(item)
    assert batches(batcher) == [[1, 2, 3, 4], [5, 6]]


def test_a_long_call_is_taken_in_pieces_and_answered_whole() -> None:
    batcher, long = queue(max_batch=4), call(*range(10))
    batcher.put(long)
    assert batches(batcher) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert long.reply.result(0) == list(range(10))
    assert batcher.ahead(Priority.BATCH) == (0, 0)


def test_interactive_callers_come_before_batch_work_and_do_not_share_with_it() -> None:
    batcher = queue(max_batch=4)
    for item in (call("b1", "b2", "b3", priority=Priority.BATCH), call("i1"), call("b4", priority=Priority.BATCH), call("i2")):
        batcher.put(item)
    assert batches(batcher) == [["i1", "i2"], ["b1", "b2", "b3", "b4"]]


def test_an_interactive_caller_waits_for_one_batch_of_a_long_batch_call_at_most() -> None:
    batcher = queue(max_batch=4)
    batcher.put(call(*range(12), priority=Priority.BATCH))
    batcher.batch(may_wait=False)
    batcher.put(call("i"))
    assert batches(batcher)[0] == ["i"]


def computing(batcher: Batcher) -> Batcher:
    """It, while the model is at a batch."""
    batcher.put(call("running"))
    assert batcher.batch(may_wait=False)
    return batcher


def test_what_waits_is_bounded() -> None:
    batcher = computing(queue(limit=2))
    assert batcher.put(call(1))
    assert batcher.put(stream_call("s"))
    assert batcher.is_full(Priority.INTERACTIVE)
    assert not batcher.put(call(2))
    assert batcher.waiting() == 2


def test_batch_work_that_waits_keeps_no_interactive_caller_out() -> None:
    batcher = computing(queue(limit=2))
    assert [batcher.put(call(*range(3), priority=Priority.BATCH)) for _ in range(3)] == [True, True, False]
    assert batcher.is_full(Priority.BATCH)
    assert not batcher.is_full(Priority.INTERACTIVE)
    assert [batcher.put(item) for item in (call(1), stream_call("s"), call(2))] == [True, True, False]
    # Who comes next waits for its own class, and batch work for both.
    assert batcher.ahead(Priority.INTERACTIVE) == (1, 1)
    assert batcher.ahead(Priority.BATCH) == (7, 1)


def test_batch_work_is_not_taken_at_once_while_interactive_callers_wait() -> None:
    batcher = queue(max_batch=2, limit=1)
    assert accepted(batcher, (call(number, priority=Priority.BATCH) for number in range(9))) == 3
    assert batcher.put(call("i"))
    assert batcher.is_full(Priority.BATCH)


def accepted(batcher: Batcher, items: Iterable[Call | StreamCall]) -> int:
    return [batcher.put(item) for item in items].count(True)


def test_what_an_idle_model_takes_at_once_does_not_count_however_late_its_thread_is() -> None:
    batcher = queue(max_batch=1, limit=2)
    assert accepted(batcher, map(call, range(12))) == 3
    assert batcher.batch(may_wait=False)
    assert batcher.is_full(Priority.INTERACTIVE)
    assert not batcher.put(call("while the first is computed"))
    batcher.computed(1, 0.1, is_idle=True)  # and its caller, who hears of it now, may come again before the thread goes on
    assert accepted(batcher, map(call, range(12))) == 1
    batcher.computed(1, 0.1, is_idle=False)
    assert not batcher.put(call("before the next step of the streams"))


def test_an_idle_model_takes_as_many_rows_as_fit_and_whole_calls_only() -> None:
    batcher = queue(max_batch=4, limit=2)
    assert accepted(batcher, (call(*range(3)) for _ in range(12))) == 3
    assert accepted(queue(max_batch=4, limit=2), (call(*range(5)) for _ in range(12))) == 2


def test_an_idle_model_takes_streams_for_its_places() -> None:
    batcher = queue(max_batch=4, limit=2)
    assert accepted(batcher, map(stream_call, range(12))) == 6
    batcher = queue(max_batch=4, limit=2)
    batcher.places = 1
    assert accepted(batcher, map(stream_call, range(12))) == 3
    assert len(batcher.stream_calls((1, 1))) == 1
    assert not batcher.put(stream_call("while it is made"))


def test_nobody_computes_for_callers_who_have_left_or_whose_time_is_up() -> None:
    batcher = queue()
    gone, late, given_up, kept = call(1, is_gone=lambda: True), call(2, timeout_s=0.0), call(3), call(4)
    for item in (gone, late, given_up, kept):
        batcher.put(item)
    given_up.reply.cancel()
    assert batches(batcher) == [[4]]
    assert batcher.ahead(Priority.BATCH) == (0, 0)
    with pytest.raises(ClientGone):
        gone.reply.result(0)
    with pytest.raises(TimedOut):
        late.reply.result(0)


class Clock:
    """Shows what it is set to; calls and stream_calls are of this world's time."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


def test_streams_that_are_over_keep_nobody_out_although_there_is_no_place_for_them() -> None:
    clock = Clock()
    batcher = Batcher(max_batch=4, wait_s=0, limit=2, clock=clock)
    assert accepted(batcher, (stream_call("running") for _ in range(4))) == 4
    assert len(batcher.stream_calls((4, 4))) == 4
    gone, late, kept = stream_call("gone"), stream_call("late", timeout_s=1, priority=Priority.BATCH), stream_call("kept")
    assert accepted(batcher, (gone, late, kept)) == 3
    assert batcher.is_full(Priority.INTERACTIVE)
    gone.stream.close()
    clock.now += 2
    assert batcher.batch(may_wait=False) == []
    assert batcher.stream_calls((0, 0)) == []
    assert batcher.waiting() == 1
    with pytest.raises(ClientGone):
        gone.stream.wait_first()
    with pytest.raises(TimedOut, match="no piece within 1 s"):
        late.stream.wait_first()


def test_batch_work_that_is_over_keeps_nobody_out_while_interactive_callers_go_first() -> None:
    clock = Clock()
    batcher = Batcher(max_batch=1, wait_s=0, limit=4, clock=clock)
    late, gone = call(1, 2, timeout_s=1, priority=Priority.BATCH), call(3, priority=Priority.BATCH, is_gone=lambda: True)
    assert accepted(batcher, (late, gone, call("i1"), call("i2"))) == 4
    clock.now += 2
    assert [part.inputs for part in batcher.batch(may_wait=False)] == [("i1",)]
    assert (batcher.waiting(), batcher.ahead(Priority.BATCH)) == (1, (1, 0))
    with pytest.raises(TimedOut):
        late.reply.result(0)
    with pytest.raises(ClientGone):
        gone.reply.result(0)


def test_who_asks_for_a_full_queue_does_not_find_the_dead_in_it_while_a_long_batch_is_computed() -> None:
    clock = Clock()
    batcher = computing(Batcher(max_batch=1, wait_s=0, limit=2, clock=clock))
    assert accepted(batcher, (call(1, timeout_s=1), stream_call("s", timeout_s=1))) == 2
    assert batcher.is_full(Priority.INTERACTIVE)
    clock.now += 2
    assert not batcher.is_full(Priority.INTERACTIVE)
    assert batcher.waiting() == 0


def test_a_lone_call_is_not_held_up() -> None:
    batcher = queue(wait_s=3600)
    for _ in range(2):
        batcher.put(call(1))
        assert len(at_once(batcher)) == 1


def test_after_a_batch_with_company_as_much_company_is_waited_for() -> None:
    batcher = queue(max_batch=8, wait_s=3600)
    for item in range(2):
        batcher.put(call(item))
    assert len(batcher.batch(may_wait=True)) == 2
    batcher.put(call("first"))
    found: list[Sequence[Any]] = []
    waiting = threading.Thread(target=lambda: found.append(batcher.batch(may_wait=True)))
    waiting.start()
    time.sleep(0.05)
    assert not found
    batcher.put(call("second"))
    wait_until("the batch", lambda: found)
    waiting.join()
    assert [part.inputs for part in found[0]] == [("first",), ("second",)]


def test_a_call_that_missed_the_last_batch_waits_for_its_company_too() -> None:
    batcher = queue(max_batch=8, wait_s=3600)
    for item in range(2):
        batcher.put(call(item))
    assert len(batcher.batch(may_wait=True)) == 2
    batcher.put(Call(["missed it"], CallContext(60), time.monotonic() - 10))
    threading.Timer(0.05, lambda: batcher.put(call("again"))).start()
    assert [part.inputs for part in batcher.batch(may_wait=True)] == [["missed it"], ("again",)]


def test_company_that_does_not_come_is_not_waited_for_twice() -> None:
    batcher = queue(wait_s=0.1)
    for item in range(2):
        batcher.put(call(item))
    batcher.batch(may_wait=True)
    batcher.put(call("alone"))
    began = time.monotonic()
    assert len(batcher.batch(may_wait=True)) == 1
    assert time.monotonic() - began >= 0.1
    batcher._wait_s = 3600
    batcher.put(call("alone"))
    assert len(at_once(batcher)) == 1


def test_what_a_batch_costs_is_told_apart_once_their_sizes_differ() -> None:
    cost = Cost()
    assert (cost.fixed_s, cost.mean_s) == (math.inf, math.inf)
    for _ in range(5):
        cost.add(4, 0.014)
    assert cost.fixed_s == cost.mean_s == pytest.approx(0.014)  # it might be all
    for inputs in (1, 8, 2, 32, 4):
        cost.add(inputs, 0.002 + 0.003 * inputs)
    assert cost.fixed_s == pytest.approx(0.002)
    same = Cost()
    for inputs in (1, 8, 2, 32, 4):
        same.add(inputs, 0.02)
    assert same.fixed_s == pytest.approx(0.02)
    faster = Cost()
    for inputs in (1, 32):
        faster.add(inputs, 0.001 * inputs**2)  # the line would begin below nothing
    assert faster.fixed_s == 0


def rounds(clock: Clock, fixed_s: float, each_s: float, back_s: float) -> Batcher:
    """After many batches of 1 to 8 calls, whose callers are all back so long after it; nobody waits, and the last one had 8."""
    batcher = Batcher(max_batch=32, wait_s=0.2, limit=64, clock=clock)
    for size in [*range(1, 9)] * 5:
        for item in range(size):
            batcher.put(call(item))
        while slices := batcher.batch(may_wait=False):
            clock.now += fixed_s + each_s * len(slices)
            batcher.computed(len(slices), fixed_s + each_s * len(slices), is_idle=True)
        clock.now += back_s
    return batcher


@pytest.mark.parametrize(
    ("fixed_s", "each_s", "back_s", "sizes"),
    [
        pytest.param(0.002, 0.004, 0.010, [4, 4], id="halves: back later than sharing saves, and before a batch is over"),
        pytest.param(0.020, 0.001, 0.010, [8], id="together: sharing saves more"),
        pytest.param(0.002, 0.004, 1.000, [8], id="together: nobody will be back meanwhile"),
    ],
)
def test_callers_who_are_slow_to_be_back_are_computed_in_halves(fixed_s: float, each_s: float, back_s: float, sizes: list[int]) -> None:
    batcher = rounds(Clock(), fixed_s, each_s, back_s)
    for item in range(8):
        batcher.put(call(item))
    found = []
    while slices := batcher.batch(may_wait=True):
        found.append(len(slices))
        batcher.computed(len(slices), fixed_s + each_s * len(slices), is_idle=True)
    assert found == sizes


@pytest.mark.parametrize(
    ("back_s", "sizes"),
    [
        pytest.param([0.0] * 7 + [0.05], [8], id="one of them after a whole batch: halves would not be"),
        pytest.param([0.0] * 7 + [0.010], [4, 4], id="the last one before a batch is over"),
        pytest.param([0.010] * 8 + [0.5] * 4, [4, 4], id="those who come long after them are others"),
    ],
)
def test_callers_are_back_when_all_of_them_are(back_s: list[float], sizes: list[int]) -> None:
    clock = Clock()
    batcher = rounds(clock, 0.002, 0.004, 0.010)
    for _ in range(30):
        for _ in range(8):
            batcher.put(call("together"))
        computed(clock, batcher)
        ended = clock.now
        for seconds in back_s:
            clock.now = ended + seconds
            batcher.put(call("back"))
        while batcher.batch(may_wait=False):  # by a model that computes for nothing, and says so of nothing
            pass
    for item in range(8):
        batcher.put(call(item))
    computed(clock, batcher)
    for item in range(8):
        batcher.put(call(item))
    found = []
    while slices := batcher.batch(may_wait=True):
        found.append(len(slices))
        batcher.computed(len(slices), 0.002 + 0.004 * len(slices), is_idle=True)
    assert found == sizes


def computed(clock: Clock, batcher: Batcher) -> None:
    """All that waits, at the pace of those `rounds`."""
    while slices := batcher.batch(may_wait=False):
        clock.now += 0.002 + 0.004 * len(slices)
        batcher.computed(len(slices), 0.002 + 0.004 * len(slices), is_idle=True)


def test_a_full_batch_is_not_held_up_either() -> None:
    batcher = queue(max_batch=2, wait_s=3600)
    for item in range(2):
        batcher.put(call(item))
    batcher.batch(may_wait=True)
    batcher.put(call(1, 2, 3))
    assert [len(part.inputs) for part in at_once(batcher)] == [2]


def test_streams_begin_interactive_ones_first() -> None:
    batcher = queue()
    for name in ("b1", "i1", "b2", "i2"):
        batcher.put(stream_call(name, priority=Priority(name.startswith("b"))))
    assert [found.input for found in batcher.stream_calls((1, 1))] == ["i1"]
    assert [found.input for found in batcher.stream_calls((2, -1))] == ["i2"]
    assert [found.input for found in batcher.stream_calls((2, 1))] == ["b1"]
    assert [found.input for found in batcher.stream_calls((2, 2))] == ["b2"]


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=30), st.integers(1, 7))
def test_each_call_gets_its_own_outputs_in_order_and_no_batch_is_too_large_or_mixed(calls: list[tuple[int, bool]], max_batch: int) -> None:
    batcher = queue(max_batch=max_batch)
    made = [call(*((number, at) for at in range(size)), priority=Priority(is_batch)) for number, (size, is_batch) in enumerate(calls)]
    for item in made:
        batcher.put(item)
    given_to_model = batches(batcher)
    assert all(0 < len(batch) <= max_batch for batch in given_to_model)
    assert all(len({calls[number][1] for number, _ in batch}) == 1 for batch in given_to_model)
    for item in made:
        assert item.reply.result(0) == list(item.inputs)
    assert (batcher.waiting(), batcher.ahead(Priority.BATCH)) == (0, (0, 0))
