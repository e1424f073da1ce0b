"""The thread that owns the agent: brings it up, hands it batches and steps for as long as there are any, and closes it at the end.

importing → loading → warming → ready or failed → draining; a phase is never gone back to. The stages left behind are the cold start's
break-down.
"""

import gc
import importlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from function import cpus, lean_torch, warm_imports
from function.agent import load_agent
from function.batcher import Batcher, Span
from function.cost import Recent
from function.errors import FunctionError, Unavailable
from function.failing import says_enough
from function.guarded_agent import GuardedAgent, Traits, log_failure
from function.parts import Slice
from function.priority import Priority
from function.process import trim
from function.settings import FunctionSettings
from function.streams import Made, Streams
from weights_cache.reader import Weights

log = logging.getLogger("relight.function")

PAUSE_S = 0.002  # while all streams wait for their readers, and nobody else wants the model
PHASES = ("importing", "loading", "warming", "ready", "failed", "draining")


class Observer:
    """Is told what the model does, in the model's thread; this one does nothing with it."""

    def batch(self, inputs: int, seconds: float, waited_s: Sequence[float]) -> None:
        """The agent predicted. waited_s: in the queue, of each call that was taken up with it."""

    def step(self, made: Made, seconds: float) -> None:
        """The agent went on with streams."""


class Progress:
    """How far the model is: its phase, and when each stage of the cold start ended."""

    def __init__(self, started_at: float) -> None:
        """started_at: when the process started, on `time.monotonic`'s clock."""
        self.phase = PHASES[0]
        self.stages: dict[str, float] = {}  # seconds from the process's start to the end of each stage
        self._started_at = started_at
        self._lock = threading.Lock()  # guards `phase`: the model's thread goes on with it, and a signal's may end it

    def enter(self, phase: str) -> None:
        """Go on to a phase, unless a later one was entered already."""
        with self._lock:
            if PHASES.index(phase) > PHASES.index(self.phase):
                self.phase = phase

    def mark(self, stage: str) -> None:
        """Note that a stage of the cold start is over."""
        self.stages[stage] = round(time.monotonic() - self._started_at, 4)


class Runner:
    """One agent's; `start` it, and hand it work through the batcher."""

    def __init__(self, settings: FunctionSettings, weights: Weights, batcher: Batcher, progress: Progress) -> None:
        self.agent: GuardedAgent | None = None  # once it is loaded; its attributes may be read from any thread
        self.streams: Streams | None = None
        self.observer = Observer()
        self.seconds_per_input = Recent()  # from the end of one batch to the end of the next, while inputs were waiting
        self.traits = Traits()
        self._settings = settings
        self._weights = weights
        self._batcher = batcher
        self._progress = progress
        self._computed_at = 0.0  # the last batch
        self._is_closing = False
        self._is_closed = False  # the agent
        self._over = threading.Event()  # the thread

    def start(self, on_failure: Callable[[BaseException], object]) -> None:
        """Begin; `on_failure` is called in the thread if the agent cannot be brought up, or with what ended the thread."""
        threading.Thread(target=self._run, args=(on_failure,), name="model", daemon=True).start()

    def close(self, timeout_s: float) -> bool:
        """Have the agent closed in its thread; whether it was, within the time. One that is still being loaded is left alone."""
        self._is_closing = True
        self._batcher.stop()
        return self.agent is not None and self._over.wait(timeout_s) and self._is_closed

    def _run(self, on_failure: Callable[[BaseException], object]) -> None:
        failure = self._live()
        self._over.set()
        if failure is not None:
            on_failure(failure)

    def _live(self) -> BaseException | None:
        """From the agent's import to its end; returns what came in between."""
        try:
            agent = self._bring_up()
        except BaseException as error:  # noqa: BLE001  also SystemExit: whatever it is, there is nothing to serve
            is_enough = says_enough(error)
            with suppress(Exception):  # an error may be of any class
                trim(error)
            log_failure(
                str(error) if is_enough else f"the agent {self._settings.agent} could not be brought up", None if is_enough else error
            )
            return error
        log.info("ready after %s", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in dict(self._progress.stages).items()))
        warm_imports.tell()
        try:
            self._serve(agent)
            agent.close()
            self._is_closed = True
        except BaseException as error:  # noqa: BLE001  a mistake of ours: nobody would be answered again
            log_failure("the model's thread ended", error)
            return error
        return None

    def _bring_up(self) -> GuardedAgent:
        settings, progress = self._settings, self._progress
        if settings.lean_torch:
            lean_torch.install()
        if settings.device != "cpu" and not self._weights.is_empty():
            threading.Thread(target=self._prepare_device, name="device", daemon=True).start()
        cpus.limit_waiting()
        with _uncollected():
            agent = GuardedAgent(load_agent(settings.agent, settings.agent_folders))
        _limit_threads(settings.threads)
        progress.mark("import")
        progress.enter("loading")
        agent.load(self._weights, settings.device)
        progress.mark("load")
        self._mark_restore()
        self.traits = agent.traits()
        progress.enter("warming")
        if agent.warm_up():
            progress.mark("warm_up")
        gc.freeze()  # torch's half a million objects stay; a full collection that looks at them stops every thread for 0.1 s
        self.agent = agent
        progress.mark("ready")
        progress.enter("ready")
        return agent

    def _mark_restore(self) -> None:
        if not self._weights.is_empty():
            stages = self._progress.stages
            began_s = stages["listen"]  # the weights are opened when the port is
            seconds = self._weights.restored().seconds
            stages["restore"] = round(min(began_s + seconds, stages["load"]), 4) if seconds is not None else stages["load"]

    def _prepare_device(self) -> None:
        """Make the device's context while the agent is imported and the weights are fetched."""
        try:
            self._weights.prepare(self._settings.device)
        except Exception as error:  # noqa: BLE001  the agent meets it again if it needs the device
            log.warning("%s", error)
        else:
            self._progress.mark("context")

    def _serve(self, agent: GuardedAgent) -> None:
        streams = self.streams = Streams(agent, self._settings.max_batch)
        self._batcher.parts.measure = agent.sizes if agent.tells_sizes else None
        while not self._is_closing:
            is_making = streams.has_due()
            if not is_making:
                self._batcher.places = streams.room()[0]
                if streams.active:
                    self._batcher.wait_for_calls(PAUSE_S)
                else:
                    self._batcher.wait()
            while slices := self._batcher.batch(may_wait=not is_making):
                self._predict(agent, slices)
                del slices  # whose inputs may be large, and are not to stay until the next
                if not self._batcher.parts.of(Priority.INTERACTIVE):
                    break
            for stream_call in self._batcher.stream_calls(streams.room()):
                streams.start(stream_call)
            if self._batcher.has_stream_calls():
                streams.make_room()
            if streams.active:
                began = time.monotonic()
                made = streams.step()
                if made.sequences:
                    self.observer.step(made, time.monotonic() - began)
        streams.end(Unavailable("the function is ending; ask again, another one will answer", retry_after_s=1))

    def _predict(self, agent: GuardedAgent, slices: Sequence[Slice]) -> None:
        """Run one batch. If that fails, run its inputs one at a time, so that only the culprit's caller hears of it."""
        began = time.monotonic()
        inputs = [item for part in slices for item in part.inputs]
        try:
            agent.serving = [part.call.context for part in slices]
            first = slices[0].call  # whose parameters and headers are those of all
            outputs = agent.predict(inputs, first.parameters, first.context.headers)
        except FunctionError as error:
            self._took(began, slices, len(inputs))
            if len(slices) == 1:
                slices[0].call.fail(error)
            else:
                self._predict_apart(agent, slices)
            return
        self._took(began, slices, len(inputs))  # before the callers are woken, who would be in its way
        at = 0
        for part in slices:
            part.call.add(outputs[at : at + len(part.inputs)], part.at)
            at += len(part.inputs)

    def _predict_apart(self, agent: GuardedAgent, slices: Sequence[Slice]) -> None:
        for part in slices:
            for number, item in enumerate(part.inputs):
                if part.call.is_over(time.monotonic()):
                    break
                try:
                    agent.serving = [part.call.context]
                    outputs = agent.predict([item], part.call.parameters, part.call.context.headers)
                    part.call.add(outputs, part.at and part.at[number : number + 1])
                except FunctionError as error:
                    part.call.fail(error)

    def _took(self, began: float, slices: Sequence[Slice], inputs: int) -> None:
        """Note how long a batch took: for its callers, for the metrics, for what is said to those who are refused."""
        ended = time.monotonic()
        is_idle = not (self.streams and self.streams.has_due())
        self._batcher.computed(inputs, ended - began, is_idle=is_idle)
        self.seconds_per_input.add((ended - max(self._computed_at, slices[0].call.arrived)) / inputs)
        self._computed_at = ended
        waited_s = [began - part.call.arrived for part in slices if part.is_first]
        for part in slices:
            _note(part, began, ended, inputs)
        self.observer.batch(inputs, ended - began, waited_s)


def _note(part: Slice, began: float, ended: float, inputs: int) -> None:
    """What a batch was for one of its calls."""
    arrived, timing, spans = part.call.arrived, part.call.context.timing, part.call.context.spans
    timing.setdefault("queue", began - arrived)
    timing["model"] = timing.get("model", 0.0) + ended - began
    if spans is not None:
        if part.is_first:
            spans.append(Span("queue", arrived, began))
        spans.append(Span("model", began, ended, inputs))


def _limit_threads(wanted: int) -> None:
    if "torch" in sys.modules:
        torch: Any = importlib.import_module("torch")  # which waits if another thread is in the middle of it
        torch.set_num_threads(cpus.threads(wanted))


@contextmanager
def _uncollected() -> Iterator[None]:
    """What modules make stays; to look for garbage in it again and again is a tenth of torch's import."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
