"""Standard output that nobody has to read: a full pipe or a stopped terminal holds nothing up, and one that is gone is no error."""

import asyncio
import contextlib
import errno
import io
import os
import select
import stat
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

BACKLOG_BYTES = 256 * 1024  # that wait for somebody to read them; what comes then is left out
_PIECE = 4096  # bytes that a pipe takes at once when it has room for any
PATIENCE_S = 0.2  # for each write once it is closed, so that the last words are said


class PatientStream(io.TextIOBase):
    """Writes to a stream's descriptor as much as it takes at once, and the rest as soon as it takes more. Used in one event loop."""

    def __init__(self, stream: TextIO, show: Callable[[str], str] = str) -> None:
        """show: makes of each text that is written the one that is seen."""
        self._stream = stream
        self._show = show
        self._fd = _own(stream.fileno())
        self._waiting: deque[bytes] = deque()
        self._size = 0  # bytes of these
        self._left_out = 0  # writes
        self._loop: asyncio.AbstractEventLoop | None = None  # while it tells us when to go on
        self._is_gone = False
        self._is_last = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Whether a person reads it."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def write(self, text: str) -> int:
        """Never waits and never fails; characters that the stream's encoding lacks are escaped."""
        if not self._is_gone and text:
            if self._size < BACKLOG_BYTES:
                self._keep(self._show(text))
            else:
                self._left_out += 1
            self.flush()
        return len(text)

    def flush(self) -> None:
        """As much as is possible now."""
        until = time.monotonic() + (PATIENCE_S if self._is_last else 0)
        while self._waiting and self._is_ready(until):
            piece = self._waiting.popleft()
            try:
                written = os.write(self._fd, piece[:_PIECE])
            except BlockingIOError:
                self._waiting.appendleft(piece)
                break
            except OSError as error:
                self._is_gone = error.errno not in (errno.ENOSPC, errno.EDQUOT)  # a full disk may have room again
                written = len(piece)
            self._size -= written
            if written < len(piece):
                self._waiting.appendleft(piece[written:])
            elif self._left_out and not self._waiting:
                left_out, self._left_out = self._left_out, 0
                self._keep(f"… {left_out} lines were left out: nobody read them\n")
        if self._is_gone:
            self._waiting.clear()
        self._watch()

    def close(self) -> None:
        """What is written from now on is waited for a little."""
        self._is_last = True
        self.flush()

    def _keep(self, text: str) -> None:
        self._waiting.append(text.encode(self.encoding, "backslashreplace"))
        self._size += len(self._waiting[-1])

    def _is_ready(self, until: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(max(0.0, until - time.monotonic()) * 1000))

    def _watch(self) -> None:
        wanted = bool(self._waiting) and not self._is_last
        if wanted and self._loop is None:
            with contextlib.suppress(RuntimeError, OSError):  # there is no loop, or it cannot watch this
                loop = asyncio.get_running_loop()
                loop.add_writer(self._fd, self.flush)
                self._loop = loop
        elif self._loop and not wanted:
            self._loop.remove_writer(self._fd)
            self._loop = None


def _own(fd: int) -> int:
    """The same pipe or terminal by a description of our own, on which a write does not wait; others who have it are not to notice."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with contextlib.suppress(OSError):  # of another user, or there is no /proc
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return fd
