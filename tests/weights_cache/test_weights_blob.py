"""One file of the cache: chunks, the lock, what survives a crash, and the moment it appears under its own name."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import ROOT
from tests.weights_cache.conftest import noise
from weights_cache.blob import CHUNK_BYTES, Blob, BlobWriter, ChunkMap
from weights_cache.errors import CacheError

MIB = 1 << 20
ODD = 3 * MIB + 12_345  # four chunks, the last one short


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    return Blob(tmp_path / "0f0f")


def acquire(blob: Blob, size: int) -> BlobWriter:
    writer = BlobWriter.try_acquire(blob, size)
    assert writer is not None
    return writer


def write(writer: BlobWriter, data: bytes, *chunks: int) -> None:
    for chunk in chunks:
        writer.write(data[chunk * MIB : (chunk + 1) * MIB], chunk * MIB)


# From the first byte to publication


def test_a_chunk_is_one_mebibyte() -> None:
    assert CHUNK_BYTES == MIB


def test_naming_a_blob_makes_nothing(blob: Blob) -> None:
    assert not blob.is_complete()
    assert list(blob.path.parent.iterdir()) == []


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
    assert list(blob.path.parent.iterdir()) == [blob.part]


def test_a_published_blob_holds_what_was_written_and_is_read_only(blob: Blob) -> None:
    data = noise(ODD)
    with acquire(blob, ODD) as writer:
        write(writer, data, 2, 0, 3, 1)
        writer.publish()
    assert blob.is_complete()
    assert blob.path.read_bytes() == data
    assert blob.path.stat().st_mode & 0o777 == 0o444
    assert list(blob.path.parent.iterdir()) == [blob.path]


def test_a_file_without_bytes_is_published_too(blob: Blob) -> None:
    with acquire(blob, 0) as writer:
        assert list(writer.chunks.missing(MIB)) == []
        assert writer.chunks.bytes_there() == 0
        writer.publish()
    assert blob.path.read_bytes() == b""


def test_a_blob_cannot_be_published_before_its_last_chunk(blob: Blob) -> None:
    with acquire(blob, ODD) as writer:
        write(writer, noise(ODD), 0, 1, 2)
        with pytest.raises(AssertionError, match="published before it was complete"):
            writer.publish()
    assert not blob.is_complete()


def test_who_mapped_the_part_sees_the_published_file(blob: Blob) -> None:
    with acquire(blob, ODD) as writer, blob.part.open("rb") as early:
        write(writer, noise(ODD), 0, 1, 2, 3)
        writer.publish()
        assert os.fstat(early.fileno()).st_ino == blob.path.stat().st_ino


def test_a_complete_blob_has_no_writer(blob: Blob) -> None:
    with acquire(blob, 0) as writer:
        writer.publish()
    assert BlobWriter.try_acquire(blob, 0) is None


def test_a_part_left_beside_a_complete_blob_is_swept_away_instead_of_filled(blob: Blob) -> None:
    # Who asks "is it complete?" just before the neighbour publishes, and reserves just after, leaves such a part.
    blob.reserve(ODD)
    blob.path.write_bytes(noise(ODD))
    assert BlobWriter.try_acquire(blob, ODD) is None
    assert list(blob.path.parent.iterdir()) == [blob.path]


# Which chunks are there


@pytest.mark.parametrize(
    ("start", "stop", "there"),
    [
        pytest.param(MIB, 2 * MIB, True, id="a chunk that is there"),
        pytest.param(MIB + 5, MIB + 6, True, id="one byte of it"),
        pytest.param(0, 1, False, id="a byte of one that is not"),
        pytest.param(MIB - 1, MIB + 1, False, id="across the border into it"),
        pytest.param(2 * MIB - 1, 2 * MIB, True, id="its last byte"),
        pytest.param(2 * MIB - 1, 2 * MIB + 1, False, id="one byte beyond it"),
        pytest.param(3 * MIB, ODD, True, id="the short tail"),
        pytest.param(0, ODD, False, id="everything"),
        pytest.param(0, 0, True, id="nothing, at the start"),
        pytest.param(7, 7, True, id="nothing, in a chunk that is not there"),
        pytest.param(ODD, ODD, True, id="nothing, at the end"),
    ],
)
def test_a_range_is_there_when_all_its_chunks_are(blob: Blob, start: int, stop: int, there: bool) -> None:
    with acquire(blob, ODD) as writer:
        write(writer, noise(ODD), 1, 3)
        assert writer.chunks.has_range(start, stop) is there


@pytest.mark.parametrize(
    ("size", "chunks", "there"),
    [
        pytest.param(ODD, [], 0, id="nothing"),
        pytest.param(ODD, [0], MIB, id="one whole chunk"),
        pytest.param(ODD, [3], 12_345, id="the short tail alone"),
        pytest.param(ODD, [0, 3], MIB + 12_345, id="a chunk and the tail"),
        pytest.param(ODD, [0, 1, 2, 3], ODD, id="everything"),
        pytest.param(2 * MIB, [0, 1], 2 * MIB, id="everything, without a short tail"),
        pytest.param(1, [0], 1, id="a single byte"),
        pytest.param(0, [], 0, id="a file without bytes"),
    ],
)
def test_the_bytes_that_are_there_are_counted(blob: Blob, size: int, chunks: list[int], there: int) -> None:
    with acquire(blob, size) as writer:
        write(writer, noise(size), *chunks)
        assert writer.chunks.bytes_there() == there


def test_other_readers_of_the_map_see_each_chunk_as_it_lands(blob: Blob) -> None:
    with acquire(blob, ODD) as writer:
        seen = ChunkMap.open(blob)
        assert seen is not None
        before = seen.bytes_there()
        write(writer, noise(ODD), 2)
        assert (before, seen.bytes_there()) == (0, MIB)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(size=st.integers(0, 9 * MIB), there=st.sets(st.integers(0, 8)), part_bytes=st.integers(1, 10 * MIB))
def test_what_is_missing_is_every_chunk_that_is_not_there_in_pieces_of_the_wanted_size(size: int, there: set[int], part_bytes: int) -> None:
    chunks = [(at, min(at + MIB, size)) for at in range(0, size, MIB)]
    absent = [chunk for number, chunk in enumerate(chunks) if number not in there]
    with tempfile.TemporaryFile() as part, tempfile.TemporaryDirectory() as folder:
        part.truncate(size)
        chunk_map = ChunkMap.open_for_writing(Blob(Path(folder, "x")), size, part.fileno())
        for number in there & set(range(len(chunks))):
            chunk_map.set(number)
        ranges = list(chunk_map.missing(part_bytes))
    assert [(at, min(at + MIB, stop)) for start, stop in ranges for at in range(start, stop, MIB)] == absent
    assert all(stop - start < part_bytes + MIB for start, stop in ranges)
    assert all(chunk_map.has_range(*chunk) is (chunk not in absent) for chunk in chunks)
    assert chunk_map.bytes_there() == size - sum(stop - start for start, stop in absent)


def test_neighbouring_chunks_are_asked_for_together(blob: Blob) -> None:
    with acquire(blob, ODD) as writer:
        write(writer, noise(ODD), 1)
        assert list(writer.chunks.missing(8 * MIB)) == [(0, MIB), (2 * MIB, ODD)]


# The lock, and who carries on


def test_two_cannot_write_at_once(blob: Blob) -> None:
    with acquire(blob, ODD):
        assert BlobWriter.try_acquire(blob, ODD) is None
    acquire(blob, ODD).close()


def test_a_part_of_another_size_is_not_touched(blob: Blob) -> None:
    blob.reserve(ODD)
    with pytest.raises(CacheError, match=f"has {ODD} bytes, expected {ODD + 1}; remove it"):
        BlobWriter.try_acquire(blob, ODD + 1)
    assert blob.part.stat().st_size == ODD


def test_what_a_writer_left_is_there_for_the_next_one(blob: Blob) -> None:
    data = noise(ODD)
    with acquire(blob, ODD) as first:
        write(first, data, 0, 3)
    with acquire(blob, ODD) as second:
        assert list(second.chunks.missing(MIB)) == [(MIB, 2 * MIB), (2 * MIB, 3 * MIB)]
        write(second, data, 1, 2)
        second.publish()
    assert blob.path.read_bytes() == data


WRITE_TWO_CHUNKS_AND_WAIT = """
import sys, pathlib
from weights_cache.blob import Blob, BlobWriter
writer = BlobWriter.try_acquire(Blob(pathlib.Path(sys.argv[1])), int(sys.argv[2]))
writer.write(b"a" * (1 << 20), 0)
writer.write(b"b" * (1 << 20), 1 << 20)
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
        with acquire(blob, ODD) as writer:
            assert list(writer.chunks.missing(8 * MIB)) == [(2 * MIB, ODD)]
    assert blob.part.read_bytes()[: 2 * MIB] == b"a" * MIB + b"b" * MIB


def restart_the_machine(blob: Blob) -> None:
    """As the next boot finds the state: it names a boot that is over."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    state = blob.state.read_bytes()
    assert boot in state
    blob.state.write_bytes(state.replace(boot, b"00000000-0000-0000-0000-000000000000"))


def replace_the_part(blob: Blob) -> None:
    """As if somebody removed the part and not its state."""
    copy = blob.part.with_name("copy")
    copy.write_bytes(bytes(ODD))
    copy.replace(blob.part)


def garble_the_state(blob: Blob) -> None:
    blob.state.write_bytes(b"\1" * blob.state.stat().st_size)


@pytest.mark.parametrize("happening", [restart_the_machine, replace_the_part, garble_the_state])
def test_a_state_that_is_not_this_parts_own_since_this_boot_is_not_trusted(blob: Blob, happening: Callable[[Blob], None]) -> None:
    with acquire(blob, ODD) as writer:
        write(writer, noise(ODD), 0, 1, 2, 3)
    happening(blob)
    assert ChunkMap.open(blob) is None
    with acquire(blob, ODD) as writer:
        assert list(writer.chunks.missing(8 * MIB)) == [(0, ODD)]


def test_a_state_of_another_length_says_nothing_to_readers(blob: Blob) -> None:
    acquire(blob, ODD).close()
    assert ChunkMap.open(blob) is not None
    blob.state.write_bytes(blob.state.read_bytes()[:-1])
    assert ChunkMap.open(blob) is None


def test_the_map_of_one_part_says_nothing_about_another(blob: Blob) -> None:
    with acquire(blob, ODD) as first:
        write(first, noise(ODD), 0)
        thrown_away = blob.part.stat()
        with blob.part.open("rb"):  # whoever reads it keeps its inode from being used again
            blob.part.unlink()
            with acquire(blob, ODD) as second:
                write(second, noise(ODD), 0)
                assert ChunkMap.open(blob, thrown_away) is None
                assert ChunkMap.open(blob, blob.part.stat()) is not None


def test_before_anybody_began_there_is_no_map(blob: Blob) -> None:
    assert ChunkMap.open(blob) is None
    blob.reserve(ODD)
    assert ChunkMap.open(blob) is None


# No room


def test_a_file_that_no_disk_could_hold_is_an_error_with_what_is_needed_and_what_is_free(blob: Blob) -> None:
    with pytest.raises(CacheError, match=r"no room for 0f0f in .*: 4,611,686,018,427,387,904 bytes needed, [\d,]+ free") as caught:
        blob.reserve(1 << 62)
    free = int(str(caught.value).rsplit(" needed, ", 1)[1].removesuffix(" free").replace(",", ""))
    assert 0 < free < 1 << 62
    assert list(blob.path.parent.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=rf"{tmp_path}/file: .*must be a directory this user may write to"):
        Blob(tmp_path / "file" / "0f0f").reserve(ODD)


@pytest.fixture
def on_a_small_disk(tmp_path: Path) -> Callable[[int, str], str]:
    """on_a_small_disk(size, code): what a Python process prints that has a disk of `size` bytes at `disk`; the mount ends with it."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def run(size: int, code: str) -> str:
        script = f'mount -t tmpfs -o size={size} tmpfs "{disk}" && exec "{sys.executable}" -c "$0" "{disk}"'
        unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
        if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
            pytest.skip("this kernel gives us no mounts of our own")
        code = f"import os, pathlib, sys\ndisk = pathlib.Path(sys.argv[1])\n{code}"
        done = subprocess.run([*unshare, "sh", "-c", script, code], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
        return done.stdout.strip()

    return run


def test_a_full_disk_is_an_error_with_what_is_needed_and_what_is_free(on_a_small_disk: Callable[[int, str], str]) -> None:
    code = """
from weights_cache.blob import Blob
from weights_cache.errors import CacheError
try:
    Blob(disk / "0f0f").reserve((2 << 20) + 1)
except CacheError as error:
    print(error, [path.name for path in disk.iterdir()])
"""
    assert on_a_small_disk(2 << 20, code).endswith("/disk: 2,097,153 bytes needed, 2,097,152 free []")


def test_a_disk_too_full_for_the_state_beside_the_part_is_an_error_and_not_a_dead_process(
    on_a_small_disk: Callable[[int, str], str],
) -> None:
    code = """
from weights_cache.blob import Blob, BlobWriter
from weights_cache.errors import CacheError
try:
    BlobWriter.try_acquire(Blob(disk / "0f0f"), 2 << 20)
except CacheError as error:
    print(error)
"""
    assert on_a_small_disk(2 << 20, code).endswith("/disk: 130 bytes needed, 0 free")


def test_a_disk_too_full_for_the_ref_beside_the_parts_is_an_error_about_the_cache(on_a_small_disk: Callable[[int, str], str]) -> None:
    code = """
from weights_cache.cache import FileRef, NodeCache
from weights_cache.errors import CacheError
cache = NodeCache(disk)
cache.create()
space = os.statvfs(disk)
try:
    cache.pin("s3://bucket/model", [FileRef("model", space.f_bavail * space.f_frsize, "v")], "bucket/model")
except CacheError as error:
    print(error)
"""
    assert on_a_small_disk(2 << 20, code).endswith("/disk: No space left on device")
