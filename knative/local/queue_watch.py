"""What is in the queues: those of the embedded server and those of the sources, asked every few seconds."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp

from knative.local.again import Again
from knative.local.embedded import EmbeddedServer
from knative.local.queues import EMBEDDED, Depth, Queue, QueueError, queue_name
from knative.local.source import LiveSource
from weights_cache.environment import masked

LOOK_S = 3.0  # between two looks; each is two requests for each queue
ANSWER_S = 2.0  # for one of them
ASKED_AT_ONCE = 4


class QueueWatch:
    """Asks, and remembers the latest answers."""

    def __init__(self, sources: Callable[[], Iterable[LiveSource]], session: aiohttp.ClientSession, tell: Callable[[str], object]) -> None:
        """sources: those of each moment. tell: what goes wrong in looking, for a person; what a queue says is in the status."""
        self.embedded: EmbeddedServer | None = None  # once there is one
        self._sources = sources
        self._session = session
        self._found: dict[str, Depth | str] = {}  # by address: what is in it, or why that is not known
        self._threads = ThreadPoolExecutor(ASKED_AT_ONCE, "queues")
        self._looking = Again("the look at the queues", self._look, LOOK_S, tell)

    def start(self) -> None:
        """Look from now on."""
        self._looking.start()

    async def stop(self) -> None:
        """Returns once nothing is asked any more: a queue that does not answer is waited for as long as any other time."""
        await self._looking.stop()
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    def status(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The entries `queue_sources` and `queues` of `/api/status`."""
        sources = [live.status() | self._describe(live.queue_url, live.oldest_held_s, live.problem) for live in self._sources()]
        return sources, [
            {"name": queue_name(url), "url": masked(url)} | self._describe(url) for url in sorted(self._wanted(), key=queue_name)
        ]

    def _describe(self, url: str | None, oldest_s: float | None = None, problem: str | None = None) -> dict[str, Any]:
        """oldest_s: the age of the oldest message as far as that is known, where the queue is not embedded. problem: its source's own."""
        found = self._found.get(url or "")
        depth = found if isinstance(found, Depth) else None
        if url and self._is_embedded(url):
            sent_at = self.embedded.oldest.get(queue_name(url)) if self.embedded else None
            oldest_s = None if sent_at is None else max(0.0, time.time() - sent_at)
        return {
            "depth": depth and depth.waiting,
            "in_flight": depth and depth.in_flight,
            "oldest_age_s": None if oldest_s is None else round(oldest_s, 1),
            "dead": depth and depth.dead,
            "problem": problem or (found if isinstance(found, str) else None),
        }

    def _is_embedded(self, url: str) -> bool:
        return self.embedded is not None and url.startswith(f"{self.embedded.address}/")

    def _wanted(self) -> dict[str, Mapping[str, str]]:
        """The environment that counts, for each queue."""
        embedded = {self.embedded.queue_url(name): EMBEDDED for name in self.embedded.queues} if self.embedded else {}
        return {live.queue_url: live.env for live in self._sources() if live.queue_url} | embedded

    async def _look(self) -> None:
        wanted = self._wanted()
        self._found = {url: found for url, found in self._found.items() if url in wanted}
        asked = [self._ask(url, env) for url, env in wanted.items()]
        done = await asyncio.gather(*asked, *(live.count(self._session) for live in self._sources()), return_exceptions=True)
        for failure in done:
            if failure:  # after all of them, since one says nothing of the others
                raise failure

    async def _ask(self, url: str, env: Mapping[str, str]) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._found[url] = await loop.run_in_executor(self._threads, lambda: Queue(url, env, answer_s=ANSWER_S).depth())
        except QueueError as error:
            self._found[url] = str(error)
