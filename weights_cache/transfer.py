"""Fill blobs from the store: ranges in parallel, each chunk checked before anybody can see it.

Parts (ranges of several chunks) are handed out in file order to workers, each with a connection of its own. On a tmpfs a worker makes a
large page and reads straight into it; elsewhere, and where there is no such page to be had, it reads into a buffer that stays in the
processor's cache, takes the digest there and writes to the file: measured, that beats a mapping with small pages (each has to be faulted
in) and splice (the digest would have to fetch everything from memory again).
An object whose ranges cannot be trusted is read as a whole, through boto3: slower, and right with any store.
How many workers there are is found out while it runs: more for as long as that brings more, fewer when the store asks for it.
"""

import base64
import hashlib
import logging
import os
import random
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from awscrt.checksums import crc32c

from weights_cache.blob import BlobWriter
from weights_cache.cache import FileRef
from weights_cache.chunks import CHUNK_BYTES
from weights_cache.connection import Connection, Reply
from weights_cache.digest import chunk_digest, whole_digest
from weights_cache.errors import ObjectChanged, StoreError, StoreUnavailable
from weights_cache.store import Store, is_pinnable
from weights_cache.threads import Threads

log = logging.getLogger("relight.weights")

ATTEMPTS = 8  # in a row that bring nothing; the wait between them doubles from 0.1 s, so a store may be away for some 10 s
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
LONGEST_RETRY_AFTER_S = 30.0
FIRST_CONNECTIONS = 2
BUFFER_BYTES = CHUNK_BYTES  # filled in one call: fewer of them wake and switch threads more often
LARGE_BUFFERS = 4  # workers that have such a one; the others, of whom there may be many, have a quarter of it
LOOK_S = 0.05
STEP_S = 0.1  # how long a number of connections is watched, and how many bytes it has to bring before it is judged
STEP_BYTES = 1 << 20
WORTH_IT = 1.05  # what twice as many have to bring
WORSE = 0.8  # what they have to bring to be kept at the start, when one look says little
BUSY = 0.4  # of all cores
HOLD_S = 10.0  # before more are tried again
SLOW_S = 3.0  # a connection that brings for so long less than a tenth of what the best one does is made anew
DAMAGED_ATTEMPTS = 3


@dataclass
class Job:
    """One file to fill. digests: of each chunk, from the manifest; None without one."""

    file: FileRef
    writer: BlobWriter
    digests: Sequence[int] | None
    pending: int = 0  # parts that are not done; this and `active`, those being read, are guarded by the transfer's lock
    active: int = 0
    whole: bool = False  # no range of it can be trusted: it is read in one go


@dataclass
class _Worker:
    number: int
    connection: Connection
    reading_since: float | None = None  # None while it waits for anything but the store
    seen: int = 0  # bytes that had come when it was last looked at


class _RangesUnusable(Exception):
    """The store's answer to a range does not prove that it is that range of that version."""


class _Busy(StoreUnavailable):
    """The store asks for patience, at least `after_s` seconds of it."""

    def __init__(self, message: str, after_s: float) -> None:
        super().__init__(message)
        self.after_s = after_s


class _Damaged(StoreUnavailable):
    """What came is not what was pushed: a bit flipped on the way, or in the store."""


class _Pace:
    """At most so many bytes a second over all workers; 0 is no bound."""

    def __init__(self, bytes_per_second: int) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()  # guards _free_at
        self._free_at = 0.0

    def wait_s(self, count: int) -> float:
        """How long to wait before taking `count` bytes more."""
        if not self._rate:
            return 0.0
        with self._lock:
            now = time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + count / self._rate
            return start - now


class _Growth:
    """How many connections: twice as many for as long as that brings more, half as many when the store asks for less.

    Where the processor is what is busy, more of them would only be in each other's way.
    """

    def __init__(self, limit: int, cores: int) -> None:
        self.allowed = min(FIRST_CONNECTIONS, limit)
        self._limit = limit
        self._cores = cores
        self._before = self.allowed  # how many there were before the last step
        self._rate = 0.0  # what those brought, bytes per second
        self._needed = WORSE  # times as much, for more to be kept
        self._seen = (0, 0.0, 0.0)
        self._hold_until = 0.0

    def look(self, total: int, seconds: float, cpu_seconds: float, *, throttled: bool) -> int:
        """The number for the time to come, `seconds` after the start, with `total` bytes here, for so many seconds of processor time."""
        bytes_before, seconds_before, cpu_before = self._seen
        if throttled:
            self.allowed = self._before = max(1, self.allowed // 2)
            self._hold_until = seconds + HOLD_S
        elif seconds < max(self._hold_until, seconds_before + STEP_S) or total < bytes_before + STEP_BYTES:
            return self.allowed
        else:
            window_s = seconds - seconds_before
            rate, busy = (total - bytes_before) / window_s, (cpu_seconds - cpu_before) / window_s
            is_busy = busy > BUSY * self._cores
            if rate > self._rate * WORTH_IT and not is_busy:
                self._before, self._rate = self.allowed, rate
                self.allowed = min(self._limit, 2 * self.allowed)
            else:
                if is_busy or rate < self._rate * self._needed:
                    self.allowed = self._before
                self._before, self._rate, self._needed = self.allowed, 0.0, WORTH_IT
                self._hold_until = seconds + HOLD_S  # until it is time to try again
        self._seen = total, seconds, cpu_seconds
        return self.allowed


class Transfer:
    """One transfer of several files. `run` returns when all are published; `cancel` ends it soon, in another thread."""

    def __init__(
        self,
        store: Store,
        jobs: Sequence[Job],
        *,
        connections: int,
        part_bytes: int,
        bytes_per_second: int = 0,
        on_bytes: Callable[[int], object] = lambda count: None,
    ) -> None:
        self._store = store
        self._growth = _Growth(connections, len(os.sched_getaffinity(0)))
        self._pace = _Pace(bytes_per_second)
        self._on_bytes = on_bytes
        self._lock = threading.Condition()  # guards what follows
        self._parts: deque[tuple[Job, int, int]] = deque()
        self._workers: list[_Worker] = []
        self._allowed = 0
        self._running = 0
        self._threads = Threads(lambda name, error: self._fail(error))
        self._error: BaseException | None = None
        self.damaged = 0  # chunks that did not have the digest they should have; guarded too
        self._throttled = False
        self._best = 0.0  # bytes per second of the best connection, of late
        self._looked_at = 0.0
        self._over = threading.Event()
        self._jobs = list(jobs)
        for job in self._jobs:
            parts = [(job, *part) for part in job.writer.chunks.missing(part_bytes)]
            job.pending = len(parts)
            self._parts.extend(parts)

    def run(self) -> None:
        """Fetch what is missing and publish each file when it is complete. Raises StoreError or CacheError.

        Whatever ends it, an interruption too, when it returns nobody works on the files any more.
        """
        try:
            for job in self._jobs:
                if not job.pending:
                    self._publish(job)
            self._watch()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._threads.join()
            self._jobs.clear()  # whose files are open and mapped
            self._parts.clear()
        if self._error:
            raise self._error

    def _watch(self) -> None:
        """See to it that there are as many workers as help, until there is nothing left to do."""
        self._allow(self._growth.allowed)
        began, cpu = time.monotonic(), time.process_time()
        self._looked_at = began
        while not self._over.wait(LOOK_S):
            now = time.monotonic()
            with self._lock:
                total, throttled, self._throttled = sum(worker.connection.received() for worker in self._workers), self._throttled, False
            self._allow(self._growth.look(total, now - began, time.process_time() - cpu, throttled=throttled))
            self._renew_slow(now)

    def cancel(self) -> None:
        """Make `run` end soon with an error; what was fetched stays for the next one."""
        self._fail(StoreError("the pull was stopped"))

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._lock.notify_all()
            workers = list(self._workers)
        self._over.set()
        for worker in workers:
            worker.connection.abort()

    def _allow(self, count: int) -> None:
        """Let so many workers work; those that are there already and too many rest between two parts."""
        with self._lock:
            self._allowed = count
            while len(self._workers) < min(count, len(self._workers) + len(self._parts)) and not self._error:
                worker = _Worker(len(self._workers), Connection(self._store))
                try:
                    self._threads.start(f"fetch-{worker.number}", self._work, worker)
                except RuntimeError as error:  # there can be no more threads
                    if not self._running:
                        raise StoreUnavailable(f"no thread can be had to fetch with: {error}") from error
                    break
                self._workers.append(worker)
                self._running += 1
            self._lock.notify_all()
            if not self._running:
                self._over.set()

    def _work(self, worker: _Worker) -> None:
        try:
            buffer = memoryview(bytearray(BUFFER_BYTES if worker.number < LARGE_BUFFERS else BUFFER_BYTES // 4))
            while part := self._next(worker):
                self._fetch(worker, buffer, *part)
        except BaseException as error:
            self._fail(error)  # before it is counted as done
            raise
        finally:
            worker.connection.close()
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._over.set()

    def _next(self, worker: _Worker) -> tuple[Job, int, int] | None:
        with self._lock:
            self._lock.wait_for(lambda: worker.number < self._allowed or not self._parts or self._error)
            if self._error or not self._parts:
                return None
            part = self._parts.popleft()
            part[0].active += 1
            return part

    def _fetch(self, worker: _Worker, buffer: memoryview, job: Job, start: int, stop: int) -> None:
        """Bring one part, whatever it takes, and publish the file if it was the last."""
        at, tries, is_afresh = start, 0, False
        while at < stop and not job.whole:
            try:
                for reached in self._range(worker, buffer, job, at, stop, afresh=is_afresh):
                    at, tries = reached, 0
            except _RangesUnusable as reason:
                with self._lock:
                    is_first, job.whole = not job.whole, True
                if is_first:
                    log.warning("%s: %s; reading the object as a whole", self._store.place(job.file), reason)
                    self._whole(worker, buffer, job)
            except StoreUnavailable as error:
                tries += 1
                self._pause_after(error, tries)
            except ObjectChanged:
                raise
            except StoreError:
                if is_afresh:
                    raise
                is_afresh = True  # an address is signed for a while, and credentials may change within it
        self._done(job)

    def _range(self, worker: _Worker, buffer: memoryview, job: Job, start: int, stop: int, *, afresh: bool) -> Iterator[int]:
        """Read [start, stop) of a file, yielding how far it is there."""
        with self._asking(worker, job, {"Range": f"bytes={start}-{stop - 1}"}, afresh=afresh) as reply:
            is_all = (start, stop) == (0, job.file.size)
            expected = f"bytes {start}-{stop - 1}/{job.file.size}"
            if reply.status != 206 and not is_all:
                raise _RangesUnusable(f"the store answers a range with {reply.status}")
            if reply.status == 206 and reply.header("Content-Range") != expected:
                raise _RangesUnusable(f"asked for {expected!r}, the store sent {reply.header('Content-Range')!r}")
            if reply.header("Content-Length") != str(stop - start):
                raise _RangesUnusable(
                    f"a range of {stop - start} bytes came with a length of {reply.header('Content-Length') or 'unknown'}"
                )
            if not self._proves_version(job, reply.header("ETag")) and job.digests is None:
                raise _RangesUnusable("the reply does not say which version it is of")
            for at in range(start, stop, CHUNK_BYTES):
                end = min(at + CHUNK_BYTES, stop)
                digest = self._chunk(worker, buffer, job, reply.readinto, at, end, write=True)
                job.writer.chunks.set(at // CHUNK_BYTES, digest)
                yield end

    def _whole(self, worker: _Worker, buffer: memoryview, job: Job) -> None:
        """Read a file in one reply, which is of one version whatever else the store gets wrong."""
        with self._lock:
            # Nobody else may declare a chunk valid between our look at it and our write to it.
            self._lock.wait_for(lambda: job.active == 1 or self._error)
        tries = 0
        while not job.writer.chunks.has_range(0, job.file.size):
            try:
                self._whole_once(worker, buffer, job)
            except StoreUnavailable as error:
                tries += 1
                self._pause_after(error, tries)

    def _whole_once(self, worker: _Worker, buffer: memoryview, job: Job) -> None:
        chunks, size, place = job.writer.chunks, job.file.size, self._store.place(job.file)
        with self._store.stream(job.file) as reply:
            is_proven = self._proves_version(job, reply.etag) or job.digests is not None
            unproven = []
            for chunk, at in enumerate(range(0, size, CHUNK_BYTES)):
                is_there = chunks.has(chunk)
                digest = self._chunk(worker, buffer, job, reply.readinto, at, min(at + CHUNK_BYTES, size), write=not is_there)
                if is_there and digest != chunks.digest(chunk):
                    raise ObjectChanged(f"{place} changed while being read: it has other bytes from {at} on")
                if is_proven:
                    chunks.set(chunk, digest)
                else:
                    unproven.append((chunk, digest))
            if not reply.is_over():
                raise ObjectChanged(f"{place} changed while being read: it is longer than was listed")
            for found in unproven:  # all of them are of one reply, and so of one version
                chunks.set(*found)

    @contextmanager
    def _asking(self, worker: _Worker, job: Job, headers: Mapping[str, str], *, afresh: bool) -> Iterator[Reply]:
        """The reply to a request for a file, while it is being read. The connection is used again only if all went well.

        Raises ObjectChanged, StoreUnavailable or another StoreError, also for what happens while it is read.
        """
        self._check()
        worker.reading_since = time.monotonic()
        try:
            reply = worker.connection.get(self._store.address(job.file, afresh=afresh), dict(headers) | _condition(job.file))
            if reply.status not in (200, 206):
                error = self._store.refusal(job.file, reply.status, reply.error_code())
                with self._lock:
                    self._throttled = self._throttled or reply.status in (429, 503)
                raise _Busy(str(error), reply.retry_after()) if isinstance(error, StoreUnavailable) else error
            yield reply
        except BaseException as error:
            worker.connection.close()
            self._check()  # it may have been cut off because another one failed
            if isinstance(error, OSError | HTTPException) or type(error) is StoreUnavailable:
                raise StoreUnavailable(f"cannot read {self._store.place(job.file)}: {error or type(error).__name__}") from error
            raise
        finally:
            worker.reading_since = None

    def _proves_version(self, job: Job, etag: str) -> bool:
        """Whether a reply with this ETag says that it is of the listed version. Raises ObjectChanged if it is of another."""
        if etag and is_pinnable(job.file) and etag.strip('"') != job.file.etag.strip('"'):
            raise ObjectChanged(f"{self._store.place(job.file)} changed while being read: version {etag}, listed {job.file.etag}")
        return bool(etag) and is_pinnable(job.file)

    def _chunk(
        self, worker: _Worker, buffer: memoryview, job: Job, readinto: Callable[[memoryview], object], start: int, stop: int, *, write: bool
    ) -> int:
        """Bring one chunk's bytes into the file; returns their digest. Raises StoreUnavailable if it is not the manifest's."""
        at, digest = start, 0
        while at < stop:
            end = min(at + len(buffer), stop)
            memory = job.writer.memory(at, end) if write else None
            piece = buffer[: end - at] if memory is None else memory
            if wait_s := self._pace.wait_s(len(piece)):
                was, worker.reading_since = worker.reading_since, None
                self._over.wait(wait_s)
                worker.reading_since = was and time.monotonic()
            self._check()
            readinto(piece)
            digest = chunk_digest(piece, digest)
            if write and memory is None:
                job.writer.write(piece, at)
            at = end
        self._on_bytes(stop - start)
        if job.digests is not None and digest != job.digests[start // CHUNK_BYTES]:
            with self._lock:
                self.damaged += 1
            raise _Damaged(f"{self._store.place(job.file)}: the bytes from {start} to {stop} are not those that were pushed")
        return digest

    def _done(self, job: Job) -> None:
        with self._lock:
            job.pending -= 1
            job.active -= 1
            is_last = not job.pending
            self._lock.notify_all()
        if is_last and not self._error:
            self._publish(job)

    def _publish(self, job: Job) -> None:
        """Make a complete file appear, unless the store's own checksum of it speaks against that."""
        if job.digests is None:
            tries = 0
            while True:
                try:
                    checksums = self._store.checksums(job.file)
                    break
                except StoreUnavailable as error:
                    tries += 1
                    self._pause_after(error, tries)
            if wrong := _disagreeing(checksums, job.writer):
                self.damaged += job.writer.chunks.chunks
                job.writer.reject()
                if not is_pinnable(job.file):  # the checksum may be that of another version
                    raise ObjectChanged(f"{self._store.place(job.file)} changed while being read: its bytes do not have its {wrong}")
                raise StoreError(
                    f"{self._store.place(job.file)} is damaged in the store: its bytes do not have its {wrong}; upload it again"
                )
        job.writer.publish()

    def _pause_after(self, error: StoreUnavailable, tries: int) -> None:
        """Wait before the next try. Raises the error, for good, if there have been enough."""
        if isinstance(error, _Damaged) and tries >= DAMAGED_ATTEMPTS:
            raise StoreError(f"{error}: it is damaged in the store; push it again") from error
        if tries >= ATTEMPTS:
            raise error
        pause_s = _pause_s(tries, error.after_s if isinstance(error, _Busy) else 0.0)
        log.info("%s; again in %.1f s", error, pause_s)
        self._over.wait(pause_s)
        self._check()

    def _check(self) -> None:
        if self._error:
            raise self._error

    def _renew_slow(self, now: float) -> None:
        """Cut off connections that bring next to nothing while others do, or did a moment ago; their workers go on with new ones."""
        window_s = now - self._looked_at
        if window_s < SLOW_S:
            return
        with self._lock:
            busy = [worker for worker in self._workers if worker.reading_since and worker.reading_since <= self._looked_at]
            rates = {}
            for worker in self._workers:
                received = worker.connection.received()
                rates[worker.number], worker.seen = (received - worker.seen) / window_s, received
        self._best = max(self._best / 2, *rates.values())
        self._looked_at = now
        for worker in busy:
            if rates[worker.number] < self._best / 10:
                log.info("a connection brings %.0f bytes a second, the best one %.0f; making it anew", rates[worker.number], self._best)
                worker.connection.abort()


def _pause_s(tries: int, asked_s: float) -> float:
    """Seconds until the next try, after so many: doubling, half of it by chance, and as much as the store asks for, within bounds."""
    pause_s = random.uniform(0.5, 1) * min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (tries - 1))
    return max(pause_s, min(asked_s, LONGEST_RETRY_AFTER_S))


def _condition(file: FileRef) -> dict[str, str]:
    return {"If-Match": file.etag} if is_pinnable(file) else {}


def _disagreeing(checksums: Mapping[str, str], writer: BlobWriter) -> str | None:
    """The name of a whole-object checksum, base64, that the file's bytes do not have; None if they agree or there is none we know."""
    chunks = writer.chunks
    if found := checksums.get("ChecksumCRC64NVME"):
        whole = whole_digest((chunks.digest(chunk) for chunk in range(chunks.chunks)), chunks.size)
        return None if base64.b64decode(found) == whole.to_bytes(8, "big") else "CRC64NVME"
    for name, make in _CHECKSUMS.items():
        if found := checksums.get(f"Checksum{name}"):
            checksum = make()
            for data in writer.read():
                checksum.update(data)
            return None if base64.b64decode(found) == checksum.digest() else name
    return None


class _Crc:
    """A CRC of 32 bits with the interface of `hashlib`."""

    def __init__(self, update: Callable[[bytes, int], int]) -> None:
        self._update, self._value = update, 0

    def update(self, data: bytes) -> None:
        self._value = self._update(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


_CHECKSUMS: Mapping[str, Callable[[], Any]] = {
    "CRC32C": lambda: _Crc(crc32c),
    "CRC32": lambda: _Crc(zlib.crc32),
    "SHA256": hashlib.sha256,
    "SHA1": lambda: hashlib.sha1(usedforsecurity=False),
}
