"""The function that is simulated, and the nodes that its pods run on: everything but the trace and the policy.

A model is a TOML file, or settings NAME=VALUE with the same names:

    service = "lognormal(p50=0.4, p99=3)"
    concurrency = 4
    [cold_start]
    weights_store = 22.7
    [nodes]
    count = 2
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from knative.simulator.distribution import _CALL, Constant, Distribution, Floats, parse_arguments, parse_distribution, parse_seconds
from knative.simulator.errors import ModelError
from knative.simulator.trace import Arrivals


@dataclass(frozen=True)
class Tokens:
    """Service time by the tokens of a request, as if it had the pod for itself; see `batch_slowdown` for company."""

    prefill: float  # prompt tokens per second
    decode: float  # output tokens per second


# What is used where nothing is said: a small chat model on one GPU, and a tenth of a second where a trace has no tokens either.
DEFAULT_TOKENS = Tokens(prefill=4_000.0, decode=40.0)
DEFAULT_SERVICE = Constant(0.1)


@dataclass(frozen=True)
class ColdStart:
    """The stages of a pod's start, one after the other, in seconds.

    The defaults are the demo's, measured on this project's machine (bench/results/cold_start.md): MiniLM, image and weights on the node,
    1.36 s in all, 1.91 s with the weights from the store. A large model's are tens of seconds: set them.
    """

    schedule: Distribution = Constant(0.013)  # until the container is created; "spawn" there
    image: Distribution = Constant(0.0)  # only where the node has not pulled it yet
    weights_store: Distribution = Constant(0.555)  # from the object store, where the node has not got them yet
    weights_cache: Distribution = Constant(0.005)  # from the node's cache
    imports: Distribution = Constant(1.29)  # the process, its libraries
    load: Distribution = Constant(0.052)  # tensors to the device, warm-up, the first good probe


@dataclass(frozen=True)
class FunctionModel:
    """How a function and its pods behave. Times in seconds."""

    service: Distribution | Tokens | None = None  # with the pod for itself; None: by tokens where the trace has them, else 0.1 s
    concurrency: int = 1  # containerConcurrency: requests at once per pod; 0: no limit
    batch_slowdown: float = 0.0  # each other request in the pod makes all of its requests take so much longer; 1: they take turns
    timeout_s: float = 300.0  # timeoutSeconds, cold start included
    queue_limit: int = 10_000  # requests that may wait for a pod; one more is rejected
    cold_start: ColdStart = field(default_factory=ColdStart)
    drain_s: float = 0.0  # least time that a pod holds its resources after it was told to go
    pod_mtbf_s: float = math.inf  # mean time between failures of a ready pod; its requests fail, it is replaced
    gpus: int = 1  # per pod
    price_per_gpu_hour: float = 2.5  # of any currency
    rollouts: tuple[float, ...] = ()  # when a new revision comes
    rollout: str = "surge"  # the new pods start beside the old ones; "recreate": the old ones go first

    def services(self, chunk: Arrivals, rng: np.random.Generator) -> Floats:
        """The service time of each request of `chunk`, alone in a pod: as measured, where the trace says so.

        Raises ModelError where it is to come from tokens and there are none.
        """
        has_tokens = (chunk.prompt_tokens > 0) | (chunk.output_tokens > 0)
        by_tokens = self.service if isinstance(self.service, Tokens) else DEFAULT_TOKENS
        if isinstance(self.service, Tokens):
            lacking = ~has_tokens & np.isnan(chunk.service_s)
            if lacking.any():
                raise ModelError(f"service is tokens(…), but the request at {chunk.t_s[lacking.argmax()]:g} s has no tokens")
            times = _by_tokens(chunk, self.service)
        elif self.service is not None:
            times = self.service.sample(rng, len(chunk.t_s))
        else:
            times = np.where(has_tokens, _by_tokens(chunk, by_tokens), DEFAULT_SERVICE.value_s)
        return np.where(np.isnan(chunk.service_s), times, chunk.service_s)


def _by_tokens(chunk: Arrivals, tokens: Tokens) -> Floats:
    return np.asarray(chunk.prompt_tokens / tokens.prefill + chunk.output_tokens / tokens.decode)


@dataclass(frozen=True)
class Nodes:
    """Where pods run, all functions together. Pods that find no room are pending, first come first served."""

    count: int = 0  # 0: there is always room, as on one node without an end
    gpus: int = 8  # per node
    warm: bool = True  # whether the nodes have the image and the weights when the trace begins


def read_model(settings: Iterable[str]) -> tuple[FunctionModel, Nodes]:
    """The model of `settings`, each a TOML file or NAME=VALUE; a later one wins.

    Raises ModelError if a file cannot be read, a name is unknown, or a value out of bounds.
    """
    texts: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if equals:
            texts[name.strip()] = value.strip()
        else:
            texts |= _read_file(Path(setting))
    return make_model(texts)


def make_model(texts: dict[str, str]) -> tuple[FunctionModel, Nodes]:
    """The model of settings by name, e.g. {"concurrency": "4", "cold_start.load": "2", "nodes.count": "1"}; errors as of read_model."""
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in SETTINGS:
            close = get_close_matches(name, SETTINGS, 1)
            known = f"did you mean {close[0]}?" if close else f"known are {', '.join(SETTINGS)}"
            raise ModelError(f"model: {name} = {text!r}, there is no such setting; {known}")
        values[name] = SETTINGS[name](name, text)
    parts = {"": {}, "cold_start": {}, "nodes": {}}  # type: dict[str, dict[str, Any]]
    for name, value in values.items():
        group, _, key = name.rpartition(".")
        parts[group][key] = value
    model = FunctionModel(**parts[""], cold_start=ColdStart(**parts["cold_start"]))
    nodes = Nodes(**parts["nodes"])
    if nodes.count and model.gpus > nodes.gpus:
        raise ModelError(f"gpus = {model.gpus}, must be at most nodes.gpus ({nodes.gpus}), or no pod can ever start")
    return model, nodes


def _read_file(path: Path) -> dict[str, str]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ModelError(f"{path}: {err.strerror or err}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise ModelError(f"{path}: not TOML: {err}") from None
    flat: dict[str, str] = {}
    for name, value in data.items():
        inner = value if isinstance(value, dict) else {"": value}
        for key, item in inner.items():
            flat[f"{name}.{key}" if key else name] = _as_text(item)
    return flat


def _as_text(value: object) -> str:
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _service(name: str, text: str) -> Distribution | Tokens:
    if (call := _CALL.fullmatch(text.strip())) and call[1] == "tokens":
        prefill, decode = parse_arguments(name, text, call[2], ("prefill", "decode"))
        if not (prefill and decode):
            raise ModelError(f"{name} = {text!r}, tokens per second must be above 0")
        return Tokens(prefill, decode)
    try:
        return parse_distribution(name, text)
    except ModelError as err:
        raise ModelError(
            f"{err}" if "tokens" in str(err) else str(err).replace("seconds, ", "seconds, tokens(prefill=…, decode=…), ", 1)
        ) from None


def _whole(low: int) -> Callable[[str, str], int]:
    def parse(name: str, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise ModelError(f"{name} = {text!r}, must be a whole number of at least {low}")
        return value

    return parse


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise ModelError(f"{name} = {text!r}, must be a number of at least 0")
    return value


def _above_zero(name: str, text: str) -> float:
    if not (value := parse_seconds(name, text)):
        raise ModelError(f"{name} = {text!r}, must be above 0")
    return value


def _times(name: str, text: str) -> tuple[float, ...]:
    return tuple(sorted(parse_seconds(name, part) for part in text.split(",") if part.strip()))


def _flag(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ModelError(f"{name} = {text!r}, must be true or false")
    return text == "true"


def _rollout(name: str, text: str) -> str:
    if text not in ("surge", "recreate"):
        raise ModelError(f"{name} = {text!r}, must be surge or recreate")
    return text


SETTINGS: dict[str, Callable[[str, str], Any]] = {
    "service": _service,
    "concurrency": _whole(0),
    "batch_slowdown": _number,
    "timeout_s": _above_zero,
    "queue_limit": _whole(0),
    **{f"cold_start.{stage.name}": parse_distribution for stage in fields(ColdStart)},
    "drain_s": parse_seconds,
    "pod_mtbf_s": _above_zero,
    "gpus": _whole(0),
    "price_per_gpu_hour": _number,
    "rollouts": _times,
    "rollout": _rollout,
    "nodes.count": _whole(0),
    "nodes.gpus": _whole(0),
    "nodes.warm": _flag,
}
