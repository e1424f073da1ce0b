"""A revision whose pods are nothing but a phase and a count, for tests of what is decided about them."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import aiohttp

from knative.local.launch import PodPlan
from knative.local.manifest import Service, read_manifests
from knative.local.pod import Phase, Pod
from knative.local.revision import Revision
from knative.local.trouble import Trouble
from tests.knative.local.running import manifests, service


class FakePod(Pod):
    """A pod without processes; a test says when its phase changes."""

    def __init__(self, revision: Revision, name: str) -> None:
        super().__init__(name, PodPlan(1, ()), Path("/nowhere"), cast(aiohttp.ClientSession, None), revision.supervisor.pod_changed)
        self.gone = asyncio.Event()  # until a test sets it, the pod's end takes its time

    async def start(self) -> None:
        self.become("starting")

    async def drain(self, patience_s: float) -> None:
        self.become("draining")
        if patience_s:
            await self.gone.wait()

    def become(self, phase: Phase) -> None:
        if phase == "draining":
            self.phase = phase
            self._on_change(self)
        else:
            self._set_ready(ready=phase == "ready")


class Events:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def starting(self, revision: Revision, pod: Pod, waiting: int) -> None:
        self.told.append(f"starting, {waiting} waiting")

    def progress(self, revision: Revision, pod: Pod) -> None:
        pass

    def ready(self, revision: Revision, pod: Pod) -> None:
        self.told.append("ready")

    def crashed(self, revision: Revision, pod: Pod, ended: str) -> None:
        self.told.append(ended)

    def hung(self, revision: Revision, pod: Pod, reason: str) -> None:
        self.told.append("hung")

    def failed(self, revision: Revision, trouble: Trouble) -> None:
        self.told.append("failed")

    def gave_up(self, revision: Revision, pod: Pod) -> None:
        self.told.append("gave up")

    def at_zero(self, revision: Revision, idle_s: float) -> None:
        self.told.append("at zero")

    def about(self, service: str, text: str) -> None:
        self.told.append(text)


def parsed(
    container_concurrency: int = 0, *, scale: Mapping[str, str] | None = None, progress_deadline: str = "60s", timeout_s: int = 300
) -> Service:
    """A Service at zero."""
    spec = {"containerConcurrency": container_concurrency, "timeoutSeconds": timeout_s}
    document = service("hello", scale=scale, spec=spec, progress_deadline=progress_deadline)
    return read_manifests([("hello.yaml", manifests(document))]).services[0]


def fake_revision(
    container_concurrency: int = 0, *, scale: Mapping[str, str] | None = None, progress_deadline: str = "60s", timeout_s: int = 300
) -> tuple[Revision, Events]:
    """A revision of FakePods, and what is told about it."""
    events = Events()
    hello = parsed(container_concurrency, scale=scale, progress_deadline=progress_deadline, timeout_s=timeout_s)
    return Revision(hello, FakePod, events), events


def fake(pod: Pod) -> FakePod:
    """The pod, which is one of these."""
    assert isinstance(pod, FakePod)
    return pod
