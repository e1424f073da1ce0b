"""When manifests are read again: a file was written, or SIGHUP came."""

import asyncio
import os
import signal

from knative.local.manifest import Sources

LOOK_S = 0.5  # between two looks; a change counts once it is the same in two, so that nothing half-written is read


class Watch:
    """Waits for changes of files, without end."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._stamp = sources.stamp()
        self._told = asyncio.Event()
        self._had_terminal = _has_terminal()

    @property
    def hung_up(self) -> bool:
        """Whether our terminal is gone, which is a SIGHUP too."""
        return self._had_terminal and not _has_terminal()

    def listen(self) -> None:
        """Take SIGHUP for a change."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._told.set)

    async def changed(self) -> bool:
        """Returns when something has changed; whether it was SIGHUP that said so."""
        before = self._stamp
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._told.wait()
                self._told.clear()
                self._stamp = await asyncio.to_thread(self._sources.stamp)
                return True
            except TimeoutError:
                stamp = await asyncio.to_thread(self._sources.stamp)
                if stamp == before != self._stamp:
                    self._stamp = stamp
                    return False
                before = stamp


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
