"""When manifests are read again: a file was written, SIGHUP came, or somebody has asked for it."""

import asyncio
import os
import signal
from collections.abc import Callable

LOOK_S = 0.5  # between two looks; a change counts once it is the same in two, so that nothing half-written is read


class Watch:
    """Waits for changes of files, without end."""

    def __init__(self, stamp: Callable[[], object], first: object) -> None:
        """stamp: something that is different once a file has changed; it reads, so not in the loop. first: what it was at the start."""
        self._look = stamp
        self._stamp = first
        self._told = asyncio.Event()
        self._by = ""
        self._had_terminal = _has_terminal()

    @property
    def hung_up(self) -> bool:
        """Whether our terminal is gone, which is a SIGHUP too."""
        return self._had_terminal and not _has_terminal()

    def listen(self) -> None:
        """Take SIGHUP for a change, also one that has come before and was blocked."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.ask, "SIGHUP")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def ask(self, by: str) -> None:
        """Have all be read again, changed or not. by: who wants it, for people."""
        self._by = by
        self._told.set()

    async def changed(self) -> str:
        """Returns when something has changed, or somebody asks: who, nothing if nobody did."""
        before = self._stamp
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._told.wait()
                self._told.clear()
                self._stamp = await asyncio.to_thread(self._look)
                return self._by
            except TimeoutError:
                stamp = await asyncio.to_thread(self._look)
                if stamp == before != self._stamp:
                    self._stamp = stamp
                    return ""
                before = stamp


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
