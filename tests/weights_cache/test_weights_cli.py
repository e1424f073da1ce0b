"""`push` and `pull` as a person or a script runs them: what is printed where, and how they fail."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from tests.support import ROOT, free_port, wait_until
from tests.weights_cache.conftest import current, noise
from tests.weights_cache.stores import Bucket, Proxy
from weights_cache.cache import NodeCache
from weights_cache.cli import main
from weights_cache.manifest import MANIFEST
from weights_cache.store import Store
from weights_cache.uri import WeightsUri

Run = Callable[..., "subprocess.CompletedProcess[str]"]


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
    """Every file of a folder, but for the manifest that a push adds."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if name != MANIFEST}


def test_what_is_pushed_is_pulled_byte_for_byte_and_the_printed_uri_pins_it(bucket: Bucket, run: Run, model: Path, tmp_path: Path) -> None:
    pushed = run("push", str(model), bucket.uri)
    assert (pushed.returncode, pushed.stdout.count("\n")) == (0, 1)
    uri = pushed.stdout.strip()
    assert uri.rpartition("#")[0] == bucket.uri
    assert run("snapshot", bucket.uri).stdout.strip() == run("snapshot", uri).stdout.strip() == uri

    pulled = run("pull", uri, "--json")
    assert pulled.returncode == 0
    result = json.loads(pulled.stdout.splitlines()[-1])
    assert result.keys() == {"snapshot", "bytes", "downloaded_bytes", "seconds"}
    assert result["snapshot"] == str(tmp_path / "cache" / "snapshots" / uri.rpartition("#")[2])
    assert content(Path(result["snapshot"])) == content(model)
    assert result["bytes"] == result["downloaded_bytes"] == size(Path(result["snapshot"])) > size(model)
    assert 0 < result["seconds"] < 60

    again = json.loads(run("pull", uri, "--json").stdout)
    assert (again["snapshot"], again["bytes"], again["downloaded_bytes"]) == (result["snapshot"], result["bytes"], 0)


def test_without_json_the_last_line_is_where_the_weights_are(bucket: Bucket, run: Run, tmp_path: Path) -> None:
    bucket.put({"config.json": b"{}"})
    pulled = run("pull", bucket.uri, "--cache-dir", str(tmp_path / "elsewhere"))
    assert Path(pulled.stdout.splitlines()[-1], "config.json").read_text() == "{}"
    assert pulled.stdout.startswith(str(tmp_path / "elsewhere"))


def test_progress_goes_to_stderr(bucket: Bucket, run: Run) -> None:
    bucket.put({"config.json": b"x" * 2_000_000})
    assert f"pull {bucket.uri}: 2.0 of 2.0 MB" in run("pull", bucket.uri, "--json").stderr


def test_what_is_small_is_told_in_a_small_unit(bucket: Bucket, run: Run) -> None:
    bucket.put({"config.json": b"x" * 431})
    assert f"pull {bucket.uri}: 431 of 431 B, " in run("pull", bucket.uri).stderr
    *_, total = run("cache", "list").stdout.splitlines()
    assert re.match(r"1 snapshots, (\d+ B|[0-9.]+ kB)$", total)
    assert "0.0 MB" not in run("cache", "verify").stdout + run("cache", "evict", "--all").stdout


@contextlib.contextmanager
def on_a_terminal(*arguments: str, **environ: str) -> Iterator[tuple["subprocess.Popen[str]", Callable[[], str]]]:
    """`python -m weights_cache` with a terminal for its messages, and what it has written there."""
    ours, theirs = pty.openpty()
    written = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the other end open any more
            while piece := os.read(ours, 65536):
                written.extend(piece)

    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", **environ}
    command = [sys.executable, "-m", "weights_cache", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        reader = threading.Thread(target=read, daemon=True)
        reader.start()

        def said() -> str:
            if process.poll() is not None:
                reader.join(60)  # until the last of it
            return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode(errors="replace"))

        try:
            yield process, said
        finally:
            process.kill()
            reader.join(60)
            os.close(ours)


def test_on_a_terminal_a_bar_shows_how_far_a_pull_is_how_fast_and_until_when(bucket: Bucket, proxy: Proxy, tmp_path: Path) -> None:
    bucket.put({"a": noise(3 << 20)})
    proxy.hold_after(1 << 20)
    small_parts = {"WEIGHTS_PART_BYTES": str(1 << 20), "WEIGHTS_CONNECTIONS": "1"}
    with on_a_terminal("pull", bucket.uri, "--cache-dir", str(tmp_path / "cache"), **small_parts) as (process, said):
        wait_until("one third", lambda: "1.0/3.1 MB" in said())
        proxy.hold_after(1 << 20)
        shown = rf"pull {re.escape(bucket.uri)} ━+.* 2\.1/3\.1 MB [0-9.]+ ([kM]B|bytes)/s [0-9]:[0-9][0-9]:[0-9][0-9]"
        wait_until("two thirds", lambda: re.search(shown, said()))
        assert "3.1/3.1 MB" not in said()
        proxy.release()
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said()
        assert "3.1/3.1 MB" in said()
        assert Path(out.strip(), "a").stat().st_size == 3 << 20  # and nothing else on stdout


def test_on_a_terminal_a_bar_shows_how_far_a_push_is(bucket: Bucket, model: Path) -> None:
    with on_a_terminal("push", str(model), bucket.uri) as (process, said):
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said()
        assert re.search(rf"push {re.escape(bucket.uri)} ━+ 1\.2/1\.2 MB", said())
    assert out.startswith(f"{bucket.uri}#")


def test_pushing_can_make_the_bucket(bucket: Bucket, run: Run, model: Path) -> None:
    uri = f"s3://{bucket.name}-new/team/model"
    assert "there is no such bucket" in run("push", str(model), uri).stderr
    assert run("push", str(model), uri, "--create-bucket").stdout.startswith(f"{uri}#")


def test_pushing_beside_other_objects_says_that_they_are_no_part_of_the_snapshot(bucket: Bucket, run: Run, model: Path) -> None:
    bucket.put({"old.bin": b"1"})
    pushed = run("push", str(model), bucket.uri)
    assert pushed.returncode == 0
    assert f"note: {bucket.uri} also holds 1 other objects, such as old.bin; they are no part of the snapshot" in pushed.stderr
    pulled = run("pull", pushed.stdout.strip())
    assert content(Path(pulled.stdout.splitlines()[-1])) == content(model)


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


# The cache


@pytest.fixture
def pulled(bucket: Bucket, run: Run, model: Path) -> tuple[str, str]:
    """The URI and the snapshot of a model that was pushed and pulled."""
    uri = run("push", str(model), bucket.uri).stdout.strip()
    assert run("pull", bucket.uri).returncode == 0
    return bucket.uri, uri.rpartition("#")[2]


def damage(path: Path, at: int) -> None:
    """Change one byte of a file that nobody may write to."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o644)
    with path.open("r+b") as file:  # the same file, as a disk would damage it
        file.seek(at)
        file.write(data[at : at + 1])
    path.chmod(0o444)


def test_a_pushed_snapshot_is_the_one_that_a_sidecar_finds(pulled: tuple[str, str], cache: NodeCache) -> None:
    uri, snapshot = pulled
    assert current(cache, uri) == snapshot
    assert cache.is_complete(snapshot)


def test_pushing_the_same_files_again_makes_the_same_snapshot(bucket: Bucket, run: Run, model: Path) -> None:
    first, second = (run("push", str(model), bucket.uri).stdout for _ in range(2))
    assert first == second
    (model / "config.json").write_text('{"new": 1}')
    assert run("push", str(model), bucket.uri).stdout != first


def test_a_file_that_changes_while_it_is_pushed_is_an_error_and_no_manifest_is_left(
    bucket: Bucket, proxy: Proxy, model: Path, aws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Store.upload

    def changing(self: Store, source: Path, path: str, progress: Callable[[int], object]) -> None:
        upload(self, source, path, progress)
        if path == "config.json":
            source.write_text('{"changed": 1}')

    monkeypatch.setattr(Store, "upload", changing)
    failed = CliRunner().invoke(main, ["push", str(model), bucket.uri])
    assert failed.exit_code == 1
    assert f"Error: {model / 'config.json'} changed while it was being pushed; push again" in failed.output
    assert MANIFEST not in {file.path for file in Store(WeightsUri.parse(bucket.uri)).list()}


def test_the_list_says_what_is_there_and_for_whom(pulled: tuple[str, str], run: Run) -> None:
    uri, snapshot = pulled
    listed = run("cache", "list")
    assert listed.returncode == 0
    line, total = listed.stdout.splitlines()
    assert line.startswith(f"{snapshot} ")
    assert line.endswith(uri)
    assert " complete " in line
    assert total.startswith("1 snapshots, 1.2 MB")
    document = json.loads(run("cache", "list", "--json").stdout)
    (row,) = document["snapshots"]
    assert {key: row[key] for key in ("snapshot", "uris", "complete", "in_use")} == {
        "snapshot": snapshot,
        "uris": [uri],
        "complete": True,
        "in_use": False,
    }
    assert document["bytes"] == row["bytes"] > 1_200_000


def test_nothing_is_said_to_be_damaged_that_is_not(pulled: tuple[str, str], run: Run) -> None:
    found = run("cache", "verify")
    assert found.returncode == 0
    assert found.stdout.splitlines()[-1].endswith("1.2 MB, 0 damaged")


def test_what_is_damaged_is_found_and_the_next_pull_brings_that_chunk_alone(
    pulled: tuple[str, str], run: Run, cache: NodeCache, model: Path
) -> None:
    uri, snapshot = pulled
    file = cache.snapshot_blobs(snapshot)["model.safetensors"].path
    damage(file, (1 << 20) + 5)  # in the second chunk, which is the last one
    found = run("cache", "verify")
    assert found.returncode == 1
    assert f"damaged: {file.name} (model.safetensors of snapshot {snapshot}), 1 MiB of it; set aside" in found.stdout
    assert found.stdout.splitlines()[-1].endswith("1 damaged; the next pull mends them")
    assert not cache.is_complete(snapshot)

    mended = json.loads(run("pull", uri, "--json").stdout)
    assert mended["downloaded_bytes"] == (model / "model.safetensors").stat().st_size - (1 << 20)
    assert content(Path(mended["snapshot"])) == content(model)
    assert run("cache", "verify").returncode == 0


def test_snapshots_are_evicted_by_name_and_by_uri_and_by_size(bucket: Bucket, run: Run, cache: NodeCache) -> None:
    bucket.put({f"{name}/x": b"x" * 1000 for name in "abcd"} | {f"{name}/y": name.encode() * 1000 for name in "abcd"})
    uris = [f"{bucket.uri}/{name}" for name in "abcd"]
    for uri in uris:
        assert run("pull", uri).returncode == 0
    assert run("cache", "evict", current(cache, uris[1])).returncode == 0
    assert cache.ref(uris[1]) is None
    assert run("cache", "evict", uris[2]).stdout.splitlines()[-1].endswith("are left")
    assert run("cache", "evict", "--to", "2000").returncode == 0  # the older one of both goes
    assert [row["uris"] for row in json.loads(run("cache", "list", "--json").stdout)["snapshots"]] == [[uris[3]]]
    assert run("cache", "evict", "--all").returncode == 0
    assert list((cache.root / "blobs").iterdir()) == []


def test_what_a_live_process_uses_is_not_evicted(pulled: tuple[str, str], run: Run, cache: NodeCache) -> None:
    uri, snapshot = pulled
    lease = cache.lease(snapshot)
    assert lease is not None
    with lease:
        assert " in use " in run("cache", "list").stdout
        refused = run("cache", "evict", uri)
        assert refused.returncode == 1
        assert f"{snapshot}: in use, it stays" in refused.stdout
        assert run("cache", "evict", "--all").returncode == 0
        assert run("cache", "evict", "--to", "0").returncode == 1
        assert cache.is_complete(snapshot)
    assert run("cache", "evict", uri).returncode == 0
    assert not cache.is_complete(snapshot)


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        pytest.param("cache evict", 2, "say what to evict", id="nothing named"),
        pytest.param("cache evict x --all", 2, "say what to evict", id="two ways at once"),
        pytest.param("cache evict --to -1", 2, "-1", id="less than nothing"),
        pytest.param("cache evict s3://b/m", 1, "has no snapshot 's3://b/m'; `relight cache list` shows what there is", id="unknown"),
        pytest.param("cache list --cache-dir /nowhere", 1, "/nowhere is no weights cache", id="no cache to list"),
        pytest.param("cache verify --cache-dir /nowhere", 1, "/nowhere is no weights cache", id="no cache to verify"),
        pytest.param("cache evict --all --cache-dir /nowhere", 1, "/nowhere is no weights cache", id="no cache to evict from"),
    ],
)
def test_what_cannot_be_done_with_a_cache_is_said(cache: NodeCache, run: Run, arguments: str, status: int, told: str) -> None:
    failed = run(*arguments.split())
    assert failed.returncode == status
    assert told in failed.stderr
    assert "Traceback" not in failed.stderr
