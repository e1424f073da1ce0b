"""What pods may need beside themselves: the embedded object store and queues, limits, the fork server. Each is there once it has a use."""

import asyncio
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from knative.local.again import Again
from knative.local.earlier import EarlierWeights
from knative.local.embedded import EmbeddedServer
from knative.local.errors import PlatformError
from knative.local.fork_server import PROGRAM, ForkServer
from knative.local.imports import Imports
from knative.local.limits import Limiter, delegated
from knative.local.manifest import OBJECT_STORE, QUEUES, Manifests
from knative.local.pod import Pod
from knative.local.pod_maker import PodMaker
from knative.local.queue_watch import QueueWatch
from knative.local.schema import CPU, MEMORY
from knative.local.seeds import Seed
from knative.local.weights import cached

LONG_START_S = 15.0
DROP_S = 2.0  # between two looks for earlier weights that nobody needs any more


class Helpers:
    """Starts them for the manifests of the moment, and ends them."""

    def __init__(
        self,
        logs: Path,
        maker: PodMaker,
        pods: Callable[[], Iterable[Pod]],
        weights_in_use: Callable[[], set[str]],
        say: Callable[[str], object],
    ) -> None:
        """maker: is told of each, and has the seeds. pods: those of each moment. weights_in_use: see Workloads. say: tells the user."""
        self.queue_watch: QueueWatch | None = None  # set before anything is started
        self._logs = logs
        self._maker = maker
        self._pushed: dict[
            str, tuple[str, str]
        ] = {}  # by the place of a seed, the stamp that its directory had, and the snapshot that it is
        self._pods = pods
        self._weights_in_use = weights_in_use
        self._say = say
        self._embedded: EmbeddedServer | None = None
        self._earlier: EarlierWeights | None = None
        self._dropping: Again | None = None
        self._has_limits = False

    async def start(self, manifests: Manifests, *, with_fork_server: bool) -> None:
        """What these manifests have a use for, if it is not there. Raises PlatformError."""
        await self._start_embedded(manifests)
        await self._push_changed()
        self._set_limits(manifests)
        commands = [(*container.command, *container.args)[1:] for s in manifests.services for container in s.spec.containers]
        if with_fork_server and not self._maker.fork_server and PROGRAM in commands:
            places = self._maker.places
            imports = Imports(places.state_dir / "imports")
            await asyncio.to_thread(imports.load)
            self._maker.fork_server = ForkServer(
                self._logs / "fork-server.log",
                self._is_starting,
                self._say,
                places.mark,
                places.inherits,
                imports,
            )
        if self._maker.fork_server:
            self._maker.fork_server.want(self._maker.functions(manifests.services))

    async def _start_embedded(self, manifests: Manifests) -> None:
        wants_objects = bool(self._maker.seeds.all) or manifests.mentions(OBJECT_STORE)
        wants_queues = manifests.mentions(QUEUES)
        addresses = self._maker.addresses
        if not self._embedded and (wants_objects or wants_queues):
            self._embedded = EmbeddedServer(self._maker.free_port(), self._logs / "embedded.log", self._say, self._maker.places.mark)
        if not self._embedded:
            return
        try:
            if not addresses:
                await self._embedded.start()
            if wants_objects and OBJECT_STORE not in addresses:
                seeds = self._maker.seeds.all
                stamps = [seed.stamp() for seed in seeds]
                snapshots = await self._embedded.serve_objects(seeds)
                addresses[OBJECT_STORE] = self._embedded.address
                for seed, stamp, snapshot in zip(seeds, stamps, snapshots, strict=True):
                    self._pushed[seed.place] = stamp, snapshot
                    if await asyncio.to_thread(_has_other, self._maker.places.state_dir / "volumes", snapshot):
                        self._maker.seeds.pin(seed, stamp, snapshot)
            if wants_queues:
                await self._embedded.serve_queues(manifests.queues)
                addresses[QUEUES] = self._embedded.address
        except PlatformError:
            if not addresses:
                await self._embedded.stop()
                self._embedded = None
            raise
        assert self.queue_watch
        self.queue_watch.embedded = self._embedded

    async def _push_changed(self) -> None:
        """Directories that have changed since they were put into the store: from now on a pod has those of its revision, or none."""
        for seed in self._maker.seeds.all:
            stamp = await asyncio.to_thread(seed.stamp)
            before = self._pushed.get(seed.place)
            if self._embedded and before and before[0] != stamp:
                await self._keep(self._embedded, seed, *before)
                self._pushed[seed.place] = now = stamp, await self._embedded.fill(seed)
                self._maker.seeds.pin(seed, *now)

    async def _keep(self, embedded: EmbeddedServer, seed: Seed, stamp: str, snapshot: str) -> None:
        if not self._earlier:
            self._earlier = EarlierWeights(embedded.address, self._maker.seeds, self._weights_in_use)
            self._dropping = Again("the look for weights that nobody needs any more", self._earlier.drop, DROP_S, self._say)
            self._dropping.start()
        await self._earlier.keep(seed, stamp, snapshot)

    def _set_limits(self, manifests: Manifests) -> None:
        """Say once which mechanism holds containers to their limits, as soon as there are any."""
        containers = [container for workload in manifests.workloads for container in workload.spec.containers]
        if not self._has_limits and any({CPU, MEMORY} & container.resources.limits.keys() for container in containers):
            self._has_limits = True
            self._maker.limiter = Limiter(delegated(), tell=self._say)
            self._say(f"resources.limits: {self._maker.limiter.explain()}")

    def _is_starting(self) -> bool:
        """Whether somebody may be waiting for a pod that starts; one that takes long is not waited for."""
        now = time.monotonic()
        return any(pod.phase in ("pending", "starting") and now - pod.asked_at < LONG_START_S for pod in self._pods())

    async def stop(self) -> None:
        """End all of them."""
        if self._dropping:
            await self._dropping.stop()
        helpers = (self.queue_watch, self._maker.fork_server, self._embedded, self._maker.limiter)
        await asyncio.gather(*(helper.stop() for helper in helpers if helper))

    def status(self) -> dict[str, Any]:
        """Their entries in `/api/status`."""
        sources, queues = self.queue_watch.status() if self.queue_watch else ([], [])
        fork_server = self._maker.fork_server
        return {
            "queue_sources": sources,
            "queues": queues,
            "fork_server": fork_server and fork_server.status(),
            "limits": self._maker.limiter.describe(),
        }


def _has_other(volumes: Path, snapshot: str) -> bool:
    """Whether a cache has other weights by this name, of an earlier run: a pod would start with those, and ask the store meanwhile."""
    uri, _, latest = snapshot.partition("#")
    return any(row["uri"] == uri and row["snapshot"] != latest for row in cached(volumes))
