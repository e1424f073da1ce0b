"""The Services and queue sources that run, as the manifests have them: some come, some change, some leave."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from itertools import chain
from typing import Any

from aiohttp import web

from knative.local import origin
from knative.local.activator import Activator, error_response
from knative.local.errors import Forbidden, Stopping
from knative.local.manifest import Manifests, QueueSource, Service
from knative.local.pod import Pod
from knative.local.pod_maker import PodMaker
from knative.local.ports import HOST, Ports
from knative.local.service import LiveService
from knative.local.source import LiveSource
from knative.local.supervisor import Watcher
from knative.local.tasks import Tasks, describe

Key = tuple[str, str]


def key(service: Service | QueueSource) -> Key:
    """What a Service, or a source, is known by."""
    return service.namespace, service.name


class Workloads:
    """All that run on this machine. Everything here runs in one event loop."""

    def __init__(self, maker: PodMaker, ports: Ports, activator: Activator, watcher: Watcher, domain: Callable[[Service], str]) -> None:
        """domain: what follows the first label in the URLs of a Service."""
        self.services: dict[Key, LiveService] = {}
        self.sources: dict[Key, LiveSource] = {}
        self.sinks = AsyncExitStack()  # the ports that lead to one Service alone
        self._sink_ports: dict[Key, int] = {}
        self._leaving: set[LiveService] = set()  # they stand in no manifest any more
        self._ending: list[asyncio.Task[None]] = []  # sources
        self._maker = maker
        self._ports = ports
        self._activator = activator
        self._watcher = watcher
        self._domain = domain
        self._tasks = Tasks(lambda what, error: watcher.about("relight", describe(what, error)))

    @property
    def all_services(self) -> list[LiveService]:
        """Those that leave, too."""
        return [*self.services.values(), *self._leaving]

    @property
    def pods(self) -> Iterator[Pod]:
        """Those of the Services that do not leave."""
        return chain.from_iterable(live.pods for live in self.services.values())

    def weights_in_use(self) -> set[str]:
        """Stamps of the weights that pods may yet start with: of revisions that get requests, or are to get some, or have pods."""
        return {
            revision.service.weights
            for live in self.all_services
            for revision in live.revisions.values()
            if revision.reachable or revision in (live.rollout.latest, live.rollout.next) or revision.pods
        }

    def new(self, services: Sequence[Service]) -> dict[Key, LiveService]:
        """Those that are not there yet. Raises ManifestError if one of the others cannot take what its manifest says."""
        for service in services:
            if live := self.services.get(key(service)):
                live.rollout.check(service)
        make = self._maker.for_revision
        return {key(service): LiveService(service, make, self._watcher) for service in services if key(service) not in self.services}

    def notice(self, services: Sequence[Service]) -> bool:
        """Tell of code and weights that have changed; whether a Service is to have them now."""
        found = [live.rollout.stale.notice(service) for service in services if (live := self.services.get(key(service)))]
        return any(found)

    def take(self, manifests: Manifests, new: dict[Key, LiveService]) -> list[LiveService]:
        """Have what the manifests say; those that stand in none of them any more are returned, for `see_off`."""
        wanted = {key(service) for service in manifests.services}
        gone = [self.services.pop(name) for name in list(self.services) if name not in wanted]
        for service in manifests.services:
            if live := self.services.get(key(service)):
                live.rollout.apply(service)
        self.services.update(new)
        return gone

    def start(self, new: dict[Key, LiveService]) -> None:
        """Begin with those that came while others ran."""
        for live in new.values():
            self._watcher.about(live.service.name, f"is new: http://{live.service.name}.{self._domain(live.service)}")
            live.start()

    def see_off(self, gone: Sequence[LiveService]) -> None:
        """Serve those who are there already; then its pods go."""
        for live in gone:
            self._watcher.about(live.service.name, "stands in no manifest any more: its pods go")
            live.leave()
            self._leaving.add(live)
            self._tasks.start(self._see_off(live), f"the end of {live.service.name}")

    async def _see_off(self, live: LiveService) -> None:
        await live.gone()
        await live.stop()
        self._leaving.discard(live)

    async def take_sources(self, sources: Sequence[QueueSource]) -> None:
        """End those that stand in no manifest any more, start those that are new; one that was changed is both, as a Deployment's pod."""
        wanted = {key(source): source for source in sources}
        for name, live in list(self.sources.items()):
            if wanted.get(name) != live.source:
                said = "was changed: it starts anew" if name in wanted else "stands in no manifest any more"
                self._watcher.about(live.source.name, said)
                self._end(self.sources.pop(name))
        for name, source in wanted.items():
            if name not in self.sources:
                await self.add_source(source)
                self.sources[name].start()

    async def add_source(self, source: QueueSource) -> None:
        """Plan it, and open the way to its sink. Raises PlatformError."""
        service, rest = source.sink
        sink = f"http://{HOST}:{await self._sink_port(service)}{rest}" if service else rest
        self.sources[key(source)] = LiveSource(source, lambda name: self._maker.for_source(source, name, sink))

    async def _sink_port(self, service: Key) -> int:
        """A port that leads to one Service alone: not every program knows that `minilm.default.localhost` is this machine."""

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            try:
                origin.check(request.host, request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site"))
            except origin.Forbidden as refused:
                return error_response(Forbidden(str(refused)))  # sources come here, and no browser
            if live := self.services.get(service):
                return await self._activator.serve(request, live.choose())
            return error_response(Stopping(f"Service {service[1]} stands in no manifest any more"))

        if service not in self._sink_ports:
            port = self._maker.free_port()
            await self.sinks.enter_async_context(self._ports.call_port(port, handle))
            self._sink_ports[service] = port
        return self._sink_ports[service]

    async def end_sources(self) -> None:
        """Let them finish or give back what they hold, which needs the Services' pods and the queues; who waits for a pod is answered."""
        for live in self.sources.values():
            self._end(live)
        for service in self.all_services:
            service.close()
        await asyncio.gather(*self._ending, return_exceptions=True)

    def _end(self, live: LiveSource) -> None:
        self._ending = [task for task in self._ending if not task.done()]
        self._ending.append(self._tasks.start(live.stop(), f"the end of {live.source.name}"))

    async def stop(self) -> None:
        """End every pod that is left."""
        await self._tasks.stop()
        await asyncio.gather(*(live.stop() for live in self.all_services))

    def make_room(self, missing: int, claimant: str) -> None:
        """Let idle pods go until a pod can have so many GPUs more, those first that nobody has called for longest; none if it is no use."""
        revisions = [revision for live in self.all_services for revision in live.revisions.values()]
        others = [revision for revision in revisions if all(pod.name != claimant for pod in revision.pods)]
        spare = [(revision, pod) for revision in sorted(others, key=lambda one: one.last_left) for pod in revision.supervisor.spare_pods()]
        missing -= sum(pod.plan.gpus for revision in revisions for pod in revision.pods.going)
        if missing > sum(pod.plan.gpus for _, pod in spare):
            return
        for revision, pod in spare:
            if missing > 0:
                missing -= pod.plan.gpus
                revision.supervisor.give_up(pod)

    def status(self, address: str) -> list[dict[str, Any]]:
        """The entry `services` of `/api/status`. address: where the platform answers."""
        return [live.status(self._domain(live.service), address) for live in self.services.values()]
