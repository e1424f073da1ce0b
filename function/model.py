"""The model: one agent, the thread that owns it, and the phases it goes through from an open port to an answer.

importing → restoring → loading → warming → ready → draining. The stages it leaves behind are the cold start's break-down.
"""

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from function.agent import InferenceAgent, load_agent
from function.errors import AgentFailed, FunctionError, TimedOut, Unavailable
from function.settings import FunctionSettings
from weights_cache.errors import WeightsError
from weights_cache.reader import Weights

log = logging.getLogger("relight.function")


@dataclass
class _Call:
    inputs: Sequence[Any]
    deadline: float
    reply: "Future[Sequence[Any]]" = field(default_factory=Future)


class Model:
    """Runs one agent in a thread of its own; `predict` may be called from any thread."""

    def __init__(self, settings: FunctionSettings, weights: Weights, *, started_at: float) -> None:
        """started_at: when the process started, on `time.monotonic`'s clock; stages count from there."""
        self.stages: dict[str, float] = {}  # seconds from the process's start to the end of each stage
        self._settings = settings
        self._weights = weights
        self._started_at = started_at
        self._phase = "importing"
        self._calls: queue.Queue[_Call] = queue.Queue(settings.queue_limit)
        self._on_failure: Callable[[], object] = lambda: None

    def start(self, on_failure: Callable[[], object]) -> None:
        """Begin to load in the model's thread; `on_failure` is called there if the agent cannot be brought up."""
        self._on_failure = on_failure
        self.mark("listen")
        self._weights.restored()  # finds out now whether the cache has them already
        threading.Thread(target=self._run, name="model", daemon=True).start()

    @property
    def phase(self) -> str:
        """Where it is on the way from importing to draining."""
        if self._phase == "loading" and not self._weights.is_empty() and self._weights.restored().seconds is None:
            return "restoring"  # the agent is binding tensors as they arrive
        return self._phase

    def drain(self) -> None:
        """No new calls are wanted; those that wait are still answered."""
        self._phase = "draining"

    def status(self) -> dict[str, Any]:
        """The document of `/readyz`."""
        document: dict[str, Any] = {"phase": self.phase, "restored_bytes": 0, "total_bytes": 0, "stages": dict(self.stages)}
        if not self._weights.is_empty():
            restored = self._weights.restored()
            document |= {"restored_bytes": restored.bytes, "total_bytes": restored.total_bytes}
            document["weights"] = {
                "source": restored.source,
                "bytes": restored.bytes,
                "seconds": None if restored.seconds is None else round(restored.seconds, 4),
            }
        return document

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """One output for each input.

        Raises BadInput (the agent's word), AgentFailed, TimedOut at the deadline, Unavailable when not ready or when the queue is full.
        """
        phase = self.phase
        if phase not in ("ready", "draining"):
            raise Unavailable(f"the function is not ready yet ({phase})", retry_after_s=1)
        call = _Call(inputs, time.monotonic() + self._settings.timeout_s)
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            raise Unavailable(f"{self._settings.queue_limit} requests are waiting already", retry_after_s=1) from None
        try:
            return call.reply.result(self._settings.timeout_s)
        except TimeoutError:
            call.reply.cancel()
            raise TimedOut(f"no answer within {self._settings.timeout_s:g} s (FUNCTION_TIMEOUT_S)") from None

    def mark(self, stage: str) -> None:
        """Note that a stage of the cold start is over."""
        self.stages[stage] = round(time.monotonic() - self._started_at, 4)

    def _run(self) -> None:
        try:
            agent = self._bring_up()
        except WeightsError as error:
            log.error("%s", error)  # says itself what is wrong and where
            self._on_failure()
            return
        except BaseException:
            log.exception("the agent %s could not be brought up", self._settings.agent)
            self._on_failure()
            return
        log.info("ready after %s", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.stages.items()))
        while True:
            call = self._calls.get()
            if call.deadline > time.monotonic() and call.reply.set_running_or_notify_cancel():
                self._answer(agent, call)

    def _bring_up(self) -> InferenceAgent:
        agent = load_agent(self._settings.agent)
        self._limit_threads()
        self.mark("import")
        self._phase = "loading"
        agent.load(self._weights, self._settings.device)
        self.mark("load")
        if not self._weights.is_empty():
            began_s = self.stages["listen"]  # the weights are opened when the port is
            seconds = self._weights.restored().seconds
            self.stages["restore"] = round(min(began_s + seconds, self.stages["load"]), 4) if seconds is not None else self.stages["load"]
        self._phase = "warming"
        if warm_up := getattr(agent, "warm_up", None):
            warm_up()
            self.mark("warm_up")
        self._phase = "ready"
        self.mark("ready")
        return agent

    def _answer(self, agent: InferenceAgent, call: _Call) -> None:
        try:
            outputs = agent.predict(call.inputs)
            if len(outputs) != len(call.inputs):
                raise ValueError(f"predict gave {len(outputs)} outputs for {len(call.inputs)} inputs")
        except FunctionError as error:
            _settle(call.reply.set_exception, error)
        except Exception:
            log.exception("predict failed")
            _settle(call.reply.set_exception, AgentFailed("the model failed on this request; the function's log says why"))
        else:
            _settle(call.reply.set_result, outputs)

    def _limit_threads(self) -> None:
        """More torch threads than cores make a busy machine several times slower."""
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self._settings.threads or _cpu_limit())


def _settle(settle: Callable[[Any], None], value: object) -> None:
    try:
        settle(value)
    except InvalidStateError:
        pass  # the caller gave up meanwhile


def _cpu_limit() -> int:
    """Whole CPUs that the container may use by its cgroup (v2), at least 1; without a limit 1."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(int(quota) // int(period), os.cpu_count() or 1))
    except (OSError, ValueError):
        return 1
