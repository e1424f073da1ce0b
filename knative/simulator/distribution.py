"""Lengths of time: constant, or drawn from a distribution. Written as `1.3`, `exponential(mean=0.4)`, `lognormal(p50=22.7, p99=52)`, …"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from knative.simulator.errors import ModelError

Floats = NDArray[np.float64]

_Z99 = 2.3263478740408408  # standard deviations from the median to the 99th percentile of a normal distribution
FORMS = "seconds, exponential(mean=…), lognormal(p50=…, p99=…), uniform(low=…, high=…) or empirical(…, …)"
_CALL = re.compile(r"([a-z]+)\((.*)\)", re.DOTALL)


class Distribution(Protocol):
    """Lengths of time in seconds."""

    def sample(self, rng: np.random.Generator, count: int) -> Floats:
        """So many of them."""
        ...

    def mean_s(self) -> float:
        """Their mean."""
        ...


@dataclass(frozen=True)
class Constant:
    """Always the same."""

    value_s: float

    def sample(self, rng: np.random.Generator, count: int) -> Floats:
        """So many of them; nothing is drawn from `rng`."""
        return np.full(count, self.value_s)

    def mean_s(self) -> float:
        """The value."""
        return self.value_s


@dataclass(frozen=True)
class Exponential:
    """Without a memory: the textbook's service time."""

    of_mean_s: float

    def sample(self, rng: np.random.Generator, count: int) -> Floats:
        """So many of them."""
        return rng.exponential(self.of_mean_s, count)

    def mean_s(self) -> float:
        """The mean."""
        return self.of_mean_s


@dataclass(frozen=True)
class Lognormal:
    """Most are near the median, few are very long: what load times and replies look like."""

    p50_s: float
    p99_s: float

    def sample(self, rng: np.random.Generator, count: int) -> Floats:
        """So many of them."""
        return self.p50_s * np.exp(rng.standard_normal(count) * self._sigma)

    def mean_s(self) -> float:
        """The mean, which is above the median."""
        return self.p50_s * math.exp(self._sigma**2 / 2)

    @property
    def _sigma(self) -> float:
        return math.log(self.p99_s / self.p50_s) / _Z99


@dataclass(frozen=True)
class Uniform:
    """Any between two bounds alike."""

    low_s: float
    high_s: float

    def sample(self, rng: np.random.Generator, count: int) -> Floats:
        """So many of them."""
        return rng.uniform(self.low_s, self.high_s, count)

    def mean_s(self) -> float:
        """The middle."""
        return (self.low_s + self.high_s) / 2


@dataclass(frozen=True)
class Empirical:
    """One of the values that were measured, each as likely as the other."""

    values_s: tuple[float, ...]

    def sample(self, rng: np.random.Generator, count: int) -> Floats:
        """So many of them."""
        return rng.choice(np.array(self.values_s), count)

    def mean_s(self) -> float:
        """The mean."""
        return sum(self.values_s) / len(self.values_s)


def parse_distribution(name: str, text: str) -> Distribution:
    """The distribution in `text`. Raises ModelError, which begins with `name`, if it is none."""
    if not (call := _CALL.fullmatch(text.strip())):
        return Constant(parse_seconds(name, text))
    kind, inside = call[1], call[2]
    if kind == "empirical":
        values = tuple(parse_seconds(name, part) for part in inside.split(",") if part.strip())
        if not values:
            raise ModelError(f"{name} = {text!r}, needs at least one value in the brackets")
        return Empirical(values)
    if kind not in _KINDS:
        raise ModelError(f"{name} = {text!r}, must be {FORMS}")
    make, wanted = _KINDS[kind]
    first, last = (arguments := parse_arguments(name, text, inside, wanted))[0], arguments[-1]
    if kind == "lognormal" and not 0 < first <= last:
        raise ModelError(f"{name} = {text!r}, p50 must be above 0 and at most p99")
    if first > last:
        raise ModelError(f"{name} = {text!r}, low must be at most high")
    return make(*arguments)


_KINDS: dict[str, tuple[Callable[..., Distribution], tuple[str, ...]]] = {
    "exponential": (Exponential, ("mean",)),
    "lognormal": (Lognormal, ("p50", "p99")),
    "uniform": (Uniform, ("low", "high")),
}


def parse_arguments(name: str, text: str, inside: str, wanted: tuple[str, ...]) -> tuple[float, ...]:
    """The values of `a=1, b=2` in the order of `wanted`. Raises ModelError unless exactly these are there, none below 0."""
    found = dict(part.replace(" ", "").partition("=")[::2] for part in inside.split(",") if part.strip())
    if set(found) != set(wanted):
        raise ModelError(f"{name} = {text!r}, expected {', '.join(f'{one}=…' for one in wanted)} in the brackets")
    return tuple(parse_seconds(name, found[one]) for one in wanted)


def parse_seconds(name: str, text: str) -> float:
    """A number of seconds, with or without `s` or `ms` behind it. Raises ModelError if it is not one, or is below 0."""
    written = text.strip()
    scale = 1e-3 if written.endswith("ms") else 1.0
    try:
        value = float(written.removesuffix("s").removesuffix("m") if scale < 1 else written.removesuffix("s")) * scale
    except ValueError:
        raise ModelError(f"{name} = {text!r}, must be {FORMS}") from None
    if not (math.isfinite(value) and value >= 0):
        raise ModelError(f"{name} = {text!r}, must be finite and at least 0")
    return value
