"""The platform: everything that `relight run` starts, in order, and ends, in the reverse order."""

import asyncio
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from knative.local.activator import Activator
from knative.local.address import announce
from knative.local.admin import Admin
from knative.local.content import with_content
from knative.local.devices import Devices, check, found
from knative.local.errors import PlatformError
from knative.local.fork_server import ForkServer
from knative.local.helpers import Helpers
from knative.local.launch import Places, check_references
from knative.local.manifest import Manifests, Service
from knative.local.pod_maker import PodMaker
from knative.local.ports import HOST, Ports
from knative.local.procfs import end_marked
from knative.local.queue_watch import QueueWatch
from knative.local.reloader import Readable, Reloader
from knative.local.router import Router
from knative.local.seeds import Seed, Seeds
from knative.local.service import LiveService
from knative.local.tasks import Tasks
from knative.local.terminal import Terminal
from knative.local.workloads import Key, Workloads, key


@dataclass(frozen=True)
class PlatformSettings:
    """What `relight run` was told."""

    port: int
    admin_port: int
    state_dir: Path
    default_service: str | None
    seeds: Sequence[Seed]
    fork_server: bool = True
    gpus: int | None = None  # None: as many as are found
    inherits: tuple[str, ...] = ()  # see `inheritance.inherited`
    reload: bool = False  # whether changed code and weights are taken at once


class Platform:
    """One machine's worth of Knative for some manifests."""

    def __init__(self, settings: PlatformSettings, sources: Readable, terminal: Terminal) -> None:
        """Raises PlatformError for a mistake in the manifests, or if the default service is none of them."""
        self._settings = settings
        self._terminal = terminal
        self._devices = Devices(found(settings.gpus, os.environ), self._make_room)
        self._maker = PodMaker(Places(settings.state_dir, inherits=settings.inherits), self._devices, terminal.about, Seeds(settings.seeds))
        self._reloader = Reloader(sources, self._check, self._content, self._maker.seeds.stamps, terminal, takes_content=settings.reload)
        self._ports = Ports(terminal.say)
        self._router = Router()
        self._activator = Activator(self._router, self._ports)
        self._workloads = Workloads(self._maker, self._ports, self._activator, terminal, self._domain)
        self._workloads.services.update(self._workloads.new(self._reloader.manifests.services))
        self._helpers = Helpers(
            settings.state_dir / "logs", self._maker, lambda: self._workloads.pods, self._workloads.weights_in_use, terminal.note
        )
        self._tasks = Tasks(self._task_failed)
        self._stop = asyncio.Event()
        self._mistake: Exception | None = None

    async def run(self) -> None:
        """Run until SIGINT or SIGTERM. Raises PlatformError if something cannot be started."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        self._reloader.listen()
        if sys.version_info < (3, 12):
            watcher = asyncio.PidfdChildWatcher()  # the default waits in a thread for each process
            watcher.attach_loop(loop)
            asyncio.set_child_watcher(watcher)
        async with AsyncExitStack() as started:
            self._tasks.start(self._run(started), "the start of the platform")
            await self._stop.wait()
            await self._tasks.stop()
            if not self._mistake:
                self._terminal.note("stopping: ending the pods")
        if self._mistake:
            raise self._mistake
        self._terminal.note("stopped")

    async def _run(self, started: AsyncExitStack) -> None:
        await self._start(started)
        await self._reloader.run(self._prepare, self._notice, self._stop.set)

    def _content(self, service: Service) -> Service:
        return with_content(service, self._maker.places, self._maker.seeds)

    def _notice(self, manifests: Manifests) -> bool:
        """See Reloader."""
        return self._workloads.notice(manifests.services)

    def _task_failed(self, what: str, error: Exception) -> None:
        """The start, or taking what changes: there is no platform without them."""
        self._mistake = error
        self._stop.set()

    async def _start(self, started: AsyncExitStack) -> None:
        """Bring everything up; each thing that must be ended is pushed on `started` as soon as it is there."""
        settings, manifests, workloads = self._settings, self._reloader.manifests, self._workloads
        self._lock_state_dir(started)
        await self._end_leftovers(started)
        shutil.rmtree(settings.state_dir / "pods", ignore_errors=True)  # of a platform that was killed
        started.callback(self._terminal.close)
        # For probes. No connection is kept: an idle one would keep a pod that is told to end waiting for its next request.
        session = await started.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)))
        self._maker.session = session
        queue_watch = self._helpers.queue_watch = QueueWatch(workloads.sources.values, session, self._terminal.note)
        started.push_async_callback(self._helpers.stop)
        await self._helpers.start(manifests, with_fork_server=settings.fork_server)
        started.push_async_callback(self._maker.exposure.stop)
        started.push_async_callback(workloads.stop)
        self._route(manifests)
        await started.enter_async_context(self._ports.call_port(settings.port, self._activator.handle))
        await started.enter_async_context(workloads.sinks)
        admin = Admin(workloads.services, queue_watch, self.status, self._reloader.ask, settings.state_dir, session, settings.port)
        await started.enter_async_context(self._ports.admin_port(settings.admin_port, admin.handle))
        started.push_async_callback(admin.close)  # before its port, which would wait for those who watch
        started.callback(announce(settings.state_dir, f"http://{HOST}:{settings.admin_port}"))
        for source in manifests.sources:
            await workloads.add_source(source)
        self._welcome(manifests)
        started.push_async_callback(workloads.end_sources)  # before the ports: who is held is to be answered while that is possible
        for live in workloads.services.values():
            live.start()
        for source_live in workloads.sources.values():
            source_live.start()
        queue_watch.start()
        if self._maker.fork_server:
            self._maker.fork_server.start()  # last: it waits for pods that start now

    def _welcome(self, manifests: Manifests) -> None:
        services = [live.service for live in self._workloads.services.values()]
        urls = [f"http://{service.name}.{self._domain(service)}" for service in services]
        default = self._workloads.services[self._find_default(manifests)].service
        sources = [live.status() for live in self._workloads.sources.values()]
        self._terminal.serving(services, urls, sources, default, self._settings.port, self._settings.admin_port)

    async def _prepare(self, manifests: Manifests) -> Callable[[], Awaitable[None]]:
        """See Reloader."""
        new = self._workloads.new(manifests.services)
        fork_server = self._maker.fork_server
        await self._helpers.start(manifests, with_fork_server=self._settings.fork_server)
        is_new = self._maker.fork_server is not fork_server
        return partial(self._take, manifests, new, self._maker.fork_server if is_new else None)

    async def _take(self, manifests: Manifests, new: dict[Key, LiveService], fork_server: ForkServer | None) -> None:
        """Have what the manifests say now. fork_server: one that is to be started."""
        gone = self._workloads.take(manifests, new)
        self._route(manifests)
        await self._workloads.take_sources(manifests.sources)
        self._workloads.see_off(gone)
        self._workloads.start(new)
        if fork_server:
            fork_server.start()

    def _check(self, manifests: Manifests) -> None:
        """Whether they can run here. Raises PlatformError, also for a default service that is none of them."""
        check_references(manifests)
        check(manifests, self._devices.names)
        self._find_default(manifests)

    def _route(self, manifests: Manifests) -> None:
        default = self._workloads.services[self._find_default(manifests)]
        self._router.update(self._workloads.services.values(), default, by_header=manifests.routes_by_header)

    def _make_room(self, missing: int, claimant: str) -> None:
        self._workloads.make_room(missing, claimant)

    def status(self) -> dict[str, Any]:
        """The document of `/api/status`."""
        return {
            "now": round(time.time(), 3),
            "services": self._workloads.status(f"http://{HOST}:{self._settings.port}/"),
            "manifests": {"problem": self._reloader.problem},
            **self._helpers.status(),
            "gpus": self._devices.status(),
        }

    async def _end_leftovers(self, started: AsyncExitStack) -> None:
        """What a platform of this state directory has left behind that was killed; and ours, at the end, should there be any."""
        about = self._settings.state_dir.stat()
        mark = f"{about.st_dev:x}-{about.st_ino:x}/"  # of this directory alone, not of a copy of it
        self._maker.places = Places(self._settings.state_dir, mark, self._settings.inherits)
        if count := await asyncio.to_thread(end_marked, mark):
            self._terminal.note(f"ended {count} process{'es' * (count != 1)} of an earlier `relight run` that was killed")
        started.push_async_callback(asyncio.to_thread, end_marked, mark)

    def _find_default(self, manifests: Manifests) -> tuple[str, str]:
        services, wanted = manifests.services, self._settings.default_service
        for service in services:
            if wanted is None or service.name == wanted:
                return key(service)
        raise PlatformError(f"--default-service {wanted!r}: there is no such Service; there are {', '.join(s.name for s in services)}")

    def _domain(self, service: Service) -> str:
        """What follows the first label in the URLs of a Service."""
        return f"{service.namespace}.localhost:{self._settings.port}/"

    def _lock_state_dir(self, started: AsyncExitStack) -> None:
        folder = self._settings.state_dir
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # logs, and manifests with their Secrets, are its user's alone
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise PlatformError(f"--state-dir {folder}: {error.strerror or error}") from error
        started.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PlatformError(f"--state-dir {folder}: another `relight run` uses it; stop that one or name another directory") from None
