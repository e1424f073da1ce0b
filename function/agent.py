"""The agent contract: the one class a user writes to bring a model.

    class Shout:
        def load(self, weights, device):
            pass

        def predict(self, inputs):
            return [text.upper() for text in inputs]

`FUNCTION_AGENT=my_module:Shout` chooses it. An agent that needs no torch never causes it to be imported.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from function.errors import BadInput
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
    - `stream(self, input) -> Iterator`: the pieces of one answer as they are made; or, better,
    - `start(self, input) -> sequence` and `step(self, sequences) -> list`: a sequence is an answer being made, an object of the agent's
      own; `step` makes the next piece of each, None at its end, so that all share a forward pass. Sequences come and go between steps, and
      one may be left out of some (batch work, when interactive callers want its place): twice FUNCTION_MAX_BATCH may be held at once. Of
      a sequence that has them, `prompt_tokens`, `completion_tokens` and `finish_reason` ("stop", "length") are told to the caller;
    - `inputs` and `outputs`, lists of TensorSpec: what `/v2/models/<name>` says; without them one BYTES tensor each, one row an input.
    """

    def load(self, weights: Weights, device: str) -> None:
        """Bind the model's tensors; called once, before the function is ready. device: `cpu`, `cuda:0`."""

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """One output for each input, in the same order; outputs are what JSON can hold.

        Raises BadInput for an input it cannot use. It must have no side effects: when it raises for several inputs it is called again
        with one at a time, so that only the culprit fails.
        """


def load_agent(name: str) -> InferenceAgent:
    """Import and construct the agent `package.module:Class`.

    Raises SettingsError if there is no such class or it lacks a method; what its module raises on import passes through.
    """
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name.isidentifier():
        raise SettingsError(f"FUNCTION_AGENT={name!r}: must be package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):  # the module itself, not something it imports
            raise SettingsError(f"FUNCTION_AGENT={name!r}: there is no module {error.name!r} on the Python path") from error
        raise
    agent_class = getattr(module, class_name, None)
    if agent_class is None:
        raise SettingsError(f"FUNCTION_AGENT={name!r}: module {module_name!r} has no {class_name!r}")
    needed = ["load", "predict"]
    needed += ["start", "step"] if hasattr(agent_class, "start") or hasattr(agent_class, "step") else []
    for method in needed:
        if not callable(getattr(agent_class, method, None)):
            raise SettingsError(f"FUNCTION_AGENT={name!r}: the class has no method {method!r}; see function/agent.py for the contract")
    agent: InferenceAgent = agent_class()
    return agent
