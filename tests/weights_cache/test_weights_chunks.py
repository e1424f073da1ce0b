"""The record of a file's chunks: its format, what it says of which file, and for how long."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weights_cache import chunks
from weights_cache.chunks import CHUNK_BYTES, ChunkMap, Flag, record_bytes, sync, vouches_for

MIB = 1 << 20
ODD = 3 * MIB + 12_345  # four chunks, the last one short
BOOT = "6b8f7c1e-0000-4000-8000-000000000001"
NEXT_BOOT = "6b8f7c1e-0000-4000-8000-000000000002"


@pytest.fixture(autouse=True)
def boot(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """boot(id): the machine has restarted, and the kernel gave this start another id."""

    def start(found: str) -> None:
        monkeypatch.setattr(chunks, "_boot_id", lambda: found)

    start(BOOT)
    return start


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return sized(tmp_path / "file", ODD)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "record"


def sized(path: Path, size: int) -> Path:
    with path.open("wb") as opened:
        opened.truncate(size)
    return path


def begun(record: Path, file: Path, *there: int) -> ChunkMap:
    """The record of a file some of whose chunks are there; their digests are their numbers plus one."""
    found = ChunkMap.open_for_writing(record, file.stat())
    for chunk in there:
        found.set(chunk, chunk + 1)
    return found


# The record


def test_a_chunk_is_one_mebibyte() -> None:
    assert CHUNK_BYTES == MIB


def test_a_record_is_a_header_a_flag_for_each_chunk_and_a_digest_for_each(record: Path, file: Path) -> None:
    begun(record, file).set(2, 0x0123456789ABCDEF)
    written = record.read_bytes()
    assert written.startswith(f"relight-chunks 2 {BOOT} {file.stat().st_ino}".encode())
    assert written[:128].rstrip(b" ").endswith(b"\n")
    assert written[128:] == b"\0\0\1\0" + bytes(16) + bytes.fromhex("0123456789abcdef") + bytes(8)


@pytest.mark.parametrize(("size", "length"), [(0, 128), (1, 137), (MIB, 137), (MIB + 1, 146), (16 << 30, 128 + 9 * 16384)])
def test_a_record_takes_nine_bytes_for_each_chunk(size: int, length: int) -> None:
    assert record_bytes(size) == length


@settings(derandomize=True, deadline=None)
@given(st.dictionaries(st.integers(0, 3), st.integers(0, 2**64 - 1)))
def test_every_digest_is_read_as_it_was_written(digests: dict[int, int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file, record = sized(Path(folder, "file"), ODD), Path(folder, "record")
        found = ChunkMap.open_for_writing(record, file.stat())
        for chunk, digest in digests.items():
            found.set(chunk, digest)
        again = ChunkMap.open(record, file.stat())
        assert again is not None
        assert {chunk: again.digest(chunk) for chunk in range(4) if again.has(chunk)} == digests


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
def test_a_range_is_there_when_all_its_chunks_are(record: Path, file: Path, start: int, stop: int, there: bool) -> None:
    assert begun(record, file, 1, 3).has_range(start, stop) is there


@pytest.mark.parametrize(
    ("size", "present", "there"),
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
def test_the_bytes_that_are_there_are_counted(tmp_path: Path, record: Path, size: int, present: list[int], there: int) -> None:
    assert begun(record, sized(tmp_path / "sized", size), *present).bytes_there() == there


@settings(derandomize=True, deadline=None, max_examples=200)
@given(size=st.integers(0, 9 * MIB), there=st.sets(st.integers(0, 8)), part_bytes=st.integers(1, 10 * MIB))
def test_what_is_missing_is_every_chunk_that_is_not_there_in_pieces_of_the_wanted_size(size: int, there: set[int], part_bytes: int) -> None:
    pieces = [(at, min(at + MIB, size)) for at in range(0, size, MIB)]
    absent = [piece for number, piece in enumerate(pieces) if number not in there]
    with tempfile.TemporaryDirectory() as folder:
        found = begun(Path(folder, "record"), sized(Path(folder, "file"), size), *(there & set(range(len(pieces)))))
        ranges = list(found.missing(part_bytes))
    assert [(at, min(at + MIB, stop)) for start, stop in ranges for at in range(start, stop, MIB)] == absent
    assert all(stop - start < part_bytes + MIB for start, stop in ranges)
    assert all(found.has_range(*piece) is (piece not in absent) for piece in pieces)
    assert found.bytes_there() == size - sum(stop - start for start, stop in absent)


def test_neighbouring_chunks_are_asked_for_together(record: Path, file: Path) -> None:
    assert list(begun(record, file, 1).missing(8 * MIB)) == [(0, MIB), (2 * MIB, ODD)]


# Shared by whoever maps it


def test_readers_see_each_chunk_as_it_lands(record: Path, file: Path) -> None:
    writer = begun(record, file)
    reader = ChunkMap.open(record, file.stat())
    assert reader is not None
    before = reader.bytes_there()
    writer.set(2, 5)
    assert (before, reader.bytes_there(), reader.digest(2)) == (0, MIB, 5)


def test_readers_see_that_it_was_found_to_be_wrong(record: Path, file: Path) -> None:
    writer = begun(record, file, 0, 1)
    reader = ChunkMap.open(record, file.stat())
    assert reader is not None
    assert not reader.is_wrong()
    writer.flag(3, Flag.WRONG)
    assert reader.is_wrong()
    writer.set(3, 4)
    assert not reader.is_wrong()


def test_a_digest_that_looks_like_a_flag_is_none(record: Path, file: Path) -> None:
    found = begun(record, file)
    for chunk in range(4):
        found.set(chunk, int.from_bytes(bytes([Flag.WRONG] * 8), "big"))
        assert not found.is_wrong()


def test_readers_cannot_write(record: Path, file: Path) -> None:
    begun(record, file)
    reader = ChunkMap.open(record, file.stat())
    assert reader is not None
    with pytest.raises(TypeError):
        reader.set(0, 1)


def test_a_record_that_is_opened_again_is_as_it_was(record: Path, file: Path) -> None:
    begun(record, file, 0, 3).flag(1, Flag.CLAIMED)
    before = record.read_bytes()
    again = ChunkMap.open_for_writing(record, file.stat())
    assert record.read_bytes() == before
    assert again.claimed() == [1]


# Another file, another time


def restart(record: Path, file: Path, boot: Callable[[str], None]) -> None:
    boot(NEXT_BOOT)


def replace_the_file(record: Path, file: Path, boot: Callable[[str], None]) -> None:
    sized(file.with_name("other"), ODD).replace(file)


@pytest.mark.parametrize("happening", [restart, replace_the_file])
def test_what_a_record_says_of_another_time_or_file_is_a_claim_that_only_the_writer_sees(
    record: Path, file: Path, boot: Callable[[str], None], happening: Callable[[Path, Path, Callable[[str], None]], None]
) -> None:
    begun(record, file, 0, 2).flag(3, Flag.WRONG)
    with file.open("rb"):  # whoever reads it keeps its inode from being used again
        happening(record, file, boot)
        assert ChunkMap.open(record, file.stat()) is None
        found = ChunkMap.open_for_writing(record, file.stat())
    assert found.claimed() == [0, 2]
    assert (found.bytes_there(), found.is_wrong(), found.digest(2)) == (0, False, 3)
    assert list(found.missing(ODD)) == [(0, ODD)]
    assert ChunkMap.open(record, file.stat()) is not None


def test_a_claim_that_nobody_checked_is_one_after_the_next_restart_too(record: Path, file: Path, boot: Callable[[str], None]) -> None:
    begun(record, file, 1)
    for start in (NEXT_BOOT, BOOT):
        boot(start)
        assert ChunkMap.open_for_writing(record, file.stat()).claimed() == [1]


def test_the_record_of_a_complete_file_tells_its_digests_whatever_has_happened(
    record: Path, file: Path, boot: Callable[[str], None]
) -> None:
    begun(record, file, 0, 1, 2, 3)
    boot(NEXT_BOOT)
    found = ChunkMap.open(record, file.stat(), complete=True)
    assert found is not None
    assert [found.digest(chunk) for chunk in range(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("complete", [False, True])
def test_a_record_of_another_length_says_nothing_and_is_begun_anew(record: Path, file: Path, complete: bool) -> None:
    begun(record, file, 0, 1, 2, 3)
    record.write_bytes(record.read_bytes()[:-1])
    assert ChunkMap.open(record, file.stat(), complete=complete) is None
    found = ChunkMap.open_for_writing(record, file.stat())
    assert (found.bytes_there(), found.claimed()) == (0, [])


def test_a_garbled_record_makes_no_chunk_valid(record: Path, file: Path) -> None:
    record.write_bytes(b"\1" * record_bytes(ODD))
    assert ChunkMap.open(record, file.stat()) is None
    assert ChunkMap.open_for_writing(record, file.stat()).bytes_there() == 0


def test_where_there_is_no_record_there_is_no_map(record: Path, file: Path) -> None:
    assert ChunkMap.open(record, file.stat()) is None
    assert not vouches_for(record, file.stat())


# What it vouches for


def test_it_vouches_for_its_file_until_the_machine_restarts(record: Path, file: Path, boot: Callable[[str], None]) -> None:
    begun(record, file)
    assert vouches_for(record, file.stat())
    boot(NEXT_BOOT)
    assert not vouches_for(record, file.stat())


def test_it_does_not_vouch_for_a_file_in_the_place_of_its_own(record: Path, file: Path) -> None:
    begun(record, file)
    with file.open("rb"):
        sized(file.with_name("other"), ODD).replace(file)
        assert not vouches_for(record, file.stat())


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("size", [0, MIB, ODD - 12_346, ODD + MIB])
def test_it_does_not_vouch_for_its_file_at_another_length(record: Path, file: Path, size: int, synced: bool) -> None:
    begun(record, file)
    if synced:
        sync(record, file)
    os.truncate(file, size)
    assert not vouches_for(record, file.stat())


@pytest.mark.parametrize("synced", [False, True])
def test_it_does_not_vouch_for_its_file_with_one_byte_cut_off(record: Path, file: Path, synced: bool) -> None:
    begun(record, file)
    if synced:
        sync(record, file)
    os.truncate(file, ODD - 1)
    assert not vouches_for(record, file.stat())


def test_a_synced_record_vouches_for_ever_and_for_a_copy_of_the_folder(file: Path, boot: Callable[[str], None]) -> None:
    (file.parent / "one").mkdir()
    file = file.rename(file.parent / "one" / "file")
    begun(file.with_name("record"), file, 0, 1, 2, 3)
    sync(file.with_name("record"), file)
    boot(NEXT_BOOT)
    copy = Path(shutil.copytree(file.parent, file.parent.with_name("two")))
    for folder in (file.parent, copy):
        assert vouches_for(folder / "record", (folder / "file").stat())
    assert copy.joinpath("file").stat().st_ino != file.stat().st_ino


def test_a_synced_record_keeps_its_flags_and_digests(record: Path, file: Path) -> None:
    begun(record, file, 0, 1, 2, 3)
    before = record.read_bytes()
    sync(record, file)
    assert record.read_bytes().startswith(b"relight-chunks 2 synced ")
    assert record.read_bytes()[128:] == before[128:]


def test_data_and_record_have_reached_the_disk_before_the_record_says_so(record: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fsync(fd: int) -> None:
        seen.append((Path(f"/proc/self/fd/{fd}").readlink().name, b" synced " in record.read_bytes()))

    begun(record, file, 0, 1, 2, 3)
    monkeypatch.setattr(os, "fsync", fsync)
    sync(record, file)
    assert seen == [("file", False), ("record", False), ("record", True)]
    sync(record, file)
    assert len(seen) == 3


def test_a_disk_that_fails_leaves_the_record_as_it_was(record: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        raise OSError(5, "Input/output error")

    begun(record, file, 0, 1, 2, 3)
    before = record.read_bytes()
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        sync(record, file)
    assert record.read_bytes() == before


def test_what_an_earlier_boot_left_unsynced_is_not_declared_synced_unseen(record: Path, file: Path, boot: Callable[[str], None]) -> None:
    begun(record, file, 0, 1, 2, 3)
    boot(NEXT_BOOT)
    sync(record, file)
    assert not vouches_for(record, file.stat())
