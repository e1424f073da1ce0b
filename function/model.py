"""The model as the server sees it: whether a call may come in, what becomes of it, and how far the cold start is.

The agent itself is in a thread of its own, see `runner`; callers and that thread meet in the batcher.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import orjson

from function.batcher import Batcher, Call, CallContext, Reply, StreamCall
from function.breaker import Breaker
from function.errors import BadInput, CannotStream, ClientGone, FunctionError, NoPlace, TimedOut, Unavailable
from function.failing import Failing
from function.guarded_agent import Traits
from function.priority import Priority
from function.runner import Observer, Progress, Runner
from function.settings import FunctionSettings
from function.streams import Stream
from weights_cache.reader import Weights

STUCK = 2.0  # times the deadline that one call of the agent may take before the process is given up


class Model:
    """One agent and what waits for it; `predict` and `stream` may be called from any thread."""

    def __init__(self, settings: FunctionSettings, weights: Weights, *, started_at: float) -> None:
        """started_at: when the process started, on `time.monotonic`'s clock; stages count from there."""
        self.breaker = Breaker(settings.breaker_threshold, settings.breaker_reset_s)
        self.batcher = Batcher(max_batch=settings.max_batch, wait_s=settings.batch_wait_ms / 1000, limit=settings.queue_limit)
        self._progress = Progress(started_at)
        self._settings = settings
        self._weights = weights
        self._runner = Runner(settings, weights, self.batcher, self._progress)
        self._is_lost = False
        self.failing = Failing(
            settings.agent, settings.tell_failure_s, lambda: self._progress.enter("failed"), lambda: weights.restored().error
        )

    def start(self, on_failure: Callable[[BaseException], object]) -> None:
        """Begin to load in the model's thread; `on_failure` is called there with what keeps the agent from being brought up, or ended the
        thread."""
        self._progress.mark("listen")
        self._weights.watch()
        self._runner.start(lambda error: self.failing.fail(error, on_failure) if self._runner.agent is None else on_failure(error))

    def is_waiting(self) -> bool:
        """Whether it needs weights that are not there."""
        return self._progress.phase in ("importing", "loading") and self._weights.restored().seconds is None

    def observe(self, observer: Observer) -> None:
        """Have somebody told what the model does."""
        self._runner.observer = observer

    # What it is

    @property
    def stages(self) -> Mapping[str, float]:
        """Seconds from the process's start to the end of each stage of the cold start."""
        return self._progress.stages

    @property
    def phase(self) -> str:
        """Where it is on the way from importing to draining."""
        phase = self._progress.phase
        if phase == "loading" and not self._weights.is_empty() and self._weights.restored().seconds is None:
            return "restoring"  # the agent is binding tensors as they arrive
        return "tripped" if phase == "ready" and self.breaker.state == "open" else phase

    def wants_calls(self) -> bool:
        """Whether callers are to be sent here: to be answered, or to be told why they cannot be."""
        return self.phase == "ready" or (self._progress.phase == "failed" and self.failing.tells)

    @property
    def traits(self) -> Traits:
        """What the agent declares."""
        return self._runner.traits

    def is_alive(self) -> bool:
        """False, for good, once a call of the agent has taken so long that it cannot be expected back."""
        since = self._runner.agent.busy_since if self._runner.agent else None
        self._is_lost = self._is_lost or (since is not None and time.monotonic() - since > STUCK * self._settings.timeout_s)
        return not self._is_lost

    def active_streams(self) -> int:
        """How many streams are being made."""
        return self._runner.streams.active if self._runner.streams else 0

    def status(self) -> dict[str, Any]:
        """The document of `/readyz`, from what is known: nothing is asked of anybody."""
        document: dict[str, Any] = {"phase": self.phase, "restored_bytes": 0, "total_bytes": 0, "stages": dict(self.stages)}
        if self._runner.agent is None and (reason := self.failing.reason):
            document["error"] = reason
        if not self._weights.is_empty():
            restored = self._weights.restored()
            document |= {"restored_bytes": restored.bytes, "total_bytes": restored.total_bytes}
            document["weights"] = {
                "source": restored.source,
                "bytes": restored.bytes,
                "seconds": None if restored.seconds is None else round(restored.seconds, 4),
            }
        return document

    # Its end

    def drain(self) -> None:
        """No new calls are wanted; those that wait are still answered."""
        self._progress.enter("draining")
        self.failing.stop()

    def close(self, timeout_s: float) -> bool:
        """Have the agent closed, after the last answer; whether it was, within the time."""
        self._weights.close()
        return self._runner.close(timeout_s)

    # Calls

    def admit(self, priority: Priority) -> None:
        """Raises Unavailable if a call of this class that came now would be refused. The one rule: all routes ask it."""
        if self._runner.agent is None:
            self.failing.check()
            raise Unavailable(f"the function is not ready yet ({self.phase})", retry_after_s=1)
        self.breaker.check()
        if self.batcher.is_full(priority):
            raise self._full(priority)

    def predict(self, inputs: Sequence[Any], context: CallContext, parameters: Mapping[str, Any] | None = None) -> list[Any]:
        """One output for each input.

        Raises BadInput (the agent's word, or for parameters that it does not take), AgentFailed, TimedOut at the deadline, ClientGone,
        Unavailable when not ready, when the queue is full or when the breaker is open.
        """
        self.admit(context.priority)
        call = Call(inputs, context, time.monotonic(), parameters=parameters, group=_group(self.traits, parameters, context))
        with self._admitted(context):
            if not self.batcher.put(call):
                raise self._full(context.priority)
            try:
                outputs = call.reply.result(context.timeout_s)
            except TimeoutError:
                call.reply.cancel()
                raise context.late() from None
        context.sizes = call.sizes
        return outputs

    def submit(
        self, inputs: Sequence[Any], context: CallContext, then: Callable[[], object], parameters: Mapping[str, Any] | None = None
    ) -> Call:
        """The same without waiting: `then` is called, from the model's thread or from where the call is failed, once its reply is there.

        Who submits a call fails it at its deadline. Raises BadInput and Unavailable as `predict` does.
        """
        self.admit(context.priority)
        group = _group(self.traits, parameters, context)
        is_trial = self.breaker.admit()

        def settle() -> None:
            self.breaker.ended(is_trial=is_trial, in_time=_is_in_time(context, call.reply.error))
            then()

        call = Call(inputs, context, time.monotonic(), reply=Reply(settle), parameters=parameters, group=group)
        if not self.batcher.put(call):
            self.breaker.ended(is_trial=is_trial, in_time=None)
            raise self._full(context.priority)
        return call

    def stream(self, input: Any, context: CallContext) -> Stream:  # noqa: A002  the contract's word
        """An answer piece by piece, once its first piece is there. Close it. Raises what `predict` does, and CannotStream."""
        return self.streams([(input, context)])[0]

    def streams(self, calls: Sequence[tuple[Any, CallContext]], *, waits: bool = True) -> list[Stream]:
        """Answers to several inputs of one request. Close them. Raises what `stream` does.

        waits: until the first piece of the first is there; without it they come later to a request that was let in.
        """
        first = calls[0][1]
        self.admit(first.priority)
        if not self.traits.can_stream:
            raise CannotStream(f"{self._settings.agent} makes its answers in one go; ask without streaming")
        streams = [Stream(context, on_timeout=lambda: self.breaker.ended(is_trial=False, in_time=False)) for _, context in calls]
        try:
            with self._admitted(first) if waits else nullcontext():
                for (item, context), stream in zip(calls, streams, strict=True):
                    if not self.batcher.put(StreamCall(item, context, time.monotonic(), stream)):
                        raise self._full(context.priority)
                if waits:
                    streams[0].wait_first()
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

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

    def _full(self, priority: Priority) -> Unavailable:
        inputs, stream_calls = self.batcher.ahead(priority)
        drained_s = inputs * self._runner.seconds_per_input.value
        if self._runner.streams:
            drained_s += self._runner.streams.wait_s(stream_calls)
        what = "requests of batch work" if priority is Priority.BATCH else "requests"
        return Unavailable(
            f"{self._settings.queue_limit} {what} are waiting already (FUNCTION_QUEUE_LIMIT)",
            retry_after_s=min(drained_s, self._settings.timeout_s),  # by then nobody waits any more who does now
        )


def _group(traits: Traits, parameters: Mapping[str, Any] | None, context: CallContext) -> bytes:
    """The same for the same parameters, and headers if they matter, alone: to Python 1, 1.0 and True are one.

    Raises BadInput for parameters that the agent does not take.
    """
    if parameters and not traits.takes_parameters:
        names = ", ".join(repr(name)[:60] for name in list(parameters)[:5])
        raise BadInput(f"this model takes no parameters: leave out {names}")
    headers = context.headers if traits.headers_differ else None
    return orjson.dumps([parameters or None, headers or None], option=orjson.OPT_SORT_KEYS) if parameters or headers else b""


def _is_in_time(context: CallContext, error: BaseException | None) -> bool | None:
    """What a call that ended says about the model: it came back (if only to say no), it did not, or (None) neither."""
    if isinstance(error, TimedOut):
        return False if context.is_own_deadline and not isinstance(error, NoPlace) else None
    return True if error is None or (isinstance(error, FunctionError) and not isinstance(error, ClientGone | Unavailable)) else None
