"""A pod: the processes of one replica, from asked for to gone."""

import asyncio
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import aiohttp
from pydantic import BaseModel, ConfigDict, ValidationError

from knative.local.fork_server import ForkServer
from knative.local.launch import PodPlan, Probe, Process
from knative.local.process import ContainerProcess, tail

# While a pod starts it is probed as often as Knative's queue-proxy does; what a probe waits, a caller waits. One that was forked is
# ready within a tenth of a second, of which that would be much.
START_PROBE_S = 0.025
QUICK_PROBE_S, QUICK_S = 0.01, 0.3
# For containers that have no requests any more; so short that nothing on the way of a Ctrl-C takes long, even if all of it hangs.
STOP_GRACE_S = 5.0

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
    ) -> None:
        """on_change: called whenever its phase or its report changes. on_exit: told how one of its processes ended by itself."""
        self.name = name
        self.plan = plan
        self.phase: Phase = "pending"
        self.in_flight = 0
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
        self._containers = [ContainerProcess(process, partial(self._exited, process), fork_server) for process in plan.processes]
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
            self._tasks = [asyncio.create_task(self._watch_readiness())]
            for container in self._containers:
                if container.process.liveness:
                    self._tasks.append(asyncio.create_task(self._watch_liveness(container, container.process.liveness)))
        self._on_change(self)

    async def drain(self, patience_s: float) -> None:
        """Take no more requests, let those in flight finish for at most `patience_s`, end the processes, remove what was the pod's."""
        self.phase = "draining"
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
            await asyncio.gather(*(container.stop(STOP_GRACE_S) for container in self._containers))
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    def leave(self) -> None:
        """One request less."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()
        self.on_room()

    def last_words(self, lines: int = 12) -> str:
        """The last lines of each container's log, for whoever asks why it is not ready."""
        said = {container.process.container: container.tail(lines) for container in self._containers}
        parts = [f"{name}:\n" + "\n".join(f"  {line}" for line in text) for name, text in said.items() if text]
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
            "stages": self.stages,
        }
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

    def _exited(self, process: Process, ended: str) -> None:
        """A process ended by itself; it will be started again."""
        last = tail(process.log, 1)
        self._on_exit(self, f"{process.container} {ended}" + (f": {last[0].strip()}" if last else ""))
        if self.phase == "ready" and not all(container.running for container in self._containers if container.process.is_main):
            self._set_ready(ready=False)

    async def _watch_readiness(self) -> None:
        failures = 0
        probes = [(container, container.process.readiness) for container in self._containers if container.process.readiness]
        while True:
            results = [container.running and await self._ask(container, probe) for container, probe in probes if probe]
            if all(results):
                failures = 0
                if self.phase == "starting":
                    self._set_ready(ready=True)
            else:
                failures += 1
                if self.phase == "ready" and failures >= max(probe.failures for _, probe in probes if probe):
                    self._set_ready(ready=False)
            if self.phase == "ready":
                await asyncio.sleep(min(probe.period_s for _, probe in probes if probe))
            else:
                await asyncio.sleep(QUICK_PROBE_S if self._age() < QUICK_S else START_PROBE_S)

    def _set_ready(self, *, ready: bool) -> None:
        self.phase = "ready" if ready else "starting"
        self.unready_since = None if ready else time.monotonic()
        if ready and "ready" not in self.stages:
            ready_s = self._age()
            told = {name: min(ready_s, seconds) for name, seconds in self.stages_so_far().items()}
            self.stages |= told | {"ready": ready_s}
        self._on_change(self)

    async def _watch_liveness(self, container: ContainerProcess, probe: Probe) -> None:
        await asyncio.sleep(probe.delay_s)
        failures = 0
        while True:
            await asyncio.sleep(probe.period_s)
            failures = 0 if not container.running or await self._ask(container, probe) else failures + 1
            if failures >= probe.failures:
                failures = 0
                await container.restart()

    async def _ask(self, container: ContainerProcess, probe: Probe) -> bool:
        """One probe. A user container that explains its readiness in JSON is listened to."""
        try:
            if probe.path is None:
                _, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", probe.port), probe.timeout_s)
                writer.close()
                return True
            async with self._session.get(
                f"http://127.0.0.1:{probe.port}{probe.path}",
                headers=probe.headers,
                timeout=aiohttp.ClientTimeout(total=probe.timeout_s),
                allow_redirects=False,
            ) as reply:
                if container.process.is_main and probe is container.process.readiness and reply.content_type == "application/json":
                    self._listen(await reply.read())
                return 200 <= reply.status < 400
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    def _listen(self, body: bytes) -> None:
        try:
            report = Report.model_validate_json(body)
        except ValidationError:
            return  # something else
        if report != self.report:
            self.report = report
            self._on_change(self)


async def _note_sent(_: aiohttp.ClientSession, context: SimpleNamespace, __: aiohttp.TraceRequestHeadersSentParams) -> None:
    context.trace_request_ctx.set()
