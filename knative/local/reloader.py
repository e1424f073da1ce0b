"""Takes what changes in the manifests while the platform runs: all of what they say, or nothing."""

import asyncio
from collections.abc import Awaitable, Callable

from rich.markup import escape

from knative.local.errors import PlatformError
from knative.local.manifest import Manifests, Sources
from knative.local.tasks import describe
from knative.local.terminal import Terminal
from knative.local.watch import Watch

# Prepares what manifests say, or raises PlatformError before it has changed anything; what it returns has it done.
Prepare = Callable[[Manifests], Awaitable[Callable[[], Awaitable[object]]]]


class Reloader:
    """Reads the manifests at the start, and whenever a file has changed or SIGHUP came."""

    def __init__(self, sources: Sources, check: Callable[[Manifests], object], terminal: Terminal) -> None:
        """check: raises PlatformError for what cannot run here. Raises PlatformError for a mistake in the manifests."""
        self.problem: str | None = None  # with the manifests as they are now
        self._watch = Watch(sources)  # first: what changes while they are read is seen
        self._sources = sources
        self._check = check
        self._terminal = terminal
        self.manifests = self._read()

    def _read(self) -> Manifests:
        manifests = self._sources.read()
        self._check(manifests)
        return manifests

    async def run(self, prepare: Prepare, hung_up: Callable[[], object]) -> None:
        """Without end. hung_up: called when our terminal is gone."""
        self._watch.listen()
        while True:
            by_signal = await self._watch.changed()
            if self._watch.hung_up:
                hung_up()
            elif self._sources.can_change:
                await self._reload(prepare, by_signal=by_signal)
            else:
                self._terminal.note(
                    "SIGHUP: the manifests came from standard input, which cannot be read again; name a file to be able to change them"
                )

    async def _reload(self, prepare: Prepare, *, by_signal: bool) -> None:
        try:
            manifests = await asyncio.to_thread(self._read)
            take = await prepare(manifests)
        except Exception as error:  # noqa: BLE001  what runs goes on, whatever is wrong with what was just saved
            self.problem = str(error) if isinstance(error, PlatformError) else describe("reading the manifests", error)
            self._terminal.say(f"[red]nothing was changed[/]: {escape(self.problem)}")
            return
        self.manifests, self.problem = manifests, None
        self._terminal.say(f"[dim]manifests read again{' (SIGHUP)' if by_signal else ''}[/]")
        try:
            await take()
        except Exception as error:  # noqa: BLE001  what runs goes on, and the user is told
            self.problem = describe("taking what the manifests say", error)
            self._terminal.note(self.problem)
