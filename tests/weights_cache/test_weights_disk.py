"""Pulls into a cache on a disk that is full, or that cannot be written."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support import BIN, ROOT, wait_until
from tests.weights_cache.conftest import noise
from tests.weights_cache.mounts import inside, on_large_pages, on_read_only, on_small_disk
from tests.weights_cache.stores import Bucket, Proxy

MIB = 1 << 20


@pytest.fixture
def cache_dir(aws: None, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def pull(bucket: Bucket, cache_dir: Path, below: str = "") -> list[str]:
    return [str(BIN / "relight"), "pull", bucket.uri + below, "--cache-dir", str(cache_dir)]


def listing(cache_dir: Path) -> list[str]:
    return [str(BIN / "relight"), "cache", "list", "--json", "--cache-dir", str(cache_dir)]


def left(cache_dir: Path) -> list[str]:
    """Prints what files of models there are."""
    return ["find", f"{cache_dir}/blobs", f"{cache_dir}/snapshots", f"{cache_dir}/refs", f"{cache_dir}/digests", "-type", "f"]


def in_turn(*commands: list[str]) -> list[str]:
    """One command that runs several, and prints how each of them ended."""
    return ["sh", "-c", "; ".join(f"{shlex.join(command)}; echo exit $?" for command in commands)]


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def failure(command: list[str]) -> str:
    """The last line that a failed command says."""
    found = run(command)
    assert (found.returncode, found.stdout, found.stderr.count("Error")) == (1, "", 1), found.stderr
    return found.stderr.splitlines()[-1]


def test_a_model_larger_than_the_disk_is_refused_with_the_reason_and_leaves_nothing(bucket: Bucket, proxy: Proxy, cache_dir: Path) -> None:
    bucket.put({"model.safetensors": noise(6 * MIB)})
    found = run(on_small_disk(cache_dir, 4 * MIB, in_turn(pull(bucket, cache_dir), left(cache_dir))))
    assert proxy.sent == 0
    assert found.stdout == "exit 1\nexit 0\n"  # and no file was found
    line = found.stderr.splitlines()[-1]
    assert re.fullmatch(
        rf"Error: no room in {cache_dir} for {bucket.uri}: {6 * MIB:,} bytes needed, [\d,]+ free on its disk; "
        "0 could be evicted, 0 are in use",
        line,
    )


def test_a_model_that_was_used_before_goes_when_that_makes_room(bucket: Bucket, cache_dir: Path) -> None:
    bucket.put({"a/x": noise(3 * MIB, 1), "b/x": noise(3 * MIB, 2)})
    commands = [*(pull(bucket, cache_dir, f"/{name}") for name in "ab"), left(cache_dir), listing(cache_dir)]
    found = run(on_small_disk(cache_dir, 5 * MIB, in_turn(*commands)))
    assert found.stdout.count("exit 0") == 4, found.stderr
    assert len(re.findall(f"^{cache_dir}/blobs/", found.stdout, re.MULTILINE)) == 1
    (row,) = json.loads(found.stdout.splitlines()[-2])["snapshots"]
    assert (row["uris"], row["bytes"], row["complete"]) == ([f"{bucket.uri}/b"], 3 * MIB, True)


def test_nothing_goes_when_that_does_not_make_enough_room(bucket: Bucket, cache_dir: Path) -> None:
    bucket.put({"a/x": noise(3 * MIB, 1), "b/x": noise(8 * MIB, 2)})
    commands = [*(pull(bucket, cache_dir, f"/{name}") for name in "ab"), listing(cache_dir)]
    found = run(on_small_disk(cache_dir, 5 * MIB, in_turn(*commands)))
    assert re.findall(r"exit \d", found.stdout) == ["exit 0", "exit 1", "exit 0"]
    assert f"no room in {cache_dir} for {bucket.uri}/b: {8 * MIB:,} bytes needed" in found.stderr
    assert f"; {3 * MIB:,} could be evicted, 0 are in use" in found.stderr
    (row,) = json.loads(found.stdout.splitlines()[-2])["snapshots"]
    assert (row["uris"], row["complete"]) == ([f"{bucket.uri}/a"], True)


def test_a_bound_on_the_cache_is_kept_in_the_same_way(bucket: Bucket, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTS_CACHE_BYTES", str(5 * MIB))
    bucket.put({"a/x": noise(3 * MIB, 1), "b/x": noise(3 * MIB, 2), "c/x": noise(6 * MIB, 3)})
    for name in "ab":
        assert run(pull(bucket, cache_dir, f"/{name}")).returncode == 0
    line = failure(pull(bucket, cache_dir, "/c"))
    assert f"{6 * MIB:,} bytes needed" in line
    assert f"of WEIGHTS_CACHE_BYTES={5 * MIB:,}" in line
    (row,) = json.loads(run(listing(cache_dir)).stdout)["snapshots"]
    assert (row["uris"], row["complete"]) == ([f"{bucket.uri}/b"], True)
    assert sum(path.stat().st_size for path in (cache_dir / "blobs").iterdir()) == 3 * MIB


def test_a_disk_that_fills_up_during_a_pull_ends_it_well_or_with_the_reason(bucket: Bucket, proxy: Proxy, cache_dir: Path) -> None:
    bucket.put({"model.safetensors": noise(6 * MIB)})
    proxy.hold_after(2 * MIB)
    command = on_small_disk(cache_dir, 8 * MIB, pull(bucket, cache_dir))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until("the hold", proxy.is_holding)
    with pytest.raises(OSError, match="No space left"):
        inside(process.pid, cache_dir).joinpath("filler").write_bytes(bytes(8 * MIB))
    proxy.release()
    out, said = process.communicate(timeout=60)
    if process.returncode == 0:
        assert out.startswith(str(cache_dir))
    else:
        assert said.splitlines()[-1].startswith("Error: ")
        assert re.search(r"no room for .* in .*cache.*: [\d,]+ bytes needed, [\d,]+ free|No space left on device", said.splitlines()[-1])


def test_a_cache_that_cannot_be_written_is_refused_with_the_reason(bucket: Bucket, cache_dir: Path) -> None:
    bucket.put({"model.safetensors": noise(1000)})
    line = failure(on_read_only(cache_dir, pull(bucket, cache_dir)))
    assert line.startswith("Error: ")
    assert str(cache_dir) in line
    assert "Read-only file system" in line
    assert list(cache_dir.iterdir()) == []


def test_a_file_system_that_has_large_pages_by_itself_keeps_what_was_pulled(bucket: Bucket, cache_dir: Path, tmp_path: Path) -> None:
    data = noise(6 * MIB + 777)
    bucket.put({"model.safetensors": data})
    (tmp_path / "data").write_bytes(data)
    compare = ["sh", "-c", f"cmp {cache_dir}/snapshots/*/model.safetensors {tmp_path}/data"]
    verify = [str(BIN / "relight"), "cache", "verify", "--cache-dir", str(cache_dir)]
    found = run(on_large_pages(cache_dir, in_turn(pull(bucket, cache_dir), compare, verify)))
    assert found.stdout.count("exit 0") == 3, found.stdout + found.stderr
