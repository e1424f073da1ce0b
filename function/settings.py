"""What the function is told by its environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weights_cache import environment
from weights_cache.environment import SettingsError, setting
from weights_cache.settings import WeightsSettings

_ENDS_OF_ROUTES = ("ready", "infer", "generate", "generate_stream")  # /v2/models/<name>/…
CLUSTER_ISSUER = "https://kubernetes.default.svc"  # where the cluster that a pod is in answers, however it calls itself


@dataclass(frozen=True)
class FunctionSettings:
    """The `FUNCTION_` variables and Knative's own PORT."""

    agent: str = setting("FUNCTION_AGENT", text="the agent, as `package.module:Class`")
    agent_path: str | None = setting(
        "FUNCTION_AGENT_PATH", None, text="folders, with `:` between them, where the agent's module is looked for before Python's own path"
    )
    model_name: str = setting("FUNCTION_MODEL_NAME", "model", text="the model's name in URLs and metrics")
    device: str = setting("FUNCTION_DEVICE", "cpu", text="where the model runs: `cpu`, `cuda:0`")
    host: str = setting("FUNCTION_HOST", "0.0.0.0", text="the address the function listens on")  # noqa: S104  a pod's own network
    port: int = setting("PORT", 8080, minimum=0, maximum=65535, text="the port the function listens on; Knative sets it")
    max_batch: int = setting(
        "FUNCTION_MAX_BATCH", 32, minimum=1, maximum=4096, text="inputs handed to the model at a time, and streams that share a step"
    )
    batch_wait_ms: float = setting(
        "FUNCTION_BATCH_WAIT_MS", 5.0, minimum=0, maximum=1000, text="the longest wait for more inputs, while more are likely"
    )
    queue_limit: int = setting(
        "FUNCTION_QUEUE_LIMIT",
        64,
        minimum=1,
        maximum=4096,
        text="requests that may wait, interactive and batch work each; beyond it callers get 503",
    )
    timeout_s: float = setting(
        "FUNCTION_TIMEOUT_S",
        30.0,
        minimum=0.001,
        maximum=3600,
        text="seconds until a request is answered 504; for a stream, to each next piece",
    )
    drain_s: float = setting(
        "FUNCTION_DRAIN_S", 60.0, minimum=0, maximum=3600, text="seconds that running requests and streams have after SIGTERM"
    )
    tell_failure_s: float = setting(
        "FUNCTION_TELL_FAILURE_S",
        0.0,
        minimum=0,
        maximum=600,
        text="seconds for which a function that cannot start is ready all the same, and answers each call with the reason; "
        "see docs/deploy.md for when that may be",
    )
    breaker_threshold: int = setting(
        "FUNCTION_BREAKER_THRESHOLD", 5, minimum=1, maximum=1000, text="time-outs in a row after which callers get 503 at once"
    )
    breaker_reset_s: float = setting(
        "FUNCTION_BREAKER_RESET_S", 30.0, minimum=0.001, maximum=86400, text="seconds until a call is tried again after that"
    )
    max_body_bytes: int = setting("FUNCTION_MAX_BODY_BYTES", 16 << 20, minimum=1, text="largest request body; beyond it callers get 413")
    max_inputs: int = setting("FUNCTION_MAX_INPUTS", 1024, minimum=1, text="inputs that one request may hold; beyond it callers get 400")
    event_memory: int = setting(
        "FUNCTION_EVENT_MEMORY",
        10_000,
        minimum=0,
        text="finished events that are remembered, so that a repeated one is not worked on again; 0: none",
    )
    event_memory_bytes: int = setting(
        "FUNCTION_EVENT_MEMORY_BYTES", 32 << 20, minimum=1, text="bytes of their replies; beyond it the oldest go"
    )
    event_memory_s: float = setting("FUNCTION_EVENT_MEMORY_S", 3600.0, minimum=1, maximum=86400, text="seconds that they are remembered")
    api_keys_file: Path | None = setting(
        "FUNCTION_API_KEYS_FILE", None, text="a file of keys, one a line; with it callers need `Authorization: Bearer <key>`, probes do not"
    )
    oidc_audience: str | None = setting(
        "FUNCTION_OIDC_AUDIENCE", None, text="the audience that tokens of event senders are for; with it events at `POST /` need one"
    )
    oidc_issuer: str = setting("FUNCTION_OIDC_ISSUER", CLUSTER_ISSUER, text="who issues them; the default is the cluster itself")
    oidc_subjects: str | None = setting(
        "FUNCTION_OIDC_SUBJECTS", None, text="the senders that are let in, as `system:serviceaccount:namespace:name,…`; all if empty"
    )
    cors_origins: str | None = setting(
        "FUNCTION_CORS_ORIGINS",
        None,
        text="the pages that browsers may call from, as `https://app.example.com,…`, or `*`; none if empty",
    )
    metrics_port: int = setting(
        "FUNCTION_METRICS_PORT", 0, minimum=0, maximum=65535, text="a port that has `/metrics` alone, and asks for no key; 0 is none"
    )
    access_log: bool = setting("FUNCTION_ACCESS_LOG", True, text="one JSON line on stderr for each request, probes excepted")
    threads: int = setting(
        "FUNCTION_TORCH_THREADS",
        0,
        minimum=0,
        maximum=1024,
        text="threads of torch, or of onnxruntime; 0 takes the container's CPU limit, or 1 without one",
    )
    lean_torch: bool = setting("FUNCTION_LEAN_TORCH", True, text="import of torch without its compilers, until something needs them")
    task: str | None = setting(
        "FUNCTION_TASK",
        None,
        text="what the model of `function.agents.transformers:Pipeline` is for, as `text-classification`; by default its config says it",
    )
    dtype: str | None = setting(
        "FUNCTION_DTYPE",
        None,
        text="for the agents of `function.agents.transformers`: `float32`, `bfloat16` or `float16`; by default as in the weights, "
        "which replicas then share",
    )
    onnx_file: str | None = setting(
        "FUNCTION_ONNX_FILE", None, text="the model among several `.onnx` files, for `function.agents.onnx:Session`, as `onnx/model.onnx`"
    )

    def __post_init__(self) -> None:
        """Raises SettingsError for a model's name that no URL could name."""
        first, *others = self.model_name.split("/")
        if any(part in ("", ".", "..") for part in (first, *others)) or not self.model_name.isprintable():
            raise SettingsError(f"FUNCTION_MODEL_NAME={self.model_name!r}: must be a name, or names with single slashes between them")
        last = others[-1] if others else ""
        if self.model_name.endswith(":predict") or "versions" in others or last in _ENDS_OF_ROUTES:
            raise SettingsError(f"FUNCTION_MODEL_NAME={self.model_name!r}: its end reads like that of a route; choose another")

    @property
    def agent_folders(self) -> list[str]:
        """Where the agent's module is looked for first, as absolute paths."""
        return [os.path.abspath(folder) for folder in (self.agent_path or "").split(os.pathsep) if folder]  # noqa: PTH100  which leaves links alone

    @property
    def http_threads(self) -> int:
        """Enough for all that may wait, of both classes for the model or for a repeated event's first reply, and for all that may be worked
        on, and some to spare for those that are being read or answered."""
        return 3 * self.queue_limit + 2 * self.max_batch + 16


def for_agents() -> FunctionSettings:
    """The function's settings as an agent may ask for them, also where no function runs it. Raises SettingsError."""
    return environment.read(FunctionSettings, {"FUNCTION_AGENT": "agent", **os.environ}, prefix="FUNCTION_")


def from_environment() -> tuple[FunctionSettings, WeightsSettings]:
    """Both settings of the function's process. Raises SettingsError."""
    environ: Mapping[str, str] = os.environ
    return (
        environment.read(FunctionSettings, environ, prefix="FUNCTION_"),
        environment.read(WeightsSettings, environ, prefix="WEIGHTS_"),
    )
