"""`push` and `pull` as a person or a script runs them: what is printed where, and how they fail."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support import ROOT, free_port
from tests.weights_cache.stores import Bucket, Proxy

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(aws: None, tmp_path: Path) -> Run:
    """run(*arguments, **environment): `python -m weights_cache` to its end."""

    def start(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "weights_cache", *arguments],
            cwd=ROOT,
            env={**os.environ, "WEIGHTS_CACHE_DIR": str(tmp_path / "cache"), **environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return start


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a model as people have them: a link among its files."""
    folder = tmp_path / "model"
    (folder / "tokenizer").mkdir(parents=True)
    save_file({"a": torch.randn(300_000), "b": torch.ones(5)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (folder / "tokenizer" / "link.txt").symlink_to("vocab.txt")
    return folder


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pushed_is_pulled_byte_for_byte_and_the_printed_uri_pins_it(bucket: Bucket, run: Run, model: Path, tmp_path: Path) -> None:
    pushed = run("push", str(model), bucket.uri)
    assert (pushed.returncode, pushed.stdout.count("\n")) == (0, 1)
    uri = pushed.stdout.strip()
    assert uri.rpartition("#")[0] == bucket.uri

    pulled = run("pull", uri, "--json")
    assert pulled.returncode == 0
    result = json.loads(pulled.stdout.splitlines()[-1])
    assert result.keys() == {"snapshot", "bytes", "downloaded_bytes", "seconds"}
    assert result["snapshot"] == str(tmp_path / "cache" / "snapshots" / uri.rpartition("#")[2])
    assert content(Path(result["snapshot"])) == content(model)
    assert result["bytes"] == result["downloaded_bytes"] == size(model)
    assert 0 < result["seconds"] < 60

    again = json.loads(run("pull", uri, "--json").stdout)
    assert (again["snapshot"], again["bytes"], again["downloaded_bytes"]) == (result["snapshot"], size(model), 0)


def test_without_json_the_last_line_is_where_the_weights_are(bucket: Bucket, run: Run, tmp_path: Path) -> None:
    bucket.put({"config.json": b"{}"})
    pulled = run("pull", bucket.uri, "--cache-dir", str(tmp_path / "elsewhere"))
    assert Path(pulled.stdout.splitlines()[-1], "config.json").read_text() == "{}"
    assert pulled.stdout.startswith(str(tmp_path / "elsewhere"))


def test_progress_goes_to_stderr(bucket: Bucket, run: Run) -> None:
    bucket.put({"config.json": b"x" * 2_000_000})
    assert f"pull {bucket.uri}: 2.0 of 2.0 MB" in run("pull", bucket.uri, "--json").stderr


def test_pushing_can_make_the_bucket(bucket: Bucket, run: Run, model: Path) -> None:
    uri = f"s3://{bucket.name}-new/team/model"
    assert "there is no such bucket" in run("push", str(model), uri).stderr
    assert run("push", str(model), uri, "--create-bucket").stdout.startswith(f"{uri}#")


def test_pushing_beside_other_objects_says_that_they_are_part_of_the_snapshot(bucket: Bucket, run: Run, model: Path) -> None:
    bucket.put({"old.bin": b"1"})
    pushed = run("push", str(model), bucket.uri)
    assert pushed.returncode == 0
    assert f"note: {bucket.uri} also holds 1 other objects, such as old.bin" in pushed.stderr


def make_another_layout(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "FORMAT").write_text("7\n")


def make_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()


def make_a_name_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "odd") + b"/\xff")).write_text("x")


@pytest.mark.parametrize(
    ("prepare", "arguments", "environ", "told"),
    [
        pytest.param(None, "pull {uri}", {}, "no objects below {uri}/ at {endpoint}", id="nothing there"),
        pytest.param(None, "pull s3://nowhere-at-all/m", {}, "there is no such bucket", id="no bucket"),
        pytest.param(None, "pull model", {}, "weights URI 'model': must be s3://bucket/prefix", id="no URI"),
        pytest.param(None, "pull {uri}", {"WEIGHTS_PART_BYTE": "9"}, "did you mean WEIGHTS_PART_BYTES?", id="a misspelt setting"),
        pytest.param(None, "pull {uri}", {"WEIGHTS_CONNECTIONS": "0"}, "must be at least 1 and at most 64", id="a setting out of bounds"),
        pytest.param(None, "pull {uri}", {"AWS_ENDPOINT_URL": "http://127.0.0.1:{dead}"}, "cannot list {uri} at http://", id="no store"),
        pytest.param(make_another_layout, "pull {uri}", {}, "has layout '7'", id="a cache of another version"),
        pytest.param(make_an_empty_folder, "push {folder}/empty {uri}", {}, "holds no files", id="nothing to push"),
        pytest.param(make_a_name_that_is_no_text, "push {folder}/odd {uri}", {}, "object key '\\udcff'", id="a name that is no text"),
        pytest.param(None, f"push {{folder}} {{uri}}#{'0' * 32}", {}, "a snapshot cannot be pushed to", id="pushing to a snapshot"),
    ],
)
def test_a_failure_is_one_plain_line_and_exit_status_1(
    bucket: Bucket,
    proxy: Proxy,
    run: Run,
    tmp_path: Path,
    prepare: Callable[[Path], None] | None,
    arguments: str,
    environ: dict[str, str],
    told: str,
) -> None:
    if prepare:
        prepare(tmp_path)
    facts = {"uri": bucket.uri, "endpoint": proxy.url, "folder": str(tmp_path), "dead": str(free_port())}
    failed = run(*arguments.format(**facts).split(), **{name: value.format(**facts) for name, value in environ.items()})
    assert (failed.returncode, failed.stdout) == (1, "")
    (line,) = failed.stderr.splitlines()
    assert line.startswith("Error: ")
    assert told.format(**facts) in line


def test_a_folder_that_does_not_exist_is_a_mistake_in_the_command(run: Run) -> None:
    failed = run("push", "/no/such/folder", "s3://bucket/model")
    assert failed.returncode == 2
    assert "'/no/such/folder' does not exist" in failed.stderr
