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
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from rich.markup import escape

from knative.local.activator import Activator, error_response
from knative.local.address import announce
from knative.local.admin import Admin
from knative.local.devices import Devices, check, found
from knative.local.embedded import EmbeddedServer, Seed
from knative.local.errors import PlatformError, Stopping
from knative.local.fork_server import PROGRAM, ForkServer
from knative.local.launch import Places, PodPlan, check_references, plan_pod, plan_source
from knative.local.limits import Limiter, delegated
from knative.local.manifest import OBJECT_STORE, QUEUES, Manifests, QueueSource, Service, Sources
from knative.local.pod import Pod
from knative.local.ports import HOST, Ports
from knative.local.procfs import end_marked
from knative.local.queue_watch import QueueWatch
from knative.local.revision import Revision
from knative.local.router import Router
from knative.local.schema import CPU, MEMORY
from knative.local.service import LiveService
from knative.local.source import LiveSource
from knative.local.terminal import Terminal
from knative.local.watch import Watch

LONG_START_S = 15.0


def key(service: Service | QueueSource) -> tuple[str, str]:
    """What a Service, or a source, is known by."""
    return service.namespace, service.name


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


class Platform:
    """One machine's worth of Knative for some manifests."""

    def __init__(self, settings: PlatformSettings, sources: Sources, terminal: Terminal) -> None:
        """Raises PlatformError for a mistake in the manifests, or if the default service is none of them."""
        self._settings = settings
        self._watch = Watch(sources)
        self._sources = sources
        self._devices = Devices(found(settings.gpus, os.environ), self._make_room)
        self._manifests = self._read()
        self._problem: str | None = None  # with the manifests as they are now
        self._terminal = terminal
        self._places = Places(settings.state_dir, inherits=settings.inherits)
        self._addresses: dict[str, str] = {}
        self._ports: deque[int] = deque(maxlen=1000)  # given lately, and perhaps not open yet
        self._services: dict[tuple[str, str], LiveService] = {
            key(service): LiveService(service, self._make_pod, terminal) for service in self._manifests.services
        }
        self._leaving: dict[LiveService, asyncio.Task[None]] = {}  # they stand in no manifest any more
        self._queue_sources: dict[tuple[str, str], LiveSource] = {}
        self._leaving_sources: set[asyncio.Task[None]] = set()
        self._sink_ports: dict[tuple[str, str], int] = {}  # by the Service that they lead to
        self._listening = Ports(terminal.say)
        self._sink_listeners = AsyncExitStack()
        self._queue_watch: QueueWatch | None = None
        self._router = Router()
        self._activator = Activator(self._router, self._listening.miss_descriptor)
        self._session: aiohttp.ClientSession | None = None
        self._embedded: EmbeddedServer | None = None
        self._fork_server: ForkServer | None = None
        self._limiter = Limiter()  # until a manifest has limits
        self._limiter_told = False
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
                following = asyncio.create_task(self._follow())
                await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    following.result()  # it never ends but by a mistake of ours
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
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
        self._queue_watch = QueueWatch(self._queue_sources.values, self._session)
        started.push_async_callback(self._stop_helpers)
        await self._start_helpers(self._manifests)
        started.push_async_callback(self._stop_services)
        self._update_router()
        await started.enter_async_context(self._listening.call_port(self._settings.port, self._activator.handle))
        await started.enter_async_context(self._sink_listeners)
        admin = Admin(self._services, self._queue_watch, self.status, self._settings.state_dir, self._session, self._settings.port)
        await started.enter_async_context(self._listening.admin_port(self._settings.admin_port, admin.handle))
        started.push_async_callback(admin.close)  # before its port, which would wait for those who watch
        started.callback(announce(self._settings.state_dir, f"http://{HOST}:{self._settings.admin_port}"))
        services = [live.service for live in self._services.values()]
        urls = [f"http://{service.name}.{self._domain(service)}" for service in services]
        default = self._services[self._find_default(self._manifests)].service
        for source in self._manifests.sources:
            await self._add_source(source)
        queue_sources = [live.status() for live in self._queue_sources.values()]
        self._terminal.serving(services, urls, queue_sources, default, self._settings.port, self._settings.admin_port)
        started.push_async_callback(self._end_sources)  # before the ports: who is held is to be answered while that is possible
        for live in self._services.values():
            live.start()
        for source_live in self._queue_sources.values():
            source_live.start()
        self._queue_watch.start()
        if self._fork_server:
            self._fork_server.start()  # last: it waits for pods that start now

    async def _end_leftovers(self, started: AsyncExitStack) -> None:
        """What a platform of this state directory has left behind that was killed; and ours, at the end, should there be any."""
        about = self._settings.state_dir.stat()
        mark = f"{about.st_dev:x}-{about.st_ino:x}/"  # of this directory alone, not of a copy of it
        self._places = Places(self._settings.state_dir, mark, self._settings.inherits)
        if count := await asyncio.to_thread(end_marked, mark):
            self._terminal.say(f"ended {count} process{'es' * (count != 1)} of an earlier `relight run` that was killed")
        started.push_async_callback(asyncio.to_thread, end_marked, mark)

    async def _follow(self) -> None:
        """Take what changes in the manifests, for as long as we run."""
        self._watch.listen()
        while True:
            by_signal = await self._watch.changed()
            if self._watch.hung_up:
                self._stop.set()
            elif self._sources.can_change:
                await self._reload(by_signal=by_signal)
            else:
                self._terminal.say(
                    "SIGHUP: the manifests came from standard input, which cannot be read again; name a file to be able to change them"
                )

    async def _reload(self, *, by_signal: bool) -> None:
        """Read the manifests again; all of what they say is done, or nothing."""
        try:
            manifests = await asyncio.to_thread(self._read)
            for service in manifests.services:
                if live := self._services.get(key(service)):
                    live.rollout.check(service)
            new = {
                key(service): LiveService(service, self._make_pod, self._terminal)
                for service in manifests.services
                if key(service) not in self._services
            }
            fork_server = self._fork_server
            await self._start_helpers(manifests)
        except PlatformError as error:
            self._problem = str(error)
            self._terminal.say(f"[red]nothing was changed[/]: {escape(self._problem)}")
            return
        self._manifests, self._problem = manifests, None
        self._terminal.say(f"[dim]manifests read again{' (SIGHUP)' if by_signal else ''}[/]")
        gone = [self._services.pop(name) for name in list(self._services) if name not in {key(service) for service in manifests.services}]
        for service in manifests.services:
            if live := self._services.get(key(service)):
                live.rollout.apply(service)
        self._services.update(new)
        self._update_router()
        await self._reload_sources(manifests.sources)
        for live in gone:
            self._terminal.about(live.service.name, "stands in no manifest any more: its pods go")
            live.leave()
            self._leaving[live] = asyncio.create_task(self._see_off(live))
        for live in new.values():
            self._terminal.about(live.service.name, f"is new: http://{live.service.name}.{self._domain(live.service)}")
            live.start()
        if self._fork_server and self._fork_server is not fork_server:
            self._fork_server.start()

    async def _reload_sources(self, sources: Sequence[QueueSource]) -> None:
        """End those that stand in no manifest any more, start those that are new; one that was changed is both, as a Deployment's pod."""
        wanted = {key(source): source for source in sources}
        for name, live in list(self._queue_sources.items()):
            if wanted.get(name) != live.source:
                self._terminal.about(
                    live.source.name, "was changed: it starts anew" if name in wanted else "stands in no manifest any more"
                )
                ending = asyncio.create_task(self._queue_sources.pop(name).stop())
                self._leaving_sources.add(ending)
                ending.add_done_callback(self._leaving_sources.discard)
        for name, source in wanted.items():
            if name not in self._queue_sources:
                await self._add_source(source)
                self._queue_sources[name].start()

    async def _add_source(self, source: QueueSource) -> None:
        """Plan it, and open the way to its sink. Raises PlatformError."""
        service, rest = source.sink
        sink = f"http://{HOST}:{await self._sink_port(service)}{rest}" if service else rest
        self._queue_sources[key(source)] = LiveSource(source, lambda name: self._make_source_pod(source, name, sink))

    async def _sink_port(self, service: tuple[str, str]) -> int:
        """A port that leads to one Service alone: not every program knows that `minilm.default.localhost` is this machine."""

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            if live := self._services.get(service):
                return await self._activator.serve(request, live.choose())
            return error_response(Stopping(f"Service {service[1]} stands in no manifest any more"))

        if service not in self._sink_ports:
            port = self._free_port()
            await self._sink_listeners.enter_async_context(self._listening.call_port(port, handle))
            self._sink_ports[service] = port
        return self._sink_ports[service]

    async def _end_sources(self) -> None:
        """Let them finish or give back what they hold, which needs the Services' pods and the queues; who waits for a pod is answered."""
        ending = [asyncio.create_task(live.stop()) for live in self._queue_sources.values()]
        self._close_services()
        await asyncio.gather(*ending, *self._leaving_sources)

    async def _see_off(self, live: LiveService) -> None:
        await live.gone()
        await live.stop()
        del self._leaving[live]

    def _read(self) -> Manifests:
        """The manifests as they are now. Raises PlatformError, also for a default service that is none of them."""
        manifests = self._sources.read()
        check_references(manifests)
        check(manifests, self._devices.names)
        self._find_default(manifests)
        return manifests

    def _update_router(self) -> None:
        default = self._services[self._find_default(self._manifests)]
        self._router.update(self._services.values(), default, by_header=self._manifests.routes_by_header)

    def status(self) -> dict[str, Any]:
        """The document of `/api/status`."""
        address = f"http://{HOST}:{self._settings.port}/"
        sources, queues = self._queue_watch.status() if self._queue_watch else ([], [])
        return {
            "now": round(time.time(), 3),
            "services": [live.status(self._domain(live.service), address) for live in self._services.values()],
            "manifests": {"problem": self._problem},
            "queue_sources": sources,
            "queues": queues,
            "fork_server": self._fork_server and self._fork_server.status(),
            "limits": self._limiter.describe(),
            "gpus": self._devices.status(),
        }

    async def _start_helpers(self, manifests: Manifests) -> None:
        """The embedded server, the limits and the fork server, as soon as a manifest has a use for them. Raises PlatformError."""
        await self._start_embedded(manifests)
        self._set_limits(manifests)
        commands = [(*container.command, *container.args)[1:] for s in manifests.services for container in s.spec.containers]
        if not self._fork_server and self._settings.fork_server and PROGRAM in commands:
            log = self._settings.state_dir / "logs" / "fork-server.log"
            self._fork_server = ForkServer(log, self._is_starting, self._terminal.say, self._places.mark, self._settings.inherits)

    async def _start_embedded(self, manifests: Manifests) -> None:
        wants_objects = bool(self._settings.seeds) or manifests.mentions(OBJECT_STORE)
        wants_queues = manifests.mentions(QUEUES)
        if not self._embedded and (wants_objects or wants_queues):
            log = self._settings.state_dir / "logs" / "embedded.log"
            self._embedded = EmbeddedServer(self._free_port(), log, self._terminal.say, self._places.mark)
        if not self._embedded:
            return
        try:
            if not self._addresses:
                await self._embedded.start()
            if wants_objects and OBJECT_STORE not in self._addresses:
                await self._embedded.serve_objects(self._settings.seeds)
                self._addresses[OBJECT_STORE] = self._embedded.address
            if wants_queues:
                await self._embedded.serve_queues(manifests.queues)
                self._addresses[QUEUES] = self._embedded.address
        except PlatformError:
            if not self._addresses:
                await self._embedded.stop()
                self._embedded = None
            raise
        assert self._queue_watch
        self._queue_watch.embedded = self._embedded

    def _set_limits(self, manifests: Manifests) -> None:
        """Say once which mechanism holds containers to their limits, as soon as there are any."""
        containers = [container for workload in manifests.workloads for container in workload.spec.containers]
        if not self._limiter_told and any({CPU, MEMORY} & container.resources.limits.keys() for container in containers):
            self._limiter_told = True
            self._limiter = Limiter(delegated())
            self._terminal.say(f"resources.limits: {self._limiter.explain()}")

    async def _stop_helpers(self) -> None:
        await asyncio.gather(*(helper.stop() for helper in (self._queue_watch, self._fork_server, self._embedded) if helper))

    def _is_starting(self) -> bool:
        """Whether somebody may be waiting for a pod that starts; one that takes long is not waited for."""
        now = time.monotonic()
        pods = [pod for live in self._services.values() for pod in live.pods]
        return any(pod.phase in ("pending", "starting") and now - pod.asked_at < LONG_START_S for pod in pods)

    def _close_services(self) -> None:
        for live in (*self._services.values(), *self._leaving):
            live.close()

    async def _stop_services(self) -> None:
        leaving = dict(self._leaving)
        for task in leaving.values():
            task.cancel()
        await asyncio.gather(*leaving.values(), return_exceptions=True)
        await asyncio.gather(*(live.stop() for live in (*self._services.values(), *leaving)))

    def _make_pod(self, revision: Revision, name: str) -> Pod:
        plan = plan_pod(
            revision.service,
            revision=revision.name,
            pod=name,
            places=self._places,
            manifests=revision.service.manifests,
            free_port=self._free_port,
            addresses=self._addresses,
        )
        supervisor = revision.supervisor
        return self._pod(
            name, plan, supervisor.pod_changed, supervisor.process_ended, self._fork_server, is_urgent=lambda _: supervisor.needs_pod()
        )

    def _make_source_pod(self, source: QueueSource, name: str, sink: str) -> Pod:
        plan = plan_source(source, pod=name, sink=sink, places=self._places, free_port=self._free_port, addresses=self._addresses)
        return self._pod(name, plan, lambda _: None, lambda pod, ended: self._terminal.about(source.name, f"{pod.name}: {ended}"))

    def _pod(
        self,
        name: str,
        plan: PodPlan,
        on_change: Callable[[Pod], object],
        on_exit: Callable[[Pod, str], object],
        fork_server: ForkServer | None = None,
        is_urgent: Callable[[Pod], bool] = lambda _: True,
    ) -> Pod:
        assert self._session is not None
        return Pod(
            name,
            plan,
            self._places.pod(name),
            self._session,
            on_change,
            on_exit,
            fork_server,
            self._limiter,
            self._devices,
            is_urgent,
        )

    def _make_room(self, missing: int, claimant: str) -> None:
        """Let idle pods go until a pod can have so many GPUs more, those first that nobody has called for longest; none if it is no use."""
        revisions = [revision for live in (*self._services.values(), *self._leaving) for revision in live.revisions.values()]
        others = [revision for revision in revisions if all(pod.name != claimant for pod in revision.pods)]
        spare = [(revision, pod) for revision in sorted(others, key=lambda one: one.last_left) for pod in revision.supervisor.spare_pods()]
        missing -= sum(pod.plan.gpus for revision in revisions for pod in revision.pods.going)
        if missing > sum(pod.plan.gpus for _, pod in spare):
            return
        for revision, pod in spare:
            if missing > 0:
                missing -= pod.plan.gpus
                revision.supervisor.give_up(pod)

    def _free_port(self) -> int:
        """A loopback port that nobody has, and that no other pod was just given."""
        while True:
            with socket.socket() as probe:
                probe.bind((HOST, 0))
                port: int = probe.getsockname()[1]
            if port not in self._ports:
                self._ports.append(port)
                return port

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
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise PlatformError(f"--state-dir {folder}: {error.strerror or error}") from error
        started.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PlatformError(f"--state-dir {folder}: another `relight run` uses it; stop that one or name another directory") from None
