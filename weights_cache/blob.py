"""One file of the cache, from its first byte to its last.

A blob is filled in place as `<id>.part` at its full size, so that readers can map it before it is complete; `<id>.part.state` is
the record of its chunks. The writer holds a kernel lock on the part, which dies with it, so a neighbour can carry on from the
chunks that are there. A complete blob has its own name, and its record lies beside the blobs in `digests/`.
"""

import errno
import fcntl
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType

from weights_cache.chunks import CHUNK_BYTES, ChunkMap, Flag, count_chunks, record_bytes, sync, vouches_for
from weights_cache.errors import CacheError
from weights_cache.mapping import LARGE_PAGE_BYTES, MappedFile

LARGE_PAGE_FAILURES = 4  # then the machine has none to give, and asking on would only cost

Digest = Callable[[memoryview | bytes], int]


def unique(path: Path) -> Path:
    """A name beside `path` that nobody else uses, for a draft that is renamed into place."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@cache
def _is_in_memory(folder: Path) -> bool:
    """Whether a folder is on a tmpfs, by the kernel's list of mounts."""
    number = os.stat(folder).st_dev  # noqa: PTH116  as the list has it
    device = f"{os.major(number)}:{os.minor(number)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == device:
            return source.split()[0] in ("tmpfs", "ramfs")
    return False


def is_locked(path: str | os.PathLike[str], kind: int) -> bool:
    """Whether somebody holds a lock on a file or folder that rules out one of this kind (LOCK_SH or LOCK_EX); looking takes it briefly."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def free_bytes(folder: Path) -> int:
    """How much this user may still write where `folder` is."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@contextmanager
def explained(path: Path, size: int) -> Iterator[None]:
    """Turn what the system says while `path` is made or written with `size` bytes into a CacheError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CacheError(
                f"no room for {path.name} in {path.parent}: {size:,} bytes needed, {free_bytes(path.parent):,} free"
            ) from error
        raise CacheError(f"{path.parent}: {error.strerror or error}; the cache must be a directory this user may write to") from error


class Blob:
    """A blob by name: whether and how far it is there. Opens nothing by itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.state = path.with_name(path.name + ".part.state")
        self.record = path.parent.parent / "digests" / path.name

    def is_complete(self) -> bool:
        """Whether the blob was published, and nothing can have happened to it since."""
        try:
            return self.vouches_for(self.path.stat())
        except FileNotFoundError:
            return False

    def vouches_for(self, file: os.stat_result) -> bool:
        """Whether the file with this stat is the complete blob."""
        return vouches_for(self.record, file)

    def is_being_filled(self) -> bool:
        """Whether a process holds the part's lock right now."""
        return is_locked(self.part, fcntl.LOCK_SH)  # shared: readers who look at the same time do not see each other

    def chunks(self, part: os.stat_result | None = None) -> ChunkMap | None:
        """The record of a part that somebody fills; None if nobody has begun since the machine started, or all is done.

        part: the very file the record must be of, if the caller has opened one.
        """
        try:
            return ChunkMap.open(self.state, part or self.part.stat())
        except FileNotFoundError:
            return None

    def reserve(self, size: int) -> None:
        """Make the part at its full size, unless it or the complete blob is there already.

        On a disk the space is taken now, so that nobody else can. In memory that would be half of the work of writing, done before the
        first byte is fetched: there it is taken as it is written (`room` counts it from now on), and lack of it is an error all the same.
        Readers touch only what was written, so that they never meet a page without space behind it. Raises CacheError, saying what was
        needed and what is free, when there is no room.
        """
        if self.path.exists() or self.part.exists():
            return
        with explained(self.path, size):
            draft = unique(self.part)
            try:
                with draft.open("wb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)  # nobody takes it for a left-over, or fills it with the state of an earlier one there
                    if size and not _is_in_memory(self.path.parent):
                        os.posix_fallocate(file.fileno(), 0, size)
                    file.truncate(size)
                    with suppress(FileExistsError):  # unlike a rename, a link never takes the place of a neighbour's part
                        os.link(draft, self.part)
                        self.state.unlink(missing_ok=True)
            finally:
                draft.unlink(missing_ok=True)

    def settle(self) -> None:
        """Bring a complete blob to the disk, so that a power cut does not make it doubtful. Raises OSError."""
        sync(self.record, self.path)

    def damaged_chunks(self, digest: Digest, progress: Callable[[int], object]) -> list[int]:
        """The chunks of the published file that no longer have their digest; all of them if there is no record of it.

        progress: called with the bytes just read.
        """
        size = self.path.stat().st_size
        record = ChunkMap.open(self.record, self.path.stat(), complete=True)
        with self.path.open("rb", buffering=0) as file:
            buffer = memoryview(bytearray(CHUNK_BYTES))
            damaged = []
            for chunk in range(count_chunks(size)):
                length = file.readinto(buffer)
                if record is None or record.digest(chunk) != digest(buffer[:length]):
                    damaged.append(chunk)
                progress(length)
            return damaged

    def set_aside(self, damaged: list[int] | None = None) -> bool:
        """Make a part again out of a published file that is not to be trusted; returns whether this process did.

        What its record vouches for stays: all but the chunks named, or if none is named, what still has its digest when somebody looks.
        """
        if damaged is None and (not self.path.exists() or self.is_complete()):
            return False
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(fd), self.path.stat()) or (damaged is None and self.is_complete()):
                return False
            with explained(self.path, 0):
                if self.part.exists() or ChunkMap.open(self.record, os.fstat(fd), complete=True) is None:
                    self.path.unlink()
                    return True
                os.fchmod(fd, 0o644)
                self.record.rename(self.state)
                chunks = ChunkMap.open_for_writing(self.state, os.fstat(fd))
                for chunk in damaged or ():
                    chunks.flag(chunk, Flag.MISSING)
                self.path.rename(self.part)  # last: whoever finds the part finds its state, too
        except (BlockingIOError, FileNotFoundError):
            return False
        else:
            return True
        finally:
            os.close(fd)


class BlobWriter:
    """The right to fill one blob: holds the part's lock from `try_acquire` to `close` or `publish`."""

    def __init__(self, blob: Blob, fd: int, chunks: ChunkMap) -> None:
        self.blob = blob
        self.chunks = chunks
        self._fd = fd
        # One write at a time: the kernel lets only one into a file anyway, and has the others spin meanwhile.
        self._turn = threading.Lock()
        self._mapping: MappedFile | None = None
        if chunks.size >= LARGE_PAGE_BYTES and _is_in_memory(blob.path.parent):
            with suppress(OSError):  # there is a bound on this process's addresses, and another way to write
                self._mapping = MappedFile(fd, chunks.size, shared=True)
        self._large_pages: set[int] = set()  # where they begin
        self._failures = 0

    @classmethod
    def try_acquire(cls, blob: Blob, size: int) -> "BlobWriter | None":
        """The writer of `blob`, or None while another process is writing it or once it is complete."""
        blob.set_aside()
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
            # A second part, which nobody needs: published between our look and our reserve. Or one that something else has cut.
            if blob.is_complete() or os.fstat(fd).st_size != size:
                blob.state.unlink(missing_ok=True)  # first: it says nothing about the next part, which may get the same inode
                blob.part.unlink()
                raise FileNotFoundError
            with explained(blob.state, record_bytes(size)):
                chunks = ChunkMap.open_for_writing(blob.state, os.fstat(fd))
        except (BlockingIOError, FileNotFoundError):
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return cls(blob, fd, chunks)

    def recheck(self, digest: Digest) -> int:
        """Look at each chunk that an earlier boot left behind: it is valid if it still has the digest it was written with.

        Returns how many were not.
        """
        wrong = 0
        for chunk in self.chunks.claimed():
            is_right = digest(os.pread(self._fd, CHUNK_BYTES, chunk * CHUNK_BYTES)) == self.chunks.digest(chunk)
            self.chunks.flag(chunk, Flag.VALID if is_right else Flag.MISSING)
            wrong += not is_right
        return wrong

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write bytes at `offset`; nobody sees them before `chunks.set`. Raises CacheError when there is no room."""
        with self._turn, explained(self.blob.path, self.chunks.size):
            while data:
                written = os.pwrite(self._fd, data, offset)
                data, offset = data[written:], offset + written

    def memory(self, start: int, stop: int) -> memoryview | None:
        """The file's own memory from `start` to `stop`, to be written to without a copy in between; None where `write` has to do it.

        On a tmpfs that is a large page, which is made now. There is space behind it, whatever else fills the tmpfs.
        """
        page = start - start % LARGE_PAGE_BYTES
        if not self._mapping or stop > page + LARGE_PAGE_BYTES or page + LARGE_PAGE_BYTES > self.chunks.size:
            return None
        if page not in self._large_pages:
            if self._failures >= LARGE_PAGE_FAILURES:
                return None
            if not self._mapping.make_large_page(page):
                self._failures += 1
                return None
            self._large_pages.add(page)
        return self._mapping.view[start:stop]

    def read(self) -> Iterator[bytes]:
        """What is in the file, chunk by chunk."""
        for chunk in range(self.chunks.chunks):
            yield os.pread(self._fd, CHUNK_BYTES, chunk * CHUNK_BYTES)

    def publish(self) -> None:
        """Make the complete blob appear under its own name."""
        assert self.chunks.has_range(0, self.chunks.size), f"{self.blob.path.name} published before it was complete"
        os.fchmod(self._fd, 0o444)
        # The record first: a blob without one would be doubtful. Killed in between, the next writer finds nothing missing.
        self.blob.record.unlink(missing_ok=True)
        os.link(self.blob.state, self.blob.record)
        self.blob.part.rename(self.blob.path)
        self.blob.state.unlink(missing_ok=True)
        self.close()

    def reject(self) -> None:
        """Throw everything away: the object is damaged in the store. Readers that were handed some of it find out."""
        for chunk in range(self.chunks.chunks):
            self.chunks.flag(chunk, Flag.WRONG)
        self.blob.state.unlink(missing_ok=True)
        self.blob.part.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Give the lock back; what was written stays for the next writer."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # closing would not do it while somebody has hold of a piece of the mapping
            os.close(self._fd)
            self._fd, self._mapping = -1, None

    def __enter__(self) -> "BlobWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
