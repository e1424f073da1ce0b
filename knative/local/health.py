"""Whether a pod's containers are well: their startup, readiness and liveness probes, and what they complain of."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Protocol

import aiohttp
from pydantic import BaseModel, ConfigDict, ValidationError

from knative.local.launch import Probe
from knative.local.probe import Tally, ask
from knative.local.process import ContainerProcess
from knative.local.tasks import Tasks
from knative.local.troubles import Troubles

# While a pod starts it is probed as often as Knative's queue-proxy does; what a probe waits, a caller waits. One that was forked is
# ready within a tenth of a second, of which that would be much.
START_PROBE_S = 0.025
QUICK_PROBE_S, QUICK_S = 0.005, 0.3
START_LOOK_S = 0.1  # whether a startup probe is due
# A sidecar that has no readiness probe is asked nevertheless what keeps it from having the weights.
SIDECAR_PORT, SIDECAR_PATH, SIDECAR_LOOK_S = "WEIGHTS_PORT", "/readyz", 1.0


class _Complaint(BaseModel):
    """What a container's readiness document says of what is wrong, if it says anything."""

    model_config = ConfigDict(allow_inf_nan=False)

    error: str | None = None


class Listener(Protocol):
    """Who learns of it: the pod."""

    def readiness_changed(self) -> None:
        """Whether all are well may be another thing than before."""

    def reported(self, document: bytes) -> None:
        """The user container's readiness document."""

    def troubled(self) -> None:
        """What a container complains of is another thing than before."""


class Health:
    """Probes the containers of one pod from `watch` on."""

    def __init__(
        self,
        containers: Sequence[ContainerProcess],
        troubles: Troubles,
        session: aiohttp.ClientSession,
        tasks: Tasks,
        listener: Listener,
    ) -> None:
        """troubles: is told of what the probes find. tasks: the pod's."""
        self._containers = containers
        self._troubles = troubles
        self._session = session
        self._tasks = tasks
        self._listener = listener
        self._began_at = time.monotonic()
        self._is_watching = False
        self._started: set[str] = set()  # containers whose startup probe has succeeded since they began, or who have none
        self._well: set[str] = set()  # containers whose readiness probe says so
        self._doubted = asyncio.Event()  # set while the user container was not reached since it last was well

    @property
    def is_ready(self) -> bool:
        """Whether the user container has started, and all that have a readiness probe are well."""
        needed = {container.process.container for container in self._containers if container.process.readiness}
        started = all(container.process.container in self._started for container in self._containers if container.process.is_main)
        return started and needed <= self._well

    def watch(self, asked_at: float) -> None:
        """Begin to probe. asked_at: when the pod was asked for."""
        self._began_at = asked_at
        self._is_watching = True
        for container in self._containers:
            process = container.process
            if process.startup:
                self._tasks.start(self._watch_startup(container, process.startup), f"the startup probe of {process.container}")
            if process.readiness:
                self._tasks.start(self._watch_readiness(container, process.readiness), f"the readiness probe of {process.container}")
            elif not process.is_main and (port := process.env.get(SIDECAR_PORT, "")).isdigit():
                self._tasks.start(self._watch_sidecar(container, int(port)), f"asking {process.container} how it is")
            if process.liveness:
                self._tasks.start(self._watch_liveness(container, process.liveness), f"the liveness probe of {process.container}")

    def began(self, number: int) -> None:
        """The process of this container, by its place among them, is there: for the first time or again."""
        process = self._containers[number].process
        if process.startup is None:
            self._started.add(process.container)
        if self._is_watching:
            self._listener.readiness_changed()

    def ended(self, container: ContainerProcess) -> None:
        """Its process has ended."""
        self._started.discard(container.process.container)
        if container.process.is_main:
            self._well.discard(container.process.container)
            self._listener.readiness_changed()

    def doubt(self, container: ContainerProcess) -> None:
        """It was not reached: it is not well until its readiness probe has been asked again, at once."""
        if container.process.readiness:
            self._doubted.set()
            self._set(container, well=False)

    def _set(self, container: ContainerProcess, *, well: bool) -> None:
        if well:
            container.is_well()
        (self._well.add if well else self._well.discard)(container.process.container)
        self._listener.readiness_changed()

    def _is_due(self, container: ContainerProcess, probe: Probe) -> bool:
        """Whether it is there, has started, and its initial delay is over."""
        return container.running and container.process.container in self._started and _until(container, probe.delay_s) <= 0

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
                self._listener.readiness_changed()
            elif verdict is False:
                await container.restart(f"did not start: its startup probe failed {probe.failures} times, {answer.why}")
            await asyncio.sleep(probe.period_s)

    async def _watch_readiness(self, container: ContainerProcess, probe: Probe) -> None:
        name, tally = container.process.container, Tally(probe)
        while True:
            answer = await ask(probe, container.process, self._session) if self._is_due(container, probe) else None
            if answer and answer.document:
                if container.process.is_main:
                    self._listener.reported(answer.document)
                self._hear(container, answer.document)
            if answer and answer.is_well is False:
                self._troubles.probed(container, answer.why)
            verdict = tally.add(answer.is_well if answer else False)
            if verdict is not None:
                self._set(container, well=verdict)
            if name in self._well:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(probe.period_s):
                        await self._doubted.wait()
                        self._doubted.clear()
            else:
                await asyncio.sleep(_start_pause_s(time.monotonic() - self._began_at))

    async def _watch_sidecar(self, container: ContainerProcess, port: int) -> None:
        probe = Probe(port, SIDECAR_PATH, {}, SIDECAR_LOOK_S, SIDECAR_LOOK_S, 1, 0.0)
        while True:
            await asyncio.sleep(SIDECAR_LOOK_S)
            if container.running and (document := (await ask(probe, container.process, self._session)).document):
                self._hear(container, document)

    def _hear(self, container: ContainerProcess, document: bytes) -> None:
        with contextlib.suppress(ValidationError):  # something else
            if self._troubles.complained(container, _Complaint.model_validate_json(document).error or ""):
                self._listener.troubled()

    async def _watch_liveness(self, container: ContainerProcess, probe: Probe) -> None:
        tally = Tally(probe)
        while True:
            await asyncio.sleep(max(probe.period_s, _until(container, probe.delay_s + probe.period_s)))
            if not self._is_due(container, probe):
                tally.clear()
                continue
            answer = await ask(probe, container.process, self._session)
            if tally.add(answer.is_well) is False:
                tally.clear()
                await container.restart(f"is not well: its liveness probe failed {probe.failures} times, {answer.why}")


def _start_pause_s(age_s: float) -> float:
    """Seconds to the next look at what is not ready: of a long start a four-hundredth more does not count, and its log stays short."""
    return QUICK_PROBE_S if age_s < QUICK_S else min(1.0, max(START_PROBE_S, age_s / 400))


def _until(container: ContainerProcess, age_s: float) -> float:
    """Seconds until a container has run for so long."""
    return container.started_at + age_s - time.monotonic()
