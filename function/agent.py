"""The agent contract: the one class a user writes to bring a model.

    class Shout:
        def load(self, weights, device):
            pass

        def predict(self, inputs):
            return [text.upper() for text in inputs]

`FUNCTION_AGENT=my_module:Shout` chooses it. An agent that needs no torch never causes it to be imported.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from function.errors import BadInput
from function.headers import declared
from weights_cache.environment import SettingsError
from weights_cache.reader import Weights

__all__ = ["BadInput", "InferenceAgent", "TensorSpec", "Weights", "load_agent"]


DATATYPES = ("BOOL", *(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)), "FP16", "FP32", "FP64", "BYTES")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the Open Inference Protocol. datatype: one of DATATYPES; shape: -1 where any size will do."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.datatype not in DATATYPES:
            raise ValueError(f"tensor {self.name!r}: there is no datatype {self.datatype!r}; known are {', '.join(DATATYPES)}")


class InferenceAgent(Protocol):
    """Prepares inputs, calls the model, shapes outputs. All its methods are called from one and the same thread.

    An agent may also have

    - `warm_up(self) -> None`: called once after `load` and before the first request;
    - `close(self) -> None`: called once after the last answer, before the process ends;
    - `stream(self, input) -> Iterator`: the pieces of one answer as they are made; or, better,
    - `start(self, input) -> sequence` and `step(self, sequences) -> list`: a sequence is an answer being made, an object of the agent's
      own; `step` makes the next piece of each, None at its end, so that all share a forward pass. Sequences come and go between steps, and
      one may be left out of some (batch work, when interactive callers want its place): twice FUNCTION_MAX_BATCH may be held at once. Of
      a sequence that has them, `prompt_tokens`, `completion_tokens` and `finish_reason` ("stop", "length") are told to the caller; its
      `close()` is called when nobody wants it any more;
    - `inputs` and `outputs`, lists of TensorSpec: what `/v2/models/<name>` says; without them one BYTES tensor each, one row an input;
    - `arrays = True`: it is handed numpy arrays, not lists, for the rows of tensors of the Open Inference Protocol;
    - `headers = ("X-Tenant", "Accept-Language")`: those of `predict`, `stream` and `start` that have an argument `headers` are handed these
      request headers in it, as a dict by name in small letters, as far as they were sent; what says who calls is not to be had;
    - `size(self, input) -> int | float`: how large an input is, in a unit that says how long it takes (tokens, pixels), at next to no cost:
      inputs of like sizes are then computed together where padding costs more than another batch;
    - `sampling_parameters`, JSON Schema by name: what callers of OpenAI's routes may say besides OpenAI's own parameters;
    - `abilities`, of "logprobs", "tools" and "response_format" those that it has, or by name the reason why not: what it is then handed in
      the input, and tells by its sequences' `logprobs` and `tool_calls`, is in docs/function.md. Of agents that embed texts: "dimensions",
      which it is then handed in `parameters`, and "tokens", if `size` counts exactly what OpenAI's clients are told as usage;
    - `media_types = ("image/*", "audio/wav")`: it takes bodies of these types at `POST /`, each as one input of bytes.

    Python lets no thread but the main one set signal handlers, and the model's is another one: an agent that needs them starts a process.
    """

    def load(self, weights: Weights, device: str) -> None:
        """Bind the model's tensors; called once, before the function is ready. device: `cpu`, `cuda:0`."""

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """One output for each input, in the same order; outputs are what JSON can hold, and what is like it (see `function/values.py`).
        They belong to the caller then: an array that is written into again later may change an answer on its way.

        With a second argument of that name, `predict(self, inputs, parameters)`, it is handed what the request says in "parameters", the
        same for all inputs ({} without any); an agent without it has such requests refused. `headers` (see above) are the same for all.

        Raises BadInput for an input it cannot use. It must have no side effects, also on its inputs: when it raises for several of them it
        is called again with one at a time, so that only the culprit fails.
        """


def load_agent(name: str, folders: Sequence[str] = ()) -> InferenceAgent:
    """Import and construct the agent `package.module:Class`.

    folders: where modules are looked for from now on, before the rest of Python's path. What this process has imported already, our own
    packages above all, they cannot hide. Raises SettingsError if there is no such class or a method of it is not of a shape that can be
    called; what its module or its constructor raises passes through.
    """
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name.isidentifier():
        raise SettingsError(f"FUNCTION_AGENT={name!r}: must be package.module:Class")
    sys.path[:0] = [folder for folder in folders if folder not in sys.path[: len(folders)]]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):  # the module itself, not something it imports
            looked = ", ".join([*folders, *([] if sys.path[0] in folders else [sys.path[0] or "."])])
            raise SettingsError(
                f"FUNCTION_AGENT={name!r}: there is no module {error.name!r}; looked in {looked} and Python's own path"
            ) from error
        raise
    agent_class = getattr(module, class_name, None)
    if agent_class is None:
        found = getattr(module, "__file__", None)
        raise SettingsError(
            f"FUNCTION_AGENT={name!r}: module {module_name!r} has no {class_name!r}" + (f"; it was found in {found}" if found else "")
        )
    try:
        _check_class(agent_class)
        agent: InferenceAgent = agent_class()
        _check_methods(agent)
    except _WrongShape as error:
        raise SettingsError(f"FUNCTION_AGENT={name!r}: {error}; docs/function.md has the contract") from None
    return agent


def takes(method: Callable[..., Any] | None, argument: str) -> bool:
    """Whether there is this method, with this argument (`parameters`, `headers`), one that can be handed over by its name."""
    signature = _signature(method) if method else None
    found = signature.parameters.get(argument) if signature else None
    return found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)


class _WrongShape(Exception):
    """A class or method that cannot be called as the contract has it; the text says how to mend it."""


_REQUIRED = ("load", "predict")
_SHARED = ("start", "step")  # both, or none
_ARGUMENTS = {
    "load": ("weights", "device"),
    "predict": ("inputs",),
    "warm_up": (),
    "close": (),
    "stream": ("input",),
    "start": ("input",),
    "step": ("sequences",),
    "size": ("input",),
}


# Arguments that are handed over by name, to methods that have them.
_NAMED = {"predict": ("parameters", "headers"), "stream": ("headers",), "start": ("headers",)}


def _check_class(found: Any) -> None:
    if not inspect.isclass(found):
        raise _WrongShape(f"it is a {type(found).__name__}, not a class")
    if (signature := _signature(found)) and not _can_be_called(signature, ()):
        raise _WrongShape(f"the class is constructed without arguments, and its __init__ wants {signature}; give them defaults")


def _check_methods(agent: Any) -> None:
    needed = {*_REQUIRED, *(_SHARED if any(getattr(agent, name, None) is not None for name in _SHARED) else ())}
    for name, arguments in _ARGUMENTS.items():
        method = getattr(agent, name, None)
        if name not in needed and method is None:
            continue
        if not callable(method):
            raise _WrongShape(f"the class has no method {name!r}" if method is None else f"{name} is {method!r:.60}, not a method")
        _check_method(name, method, arguments)
    _check_headers(agent)


def _check_method(name: str, method: Callable[..., Any], arguments: Sequence[str]) -> None:
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        raise _WrongShape(f"{name} is `async def`, and there is no event loop; write `def {name}`, with asyncio.run(...) inside if needed")
    if inspect.isgeneratorfunction(method) and name in ("load", "warm_up", "close", "size"):
        raise _WrongShape(f"{name} has a `yield`, so that calling it does nothing; write it without")
    signature = _signature(method)
    if signature is None or _can_be_called(signature, arguments):
        return
    named = _NAMED.get(name, ())
    if _can_be_called(signature, arguments, [one for one in named if takes(method, one)]):
        return
    wanted = ", ".join(("self", *arguments))
    more = f" (and further arguments only as {' and '.join(f'`{one}`' for one in named)})" if named else ""
    raise _WrongShape(
        f"{name} is called as {name}({', '.join(arguments)}), which its signature {signature} does not allow; "
        f"write `def {name}({wanted})`{more}"
    )


def _check_headers(agent: Any) -> None:
    """Declared and taken, or neither."""
    try:
        names = declared(getattr(agent, "headers", ()))
    except ValueError as error:
        raise _WrongShape(str(error)) from None
    taking = [name for name, named in _NAMED.items() if "headers" in named and takes(getattr(agent, name, None), "headers")]
    if taking and not names:
        raise _WrongShape(f'{taking[0]} has an argument `headers`, and nothing says which; write `headers = ("X-Tenant",)` in the class')
    if names and not taking:
        raise _WrongShape("the class declares `headers`, which no method takes; write `def predict(self, inputs, headers)`")


def _signature(method: Callable[..., Any]) -> inspect.Signature | None:
    """None for what has none that Python can tell, such as functions in C."""
    try:
        return inspect.signature(method)
    except (ValueError, TypeError):
        return None


def _can_be_called(signature: inspect.Signature, arguments: Sequence[str], named: Sequence[str] = ()) -> bool:
    try:
        signature.bind(*arguments, **dict.fromkeys(named))
    except TypeError:
        return False
    return True
