"""One simulation as a description that another process can carry out, and many of them on all cores."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from knative.simulator.engine import simulate
from knative.simulator.model import SETTINGS, FunctionModel, Nodes, read_model
from knative.simulator.policies import Policy, make_policy
from knative.simulator.policies.foresight import at_once
from knative.simulator.result import Result
from knative.simulator.running import Finished
from knative.simulator.traces import NoFunctions, OpenTrace, open_trace

Part = tuple[float, float]  # from, to, in seconds of the trace


@dataclass(frozen=True)
class Run:
    """What is simulated: everything by name, as on the command line."""

    trace: str
    policy: str = "kpa"
    knobs: Mapping[str, str] = field(default_factory=dict)  # of the policy
    model: tuple[str, ...] = ()  # settings, see read_model
    function: str | None = None
    seed: int = 0
    part: Part | None = None  # of the trace; None: all of it
    history: str | None = None  # an earlier trace, for a policy that learns
    horizon_s: float | None = None  # where it ends, whatever is still on its way
    history_seed: int | None = None  # of what is sampled in it; None: as of the trace

    def open(self) -> OpenTrace:
        """Its trace. Raises BadTrace."""
        whole = open_trace(self.trace, function=self.function, seed=self.seed)
        return whole.part(*self.part) if self.part else whole

    def read_model(self) -> tuple[FunctionModel, Nodes]:
        """Its function and its nodes. Raises ModelError."""
        return read_model(self.model)

    def make_policy(self, model: FunctionModel, trace: OpenTrace, index: int = 0) -> Policy:
        """Its policy, for `trace` as function number `index` of a simulation. Raises SimulatorError."""
        history = self._history()
        known = {"history": history.read if history else None, "future": trace.read}
        return make_policy(self.policy, self.knobs, model, **known, seed=self.seed, index=index)

    def result(self, observe: Callable[[Finished], object] | None = None) -> Result:
        """Simulate. Raises SimulatorError for whatever in it is not known or allowed."""
        trace = self.open()
        model, nodes = self.read_model()
        policy = self.make_policy(model, trace)
        span_s, horizon_s = trace.span_s(), self.horizon_s
        return simulate(trace, model, policy, seed=self.seed, nodes=nodes, span_s=span_s, horizon_s=horizon_s, observe=observe)

    def _history(self) -> OpenTrace | None:
        """The same function's requests in it, where it has several functions."""
        if self.history is None:
            return None
        seed = self.seed if self.history_seed is None else self.history_seed
        try:
            return open_trace(self.history, function=self.function, seed=seed)
        except NoFunctions:
            return open_trace(self.history, seed=seed)

    def foreseen(self) -> dict[int, Run]:
        """The same with perfect foresight, by the requests that a pod takes at once (see `at_once`). Raises ModelError."""
        model, _ = self.read_model()
        return {count: replace(self, policy="oracle", knobs={}, model=(*self.model, f"concurrency={count}")) for count in at_once(model)}

    def with_settings(self, settings: Mapping[str, str]) -> Run:
        """The same with some things set: `policy`, settings of the model, and all else knobs of the policy."""
        model = tuple(f"{name}={value}" for name, value in settings.items() if name in SETTINGS)
        knobs = {name: value for name, value in settings.items() if name not in SETTINGS and name != "policy"}
        return replace(self, policy=settings.get("policy", self.policy), model=(*self.model, *model), knobs={**self.knobs, **knobs})


def results(runs: Sequence[Run], done: Callable[[], object] = lambda: None) -> list[Result]:
    """Their results in order, worked out on all cores; `done` is called after each. Raises the first SimulatorError that comes up."""
    if len(runs) == 1:
        found = [runs[0].result()]
        done()
        return found
    cores = len(os.sched_getaffinity(0))
    with _pool(min(cores, len(runs))) as pool:
        futures = {pool.submit(Run.result, run): at for at, run in enumerate(runs)}
        by_place: dict[int, Result] = {}
        for future in as_completed(futures):
            by_place[futures[future]] = future.result()
            done()
    return [by_place[at] for at in range(len(runs))]


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(workers, initializer=_ignore_interrupts)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # what has not begun is not wanted any more, if one has failed or Ctrl-C came


def _ignore_interrupts() -> None:
    """Ctrl-C is for the parent, which stops us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
