"""The manifest: what is written is read, and anything else is one clear error."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.weights_cache.conftest import noise
from weights_cache.cache import FileRef
from weights_cache.chunks import CHUNK_BYTES
from weights_cache.digest import chunk_digest
from weights_cache.errors import ObjectChanged, StoreError
from weights_cache.manifest import MANIFEST, Entry, Manifest, dump, measure, parse, select

MIB = 1 << 20
SHA = "5e" * 32
ENTRIES: Manifest = {
    "config.json": Entry(2, '"c"', SHA, [7]),
    "empty": Entry(0, '"e"', SHA, []),
    "model/a.safetensors": Entry(2 * MIB + 1, '"m"', SHA, [1, 2**64 - 1, 0]),
}


def digests(size: int) -> st.SearchStrategy[list[int]]:
    count = -(-size // CHUNK_BYTES)
    return st.lists(st.integers(0, 2**64 - 1), min_size=count, max_size=count)


ENTRY = st.integers(0, 5 * MIB).flatmap(
    lambda size: st.builds(Entry, st.just(size), st.text(), st.text("0123456789abcdef", min_size=64, max_size=64), digests(size))
)


# There and back


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.dictionaries(st.text(), ENTRY, max_size=4))
def test_what_is_dumped_is_parsed_again(entries: dict[str, Entry]) -> None:
    assert parse(dump(entries), "m") == entries


def test_it_is_json_that_says_how_to_read_it() -> None:
    document = json.loads(dump(ENTRIES))
    assert {key: value for key, value in document.items() if key != "files"} == {
        "relight": 1,
        "chunk_bytes": 1048576,
        "digest": "crc64nvme",
    }
    assert document["files"]["config.json"] == {"size": 2, "etag": '"c"', "sha256": SHA, "chunks": "0000000000000007"}
    assert document["files"]["model/a.safetensors"]["chunks"] == "0000000000000001ffffffffffffffff0000000000000000"


def test_the_same_files_make_the_same_bytes_in_whatever_order_they_come() -> None:
    assert dump(dict(reversed(list(ENTRIES.items())))) == dump(ENTRIES)


@pytest.mark.parametrize("size", [0, 1, MIB, MIB + 1, 3 * MIB])
def test_a_file_is_measured_to_its_last_byte(tmp_path: Path, size: int) -> None:
    data = noise(size)
    (tmp_path / "file").write_bytes(data)
    chunks = [chunk_digest(data[at : at + MIB]) for at in range(0, size, MIB)]
    assert measure(tmp_path / "file") == Entry(size, "", hashlib.sha256(data).hexdigest(), chunks)


# Damaged and foreign ones


def with_changes(**changes: Any) -> bytes:
    return json.dumps(json.loads(dump(ENTRIES)) | changes).encode()


def with_entry(**changes: Any) -> bytes:
    document = json.loads(dump(ENTRIES))
    document["files"]["config.json"] |= changes
    return json.dumps(document).encode()


def without(key: str) -> bytes:
    document = json.loads(dump(ENTRIES))
    del document["files"]["config.json"][key]
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe\x00", id="no text"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"{}", id="an empty object"),
        pytest.param(b'{"files": {}}', id="no version"),
        pytest.param(b"[" * 100_000, id="nested without end"),
        pytest.param(b"9" * 5000, id="a number without end"),
        pytest.param(with_changes(files=[]), id="files that are a list"),
        pytest.param(with_changes(files={"a": None}), id="a file that is null"),
        pytest.param(with_changes(files={"a": []}), id="a file that is a list"),
        *(pytest.param(without(key), id=f"a file without {key}") for key in ("size", "etag", "sha256", "chunks")),
        pytest.param(with_entry(size=-1), id="a negative size"),
        pytest.param(with_entry(size=2.0), id="a fractional size"),
        pytest.param(with_entry(size=True), id="a size that is true"),
        pytest.param(with_entry(size="2"), id="a size that is text"),
        pytest.param(with_entry(size=10**300), id="a size beyond all disks"),
        pytest.param(with_entry(etag=None), id="no etag"),
        pytest.param(with_entry(etag=5), id="an etag that is a number"),
        pytest.param(with_entry(sha256="5e"), id="a short sha256"),
        pytest.param(with_entry(sha256=SHA.upper()), id="a sha256 in capitals"),
        pytest.param(with_entry(sha256=None), id="no sha256"),
        pytest.param(with_entry(chunks=""), id="no digests"),
        pytest.param(with_entry(chunks="00" * 7), id="half a digest"),
        pytest.param(with_entry(chunks="00" * 16), id="a digest too many"),
        pytest.param(with_entry(chunks="0g" * 8), id="digests that are no numbers"),
        pytest.param(with_entry(chunks=[7]), id="digests in a list"),
        pytest.param(with_entry(chunks=None), id="null for digests"),
        pytest.param(with_changes(files={MANIFEST: {"size": 0, "etag": "", "sha256": SHA, "chunks": ""}}), id="itself among its files"),
    ],
)
def test_a_damaged_one_is_an_error_that_names_it_and_says_what_to_do(data: bytes) -> None:
    with pytest.raises(StoreError, match=r"^s3://b/m is damaged \(.*\); push the weights again$"):
        parse(data, "s3://b/m")


@pytest.mark.parametrize("changes", [{"relight": 2}, {"relight": "1"}, {"chunk_bytes": 4096}, {"digest": "sha256"}, {"digest": None}])
def test_one_of_another_version_is_an_error_that_says_so(changes: dict[str, Any]) -> None:
    with pytest.raises(
        StoreError, match=r"^s3://b/m was written by another version of Relight; push the weights again, or use that version$"
    ):
        parse(with_changes(**changes), "s3://b/m")


def test_no_beginning_of_one_is_taken_for_the_whole() -> None:
    whole = dump(ENTRIES)
    for length in range(len(whole)):
        with pytest.raises(StoreError):
            parse(whole[:length], "m")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ALMOST_A_FILE = st.fixed_dictionaries(
    {},
    optional={
        "size": st.integers(0, 3) | JSON,
        "etag": st.text() | JSON,
        "sha256": st.just(SHA) | JSON,
        "chunks": st.just("00" * 8) | st.just("") | JSON,
    },
)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(
    st.binary(max_size=40)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.text(max_size=4), ALMOST_A_FILE | JSON, max_size=3).map(lambda files: with_changes(files=files))
    | JSON.map(lambda value: with_changes(files=value))
)
def test_any_bytes_are_a_manifest_or_an_error(data: bytes) -> None:
    try:
        found = parse(data, "m")
    except StoreError:
        return
    assert parse(dump(found), "m") == found


# Which objects it describes

LISTED = [FileRef(path, entry.size, entry.etag) for path, entry in ENTRIES.items()] + [FileRef(MANIFEST, 700, '"x"')]


def test_the_files_it_names_are_chosen_with_itself_and_strangers_are_not() -> None:
    strangers = [FileRef("checkpoint-1/model.safetensors", 5, '"s"'), FileRef("README.md", 5, '"r"')]
    assert select([*strangers, *LISTED], ENTRIES, "s3://b/m") == sorted(LISTED, key=lambda file: file.path)


def test_one_that_names_no_files_describes_itself_alone() -> None:
    assert select(LISTED, {}, "s3://b/m") == LISTED[-1:]


@pytest.mark.parametrize(
    ("instead", "reason"),
    [
        pytest.param([], "names config.json, which is not there", id="missing"),
        pytest.param([FileRef("config.json", 2, '"d"')], 'config.json is version "d" of 2 bytes', id="another version"),
        pytest.param([FileRef("config.json", 3, '"c"')], 'config.json is version "c" of 3 bytes', id="another size"),
    ],
)
def test_objects_of_another_version_are_refused(instead: list[FileRef], reason: str) -> None:
    with pytest.raises(ObjectChanged, match=r"^s3://b/m changed while being read: ") as caught:
        select([*instead, *LISTED[1:]], ENTRIES, "s3://b/m")
    assert reason in str(caught.value)
