"""A node whose weights land when a test says so, and waiting for what waits for them."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from tests.support import write_chunks
from weights_cache import room
from weights_cache.blob import BlobWriter
from weights_cache.cache import FileRef, Lease, NodeCache, Ref
from weights_cache.chunks import CHUNK_BYTES
from weights_cache.digest import chunk_digest

URI = "s3://bucket/model"
T = TypeVar("T")


class Node:
    """A sidecar moved by hand: it pins files, then their chunks land one by one."""

    def __init__(self, cache: NodeCache) -> None:
        self.cache = cache
        self.snapshot = ""
        self._files: Mapping[str, bytes] = {}
        self._writers: dict[str, BlobWriter] = {}
        self._lease: Lease | None = None

    def pin(self, files: Mapping[str, bytes], version: str = "1") -> None:
        refs = [FileRef(path, len(data), f'"{version}"') for path, data in files.items()]
        self._lease, _ = room.reserve(self.cache, "bucket/model", refs, limit=None, uri=URI)
        self.snapshot = self._lease.snapshot
        ref = self.cache.ref(URI)
        if ref and ref.snapshot != self.snapshot and self.cache.is_complete(ref.snapshot):
            self.cache.set_ref(replace(ref, next=self.snapshot))
        else:
            self.cache.set_ref(Ref(URI, self.snapshot, time.time()))
        self._files = files
        for path, blob in self.cache.snapshot_blobs(self.snapshot).items():
            # A reader that looks whether the part is being filled holds its lock for a moment.
            while not (writer := BlobWriter.try_acquire(blob, len(files[path]))) and not blob.is_complete():
                time.sleep(0.001)
            if writer:
                writer.recheck(chunk_digest)
                self._writers[path] = writer

    def land(self, path: str, *chunks: int) -> None:
        write_chunks(self._writers[path], self._files[path], *chunks)

    def finish(self, *paths: str) -> None:
        """Everything that is missing of these files, or of all, lands and is published."""
        for path in paths or tuple(self._writers):
            for start, _ in list(self._writers[path].chunks.missing(1)):
                self.land(path, start // CHUNK_BYTES)
            self._writers.pop(path).publish()
        if not self._writers:
            self.cache.set_ref(Ref(URI, self.snapshot, time.time()))

    def reject(self, path: str) -> None:
        self._writers.pop(path).reject()

    def leave(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        if self._lease:
            self._lease.close()


def later(call: Callable[[], T]) -> "Future[T]":
    """`call` in a thread of its own, which does not keep a failed test from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  the test's own thread raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def still_waits(future: "Future[T]") -> bool:
    try:
        future.exception(timeout=0.05)
    except TimeoutError:
        return True
    return False
