"""The logs of pods, also of those that are gone: which there are, their last lines, and what is added to them."""

import asyncio
import contextlib
import re
import stat
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOOK_S = 0.25
PIECE_BYTES = 64 * 1024
TAIL_BYTES = 1024 * 1024  # the most that is read back
# What a name may be made of: no separator, and none begins with a dot.
_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True)
class LogFile:
    """One container's output."""

    namespace: str
    pod: str
    container: str
    bytes: int
    changed_at: float  # seconds since the epoch


class Logs:
    """What lies in a state directory's `logs/<namespace>/<pod>/<container>.log`, and nothing else."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def list(self) -> list[dict[str, Any]]:
        """All of them, the latest first."""
        found = []
        for path in self._directory.glob("*/*/*.log"):
            try:
                about = path.lstat()
            except OSError:
                continue  # removed meanwhile
            if not stat.S_ISREG(about.st_mode):
                continue  # see find
            namespace, pod, _ = path.relative_to(self._directory).parts
            found.append(LogFile(namespace, pod, path.stem, about.st_size, about.st_mtime))
        return [asdict(file) for file in sorted(found, key=lambda file: -file.changed_at)]

    def find(self, namespace: str, pod: str, container: str) -> Path | None:
        """The file, or None if there is none of that name."""
        if not all(_NAME.fullmatch(name) for name in (namespace, pod, container)):
            return None
        path = self._directory / namespace / pod / f"{container}.log"
        return path if path.is_file() and path.resolve().is_relative_to(self._directory.resolve()) else None

    async def read(self, path: Path, lines: int, until: asyncio.Event | None = None) -> AsyncGenerator[bytes, None]:
        """The last lines of a file, and what is added to it until an event is set or the file is removed."""
        with path.open("rb") as file:
            end = file.seek(0, 2)
            begin = max(0, end - TAIL_BYTES) if lines else end
            file.seek(begin)
            yield _last(file.read(end - begin), lines)
            while until and not until.is_set():
                try:
                    if path.stat().st_size < end:
                        end = 0  # it was long and has been put aside
                except FileNotFoundError:
                    return
                file.seek(end)
                if piece := file.read(PIECE_BYTES):
                    end += len(piece)
                    yield piece
                else:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(until.wait(), LOOK_S)


def _last(text: bytes, lines: int) -> bytes:
    """The last lines; a line ends where its program said so, and not at the carriage returns of a bar that shows progress."""
    begin = len(text)
    for _ in range(lines):
        begin = text.rfind(b"\n", 0, max(0, begin - 1)) + 1
        if not begin:
            break
    return text[begin:]
