"""The status document, again and again, for those who watch: made once for all of them, and not at all when there is nobody."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from knative.local.tasks import Tasks

LOOK_S = 0.25  # between two looks, so at most four documents a second
STEADY_S = 1.0  # the same document is sent again after so long: it has the present second's sample, and shows that we live


class Feed:
    """Hands the latest document to any number of listeners; one that reads slowly misses some, and none is kept for it."""

    def __init__(self, document: Callable[[], dict[str, Any]]) -> None:
        self.listeners = 0
        self._document = document
        self._text = ""
        self._changed = asyncio.Condition()
        self._tasks = Tasks(self._failed)
        self._looking: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._closed = False

    async def listen(self) -> AsyncGenerator[str, None]:
        """The document as JSON in one line: now, and whenever it has changed, or a second has passed; ends when the feed is closed.

        Raises RuntimeError if it cannot be made; whoever comes again may find that it can.
        """
        self.listeners += 1
        try:
            if not self._looking:
                self._text = ""  # of those who looked before
                self._looking = self._tasks.start(self._look(), "making the status document")
            last = None
            while not self._closed:
                async with self._changed:
                    await self._changed.wait_for(
                        lambda last=last: self._closed or self._failure or self._text is not last  # type: ignore[misc]
                    )
                    last = self._text
                if self._failure:
                    raise RuntimeError("the status document cannot be made") from self._failure
                if last and not self._closed:
                    yield last
        finally:
            self.listeners -= 1
            if not self.listeners and self._looking:
                self._looking.cancel()
                self._looking = self._failure = None

    async def close(self) -> None:
        """Send everybody home."""
        self._closed = True
        await self._wake()
        await self._tasks.stop()

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _failed(self, _: str, error: Exception) -> None:
        self._failure = error
        self._tasks.start(self._wake(), "telling those who watch")

    async def _look(self) -> None:
        known: dict[str, Any] = {}
        sent_at = 0.0
        loop = asyncio.get_running_loop()
        while True:
            document = self._document()
            if (now := loop.time()) - sent_at >= STEADY_S or document["services"] != known:
                known, sent_at = document["services"], now
                async with self._changed:
                    self._text = json.dumps(document)
                    self._changed.notify_all()
            await asyncio.sleep(LOOK_S)
