"""What the platform sees of the node's caches, beside what the caches' own program made."""

import shutil
from pathlib import Path

from knative.local.weights import cached
from tests.support import fill_cache

FILES = {"model.safetensors": b"w" * 5000, "tokenizer/vocab.json": b"v" * 300}


def test_a_complete_snapshot_is_told_with_its_bytes(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path / "default" / "cache", "s3://models/minilm", FILES)
    (tmp_path / "default" / "notes").mkdir()  # a volume that is no cache
    (found,) = cached(tmp_path)
    assert found["checked_at"] > 0
    assert found == {
        "volume": "default/cache",
        "uri": "s3://models/minilm",
        "snapshot": snapshot,
        "bytes": 5300,
        "files": 2,
        "complete": True,
        "checked_at": found["checked_at"],
    }


def test_a_file_that_is_not_there_makes_a_snapshot_incomplete(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path / "default" / "cache", "s3://models/minilm", FILES)
    (tmp_path / "default" / "cache" / "snapshots" / snapshot / "model.safetensors").resolve().unlink()
    (found,) = cached(tmp_path)
    assert (found["complete"], found["bytes"]) == (False, 300)


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path / "default" / "cache", "s3://models/minilm", FILES)
    for number, text in enumerate(("not JSON", "[]", '{"uri": "s3://models/other"}')):
        (tmp_path / "default" / "cache" / "refs" / str(number)).write_text(text)
    assert [row["snapshot"] for row in cached(tmp_path)] == [snapshot]
    shutil.rmtree(tmp_path / "default" / "cache" / "snapshots" / snapshot)
    assert [row["complete"] for row in cached(tmp_path)] == [False]


def test_without_volumes_there_are_none(tmp_path: Path) -> None:
    assert cached(tmp_path / "none") == []
