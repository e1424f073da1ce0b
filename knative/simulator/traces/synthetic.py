"""Made-up traffic, for when there is no trace yet or one thing is to be seen: `synthetic:poisson?rps=2&duration=1h`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl

import numpy as np

from knative.simulator.trace import CHUNK, Arrivals, arrivals
from knative.simulator.traces.errors import BadTrace
from knative.simulator.traces.opened import OpenTrace
from knative.simulator.traces.windows import Window, sampled

PREFIX = "synthetic:"
STEP_S = 60.0  # a rate that changes all the time is constant for so long

_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")


def _poisson(of: Mapping[str, float], seed: int) -> Iterator[Arrivals]:
    return sampled(_steady(0.0, of["duration"], of["rps"]), seed)


def _bursts(of: Mapping[str, float], seed: int) -> Iterator[Arrivals]:
    """Bursts at random, on top of a trickle."""
    rng = np.random.default_rng([seed, 1])
    windows = _steady(0.0, of["duration"], of["rps"])
    at = rng.exponential(of["every"])
    while at < of["duration"]:
        windows.append(Window(at, of["over"], 0.0, int(of["size"]), function="burst"))
        at += of["over"] + rng.exponential(of["every"])
    return _sorted(sampled(windows, seed))


def _on_off(of: Mapping[str, float], seed: int) -> Iterator[Arrivals]:
    """Traffic for a while, then none for a while, both of random length."""
    rng = np.random.default_rng([seed, 2])
    windows: list[Window] = []
    at = rng.exponential(of["off"])
    while at < of["duration"]:
        end = min(of["duration"], at + rng.exponential(of["on"]))
        windows += _steady(at, end, of["rps"])
        at = end + rng.exponential(of["off"])
    return sampled(windows, seed)


def _diurnal(of: Mapping[str, float], seed: int) -> Iterator[Arrivals]:
    """A wave: least at the start, most after half a period."""

    def rate(start_s: float) -> float:
        wave: float = 1 - of["swing"] * math.cos(2 * math.pi * (start_s + STEP_S / 2) / of["period"])
        return of["rps"] * wave

    steps = (step * STEP_S for step in range(math.ceil(of["duration"] / STEP_S)))
    return sampled([Window(start, min(STEP_S, of["duration"] - start), rate(start)) for start in steps], seed)


def _teaching(of: Mapping[str, float], seed: int) -> Iterator[Arrivals]:
    """Many short requests at once, then a few long ones: requests per second say that it is over while pods are still busy."""
    rng = np.random.default_rng([seed, 3])
    short, long = int(of["requests"]), int(of["slow"])
    first = np.sort(rng.random(short)) * of["over"]
    then = of["over"] + of["gap"] * np.arange(1, long + 1)
    service = np.concatenate([np.full(short, of["short"]), np.full(long, of["long"])])
    yield arrivals(np.concatenate([first, then]), service_s=service)


@dataclass(frozen=True)
class Kind:
    """One kind of traffic, and what can be said of it with which defaults (times in seconds)."""

    read: Callable[[Mapping[str, float], int], Iterator[Arrivals]]
    settings: Mapping[str, float]


KINDS = {
    "poisson": Kind(_poisson, {"rps": 1.0, "duration": 3600.0}),
    "bursts": Kind(_bursts, {"rps": 0.01, "every": 900.0, "size": 50.0, "over": 5.0, "duration": 14400.0}),
    "onoff": Kind(_on_off, {"rps": 2.0, "on": 300.0, "off": 900.0, "duration": 14400.0}),
    "diurnal": Kind(_diurnal, {"rps": 1.0, "swing": 1.0, "period": 86400.0, "duration": 604800.0}),
    "teaching": Kind(_teaching, {"requests": 50.0, "over": 5.0, "slow": 5.0, "gap": 10.0, "short": 0.2, "long": 30.0, "duration": 300.0}),
}
LOOKS = f"made-up traffic: {PREFIX}KIND?name=value&… with KIND one of {', '.join(KINDS)}"


def open_trace(spec: str, seed: int) -> OpenTrace:
    """The trace that is described. Raises BadTrace for a kind, a name or a value that there is not."""
    name, _, query = spec.removeprefix(PREFIX).partition("?")
    if name not in KINDS:
        raise BadTrace(spec, f"no kind {name!r}; there are {', '.join(KINDS)}")
    kind = KINDS[name]
    settings = {**kind.settings}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in settings:
            raise BadTrace(spec, f"{name} has no setting {key!r}; it has {', '.join(settings)}")
        settings[key] = _value(spec, key, value)
    if name == "diurnal" and settings["swing"] > 1:
        raise BadTrace(spec, f"swing = {settings['swing']:g}, must be from 0 to 1")
    for key in ("duration", "every", "over", "on", "off", "period"):
        if settings.get(key) == 0:
            raise BadTrace(spec, f"{key} = 0, must be more than 0")
    return OpenTrace(spec, lambda: kind.read(settings, seed), (f"made up (seed {seed})",), settings["duration"])


def _value(spec: str, key: str, value: str) -> float:
    found = _NUMBER.fullmatch(value)
    if not found or float(found[1]) > 1e9:
        raise BadTrace(spec, f"{key} = {value!r}, must be a number from 0 to 1000000000, of times with s, m, h or d behind it")
    return float(found[1]) * _UNITS_S[found[2]]


def _steady(start_s: float, end_s: float, rps: float) -> list[Window]:
    """A constant rate, in pieces that are sampled one after the other."""
    length_s = max(STEP_S, CHUNK / rps if rps else end_s - start_s)
    steps = range(math.ceil((end_s - start_s) / length_s))
    starts = (start_s + step * length_s for step in steps)
    return [Window(start, min(length_s, end_s - start), rps) for start in starts]


def _sorted(chunks: Iterator[Arrivals]) -> Iterator[Arrivals]:
    """For windows that overlap."""
    yield arrivals(np.sort(np.concatenate([chunk.t_s for chunk in chunks])))
