"""A pod: the processes of one replica, from asked for to gone."""

import asyncio
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationError

from knative.autoscaler.choice import PENDING
from knative.local.breaker import Breaker
from knative.local.devices import VISIBLE, Devices
from knative.local.errors import PlatformError
from knative.local.fork_server import ForkServer
from knative.local.health import Health
from knative.local.launch import LONGEST_GRACE_S, PodPlan
from knative.local.limits import Limiter
from knative.local.process import ContainerProcess, Ending
from knative.local.tasks import Tasks, describe
from knative.local.trouble import Trouble
from knative.local.troubles import Troubles

QUIET_S = 5.0  # of a start, about which nothing is said

Phase = Literal["pending", "starting", "ready", "draining"]


Word = Annotated[str, StringConstraints(max_length=200)]  # of a probe's answer, which anybody may have written
Size = Annotated[int, Field(ge=0, le=1 << 63)]


class Weights(BaseModel):
    """Where a function's weights came from."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, Word | int | FiniteFloat | None]

    source: Word
    bytes: Size
    seconds: float | None = None


class Report(BaseModel):
    """What the user container's readiness probe says about itself, if it says anything: phases, stages and bytes of a cold start."""

    model_config = ConfigDict(allow_inf_nan=False)

    phase: Word = ""
    restored_bytes: Size = 0
    total_bytes: Size = 0
    stages: dict[Word, float] = Field({}, max_length=64)  # seconds since its process started
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
        """on_change: called whenever its phase, its report or its troubles change. on_exit: told how one of its processes ended by itself.

        devices: where it has its GPUs from, if its plan has any. is_urgent: whether others should give theirs up for it.
        """
        self.name = name
        self.plan = plan
        self.phase: Phase = "pending"
        self.number, self.state, self.in_flight, self.listed, self.rank = 0, PENDING, 0, False, 0  # see choice.Candidate
        self.breaker = Breaker()
        self.started_at = time.time()  # for people
        self.asked_at = time.monotonic()
        self.unready_since: float | None = self.asked_at  # the progress deadline counts from here
        self.stages: dict[str, float] = {}  # seconds since the pod was asked for
        self.report = Report()
        self._phase_since = self.asked_at  # of the report
        self.proven_at = -1.0  # when its user container began that is known to have been with its revision's code
        self.is_slow_told = False  # that it takes long to be ready
        self.on_room: Callable[[], object] = lambda: None  # called when it has room for one request more
        self.devices = devices or Devices(())
        self._spawned_at = 0.0  # seconds since asked for; the processes' own stages count from here
        self._directory = directory
        self._on_change = on_change
        self._on_exit = on_exit
        self._is_urgent = is_urgent

        def failed(what: str, error: Exception) -> None:
            self.fail(Trouble(describe(what, error)))

        self._tasks = Tasks(failed)
        self.containers: list[ContainerProcess] = []
        self.troubles = Troubles(self.containers)
        self._health = Health(self.containers, self.troubles, session, self._tasks, self)
        self.containers += [
            ContainerProcess(process, partial(self._exited, number), fork_server, limiter, partial(self._health.began, number), failed)
            for number, process in enumerate(plan.processes)
        ]
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
        """Start the processes and the probing; returns once they are spawned. One that is let go before it has started never does.

        Raises PlatformError or OSError if it cannot be started.
        """
        if self.plan.gpus and not await self._take_devices():
            return
        async with self._spawning:
            if self.phase == "draining":
                return
            self.phase = "starting"
            for container in self.containers:
                for directory in container.process.directories:
                    _make(directory)
            self._spawned_at = _age(self.asked_at)
            # All at once: the function imports its libraries while the sidecar sees to the weights.
            await asyncio.gather(*(container.start() for container in self.containers))
            self.stages["spawn"] = _age(self.asked_at)
            self._health.watch(self.asked_at)
        self._on_change(self)
        self.readiness_changed()

    async def _take_devices(self) -> bool:
        """Wait for its GPUs; whether it has them. The progress deadline does not count meanwhile."""
        taking = self._tasks.start(self.devices.take(self.name, self.plan.gpus, lambda: self._is_urgent(self)), "waiting for GPUs")
        await asyncio.sleep(0)
        if not taking.done():
            self.unready_since = None
            self._on_change(self)
        devices = list(await taking)
        if not devices or self.phase == "draining":
            return False
        for container in self.containers:
            if own := [devices.pop() for _ in range(container.process.limits.gpus)]:
                container.process = replace(container.process, env={**container.process.env, VISIBLE: ",".join(reversed(own))})
        if self.unready_since is None:
            self.unready_since = time.monotonic()
            self.stages["device"] = _age(self.asked_at)
        return True

    @property
    def waits_for(self) -> str | None:
        """What keeps it from being started, if anything does."""
        return self.devices.reason(self.name) if self.phase == "pending" else None

    async def drain(self, patience_s: float) -> None:
        """Take no more requests, let those in flight finish for at most `patience_s`, end the processes, remove what was the pod's.

        What is left of the patience its processes have to end, within bounds: all of it is Knative's grace period.
        """
        end = time.monotonic() + patience_s
        pending, self.phase = self.phase == "pending", "draining"
        if pending:
            self.devices.give_back(self.name)
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
            await self._tasks.stop()
            grace_s = max(self.plan.grace_s, min(LONGEST_GRACE_S, end - time.monotonic()))
            await asyncio.gather(*(container.stop(grace_s) for container in self.containers))
        self.devices.give_back(self.name)
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    def enter(self) -> None:
        """One request more."""
        self.in_flight += 1
        self.troubles.used()

    def leave(self) -> None:
        """One request less."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()
            self.devices.look()
        self.on_room()

    def unreached(self) -> None:
        """A request found nobody listening: it gets none until its readiness probe has been asked again, now, and says that it is well."""
        self._health.doubt(next(container for container in self.containers if container.process.is_main))

    def fail(self, trouble: Trouble) -> None:
        """It will not be ready."""
        self.troubles.fail(trouble)
        self._on_change(self)

    @property
    def trouble(self) -> Trouble | None:
        """What keeps it from being ready, as far as that is known."""
        if self.phase == "ready":
            return None
        if waits_for := self.waits_for:
            return Trouble(f"it {waits_for}")
        if found := self.troubles.latest():
            return found
        is_quiet = self.unready_since is None or time.monotonic() - self.unready_since < QUIET_S
        return None if is_quiet else self.troubles.guess(self.report.phase, self._phase_since)

    def why_not_ready(self) -> Trouble:
        """The same, or what there is to be seen; with the pod's name."""
        found = self.trouble or self.troubles.guess(self.report.phase, self._phase_since)
        return replace(found, reason=f"{self.name}: {found.reason}")

    def status(self) -> dict[str, Any]:
        """Its entry in `/api/status`."""
        document: dict[str, Any] = {
            "name": self.name,
            "phase": self.phase,
            "concurrency": self.in_flight,
            "started_at": round(self.started_at, 3),
            "address": self.address,
            "forked": any(container.is_forked for container in self.containers),
            "restarts": {container.process.container: container.restarts for container in self.containers},
            "exits": {container.process.container: container.last_exit for container in self.containers if container.last_exit},
            "stages": self.stages,
        }
        if waits_for := self.waits_for:
            document["waits_for"] = waits_for
        if trouble := self.trouble:
            document |= {"reason": trouble.reason, "log": trouble.log()}
        if self.report.weights:
            document["weights"] = self.report.weights.model_dump()
        return document

    def stages_so_far(self) -> dict[str, float]:
        """Its stages, and while it starts those that its user container has told of."""
        if "ready" in self.stages:
            return self.stages
        told = {name: round(self._spawned_at + seconds, 4) for name, seconds in self.report.stages.items()}
        return told | self.stages

    def _exited(self, number: int, ending: Ending) -> None:
        """A process ended by itself; it will be started again."""
        container = self.containers[number]
        process = container.process
        is_starting = self.phase == "starting"
        self._health.ended(container)
        self.troubles.ended(container, ending, is_starting=is_starting)
        last = container.tail(1)
        self._on_exit(self, f"{process.container} {ending}" + (f": {last[0].strip()}" if last else ""))
        if self.phase == "starting":
            self._on_change(self)

    def readiness_changed(self) -> None:
        """See health.Listener."""
        is_ready = self._health.is_ready
        if is_ready != (self.phase == "ready") and self.phase in ("starting", "ready"):
            self._set_ready(ready=is_ready)

    def troubled(self) -> None:
        """See health.Listener."""
        self._on_change(self)

    def reported(self, document: bytes) -> None:
        """See health.Listener."""
        try:
            report = Report.model_validate_json(document)
        except ValidationError:
            return  # something else
        if report != self.report:
            if report.phase != self.report.phase:
                self._phase_since = time.monotonic()
            self.report = report
            self._on_change(self)

    def _set_ready(self, *, ready: bool) -> None:
        self.phase = "ready" if ready else "starting"
        if ready:
            self.troubles.over()
        self.unready_since = None if ready else time.monotonic()
        if ready and "ready" not in self.stages:
            ready_s = _age(self.asked_at)
            told = {name: min(ready_s, seconds) for name, seconds in self.stages_so_far().items()}
            self.stages |= told | {"ready": ready_s}
        self._on_change(self)


def _age(asked_at: float) -> float:
    return round(time.monotonic() - asked_at, 4)


def _make(directory: Path) -> None:
    """A volume's directory, if it is not there. Raises PlatformError or OSError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise PlatformError(f"{error.filename} is not a directory") from error


async def _note_sent(_: aiohttp.ClientSession, context: SimpleNamespace, __: aiohttp.TraceRequestHeadersSentParams) -> None:
    context.trace_request_ctx.set()
