"""Streams through the model: shared steps, joining and leaving, deadlines, hang-ups, errors. In one process, without HTTP."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest

from function.agent import BadInput, Weights
from function.batcher import CallContext
from function.errors import AgentFailed, CannotStream, ClientGone, NoPlace, TimedOut, Unavailable
from function.guarded_agent import Usage
from function.model import Model
from function.priority import Priority
from function.runner import Observer
from function.settings import FunctionSettings
from function.streams import AHEAD, Made, Stream
from tests.support import wait_until
from weights_cache.settings import WeightsSettings


class Counter:
    """Counts up to what it is given, all together; a step waits for its turn if somebody holds the gate."""

    gate = threading.Event()
    pace_s = 0.0  # of a step
    together: ClassVar[list[int]] = []

    def load(self, weights: Weights, device: str) -> None:
        type(self).together = []
        type(self).pace_s = 0.0
        type(self).gate.set()

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return [f"predicted {item}" for item in inputs]

    def start(self, input: Any) -> "Counting":
        if input == "bad":
            raise BadInput("'bad' is not a number")
        return Counting([input, 0])

    def step(self, sequences: list[list[Any]]) -> list[Any]:
        self.gate.wait(100)
        time.sleep(self.pace_s)
        self.together.append(len(sequences))
        pieces: list[Any] = []
        for sequence in sequences:
            if sequence[0] == "crash":
                raise RuntimeError("secret detail")
            sequence[1] += 1
            pieces.append(sequence[1] if sequence[1] <= sequence[0] else None)
        return pieces


class Counting(list[Any]):
    """Up to where, and where it is."""

    prompt_tokens = 3
    finish_reason = "length"

    @property
    def completion_tokens(self) -> int:
        return int(self[1])


class Plain:
    """Streams one caller at a time."""

    closed = threading.Event()

    def load(self, weights: Weights, device: str) -> None:
        type(self).closed = threading.Event()

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return inputs

    def stream(self, input: Any) -> Iterator[Any]:
        try:
            for piece in count() if input == "endless" else range(input) if isinstance(input, int) else input:
                yield piece
                time.sleep(0.001)
            if input == 3:
                raise RuntimeError("secret detail")
        finally:
            self.closed.set()


class Mute:
    """Cannot stream."""

    def load(self, weights: Weights, device: str) -> None:
        pass

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return inputs


MakeModel = Callable[..., Model]


@pytest.fixture
def make_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeModel:
    monkeypatch.setattr("function.streams.PATIENCE_S", math.inf)  # with streams that nobody reads

    def make(agent: str = "Counter", **settings: Any) -> Model:
        found = FunctionSettings(agent=f"{__name__}:{agent}", **settings)
        model = Model(found, Weights(WeightsSettings(cache_dir=tmp_path)), started_at=time.monotonic())
        model.start(on_failure=lambda _: None)
        wait_until("ready", lambda: model.phase == "ready")
        return model

    return make


def ask(timeout_s: float = 100.0, **more: Any) -> CallContext:
    return CallContext(timeout_s, **more)


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    found: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        found[number] = calls[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    return found


def open_when(model: Model, streams: int) -> threading.Thread:
    """Opens the gate when so many wait, or have begun."""

    def run() -> None:
        wait_until("all", lambda: model.batcher.waiting() + model.active_streams() == streams)
        Counter.gate.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_stream_has_its_pieces_in_order_and_ends(make_model: MakeModel) -> None:
    stream = make_model().stream(3, ask())
    assert list(stream.pieces()) == [1, 2, 3]
    assert stream.usage == Usage(3, 4, "length")


def test_an_answer_without_pieces_is_one(make_model: MakeModel) -> None:
    assert list(make_model().stream(0, ask()).pieces()) == []


def test_streams_share_steps_and_leave_when_they_are_done(make_model: MakeModel) -> None:
    model = make_model()
    Counter.gate.clear()
    wanted = [5, 1, 3, 5]
    threads = open_when(model, streams=4)
    found = together([lambda number=number: list(model.stream(number, ask()).pieces()) for number in wanted])  # type: ignore[misc]
    threads.join()
    assert found == [list(range(1, number + 1)) for number in wanted]
    assert max(Counter.together) == 4
    assert sum(Counter.together) == sum(number + 1 for number in wanted)
    wait_until("nothing left", lambda: model.active_streams() == 0)


def test_no_more_share_a_step_than_fit_and_the_others_wait(make_model: MakeModel) -> None:
    model = make_model(max_batch=2)
    found = together([lambda: list(model.stream(4, ask()).pieces()) for _ in range(5)])
    assert found == [[1, 2, 3, 4]] * 5
    assert max(Counter.together) <= 2


def lose_patience(context: CallContext, after_s: float = 0.2) -> None:
    """Have a caller who began with all the time in the world wait no longer than that."""
    object.__setattr__(context, "timeout_s", after_s)


def find_no_place(model: Model, **more: Any) -> None:
    """Ask for a stream, and wait for a place until the deadline: that comes when the model's thread, however late, has seen it wait."""
    context = ask(**more)

    def give_up() -> None:
        wait_until("it waits", lambda: any(waiting.stream.is_held for calls in model.batcher._stream_calls for waiting in [*calls]))
        lose_patience(context)

    impatient = threading.Thread(target=give_up)
    impatient.start()
    with pytest.raises(NoPlace, match=r"no place among the streams within 0\.2 s"):
        model.stream(1, context)
    impatient.join()


@contextmanager
def reading(stream: Stream) -> Iterator[None]:
    """Somebody reads it meanwhile, and closes it."""

    def read() -> None:
        with suppress(ClientGone):
            for _ in stream.pieces():
                pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        stream.close()
        reader.join(100)


def test_batch_work_gives_its_places_to_interactive_streams(make_model: MakeModel) -> None:
    model = make_model(max_batch=2)
    held = [model.stream(10**9, ask(priority=Priority.BATCH)) for _ in range(2)]
    for _ in range(3):
        assert together([lambda: list(model.stream(4, ask()).pieces()) for _ in range(2)]) == [[1, 2, 3, 4]] * 2
    assert max(Counter.together) == 2
    wait_until("the others have gone", lambda: model.active_streams() == 2)
    for stream in held:
        stream.close()


def test_a_held_stream_goes_on_where_it_was_once_there_is_a_place(make_model: MakeModel) -> None:
    model = make_model(max_batch=1)
    Counter.pace_s = 0.002
    pieces = model.stream(500, ask(priority=Priority.BATCH)).pieces(0.1)
    found = [next(pieces)]
    with reading(model.stream(10**9, ask())):
        for piece in pieces:
            if piece is None:  # it has stopped
                break
            found.append(piece)
        assert len(found) < 500
        assert model.active_streams() == 2
    Counter.pace_s = 0.0
    assert found + [piece for piece in pieces if piece is not None] == list(range(1, 501))


def test_no_batch_work_begins_before_there_is_a_place_beside_what_is_held(make_model: MakeModel) -> None:
    model = make_model(max_batch=1)
    streams = [model.stream(10**9, ask(priority=Priority.BATCH)), model.stream(10**9, ask())]
    find_no_place(model, priority=Priority.BATCH)
    find_no_place(model)
    assert model.active_streams() == 2
    for stream in streams:
        stream.close()


def test_an_agent_that_streams_one_caller_at_a_time_is_not_interrupted(make_model: MakeModel) -> None:
    model = make_model("Plain")
    stream = model.stream("endless", ask(priority=Priority.BATCH))
    find_no_place(model)
    stream.close()


def test_time_outs_for_want_of_a_place_say_nothing_about_the_model(make_model: MakeModel) -> None:
    model = make_model(max_batch=1, breaker_threshold=1)
    Counter.pace_s = 0.002
    held = model.stream(10**9, ask(priority=Priority.BATCH))
    with reading(model.stream(10**9, ask())):
        wait_until("it has no place", lambda: held.is_held)
        lose_patience(held.context)
        with pytest.raises(NoPlace):
            list(held.pieces())
        find_no_place(model)
        assert model.phase == "ready"
    assert list(model.stream(1, ask()).pieces()) == [1]


def test_predictions_go_on_between_the_steps(make_model: MakeModel) -> None:
    model = make_model()
    stream = model.stream(10**9, ask())
    assert model.predict(["a"], ask()) == ["predicted a"]
    assert next(stream.pieces()) == 1
    stream.close()


@pytest.mark.parametrize("agent", ["Counter", "Plain"])
def test_who_closes_a_stream_frees_its_place_at_once(make_model: MakeModel, agent: str) -> None:
    model = make_model(agent, max_batch=1)
    stream = model.stream(10**9 if agent == "Counter" else "endless", ask())
    pieces = stream.pieces()
    next(pieces)
    assert model.active_streams() == 1
    stream.close()
    wait_until("the place", lambda: model.active_streams() == 0)
    if agent == "Plain":
        assert Plain.closed.is_set()
    assert len(list(model.stream(2, ask()).pieces())) == 2


def test_who_hangs_up_frees_the_place_too(make_model: MakeModel) -> None:
    model, gone = make_model(), threading.Event()
    model.stream(10**9, ask(is_gone=gone.is_set))
    gone.set()
    wait_until("the place", lambda: model.active_streams() == 0)


def test_a_bad_input_is_told_before_anything_is_streamed(make_model: MakeModel) -> None:
    with pytest.raises(BadInput, match="'bad' is not a number"):
        make_model().stream("bad", ask())


def test_a_sequence_that_makes_a_step_fail_fails_alone(make_model: MakeModel) -> None:
    model = make_model()
    Counter.gate.clear()
    opener = open_when(model, streams=3)

    def crash() -> str:
        with pytest.raises(AgentFailed) as found:
            list(model.stream("crash", ask()).pieces())
        return str(found.value)

    said, *others = together([crash, *(lambda: list(model.stream(3, ask()).pieces()) for _ in range(2))])
    opener.join()
    assert others == [[1, 2, 3]] * 2
    assert "secret" not in said


def test_an_agent_that_fails_half_way_ends_the_stream_with_an_error(make_model: MakeModel) -> None:
    pieces = make_model("Plain").stream(3, ask()).pieces()
    assert [next(pieces) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(AgentFailed):
        next(pieces)


def test_the_deadline_runs_to_the_first_piece_and_then_between_pieces(make_model: MakeModel) -> None:
    model = make_model()
    Counter.gate.clear()
    with pytest.raises(TimedOut, match=r"no piece within 0\.2 s"):
        model.stream(3, ask(0.2))
    Counter.gate.set()
    context = ask()
    pieces = model.stream(10**9, context).pieces()
    for _ in range(5):
        next(pieces)
    Counter.gate.clear()
    lose_patience(context)
    with pytest.raises(TimedOut):
        list(pieces)
    Counter.gate.set()


def test_silence_is_told_so_that_a_heartbeat_can_be_sent(make_model: MakeModel) -> None:
    model = make_model()
    stream = model.stream(10**9, ask())
    pieces = stream.pieces(0.05)
    next(pieces)
    Counter.gate.clear()
    for _ in range(2):
        assert next(piece for piece in pieces if piece is None) is None  # a step may be on its way in between
    Counter.gate.set()
    assert next(piece for piece in pieces if piece is not None) > 1
    stream.close()


@pytest.mark.parametrize("agent", ["Counter", "Plain"])
def test_a_stream_waits_for_a_reader_who_is_slow(make_model: MakeModel, agent: str) -> None:
    model = make_model(agent)
    stream = model.stream(10**9 if agent == "Counter" else "endless", ask())
    wait_until("it is ahead", stream.is_ahead)
    time.sleep(0.05)
    assert model.predict(["a"], ask()) is not None  # nobody else has to wait
    pieces = stream.pieces()
    first = next(pieces)
    assert [next(pieces) for _ in range(2 * AHEAD)] == list(range(first + 1, first + 1 + 2 * AHEAD))
    stream.close()
    wait_until("the place", lambda: model.active_streams() == 0)


def test_one_who_is_slow_does_not_slow_down_the_others(make_model: MakeModel) -> None:
    model = make_model()
    slow = model.stream(10**9, ask())
    wait_until("it is ahead", slow.is_ahead)
    assert list(model.stream(1000, ask()).pieces()) == list(range(1, 1001))
    slow.close()


class Steps(Observer):
    """Remembers what it is told of steps."""

    def __init__(self) -> None:
        self.seen: list[Made] = []

    def step(self, made: Made, seconds: float) -> None:
        self.seen.append(made)

    def pieces(self) -> int:
        return sum(made.pieces for made in self.seen)


def test_a_step_is_told_with_who_shared_it_and_what_it_made_for_callers(make_model: MakeModel) -> None:
    model = make_model()
    steps = Steps()
    model.observe(steps)
    assert list(model.stream(3, ask()).pieces()) == [1, 2, 3]
    wait_until("the end is told", lambda: len(steps.seen) == 4)
    assert steps.seen == [Made(1, 1)] * 3 + [Made(1, 0)]
    with pytest.raises(AgentFailed):
        model.stream("crash", ask())
    wait_until("the failure is told", lambda: len(steps.seen) == 5)
    assert steps.seen[-1] == Made(1, 0)


def test_waiting_for_a_reader_is_no_step_and_who_has_left_makes_no_piece(make_model: MakeModel) -> None:
    model = make_model()
    steps = Steps()
    model.observe(steps)
    stream = model.stream(10**9, ask())
    wait_until("it is ahead", stream.is_ahead)
    for _ in range(3):
        model.predict(["a"], ask())  # the model's thread comes by
    assert steps.seen == [Made(1, 1)] * (1 + AHEAD)  # one was read
    stream.close()
    wait_until("the place", lambda: model.active_streams() == 0)
    assert steps.pieces() == 1 + AHEAD


def test_a_text_that_is_held_back_is_no_piece_for_callers(make_model: MakeModel) -> None:
    model = make_model("Plain")
    steps = Steps()
    model.observe(steps)
    assert list(model.stream(["", "a", "", "b"], ask()).pieces()) == ["", "a", "", "b"]
    wait_until("the end is told", lambda: len(steps.seen) == 5)
    assert steps.pieces() == 2


def test_time_outs_of_streams_trip_the_breaker_too(make_model: MakeModel) -> None:
    model = make_model(breaker_threshold=2, breaker_reset_s=600)
    Counter.gate.clear()
    for _ in range(2):
        with pytest.raises(TimedOut):
            model.stream(3, ask(0.1))
    with pytest.raises(Unavailable, match="the last 2 calls of the model timed out"):
        model.stream(3, ask())
    assert model.phase == "tripped"
    Counter.gate.set()


def test_a_shorter_deadline_of_the_callers_does_not(make_model: MakeModel) -> None:
    model = make_model(breaker_threshold=1)
    Counter.gate.clear()
    with pytest.raises(TimedOut):
        model.stream(3, ask(0.1, is_own_deadline=False))
    Counter.gate.set()
    assert model.phase == "ready"
    assert list(model.stream(1, ask()).pieces()) == [1]


def test_an_agent_that_cannot_stream_says_so(make_model: MakeModel) -> None:
    with pytest.raises(CannotStream, match="makes its answers in one go"):
        make_model("Mute").stream(1, ask())


def test_who_does_not_read_gives_its_place_to_those_who_wait_for_one(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("function.streams.PATIENCE_S", 0.1)
    model = make_model(max_batch=2)
    unread = [model.stream(10**9, ask()) for _ in range(2)]
    assert list(model.stream(3, ask()).pieces()) == [1, 2, 3]
    assert sum(stream.is_ahead() for stream in unread) == 2  # both had fallen behind; one of them was ended, the other one goes on
    wait_until("one is left", lambda: model.active_streams() == 1)
    for stream in unread:
        stream.close()
