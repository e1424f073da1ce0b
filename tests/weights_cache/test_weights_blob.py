"""One file of the cache: the lock, what survives a crash, the moment it appears under its own name, and how damage is mended."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import ROOT, write_chunks
from tests.weights_cache.conftest import noise
from tests.weights_cache.mounts import on_small_disk
from weights_cache import chunks
from weights_cache.blob import Blob, BlobWriter
from weights_cache.digest import chunk_digest
from weights_cache.errors import CacheError

MIB = 1 << 20
ODD = 3 * MIB + 12_345  # four chunks, the last one short
DATA = noise(ODD)


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    for folder in ("blobs", "digests"):
        (tmp_path / folder).mkdir()
    return Blob(tmp_path / "blobs" / "0f0f")


@pytest.fixture
def restart(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """restart(): from now on this is another start of the machine."""
    return lambda: monkeypatch.setattr(chunks, "_boot_id", lambda: "6b8f7c1e-0000-4000-8000-000000000001")


def acquire(blob: Blob, size: int = ODD) -> BlobWriter:
    writer = BlobWriter.try_acquire(blob, size)
    assert writer is not None
    return writer


def acquire_in_the_end(blob: Blob, size: int = ODD) -> BlobWriter:
    """The first try may only make way for the second."""
    return BlobWriter.try_acquire(blob, size) or acquire(blob, size)


def published(blob: Blob, data: bytes = DATA) -> Blob:
    with acquire(blob, len(data)) as writer:
        write_chunks(writer, data)
        writer.publish()
    return blob


def missing(writer: BlobWriter) -> list[int]:
    return [start // MIB for start, _ in writer.chunks.missing(1)]


def mended(blob: Blob, data: bytes = DATA) -> list[int]:
    """Carry on as a pull does; the chunks that had to be brought."""
    with acquire_in_the_end(blob, len(data)) as writer:
        writer.recheck(chunk_digest)
        if brought := missing(writer):
            write_chunks(writer, data, *brought)
        writer.publish()
    assert blob.is_complete()
    assert blob.path.read_bytes() == data
    return brought


def flip(path: Path, bit: int) -> None:
    at, mode = bit // 8, path.stat().st_mode
    path.chmod(0o644)
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), at)
    path.chmod(mode)


def damaged(blob: Blob) -> list[int]:
    return blob.damaged_chunks(chunk_digest, lambda count: None)


def everything(blob: Blob) -> list[str]:
    top = blob.path.parent.parent
    return sorted(path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file())


# From the first byte to publication


def test_naming_a_blob_makes_nothing(blob: Blob) -> None:
    assert not blob.is_complete()
    assert everything(blob) == []


def test_a_reserved_part_has_its_full_size_with_space_behind_it(blob: Blob) -> None:
    blob.reserve(ODD)
    assert blob.part.stat().st_size == ODD
    assert blob.part.stat().st_blocks * 512 >= ODD
    assert not blob.is_complete()


def test_reserving_again_keeps_the_part_that_is_there(blob: Blob) -> None:
    blob.reserve(ODD)
    before = blob.part.stat().st_ino
    blob.reserve(ODD)
    assert blob.part.stat().st_ino == before
    assert everything(blob) == ["blobs/0f0f.part"]


def test_a_published_blob_holds_what_was_written_and_is_read_only_and_its_record_lies_beside(blob: Blob) -> None:
    with acquire(blob) as writer:
        write_chunks(writer, DATA, 2, 0, 3, 1)
        writer.publish()
    assert blob.is_complete()
    assert blob.path.read_bytes() == DATA
    assert blob.path.stat().st_mode & 0o777 == 0o444
    assert everything(blob) == ["blobs/0f0f", "digests/0f0f"]


def test_what_was_written_is_not_there_until_it_is_said_to_be(blob: Blob) -> None:
    with acquire(blob) as writer:
        writer.write(DATA[:MIB], 0)
        assert missing(writer) == [0, 1, 2, 3]
        writer.chunks.set(0, chunk_digest(DATA[:MIB]))
        assert missing(writer) == [1, 2, 3]


def test_a_chunk_may_be_written_in_pieces(blob: Blob) -> None:
    with acquire(blob) as writer:
        write_chunks(writer, DATA, 1, 2, 3)
        for at in range(0, MIB, 100_000):
            writer.write(memoryview(DATA)[at : min(at + 100_000, MIB)], at)
        writer.chunks.set(0, chunk_digest(DATA[:MIB]))
        assert b"".join(writer.read()) == DATA
        writer.publish()
    assert damaged(blob) == []


def test_a_file_without_bytes_is_published_too(blob: Blob) -> None:
    with acquire(blob, 0) as writer:
        assert list(writer.chunks.missing(MIB)) == []
        assert writer.chunks.bytes_there() == 0
        writer.publish()
    assert blob.is_complete()
    assert blob.path.read_bytes() == b""
    assert damaged(blob) == []


def test_a_blob_cannot_be_published_before_its_last_chunk(blob: Blob) -> None:
    with acquire(blob) as writer:
        write_chunks(writer, DATA, 0, 1, 2)
        with pytest.raises(AssertionError, match="published before it was complete"):
            writer.publish()
    assert not blob.is_complete()


def test_who_mapped_the_part_sees_the_published_file(blob: Blob) -> None:
    with acquire(blob) as writer, blob.part.open("rb") as early:
        write_chunks(writer, DATA)
        writer.publish()
        assert os.fstat(early.fileno()).st_ino == blob.path.stat().st_ino


def test_a_complete_blob_has_no_writer(blob: Blob) -> None:
    assert BlobWriter.try_acquire(published(blob), ODD) is None


def test_a_part_left_beside_a_complete_blob_is_swept_away_instead_of_filled(blob: Blob) -> None:
    # Who asks "is it there?" just before the neighbour publishes, and reserves just after, leaves such a part.
    published(blob).part.write_bytes(bytes(ODD))
    assert BlobWriter.try_acquire(blob, ODD) is None
    assert everything(blob) == ["blobs/0f0f", "digests/0f0f"]


def test_a_file_that_is_damaged_in_the_store_is_thrown_away_and_its_readers_find_out(blob: Blob) -> None:
    with acquire(blob) as writer:
        write_chunks(writer, DATA)
        reader = blob.chunks()
        writer.reject()
    assert reader is not None
    assert reader.is_wrong()
    assert everything(blob) == []
    assert mended(blob) == [0, 1, 2, 3]


# The lock, and who carries on


def test_two_cannot_write_at_once(blob: Blob) -> None:
    with acquire(blob):
        assert BlobWriter.try_acquire(blob, ODD) is None
        assert blob.is_being_filled()
    assert not blob.is_being_filled()
    acquire(blob).close()


@pytest.mark.parametrize("size", [0, 1, ODD - 1, ODD + 1, 8 * MIB])
def test_a_part_of_another_size_is_replaced(blob: Blob, size: int) -> None:
    blob.reserve(size)
    assert mended(blob) == [0, 1, 2, 3]


def cut(blob: Blob) -> None:
    os.truncate(blob.part, ODD - 1)


def remove(blob: Blob) -> None:
    blob.part.unlink()


def garble_the_state(blob: Blob) -> None:
    blob.state.write_bytes(b"\1" * blob.state.stat().st_size)


def replace_the_part(blob: Blob) -> None:
    copy = blob.part.with_name("copy")
    copy.write_bytes(bytes(ODD))
    copy.replace(blob.part)


@pytest.mark.parametrize("happening", [cut, remove, garble_the_state, replace_the_part])
def test_no_chunk_of_a_part_is_taken_for_one_that_was_written_to_another_part(blob: Blob, happening: Callable[[Blob], None]) -> None:
    with acquire(blob) as writer:
        write_chunks(writer, DATA)
    happening(blob)
    if happening is not cut:  # one of a wrong size is read by nobody for long
        assert blob.chunks() is None
    with acquire_in_the_end(blob) as writer:
        writer.recheck(chunk_digest)
        there = [chunk for chunk in range(4) if chunk not in missing(writer)]
        assert all(piece == DATA[chunk * MIB : (chunk + 1) * MIB] for chunk, piece in enumerate(writer.read()) if chunk in there)


def test_what_a_writer_left_is_there_for_the_next_one(blob: Blob) -> None:
    with acquire(blob) as first:
        write_chunks(first, DATA, 0, 3)
    assert mended(blob) == [1, 2]


WRITE_TWO_CHUNKS_AND_WAIT = """
import sys, pathlib
from tests.support import write_chunks
from weights_cache.blob import Blob, BlobWriter
writer = BlobWriter.try_acquire(Blob(pathlib.Path(sys.argv[1])), int(sys.argv[2]))
write_chunks(writer, b"a" * (1 << 20) + b"b" * (1 << 20), 0, 1)
print("written", flush=True)
sys.stdin.read()
"""


def test_another_process_keeps_the_lock_until_it_is_killed_and_its_chunks_stay(blob: Blob) -> None:
    command = [sys.executable, "-c", WRITE_TWO_CHUNKS_AND_WAIT, str(blob.path), str(ODD)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"written\n"
        assert BlobWriter.try_acquire(blob, ODD) is None
        other.send_signal(signal.SIGKILL)
        other.wait()
        with acquire(blob) as writer:
            assert list(writer.chunks.missing(8 * MIB)) == [(2 * MIB, ODD)]
    assert blob.part.read_bytes()[: 2 * MIB] == b"a" * MIB + b"b" * MIB


@pytest.mark.parametrize("line", ["os.link", "Path.rename", "os.fchmod"])
def test_who_is_killed_while_publishing_leaves_a_part_with_nothing_missing(blob: Blob, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with acquire(blob) as writer, monkeypatch.context() as patched:
        write_chunks(writer, DATA)
        patched.setattr({"os.link": os, "os.fchmod": os, "Path.rename": Path}[line], line.split(".")[1], killed)
        with pytest.raises(KeyboardInterrupt):
            writer.publish()
    assert not blob.is_complete()
    assert mended(blob) == []
    assert everything(blob) == ["blobs/0f0f", "digests/0f0f"]


def test_the_map_of_one_part_says_nothing_about_another(blob: Blob) -> None:
    with acquire(blob) as first:
        write_chunks(first, DATA, 0)
        thrown_away = blob.part.stat()
        with blob.part.open("rb"):  # whoever reads it keeps its inode from being used again
            blob.part.unlink()
            with acquire(blob) as second:
                write_chunks(second, DATA, 0)
                assert blob.chunks(thrown_away) is None
                assert blob.chunks() is not None


def test_before_anybody_began_there_is_no_map(blob: Blob) -> None:
    assert blob.chunks() is None
    blob.reserve(ODD)
    assert blob.chunks() is None


# After the machine restarted


def test_a_part_of_an_earlier_boot_is_looked_at_again_and_nothing_of_it_is_there_before(blob: Blob, restart: Callable[[], None]) -> None:
    with acquire(blob) as writer:
        write_chunks(writer, DATA, 0, 2, 3)
    flip(blob.part, 8 * (2 * MIB + 7))
    restart()
    assert blob.chunks() is None
    with acquire(blob) as writer:
        assert missing(writer) == [0, 1, 2, 3]
        assert writer.recheck(chunk_digest) == 1
        assert missing(writer) == [1, 2]
        assert writer.chunks.claimed() == []
        assert writer.recheck(chunk_digest) == 0


@settings(derandomize=True, deadline=None, max_examples=40)
@given(there=st.sets(st.integers(0, 3)), lost=st.sets(st.integers(0, 3)))
def test_what_was_lost_in_a_power_cut_and_only_that_is_brought_again(
    tmp_path_factory: pytest.TempPathFactory, there: set[int], lost: set[int]
) -> None:
    top = tmp_path_factory.mktemp("cache")
    for folder in ("blobs", "digests"):
        (top / folder).mkdir()
    found = Blob(top / "blobs" / "0f0f")
    with acquire(found) as writer:
        if there:
            write_chunks(writer, DATA, *there)
        for chunk in lost:
            writer.write(bytes(min(MIB, ODD - chunk * MIB)), chunk * MIB)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chunks, "_boot_id", lambda: "another")
        assert mended(found) == sorted({0, 1, 2, 3} - (there - lost))
    shutil.rmtree(top)


def test_a_published_blob_of_an_earlier_boot_is_complete_again_once_it_was_looked_at(blob: Blob, restart: Callable[[], None]) -> None:
    published(blob)
    inode = blob.path.stat().st_ino
    restart()
    assert not blob.is_complete()
    assert damaged(blob) == []
    assert mended(blob) == []
    assert blob.path.stat().st_ino == inode
    assert everything(blob) == ["blobs/0f0f", "digests/0f0f"]


def test_one_that_was_damaged_becomes_a_part_and_mends(blob: Blob, restart: Callable[[], None]) -> None:
    flip(published(blob).path, 8 * MIB)
    restart()
    assert blob.set_aside()
    assert everything(blob) == ["blobs/0f0f.part", "blobs/0f0f.part.state"]
    assert mended(blob) == [1]


def test_one_that_was_settled_stays_complete(blob: Blob, restart: Callable[[], None]) -> None:
    published(blob).settle()
    restart()
    assert blob.is_complete()
    assert not blob.set_aside()
    assert BlobWriter.try_acquire(blob, ODD) is None


def test_one_that_was_settled_is_complete_in_a_copy_of_the_cache(blob: Blob, restart: Callable[[], None], tmp_path: Path) -> None:
    published(blob).settle()
    restart()
    copy = Blob(Path(shutil.copytree(tmp_path, tmp_path / "copy")) / "blobs" / "0f0f")
    assert copy.is_complete()
    assert damaged(copy) == []


def test_one_that_was_not_is_looked_at_in_a_copy_of_the_cache(blob: Blob, tmp_path: Path) -> None:
    published(blob)
    copy = Blob(Path(shutil.copytree(tmp_path, tmp_path / "copy")) / "blobs" / "0f0f")
    assert not copy.is_complete()
    assert mended(copy) == []


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda record: record.unlink(), id="gone"),
        pytest.param(lambda record: os.truncate(record, 128), id="cut"),
        pytest.param(lambda record: record.write_bytes(b""), id="empty"),
    ],
)
def test_a_published_blob_without_its_record_is_brought_again(blob: Blob, damage: Callable[[Path], object]) -> None:
    damage(published(blob).record)
    assert not blob.is_complete()
    assert damaged(blob) == [0, 1, 2, 3]
    assert mended(blob) == [0, 1, 2, 3]
    assert everything(blob) == ["blobs/0f0f", "digests/0f0f"]


# Damage


def test_a_single_flipped_bit_is_found_wherever_it_is(blob: Blob) -> None:
    published(blob)

    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(st.integers(0, 8 * ODD - 1))
    def check(bit: int) -> None:
        flip(blob.path, bit)
        assert damaged(blob) == [bit // 8 // MIB]
        flip(blob.path, bit)

    check()
    assert damaged(blob) == []


def test_looking_for_damage_tells_how_far_it_is(blob: Blob) -> None:
    seen: list[int] = []
    published(blob).damaged_chunks(chunk_digest, seen.append)
    assert seen == [MIB, MIB, MIB, 12_345]


@settings(derandomize=True, deadline=None, max_examples=16)
@given(st.sets(st.integers(0, 3), min_size=1))
def test_only_what_is_damaged_is_brought_again(tmp_path_factory: pytest.TempPathFactory, wrong: set[int]) -> None:
    top = tmp_path_factory.mktemp("cache")
    for folder in ("blobs", "digests"):
        (top / folder).mkdir()
    found = published(Blob(top / "blobs" / "0f0f"))
    for chunk in wrong:
        flip(found.path, 8 * chunk * MIB + 3)
    assert found.set_aside(damaged(found))
    assert not found.is_complete()
    assert mended(found) == sorted(wrong)
    shutil.rmtree(top)


@pytest.mark.parametrize("settled", [False, True])
def test_who_mapped_a_damaged_file_sees_it_mended(blob: Blob, settled: bool) -> None:
    published(blob)
    if settled:
        blob.settle()
    flip(blob.path, 5)
    with blob.path.open("rb") as early:
        assert blob.set_aside([0])
        assert mended(blob) == [0]
        assert early.read() == DATA
    assert blob.path.stat().st_mode & 0o777 == 0o444


def test_at_no_moment_is_a_damaged_chunk_of_a_part_said_to_be_there(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(published(blob).path, 5)
    seen = []
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        done = real(path, target)
        found = blob.chunks()
        seen.append(found is not None and found.has(0))
        return done

    monkeypatch.setattr(Path, "rename", rename)
    assert blob.set_aside([0])
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("size", [0, 5, MIB, 2 * MIB + 1, ODD - 1])
def test_a_truncated_file_is_not_complete(blob: Blob, size: int) -> None:
    os.truncate(published(blob).path, size)
    assert not blob.is_complete()


@pytest.mark.parametrize("size", [5, MIB, 2 * MIB + 1, ODD - 1])
def test_damage_is_found_in_a_truncated_file_and_it_mends(blob: Blob, size: int) -> None:
    os.truncate(published(blob).path, size)
    found = damaged(blob)
    assert found
    assert blob.set_aside(found)
    mended(blob)
    assert damaged(blob) == []


@pytest.mark.parametrize("number", [1, 2])
def test_who_is_killed_while_setting_aside_leaves_nothing_that_is_taken_for_what_it_is_not(
    blob: Blob, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    flip(published(blob).path, 5)
    calls = []
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            blob.set_aside([0])
    if number == 1:
        assert damaged(blob) == [0]
        assert blob.set_aside([0])
    assert not blob.is_complete()
    mended(blob)


def test_setting_aside_what_is_not_there_does_nothing(blob: Blob) -> None:
    assert not blob.set_aside()
    assert not blob.set_aside([0])
    with acquire(blob):
        assert not blob.set_aside([0])


def test_a_doubtful_file_beside_a_part_is_given_up_for_the_part(blob: Blob, restart: Callable[[], None]) -> None:
    published(blob)
    restart()
    blob.part.write_bytes(bytes(ODD))
    assert blob.set_aside()
    assert mended(blob) == [0, 1, 2, 3]


SET_ASIDE_ALL = """
import sys, pathlib
from weights_cache.blob import Blob
blobs = [Blob(path) for path in sorted(pathlib.Path(sys.argv[1]).iterdir())]
print("there", flush=True)
sys.stdin.readline()
print(sum(blob.set_aside([1]) for blob in blobs))
"""


def test_of_two_processes_that_set_a_file_aside_at_once_one_does(blob: Blob) -> None:
    data = noise(MIB + 5)
    blobs = [published(Blob(blob.path.with_name(f"{number:04x}")), data) for number in range(40)]
    for one in blobs:
        flip(one.path, 8 * MIB)
    command = [sys.executable, "-c", SET_ASIDE_ALL, str(blob.path.parent)]
    others = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    assert [other.stdout.readline() for other in others if other.stdout] == ["there\n"] * 2
    done = [other.communicate("go\n", timeout=30)[0] for other in others]
    assert sum(map(int, done)) == len(blobs)
    assert [mended(one, data) for one in blobs] == [[1]] * len(blobs)


# No room


def test_a_file_that_no_disk_could_hold_is_an_error_with_what_is_needed_and_what_is_free(blob: Blob) -> None:
    with pytest.raises(CacheError, match=r"no room for 0f0f in .*: 4,611,686,018,427,387,904 bytes needed, [\d,]+ free") as caught:
        blob.reserve(1 << 62)
    free = int(str(caught.value).rsplit(" needed, ", 1)[1].removesuffix(" free").replace(",", ""))
    assert 0 < free < 1 << 62
    assert everything(blob) == []


def test_a_folder_that_cannot_be_written_to_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=rf"{tmp_path}/file: .*must be a directory this user may write to"):
        Blob(tmp_path / "file" / "0f0f").reserve(ODD)


def test_a_disk_that_fails_while_it_is_written_to_is_an_error_and_what_is_there_stays(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with acquire(blob) as writer:
        write_chunks(writer, DATA, 0)
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", pwrite)
            with pytest.raises(CacheError, match="Input/output error"):
                write_chunks(writer, DATA, 1)
    assert mended(blob) == [1, 2, 3]


@pytest.fixture
def said_on_a_small_disk(tmp_path: Path) -> Callable[..., str]:
    """said_on_a_small_disk(code): what a Python process prints whose `disk` is one of 2 MiB; the mount ends with it.

    It is in memory, and treated as such if `in_memory`; else as a disk.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    begin = f"""
import os, pathlib, sys
from tests.support import write_chunks
from weights_cache import blob as module, room
from weights_cache.blob import Blob, BlobWriter, free_bytes
from weights_cache.cache import FileRef, NodeCache, Ref
from weights_cache.errors import CacheError
disk, MIB = pathlib.Path(sys.argv[1]), {MIB}
"""

    def run(code: str, *, in_memory: bool = False) -> str:
        kind = "" if in_memory else "module._is_in_memory = lambda folder: False\n"
        command = on_small_disk(disk, 2 * MIB, [sys.executable, "-c", begin + kind + code, str(disk)])
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
        return done.stdout.strip()

    return run


def test_a_full_disk_is_an_error_with_what_is_needed_and_what_is_free(said_on_a_small_disk: Callable[..., str]) -> None:
    code = """
try:
    Blob(disk / "0f0f").reserve(2 * MIB + 1)
except CacheError as error:
    print(error, [path.name for path in disk.iterdir()])
"""
    assert said_on_a_small_disk(code).endswith("/disk: 2,097,153 bytes needed, 2,097,152 free []")


def test_a_disk_too_full_for_the_state_beside_the_part_is_an_error_and_not_a_dead_process(
    said_on_a_small_disk: Callable[..., str],
) -> None:
    code = """
try:
    BlobWriter.try_acquire(Blob(disk / "0f0f"), 2 * MIB)
except CacheError as error:
    print(error)
"""
    assert said_on_a_small_disk(code).endswith("/disk: 146 bytes needed, 0 free")


def test_a_disk_too_full_for_the_ref_beside_the_parts_is_an_error_about_the_cache(said_on_a_small_disk: Callable[..., str]) -> None:
    code = """
cache = NodeCache(disk)
cache.create()
lease, _ = room.reserve(cache, "bucket/model", [FileRef("model", free_bytes(disk), "v")], limit=None, uri="s3://bucket/model")
try:
    cache.set_ref(Ref("s3://bucket/model", lease.snapshot))
except CacheError as error:
    print(error)
"""
    assert said_on_a_small_disk(code).endswith("/disk: No space left on device")


def test_memory_is_taken_as_it_is_written_and_lack_of_it_is_an_error_that_keeps_what_is_there(
    said_on_a_small_disk: Callable[..., str],
) -> None:
    code = """
with BlobWriter.try_acquire(Blob(disk / "0f0f"), 3 * MIB) as writer:
    print(free_bytes(disk) > 2 * MIB - 10_000, writer.blob.part.stat().st_size == 3 * MIB)
    try:
        write_chunks(writer, bytes(3 * MIB))
    except CacheError as error:
        print(writer.chunks.bytes_there() == MIB, error)
"""
    said = said_on_a_small_disk(code, in_memory=True)
    assert said.startswith("True True\nTrue no room for 0f0f in ")
    assert said.endswith("/disk: 3,145,728 bytes needed, 0 free")


def test_memory_that_was_promised_to_one_snapshot_is_not_promised_to_another(said_on_a_small_disk: Callable[..., str]) -> None:
    code = """
cache = NodeCache(disk)
cache.create()
lease, _ = room.reserve(cache, "bucket/model", [FileRef("a", MIB, "v")], limit=None, uri="s3://bucket/model")
try:
    room.reserve(cache, "bucket/model", [FileRef("b", MIB, "v")], limit=None, uri="s3://bucket/model")
except CacheError as error:
    print(error)
"""
    assert said_on_a_small_disk(code, in_memory=True).endswith("0 could be evicted, 1,048,576 are in use")
