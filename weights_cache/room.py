"""Room in the node cache: what is there, how much it takes, and what goes when more is needed.

Least recently used snapshots go first, and never one that a live process has a lease on. Everything here that changes the cache runs
inside `NodeCache.making_room`, so that what was counted is still so when it is taken.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from weights_cache.blob import Blob, are_complete, free_bytes, is_locked, unique
from weights_cache.cache import FileRef, Lease, NodeCache
from weights_cache.errors import CacheError

log = logging.getLogger("relight.weights")

_OLD_DRAFT_S = 3600


@dataclass(frozen=True)
class Stored:
    """One snapshot of the cache. `used` is when it was last used, in seconds since the epoch; `bytes` counts files it shares, too."""

    snapshot: str
    uris: list[str]
    bytes: int
    complete: bool
    used: float
    in_use: bool
    blobs: dict[str, int] = field(repr=False)  # bytes by blob name


def stored(cache: NodeCache) -> list[Stored]:
    """Every snapshot in the cache, the least recently used first."""
    refs = cache.refs()
    found = []
    for path in (cache.root / "snapshots").glob("[!.]*"):
        blobs = {blob.path.name: blob for blob in cache.snapshot_blobs(path.name).values()}
        sizes = {name: _size(blob) or 0 for name, blob in blobs.items()}
        try:
            used = path.stat().st_mtime
        except FileNotFoundError:
            continue  # evicted while we looked
        found.append(
            Stored(
                path.name,
                sorted(ref.uri for ref in refs if ref.snapshot == path.name),
                sum(sizes.values()),
                are_complete(blobs),
                used,
                is_locked(path, fcntl.LOCK_EX),
                sizes,
            )
        )
    return sorted(found, key=lambda one: (one.used, one.snapshot))


def used_bytes(cache: NodeCache) -> int:
    """What all files of the cache take, complete or not."""
    return sum(_size(blob) or 0 for blob in _blobs(cache).values())


def _blobs(cache: NodeCache) -> dict[str, Blob]:
    """The blobs of all snapshots by name, each once."""
    folders = (cache.root / "snapshots").glob("[!.]*")
    return {blob.path.name: blob for folder in folders for blob in cache.snapshot_blobs(folder.name).values()}


def _free_bytes(cache: NodeCache) -> int:
    """What its disk has room for beside what was promised to unfinished files and not taken yet."""
    promised = 0
    for part in (cache.root / "blobs").glob("*.part"):
        with suppress(FileNotFoundError):  # it was published while we looked
            found = part.stat()
            promised += max(0, found.st_size - found.st_blocks * 512)
    return free_bytes(cache.root) - promised


def reserve(cache: NodeCache, namespace: str, files: Sequence[FileRef], *, limit: int | None, uri: str) -> tuple[Lease, int]:
    """Lay out the snapshot of `files`, with space for every byte of it; returns a lease on it and how many snapshots had to go.

    limit: the most bytes that the cache may take, or None. Raises CacheError, saying what was needed and what there is, when what
    could be evicted is not enough; nothing is evicted then.
    """
    with cache.making_room():
        snapshot = cache.lay_out(namespace, files)
        lease = cache.lease(snapshot)
        assert lease is not None  # it was just made, and only who is alone may take it away
        try:
            collect(cache)
            blobs = [(file, cache.file_blob(namespace, file)) for file in files]
            missing = {blob.path: file.size for file, blob in blobs if _size(blob) is None}
            evicted = _make_room(cache, sum(missing.values()), snapshot, limit, uri)
            for file, blob in blobs:
                blob.reserve(file.size)
        except BaseException:
            lease.close()
            collect(cache)  # what was reserved of it before the failure
            raise
        cache.touch(snapshot)
        return lease, evicted


def _make_room(cache: NodeCache, need: int, keep: str, limit: int | None, uri: str) -> int:
    used, free = used_bytes(cache), max(0, _free_bytes(cache))
    excess = max(need - free, used + need - limit if limit is not None else 0)
    if excess <= 0 or not need:  # what is there already is never refused, whatever the limit has become
        return 0
    snapshots = stored(cache)
    staying = [one for one in snapshots if one.in_use or one.snapshot == keep]
    leaving = [one for one in snapshots if one not in staying]
    victims, freed = 0, 0
    while freed < excess and victims < len(leaving):
        victims += 1
        kept = {name for one in staying + leaving[victims:] for name in one.blobs}
        freed = sum({name: size for one in leaving[:victims] for name, size in one.blobs.items() if name not in kept}.values())
    if freed < excess:
        in_use = sum({name: size for one in snapshots if one.in_use for name, size in one.blobs.items()}.values())
        bound = "" if limit is None else f", {max(0, limit - used):,} left of WEIGHTS_CACHE_BYTES={limit:,}"
        raise CacheError(
            f"no room in {cache.root} for {uri}: {need:,} bytes needed, {free:,} free on its disk{bound}; "
            f"{freed:,} could be evicted, {in_use:,} are in use"
        )
    evicted = 0
    for one in leaving[:victims]:
        if (gone := evict(cache, one.snapshot)) is not None:
            log.info("evicted snapshot %s to make room, %.1f MB", one.snapshot, gone / 1e6)
            evicted += 1
    return evicted


def evict(cache: NodeCache, snapshot: str) -> int | None:
    """Take a snapshot out of the cache, with the files that no other one has; returns the bytes freed, None if it is in use or gone.

    The caller is inside `making_room`.
    """
    path = cache.snapshot_path(snapshot)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        draft = unique(path)
        path.rename(draft)  # in one step: from here on nobody finds half of it
    except BlockingIOError:
        return None
    finally:
        os.close(fd)
    shutil.rmtree(draft)
    cache.drop_refs(snapshot)
    return _remove_orphans(cache)


def collect(cache: NodeCache) -> int:
    """Remove what nobody can want any more; returns the bytes freed. The caller is inside `making_room`.

    That is: an unfinished snapshot that no URI stands for and nobody is filling, files of no snapshot, and drafts of killed processes.
    """
    named = {name for ref in cache.refs() for name in (ref.snapshot, ref.next)}
    for path in (cache.root / "snapshots").iterdir():
        if path.name.startswith("."):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in named and not cache.is_complete(path.name):
            evict(cache, path.name)
    for draft in (cache.root / "refs").glob(".*"):
        with suppress(FileNotFoundError):  # it was renamed into place while we looked
            if draft.stat().st_mtime < time.time() - _OLD_DRAFT_S:  # a younger one may be in the middle of being written
                draft.unlink()
    return _remove_orphans(cache)


def _remove_orphans(cache: NodeCache) -> int:
    wanted = _blobs(cache)
    freed = 0
    for folder in ("blobs", "digests"):
        for entry in list(os.scandir(cache.root / folder)):
            if entry.name.split(".")[0] not in wanted:  # a draft begins with a dot
                if entry.name.startswith(".") and is_locked(entry.path, fcntl.LOCK_EX):
                    continue  # it is just being made
                freed += entry.stat().st_size
                os.unlink(entry.path)  # noqa: PTH108  scandir gives names
    return freed


def _size(blob: Blob) -> int | None:
    """The bytes that a blob takes, complete or not; None if there is nothing of it."""
    for path in (blob.path, blob.part, blob.path):  # again: it may be published between the first two
        try:
            return path.stat().st_size
        except FileNotFoundError:
            continue
    return None
