"""A pod: the processes of one replica, from asked for to gone."""

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import aiohttp
from pydantic import BaseModel, ConfigDict, ValidationError

from knative.local.breaker import Breaker
from knative.local.devices import VISIBLE, Devices
from knative.local.fork_server import ForkServer
from knative.local.launch import PodPlan, Probe, Process
from knative.local.limits import Limiter
from knative.local.probe import Tally, ask
from knative.local.process import ContainerProcess, tail

# While a pod starts it is probed as often as Knative's queue-proxy does; what a probe waits, a caller waits. One that was forked is
# ready within a tenth of a second, of which that would be much.
START_PROBE_S = 0.025
QUICK_PROBE_S, QUICK_S = 0.005, 0.3
START_LOOK_S = 0.1  # whether a startup probe is due

Phase = Literal["pending", "starting", "ready", "draining"]


class Weights(BaseModel):
    """Where a function's weights came from."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    source: str
    bytes: int
    seconds: float | None = None


class Report(BaseModel):
    """What the user container's readiness probe says about itself, if it says anything: phases, stages and bytes of a cold start."""

    model_config = ConfigDict(allow_inf_nan=False)

    phase: str = ""
    restored_bytes: int = 0
    total_bytes: int = 0
    stages: dict[str, float] = {}  # seconds since its process started
    weights: Weights | None = None


class Pod:
    """One replica of a revision."""

    def __init__(
        self,
        name: str,
        plan: PodPlan,
        directory: Path,
        session: aiohttp.ClientSession,
        on_change: Callable[["Pod"], object],
        on_exit: Callable[["Pod", str], object] = lambda pod, ended: None,
        fork_server: ForkServer | None = None,
        limiter: Limiter | None = None,
        devices: Devices | None = None,
        is_urgent: Callable[["Pod"], bool] = lambda pod: True,
    ) -> None:
        """on_change: called whenever its phase or its report changes. on_exit: told how one of its processes ended by itself.

        devices: where it has its GPUs from, if its plan has any. is_urgent: whether others should give theirs up for it.
        """
        self.name = name
        self.plan = plan
        self.phase: Phase = "pending"
        self.in_flight = 0
        self.breaker = Breaker()
        self.started_at = time.time()  # for people
        self.asked_at = time.monotonic()
        self.unready_since: float | None = self.asked_at  # the progress deadline counts from here
        self.stages: dict[str, float] = {}  # seconds since the pod was asked for
        self.report = Report()
        self.on_room: Callable[[], object] = lambda: None  # called when it has room for one request more
        self._spawned_at = 0.0  # seconds since asked for; the processes' own stages count from here
        self._directory = directory
        self._session = session
        self._on_change = on_change
        self._on_exit = on_exit
        self._devices = devices or Devices(())
        self._is_urgent = is_urgent
        self._containers = [
            ContainerProcess(process, partial(self._exited, process), fork_server, limiter, partial(self._began, process))
            for process in plan.processes
        ]
        self._started: set[str] = set()  # containers whose startup probe has succeeded since they began, or who have none
        self._well: set[str] = set()  # containers whose readiness probe says so
        self._doubted = asyncio.Event()  # set while the user container was not reached since it last was well
        self._tasks: list[asyncio.Task[None]] = []
        self._idle = asyncio.Event()
        self._spawning = asyncio.Lock()  # guards the processes: they are all there or none before any is ended
        self._connections: aiohttp.ClientSession | None = None

    @property
    def address(self) -> str:
        """Where the user container answers."""
        return f"http://127.0.0.1:{self.plan.port}"

    @property
    def connections(self) -> aiohttp.ClientSession:
        """The connections to the user container, kept alive between requests.

        An asyncio.Event as `trace_request_ctx` of a request is set once its headers are sent.
        """
        if self._connections is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=15)
            trace = aiohttp.TraceConfig()
            trace.on_request_headers_sent.append(_note_sent)
            self._connections = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None), trace_configs=[trace]
            )
        return self._connections

    async def start(self) -> None:
        """Start the processes and the probing; returns once they are spawned. One that is let go before it has started never does."""
        if self.plan.gpus and not await self._take_devices():
            return
        async with self._spawning:
            if self.phase == "draining":
                return
            self.phase = "starting"
            for container in self._containers:
                for directory in container.process.directories:
                    directory.mkdir(parents=True, exist_ok=True)
            self._spawned_at = self._age()
            # All at once: the function imports its libraries while the sidecar sees to the weights.
            await asyncio.gather(*(container.start() for container in self._containers))
            self.stages["spawn"] = self._age()
            for container in self._containers:
                process = container.process
                if process.startup:
                    self._tasks.append(asyncio.create_task(self._watch_startup(container, process.startup)))
                if process.readiness:
                    self._tasks.append(asyncio.create_task(self._watch_readiness(container, process.readiness)))
                if process.liveness:
                    self._tasks.append(asyncio.create_task(self._watch_liveness(container, process.liveness)))
        if any(process.readiness for process in self.plan.processes):
            self._on_change(self)
        else:
            self._judge()

    async def _take_devices(self) -> bool:
        """Wait for its GPUs; whether it has them. The progress deadline does not count meanwhile."""
        taking = asyncio.ensure_future(self._devices.take(self.name, self.plan.gpus, lambda: self._is_urgent(self)))
        await asyncio.sleep(0)
        if not taking.done():
            self.unready_since = None
            self._on_change(self)
        devices = list(await taking)
        if not devices or self.phase == "draining":
            return False
        for container in self._containers:
            if own := [devices.pop() for _ in range(container.process.limits.gpus)]:
                container.process = replace(container.process, env={**container.process.env, VISIBLE: ",".join(reversed(own))})
        if self.unready_since is None:
            self.unready_since = time.monotonic()
            self.stages["device"] = self._age()
        return True

    def ask_for_devices(self) -> None:
        """Others may be idle by now, or the need be greater."""
        self._devices.look()

    @property
    def waits_for(self) -> str | None:
        """What keeps it from being started, if anything does."""
        return self._devices.reason(self.name) if self.phase == "pending" else None

    async def drain(self, patience_s: float) -> None:
        """Take no more requests, let those in flight finish for at most `patience_s`, end the processes, remove what was the pod's."""
        pending, self.phase = self.phase == "pending", "draining"
        if pending:
            self._devices.give_back(self.name)
        self._on_change(self)
        if self.in_flight:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), patience_s)
            except TimeoutError:
                pass
        if self._connections:
            await self._connections.close()
        async with self._spawning:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*(container.stop(self.plan.grace_s) for container in self._containers))
        self._devices.give_back(self.name)
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    def leave(self) -> None:
        """One request less."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()
            self._devices.look()
        self.on_room()

    def unreached(self) -> None:
        """A request found nobody listening: it gets none until its readiness probe has been asked again, now, and says that it is well."""
        main = next(process for process in self.plan.processes if process.is_main)
        if main.readiness:
            self._well.discard(main.container)
            self._doubted.set()
            self._judge()

    @property
    def failed(self) -> bool:
        """Whether one of its processes has ended and waits to be started again."""
        return self.phase in ("starting", "ready") and any(container.last_exit and not container.running for container in self._containers)

    def last_words(self, lines: int = 12) -> str:
        """The last lines of each container's log, for whoever asks why it is not ready."""
        parts = []
        for container in self._containers:
            name, text = container.process.container, [f"  {line}" for line in container.tail(lines)]
            if text:
                parts.append("\n".join([f"{name}{f' ({container.last_exit})' if container.last_exit else ''}:", *text]))
        return "\n".join(parts) or "its containers wrote nothing"

    def status(self) -> dict[str, Any]:
        """Its entry in `/api/status`."""
        document: dict[str, Any] = {
            "name": self.name,
            "phase": self.phase,
            "concurrency": self.in_flight,
            "started_at": round(self.started_at, 3),
            "address": self.address,
            "forked": any(container.is_forked for container in self._containers),
            "restarts": {container.process.container: container.restarts for container in self._containers},
            "exits": {container.process.container: container.last_exit for container in self._containers if container.last_exit},
            "stages": self.stages,
        }
        if waits_for := self.waits_for:
            document["waits_for"] = waits_for
        if self.report.weights:
            document["weights"] = self.report.weights.model_dump()
        return document

    def stages_so_far(self) -> dict[str, float]:
        """Its stages, and while it starts those that its user container has told of."""
        if "ready" in self.stages:
            return self.stages
        told = {name: round(self._spawned_at + seconds, 4) for name, seconds in self.report.stages.items()}
        return told | self.stages

    def _age(self) -> float:
        return round(time.monotonic() - self.asked_at, 4)

    def _began(self, process: Process) -> None:
        """A process is there, for the first time or again."""
        if process.startup is None:
            self._started.add(process.container)

    def _exited(self, process: Process, ended: str) -> None:
        """A process ended by itself; it will be started again."""
        self._started.discard(process.container)
        last = tail(process.log, 1)
        self._on_exit(self, f"{process.container} {ended}" + (f": {last[0].strip()}" if last else ""))
        if process.is_main:
            self._well.discard(process.container)
            self._judge()

    async def _watch_startup(self, container: ContainerProcess, probe: Probe) -> None:
        name, tally = container.process.container, Tally(probe)
        while True:
            if not container.running or name in self._started or _until(container, probe.delay_s) > 0:
                tally.clear()
                await asyncio.sleep(min(probe.period_s, START_LOOK_S))
                continue
            answer = await ask(probe, container.process, self._session)
            verdict = tally.add(answer.is_well)
            if verdict:
                self._started.add(name)
            elif verdict is False:
                await container.restart(f"did not start: its startup probe failed {probe.failures} times, {answer.why}")
            await asyncio.sleep(probe.period_s)

    async def _watch_readiness(self, container: ContainerProcess, probe: Probe) -> None:
        name, tally = container.process.container, Tally(probe)
        while True:
            is_asked = container.running and name in self._started and _until(container, probe.delay_s) <= 0
            answer = await ask(probe, container.process, self._session) if is_asked else None
            if answer and answer.document and container.process.is_main:
                self._listen(answer.document)
            verdict = tally.add(bool(answer and answer.is_well))
            if verdict is not None:
                (self._well.add if verdict else self._well.discard)(name)
                self._judge()
            if name in self._well:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(probe.period_s):
                        await self._doubted.wait()
                        self._doubted.clear()
            else:
                await asyncio.sleep(QUICK_PROBE_S if self._age() < QUICK_S else START_PROBE_S)

    def _judge(self) -> None:
        """Whether it is ready: all that have a readiness probe are well."""
        is_ready = all(container.process.container in self._well for container in self._containers if container.process.readiness)
        if is_ready != (self.phase == "ready") and self.phase != "draining":
            self._set_ready(ready=is_ready)

    def _set_ready(self, *, ready: bool) -> None:
        self.phase = "ready" if ready else "starting"
        self.unready_since = None if ready else time.monotonic()
        if ready and "ready" not in self.stages:
            ready_s = self._age()
            told = {name: min(ready_s, seconds) for name, seconds in self.stages_so_far().items()}
            self.stages |= told | {"ready": ready_s}
        self._on_change(self)

    async def _watch_liveness(self, container: ContainerProcess, probe: Probe) -> None:
        name, tally = container.process.container, Tally(probe)
        while True:
            await asyncio.sleep(max(probe.period_s, _until(container, probe.delay_s + probe.period_s)))
            if not container.running or name not in self._started or _until(container, probe.delay_s) > 0:
                tally.clear()
                continue
            answer = await ask(probe, container.process, self._session)
            if tally.add(answer.is_well) is False:
                tally.clear()
                await container.restart(f"is not well: its liveness probe failed {probe.failures} times, {answer.why}")

    def _listen(self, body: bytes) -> None:
        try:
            report = Report.model_validate_json(body)
        except ValidationError:
            return  # something else
        if report != self.report:
            self.report = report
            self._on_change(self)


def _until(container: ContainerProcess, age_s: float) -> float:
    """Seconds until a container has run for so long."""
    return container.started_at + age_s - time.monotonic()


async def _note_sent(_: aiohttp.ClientSession, context: SimpleNamespace, __: aiohttp.TraceRequestHeadersSentParams) -> None:
    context.trace_request_ctx.set()
