"""Which token comes next: what a caller may say about it, and the choice itself; and where a text ends."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from function.agent import BadInput

MAX_STOPS = 4
MAX_BIASES = 1024  # tokens of a logit_bias
COLD = 1e-4  # below it there is nothing left to draw, and logits divided by it would no longer be numbers
LIKELY = 512  # tokens that are looked at first; nearly always they hold more than top_p

# What Sampling knows beyond OpenAI's parameters, as agents declare it in `sampling_parameters`.
FURTHER_PARAMETERS: dict[str, dict[str, Any]] = {
    "top_k": {"type": "integer", "minimum": -1, "maximum": 2**31 - 1, "description": "a whole number from 1, or 0 or -1 for all tokens"},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1, "description": "a number from 0 to 1"},
    "repetition_penalty": {"type": "number", "minimum": 0.01, "maximum": 100, "description": "a number from 0.01 to 100"},
}


@dataclass(frozen=True)
class Sampling:
    """A caller's wishes, with the defaults of one who has none: the likeliest token each time, 256 at most."""

    temperature: float = 0.0  # 0 takes the likeliest token; 1 follows the model's probabilities; up to 2
    top_p: float = 1.0  # draws among the likeliest tokens that together are at least so probable; 0 to 1
    top_k: int = 0  # draws among so many of the likeliest tokens; below 1 among all
    min_p: float = 0.0  # draws among tokens at least so probable as this part of the likeliest one's probability; 0 to 1
    repetition_penalty: float = 1.0  # divides the logits of tokens that are in the text so far, prompt included (Keskar et al., 2019)
    presence_penalty: float = 0.0  # is taken off the logits of tokens that were made already; -2 to 2
    frequency_penalty: float = 0.0  # the same, as often as they were made
    logit_bias: tuple[tuple[int, float], ...] = ()  # is added to the logits of these tokens; -100 to 100
    seed: int | None = None  # the same seed draws the same tokens; without one they differ each time
    max_tokens: int = 256  # to make, at least 1; the model's context bounds it too
    stop: tuple[str, ...] = ()  # the answer ends before the first of these texts; at most 4

    @classmethod
    def parse(cls, given: Mapping[str, Any], defaults: "Sampling | None" = None) -> "Sampling":
        """From the parameters of a request; null is as good as nothing. Raises BadInput."""
        said = {name: value for name, value in given.items() if value is not None}
        if strange := [name for name in said if name not in _READ]:
            raise BadInput(f"there is no parameter {strange[0]!r:.100}; there are {', '.join(_READ)}")
        return replace(defaults or cls(), **{name: _READ[name](name, value) for name, value in said.items()})


class Chooser:
    """Chooses the tokens of one sequence. What it draws depends on its seed, on the logits and on what it drew, on no other sequence."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int] = ()) -> None:
        """prompt: its tokens, for a repetition_penalty."""
        self._sampling = sampling
        self._random = random.Random(sampling.seed)
        self._made: Counter[int] = Counter()
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._is_adjusting = bool(
            sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
        )

    def choose(self, logits: Tensor) -> int:
        """A token, by the logits of all: float32 [vocabulary]."""
        if not self._is_adjusting:
            return self._choose(logits)
        token = self._choose(self._adjusted(logits))
        self._made[token] += 1
        self._seen.add(token)
        return token

    def _choose(self, logits: Tensor) -> int:
        if self._sampling.temperature < COLD:
            return int(logits.argmax())
        probabilities, tokens = self._candidates(logits / self._sampling.temperature)
        sums = probabilities.double().cumsum(0)
        drawn = torch.searchsorted(sums, self._random.random() * float(sums[-1]), right=True).clamp(max=len(sums) - 1)
        return int(drawn if tokens is None else tokens[drawn])

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is drawn from, top_k before top_p before min_p: probabilities, up to a factor, and tokens, None for all in their order."""
        tokens = None
        sampling = self._sampling
        if 0 < sampling.top_k < len(logits):
            logits, tokens = logits.topk(sampling.top_k)
        probabilities = torch.softmax(logits, 0)
        if sampling.top_p < 1:
            probabilities, likely = self._likely(probabilities)
            tokens = likely if tokens is None else tokens[likely]
        if sampling.min_p > 0:
            kept = (probabilities >= sampling.min_p * probabilities.max()).nonzero().flatten()
            probabilities, tokens = probabilities[kept], kept if tokens is None else tokens[kept]
        return probabilities, tokens

    def _likely(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The fewest tokens that together reach top_p (nucleus sampling, Holtzman et al., 2020): probabilities and tokens."""
        found, tokens = probabilities.topk(min(LIKELY, len(probabilities)))
        if float(found.sum()) < self._sampling.top_p:
            found, tokens = probabilities.sort(descending=True)
        count = int(torch.searchsorted(found.double().cumsum(0), self._sampling.top_p)) + 1
        return found[:count], tokens[:count]

    def _adjusted(self, logits: Tensor) -> Tensor:
        """The logits with penalties and biases, in the order of transformers' processors."""
        sampling, logits = self._sampling, logits.clone()
        if self._seen:
            seen = torch.tensor([token for token in self._seen if token < len(logits)], device=logits.device, dtype=torch.long)
            found = logits[seen]
            logits[seen] = torch.where(found < 0, found * sampling.repetition_penalty, found / sampling.repetition_penalty)
        changes = {token: -sampling.presence_penalty - sampling.frequency_penalty * count for token, count in self._made.items()}
        for token, bias in sampling.logit_bias:
            changes[token] = changes.get(token, 0.0) + bias
        if changes := {token: change for token, change in changes.items() if token < len(logits)}:
            logits[torch.tensor(list(changes), device=logits.device)] += torch.tensor(list(changes.values()), device=logits.device)
        return logits


class Stops:
    """Ends a text before the first of some texts, and holds back the beginning of one until it is clear that it is none."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """The text that is certain now, and whether it ends here, before a stop text."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        if found := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            return text[: min(found)], True
        certain = len(text) - max(begun(text, stop) for stop in self._stops)
        self._held = text[certain:]
        return text[:certain], False

    def rest(self) -> str:
        """What was held back, when nothing follows."""
        return self._held


def begun(text: str, word: str) -> int:
    """How many characters at the end of a text may be the beginning of a word."""
    return next((length for length in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:length])), 0)


def _number(low: float, high: float) -> Any:
    def read(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise BadInput(f"{name!r} must be a number from {low:g} to {high:g}")
        return float(value)

    return read


def _integer(low: int, high: int) -> Any:
    def read(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise BadInput(f"{name!r} must be a whole number from {low} to {high}")
        return value

    return read


def _stops(_: str, value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not 1 <= len(found) <= MAX_STOPS or not all(isinstance(one, str) and one for one in found):
        raise BadInput(f"'stop' must be a string or a list of 1 to {MAX_STOPS} strings, none of them empty")
    return tuple(found)


def _biases(_: str, value: Any) -> tuple[tuple[int, float], ...]:
    """As JSON has them, with tokens' numbers as strings."""
    if not isinstance(value, Mapping) or len(value) > MAX_BIASES:
        raise BadInput(f"'logit_bias' must be an object of at most {MAX_BIASES} tokens")
    found = []
    for token, bias in value.items():
        if not str(token).isascii() or not str(token).isdigit() or len(str(token)) > 9:
            raise BadInput(f"'logit_bias' must have tokens' numbers as its names, not {token!r:.60}")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not (math.isfinite(bias) and -100 <= bias <= 100):
            raise BadInput("'logit_bias' must have numbers from -100 to 100")
        found.append((int(token), float(bias)))
    return tuple(found)


_READ: dict[str, Any] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _integer(-1, 2**31 - 1),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _biases,
    "seed": _integer(-(2**63), 2**64 - 1),
    "max_tokens": _integer(1, 2**63 - 1),
    "stop": _stops,
}
