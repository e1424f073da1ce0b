"""The node cache: a directory whose layout is the protocol between the sidecars that fill it and the functions that read it.

    FORMAT                 layout version
    refs/<sha256 of uri>   JSON {uri, snapshot, checked}: which snapshot a WEIGHTS_URI stands for
    blobs/<id>             one complete file, mode 0444; the id is made from its key, size and ETag
    blobs/<id>.part        the same file while it is being filled, at its full size; .part.state says which chunks are there
    snapshots/<id>/...     the object prefix as relative links into blobs/

What is published appears by rename, so a reader sees all of it or nothing.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from weights_cache.blob import Blob, unique
from weights_cache.errors import CacheError

FORMAT = "1"


@dataclass(frozen=True)
class FileRef:
    """One file of a snapshot: its path below the prefix, its size in bytes, and the version (ETag) that was listed."""

    path: str
    size: int
    etag: str


@dataclass(frozen=True)
class Ref:
    """Which snapshot a URI stands for, and when (seconds since the epoch) the store was last asked."""

    uri: str
    snapshot: str
    checked: float


def snapshot_id(namespace: str, files: Sequence[FileRef]) -> str:
    """The name of exactly these files in exactly these versions: 32 hex digits.

    namespace: what ETags are compared within, `bucket/prefix`. The endpoint is no part of it: one store has many addresses.
    """
    lines = sorted(json.dumps([namespace, file.path, file.size, file.etag]) for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


class NodeCache:
    """One cache directory. Any number of processes may use it at the same time."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self) -> None:
        """Make the directory if it is not there. Raises CacheError if it holds another layout or cannot be written."""
        try:
            self.check_format()
            for folder in ("refs", "blobs", "snapshots"):
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
            found = (self.root / "FORMAT").read_text(errors="replace").strip()
        except FileNotFoundError:
            return  # nothing there yet
        if found != FORMAT:
            raise CacheError(
                f"cache directory {self.root} has layout {found!r}, this version of Relight reads {FORMAT!r}; "
                "it was left alone: use another directory, or remove this one"
            )

    def ref(self, uri: str) -> Ref | None:
        """What `uri` stands for, or None if no sidecar has pinned it yet."""
        try:
            found = json.loads(self._ref_path(uri).read_text())
            if re.fullmatch("[0-9a-f]{32}", found["snapshot"]):
                return Ref(uri, found["snapshot"], found["checked"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            pass
        return None  # a damaged ref is as good as none: the sidecar writes it anew

    def set_ref(self, uri: str, snapshot: str) -> None:
        """Let `uri` stand for `snapshot` from now on."""
        try:
            _write(self._ref_path(uri), json.dumps({"uri": uri, "snapshot": snapshot, "checked": time.time()}))
        except OSError as error:
            raise CacheError(f"cache directory {self.root}: {error.strerror or error}") from error

    def _ref_path(self, uri: str) -> Path:
        return self.root / "refs" / hashlib.sha256(uri.encode()).hexdigest()

    def blob(self, blob_id: str) -> Blob:
        """The blob with this id, which may be complete, part of the way, or not there at all."""
        return Blob(self.root / "blobs" / blob_id)

    def pin(self, uri: str, files: Sequence[FileRef], namespace: str) -> str:
        """Lay out the snapshot of `files` and point `uri` at it; returns the snapshot's id. Blobs are reserved, not yet filled.

        Raises CacheError if a path would leave the snapshot, or if there is no room.
        """
        snapshot = snapshot_id(namespace, files)
        target = self.snapshot_path(snapshot)
        for file in files:
            check_path(file.path)
        links = {file.path: self.blob(snapshot_id(namespace, [file])) for file in files}
        for file in files:
            links[file.path].reserve(file.size)
        if not target.is_dir():
            draft = unique(target)
            try:
                for path, blob in links.items():
                    link = draft / path
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(Path(*[".."] * (len(PurePosixPath(path).parts) + 1), "blobs", blob.path.name))
                draft.rename(target)
            except OSError as error:
                shutil.rmtree(draft, ignore_errors=True)
                if not target.is_dir():  # otherwise a neighbour laid out the same snapshot meanwhile
                    raise CacheError(f"cache directory {self.root}: {error.strerror or error}") from error
        self.set_ref(uri, snapshot)
        return snapshot

    def snapshot_path(self, snapshot: str) -> Path:
        """Where the snapshot's files are, as any other program can open them once they are complete."""
        return self.root / "snapshots" / snapshot

    def snapshot_blobs(self, snapshot: str) -> dict[str, Blob]:
        """The snapshot's blobs by path below the prefix, in path order; empty if there is no such snapshot."""
        top = self.snapshot_path(snapshot)
        return {link.relative_to(top).as_posix(): self.blob(link.readlink().name) for link in sorted(_links(top))}

    def is_complete(self, snapshot: str) -> bool:
        """Whether every file of the snapshot is there to the last byte."""
        blobs = self.snapshot_blobs(snapshot)
        return bool(blobs) and all(blob.is_complete() for blob in blobs.values())


def check_path(path: str) -> None:
    """Raise CacheError unless `path` is a plain relative path that stays below the snapshot's directory."""
    parts = path.split("/")
    is_text = not any("\ud800" <= letter <= "\udfff" for letter in path)  # lone surrogates stand for bytes that are no UTF-8
    if not is_text or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise CacheError(
            f"object key {path!r} cannot be a file below the snapshot: empty, '.' and '..' parts, NUL and invalid Unicode are not allowed"
        )
    if any(len(os.fsencode(part)) > 255 for part in parts) or len(os.fsencode(path)) > 1024:
        raise CacheError(f"object key {path[:80]!r}… is too long for a file name (255 bytes a part, 1024 in all)")


def _links(folder: Path) -> Iterator[Path]:
    for top, folders, names in os.walk(folder):
        folders.sort()
        for name in names:
            yield Path(top, name)


def _write(path: Path, text: str) -> None:
    """Replace `path` in one step, so that nobody ever reads half of it."""
    draft = unique(path)
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
