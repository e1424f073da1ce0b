"""Bring a snapshot from the store into the node cache: list, pin, fetch what is missing, publish."""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from weights_cache import manifest, room
from weights_cache.blob import Blob, BlobWriter
from weights_cache.cache import FileRef, Lease, NodeCache, Ref, snapshot_id
from weights_cache.chunks import CHUNK_BYTES, ChunkMap
from weights_cache.digest import chunk_digest
from weights_cache.errors import ObjectChanged, StoreError, StoreUnavailable
from weights_cache.manifest import MANIFEST, Manifest
from weights_cache.settings import WeightsSettings
from weights_cache.store import Store
from weights_cache.transfer import Job, Transfer

log = logging.getLogger("relight.weights")

RELISTINGS = 5  # when objects are replaced while we read them
NEIGHBOUR_POLL_S = 0.05


@dataclass
class Progress:
    """How far a pull is; read by other threads while it runs."""

    snapshot: str = ""
    total_bytes: int = 0
    cached_bytes: int = 0  # were here when the pull began
    downloaded_bytes: int = 0  # over the wire by this process
    source: str = "cache"  # "store" once anything had to be fetched, by us or by a neighbour
    waited_s: float = 0.0  # for a neighbour that was fetching the same files
    evicted: int = 0  # snapshots that had to go
    damaged: int = 0  # chunks that came, or were here, with other bytes than they should have had
    checked: bool = False  # the store has said which snapshot it is
    bytes_there: Callable[[], int] = lambda: 0


def list_snapshot(store: Store) -> tuple[list[FileRef], Manifest, bytes]:
    """The files of the version that is in the store now, what its manifest says of them, and the manifest as it is.

    Without a manifest, because something else than `push` put the files there, it says nothing and is empty.

    Raises ObjectChanged while a push is on its way.
    """
    listed = store.list()
    found = next((file for file in listed if file.path == MANIFEST), None)
    if not found:
        return listed, {}, b""
    manifest.check_size(found.size, store.place(found))
    for pause_s in (0.1, 0.5, 2.0, None):
        try:
            data = store.read(found)
            break
        except StoreUnavailable:  # a body that is cut; what is refused boto3 has asked for again by itself
            if pause_s is None:
                raise
            time.sleep(pause_s)
    said = manifest.parse(data, store.place(found), listed)
    return manifest.select(listed, said, str(store.uri)), said, data


class Puller:
    """One pull of one prefix. Call `run` once, and then perhaps `settle`; watch `progress` from anywhere.

    It holds a lease on the snapshot until `close`.
    """

    def __init__(self, store: Store, cache: NodeCache, settings: WeightsSettings, *, uri: str) -> None:
        self.progress = Progress()
        self._store = store
        self._cache = cache
        self._settings = settings
        self._uri = uri
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # guards progress.downloaded_bytes and _transfer
        self._transfer: Transfer | None = None
        self._lease: Lease | None = None

    def run(self) -> str:
        """The snapshot's id, once every file of it is in the cache.

        Raises StoreError (ObjectChanged if the objects are replaced faster than they can be read) or CacheError.
        """
        self._pause(0)  # it may have been cancelled before it began
        pinned = self._store.uri.snapshot
        if pinned and self.use_cached(pinned):
            self._cache.set_ref(Ref(self._uri, pinned, time.time()))
            self.progress.checked = True  # there is nothing to ask: these or none
            return pinned
        for attempt in range(RELISTINGS):
            try:
                files, said, data = list_snapshot(self._store)
                found = snapshot_id(self._store.namespace, files)
                if pinned and found != pinned:
                    raise StoreError(
                        f"{self._uri}: the prefix now holds snapshot {found}; the pinned one is neither there nor in the cache"
                    )
                return self._bring(files, said, data, found)
            except ObjectChanged as error:
                if attempt + 1 == RELISTINGS:
                    raise
                log.warning("%s; listing again", error)
                if self._lease:
                    self._lease.close()  # there may not be room for what it was and what it is now
                self._pause(random.uniform(0.5, 1) * 2**attempt)
        raise AssertionError("unreachable")

    def settle(self) -> None:
        """Bring what was fetched to the disk, so that it still counts after a power cut. Raises OSError."""
        for blob in self._cache.snapshot_blobs(self.progress.snapshot).values():
            blob.settle()

    def cancel(self) -> None:
        """Make `run` end soon with an error, in another thread; what was fetched stays for the next pull."""
        self._stopped.set()
        with self._lock:
            if self._transfer:
                self._transfer.cancel()

    def close(self) -> None:
        """Let the snapshot go, if somebody needs its room."""
        if self._lease:
            self._cache.touch(self._lease.snapshot)  # used until now
            self._lease.close()
            self._lease = None

    def use_cached(self, snapshot: str) -> bool:
        """Take a snapshot as it is in the cache, without asking the store; False if it is not complete there."""
        lease = self._cache.lease(snapshot)
        if not lease or not self._cache.is_complete(snapshot):
            return False
        self._keep(lease)
        self._cache.touch(snapshot)
        sizes = [blob.path.stat().st_size for blob in self._cache.snapshot_blobs(snapshot).values()]
        progress = self.progress
        progress.snapshot, progress.source = snapshot, "cache"
        progress.total_bytes = progress.cached_bytes = sum(sizes)
        total = progress.total_bytes
        progress.bytes_there = lambda: total
        return True

    def _keep(self, lease: Lease) -> None:
        if self._lease:
            self._lease.close()
        self._lease = lease

    def _bring(self, files: Sequence[FileRef], said: Manifest, data: bytes, snapshot: str) -> str:
        """Let the URI stand for these files, at once or, where it stands for complete ones, when these are complete too."""
        lease, evicted = room.reserve(self._cache, self._store.namespace, files, limit=self._settings.cache_bytes, uri=self._uri)
        self._keep(lease)
        self.progress.evicted += evicted
        self.progress.snapshot, self.progress.checked = snapshot, True
        ref = self._cache.ref(self._uri)
        goal = Ref(self._uri, snapshot, time.time())
        if ref and ref.snapshot != snapshot and self._cache.is_complete(ref.snapshot):
            self._cache.set_ref(replace(ref, next=snapshot))  # whoever starts meanwhile starts at once, on what is here
        else:
            self._cache.set_ref(goal)
        self._fetch(files, said, data)
        if self._cache.ref(self._uri) != goal:
            self._cache.set_ref(goal)
        return snapshot

    def _fetch(self, files: Sequence[FileRef], said: Manifest, data: bytes) -> None:
        wanted = [(file, self._cache.file_blob(self._store.namespace, file)) for file in files]
        missing = [(file, blob) for file, blob in wanted if not blob.is_complete()]
        progress = self.progress
        progress.bytes_there = _counter(wanted)
        progress.total_bytes = sum(file.size for file in files)
        progress.cached_bytes = progress.bytes_there()
        progress.source = "store" if missing else "cache"
        with ExitStack() as held:
            jobs = []
            # All processes take the locks in the same order, so none waits for another in a circle.
            for file, blob in sorted(missing, key=lambda pair: pair[1].path.name):
                if writer := self._await_writer(blob, file.size):
                    held.enter_context(writer)
                    if file.path == MANIFEST and data:
                        _fill(writer, data)  # it was read to know what there is
                        progress.downloaded_bytes += len(data)
                        continue
                    progress.damaged += writer.recheck(chunk_digest)
                    jobs.append(Job(file, writer, said[file.path].chunks if file.path in said else None))
            self._run(sorted(jobs, key=lambda job: job.file.path))

    def _await_writer(self, blob: Blob, size: int) -> BlobWriter | None:
        """The right to fill a blob, when its neighbour has left off; None if the neighbour completed it."""
        while not (writer := BlobWriter.try_acquire(blob, size)) and not blob.is_complete():
            began = time.monotonic()
            self._pause(NEIGHBOUR_POLL_S)
            self.progress.waited_s += time.monotonic() - began
        return writer

    def _run(self, jobs: Sequence[Job]) -> None:
        def count(amount: int) -> None:
            with self._lock:
                self.progress.downloaded_bytes += amount

        settings = self._settings
        transfer = Transfer(
            self._store,
            jobs,
            connections=settings.connections,
            part_bytes=settings.part_bytes,
            bytes_per_second=settings.bytes_per_second,
            on_bytes=count,
        )
        with self._lock:
            self._transfer = transfer
        self._pause(0)
        try:
            transfer.run()
        finally:
            self.progress.damaged += transfer.damaged

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise StoreError("the pull was stopped")


def _fill(writer: BlobWriter, data: bytes) -> None:
    """Write a whole small file, and publish it."""
    writer.write(data, 0)
    for at in range(0, len(data), CHUNK_BYTES):
        writer.chunks.set(at // CHUNK_BYTES, chunk_digest(data[at : at + CHUNK_BYTES]))
    writer.publish()


def _counter(wanted: Sequence[tuple[FileRef, Blob]]) -> Callable[[], int]:
    """How many bytes of these files are there, whoever brings them."""
    maps: dict[str, ChunkMap] = {}

    def bytes_there() -> int:
        there = 0
        for file, blob in wanted:
            if blob.is_complete():
                maps.pop(file.path, None)
                there += file.size
            elif chunks := maps.get(file.path) or blob.chunks():
                there += maps.setdefault(file.path, chunks).bytes_there()
        return there

    return bytes_there
