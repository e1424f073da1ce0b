"""Room: what is counted, what goes, in which order, and what never does."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support import ROOT, write_chunks
from weights_cache import cli, room
from weights_cache.blob import BlobWriter
from weights_cache.cache import FileRef, Lease, NodeCache, Ref
from weights_cache.errors import CacheError

NAMESPACE = "bucket/model"
URI = "s3://bucket/model"
KIB = 1 << 10
YEAR = 365 * 86400.0


def files(**sizes: int) -> list[FileRef]:
    """Files by name; one name and size is one version, wherever it appears."""
    return [FileRef(name, size, f'"{name}"') for name, size in sizes.items()]


def take(cache: NodeCache, limit: int | None = None, **sizes: int) -> Lease:
    return room.reserve(cache, NAMESPACE, files(**sizes), limit=limit, uri=URI)[0]


def complete(cache: NodeCache, snapshot: str) -> None:
    for blob in cache.snapshot_blobs(snapshot).values():
        if not blob.is_complete():
            size = blob.part.stat().st_size
            with BlobWriter.try_acquire(blob, size) or pytest.fail("somebody else is writing") as writer:
                write_chunks(writer, bytes(size))
                writer.publish()


def add(cache: NodeCache, limit: int | None = None, **sizes: int) -> str:
    """A complete snapshot that nobody uses."""
    with take(cache, limit, **sizes) as lease:
        complete(cache, lease.snapshot)
    return lease.snapshot


def use(cache: NodeCache, snapshot: str) -> Lease:
    lease = cache.lease(snapshot)
    assert lease is not None
    return lease


def evict(cache: NodeCache, snapshot: str) -> int | None:
    with cache.making_room():
        return room.evict(cache, snapshot)


def collect(cache: NodeCache) -> int:
    with cache.making_room():
        return room.collect(cache)


def snapshots(cache: NodeCache) -> list[str]:
    return [one.snapshot for one in room.stored(cache)]


def tree(cache: NodeCache) -> list[str]:
    return sorted(path.relative_to(cache.root).as_posix() for path in cache.root.rglob("*"))


LEASE_AND_WAIT = """
import sys, pathlib
from weights_cache.cache import NodeCache
lease = NodeCache(pathlib.Path(sys.argv[1])).lease(sys.argv[2])
print(lease.snapshot, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def leased_elsewhere(cache: NodeCache, snapshot: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that uses a snapshot."""
    command = [sys.executable, "-c", LEASE_AND_WAIT, str(cache.root), snapshot]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == f"{snapshot}\n"
        yield other


# Reserving


def test_a_reserved_snapshot_is_laid_out_with_space_for_every_byte_and_leased(cache: NodeCache) -> None:
    with take(cache, a=5, b=0, c=3 * KIB) as lease:
        blobs = cache.snapshot_blobs(lease.snapshot)
        assert {path: blob.part.stat().st_size for path, blob in blobs.items()} == {"a": 5, "b": 0, "c": 3 * KIB}
        assert room.used_bytes(cache) == 5 + 3 * KIB
        assert evict(cache, lease.snapshot) is None


def test_reserving_the_same_again_changes_nothing(cache: NodeCache) -> None:
    with take(cache, a=5, b=6) as first:
        before = tree(cache), room.used_bytes(cache)
        with take(cache, a=5, b=6) as second:
            assert second.snapshot == first.snapshot
            assert (tree(cache), room.used_bytes(cache)) == before


def test_files_that_are_there_need_no_room(cache: NodeCache) -> None:
    add(cache, a=60, b=30)
    assert room.reserve(cache, NAMESPACE, files(a=60, c=10), limit=100, uri=URI)[1] == 0
    assert room.used_bytes(cache) == 100


def test_what_is_needed_may_fill_the_limit_to_its_last_byte(cache: NodeCache) -> None:
    take(cache, 100, a=60, b=40)
    assert room.used_bytes(cache) == 100


def test_a_snapshot_that_fills_the_limit_can_be_reserved_again_while_it_is_being_filled(cache: NodeCache) -> None:
    with (
        take(cache, 100, a=60, b=40) as lease,
        BlobWriter.try_acquire(cache.snapshot_blobs(lease.snapshot)["a"], 60) or pytest.fail("it is busy"),
    ):
        assert take(cache, 100, a=60, b=40).snapshot == lease.snapshot


def test_a_complete_snapshot_is_not_refused_when_the_limit_has_become_smaller(cache: NodeCache) -> None:
    snapshot = add(cache, a=60, b=40)
    assert take(cache, 50, a=60, b=40).snapshot == snapshot


def test_a_size_that_no_disk_has_is_refused_and_leaves_nothing_behind(cache: NodeCache) -> None:
    before = tree(cache)
    with pytest.raises(CacheError, match=r"no room in .* for s3://bucket/model: 4,611,686,018,427,387,909 bytes needed"):
        take(cache, a=5, b=1 << 62)
    assert tree(cache) == before


def test_a_failure_while_reserving_leaves_nothing_behind(cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = add(cache, a=5)
    before = tree(cache)
    real = os.posix_fallocate

    def fallocate(fd: int, offset: int, size: int) -> None:
        if size == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(CacheError, match="no room for"):
        take(cache, a=5, b=6, c=7, d=8)
    assert tree(cache) == before
    assert cache.is_complete(snapshot)


def test_a_failure_while_reserving_keeps_what_somebody_else_is_filling(cache: NodeCache) -> None:
    with take(cache, a=50, b=50) as lease:
        before = tree(cache)
        with pytest.raises(CacheError):
            take(cache, 100, a=50, c=1)
        assert tree(cache) == before
        complete(cache, lease.snapshot)


def test_a_cache_that_was_removed_is_an_error_that_names_it(cache: NodeCache) -> None:
    shutil.rmtree(cache.root)
    with pytest.raises(CacheError, match=f"cache directory {cache.root}: No such file or directory"):
        take(cache, a=5)


# What goes


def test_what_was_used_least_lately_goes_first_and_no_more_than_is_needed(cache: NodeCache) -> None:
    one, two, three = add(cache, a=40), add(cache, b=30), add(cache, c=30)
    cache.touch(one)
    lease, evicted = room.reserve(cache, NAMESPACE, files(d=25), limit=100, uri=URI)
    assert snapshots(cache) == [three, one, lease.snapshot]
    assert evicted == 1
    assert not cache.is_complete(two)


def test_as_many_go_as_are_needed(cache: NodeCache) -> None:
    _, _, three = add(cache, a=30), add(cache, b=30), add(cache, c=30)
    lease, evicted = room.reserve(cache, NAMESPACE, files(d=70), limit=100, uri=URI)
    assert snapshots(cache) == [three, lease.snapshot]
    assert evicted == 2


def test_a_full_disk_makes_room_as_a_limit_does(cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    add(cache, a=30)
    two = add(cache, b=30)
    monkeypatch.setattr(room, "free_bytes", lambda folder: 10)
    lease = take(cache, c=40)
    assert snapshots(cache) == [two, lease.snapshot]


def test_the_snapshot_to_come_is_never_evicted_for_itself(cache: NodeCache) -> None:
    half = add(cache, a=30)
    take(cache, a=30, b=40).close()
    add(cache, c=30)
    cache.set_ref(Ref(URI, half))
    with take(cache, 100, a=30, b=40) as lease:
        complete(cache, lease.snapshot)
    assert cache.is_complete(lease.snapshot)


def test_a_snapshot_in_use_stays_and_the_next_one_goes(cache: NodeCache) -> None:
    one, two = add(cache, a=40), add(cache, b=40)
    with use(cache, one) as lease:
        take(cache, 100, c=40).close()
        assert snapshots(cache)[0] == lease.snapshot
        assert two not in snapshots(cache)
        assert evict(cache, one) is None
    assert evict(cache, one) is not None
    assert one not in snapshots(cache)


def test_a_snapshot_that_another_process_uses_stays_until_that_is_killed(cache: NodeCache) -> None:
    snapshot = add(cache, a=80)
    with leased_elsewhere(cache, snapshot) as other:
        (found,) = room.stored(cache)
        assert found.in_use
        assert evict(cache, snapshot) is None
        with pytest.raises(CacheError, match="0 could be evicted, 80 are in use"):
            take(cache, 100, b=40)
        assert cache.is_complete(snapshot)
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert not room.stored(cache)[0].in_use
        take(cache, 100, b=40)
        assert snapshot not in snapshots(cache)


def test_a_lease_is_gone_with_the_object_that_held_it(cache: NodeCache) -> None:
    snapshot = add(cache, a=8)
    lease = use(cache, snapshot)
    assert evict(cache, lease.snapshot) is None
    del lease
    assert evict(cache, snapshot) is not None
    assert cache.lease(snapshot) is None


def test_listing_what_is_there_keeps_nothing_from_being_evicted(cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = add(cache, a=8)
    looks, real = threading.Event(), os.close

    def close(fd: int) -> None:  # the end of the look, with its lock still held
        if threading.current_thread() is listing and Path(f"/proc/self/fd/{fd}").readlink() == cache.snapshot_path(snapshot):
            looks.set()
            time.sleep(0.05)
        real(fd)

    assert cli.list_.callback is not None
    listing = threading.Thread(target=cli.list_.callback, args=(cache.root, False))
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", close)
        listing.start()
        assert looks.wait(60)
        freed = evict(cache, snapshot)
        listing.join()
    assert freed is not None


def test_shared_files_are_counted_once_and_stay_as_long_as_one_snapshot_has_them(cache: NodeCache) -> None:
    one, two = add(cache, shared=50, a=10), add(cache, shared=50, b=20)
    assert room.used_bytes(cache) == 80
    assert [found.bytes for found in room.stored(cache)] == [60, 70]
    evict(cache, one)
    assert cache.is_complete(two)
    assert room.used_bytes(cache) == 70
    evict(cache, two)
    assert room.used_bytes(cache) == 0
    assert list((cache.root / "digests").iterdir()) == []


def test_what_an_eviction_would_free_does_not_count_shared_files(cache: NodeCache) -> None:
    one, two = add(cache, shared=50, a=10), add(cache, shared=50, b=20)
    with use(cache, two), pytest.raises(CacheError, match="10 could be evicted, 70 are in use"):
        take(cache, 100, c=40)
    assert snapshots(cache) == [one, two]
    take(cache, 100, c=100)  # together they free all of it
    assert room.used_bytes(cache) == 100


def test_shared_files_are_never_removed_for_the_snapshot_that_needs_them(cache: NodeCache) -> None:
    add(cache, shared=50, a=40)
    with take(cache, 100, shared=50, b=50) as lease:
        assert cache.snapshot_blobs(lease.snapshot)["shared"].is_complete()


def test_a_refusal_says_what_was_needed_and_what_there_is_and_evicts_nothing(cache: NodeCache) -> None:
    one, two = add(cache, a=1500), add(cache, b=2500)
    before = tree(cache)
    with use(cache, two), pytest.raises(CacheError) as caught:
        take(cache, 5000, c=4000)
    free = str(caught.value).split(" needed, ")[1].split(" free ")[0]
    assert int(free.replace(",", "")) > 4000
    assert str(caught.value) == (
        f"no room in {cache.root} for s3://bucket/model: 4,000 bytes needed, {free} free on its disk, "
        "1,000 left of WEIGHTS_CACHE_BYTES=5,000; 1,500 could be evicted, 2,500 are in use"
    )
    assert tree(cache) == before
    assert cache.is_complete(one)


def test_an_evicted_snapshot_is_no_longer_what_a_uri_stands_for(cache: NodeCache) -> None:
    snapshot = add(cache, a=5)
    cache.set_ref(Ref(URI, snapshot))
    assert room.stored(cache)[0].uris == [URI]
    assert evict(cache, snapshot) is not None
    assert cache.ref(URI) is None
    assert evict(cache, snapshot) is None


def test_a_file_that_its_disk_keeps_in_fewer_blocks_is_not_counted_as_still_to_be_written(
    cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = add(cache, a=8 * KIB)
    path = cache.snapshot_blobs(snapshot)["a"].path
    path.chmod(0o644)
    os.truncate(path, 0)
    os.truncate(path, 8 * KIB)  # as a disk that compresses keeps zeros
    monkeypatch.setattr(room, "free_bytes", lambda folder: 1000)
    take(cache, b=900)
    assert snapshots(cache)[0] == snapshot


# What nobody can want any more


def leave_parts_of_no_snapshot(cache: NodeCache) -> None:
    for name in ("blobs/0f", "blobs/0e.part", "blobs/0e.part.state", "digests/0f"):
        (cache.root / name).write_bytes(bytes(10))


def leave_drafts(cache: NodeCache) -> None:
    (cache.root / "snapshots" / ".0f.1" / "folder").mkdir(parents=True)
    (cache.root / "snapshots" / ".0f.1" / "folder" / "file").symlink_to("../../blobs/0f")
    (cache.root / "blobs" / ".0f.part.1").write_bytes(bytes(10))
    (cache.root / "refs" / ".0f.1").write_bytes(bytes(10))
    os.utime(cache.root / "refs" / ".0f.1", (0, time.time() - 7200))


def leave_half_a_snapshot(cache: NodeCache) -> None:
    take(cache, b=10, c=10).close()


def leave_a_snapshot_with_a_file_missing(cache: NodeCache) -> None:
    cache.snapshot_blobs(add(cache, b=10, c=10))["b"].path.unlink()


def leave_half_an_eviction(cache: NodeCache) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    snapshot = add(cache, b=10, c=10)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            evict(cache, snapshot)


@pytest.mark.parametrize(
    "leave", [leave_parts_of_no_snapshot, leave_drafts, leave_half_an_eviction, leave_half_a_snapshot, leave_a_snapshot_with_a_file_missing]
)
def test_what_nobody_can_want_is_removed_when_the_next_one_comes(cache: NodeCache, leave: Callable[[NodeCache], None]) -> None:
    snapshot = add(cache, a=5)
    before = tree(cache)
    leave(cache)
    assert tree(cache) != before
    collect(cache)
    assert tree(cache) == before
    leave(cache)
    take(cache, 15, c=10)
    assert room.used_bytes(cache) == 15
    assert cache.is_complete(snapshot)


@pytest.mark.parametrize(
    "ref", [pytest.param(lambda it: Ref(URI, it), id="snapshot"), pytest.param(lambda it: Ref(URI, "a" * 32, 0.0, it), id="next")]
)
def test_half_a_snapshot_that_a_uri_stands_for_stays(cache: NodeCache, ref: Callable[[str], Ref]) -> None:
    with take(cache, a=10, b=10) as lease:
        cache.set_ref(ref(lease.snapshot))
    before = tree(cache)
    assert collect(cache) == 0
    assert tree(cache) == before


def test_half_a_snapshot_that_somebody_is_filling_stays(cache: NodeCache) -> None:
    with take(cache, a=10, b=10) as lease:
        collect(cache)
        take(cache, c=10).close()
        complete(cache, lease.snapshot)


def test_half_a_snapshot_that_a_uri_stands_for_goes_when_its_room_is_needed(cache: NodeCache) -> None:
    with take(cache, a=60) as lease:
        cache.set_ref(Ref(URI, lease.snapshot))
    take(cache, 100, b=60)
    assert lease.snapshot not in snapshots(cache)
    assert cache.ref(URI) is None


def test_a_complete_snapshot_stays_although_no_uri_stands_for_it(cache: NodeCache) -> None:
    snapshot = add(cache, a=10)
    assert collect(cache) == 0
    assert cache.is_complete(snapshot)


def test_a_ref_that_is_being_written_is_left_alone(cache: NodeCache) -> None:
    draft = cache.root / "refs" / ".0f.1"
    draft.write_text("{")
    collect(cache)
    assert draft.exists()


# Clocks


@pytest.mark.parametrize("jump", [pytest.param(-YEAR, id="back"), pytest.param(YEAR, id="forward")])
def test_a_clock_that_jumps_does_not_change_the_order_of_use(cache: NodeCache, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    one, two = add(cache, a=10), add(cache, b=10)
    now = time.time() + jump
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: now)
        three = add(cache, c=10)
        cache.touch(one)
        assert snapshots(cache) == [two, three, one]
        cache.touch(two)
        assert snapshots(cache) == [three, one, two]
    cache.touch(three)  # the clock is right again
    assert snapshots(cache) == [one, two, three]
    assert add(cache, 30, d=10) == snapshots(cache)[-1]
    assert one not in snapshots(cache)


def test_a_clock_that_stands_still_does_not_either(cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1754000000.0)
    order = [add(cache, **{name: 10}) for name in "abcdef"]
    for snapshot in order[::2]:
        cache.touch(snapshot)
    assert snapshots(cache) == order[1::2] + order[::2]


# Several at once


def test_a_file_that_a_neighbour_publishes_while_one_counts_is_no_error(cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = take(cache, a=10)
    real = os.scandir

    def scandir(folder: Path) -> "Iterator[os.DirEntry[str]]":
        if Path(folder) != cache.root / "blobs":
            return real(folder)
        found = list(real(folder))
        monkeypatch.setattr(os, "scandir", real)
        complete(cache, lease.snapshot)
        return iter(found)

    monkeypatch.setattr(os, "scandir", scandir)
    assert room.used_bytes(cache) <= 10


def test_a_file_that_a_neighbour_publishes_while_one_looks_for_it_is_not_brought_again(
    cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = take(cache, a=10)
    real = Path.stat

    def stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path.suffix == ".part":
            monkeypatch.setattr(Path, "stat", real)
            complete(cache, lease.snapshot)
        return real(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", stat)
    assert take(cache, 15, a=10).snapshot == lease.snapshot
    assert room.used_bytes(cache) == 10


def test_a_part_that_is_just_being_made_is_not_taken_for_a_left_over(cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = take(cache, a=10)
    (blob,) = cache.snapshot_blobs(lease.snapshot).values()
    blob.part.unlink()
    real = os.posix_fallocate

    def fallocate(fd: int, offset: int, size: int) -> None:
        monkeypatch.setattr(os, "posix_fallocate", real)
        collect(cache)
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with BlobWriter.try_acquire(blob, 10) or pytest.fail("it is busy") as writer:
        assert writer.chunks.bytes_there() == 0


def test_a_snapshot_that_is_evicted_while_another_is_touched_is_no_error(cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = add(cache, a=10), add(cache, b=10)
    real = Path.glob

    def glob(folder: Path, pattern: str) -> Iterator[Path]:
        found = list(real(folder, pattern))
        monkeypatch.setattr(Path, "glob", real)
        evict(cache, one)
        return iter(found)

    monkeypatch.setattr(Path, "glob", glob)
    cache.touch(two)
    assert snapshots(cache) == [two]


def test_a_ref_whose_writing_ends_while_one_collects_is_no_error(cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, real = cache.root / "refs" / ".0f.1", Path.glob
    draft.write_text("{}")

    def glob(folder: Path, pattern: str) -> Iterator[Path]:
        found = list(real(folder, pattern))
        if draft in found:
            draft.rename(cache.root / "refs" / "0f")
        return iter(found)

    monkeypatch.setattr(Path, "glob", glob)
    assert collect(cache) == 0


def test_a_snapshot_that_is_evicted_while_its_files_are_looked_up_has_none(cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = add(cache, a=10)
    real = Path.readlink

    def readlink(path: Path) -> Path:
        monkeypatch.setattr(Path, "readlink", real)
        evict(cache, snapshot)
        return real(path)

    monkeypatch.setattr(Path, "readlink", readlink)
    assert not cache.is_complete(snapshot)


RESERVE_AND_RELEASE = """
import pathlib, random, sys
from weights_cache import room
from weights_cache.cache import FileRef, NodeCache
from weights_cache.errors import CacheError
cache, seed = NodeCache(pathlib.Path(sys.argv[1])), sys.argv[2]
chance, held, most = random.Random(seed), [], 0
print("there", flush=True)
sys.stdin.readline()
for number in range(60):
    files = [FileRef(f"{chance.randrange(40)}", size := chance.randrange(1, 30_000), str(size)) for _ in range(2)]
    files = list({file.path: file for file in files}.values())
    try:
        held.append(room.reserve(cache, "bucket/model", files, limit=100_000, uri="s3://bucket/model")[0])
    except CacheError:
        held[:1] = []
    with cache.making_room():
        most = max(most, room.used_bytes(cache))
    if len(held) > 2:
        held.pop(0).close()
print(most)
"""


def test_several_processes_together_never_take_more_than_the_limit(cache: NodeCache) -> None:
    command = [sys.executable, "-c", RESERVE_AND_RELEASE, str(cache.root)]
    others = [subprocess.Popen([*command, seed], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for seed in "abc"]
    for other in others:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
    for other in others:
        other.stdin.write("go\n")  # type: ignore[union-attr]
        other.stdin.flush()  # type: ignore[union-attr]
    most = [int(other.communicate(timeout=60)[0]) for other in others]
    assert [other.returncode for other in others] == [0, 0, 0]
    assert 50_000 < max(most) <= 100_000
    take(cache, 100_000, all=100_000)  # nobody holds anything any more


# Whatever else may happen

LIMIT = 100
VERSIONS: Mapping[str, Mapping[str, int]] = {
    "one": {"shared": 30, "a": 10},
    "two": {"shared": 30, "b": 25},
    "three": {"c": 45},
    "four": {"c": 45, "d": 20, "shared": 30},
    "five": {"e": 100},
    "six": {"f": 5, "g": 0},
    "seven": {"f": 5, "h": 60},
}
VERSION = st.sampled_from(sorted(VERSIONS))


class Room(RuleBasedStateMachine):
    """Snapshots that share files come and go in a cache that cannot hold them all."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.cache = NodeCache(Path(self.folder.name))
        self.cache.create()
        self.leases: dict[str, Lease] = {}
        self.used: list[str] = []  # complete snapshots, the last one used last

    @rule(version=VERSION, completes=st.booleans(), keeps=st.booleans())
    def reserve(self, version: str, completes: bool, keeps: bool) -> None:
        before = set(snapshots(self.cache))
        try:
            lease = take(self.cache, LIMIT, **VERSIONS[version])
        except CacheError:
            assert set(snapshots(self.cache)) >= set(self.used)
            assert self._staying(version) > LIMIT
            return
        if completes:
            complete(self.cache, lease.snapshot)
        gone = before - set(snapshots(self.cache))
        candidates = [one for one in self.used if one not in self.leases and one != lease.snapshot]
        assert [one for one in candidates if one in gone] == candidates[: len(gone & set(candidates))]
        self.used = [one for one in self.used if one not in gone | {lease.snapshot}]
        if self.cache.is_complete(lease.snapshot):
            self.used.append(lease.snapshot)
        if keeps:
            self.leases[lease.snapshot] = lease
        else:
            lease.close()

    def _staying(self, version: str) -> int:
        """The bytes that there would be if all went that may go."""
        wanted = dict(VERSIONS[version])
        for one in room.stored(self.cache):
            if one.in_use:
                wanted |= {path: one.blobs[blob.path.name] for path, blob in self.cache.snapshot_blobs(one.snapshot).items()}
        return sum(wanted.values())

    @rule(at=st.integers(0, 9))
    def release(self, at: int) -> None:
        if self.leases:
            self.leases.pop(sorted(self.leases)[at % len(self.leases)]).close()

    @rule(at=st.integers(0, 9))
    def lease(self, at: int) -> None:
        if self.used:
            snapshot = self.used[at % len(self.used)]
            self.leases[snapshot] = use(self.cache, snapshot)

    @rule(at=st.integers(0, 9))
    def touch(self, at: int) -> None:
        if self.used:
            self.used.append(self.used.pop(at % len(self.used)))
            self.cache.touch(self.used[-1])

    @rule(at=st.integers(0, 9))
    def evict(self, at: int) -> None:
        if self.used:
            snapshot = self.used[at % len(self.used)]
            assert (evict(self.cache, snapshot) is None) is (snapshot in self.leases)
            if snapshot not in self.leases:
                self.used.remove(snapshot)

    @rule()
    def collect(self) -> None:
        collect(self.cache)
        assert {blob.path.name for snapshot in snapshots(self.cache) for blob in self.cache.snapshot_blobs(snapshot).values()} == {
            path.name.split(".")[0] for path in (self.cache.root / "blobs").iterdir()
        }

    @invariant()
    def the_limit_is_kept(self) -> None:
        if hasattr(self, "cache"):
            assert room.used_bytes(self.cache) <= LIMIT

    @invariant()
    def what_is_complete_stays_so_in_the_order_of_use(self) -> None:
        if hasattr(self, "cache"):
            found = [one for one in room.stored(self.cache) if one.complete]
            assert [one.snapshot for one in found if one.snapshot in self.used] == self.used

    @invariant()
    def what_is_in_use_has_all_its_files(self) -> None:
        if hasattr(self, "cache"):
            for snapshot in self.leases:
                blobs = self.cache.snapshot_blobs(snapshot).values()
                assert blobs
                assert all(blob.path.exists() or blob.part.exists() for blob in blobs)

    def teardown(self) -> None:
        for lease in self.leases.values():
            lease.close()
        self.folder.cleanup()


Room.TestCase.settings = settings(derandomize=True, deadline=None, max_examples=40, stateful_step_count=25)
test_whatever_comes_and_goes_the_limit_is_kept_and_nothing_in_use_is_lost = Room.TestCase
