"""The cache directory: what is where, and what is not trusted."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import ROOT, write_chunks
from weights_cache.blob import BlobWriter
from weights_cache.cache import FileRef, NodeCache, Ref, check_path, snapshot_id
from weights_cache.errors import CacheError

URI = "s3://bucket/model"
FILES = [FileRef("config.json", 2, '"c"'), FileRef("model.safetensors", 5, '"m"'), FileRef("tokenizer/vocab.txt", 0, '"v"')]
CONTENT = {"config.json": b"{}", "model.safetensors": b"12345", "tokenizer/vocab.txt": b""}


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def fill(cache: NodeCache, snapshot: str) -> None:
    for path, blob in cache.snapshot_blobs(snapshot).items():
        with BlobWriter.try_acquire(blob, len(CONTENT[path])) or pytest.fail(f"{path} cannot be written") as writer:
            write_chunks(writer, CONTENT[path])
            writer.publish()


# The directory itself


def test_a_new_cache_says_its_format_and_has_a_folder_for_each_kind(tmp_path: Path) -> None:
    NodeCache(tmp_path / "a" / "cache").create()
    assert tree(tmp_path / "a" / "cache") == ["FORMAT", "blobs", "digests", "refs", "snapshots"]
    assert (tmp_path / "a" / "cache" / "FORMAT").read_text() == "1\n"


def test_creating_a_cache_again_keeps_what_is_in_it(cache: NodeCache) -> None:
    snapshot = cache.lay_out("bucket/model", FILES)
    before = tree(cache.root)
    cache.create()
    assert tree(cache.root) == before
    assert cache.snapshot_blobs(snapshot).keys() == CONTENT.keys()


def test_a_directory_laid_out_by_another_version_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "FORMAT").write_text("2\n")
    with pytest.raises(CacheError, match=r"has layout '2', this version of Relight reads '1'; it was left alone"):
        NodeCache(tmp_path).create()
    assert tree(tmp_path) == ["FORMAT"]


def test_a_format_file_that_is_not_text_is_another_version(tmp_path: Path) -> None:
    (tmp_path / "FORMAT").write_bytes(b"\xff\xfe")
    with pytest.raises(CacheError, match="left alone"):
        NodeCache(tmp_path).create()


def test_a_cache_that_cannot_be_a_directory_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=rf"cache directory {tmp_path}/file.*must be a directory this user may write to"):
        NodeCache(tmp_path / "file").create()


# Snapshots


def test_a_snapshot_is_a_folder_of_relative_links_that_resolve_once_it_is_complete(cache: NodeCache, tmp_path: Path) -> None:
    snapshot = cache.lay_out("bucket/model", FILES)
    fill(cache, snapshot)
    cache.root.rename(tmp_path / "moved")
    folder = tmp_path / "moved" / "snapshots" / snapshot
    assert tree(folder) == ["config.json", "model.safetensors", "tokenizer", "tokenizer/vocab.txt"]
    for path, data in CONTENT.items():
        assert (folder / path).is_symlink()
        assert not (folder / path).readlink().is_absolute()
        assert (folder / path).resolve().parent == tmp_path / "moved" / "blobs"
        assert (folder / path).read_bytes() == data


def test_complete_blobs_are_read_only_and_have_a_record_each_and_nothing_else_is_left_beside_them(cache: NodeCache) -> None:
    snapshot = cache.lay_out("bucket/model", FILES)
    fill(cache, snapshot)
    blobs = list((cache.root / "blobs").iterdir())
    assert {path.name for path in blobs} == {blob.path.name for blob in cache.snapshot_blobs(snapshot).values()}
    assert {path.name for path in blobs} == {path.name for path in (cache.root / "digests").iterdir()}
    assert {path.stat().st_mode & 0o777 for path in blobs} == {0o444}


def test_a_snapshot_is_complete_only_when_every_file_of_it_is(cache: NodeCache) -> None:
    snapshot = cache.lay_out("bucket/model", FILES)
    assert not cache.is_complete(snapshot)
    fill(cache, snapshot)
    assert cache.is_complete(snapshot)
    cache.snapshot_blobs(snapshot)["config.json"].record.unlink()
    assert not cache.is_complete(snapshot)


def test_a_snapshot_that_nobody_laid_out_has_no_files_and_is_not_complete(cache: NodeCache) -> None:
    assert cache.snapshot_blobs("f" * 32) == {}
    assert not cache.is_complete("f" * 32)


def test_files_come_in_path_order(cache: NodeCache) -> None:
    snapshot = cache.lay_out("bucket/model", list(reversed(FILES)))
    assert list(cache.snapshot_blobs(snapshot)) == [file.path for file in FILES]


def test_a_file_that_did_not_change_is_the_same_blob_in_the_next_version(cache: NodeCache) -> None:
    one = cache.snapshot_blobs(cache.lay_out("bucket/model", FILES))
    two = cache.snapshot_blobs(cache.lay_out("bucket/model", [FILES[0], FileRef("model.safetensors", 5, '"n"'), FILES[2]]))
    assert [path for path in one if one[path].path == two[path].path] == ["config.json", "tokenizer/vocab.txt"]


def test_laying_out_the_same_files_again_changes_nothing(cache: NodeCache) -> None:
    first = cache.lay_out("bucket/model", FILES)
    before = tree(cache.root)
    assert cache.lay_out("bucket/model", FILES) == first
    assert tree(cache.root) == before


def test_a_key_that_leaves_the_snapshot_is_refused_before_anything_is_made(cache: NodeCache) -> None:
    before = tree(cache.root)
    with pytest.raises(CacheError, match=r"object key '\.\./x'"):
        cache.lay_out("bucket/model", [*FILES, FileRef("../x", 1, '"x"')])
    assert tree(cache.root) == before


def test_a_key_that_is_both_a_file_and_a_folder_is_an_error_that_leaves_no_half_made_snapshot(cache: NodeCache) -> None:
    with pytest.raises(CacheError, match="'a' is both a file and the folder of 'a/b'"):
        cache.lay_out("bucket/model", [FileRef("a", 1, '"x"'), FileRef("a/b", 1, '"y"')])
    assert list((cache.root / "snapshots").iterdir()) == []


# Refs


def test_a_ref_is_json_under_the_hash_of_its_uri(cache: NodeCache) -> None:
    cache.set_ref(Ref(URI, "a" * 32, 1754000000.5, "b" * 32))
    (path,) = (cache.root / "refs").iterdir()
    assert path.name == "d270957640e91cf0b9aa7120434c3379c4beb021b2997c47a4767efc83ff6ffe"  # sha256 of the URI
    assert json.loads(path.read_text()) == {"uri": URI, "snapshot": "a" * 32, "checked": 1754000000.5, "next": "b" * 32}
    assert cache.ref(URI) == Ref(URI, "a" * 32, 1754000000.5, "b" * 32)


def test_a_ref_points_to_what_was_set_last(cache: NodeCache) -> None:
    cache.set_ref(Ref(URI, "a" * 32, 1.0, "b" * 32))
    cache.set_ref(Ref(URI, "b" * 32, 2.0))
    cache.set_ref(Ref(URI + "2", "c" * 32))
    assert cache.ref(URI) == Ref(URI, "b" * 32, 2.0)
    assert sorted(ref.snapshot for ref in cache.refs()) == ["b" * 32, "c" * 32]


def test_a_uri_that_nobody_pinned_has_no_ref(cache: NodeCache) -> None:
    assert cache.ref(URI) is None


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"uri": "s3://bucket/model", "snap', id="half of it"),
        pytest.param(b"\xff\x00", id="not text"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"uri": "s3://bucket/model", "checked": 1}', id="no snapshot"),
        pytest.param(b'{"uri": "s3://bucket/model", "checked": 1, "snapshot": 5}', id="a number for a snapshot"),
        pytest.param(b'{"uri": "s3://bucket/model", "checked": 1, "snapshot": "../.."}', id="a snapshot elsewhere"),
        pytest.param(b'{"uri": "s3://bucket/model", "checked": 1, "snapshot": ""}', id="an empty snapshot"),
        pytest.param(b'{"uri": "s3://bucket/model", "checked": 1, "snapshot": null}', id="null for a snapshot"),
        pytest.param(b'{"uri": "s3://bucket/model", "checked": "now", "snapshot": "%s"}' % (b"a" * 32), id="no time"),
        pytest.param(b'{"uri": 5, "checked": 1, "snapshot": "%s"}' % (b"a" * 32), id="a number for a URI"),
        pytest.param(b'{"uri": "s3://bucket/model", "checked": 1, "snapshot": "%s", "next": "../x"}' % (b"a" * 32), id="a next elsewhere"),
        pytest.param(b'{"uri": "s3://bucket/model", "checked": 1, "snapshot": "%s", "next": 5}' % (b"a" * 32), id="a number for next"),
        pytest.param(b"[" * 100_000, id="nested without end"),
    ],
)
def test_a_damaged_ref_is_as_good_as_none(cache: NodeCache, damage: bytes) -> None:
    cache.set_ref(Ref(URI, "a" * 32))
    (path,) = (cache.root / "refs").iterdir()
    path.write_bytes(damage)
    assert cache.ref(URI) is None
    assert cache.refs() == []


def test_a_snapshot_that_goes_takes_the_refs_to_it_along_and_no_other(cache: NodeCache) -> None:
    gone, stays, comes = "a" * 32, "b" * 32, "c" * 32
    for ref in (Ref("s3://1/1", gone, 1.0), Ref("s3://2/2", stays, 1.0, gone), Ref("s3://3/3", stays, 1.0, comes)):
        cache.set_ref(ref)
    cache.drop_refs(gone)
    assert sorted(cache.refs(), key=lambda ref: ref.uri) == [Ref("s3://2/2", stays, 1.0), Ref("s3://3/3", stays, 1.0, comes)]


def test_what_is_on_its_way_is_not_forgotten_with_what_it_replaces(cache: NodeCache) -> None:
    cache.set_ref(Ref(URI, "a" * 32, 1.0, "b" * 32))
    cache.drop_refs("a" * 32)
    found = cache.ref(URI)
    assert found is not None
    assert "b" * 32 in (found.snapshot, found.next)


def test_a_ref_that_cannot_be_written_is_an_error_and_leaves_no_draft(cache: NodeCache) -> None:
    code = f"""
import pathlib, resource
from weights_cache.cache import NodeCache, Ref
from weights_cache.errors import CacheError
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    NodeCache(pathlib.Path({str(cache.root)!r})).set_ref(Ref({URI!r}, "a" * 32))
except CacheError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == f"cache directory {cache.root}: File too large\n"
    assert list((cache.root / "refs").iterdir()) == []


# Names


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("model.safetensors", id="a file"),
        pytest.param("a/b/c/d.json", id="folders"),
        pytest.param("...", id="three dots"),
        pytest.param("..a/b..", id="dots beside letters"),
        pytest.param(" ", id="a space"),
        pytest.param("a\\b", id="a backslash is a letter here"),
        pytest.param("模型/重み.bin", id="other scripts"),
        pytest.param("\u202egpj.exe", id="right to left"),
        pytest.param("e\u0301", id="a combining accent"),
        pytest.param("🙂" * 63, id="252 bytes in a part"),
        pytest.param("a\nb", id="a line break"),
    ],
)
def test_a_plain_relative_path_can_be_a_file_of_a_snapshot(cache: NodeCache, path: str) -> None:
    check_path(path)
    snapshot = cache.lay_out("bucket/model", [FileRef(path, 1, '"x"')])
    assert list(cache.snapshot_blobs(snapshot)) == [path]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        pytest.param("", "empty", id="nothing"),
        pytest.param("/etc/passwd", "empty", id="absolute"),
        pytest.param("..", "'..'", id="up"),
        pytest.param("a/../../b", "'..'", id="up in the middle"),
        pytest.param("a/.", "'.'", id="here"),
        pytest.param("a//b", "empty", id="an empty part"),
        pytest.param("a/", "empty", id="a slash at the end"),
        pytest.param("a\0b", "NUL", id="NUL"),
        pytest.param("\ud800", "invalid Unicode", id="half a character"),
        pytest.param("\udcff", "invalid Unicode", id="a file name that is no text"),
        pytest.param("a" * 256, "too long", id="256 bytes in a part"),
        pytest.param("🙂" * 64, "too long", id="256 bytes in 64 characters"),
        pytest.param("a/" * 512 + "b", "too long", id="1025 bytes in all"),
    ],
)
def test_any_other_key_is_refused_with_the_reason(path: str, reason: str) -> None:
    with pytest.raises(CacheError, match="object key") as caught:
        check_path(path)
    assert reason in str(caught.value)
    str(caught.value).encode()  # it can be printed


def test_two_spellings_of_one_name_stay_two_files(cache: NodeCache) -> None:
    names = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    snapshot = cache.lay_out("bucket/model", [FileRef(name, 1, f'"{n}"') for n, name in enumerate(names)])
    assert sorted(cache.snapshot_blobs(snapshot)) == sorted(names)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "", "a", "\0", "é"]), max_size=5).map("/".join))
def test_a_path_that_is_accepted_stays_below_the_snapshot(path: str) -> None:
    try:
        check_path(path)
    except CacheError:
        return
    assert os.path.normpath(f"/top/{path}") == f"/top/{path}"


# The snapshot's name


def test_a_snapshot_is_named_by_what_is_in_it() -> None:
    assert snapshot_id("bucket/model", FILES) == "798ddf1958c8883d6933a9e40687f619"


def test_a_snapshots_name_does_not_depend_on_the_order_of_its_files() -> None:
    assert snapshot_id("bucket/model", FILES) == snapshot_id("bucket/model", [FILES[2], FILES[0], FILES[1]])


@pytest.mark.parametrize(
    ("namespace", "files"),
    [
        pytest.param("bucket/other", FILES, id="another prefix"),
        pytest.param("bucket/model", FILES[:2], id="one file less"),
        pytest.param("bucket/model", [*FILES[:2], FileRef("tokenizer/vocab2.txt", 0, '"v"')], id="another name"),
        pytest.param("bucket/model", [*FILES[:2], FileRef("tokenizer/vocab.txt", 1, '"v"')], id="another size"),
        pytest.param("bucket/model", [*FILES[:2], FileRef("tokenizer/vocab.txt", 0, '"w"')], id="another version"),
    ],
)
def test_anything_else_makes_another_snapshot(namespace: str, files: list[FileRef]) -> None:
    assert snapshot_id(namespace, files) != snapshot_id("bucket/model", FILES)


def test_what_separates_two_names_cannot_be_part_of_one() -> None:
    one = [FileRef('a", 1, "b', 2, "c")]
    two = [FileRef("a", 1, 'b", 2, "c')]
    assert snapshot_id("n", one) != snapshot_id("n", two)
    assert snapshot_id("n/a", [FileRef("b", 1, "c")]) != snapshot_id("n", [FileRef("a/b", 1, "c")])
