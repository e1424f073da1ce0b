"""The model: one agent, the thread that owns it, and the phases it goes through from an open port to an answer.

importing → restoring → loading → warming → ready (or tripped) → draining. The stages it leaves behind are the cold start's break-down.
"""

import gc
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from function import lean_torch
from function.agent import InferenceAgent, TensorSpec, load_agent
from function.batcher import Batcher, Call, CallContext, Recent, Reply, Slice, Span, StreamCall
from function.breaker import Breaker
from function.errors import CannotStream, ClientGone, FunctionError, NoPlace, TimedOut, Unavailable, to_function_error
from function.settings import FunctionSettings
from function.streams import Made, Stream, Streams
from weights_cache.environment import SettingsError
from weights_cache.errors import WeightsError
from weights_cache.reader import Weights

log = logging.getLogger("relight.function")

STUCK = 2.0  # times the deadline that one call of the agent may take before the process is given up


class Observer:
    """Is told what the model does, in the model's thread; this one does nothing with it."""

    def batch(self, inputs: int, seconds: float, waited_s: Sequence[float]) -> None:
        """The agent predicted. waited_s: in the queue, of each call that was taken up with it."""

    def step(self, made: Made, seconds: float) -> None:
        """The agent went on with streams."""


class Model:
    """Runs one agent in a thread of its own; `predict` and `stream` may be called from any thread."""

    def __init__(self, settings: FunctionSettings, weights: Weights, *, started_at: float) -> None:
        """started_at: when the process started, on `time.monotonic`'s clock; stages count from there."""
        self.stages: dict[str, float] = {}  # seconds from the process's start to the end of each stage
        self.breaker = Breaker(settings.breaker_threshold, settings.breaker_reset_s)
        self.batcher = Batcher(max_batch=settings.max_batch, wait_s=settings.batch_wait_ms / 1000, limit=settings.queue_limit)
        self.observer = Observer()
        self.can_stream = False
        self.inputs = [TensorSpec("input", "BYTES", (-1,))]
        self.outputs = [TensorSpec("output", "BYTES", (-1,))]
        self._settings = settings
        self._weights = weights
        self._started_at = started_at
        self._phase = "importing"
        self._streams: Streams | None = None
        self._calling_since: float | None = None  # the agent, after it became ready
        self._is_lost = False
        self._seconds_per_input = Recent()  # from the end of one batch to the end of the next, while inputs were waiting
        self._computed_at = 0.0  # the last batch
        self._on_failure: Callable[[], object] = lambda: None

    def start(self, on_failure: Callable[[], object]) -> None:
        """Begin to load in the model's thread; `on_failure` is called there if the agent cannot be brought up, or ends the thread."""
        self._on_failure = on_failure
        self.mark("listen")
        self._weights.restored()  # finds out now whether the cache has them already
        threading.Thread(target=self._run, name="model", daemon=True).start()

    @property
    def phase(self) -> str:
        """Where it is on the way from importing to draining."""
        if self._phase == "loading" and not self._weights.is_empty() and self._weights.restored().seconds is None:
            return "restoring"  # the agent is binding tensors as they arrive
        return "tripped" if self._phase == "ready" and self.breaker.state == "open" else self._phase

    @property
    def is_draining(self) -> bool:
        """Whether the process is about to end."""
        return self._phase == "draining"

    def is_alive(self) -> bool:
        """False, for good, once a call of the agent has taken so long that it cannot be expected back."""
        since = self._calling_since
        self._is_lost = self._is_lost or (since is not None and time.monotonic() - since > STUCK * self._settings.timeout_s)
        return not self._is_lost

    def active_streams(self) -> int:
        """How many streams are being made."""
        return self._streams.active if self._streams else 0

    def drain(self) -> None:
        """No new calls are wanted; those that wait are still answered."""
        self._phase = "draining"

    def status(self) -> dict[str, Any]:
        """The document of `/readyz`."""
        document: dict[str, Any] = {"phase": self.phase, "restored_bytes": 0, "total_bytes": 0, "stages": dict(self.stages)}
        if not self._weights.is_empty():
            restored = self._weights.restored()
            document |= {"restored_bytes": restored.bytes, "total_bytes": restored.total_bytes}
            document["weights"] = {
                "source": restored.source,
                "bytes": restored.bytes,
                "seconds": None if restored.seconds is None else round(restored.seconds, 4),
            }
        return document

    def check(self, *, is_batch: bool = False) -> None:
        """Raises Unavailable if a call of this class that came now would be refused."""
        phase = self.phase
        if phase not in ("ready", "draining", "tripped"):
            raise Unavailable(f"the function is not ready yet ({phase})", retry_after_s=1)
        self.breaker.check()
        if self.batcher.is_full(is_batch=is_batch):
            raise self._full(is_batch)

    def refusal(self, *, is_batch: bool) -> Unavailable | None:
        """Why a call of this class that came now would be refused, None if it would not."""
        try:
            self.check(is_batch=is_batch)
        except Unavailable as error:
            return error
        return None

    def _full(self, is_batch: bool) -> Unavailable:
        inputs, stream_calls = self.batcher.ahead(is_batch=is_batch)
        drained_s = inputs * self._seconds_per_input.value
        if self._streams:
            drained_s += self._streams.wait_s(stream_calls)
        what = "requests of batch work" if is_batch else "requests"
        return Unavailable(
            f"{self._settings.queue_limit} {what} are waiting already (FUNCTION_QUEUE_LIMIT)",
            retry_after_s=min(drained_s, self._settings.timeout_s),  # by then nobody waits any more who does now
        )

    def predict(self, inputs: Sequence[Any], context: CallContext) -> list[Any]:
        """One output for each input.

        Raises BadInput (the agent's word), AgentFailed, TimedOut at the deadline, ClientGone, Unavailable when not ready, when the queue is
        full or when the breaker is open.
        """
        self.check(is_batch=context.is_batch)
        call = Call(inputs, context, time.monotonic())
        with self._admitted(context):
            if not self.batcher.put(call):
                raise self._full(context.is_batch)
            try:
                return call.reply.result(context.timeout_s)
            except TimeoutError:
                call.reply.cancel()
                raise context.late() from None

    def submit(self, inputs: Sequence[Any], context: CallContext, then: Callable[[], object]) -> Call:
        """The same without waiting: `then` is called, from the model's thread or from where the call is failed, once its reply is there.

        Who begins a call fails it at its deadline. Raises Unavailable as `predict` does.
        """
        self.check(is_batch=context.is_batch)
        is_trial = self.breaker.admit()

        def settle() -> None:
            self.breaker.ended(is_trial=is_trial, in_time=_is_in_time(context, call.reply.error))
            then()

        call = Call(inputs, context, time.monotonic(), reply=Reply(settle))
        if not self.batcher.put(call):
            self.breaker.ended(is_trial=is_trial, in_time=None)
            raise self._full(context.is_batch)
        return call

    def stream(self, input: Any, context: CallContext) -> Stream:  # noqa: A002  the contract's word
        """An answer piece by piece, once its first piece is there. Close it. Raises what `predict` does, and CannotStream."""
        self.check(is_batch=context.is_batch)
        if not self.can_stream:
            raise CannotStream(f"{self._settings.agent} makes its answers in one go; ask without streaming")
        stream = Stream(context, on_timeout=lambda: self.breaker.ended(is_trial=False, in_time=False))
        with self._admitted(context):
            if not self.batcher.put(StreamCall(input, context, time.monotonic(), stream)):
                raise self._full(context.is_batch)
            stream.wait_first()
        return stream

    @contextmanager
    def _admitted(self, context: CallContext) -> Iterator[None]:
        """Around a call: the breaker lets it in, and learns how it ended."""
        is_trial = self.breaker.admit()
        ended: BaseException | None = None
        try:
            yield
        except BaseException as error:
            ended = error
            raise
        finally:
            self.breaker.ended(is_trial=is_trial, in_time=_is_in_time(context, ended))

    def mark(self, stage: str) -> None:
        """Note that a stage of the cold start is over."""
        self.stages[stage] = round(time.monotonic() - self._started_at, 4)

    def _run(self) -> None:
        try:
            agent = self._bring_up()
        except (SettingsError, WeightsError) as error:
            log.error("%s", error)  # says itself what is wrong and where
            self._on_failure()
            return
        except BaseException:
            log.exception("the agent %s could not be brought up", self._settings.agent)
            self._on_failure()
            return
        log.info("ready after %s", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in dict(self.stages).items()))
        try:
            self._serve(agent)
        except BaseException:
            log.exception("the model's thread ended")  # an agent that calls exit(), or a mistake of ours: nobody would be answered again
            self._on_failure()

    def _serve(self, agent: InferenceAgent) -> None:
        streams = self._streams = Streams(agent, self._settings.max_batch)
        self.batcher.places, _ = streams.room()
        while True:
            if not streams.active:
                self.batcher.wait()
            if slices := self.batcher.batch(may_wait=not streams.active):
                self._predict(agent, slices)
            for stream_call in self.batcher.stream_calls(*streams.room()):
                with self._calling():
                    streams.start(stream_call)
            if streams.active:
                began = time.monotonic()
                with self._calling():
                    made = streams.step()
                if made.sequences:
                    self.observer.step(made, time.monotonic() - began)

    def _bring_up(self) -> InferenceAgent:
        if self._settings.lean_torch:
            lean_torch.install()
        if self._settings.device != "cpu" and not self._weights.is_empty():
            threading.Thread(target=self._prepare_device, name="device", daemon=True).start()
        with _uncollected():
            agent = load_agent(self._settings.agent)
        self.can_stream = hasattr(agent, "step") or hasattr(agent, "stream")
        self._limit_threads()
        self.mark("import")
        self._phase = "loading"
        agent.load(self._weights, self._settings.device)
        self.mark("load")
        if not self._weights.is_empty():
            began_s = self.stages["listen"]  # the weights are opened when the port is
            seconds = self._weights.restored().seconds
            self.stages["restore"] = round(min(began_s + seconds, self.stages["load"]), 4) if seconds is not None else self.stages["load"]
        self.inputs, self.outputs = list(getattr(agent, "inputs", self.inputs)), list(getattr(agent, "outputs", self.outputs))
        self._phase = "warming"
        if warm_up := getattr(agent, "warm_up", None):
            warm_up()
            self.mark("warm_up")
        gc.freeze()  # torch's half a million objects stay; a full collection that looks at them stops every thread for 0.1 s
        self._phase = "ready"
        self.mark("ready")
        return agent

    def _prepare_device(self) -> None:
        """Make the device's context while the agent is imported and the weights are fetched."""
        try:
            self._weights.prepare(self._settings.device)
        except Exception as error:  # noqa: BLE001  the agent meets it again if it needs the device
            log.warning("%s", error)
        else:
            self.mark("context")

    def _predict(self, agent: InferenceAgent, slices: Sequence[Slice]) -> None:
        """Run one batch. If that fails, run its inputs one at a time, so that only the culprit's caller hears of it."""
        began = time.monotonic()
        inputs = [item for part in slices for item in part.inputs]
        try:
            outputs = self._outputs(agent, inputs)
        except Exception as error:  # noqa: BLE001  told apart below
            self._took(began, slices, len(inputs))
            if len(slices) == 1:
                slices[0].call.fail(to_function_error(error))
            else:
                self._predict_apart(agent, slices)
            return
        self._took(began, slices, len(inputs))  # before the callers are woken, who would be in its way
        at = 0
        for part in slices:
            part.call.add(outputs[at : at + len(part.inputs)])
            at += len(part.inputs)

    def _took(self, began: float, slices: Sequence[Slice], inputs: int) -> None:
        """Note how long a batch took: for its callers, for the metrics, for what is said to those who are refused."""
        ended = time.monotonic()
        seconds = ended - began
        self.batcher.computed(inputs, seconds, is_idle=not self.active_streams())
        self._seconds_per_input.add((ended - max(self._computed_at, slices[0].call.arrived)) / inputs)
        self._computed_at = ended
        waited_s: list[float] = []
        for part in slices:
            timing, spans = part.call.context.timing, part.call.context.spans
            is_first = part.call.taken == len(part.inputs)  # of a call in several batches
            if is_first:
                waited_s.append(began - part.call.arrived)
            timing.setdefault("queue", began - part.call.arrived)
            timing["model"] = timing.get("model", 0.0) + seconds
            if spans is not None:
                if is_first:
                    spans.append(Span("queue", part.call.arrived, began))
                spans.append(Span("model", began, began + seconds, inputs))
        self.observer.batch(inputs, seconds, waited_s)

    def _predict_apart(self, agent: InferenceAgent, slices: Sequence[Slice]) -> None:
        for part in slices:
            for item in part.inputs:
                if part.call.is_over(time.monotonic()):
                    break
                try:
                    part.call.add(self._outputs(agent, [item]))
                except Exception as error:  # noqa: BLE001  see to_function_error
                    part.call.fail(to_function_error(error))

    def _outputs(self, agent: InferenceAgent, inputs: Sequence[Any]) -> Sequence[Any]:
        with self._calling():
            outputs = agent.predict(inputs)
        if len(outputs) != len(inputs):
            raise ValueError(f"predict gave {len(outputs)} outputs for {len(inputs)} inputs")
        return outputs

    @contextmanager
    def _calling(self) -> Iterator[None]:
        self._calling_since = time.monotonic()
        try:
            yield
        finally:
            self._calling_since = None

    def _limit_threads(self) -> None:
        """More torch threads than cores make a busy machine several times slower."""
        if "torch" in sys.modules:
            torch = importlib.import_module("torch")  # which waits if another thread is in the middle of it
            torch.set_num_threads(self._settings.threads or _cpu_limit())


def _is_in_time(context: CallContext, error: BaseException | None) -> bool | None:
    """What a call that ended says about the model: it came back (if only to say no), it did not, or (None) neither."""
    if isinstance(error, TimedOut):
        return False if context.is_own_deadline and not isinstance(error, NoPlace) else None
    return True if error is None or (isinstance(error, FunctionError) and not isinstance(error, ClientGone | Unavailable)) else None


@contextmanager
def _uncollected() -> Iterator[None]:
    """What modules make stays; to look for garbage in it again and again is a tenth of torch's import."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _cpu_limit() -> int:
    """Whole CPUs that the container may use by its cgroup (v2), at least 1; without a limit 1."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(int(quota) // int(period), os.cpu_count() or 1))
    except (OSError, ValueError):
        return 1
