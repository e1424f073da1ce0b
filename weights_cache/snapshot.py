"""The files that a WEIGHTS_URI stands for, as a function sees them: found through `refs/`, leased, mapped, and waited for.

A sidecar may still be filling them. How far they are is known at any time without looking: whoever waits for bytes looks, and so does
a thread (`Snapshot.watch`).
"""

import json
import logging
import os
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weights_cache.blob import Blob, are_complete
from weights_cache.cache import Lease, NodeCache
from weights_cache.chunks import ChunkMap
from weights_cache.errors import WeightsError
from weights_cache.excerpt import described, listed, plain, quoted, told
from weights_cache.mapping import MappedFile
from weights_cache.settings import WeightsSettings
from weights_cache.threads import Threads
from weights_cache.uri import WeightsUri

POLL_S = 0.005  # between two looks of who waits for bytes
WATCH_S = 0.05  # between two looks of the thread
COUNTING = 0.1  # the most of a thread's time that goes into counting what is there
ASK_S = 1.0  # for the sidecar's whole answer
HEAR_S = 1.0  # between two questions what is wrong, while the weights are not there
MAX_ANSWER_BYTES = 4 << 20

log = logging.getLogger("relight.weights")

_SNAPSHOT = re.compile("[0-9a-f]{32}")
_WAITING = ("failed", "waiting", "listing")  # phases of the sidecar in which nothing comes


@dataclass(frozen=True)
class Restored:
    """How far the weights are: bytes of the snapshot that are on the node, and where they came from."""

    bytes: int
    total_bytes: int
    source: str  # "cache" if the snapshot was complete when we came, else "store"; "resident" if all of it was on the device
    seconds: float | None  # until the last byte was there; None while it is not
    error: str | None = None  # what keeps them from coming, in words of the sidecar if it has any; as last heard by `Snapshot.watch`


class SnapshotFile:
    """One file of the snapshot, mapped copy-on-write while it may still be filled."""

    def __init__(self, path: str, blob: Blob) -> None:
        self.path = path
        self.version = blob.path.name  # named by what is in it
        self._blob = blob
        fd = self._open()
        try:
            self._stat = os.fstat(fd)
            self._complete = blob.vouches_for(self._stat)
            self.size = self._stat.st_size
            # An empty file cannot be mapped.
            self.view = MappedFile(fd, self.size).view if self.size else None
        finally:
            os.close(fd)
        self._chunks: ChunkMap | None = None

    def _open(self) -> int:
        for path in (self._blob.path, self._blob.part, self._blob.path):  # again: it may be published between the first two
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
        raise FileNotFoundError(self._blob.path)

    def _vanished(self) -> WeightsError:
        return WeightsError(f"{plain(self.path)} has vanished from the cache ({self._blob.path}); the sidecar must fetch it anew")

    def has(self, start: int, stop: int) -> bool:
        """Whether those bytes are there.

        Raises WeightsError if they turned out to be damaged, or if the part was thrown away and another one published in its place.
        """
        if not self._complete:
            self._chunks = self._chunks or self._blob.chunks(self._stat)
            if self._chunks and self._chunks.is_wrong():
                raise WeightsError(
                    f"{plain(self.path)} is damaged in the store, which was found out after some of it had been read; upload it again"
                )
            self._complete = self._is_published()  # not before: until then all of it may still be rejected
        return self._complete or (self._chunks is not None and self._chunks.has_range(start, stop))

    def _is_published(self) -> bool:
        try:
            published = self._blob.path.stat()
        except FileNotFoundError:
            return False
        if not os.path.samestat(published, self._stat):
            raise self._vanished()
        return self._blob.is_complete()

    def bytes_there(self) -> int:
        """How many of its bytes are there."""
        if self.has(0, self.size):
            return self.size
        return self._chunks.bytes_there() if self._chunks else 0

    def read(self, start: int, stop: int) -> bytes:
        """Those bytes, which are there."""
        return bytes(self.view[start:stop]) if self.view else b""


class Snapshot:
    """The files of the snapshot that a URI stands for. Safe to use from several threads."""

    def __init__(self, settings: WeightsSettings) -> None:
        """Opens nothing and waits for nothing. Raises SettingsError for a malformed URI."""
        self.uri = settings.uri or ""
        if self.uri:
            WeightsUri.parse(self.uri)
        self.restored = Restored(0, 0, "store", None)  # as last seen: replaced as a whole, so that reading it takes no lock
        self._settings = settings
        self._cache = NodeCache(settings.cache_dir)
        self._began = time.monotonic()
        self._lock = threading.RLock()  # guards the fields below, and what changes `restored`; held while looking, and asking the sidecar
        self._lease: Lease | None = None
        self._files: dict[str, SnapshotFile] = {}  # filled once, before the lease
        self._source = "cache"
        self._is_resident: bool | None = None  # all that was restored to devices until now; None if nothing was
        self._is_watched = False
        self._count_at = 0.0
        self._hear_at = self._began + HEAR_S
        self._errors: dict[str, str | None] = {"seen": None, "heard": None}
        self._over = threading.Event()
        self._threads = Threads(_say_ended)

    def watch(self) -> None:
        """Have `restored` kept up to date by a thread, until all is there or nobody wants the snapshot any more.

        The first look is taken here and now, unless it asks the sidecar. Whatever is wrong is told to who waits for bytes.
        """
        with self._lock:
            if self._is_watched or not self.uri:
                return
            self._is_watched = True
        if self._settings.revalidate != "before":
            self._glance()
        if self.restored.seconds is None:
            self._threads.start("weights", _watch, weakref.ref(self), self._over)

    def close(self) -> None:
        """End the watching."""
        self._over.set()
        self._threads.join()

    def _glance(self) -> bool:
        """Look; returns whether there is more to be seen later."""
        try:
            if self._attach() and time.monotonic() >= self._count_at:
                self.count()
        except Exception as error:  # noqa: BLE001  who waits for bytes meets it, and tells of it
            self._note(seen=described(error))
            return True
        self._note(seen=None)
        return self.restored.seconds is None

    def _hear(self) -> None:
        """Have the sidecar say what is wrong, if that is to be known anew; takes ASK_S at most, and no lock."""
        if time.monotonic() >= self._hear_at:
            row = _sidecars_row(self._settings.port, self.uri)
            self._hear_at = time.monotonic() + HEAR_S
            if row is not None:
                is_wrong = row.get("error") and row.get("phase") in _WAITING  # else they come all the same
                self._note(heard=told(f"the sidecar says: {row['error']}") if is_wrong else None)

    def _note(self, **errors: str | None) -> None:
        """seen: by us; heard: of the sidecar. None: nothing is wrong by now."""
        with self._lock:
            self._errors |= errors
            error = next(filter(None, self._errors.values()), None) if self.restored.seconds is None else None
            if self.restored.error != error:
                self.restored = replace(self.restored, error=error)

    def count(self) -> None:
        """Bring `restored` up to date; once all bytes are there, or while there is no snapshot, nothing changes."""
        if self.restored.seconds is not None or not self._lease:
            return
        with self._lock, suppress(WeightsError, OSError):  # which who waits for that file is told of
            began = time.thread_time()
            there = sum(file.bytes_there() for file in self._files.values())
            total = sum(file.size for file in self._files.values())
            if self.restored.seconds is None:
                seconds = time.monotonic() - self._began if there == total else None
                self.restored = Restored(there, total, self._seen_source(), seconds, self.restored.error if seconds is None else None)
            self._count_at = time.monotonic() + (time.thread_time() - began) / COUNTING

    def count_resident(self, attached: int, copied: int) -> None:
        """So many bytes were found on devices, so many copied there, by a restore that has ended."""
        with self._lock:
            if attached or copied:
                self._is_resident = not copied and self._is_resident is not False
            self.restored = replace(self.restored, source=self._seen_source())

    def _seen_source(self) -> str:
        return "resident" if self._is_resident else self._source

    def below(self, folder: str, what: str) -> Mapping[str, SnapshotFile]:
        """The files below a folder ("" or a path that ends in "/") by their paths from there, in path order; waits until they are known.

        what: they are wanted for, in an error. Raises WeightsError if there are none.
        """
        if not self.uri:
            raise WeightsError(f"{what} cannot be had: WEIGHTS_URI is not set")
        while not self._attach():
            time.sleep(POLL_S)
        found = {path.removeprefix(folder): file for path, file in self._files.items() if path.startswith(folder)}
        if not found:
            raise WeightsError(f"{self.uri} has no folder {quoted(folder.rstrip('/'))}; it has {listed(self._files)}")
        return found

    def wait(self, file: SnapshotFile, start: int, stop: int, pause: Callable[[], None] | None = None) -> None:
        """Return once those bytes are there; calls `pause` between two looks. Raises WeightsError."""
        has_waited = False
        while not file.has(start, stop):
            has_waited = True
            if pause:
                pause()
            else:
                self.pause(file.path)
        if has_waited and file.has(0, file.size):
            self.count()  # it may have been the last one

    def pause(self, what: str) -> None:
        """Between two looks at bytes that are not there. Raises WeightsError if the sidecar has moved on to other objects."""
        time.sleep(POLL_S)
        if time.monotonic() >= self._count_at:
            self.count()
        assert self._lease is not None
        ref = self._cache.ref(self.uri)
        if ref and self._lease.snapshot not in (ref.snapshot, ref.next):
            now = ref.next or ref.snapshot
            raise WeightsError(
                f"{self.uri} changed while {plain(what)} was being read: it is now snapshot {now}, was {self._lease.snapshot}"
            )

    def link(self, file: SnapshotFile) -> Path:
        """Where a file is, once it is complete. Raises WeightsError."""
        self.wait(file, 0, file.size)
        link = self.directory() / file.path
        while not link.exists():
            file.has(0, file.size)  # raises if it is damaged after all
            self.pause(file.path)
        self.count()
        return link

    def directory(self) -> Path:
        """Where the files are, once their paths are known (`below`)."""
        assert self._lease is not None
        return self._cache.snapshot_path(self._lease.snapshot)

    def _attach(self) -> bool:
        """Take a lease on the snapshot to read, and map its files; False while there is none to be read."""
        if self._lease:
            return True
        with self._lock:
            if self._lease:
                return True
            self._cache.check_format()
            candidates = self._candidates()
            for snapshot in candidates:
                blobs = self._cache.snapshot_blobs(snapshot)
                if are_complete(blobs) and self._open(snapshot, blobs):
                    return True
            self._source = "store"
            # Half a snapshot that nobody fills is what an earlier pod left behind; our sidecar may be about to choose another.
            for snapshot in candidates:
                blobs = self._cache.snapshot_blobs(snapshot)
                if any(blob.is_being_filled() for blob in blobs.values()) and self._open(snapshot, blobs):
                    return True
            return False

    def _candidates(self) -> list[str]:
        """The snapshots that our URI stands for, the better one first."""
        if self._settings.revalidate == "before":
            asked = _ask_sidecar(self._settings.port, self.uri)
            return [asked] if asked else []
        ref = self._cache.ref(self.uri)
        return [snapshot for snapshot in (ref.snapshot, ref.next) if snapshot] if ref else []

    def _open(self, snapshot: str, blobs: Mapping[str, Blob]) -> bool:
        lease = self._cache.lease(snapshot)
        if not lease:
            return False  # evicted since we looked
        try:
            self._files = {path: SnapshotFile(path, blob) for path, blob in blobs.items()}
        except FileNotFoundError:
            return False  # a part was thrown away; another one will come
        self._lease = lease
        self.count()
        return True


def _watch(watched: "weakref.ref[Snapshot]", over: threading.Event) -> None:
    while not over.is_set() and (snapshot := watched()) and snapshot._glance():  # noqa: SLF001  its thread
        snapshot._hear()  # noqa: SLF001
        del snapshot  # whoever had it last lets go of the weights
        over.wait(WATCH_S)


def _say_ended(name: str, error: BaseException) -> None:
    log.error("thread %r ended, and how far the weights are is not known any more: %s", name, described(error), exc_info=error)


def _ask_sidecar(port: int, uri: str) -> str | None:
    """The snapshot that our pod's sidecar has settled on, now that it has asked the store; None while it has not."""
    row = _sidecars_row(port, uri)
    with suppress(KeyError, TypeError):
        if row and row["checked"] and _SNAPSHOT.fullmatch(row["snapshot"]):
            return str(row["snapshot"])
    return None


def _sidecars_row(port: int, uri: str) -> dict[str, Any] | None:
    """What our pod's sidecar says of a URI; None if it says nothing."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        for row in json.loads(_get(port, "/v1/snapshots"))["snapshots"]:
            if row["uri"] == uri:
                return dict(row)
    return None


def _get(port: int, path: str) -> bytes:
    """What is answered with 200 there. Raises OSError or ValueError, also if not all of the answer is there within ASK_S.

    Of Python's HTTP clients none has a time limit for the whole.
    """
    end = time.monotonic() + ASK_S
    answer = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=ASK_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())  # 1.0: it ends with the connection
        while (left_s := end - time.monotonic()) > 0 and len(answer) <= MAX_ANSWER_BYTES:
            connection.settimeout(left_s)
            piece = connection.recv(1 << 16)
            if not piece:
                break
            answer += piece
        else:
            raise TimeoutError(f"{len(answer)} bytes of an answer, and no end after {ASK_S} s")
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    if head.split(b" ", 2)[1:2] != [b"200"]:
        raise ValueError(f"answered {quoted(head)}")
    return body
