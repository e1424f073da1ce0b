"""The platform: everything that `relight run` starts, in order, and ends, in the reverse order."""

import asyncio
import fcntl
import os
import shutil
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from knative.local.activator import Activator
from knative.local.address import announce
from knative.local.admin import Admin
from knative.local.devices import Devices, check, found
from knative.local.embedded import OBJECT_STORE, ObjectStore, Seed
from knative.local.errors import PlatformError
from knative.local.fork_server import PROGRAM, ForkServer
from knative.local.launch import Places, check_references, plan_pod
from knative.local.limits import Limiter, delegated
from knative.local.manifest import Manifests
from knative.local.pod import Pod
from knative.local.procfs import end_marked
from knative.local.revision import Revision
from knative.local.schema import CPU, MEMORY
from knative.local.terminal import Terminal

HOST = "127.0.0.1"
LONG_START_S = 15.0


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


class Platform:
    """One machine's worth of Knative for some manifests."""

    def __init__(self, settings: PlatformSettings, manifests: Manifests, terminal: Terminal) -> None:
        """Raises PlatformError if the default service, or a ConfigMap or Secret that a container refers to, is none of the manifests'."""
        self._settings = settings
        self._manifests = manifests
        self._terminal = terminal
        self._places = Places(settings.state_dir)
        self._addresses: dict[str, str] = {}
        self._ports: deque[int] = deque(maxlen=1000)  # given lately, and perhaps not open yet
        self._revisions: dict[tuple[str, str], Revision] = {}
        self._default = self._find_default()
        check_references(manifests)
        self._devices = Devices(found(settings.gpus, os.environ), self._make_room)
        check(manifests, self._devices.names)
        self._session: aiohttp.ClientSession | None = None
        self._fork_server: ForkServer | None = None
        self._limiter = Limiter()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Run until SIGINT or SIGTERM. Raises PlatformError if something cannot be started."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        if sys.version_info < (3, 12):
            watcher = asyncio.PidfdChildWatcher()  # the default waits in a thread for each process
            watcher.attach_loop(loop)
            asyncio.set_child_watcher(watcher)
        async with AsyncExitStack() as started:
            serving = asyncio.create_task(self._start(started))
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
                await stopping
            else:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
            self._terminal.say("stopping: ending the pods")
        self._terminal.say("stopped")

    async def _start(self, started: AsyncExitStack) -> None:
        """Bring everything up; each thing that must be ended is pushed on `started` as soon as it is there."""
        self._lock_state_dir(started)
        await self._end_leftovers(started)
        shutil.rmtree(self._settings.state_dir / "pods", ignore_errors=True)  # of a platform that was killed
        started.callback(self._terminal.close)
        # For probes. No connection is kept: an idle one would keep a pod that is told to end waiting for its next request.
        self._session = await started.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)))
        await self._start_store(started)
        self._set_limits()
        for service in self._manifests.services:
            self._revisions[service.namespace, service.name] = Revision(service, self._make_pod, self._terminal)
        self._make_fork_server(started)
        default = self._revisions[self._default]
        started.push_async_callback(self._stop_revisions)
        await self._listen(started, self._settings.port, Activator(self._revisions, default).handle)
        admin = Admin(self._revisions, self.status, self._settings.state_dir, self._session, self._settings.port)
        await self._listen(started, self._settings.admin_port, admin.handle)
        started.push_async_callback(admin.close)  # before its port, which would wait for those who watch
        started.callback(announce(self._settings.state_dir, f"http://{HOST}:{self._settings.admin_port}"))
        urls = [self._url(revision) for revision in self._revisions.values()]
        self._terminal.serving(list(self._revisions.values()), urls, default, self._settings.port, self._settings.admin_port)
        for revision in self._revisions.values():
            started.callback(revision.close)  # before the ports: who is held is to be answered while that is possible
            revision.start()
        if self._fork_server:
            self._fork_server.start()  # last: it waits for pods that start now

    async def _end_leftovers(self, started: AsyncExitStack) -> None:
        """What a platform of this state directory has left behind that was killed; and ours, at the end, should there be any."""
        about = self._settings.state_dir.stat()
        mark = f"{about.st_dev:x}-{about.st_ino:x}/"  # of this directory alone, not of a copy of it
        self._places = Places(self._settings.state_dir, mark)
        if count := await asyncio.to_thread(end_marked, mark):
            self._terminal.say(f"ended {count} process{'es' * (count != 1)} of an earlier `relight run` that was killed")
        started.push_async_callback(asyncio.to_thread, end_marked, mark)

    def status(self) -> dict[str, Any]:
        """The document of `/api/status`."""
        address = f"http://{HOST}:{self._settings.port}/"
        return {
            "now": round(time.time(), 3),
            "services": [revision.status(self._url(revision), address) for revision in self._revisions.values()],
            "queue_sources": [],
            "fork_server": self._fork_server and self._fork_server.status(),
            "limits": self._limiter.describe(),
            "gpus": self._devices.status(),
        }

    async def _start_store(self, started: AsyncExitStack) -> None:
        if not self._settings.seeds and not self._manifests.mentions(OBJECT_STORE):
            return
        store = ObjectStore(self._free_port(), self._settings.state_dir / "logs" / "object-store.log", self._places.mark)
        started.push_async_callback(store.stop)
        await store.start()
        self._addresses[OBJECT_STORE] = store.address
        self._terminal.say(f"object store at {store.address}, in memory")
        for seed in self._settings.seeds:
            await store.fill(seed)

    def _set_limits(self) -> None:
        """Say once which mechanism holds containers to their limits, if there are any."""
        containers = [container for service in self._manifests.services for container in service.spec.containers]
        if any({CPU, MEMORY} & container.resources.limits.keys() for container in containers):
            self._limiter = Limiter(delegated())
            self._terminal.say(f"resources.limits: {self._limiter.explain()}")

    def _make_fork_server(self, started: AsyncExitStack) -> None:
        commands = [(*container.command, *container.args)[1:] for s in self._manifests.services for container in s.spec.containers]
        if self._settings.fork_server and PROGRAM in commands:
            log = self._settings.state_dir / "logs" / "fork-server.log"
            self._fork_server = ForkServer(log, self._is_starting, self._terminal.say, self._places.mark)
            started.push_async_callback(self._fork_server.stop)

    def _is_starting(self) -> bool:
        """Whether somebody may be waiting for a pod that starts; one that takes long is not waited for."""
        now = time.monotonic()
        pods = [pod for revision in self._revisions.values() for pod in revision.pods]
        return any(pod.phase in ("pending", "starting") and now - pod.asked_at < LONG_START_S for pod in pods)

    async def _stop_revisions(self) -> None:
        await asyncio.gather(*(revision.stop() for revision in self._revisions.values()))

    def _make_pod(self, revision: Revision, name: str) -> Pod:
        plan = plan_pod(
            revision.service,
            revision=revision.name,
            pod=name,
            places=self._places,
            manifests=self._manifests,
            free_port=self._free_port,
            addresses=self._addresses,
        )
        assert self._session is not None
        return Pod(
            name,
            plan,
            self._places.pod(name),
            self._session,
            revision.pod_changed,
            revision.process_ended,
            self._fork_server,
            self._limiter,
            self._devices,
            revision.needs,
        )

    def _make_room(self, missing: int, claimant: str) -> None:
        """Let idle pods go until a pod can have so many GPUs more, those first that nobody has called for longest; none if it is no use."""
        revisions = [revision for revision in self._revisions.values() if all(pod.name != claimant for pod in revision.pods)]
        spare = [(revision, pod) for revision in sorted(revisions, key=lambda one: one.last_left) for pod in revision.spare_pods()]
        missing -= sum(pod.plan.gpus for revision in self._revisions.values() for pod in revision.pods if pod.phase == "draining")
        if missing > sum(pod.plan.gpus for _, pod in spare):
            return
        for revision, pod in spare:
            if missing > 0:
                missing -= pod.plan.gpus
                revision.give_up(pod)

    def _free_port(self) -> int:
        """A loopback port that nobody has, and that no other pod was just given."""
        while True:
            with socket.socket() as probe:
                probe.bind((HOST, 0))
                port: int = probe.getsockname()[1]
            if port not in self._ports:
                self._ports.append(port)
                return port

    def _find_default(self) -> tuple[str, str]:
        services, wanted = self._manifests.services, self._settings.default_service
        for service in services:
            if wanted is None or service.name == wanted:
                return service.namespace, service.name
        raise PlatformError(f"--default-service {wanted!r}: there is no such Service; there are {', '.join(s.name for s in services)}")

    def _url(self, revision: Revision) -> str:
        return f"http://{revision.service.name}.{revision.service.namespace}.localhost:{self._settings.port}/"

    def _lock_state_dir(self, started: AsyncExitStack) -> None:
        folder = self._settings.state_dir
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise PlatformError(f"--state-dir {folder}: {error.strerror or error}") from error
        started.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PlatformError(f"--state-dir {folder}: another `relight run` uses it; stop that one or name another directory") from None

    async def _listen(self, started: AsyncExitStack, port: int, handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> None:
        # handler_cancellation: a client that goes away is forgotten, also while it is held.
        # auto_decompress: a body is passed on as it was sent.
        runner = web.ServerRunner(web.Server(handle, access_log=None, handler_cancellation=True, auto_decompress=False), shutdown_timeout=2)
        await runner.setup()
        started.push_async_callback(runner.cleanup)
        try:
            await web.TCPSite(runner, HOST, port, backlog=1024).start()
        except OSError as error:
            raise PlatformError(f"port {port} on {HOST} cannot be opened: {os.strerror(error.errno or 0)}; choose another") from error
