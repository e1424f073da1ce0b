"""Pulls that are killed at any moment, over and over."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.weights_cache.conftest import noise, push
from tests.weights_cache.stores import Bucket, Fault, Proxy
from weights_cache.cache import NodeCache
from weights_cache.chunks import CHUNK_BYTES
from weights_cache.fetch import Puller
from weights_cache.manifest import MANIFEST
from weights_cache.settings import WeightsSettings
from weights_cache.store import Store
from weights_cache.uri import WeightsUri

MIB = 1 << 20
MODEL = {f"model-{n}.safetensors": noise(n * MIB + 77 * n, seed=n) for n in range(5)} | {"config.json": b"{}"}
FAULTS: tuple[Fault, ...] = ("cut", "503", "no reply")


def check_what_is_claimed(cache: NodeCache, uri: str, files: Mapping[str, bytes]) -> int:
    """Every byte that the cache says it has is the store's; returns how many there are."""
    ref = cache.ref(uri)
    there = 0
    for path, blob in cache.snapshot_blobs(ref.snapshot).items() if ref else ():
        data = files[path]
        if blob.is_complete():
            assert blob.path.read_bytes() == data, path
            there += len(data)
        elif chunks := blob.chunks():
            part = blob.part.read_bytes()
            assert len(part) == len(data)
            for at in range(0, len(data), CHUNK_BYTES):
                if chunks.has(at // CHUNK_BYTES):
                    assert part[at : at + CHUNK_BYTES] == data[at : at + CHUNK_BYTES], f"{path} at byte {at}"
            there += chunks.bytes_there()
    return there


def pull_and_kill(cache: NodeCache, uri: str, proxy: Proxy, after: float, pause_s: float) -> None:
    """Start a pull, and kill it `pause_s` seconds after so many bytes have come, unless it was done by then."""
    goal = proxy.sent + after
    command = [sys.executable, "-m", "weights_cache", "pull", uri, "--cache-dir", str(cache.root)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "WEIGHTS_PART_BYTES": str(MIB)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while proxy.sent < goal and process.poll() is None:
        time.sleep(0.001)
    time.sleep(pause_s)
    process.send_signal(signal.SIGKILL)
    process.wait()


def kill_over_and_over(bucket: Bucket, proxy: Proxy, folder: Path, chance: random.Random, files: Mapping[str, bytes], kills: int) -> None:
    """Kill pulls into one cache, each at another moment and some among faults; then let one end."""
    cache, kept, total = NodeCache(folder), 0, sum(map(len, files.values()))
    proxy.is_spared = lambda key: key.endswith(MANIFEST)
    for _ in range(kills):
        proxy.faults.extend(chance.choices(FAULTS, k=chance.randrange(3)))
        pull_and_kill(cache, bucket.uri, proxy, chance.uniform(0, 1) * (total - kept), chance.uniform(0, 0.02))
        before, kept = kept, check_what_is_claimed(cache, bucket.uri, files)
        assert kept >= before
    cache.create()
    last = Puller(Store(WeightsUri.parse(bucket.uri)), cache, WeightsSettings(part_bytes=MIB), uri=bucket.uri)
    snapshot = last.run()
    assert last.progress.downloaded_bytes == total - kept
    assert check_what_is_claimed(cache, bucket.uri, files) == total
    assert {path: cache.snapshot_path(snapshot).joinpath(path).read_bytes() for path in files} == files


@pytest.mark.parametrize("place", ["disk", "tmpfs"])
def test_a_pull_killed_at_any_moment_leaves_nothing_wrong_and_the_next_one_needs_only_the_rest(
    bucket: Bucket, proxy: Proxy, tmp_path: Path, tmpfs: Path, place: str
) -> None:
    folder = {"disk": tmp_path, "tmpfs": tmpfs}[place] / "cache"
    kill_over_and_over(bucket, proxy, folder, random.Random(7), push(bucket, MODEL), 5)


@pytest.mark.soak
def test_so_it_is_for_many_pulls_with_and_without_a_manifest(bucket: Bucket, proxy: Proxy, tmp_path: Path, tmpfs: Path) -> None:
    bucket.put(MODEL)
    chance = random.Random(20_240_601)
    for number in range(16):
        folder = (tmp_path, tmpfs)[number % 2]
        kill_over_and_over(bucket, proxy, folder / f"plain-{number}", chance, MODEL, chance.choice((1, 1, 2, 3)))
    files = push(bucket, MODEL)
    for number in range(16):
        folder = (tmp_path, tmpfs)[number % 2]
        kill_over_and_over(bucket, proxy, folder / f"pushed-{number}", chance, files, chance.choice((1, 1, 2, 3)))
