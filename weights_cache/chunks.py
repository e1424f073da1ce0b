"""The record of a file's chunks: which of them are there, and the digest of each.

    128 bytes   `relight-chunks 2 <boot id | synced> <inode> <size>`, padded with spaces
    n bytes     one flag for each chunk
    8 n bytes   the chunk's digest (see `digest`), big-endian; 0 where it was never written

While a file is being filled all its readers map the record; once it is complete the record stays, to find damage later. What a
record says counts for the file with that inode and size until the machine restarts: after a power cut, data may not have reached the
disk although the record did. `synced` says that data and record have reached it, and holds for ever.
"""

import mmap
import os
from collections.abc import Iterator
from enum import IntEnum
from functools import cache
from pathlib import Path

CHUNK_BYTES = 1 << 20  # the unit of digest, of resume, and of what a reader waits for
DIGEST_BYTES = 8

_HEADER_BYTES = 128


class Flag(IntEnum):
    """What is known of a chunk."""

    MISSING = 0
    VALID = 1
    CLAIMED = 2  # written before the machine restarted: valid if its digest still agrees
    WRONG = 3  # handed out, and found to be damaged in the store: fails every reader


@cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _header(file: os.stat_result) -> bytes:
    return f"relight-chunks 2 {_boot_id()} {file.st_ino} {file.st_size}\n".encode().ljust(_HEADER_BYTES)


def _synced_header(file: os.stat_result) -> bytes:
    return f"relight-chunks 2 synced 0 {file.st_size}\n".encode().ljust(_HEADER_BYTES)


def count_chunks(size: int) -> int:
    """How many chunks a file of `size` bytes has."""
    return -(-size // CHUNK_BYTES)


def record_bytes(size: int) -> int:
    """The length of the record of a file of `size` bytes."""
    return _HEADER_BYTES + count_chunks(size) * (1 + DIGEST_BYTES)


def vouches_for(record: Path, file: os.stat_result) -> bool:
    """Whether a record says of a complete file, whose stat this is, that nothing can have happened to it since."""
    try:
        with record.open("rb", buffering=0) as opened:
            found = opened.read(_HEADER_BYTES)
            length = os.fstat(opened.fileno()).st_size
    except FileNotFoundError:
        return False
    return length == record_bytes(file.st_size) and (found == _synced_header(file) or found == _header(file))


class ChunkMap:
    """A record, shared by all processes that map the same file."""

    def __init__(self, fd: int, size: int, *, writable: bool = False) -> None:
        self.size = size
        self.chunks = count_chunks(size)
        self._digests = _HEADER_BYTES + self.chunks
        self._map = mmap.mmap(fd, record_bytes(size), access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)

    @classmethod
    def open(cls, record: Path, file: os.stat_result, *, complete: bool = False) -> "ChunkMap | None":
        """The record of a file whose stat this is, to read; None if there is none, or it is of another file or of another time.

        complete: the record is that of a complete file, which counts whatever has happened since.
        """
        try:
            with record.open("rb") as opened:
                if os.fstat(opened.fileno()).st_size != record_bytes(file.st_size):
                    return None
                found = cls(opened.fileno(), file.st_size)
        except FileNotFoundError:
            return None
        return found if complete or found._map[:_HEADER_BYTES] == _header(file) else None

    @classmethod
    def open_for_writing(cls, record: Path, file: os.stat_result) -> "ChunkMap":
        """The record of the file whose stat this is, made if there is none. The caller holds the file's lock.

        In one of another file or of an earlier boot, what was valid is now only claimed. Raises OSError.
        """
        size, header = record_bytes(file.st_size), _header(file)
        try:
            with record.open("rb") as opened:
                before = opened.read(size + 1)  # one more: a longer one is of another file
        except FileNotFoundError:
            before = b""
        is_same = len(before) == size and before[:_HEADER_BYTES] == header
        if not is_same:
            record.unlink(missing_ok=True)  # never changed under those who have mapped it: it goes on to tell them of the file they read
        fd = os.open(record, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(fd, 0, size)
            found = cls(fd, file.st_size, writable=True)
        finally:
            os.close(fd)
        if not is_same:
            if len(before) == size:
                flags = before[_HEADER_BYTES : found._digests]
                found._map[found._digests :] = before[found._digests :]
                found._map[_HEADER_BYTES : found._digests] = bytes(
                    Flag.CLAIMED if flag in (Flag.VALID, Flag.CLAIMED) else 0 for flag in flags
                )
            found._map[:_HEADER_BYTES] = header
        return found

    def set(self, chunk: int, digest: int) -> None:
        """The chunk's bytes are in the file now, and this is their digest."""
        at = self._digests + chunk * DIGEST_BYTES
        self._map[at : at + DIGEST_BYTES] = digest.to_bytes(DIGEST_BYTES, "big")
        self.flag(chunk, Flag.VALID)  # last: whoever sees it may read

    def flag(self, chunk: int, flag: Flag) -> None:
        """Say something else of the chunk; its digest stays."""
        self._map[_HEADER_BYTES + chunk] = flag

    def digest(self, chunk: int) -> int:
        """The digest that was recorded for the chunk."""
        at = self._digests + chunk * DIGEST_BYTES
        return int.from_bytes(self._map[at : at + DIGEST_BYTES], "big")

    def has(self, chunk: int) -> bool:
        """Whether the chunk's bytes are in the file."""
        return self._map[_HEADER_BYTES + chunk] == Flag.VALID

    def has_range(self, start: int, stop: int) -> bool:
        """Whether the bytes from `start` to `stop` are all in the file."""
        if start >= stop:
            return True
        first, last = start // CHUNK_BYTES, count_chunks(stop)
        return self._map[_HEADER_BYTES + first : _HEADER_BYTES + last].count(Flag.VALID) == last - first

    def is_wrong(self) -> bool:
        """Whether the file was found to be damaged in the store after some of it had been handed out."""
        return self._map.find(bytes([Flag.WRONG]), _HEADER_BYTES, self._digests) >= 0

    def claimed(self) -> list[int]:
        """The chunks that an earlier boot left behind and nobody has checked yet."""
        return [chunk for chunk in range(self.chunks) if self._map[_HEADER_BYTES + chunk] == Flag.CLAIMED]

    def bytes_there(self) -> int:
        """How many bytes of the file are there."""
        flags = self._map[_HEADER_BYTES : self._digests]
        count = flags.count(Flag.VALID)
        tail_missing = self.chunks * CHUNK_BYTES - self.size if self.chunks and flags[-1] == Flag.VALID else 0
        return count * CHUNK_BYTES - tail_missing

    def missing(self, part_bytes: int) -> Iterator[tuple[int, int]]:
        """Byte ranges [start, stop) that are not there, none longer than `part_bytes` rounded up to whole chunks."""
        limit = max(1, count_chunks(part_bytes))
        chunk = 0
        while chunk < self.chunks:
            if self.has(chunk):
                chunk += 1
                continue
            end = chunk
            while end < self.chunks and end - chunk < limit and not self.has(end):
                end += 1
            yield chunk * CHUNK_BYTES, min(end * CHUNK_BYTES, self.size)
            chunk = end


def sync(record: Path, file: Path) -> None:
    """Bring a complete file and its record to the disk, and have the record say so for ever. Raises OSError."""
    with record.open("r+b", buffering=0) as opened, file.open("rb", buffering=0) as data:
        file_now = os.fstat(data.fileno())
        if opened.read(_HEADER_BYTES) != _header(file_now):
            return  # it is synced already, or of an earlier boot, and then nobody knows what reached the disk
        os.fsync(data.fileno())
        os.fsync(opened.fileno())
        os.pwrite(opened.fileno(), _synced_header(file_now), 0)
        os.fsync(opened.fileno())
