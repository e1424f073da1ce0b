"""Which token comes next: what a caller may say about it, and the choice itself."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from function.agent import BadInput

MAX_STOPS = 4
COLD = 1e-4  # below it there is nothing left to draw, and logits divided by it would no longer be numbers
LIKELY = 512  # tokens that are looked at first; nearly always they hold more than top_p


@dataclass(frozen=True)
class Sampling:
    """A caller's wishes, with the defaults of one who has none: the likeliest token each time, 256 at most."""

    temperature: float = 0.0  # 0 takes the likeliest token; 1 follows the model's probabilities; up to 2
    top_p: float = 1.0  # draws among the likeliest tokens that together are at least so probable; 0 to 1
    seed: int | None = None  # the same seed draws the same tokens; without one they differ each time
    max_tokens: int = 256  # to make, at least 1; the model's context bounds it too
    stop: tuple[str, ...] = ()  # the answer ends before the first of these texts; at most 4

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "Sampling":
        """From the parameters of a request; null is as good as nothing. Raises BadInput."""
        said = {name: value for name, value in given.items() if value is not None}
        found: dict[str, Any] = {}
        for name, value in said.items():
            match name:
                case "temperature":
                    found[name] = _number(name, value, 0, 2)
                case "top_p":
                    found[name] = _number(name, value, 0, 1)
                case "seed":
                    found[name] = _integer(name, value, -(2**63), 2**64 - 1)
                case "max_tokens":
                    found[name] = _integer(name, value, 1, 2**63 - 1)
                case "stop":
                    found[name] = _stops(value)
                case _:
                    raise BadInput(f"there is no parameter {name!r}; there are temperature, top_p, seed, max_tokens and stop")
        return cls(**found)


class Chooser:
    """Chooses the tokens of one sequence. What it draws depends on its seed and on the logits, on no other sequence."""

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._random = random.Random(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """A token, by the logits of all: float32 [vocabulary]."""
        if self._temperature < COLD:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / self._temperature, 0)
        tokens = None
        if self._top_p < 1:
            probabilities, tokens = self._likely(probabilities)
        sums = probabilities.double().cumsum(0)
        drawn = torch.searchsorted(sums, self._random.random() * float(sums[-1]), right=True).clamp(max=len(sums) - 1)
        return int(drawn if tokens is None else tokens[drawn])

    def _likely(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The fewest tokens that together reach top_p (nucleus sampling, Holtzman et al., 2020): probabilities and tokens."""
        found, tokens = probabilities.topk(min(LIKELY, len(probabilities)))
        if float(found.sum()) < self._top_p:
            found, tokens = probabilities.sort(descending=True)
        count = int(torch.searchsorted(found.double().cumsum(0), self._top_p)) + 1
        return found[:count], tokens[:count]


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadInput(f"{name!r} must be a number from {low:g} to {high:g}")
    return float(value)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(f"{name!r} must be a whole number from {low} to {high}")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not 1 <= len(found) <= MAX_STOPS or not all(isinstance(one, str) and one for one in found):
        raise BadInput(f"'stop' must be a string or a list of 1 to {MAX_STOPS} strings, none of them empty")
    return tuple(found)
