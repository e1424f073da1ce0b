"""Files in memory, and the large pages they can have there."""

import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.weights_cache.conftest import noise
from weights_cache.blob import LARGE_PAGE_FAILURES, Blob, BlobWriter
from weights_cache.mapping import LARGE_PAGE_BYTES, MappedFile

SIZE = 2 * LARGE_PAGE_BYTES + 777
DATA = noise(SIZE)


@pytest.fixture
def file(tmpfs: Path) -> Path:
    path = tmpfs / "file"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def fd(file: Path) -> Iterator[int]:
    found = os.open(file, os.O_RDWR)
    yield found
    os.close(found)


@pytest.fixture
def writer(tmpfs: Path) -> Iterator[BlobWriter]:
    for folder in ("blobs", "digests"):
        (tmpfs / folder).mkdir()
    found = BlobWriter.try_acquire(Blob(tmpfs / "blobs" / "0f0f"), SIZE)
    assert found is not None
    with found:
        yield found


def mappings(path: Path) -> list[dict[str, str]]:
    """What the kernel says of each mapping of a file in this process."""
    found: list[dict[str, str]] = []
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = line.endswith(f" {path}")
            if is_ours:
                found.append({"start": line.partition("-")[0], "how": line.split()[1]})
        elif is_ours:
            name, _, value = line.partition(":")
            found[-1][name] = value.strip()
    return found


def test_a_file_is_mapped_whole_from_where_a_large_page_can_begin(file: Path, fd: int) -> None:
    view = MappedFile(fd, SIZE).view
    assert bytes(view) == DATA
    (found,) = mappings(file)
    assert int(found["start"], 16) % LARGE_PAGE_BYTES == 0


def test_what_is_written_to_a_private_mapping_stays_with_it(file: Path, fd: int) -> None:
    view = MappedFile(fd, SIZE).view
    view[5] = view[5] ^ 1
    assert view[5] != DATA[5]
    assert file.read_bytes() == DATA
    assert bytes(MappedFile(fd, SIZE).view) == DATA


def test_what_is_written_to_a_shared_mapping_is_in_the_file(file: Path, fd: int) -> None:
    view = MappedFile(fd, SIZE, shared=True).view
    view[5:8] = b"abc"
    assert file.read_bytes() == DATA[:5] + b"abc" + DATA[8:]


def test_a_mapping_lives_as_long_as_a_slice_of_it(file: Path, fd: int) -> None:
    part = MappedFile(fd, SIZE).view[100:200]
    gc.collect()
    assert bytes(part) == DATA[100:200]
    assert len(mappings(file)) == 1
    del part
    assert mappings(file) == []


def test_an_empty_file_cannot_be_mapped(fd: int) -> None:
    with pytest.raises(OSError, match="cannot map 0 bytes"):
        MappedFile(fd, 0)


def test_a_large_page_has_what_the_file_had_there(file: Path, fd: int) -> None:
    mapped = MappedFile(fd, SIZE, shared=True)
    assert mapped.make_large_page(LARGE_PAGE_BYTES)
    assert bytes(mapped.view) == file.read_bytes() == DATA
    assert mappings(file)[0]["ShmemPmdMapped"] == f"{LARGE_PAGE_BYTES // 1024} kB"


def test_readers_who_come_later_have_the_large_page_too(file: Path, fd: int) -> None:
    assert MappedFile(fd, SIZE, shared=True).make_large_page(0)
    with file.open("rb") as opened:
        view = MappedFile(opened.fileno(), SIZE).view
    assert view[LARGE_PAGE_BYTES - 1] == DATA[LARGE_PAGE_BYTES - 1]  # one touch, and all of it is there
    (found,) = mappings(file)
    assert found["how"] == "rw-p"
    assert found["Rss"] == f"{LARGE_PAGE_BYTES // 1024} kB"


# A writer's


def test_a_writer_gives_out_the_memory_of_its_file_and_the_end_of_it_has_none(writer: BlobWriter) -> None:
    for start in range(0, 2 * LARGE_PAGE_BYTES, LARGE_PAGE_BYTES // 2):
        memory = writer.memory(start, start + LARGE_PAGE_BYTES // 2)
        assert memory is not None
        memory[:] = DATA[start : start + LARGE_PAGE_BYTES // 2]
    assert writer.memory(2 * LARGE_PAGE_BYTES, SIZE) is None
    writer.write(DATA[2 * LARGE_PAGE_BYTES :], 2 * LARGE_PAGE_BYTES)
    assert writer.blob.part.read_bytes() == DATA


def test_nothing_across_two_large_pages_is_given_out(writer: BlobWriter) -> None:
    assert writer.memory(LARGE_PAGE_BYTES - 1, LARGE_PAGE_BYTES + 1) is None


def test_memory_is_not_asked_for_over_and_over_where_there_is_none(writer: BlobWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(self: MappedFile, start: int) -> bool:
        asked.append(start)
        return False

    monkeypatch.setattr(MappedFile, "make_large_page", refuse)
    assert [writer.memory(0, 10) for _ in range(10)] == [None] * 10
    assert len(asked) == LARGE_PAGE_FAILURES


def test_a_closed_writer_has_its_file_mapped_no_longer(writer: BlobWriter) -> None:
    assert writer.memory(0, 10) is not None
    part = writer.blob.part
    assert len(mappings(part)) == 1
    writer.close()
    assert mappings(part) == []


def test_whoever_has_hold_of_the_memory_of_a_closed_writer_is_not_in_the_next_one_s_way(writer: BlobWriter) -> None:
    memory = writer.memory(0, 10)
    assert memory is not None
    writer.close()
    following = BlobWriter.try_acquire(writer.blob, SIZE)
    assert following is not None
    following.close()


def test_a_writer_on_a_disk_gives_out_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("blobs", "digests"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr("weights_cache.blob._is_in_memory", lambda folder: False)
    with BlobWriter.try_acquire(Blob(tmp_path / "blobs" / "0f0f"), SIZE) or pytest.fail("no writer") as writer:
        assert writer.memory(0, 10) is None
