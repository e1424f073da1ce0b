"""When those who are refused are told to come back: as fast as the queue was seen to move."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from function.agent import Weights
from function.batcher import Call, CallContext, StreamCall
from function.errors import Unavailable
from function.http import retry_after
from function.model import Model
from function.priority import Priority
from function.settings import FunctionSettings
from function.streams import Stream
from tests.support import wait_until
from weights_cache.settings import WeightsSettings

WAITING = 10


class Paced:
    """Takes as many seconds for an input as it says, and until the gate is open; or for each piece of a stream."""

    gate = threading.Event()

    def load(self, weights: Weights, device: str) -> None:
        type(self).gate.set()

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        time.sleep(sum(inputs))
        self.gate.wait(100)
        return inputs

    def start(self, input: Any) -> list[Any]:
        return [*input]

    def step(self, sequences: list[list[Any]]) -> list[Any]:
        time.sleep(max((sequence[-1] for sequence in sequences if sequence), default=0))
        return [sequence.pop() if sequence else None for sequence in sequences]


MakeModel = Callable[..., Model]


@pytest.fixture
def make_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeModel:
    monkeypatch.setattr("function.streams.PATIENCE_S", math.inf)  # with streams that nobody reads

    def make(**settings: Any) -> Model:
        found = FunctionSettings(agent=f"{__name__}:Paced", queue_limit=WAITING, **settings)
        model = Model(found, Weights(WeightsSettings(cache_dir=tmp_path)), started_at=time.monotonic())
        model.start(on_failure=lambda _: None)
        wait_until("ready", lambda: model.phase == "ready")
        return model

    return make


def ask() -> CallContext:
    return CallContext(100)


def call(*inputs: float) -> Call:
    return Call(inputs, ask(), time.monotonic())


def stream_call(*pieces: float) -> StreamCall:
    found = ask()
    return StreamCall(pieces, found, time.monotonic(), Stream(found))


def fill(model: Model, make: Callable[[], Call]) -> list[Call]:
    """Have the model at one of these, until the gate opens, and the queue full of others."""
    Paced.gate.clear()
    found = [make() for _ in range(1 + WAITING)]
    for item in found:
        assert model.batcher.put(item)
        wait_until("the first is taken", lambda: model.batcher.waiting() == found.index(item))  # noqa: B023  at once
    return found


def fill_with_streams(model: Model, places: int) -> list[Stream]:
    """Have all places taken by streams that nobody reads, and the queue full of others."""
    found = [model.stream([0] * 10**6, ask()) for _ in range(places)]
    for _ in range(WAITING):
        assert model.batcher.put(stream_call(0))
    return found


def took_s(model: Model, seconds: float) -> float:
    """How long a prediction took that alone takes so many."""
    began = time.monotonic()
    model.predict([seconds], ask())
    return time.monotonic() - began


def retry_after_of(model: Model) -> float:
    """The seconds that a caller is told who comes now."""
    with pytest.raises(Unavailable) as refused:
        model.admit(Priority.INTERACTIVE)
    assert refused.value.retry_after_s is not None
    return refused.value.retry_after_s


def test_it_follows_the_predictions(make_model: MakeModel) -> None:
    model = make_model(max_batch=1)
    began = time.monotonic()
    first_s = took_s(model, 0.3)
    waiting = fill(model, lambda: call(0))
    assert WAITING * 0.3 <= retry_after_of(model) <= WAITING * first_s
    Paced.gate.set()
    for item in waiting:
        item.reply.result(100)
    before_s = time.monotonic() - began
    later_s = max(took_s(model, 0) for _ in range(40))
    fill(model, lambda: call(0))
    assert retry_after_of(model) <= WAITING * (later_s + before_s * 0.8**40)  # what was before counts less with each that follows
    Paced.gate.set()


def test_it_counts_inputs(make_model: MakeModel) -> None:
    model = make_model(max_batch=2)
    model.predict([0.2, 0.2], ask())
    fill(model, lambda: call(0, 0))
    assert retry_after_of(model) >= WAITING * 2 * 0.2
    Paced.gate.set()


def test_it_follows_the_streams(make_model: MakeModel) -> None:
    model = make_model(max_batch=2)
    began = time.monotonic()
    assert list(model.stream([0.1] * 6, ask()).pieces()) == [0.1] * 6
    fill_with_streams(model, 2)
    retry_after_s = retry_after_of(model)
    assert WAITING * 0.6 / 2 <= retry_after_s <= WAITING * (time.monotonic() - began) / 2


def test_streams_that_take_longer_than_any_before_them_count_as_they_grow_old(make_model: MakeModel) -> None:
    model = make_model(max_batch=2)
    fill_with_streams(model, 2)
    wait_until("they are old", lambda: retry_after_of(model) >= WAITING * 0.5 / 2)


def test_before_anything_was_seen_it_is_a_second(make_model: MakeModel) -> None:
    model = make_model(max_batch=1)
    fill(model, lambda: call(0))
    assert retry_after(retry_after_of(model)) == "1"
    Paced.gate.set()


def test_who_waits_longer_than_the_deadline_does_not_wait_any_more(make_model: MakeModel) -> None:
    model = make_model(max_batch=1, timeout_s=2)
    model.predict([0.5], ask())
    fill(model, lambda: call(0))
    assert retry_after_of(model) == 2
    Paced.gate.set()
