"""One file of the cache, from its first byte to its publication.

A blob is filled in place as `<id>.part` at its full size, so that readers can map it before it is complete; beside it
`<id>.part.state` has one byte for each chunk, 1 once the chunk is there. The writer holds a kernel lock on the part, which
dies with it, so a neighbour can carry on from the chunks that are there.
"""

import errno
import fcntl
import mmap
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from weights_cache.errors import CacheError

CHUNK_BYTES = 1 << 20  # the unit of resume and of what a reader waits for

_STATE_HEADER_BYTES = 128


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _header_of(part: os.stat_result) -> bytes:
    return f"relight-part 1 {_boot_id()} {part.st_ino}\n".encode().ljust(_STATE_HEADER_BYTES)


def _state_bytes(size: int) -> int:
    return _STATE_HEADER_BYTES - (-size // CHUNK_BYTES)


def unique(path: Path) -> Path:
    """A name beside `path` that nobody else uses, for a draft that is renamed into place."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextmanager
def _explained(path: Path, size: int) -> Iterator[None]:
    """Turn what the system says while `path` is made with `size` bytes into a CacheError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = os.statvfs(path.parent)
            raise CacheError(
                f"no room for {path.name} in {path.parent}: {size:,} bytes needed, {free.f_bavail * free.f_frsize:,} free"
            ) from error
        raise CacheError(f"{path.parent}: {error.strerror or error}; the cache must be a directory this user may write to") from error


class Blob:
    """A blob by name: whether and how far it is there. Opens nothing by itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.state = path.with_name(path.name + ".part.state")

    def is_complete(self) -> bool:
        """Whether the blob was published."""
        return self.path.exists()

    def is_being_filled(self) -> bool:
        """Whether a process holds the part's lock right now."""
        try:
            fd = os.open(self.part, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            return False
        finally:
            os.close(fd)

    def reserve(self, size: int) -> None:
        """Make the part at its full size, unless it or the complete blob is there already.

        The space is taken now: a mapping of a file without space behind it dies of SIGBUS instead of an error.
        Raises CacheError, saying what was needed and what is free, when there is no room.
        """
        if self.is_complete() or self.part.exists():
            return
        with _explained(self.path, size):
            draft = unique(self.part)
            try:
                with draft.open("wb") as file:
                    if size:
                        os.posix_fallocate(file.fileno(), 0, size)
                with suppress(FileExistsError):  # unlike a rename, a link never takes the place of a neighbour's part
                    os.link(draft, self.part)
            finally:
                draft.unlink(missing_ok=True)


class ChunkMap:
    """Which chunks of a part are there, shared by all processes that map the same state file."""

    def __init__(self, fd: int, size: int, *, writable: bool = False) -> None:
        self.size = size
        self.chunks = -(-size // CHUNK_BYTES)
        self._map = mmap.mmap(fd, _STATE_HEADER_BYTES + self.chunks, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)

    @classmethod
    def open(cls, blob: Blob, part: os.stat_result | None = None) -> "ChunkMap | None":
        """The map of a part that somebody fills, to read; None if nobody has begun since the machine started, or all is done.

        part: the very file the map must be of, if the caller has opened one.
        """
        try:
            part = part or blob.part.stat()
            with blob.state.open("rb") as file:
                if os.fstat(file.fileno()).st_size != _state_bytes(part.st_size):
                    return None
                chunks = cls(file.fileno(), part.st_size)
        except FileNotFoundError:
            return None
        return chunks if chunks._header() == _header_of(part) else None

    @classmethod
    def open_for_writing(cls, blob: Blob, size: int, part_fd: int) -> "ChunkMap":
        """The map of the part that is open as `part_fd` and whose lock the caller holds; made, or emptied, if it is not this part's.

        The map is this part's if it names its inode and the machine has not restarted since: after a power cut, data may not have
        reached the disk although the map did.
        """
        with _explained(blob.state, _state_bytes(size)):
            fd = os.open(blob.state, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(fd, _state_bytes(size))
                os.posix_fallocate(fd, 0, _state_bytes(size))
                chunks = cls(fd, size, writable=True)
            finally:
                os.close(fd)
        header = _header_of(os.fstat(part_fd))
        if chunks._header() != header:
            chunks._map[:] = header + bytes(chunks.chunks)
        return chunks

    def _header(self) -> bytes:
        return self._map[:_STATE_HEADER_BYTES]

    def set(self, chunk: int) -> None:
        """The chunk's bytes are in the file now."""
        self._map[_STATE_HEADER_BYTES + chunk] = 1

    def has(self, chunk: int) -> bool:
        """Whether the chunk's bytes are in the file."""
        return self._map[_STATE_HEADER_BYTES + chunk] == 1

    def has_range(self, start: int, stop: int) -> bool:
        """Whether the bytes from `start` to `stop` are all in the file."""
        if start >= stop:
            return True
        first, last = start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)
        return self._map.find(b"\0", _STATE_HEADER_BYTES + first, _STATE_HEADER_BYTES + last) < 0

    def bytes_there(self) -> int:
        """How many bytes of the file are there."""
        flags = self._map[_STATE_HEADER_BYTES:]
        count = flags.count(1)
        tail_missing = self.chunks * CHUNK_BYTES - self.size if self.chunks and flags[-1] else 0
        return count * CHUNK_BYTES - tail_missing

    def missing(self, part_bytes: int) -> Iterator[tuple[int, int]]:
        """Byte ranges [start, stop) that are not there, none longer than `part_bytes` rounded up to whole chunks."""
        limit = max(1, -(-part_bytes // CHUNK_BYTES))
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


class BlobWriter:
    """The right to fill one blob: holds the part's lock from `acquire` to `close` or `publish`."""

    def __init__(self, blob: Blob, fd: int, chunks: ChunkMap) -> None:
        self.blob = blob
        self.chunks = chunks
        self._fd = fd

    @classmethod
    def try_acquire(cls, blob: Blob, size: int) -> "BlobWriter | None":
        """The writer of `blob`, or None while another process is writing it or once it is complete."""
        blob.reserve(size)
        try:
            fd = os.open(blob.part, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None  # published between the two lines
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The name may have moved on while we opened it: the lock counts only if it is on what the name stands for.
            if os.fstat(fd).st_ino != os.stat(blob.part).st_ino:  # noqa: PTH116  the same call for both
                raise FileNotFoundError
            if blob.is_complete():  # published between our look and our reserve: what we hold is a second part, which nobody needs
                blob.part.unlink()
                raise FileNotFoundError
            if os.fstat(fd).st_size != size:
                raise CacheError(f"{blob.part} has {os.fstat(fd).st_size} bytes, expected {size}; remove it")
            chunks = ChunkMap.open_for_writing(blob, size, fd)
        except (BlockingIOError, FileNotFoundError):
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return cls(blob, fd, chunks)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write one chunk's bytes (or fewer at the file's end) at `offset`, which begins a chunk, and let readers have it."""
        view = memoryview(data)
        at = offset
        while view:
            written = os.pwrite(self._fd, view, at)
            view, at = view[written:], at + written
        self.chunks.set(offset // CHUNK_BYTES)

    def publish(self) -> None:
        """Make the complete blob appear under its own name."""
        assert self.chunks.has_range(0, self.chunks.size), f"{self.blob.path.name} published before it was complete"
        os.fchmod(self._fd, 0o444)
        os.fsync(self._fd)
        # In this order a crash in between costs a download; the other way round it could leave a map of chunks that are not there.
        self.blob.state.unlink(missing_ok=True)
        self.blob.part.rename(self.blob.path)
        self.close()

    def close(self) -> None:
        """Give the lock back; what was written stays for the next writer."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "BlobWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
