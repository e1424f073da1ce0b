"""Is it true? The same requests, in real time, to `relight run` with a function that takes as long as each of them says.

What is not the platform's own is measured first and put into the model: how long a pod takes to start, and a request to pass. The replay
begins when the autoscaler decides, as the simulation does: what it sees of a burst depends on that.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from knative.autoscaler import TICK_S
from knative.autoscaler.spec import ANNOTATION_PREFIX
from knative.simulator.distribution import Constant, Empirical
from knative.simulator.engine import simulate
from knative.simulator.errors import SimulatorError
from knative.simulator.model import ColdStart
from knative.simulator.policies import make_policy
from knative.simulator.result import Result
from knative.simulator.runs import Run
from knative.simulator.tables import markdown, seconds
from knative.simulator.trace import Arrivals, arrivals

BOUND_PODS, BOUND_SHARE, BOUND_S = 0.5, 0.2, 0.1  # what simulation and reality may be apart: pods on average; p95, whichever is more
SPAN_S = 300.0  # what is replayed of a trace
MOST_REQUESTS = 20_000  # in it; more would measure this machine
STARTS, CALLS = 5, 50  # measured before
PHASE_S = 12.0  # for so long it is watched when the autoscaler decides
LOOK_S = 0.5  # between two looks at the platform
READY_S = 600.0  # until the platform is up, or at zero again

Floats = NDArray[np.float64]
Found = TypeVar("Found")


class ValidateError(SimulatorError):
    """The comparison cannot be made."""


@dataclass(frozen=True)
class Comparison:
    """What was simulated and what was."""

    name: str
    simulated: Result
    latencies_s: Floats  # of the real requests that were answered
    unanswered: int
    times_s: Floats  # when the platform was looked at
    pods: Floats  # that were there then
    cold_starts_s: tuple[float, ...]  # measured before
    overhead_s: float  # a request that takes no time takes so long

    def simulated_pods(self) -> Floats:
        """At the times of `pods`."""
        series = self.simulated.series
        at = np.clip(np.searchsorted(series.t_s, self.times_s, side="right") - 1, 0, len(series.t_s) - 1)
        inside = self.times_s <= series.t_s[-1] + series.step_s[-1]
        return np.where(inside, series.pods[at], 0.0)

    def quantiles_s(self) -> list[tuple[str, float, float]]:
        """Percentile, simulated, real."""
        found = []
        for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            simulated = self.simulated.latencies.quantile(q)
            real = float(np.quantile(self.latencies_s, q, method="inverted_cdf")) if len(self.latencies_s) else float("inf")
            found.append((name, float("inf") if simulated is None else simulated, real))
        return found

    @property
    def pods_apart(self) -> float:
        """Mean absolute error of the number of pods."""
        return float(np.abs(self.simulated_pods() - self.pods).mean())

    @property
    def p95_apart_s(self) -> float:
        """How far the 95th percentiles are from each other."""
        _, (_, simulated, real), _ = self.quantiles_s()
        return abs(simulated - real)

    @property
    def holds(self) -> bool:
        """Whether both bounds are kept."""
        _, (_, _, real), _ = self.quantiles_s()
        return self.pods_apart <= BOUND_PODS and self.p95_apart_s <= max(BOUND_SHARE * real, BOUND_S)

    def table(self) -> str:
        """For people, in Markdown."""
        pods = self.simulated_pods()
        rows = [
            ["requests answered", str(self.simulated.answered), str(len(self.latencies_s)), ""],
            *([f"latency {name}", seconds(one), seconds(other), seconds(abs(one - other))] for name, one, other in self.quantiles_s()),
            ["latency, greatest", seconds(self.simulated.latencies.max_s), seconds(float(self.latencies_s.max(initial=0.0))), ""],
            ["pods, average", f"{pods.mean():.2f}", f"{self.pods.mean():.2f}", f"{self.pods_apart:.2f} (mean absolute error)"],
            ["pods, most", f"{pods.max():.0f}", f"{self.pods.max():.0f}", ""],
        ]
        starts = ", ".join(seconds(one) for one in self.cold_starts_s)
        verdict = "both hold" if self.holds else "MISSED"
        return "\n".join(
            [
                f"{self.name}, {SPAN_S:g} s in real time against `relight run`",
                "",
                markdown(("", "simulated", "real", "apart"), rows),
                "",
                f"Wanted: pods ≤ {BOUND_PODS:g} apart on average, p95 ≤ {BOUND_SHARE:.0%} or {BOUND_S * 1000:.0f} ms: {verdict}. "
                "Measured before and put into the model: pods start in "
                f"{starts}; a request that takes no time takes {seconds(self.overhead_s)}.",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "trace": self.name,
            "holds": self.holds,
            "pods_mean_absolute_error": self.pods_apart,
            "p95_difference_s": self.p95_apart_s,
            "latency_s": {name: {"simulated": one, "real": other} for name, one, other in self.quantiles_s()},
            "unanswered": self.unanswered,
            "cold_starts_s": list(self.cold_starts_s),
            "overhead_s": self.overhead_s,
        }


def validate(run: Run, told: Callable[[str], object]) -> Comparison:
    """Replay the beginning of `run`'s trace (or of its part) and simulate it too; `told` is handed what goes on, line by line.

    Raises SimulatorError if that cannot be done: a policy other than the KPA, several requests at once in a pod, a platform that does not
    start.
    """
    if run.policy != "kpa":
        raise ValidateError(f"--validate: the local platform scales as Knative does, so the policy must be kpa, not {run.policy}")
    model, nodes = run.read_model()
    if model.concurrency != 1:
        raise ValidateError(f"--validate: concurrency must be 1, not {model.concurrency}: the function that waits does one thing at a time")
    begin_s = run.part[0] if run.part else 0.0
    run = replace(run, part=(begin_s, min(begin_s + SPAN_S, run.part[1] if run.part else float("inf"))))
    trace = run.open()
    chunks = list(trace)
    if not 0 < sum(len(chunk.t_s) for chunk in chunks) <= MOST_REQUESTS:
        raise ValidateError(f"--validate: needs from 1 to {MOST_REQUESTS} requests in {SPAN_S:g} s; choose another part of the trace")
    whole = Arrivals._make(np.concatenate(columns) for columns in zip(*chunks, strict=True))
    services = model.services(whole, np.random.default_rng(run.seed))
    knobs = {"initial-scale": "0", **run.knobs}
    with tempfile.TemporaryDirectory(prefix="relight-validate-") as folder:
        platform = _Platform(Path(folder), knobs, model.timeout_s)
        try:
            starts, overhead_s, latencies, looks = asyncio.run(platform.replay(whole.t_s, services, told))
        finally:
            platform.stop()
    answered = latencies[np.isfinite(latencies)]
    # The GPUs of the model do not matter: there is as much room here as pods want.
    start = ColdStart(Constant(0.0), Constant(0.0), Constant(0.0), Constant(0.0), Empirical(tuple(starts)), Constant(0.0))

    def source() -> Iterator[Arrivals]:
        yield arrivals(whole.t_s, service_s=services + overhead_s)

    measured = replace(model, cold_start=start, service=None)
    policy = make_policy("kpa", run.knobs, measured, future=source, seed=run.seed)
    simulated = simulate(source(), measured, policy, seed=run.seed, nodes=replace(nodes, count=0), span_s=SPAN_S)
    times, pods = (np.array(column) for column in zip(*looks, strict=True))
    return Comparison(trace.name, simulated, answered, len(latencies) - len(answered), times, pods, tuple(starts), overhead_s)


class _Platform:
    """`relight run` with two functions: the one that is compared, and one that shows how long starts take."""

    def __init__(self, state: Path, knobs: Mapping[str, str], timeout_s: float) -> None:
        self.port, admin = _free_ports(2)
        self._status = f"http://127.0.0.1:{admin}/api/status"
        self._timeout_s = timeout_s
        services = [_service("compared", knobs, timeout_s), _service("measured", {"initial-scale": "0", "window": "6s"}, timeout_s)]
        config = {"allow-zero-initial-scale": "true"}
        cluster = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "config-autoscaler"}, "data": config}
        manifests = state / "manifests.yaml"
        manifests.write_text("\n---\n".join(json.dumps(item) for item in (*services, cluster)))
        self._log = state / "run.log"
        ports = ["--port", str(self.port), "--admin-port", str(admin), "--state-dir", str(state)]
        command = [str(Path(sys.executable).with_name("relight")), "run", str(manifests), *ports]
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def stop(self) -> None:
        """End it, and all pods with it."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    async def replay(
        self, times: Floats, services: Floats, told: Callable[[str], object]
    ) -> tuple[list[float], float, Floats, list[tuple[float, int]]]:
        """Seconds that starts took and that a request takes besides; latencies (inf: no answer); (time, pods) at each look."""
        async with self._client() as client:
            await self._until(client, "the platform is up", _is_up)
            starts = []
            await self._call(client, "measured", 0.0)  # the first start finds everything on disk
            for number in range(STARTS):
                await self._until(client, "there is no pod", _is_empty)
                await asyncio.sleep(LOOK_S)
                await self._call(client, "measured", 0.0)
                starts.append(await self._until(client, "a start is told", _start_s))
                told(f"start {number + 1} of {STARTS} took {starts[-1]:.3f} s")
            overhead_s = statistics.median([await self._call(client, "measured", 0.0) for _ in range(CALLS)])
            told(f"a request that takes no time took {overhead_s * 1000:.2f} ms")
            phase = await self._tick_phase(client)
            await self._until(client, "there is no pod", _is_empty)
            told(f"replaying {len(times)} requests in {SPAN_S:g} s")
            began = time.monotonic()
            began += (phase - began) % TICK_S  # as the simulated autoscaler decides at even seconds
            calls = (self._call(client, "compared", takes, began + at) for at, takes in zip(times, services, strict=True))
            latencies, _ = await asyncio.gather(asyncio.gather(*calls), self._watch(client, began, told))
            return starts, overhead_s, np.array(latencies), [look for look in self._looks if look[0] <= SPAN_S]

    async def _watch(self, client: Any, began: float, told: Callable[[str], object]) -> None:
        """Look again and again until what is replayed is over."""
        self._looks: list[tuple[float, int]] = []
        minute = 1
        while time.monotonic() < began + SPAN_S:
            status = await self._look(client)
            (service,) = (one for one in status["services"] if one["name"] == "compared")
            at = time.monotonic() - began
            self._looks.append((at, len(service["pods"])))
            if at >= 60 * minute:
                told(f"{at:.0f} s: {len(service['pods'])} pods, {service['requests_total']} requests")
                minute += 1
            await asyncio.sleep(LOOK_S - (time.monotonic() - began) % LOOK_S)

    async def _tick_phase(self, client: Any) -> float:
        """When the autoscaler decides, on time.monotonic's clock modulo TICK_S: it tells another average then, while it forgets a call."""
        await self._call(client, "compared", 1.0)
        seen, found = None, []
        end = time.monotonic() + PHASE_S
        while time.monotonic() < end:
            (service,) = (one for one in (await self._look(client))["services"] if one["name"] == "compared")
            if seen not in (None, service["stable_concurrency"]):
                found.append(time.monotonic())
            seen = service["stable_concurrency"]
            await asyncio.sleep(0.005)
        if not found:
            raise ValidateError(f"--validate: the platform's autoscaler decided nothing within {PHASE_S:g} s")
        offsets = [(at - found[0] + TICK_S / 2) % TICK_S - TICK_S / 2 for at in found]
        return float(found[0] + statistics.median(offsets))

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Any]:
        try:
            import aiohttp
        except ImportError:
            raise ValidateError("--validate needs the local platform: pip install 'relight[function,local,simulator]'") from None
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=self._timeout_s + 30)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:
            yield client

    async def _look(self, client: Any) -> Any:
        async with client.get(self._status) as reply:
            return await reply.json()

    async def _until(self, client: Any, what: str, probe: Callable[[Any], Found | None]) -> Found:
        """What `probe` makes of the platform's status, as soon as that is true."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(OSError):  # it does not listen yet
                if found := probe(await self._look(client)):
                    return found
            await asyncio.sleep(0.1)
        said = self._log.read_text(errors="replace").strip()[-2000:]
        raise ValidateError(f"--validate: not so within {READY_S:g} s: {what}; `relight run` said:\n{said}")

    async def _call(self, client: Any, service: str, takes_s: float, at: float = 0.0) -> float:
        """How long it took to be answered, inf if it was not. at: when it is to be sent, on time.monotonic's clock."""
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        began, headers = time.monotonic(), {"Host": f"{service}.default.localhost"}
        try:
            async with client.post(f"http://127.0.0.1:{self.port}/", json=float(takes_s), headers=headers) as reply:
                await reply.read()
                return time.monotonic() - began if reply.status == 200 else float("inf")
        except (OSError, TimeoutError):
            return float("inf")


def _is_up(status: Any) -> bool:
    return status["fork_server"] is None or bool(status["fork_server"]["warm"])


def _is_empty(status: Any) -> bool:
    return not any(service["pods"] for service in status["services"])


def _start_s(status: Any) -> float | None:
    """How long the pod took that shows it."""
    (service,) = (one for one in status["services"] if one["name"] == "measured")
    return next((float(pod["stages"]["ready"]) for pod in service["pods"] if "ready" in pod["stages"]), None)


def _service(name: str, knobs: Mapping[str, str], timeout_s: float) -> dict[str, Any]:
    env = {"FUNCTION_AGENT": "function.agents.echo:Delay", "FUNCTION_MAX_BATCH": "1", "FUNCTION_ACCESS_LOG": "false"}
    env["FUNCTION_TIMEOUT_S"] = f"{timeout_s:g}"
    container = {
        "name": "function",
        "command": ["python", "-m", "function"],
        "ports": [{"containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/readyz"}},
        "env": [{"name": key, "value": value} for key, value in env.items()],
    }
    annotations = {ANNOTATION_PREFIX + key: value for key, value in knobs.items()}
    spec = {"containerConcurrency": 1, "timeoutSeconds": round(timeout_s), "containers": [container]}
    template = {"metadata": {"annotations": annotations}, "spec": spec}
    return {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": {"name": name}, "spec": {"template": template}}


def _free_ports(count: int) -> Sequence[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
