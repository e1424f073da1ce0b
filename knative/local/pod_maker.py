"""Makes pods: with what their manifests say, and with what this platform has for them."""

import socket
from collections import deque
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

import aiohttp

from knative.local.devices import Devices
from knative.local.exposure import Exposure
from knative.local.fork_server import ForkServer
from knative.local.launch import Places, PodPlan, Process, plan_pod, plan_source
from knative.local.limits import Limiter
from knative.local.manifest import QueueSource, Service
from knative.local.pod import Pod
from knative.local.ports import HOST
from knative.local.revision import Revision
from knative.local.seeds import Seeds


class PodMaker:
    """What all pods have in common. Its fields are set as what they name comes to be there."""

    def __init__(self, places: Places, devices: Devices, about: Callable[[str, str], object], seeds: Seeds | None = None) -> None:
        """about: told what happens to the pod of a source, with the source's name."""
        self.places = places
        self.seeds = seeds or Seeds()
        self.addresses: dict[str, str] = {}  # of what a manifest may name that is here
        self.limiter = Limiter()  # until a manifest has limits
        self.fork_server: ForkServer | None = None
        self.session: aiohttp.ClientSession | None = None  # for probes
        self._devices = devices
        self._about = about
        self.exposure = Exposure(about)
        self._ports: deque[int] = deque(maxlen=1000)  # given lately, and perhaps not open yet

    def for_revision(self, revision: Revision, name: str) -> Pod:
        """One more of a Service's."""
        plan = plan_pod(
            revision.service,
            revision=revision.name,
            pod=name,
            places=self.places,
            manifests=revision.service.manifests,
            free_port=self.free_port,
            addresses=self.addresses,
            seeds=self.seeds,
        )
        supervisor = revision.supervisor
        changed = self.exposure.watch(revision.name, supervisor.pod_changed)
        return self._pod(name, plan, changed, supervisor.process_ended, self.fork_server, is_urgent=lambda _: supervisor.needs_pod())

    def functions(self, services: Iterable[Service]) -> list[Process]:
        """The processes that pods of these will have, each as two pods would: what differs between those differs between any two."""
        found: list[Process] = []
        for service in services:
            for pod in ("one", "other"):
                plan = plan_pod(
                    service,
                    revision=pod,
                    pod=pod,
                    places=self.places,
                    manifests=service.manifests,
                    free_port=count(1 if pod == "one" else 1000).__next__,
                    addresses=self.addresses,
                    seeds=self.seeds,
                )
                found += plan.processes
        return found

    def for_source(self, source: QueueSource, name: str, sink: str) -> Pod:
        """The one of a source, whose events go to `sink`, an address."""
        plan = plan_source(source, pod=name, sink=sink, places=self.places, free_port=self.free_port, addresses=self.addresses)
        changed = self.exposure.watch(source.name, lambda _: None)
        return self._pod(name, plan, changed, lambda pod, ended: self._about(source.name, f"{pod.name}: {ended}"))

    def _pod(
        self,
        name: str,
        plan: PodPlan,
        on_change: Callable[[Pod], object],
        on_exit: Callable[[Pod, str], object],
        fork_server: ForkServer | None = None,
        is_urgent: Callable[[Pod], bool] = lambda _: True,
    ) -> Pod:
        assert self.session is not None
        directory: Path = self.places.pod(name)
        return Pod(name, plan, directory, self.session, on_change, on_exit, fork_server, self.limiter, self._devices, is_urgent)

    def free_port(self) -> int:
        """A loopback port that nobody has, and that no other pod was just given."""
        while True:
            with socket.socket() as probe:
                probe.bind((HOST, 0))
                port: int = probe.getsockname()[1]
            if port not in self._ports:
                self._ports.append(port)
                return port
