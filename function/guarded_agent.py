"""The one door to an agent's code: whatever the agent gives or does is touched here, and nowhere else.

An agent is somebody else's program. Its methods, its results, the iterators and sequences it makes, their `close` and the text of what it
raises may each raise, lie about their length, or never end. Behind this door there are only plain values (see `values`) and errors that a
caller can be told: what an agent does ends its own request at most, never the process, and never another caller's request.

All but the constructor is called in the model's thread. `busy_since` says since when the agent has been in one call, whichever.
"""

import copy
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from function import errors
from function.agent import InferenceAgent, TensorSpec, takes
from function.batcher import CallContext
from function.errors import AgentFailed, FunctionError
from function.headers import declared
from function.told import Schema, declared_abilities, declared_parameters, piece_of
from function.values import plain
from weights_cache.environment import SettingsError
from weights_cache.reader import Weights

log = logging.getLogger("relight.function")

# An agent may raise these of ours: they are about the request, or ask the caller to come again.
_SAYABLE = (errors.BadInput, errors.NotFound, errors.Forbidden, errors.TooLarge, errors.UnsupportedMediaType, errors.Unavailable)
_NO_LIST = (str, bytes, bytearray, memoryview, Set, Mapping)  # an iterator over them gives something else than outputs in their order
_MOST_REASON = 100  # characters of a finish_reason
_FAILED = "the model failed on this request; the function's log says why"


@dataclass(frozen=True)
class Usage:
    """What an agent's sequence tells about the answer it made; 0 and `stop` where it does not tell."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Traits:
    """What an agent declares; the defaults hold until it is loaded, too."""

    inputs: Sequence[TensorSpec] = (TensorSpec("input", "BYTES", (-1,)),)
    outputs: Sequence[TensorSpec] = (TensorSpec("output", "BYTES", (-1,)),)
    can_stream: bool = False  # it makes answers piece by piece
    takes_parameters: bool = False
    headers: tuple[str, ...] = ()  # names, in small letters, of those of the request that it takes
    headers_differ: bool = False  # inputs of requests whose headers differ are not to be predicted together
    takes_arrays: bool = False  # in place of lists
    media_types: tuple[str, ...] = ()  # of bodies, besides JSON, that are inputs as they are
    sampling_parameters: Mapping[str, Schema] = field(default_factory=dict)  # besides OpenAI's own
    abilities: Mapping[str, str] = field(default_factory=dict)  # by ability why it is lacking, empty where it is not


@dataclass(eq=False)
class Sequence_:  # noqa: N801  as in the agent's contract; `Sequence` is Python's
    """One answer that the agent is making: the object it gave for it, and what that tells so far."""

    made: Any
    usage: Usage = field(default_factory=Usage)


class GuardedAgent:
    """An agent whose methods give plain values or raise what callers can be told (FunctionError)."""

    def __init__(self, agent: InferenceAgent) -> None:
        """Touches nothing of it but its attributes. Raises what they raise."""
        self._agent: Any = agent
        self.shares_steps = self._has("step")
        self.tells_sizes = self._has("size")
        self._takes_parameters = takes(agent.predict, "parameters")
        self._taking_headers = {name for name in ("predict", "start", "stream") if takes(getattr(agent, name, None), "headers")}
        self._has_failed_to_tell = False  # a size, so that the log says it once
        self._abilities: Mapping[str, str] = {}
        self.serving: Sequence[CallContext] = ()  # whose requests it is working on, for the log
        self.busy_since: float | None = None  # in a call after it became ready, on `time.monotonic`'s clock

    # The start and the end. What is raised in the first two ends the process, as nothing can be served.

    def load(self, weights: Weights, device: str) -> None:
        """Bind the model's tensors."""
        pid = os.getpid()
        try:
            self._agent.load(weights, device)
        finally:
            if os.getpid() != pid:
                _end_child(sys.exc_info()[1])

    def warm_up(self) -> bool:
        """What the first call would otherwise pay; returns whether the agent has that."""
        if not self._has("warm_up"):
            return False
        self._agent.warm_up()
        return True

    def traits(self) -> Traits:
        """What it declares, all of which is known once it is loaded."""
        self._abilities = declared_abilities(getattr(self._agent, "abilities", ()))
        agent, default = self._agent, Traits()
        return Traits(
            inputs=_specs("inputs", getattr(agent, "inputs", default.inputs)),
            outputs=_specs("outputs", getattr(agent, "outputs", default.outputs)),
            can_stream=self.shares_steps or self._has("stream"),
            takes_parameters=self._takes_parameters,
            headers=declared(getattr(agent, "headers", ())),
            headers_differ="predict" in self._taking_headers,
            takes_arrays=bool(getattr(agent, "arrays", False)),
            media_types=_media_types(getattr(agent, "media_types", ())),
            sampling_parameters=declared_parameters(getattr(agent, "sampling_parameters", {})),
            abilities=self._abilities,
        )

    def close(self) -> None:
        """Let the agent put away what it has. What it raises is logged."""
        try:
            if self._has("close"):
                self._agent.close()
        except BaseException as error:  # noqa: BLE001  also SystemExit: the rest of the end is not the agent's
            log_failure("the agent's close() failed", error)
        self._agent = None  # with the last reference gone its finalizers run

    def _has(self, method: str) -> bool:
        """Whether it has this of the methods that it may have; None is as good as none."""
        return getattr(self._agent, method, None) is not None

    # Calls

    def predict(
        self, inputs: Sequence[Any], parameters: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> list[Any]:
        """One plain output for each input. Raises FunctionError."""
        with self._guarded():
            more = self._headers("predict", headers)
            if self._takes_parameters:
                more["parameters"] = copy.deepcopy(dict(parameters or {}))
            found = self._agent.predict(list(inputs), **more)  # its own, as it may take inputs out of it, and change parameters
            return list(plain(_as_list(found, len(inputs), "predict", "output")))

    def sizes(self, inputs: Sequence[Any]) -> list[float | None]:
        """How large each input is; None where the agent cannot tell, which is no reason not to compute it. Raises FunctionError."""
        with self._guarded():
            return [self._size(item) for item in inputs]

    def _size(self, item: Any) -> float | None:
        try:
            size = float(self._agent.size(item))
            if 0 <= size < math.inf:
                return size
            raise ValueError(f"size returned {size}, not a number of 0 and more")
        except BaseException as error:  # noqa: BLE001  as around a call
            if not self._has_failed_to_tell:
                self._has_failed_to_tell = True
                log_failure("the agent's size() failed; such inputs share batches as if there was none (this is said once)", error)
            return None

    def start(self, input: Any, headers: Mapping[str, str] | None = None) -> Sequence_:  # noqa: A002  the contract's word
        """A sequence that shares steps. Raises FunctionError."""
        with self._guarded():
            return Sequence_(self._agent.start(input, **self._headers("start", headers)))

    def _headers(self, method: str, headers: Mapping[str, str] | None) -> dict[str, Any]:
        return {"headers": dict(headers or {})} if method in self._taking_headers else {}

    def step(self, sequences: Sequence[Sequence_]) -> list[Any]:
        """The next piece of each, None at its end, or the FunctionError that it has instead. Raises FunctionError if the step failed.

        What one sequence gives is no reason to make the step again: the others would go on twice.
        """
        with self._guarded():
            pieces = _as_list(self._agent.step([one.made for one in sequences]), len(sequences), "step", "piece")
            return [self._piece(one, piece) for one, piece in zip(sequences, pieces, strict=True)]

    def _piece(self, sequence: Sequence_, found: Any) -> Any:
        """A piece as a plain value, and what its sequence tells noted; the FunctionError that its caller gets if foreign code raises."""
        try:
            sequence.usage = _usage(sequence.made)
            return piece_of(sequence.made, plain(found), self._abilities)
        except BaseException as error:  # noqa: BLE001  as around a call
            return to_function_error(error)

    def stream(self, input: Any, headers: Mapping[str, str] | None = None) -> Sequence_:  # noqa: A002
        """An answer of an agent that makes one at a time; `advance` it. Raises FunctionError."""
        with self._guarded():
            return Sequence_(iter(self._agent.stream(input, **self._headers("stream", headers))))

    def advance(self, sequence: Sequence_) -> Any:
        """Its next piece, None at its end. Raises FunctionError."""
        with self._guarded():
            return plain(next(sequence.made, None))

    def drop(self, sequence: Sequence_) -> None:
        """A sequence that nobody wants any more, or that is over: what it holds is freed now. What its `close` does is logged."""
        try:
            with self._guarded():
                made, sequence.made = sequence.made, None
                if close := getattr(made, "close", None):
                    close()
                del made, close  # what the last reference does when it goes is the agent's doing, too
        except FunctionError:
            pass  # it is in the log, and its caller has gone

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        self.busy_since = time.monotonic()
        pid = os.getpid()
        try:
            yield
        except BaseException as error:  # also SystemExit and KeyboardInterrupt: an agent that calls exit() ends its request
            if os.getpid() != pid:
                _end_child(error)
            raise to_function_error(error, self.serving) from error
        finally:
            self.busy_since = None
        if os.getpid() != pid:
            _end_child(None)


def _end_child(error: BaseException | None) -> None:
    """End a process that the agent forked and that has come back from its call: there is one server, and it is not the child."""
    code = error.code if isinstance(error, SystemExit) else None
    if error is not None and not isinstance(error, SystemExit):
        log.error("a process that the agent forked has failed", exc_info=error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(error is not None and (not isinstance(error, SystemExit) or code is not None)))


def _specs(name: str, declared: Any) -> list[TensorSpec]:
    found = list(declared)
    if not found or not all(isinstance(one, TensorSpec) for one in found):
        raise SettingsError(f'the agent\'s {name} must be a list of TensorSpec, such as [TensorSpec("{name[:-1]}", "FP32", (-1, 3))]')
    return found


def _media_types(declared: Any) -> tuple[str, ...]:
    """A lone one may stand without the list around it."""
    return tuple(str(kind).lower() for kind in ((declared,) if isinstance(declared, str) else declared))


def to_function_error(error: BaseException, requests: Sequence[CallContext] = ()) -> FunctionError:
    """What the caller is told of what the agent raised; the log has the rest. requests: that it may be about."""
    try:
        if issubclass(type(error), _SAYABLE):  # what an instance says of its class is the agent's doing
            return _sayable(error)
    except BaseException:  # noqa: BLE001  and what its class says of itself, too
        log.error("the agent raised what cannot be looked at")
        return AgentFailed(_FAILED)
    ids = [request.request_id for request in requests if request.request_id]
    log_failure(f"the agent failed on {_requests(ids)}" if ids else "the agent failed", error)
    return AgentFailed(_FAILED)


def _requests(ids: Sequence[str]) -> str:
    return f"request {ids[0]}" if len(ids) == 1 else f"one of {len(ids)} requests, which are tried one by one"


def log_failure(what: str, error: BaseException | None) -> None:
    """Write it down, with what the agent raised, whatever that does when it is written."""
    try:
        log.error("%s", what, exc_info=error)
    except BaseException:  # noqa: BLE001  what the agent raised may raise when it is written down
        log.error("%s; what it raised cannot be written down, as that raises, too", what)


def _sayable(error: BaseException) -> FunctionError:
    """An error of ours as the agent may have changed it: the nearest class of ours, and a text that is one."""
    kind: Any = next(kind for kind in type(error).__mro__ if vars(errors).get(kind.__name__) is kind)
    text, seconds = "", 1.0
    try:
        text = errors.bounded(str(error))
        seconds = _retry_after_s(error)
    except BaseException as failed:  # noqa: BLE001  its text is foreign code
        log_failure(f"the agent raised a {kind.__name__} whose text cannot be had", failed)
    text = text if text.strip() else "the agent refuses this, without a reason that can be told"
    if issubclass(kind, errors.Unavailable):
        return errors.Unavailable(text, seconds)
    found: FunctionError = kind(text)
    return found


def _retry_after_s(error: BaseException) -> float:
    found = getattr(error, "retry_after_s", None)
    return float(found) if isinstance(found, int | float) and 0 < found < 86400 else 1.0


def _as_list(found: Any, count: int, method: str, what: str) -> list[Any]:
    """What `predict` or `step` gave, made a list once. Raises TypeError, ValueError, or whatever foreign code raises."""
    if type(found) is list and len(found) == count:
        return found
    wanted = f"a list of {count} {what}{'s' if count != 1 else ''}"
    items = plain(found) if hasattr(found, "shape") else found  # an array or a tensor: all of it at once, not row by row
    if isinstance(items, _NO_LIST) or not hasattr(items, "__iter__"):
        raise TypeError(f"{method} returned {_a(type(found).__name__)}, not {wanted}")
    items = items if type(items) is list else list(islice(items, count + 1))
    if len(items) != count:
        many = f"more than {count}" if len(items) == count + 1 and type(found) is not list else len(items)
        raise ValueError(f"{method} returned {many} {what}{'' if many == 1 else 's'}, not {wanted}")
    return items


def _a(name: str) -> str:
    return name if name == "NoneType" else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _usage(made: Any) -> Usage:
    """What a sequence tells, as far as it is what it should be."""

    def count(name: str) -> int:
        found = getattr(made, name, 0)
        return int(found) if isinstance(found, int) and 0 <= found < 2**63 else 0

    reason = getattr(made, "finish_reason", None)
    text = errors.bounded(reason, _MOST_REASON) if isinstance(reason, str) and reason else "stop"
    return Usage(count("prompt_tokens"), count("completion_tokens"), text)
