"""What is looked at again and again, for as long as the platform runs."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from knative.local.tasks import Tasks, describe

LONGEST_PAUSE_S = 10.0  # while it fails, if it is not done more seldom than that anyway


class Again:
    """Does something every so many seconds, from `start` to `stop`. A time that fails is told once, and it goes on, less often."""

    def __init__(self, name: str, do: Callable[[], Coroutine[Any, Any, object]], every_s: float, tell: Callable[[str], object]) -> None:
        """name: what is done, in words for a person. tell: told that it fails, and when it does not any more."""
        self.problem: str | None = None  # of the last time
        self._name = name
        self._do = do
        self._every_s = every_s
        self._tell = tell
        self._tasks = Tasks(self._failed)
        self._is_started = False

    def start(self) -> None:
        """Begin, if it has not begun."""
        if not self._is_started:
            self._is_started = True
            self._tasks.start(self._run(), self._name)

    async def stop(self) -> None:
        """End it, in the middle of whatever it does."""
        await self._tasks.stop()

    async def _run(self) -> None:
        pause_s = self._every_s
        while True:
            doing = self._tasks.start(self._do(), self._name)
            await asyncio.wait({doing})
            if doing.cancelled() or doing.exception():
                pause_s = max(min(pause_s * 2, LONGEST_PAUSE_S), self._every_s)
            else:
                pause_s = self._every_s
                if self.problem:
                    self.problem = None
                    self._tell(f"{self._name} works again")
            await asyncio.sleep(pause_s)

    def _failed(self, name: str, error: Exception) -> None:
        text = describe(name, error)
        if text != self.problem:
            self._tell(text)
        self.problem = text
