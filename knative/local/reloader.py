"""Takes what changes while the platform runs, in the manifests or in what they run: all of it, or nothing."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import chain
from typing import Protocol

from rich.markup import escape

from knative.local.code import listed
from knative.local.content import changed_files
from knative.local.errors import PlatformError
from knative.local.manifest import Manifests, Service
from knative.local.tasks import describe
from knative.local.terminal import Terminal
from knative.local.watch import Watch

# Prepares what manifests say, or raises PlatformError before it has changed anything; what it returns has it done.
Prepare = Callable[[Manifests], Awaitable[Callable[[], Awaitable[object]]]]


class Readable(Protocol):
    """Where manifests come from; see manifest.Sources."""

    @property
    def can_change(self) -> bool:
        """Whether another look may find something else."""

    def read(self) -> Manifests:
        """What they say now. Raises ManifestError."""

    def stamp(self) -> object:
        """Something that is different once they have changed."""


class Reloader:
    """Reads the manifests, and what they run, at the start, and whenever a file has changed or somebody asks (SIGHUP, the dashboard)."""

    def __init__(
        self,
        sources: Readable,
        check: Callable[[Manifests], object],
        content: Callable[[Service], Service],
        weights: Callable[[], object],
        terminal: Terminal,
        *,
        takes_content: bool = False,
    ) -> None:
        """check: raises PlatformError for what cannot run here. content: see content.with_content. weights: their stamps.

        takes_content: whether code and weights are taken as soon as they have changed. Raises PlatformError for a mistake in the manifests.
        """
        self.problem: str | None = None  # with the manifests as they are now
        self._sources = sources
        self._check = check
        self._content = content
        self._weights = weights
        self._terminal = terminal
        self._takes_content = takes_content
        self._sources_stamp, stamps = sources.stamp(), weights()  # first: what changes while they are read is seen
        self.manifests = self._read()
        self._watch = Watch(self._stamp, (self._sources_stamp, [service.code for service in self.manifests.services], stamps))

    def _read(self) -> Manifests:
        manifests = self._sources.read()
        self._check(manifests)
        manifests.services = [self._content(service) for service in manifests.services]
        return manifests

    def _stamp(self) -> object:
        return self._sources.stamp(), [service.code and service.code.now() for service in self.manifests.services], self._weights()

    def listen(self) -> None:
        """Take SIGHUP from now on; it is acted upon by `run`."""
        self._watch.listen()

    def ask(self) -> None:
        """Have all be read again, for the dashboard."""
        self._watch.ask("asked for")

    async def run(self, prepare: Prepare, notice: Callable[[Manifests], bool], hung_up: Callable[[], object]) -> None:
        """Without end. hung_up: called when our terminal is gone.

        notice: told of code or weights that have changed; whether they are to be taken now all the same.
        """
        while True:
            by = await self._watch.changed()
            stamp = await asyncio.to_thread(self._sources.stamp)
            if by and self._watch.hung_up:
                hung_up()
            elif by == "SIGHUP" and not self._sources.can_change and not await self._has_other_content():
                self._terminal.note(
                    "SIGHUP: the manifests came from standard input, which cannot be read again; name a file to be able to change them"
                )
            elif by or stamp != self._sources_stamp:
                self._sources_stamp = stamp
                await self._reload(prepare, f"manifests read again{f' ({by})' if by else ''}")
            elif self._takes_content or await self._notice(notice):
                await self._reload(prepare)

    async def _has_other_content(self) -> bool:
        now = await asyncio.to_thread(lambda: list(map(self._content, self.manifests.services)))
        return now != self.manifests.services

    async def _notice(self, notice: Callable[[Manifests], bool]) -> bool:
        try:
            return notice(await asyncio.to_thread(self._read))
        except PlatformError:  # a manifest is written just now; that is a change of its own
            return False

    async def _reload(self, prepare: Prepare, what: str = "") -> None:
        """what: why, for people; if it is nothing, what has changed says so."""
        try:
            manifests = await asyncio.to_thread(self._read)
            take = await prepare(manifests)
        except Exception as error:  # noqa: BLE001  what runs goes on, whatever is wrong with what was just saved
            self.problem = str(error) if isinstance(error, PlatformError) else describe("reading the manifests", error)
            self._terminal.say(f"[red]nothing was changed[/]: {escape(self.problem)}")
            return
        if not what:
            before = {(service.namespace, service.name): service for service in self.manifests.services}
            files = [changed_files(old, new) for new in manifests.services if (old := before.get((new.namespace, new.name)))]
            what = f"{listed(sorted(set(chain.from_iterable(files))))} changed"
        self.manifests, self.problem = manifests, None
        self._terminal.say(f"[dim]{escape(what)}[/]")
        try:
            await take()
        except Exception as error:  # noqa: BLE001  what runs goes on, and the user is told
            self.problem = describe("taking what the manifests say", error)
            self._terminal.note(self.problem)
