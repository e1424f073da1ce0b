"""What a process of ours has before the server begins: standard files that work, output that appears at once, room for open files."""

import importlib
import io
import os
import resource
import select
import sys
from collections.abc import Iterator
from itertools import dropwhile, zip_longest
from pathlib import Path
from types import TracebackType
from typing import TextIO

OPEN_FILES = 65_536  # more are of no use to us, and some programs close each number below the limit before they start

_IMPORTS = ("<frozen importlib", importlib.__file__)  # where the files of frames begin that are Python's import
_OURS = Path(__file__).parent  # the agents that come with us are in a folder of their own

_SIGNALS_ELSEWHERE = (
    "an agent runs in a thread of its own, and only the main thread of a process may set signal handlers: leave that out, "
    "or do it in a process of the agent's own (multiprocessing, subprocess)"
)


def prepare() -> None:
    """Make this process fit to run agents in."""
    _open_standard_files()
    sys.stdout = sys.__stdout__ = _appearing_at_once(1, sys.stdout)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _appearing_at_once(2, sys.stderr)  # type: ignore[misc]
    _allow_open_files()


def explain(error: BaseException | None) -> str | None:
    """What an agent's author is to know of an error that says too little itself; None if it says enough."""
    for cause in _chain(error):
        if isinstance(cause, ValueError | RuntimeError) and "only works in main thread" in str(cause):
            return _SIGNALS_ELSEWHERE
    return None


def trim(error: BaseException) -> None:
    """Take out of an agent's error, and of those it came from, what its author cannot change: our way to the agent, and Python's import."""
    for one in _chain(error):
        frames = [frame for frame in _frames(one.__traceback__) if not frame.tb_frame.f_code.co_filename.startswith(_IMPORTS)]
        theirs = list(dropwhile(lambda frame: Path(frame.tb_frame.f_code.co_filename).parent == _OURS, frames))
        if not theirs and not isinstance(one, SyntaxError):  # which says itself where it is
            continue
        for frame, following in zip_longest(theirs, theirs[1:]):
            frame.tb_next = following
        one.__traceback__ = theirs[0] if theirs else None


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback:
        yield traceback
        traceback = traceback.tb_next


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _open_standard_files() -> None:
    """Have something behind 0, 1 and 2: what is opened later would get these numbers, and each child would read and write it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free, so this one
    if sys.stdin is None:
        sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115  it stays


class _WholeFile(io.FileIO):
    """A file that takes all of what is written to it, and has no lock.

    Python's own buffers have one, which a thread holds while it writes; a child that another thread forks just then has it locked for ever.
    """

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        """All of it."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            try:
                written = super().write(left)
            except OSError:  # nobody takes it: the disk is full, or its reader is gone; that is no fault of who prints
                return size
            if written is None:  # somebody has made it non-blocking
                _wait_for_room(self.fileno())
            else:
                left = left[written:]
        return size


def _wait_for_room(file: int) -> None:
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    poll.poll()


def _appearing_at_once(number: int, instead_of: TextIO | None) -> io.TextIOWrapper:
    """Standard output or error: each line is written when it ends, whatever PYTHONUNBUFFERED says, and no text is refused."""
    encoding = "utf-8"
    if instead_of is not None:
        instead_of.flush()
        encoding = instead_of.encoding
    return io.TextIOWrapper(_WholeFile(number, "w", closefd=False), encoding, "backslashreplace", line_buffering=True)


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
