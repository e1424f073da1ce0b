"""Bring a snapshot from the store into the node cache: list, pin, fetch what is missing, publish."""

import logging
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass

from weights_cache.blob import BlobWriter, ChunkMap
from weights_cache.cache import FileRef, NodeCache, snapshot_id
from weights_cache.errors import ObjectChanged, StoreError, StoreUnavailable
from weights_cache.store import Store

log = logging.getLogger("relight.weights")

ATTEMPTS = 6  # for one part; the wait between them doubles from 0.1 s, so a store may be away for about 3 s
RELISTINGS = 5  # when objects are replaced while we read them
NEIGHBOUR_POLL_S = 0.05


@dataclass
class Progress:
    """How far a pull is; read by other threads while it runs."""

    snapshot: str = ""
    total_bytes: int = 0
    downloaded_bytes: int = 0  # over the wire by this process, as opposed to found in the cache or fetched by a neighbour
    source: str = "cache"  # "store" once anything had to be fetched, by us or by a neighbour
    bytes_there: Callable[[], int] = lambda: 0


class Puller:
    """One pull of one prefix. Call `run` once; watch `progress` from anywhere."""

    def __init__(self, store: Store, cache: NodeCache, *, uri: str, connections: int, part_bytes: int) -> None:
        self.progress = Progress()
        self._store = store
        self._cache = cache
        self._uri = uri
        self._connections = connections
        self._part_bytes = part_bytes
        self._stopped = False
        self._abort = threading.Event()  # set when one part failed, so that the others end too, or when the pull is cancelled
        self._count = threading.Lock()  # guards progress.downloaded_bytes

    def run(self) -> str:
        """The snapshot's id, once every file of it is in the cache.

        Raises StoreError (ObjectChanged if the objects are replaced faster than they can be read) or CacheError.
        """
        pinned = self._store.uri.snapshot
        if pinned and self._cache.is_complete(pinned):
            self._cache.set_ref(self._uri, pinned)
            self.use_cached(pinned)
            return pinned
        for attempt in range(RELISTINGS):
            files = self._store.list()
            found = snapshot_id(self._store.namespace, files)
            if pinned and found != pinned:
                raise StoreError(f"{self._uri}: the prefix now holds snapshot {found}; the pinned one is neither there nor in the cache")
            try:
                return self._fetch(files)
            except ObjectChanged as error:
                if attempt + 1 == RELISTINGS:
                    raise
                log.warning("%s; listing again", error)
                self._abort.clear()
                self._pause(random.uniform(0, 2**attempt))
        raise AssertionError("unreachable")

    def cancel(self) -> None:
        """Make `run` end soon with an error, in another thread; what was fetched stays for the next pull."""
        self._stopped = True
        self._abort.set()

    def use_cached(self, snapshot: str) -> None:
        """Let `progress` tell of a snapshot that is complete in the cache, without asking the store."""
        sizes = [blob.path.stat().st_size for blob in self._cache.snapshot_blobs(snapshot).values()]
        self.progress.snapshot, self.progress.total_bytes = snapshot, sum(sizes)
        self.progress.bytes_there = lambda: self.progress.total_bytes

    def _fetch(self, files: Sequence[FileRef]) -> str:
        snapshot = self._cache.pin(self._uri, files, self._store.namespace)
        blobs = self._cache.snapshot_blobs(snapshot)
        wanted = [(file, blobs[file.path]) for file in files]
        missing = [(file, blob) for file, blob in wanted if not blob.is_complete()]
        maps: dict[str, ChunkMap] = {}

        def bytes_there() -> int:
            there = 0
            for file, blob in wanted:
                if blob.is_complete():
                    there += file.size
                elif chunks := maps.get(file.path) or ChunkMap.open(blob):
                    there += maps.setdefault(file.path, chunks).bytes_there()
            return there

        self.progress.snapshot = snapshot
        self.progress.total_bytes = sum(file.size for file in files)
        self.progress.source = "store" if missing else "cache"
        self.progress.bytes_there = bytes_there
        with ExitStack() as held:
            writers = []
            # All processes take the locks in the same order, so none waits for another in a circle.
            for file, blob in sorted(missing, key=lambda pair: pair[1].path.name):
                while not (writer := BlobWriter.try_acquire(blob, file.size)) and not blob.is_complete():
                    self._pause(NEIGHBOUR_POLL_S)
                if writer:
                    writers.append((file, held.enter_context(writer)))
            self._fill(sorted(writers, key=lambda pair: pair[0].path))
        return snapshot

    def _fill(self, writers: Sequence[tuple[FileRef, BlobWriter]]) -> None:
        """Fetch every missing part in file order, several at a time, and publish each blob when it is complete."""
        with ThreadPoolExecutor(self._connections, thread_name_prefix="fetch") as pool:
            try:
                parts = [
                    (file, writer, [pool.submit(self._fetch_part, file, writer, *part) for part in writer.chunks.missing(self._part_bytes)])
                    for file, writer in writers
                ]
                for _, writer, futures in parts:
                    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    writer.publish()
            except BaseException:
                self._abort.set()  # the other parts end at their next chunk
                pool.shutdown(cancel_futures=True)
                raise

    def _fetch_part(self, file: FileRef, writer: BlobWriter, start: int, stop: int) -> None:
        at = start
        for attempt in range(ATTEMPTS):
            try:
                for piece in self._store.read(file, at, stop):
                    self._pause(0)
                    writer.write(piece, at)
                    at += len(piece)
                    with self._count:
                        self.progress.downloaded_bytes += len(piece)
            except StoreUnavailable as error:
                if attempt + 1 == ATTEMPTS:
                    raise
                log.info("%s; trying again from byte %d", error, at)
                self._pause(random.uniform(0.5, 1) * 0.1 * 2**attempt)
            else:
                return

    def _pause(self, seconds: float) -> None:
        if self._abort.wait(seconds) or self._stopped:
            raise StoreError("the pull was stopped")
