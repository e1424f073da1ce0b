"""The node cache: a directory whose layout is the protocol between the sidecars that fill it and the functions that read it.

    FORMAT                 layout version
    refs/<sha256 of uri>   JSON {uri, snapshot, checked, next}: which snapshot a WEIGHTS_URI stands for
    blobs/<id>             one complete file, mode 0444; the id is made from its key, size and ETag
    blobs/<id>.part        the same file while it is being filled, at its full size; .part.state says which chunks are there
    digests/<id>           the digests of a complete file's chunks, to find damage (see `chunks`)
    snapshots/<id>/...     the object prefix as relative links into blobs/

What is published appears by rename, so a reader sees all of it or nothing. Two kernel locks, both gone with whoever held them:
shared on a snapshot's directory, a lease (it is in use and stays); exclusive on `blobs/`, the right to make room and take it.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

from weights_cache.blob import Blob, are_complete, unique
from weights_cache.errors import CacheError
from weights_cache.excerpt import quoted

FORMAT = "1"
_MAX_SMALL_BYTES = 64 * 1024


@dataclass(frozen=True)
class FileRef:
    """One file of a snapshot: its path below the prefix, its size in bytes, and the version (ETag) that was listed."""

    path: str
    size: int
    etag: str


@dataclass(frozen=True)
class Ref:
    """Which snapshot a URI stands for, when (seconds since the epoch) the store was last asked, and which snapshot is on its way."""

    uri: str
    snapshot: str
    checked: float = 0.0
    next: str | None = None


def snapshot_id(namespace: str, files: Sequence[FileRef]) -> str:
    """The name of exactly these files in exactly these versions: 32 hex digits.

    namespace: what ETags are compared within, `bucket/prefix`. The endpoint is no part of it: one store has many addresses.
    """
    lines = sorted(json.dumps([namespace, file.path, file.size, file.etag]) for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


class Lease:
    """A snapshot in use: nobody evicts it until the lease is closed or its process has ended."""

    def __init__(self, snapshot: str, fd: int) -> None:
        self.snapshot = snapshot
        self._fd = fd

    def close(self) -> None:
        """The snapshot may go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class NodeCache:
    """One cache directory. Any number of processes may use it at the same time."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self) -> None:
        """Make the directory if it is not there. Raises CacheError if it holds another layout or cannot be written."""
        try:
            self.check_format()
            for folder in ("refs", "blobs", "digests", "snapshots"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            if not (self.root / "FORMAT").exists():
                _write(self.root / "FORMAT", FORMAT + "\n")
        except OSError as error:
            raise CacheError(
                f"cache directory {self.root}: {error.strerror or error}; it must be a directory this user may write to"
            ) from error

    def check_format(self) -> None:
        """Raise CacheError if the directory was laid out by another version of Relight."""
        try:
            found = _read(self.root / "FORMAT").decode(errors="replace").strip()
        except FileNotFoundError:
            return  # nothing there yet
        if found != FORMAT:
            raise CacheError(
                f"cache directory {self.root} has layout {quoted(found)}, this version of Relight reads {FORMAT!r}; "
                "it was left alone: use another directory, or remove this one"
            )

    @contextmanager
    def making_room(self) -> Iterator[None]:
        """Alone with what is in the cache: nobody else adds a snapshot or takes one away meanwhile. Waits for its turn."""
        try:
            fd = os.open(self.root / "blobs", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CacheError(f"cache directory {self.root}: {error.strerror or error}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def ref(self, uri: str) -> Ref | None:
        """What `uri` stands for, or None if no sidecar has pinned it yet."""
        return _read_ref(self._ref_path(uri))

    def refs(self) -> list[Ref]:
        """Every URI that is known here."""
        found = (_read_ref(path) for path in sorted((self.root / "refs").glob("[!.]*")))
        return [ref for ref in found if ref]

    def set_ref(self, ref: Ref) -> None:
        """Let the ref's URI stand for its snapshot from now on."""
        try:
            _write(self._ref_path(ref.uri), json.dumps(asdict(ref)))
        except OSError as error:
            raise CacheError(f"cache directory {self.root}: {error.strerror or error}") from error

    def drop_refs(self, snapshot: str) -> None:
        """Forget every URI that stands for `snapshot`."""
        for ref in self.refs():
            if ref.snapshot == snapshot and ref.next:
                self.set_ref(Ref(ref.uri, ref.next, ref.checked))
            elif ref.snapshot == snapshot:
                self._ref_path(ref.uri).unlink(missing_ok=True)
            elif ref.next == snapshot:
                self.set_ref(replace(ref, next=None))

    def _ref_path(self, uri: str) -> Path:
        return self.root / "refs" / hashlib.sha256(uri.encode()).hexdigest()

    def blob(self, blob_id: str) -> Blob:
        """The blob with this id, which may be complete, part of the way, or not there at all."""
        return Blob(self.root / "blobs" / blob_id)

    def file_blob(self, namespace: str, file: FileRef) -> Blob:
        """The blob that one version of one object becomes."""
        return self.blob(snapshot_id(namespace, [file]))

    def lay_out(self, namespace: str, files: Sequence[FileRef]) -> str:
        """Make the snapshot of `files` out of links to their blobs, which need not be there yet; returns its id.

        Raises CacheError if a path would leave the snapshot.
        """
        paths = {file.path for file in files}
        for path in paths:
            check_path(path)
            if both := next((str(folder) for folder in PurePosixPath(path).parents if str(folder) in paths), None):
                raise CacheError(f"object key {quoted(both)} is both a file and the folder of {quoted(path)}; a snapshot cannot hold both")
        snapshot = snapshot_id(namespace, files)
        target = self.snapshot_path(snapshot)
        if not target.is_dir():
            draft = unique(target)
            try:
                for file in files:
                    link = draft / file.path
                    link.parent.mkdir(parents=True, exist_ok=True)
                    blobs = Path(*[".."] * (len(PurePosixPath(file.path).parts) + 1), "blobs")
                    link.symlink_to(blobs / self.file_blob(namespace, file).path.name)
                draft.rename(target)
            except OSError as error:
                shutil.rmtree(draft, ignore_errors=True)
                raise CacheError(f"cache directory {self.root}: {error.strerror or error}") from error
        return snapshot

    def lease(self, snapshot: str) -> Lease | None:
        """The right to find the snapshot as it is now; None if there is no such snapshot (any more)."""
        path = self.snapshot_path(snapshot)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        lease = Lease(snapshot, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)  # held exclusively for moments only, by who looks whether it is in use, or takes it away
            if os.path.samestat(os.fstat(fd), path.stat()):
                return lease
        except FileNotFoundError:
            pass
        lease.close()
        return None

    def touch(self, snapshot: str) -> None:
        """The snapshot is being used: it is now the last to be evicted, whatever the clock has done since the others were used."""
        path = self.snapshot_path(snapshot)
        newest = 0.0
        for other in path.parent.glob("[!.]*"):
            try:
                newest = max(newest, other.stat().st_mtime if other != path else 0.0)
            except FileNotFoundError:
                continue  # evicted while we looked
        try:
            os.utime(path, (time.time(), max(time.time(), newest + 0.001)))
        except OSError:
            pass  # a read-only directory: whoever may evict from it keeps count

    def snapshot_path(self, snapshot: str) -> Path:
        """Where the snapshot's files are, as any other program can open them once they are complete."""
        return self.root / "snapshots" / snapshot

    def snapshot_blobs(self, snapshot: str) -> dict[str, Blob]:
        """The snapshot's blobs by path below the prefix, in path order; empty if there is no such snapshot."""
        top = self.snapshot_path(snapshot)
        try:
            return {path: self.blob((top / path).readlink().name) for path in sorted(_links(top))}
        except FileNotFoundError:
            return {}  # evicted while we looked

    def is_complete(self, snapshot: str) -> bool:
        """Whether every file of the snapshot is there to the last byte."""
        return are_complete(self.snapshot_blobs(snapshot))


def check_path(path: str) -> None:
    """Raise CacheError unless `path` is a plain relative path that stays below the snapshot's directory."""
    parts = path.split("/")
    is_text = not any("\ud800" <= letter <= "\udfff" for letter in path)  # lone surrogates stand for bytes that are no UTF-8
    if not is_text or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise CacheError(
            f"object key {quoted(path)} cannot be a file below the snapshot: "
            "empty, '.' and '..' parts, NUL and invalid Unicode are not allowed"
        )
    if any(len(os.fsencode(part)) > 255 for part in parts) or len(os.fsencode(path)) > 1024:
        raise CacheError(f"object key {path[:80]!r}… is too long for a file name (255 bytes a part, 1024 in all)")


def _read_ref(path: Path) -> Ref | None:
    try:
        found = json.loads(_read(path))
        ref = Ref(found["uri"], found["snapshot"], float(found["checked"]), found.get("next"))
        ids = [ref.snapshot] if ref.next is None else [ref.snapshot, ref.next]
        return ref if isinstance(ref.uri, str) and all(map(_is_snapshot_id, ids)) else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # a damaged ref is as good as none: the sidecar writes it anew


def _read(path: Path) -> bytes:
    """A small file of the cache, and no more of it than such a one has."""
    with path.open("rb", buffering=0) as file:
        return file.read(_MAX_SMALL_BYTES) or b""


def _is_snapshot_id(found: object) -> bool:
    return isinstance(found, str) and len(found) == 32 and set(found) <= set("0123456789abcdef")


def _links(folder: Path) -> Iterator[str]:
    """The paths below `folder` of the files in it."""
    for top, _, names in os.walk(folder):
        below = os.path.relpath(top, folder)
        yield from (name if below == "." else f"{below}/{name}" for name in names)


def _write(path: Path, text: str) -> None:
    """Replace `path` in one step, so that nobody ever reads half of it."""
    draft = unique(path)
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
