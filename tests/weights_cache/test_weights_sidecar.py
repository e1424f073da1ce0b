"""The sidecar as a process beside a function: what its probes say, and what it does when the store is away."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, Reply, Server, free_port, request, running, wait_until
from tests.weights_cache.conftest import noise
from tests.weights_cache.stores import Bucket, Proxy
from weights_cache.cache import NodeCache
from weights_cache.fetch import Puller
from weights_cache.sidecar import backoff

MIB = 1 << 20
MODEL = {"config.json": b"{}", "model.safetensors": noise(3 * MIB + 777)}
TOTAL = sum(map(len, MODEL.values()))


@dataclass
class Sidecar:
    """`python -m weights_cache serve` and its port."""

    server: Server
    port: int

    def get(self, path: str) -> Reply:
        return request(self.port, "GET", path)

    def row(self) -> Any:
        (row,) = self.get("/v1/snapshots").json()["snapshots"]
        return row

    def is_ready(self) -> bool:
        return self.get("/readyz").status == 200


@pytest.fixture
def sidecar(aws: None, cache: NodeCache, tmp_path: Path) -> Iterator[Callable[..., Sidecar]]:
    """sidecar(uri, **environment): starts one; it answers when this returns."""
    with contextlib.ExitStack() as started:

        def start(uri: str, **environ: str) -> Sidecar:
            port = free_port()
            ours = {
                "WEIGHTS_URI": uri,
                "WEIGHTS_HOST": "127.0.0.1",
                "WEIGHTS_PORT": str(port),
                "WEIGHTS_CACHE_DIR": str(cache.root),
                "WEIGHTS_PART_BYTES": str(MIB),
            }
            command = [sys.executable, "-m", "weights_cache", "serve"]
            log = tmp_path / f"sidecar-{port}.log"
            found = Sidecar(started.enter_context(running(command, log, {**os.environ, **ours, **environ})), port)
            wait_until("/healthz", lambda: found.get("/healthz").status == 200)
            return found

        yield start


def is_complete(cache: NodeCache, uri: str) -> bool:
    ref = cache.ref(uri)
    return ref is not None and cache.is_complete(ref.snapshot)


# Starting


def test_it_is_ready_once_every_file_is_in_the_cache_and_says_where_from(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put(MODEL)
    proxy.hold_after(2 * MIB)
    found = sidecar(bucket.uri, WEIGHTS_CONNECTIONS="1")
    wait_until("the hold", proxy.is_holding)
    wait_until("a chunk", lambda: found.row()["downloaded_bytes"] >= MIB)

    not_yet = found.get("/readyz")
    assert (not_yet.status, not_yet.json()) == (503, {"phase": "fetching", "error": None})
    assert found.get("/healthz").status == 200
    row = found.row()
    ref = cache.ref(bucket.uri)
    assert ref is not None
    assert {name: row[name] for name in ("uri", "phase", "error", "snapshot", "source", "total_bytes")} == {
        "uri": bucket.uri,
        "phase": "fetching",
        "error": None,
        "snapshot": ref.snapshot,
        "source": "store",
        "total_bytes": TOTAL,
    }
    assert 0 < row["bytes"] == row["downloaded_bytes"] < TOTAL
    assert row["bytes_per_second"] > 0
    assert row["seconds"] > 0

    proxy.release()
    wait_until("ready", found.is_ready)
    assert found.get("/readyz").json() == {"phase": "complete", "error": None}
    assert is_complete(cache, bucket.uri)
    row = found.row()
    assert (row["phase"], row["bytes"], row["total_bytes"], row["downloaded_bytes"]) == ("complete", TOTAL, TOTAL, TOTAL)
    assert found.row()["seconds"] == row["seconds"]


def test_metrics_are_prometheus_text_with_the_same_numbers(bucket: Bucket, sidecar: Callable[..., Sidecar]) -> None:
    bucket.put(MODEL)
    found = sidecar(bucket.uri)
    wait_until("ready", found.is_ready)
    reply = found.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    numbers = dict(line.split() for line in reply.body.decode().splitlines() if not line.startswith("#"))
    assert numbers == {
        "weights_cache_ready": "1",
        "weights_cache_bytes": str(TOTAL),
        "weights_cache_downloaded_bytes_total": str(TOTAL),
    }


def test_what_is_in_the_cache_already_is_not_downloaded(
    bucket: Bucket, proxy: Proxy, puller: Callable[..., Puller], sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put(MODEL)
    puller(bucket.uri).run()
    sent = proxy.sent
    found = sidecar(bucket.uri)
    wait_until("ready", found.is_ready)
    assert (found.row()["source"], found.row()["bytes"], found.row()["downloaded_bytes"]) == ("cache", TOTAL, 0)
    assert proxy.sent == sent


def test_a_route_that_is_not_there_is_404_with_those_that_are(bucket: Bucket, sidecar: Callable[..., Sidecar]) -> None:
    reply = sidecar(bucket.uri).get("/nowhere")
    assert reply.status == 404
    assert "/v1/snapshots" in reply.json()["error"]["message"]


def test_it_imports_no_torch(bucket: Bucket, sidecar: Callable[..., Sidecar]) -> None:
    bucket.put(MODEL)
    found = sidecar(bucket.uri)
    wait_until("ready", found.is_ready)
    maps = Path(f"/proc/{found.server.process.pid}/maps").read_text()
    assert "python" in maps
    assert "libtorch" not in maps


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        pytest.param({}, "WEIGHTS_URI is not set", id="no URI"),
        pytest.param({"WEIGHTS_URI": "model"}, "must be s3://bucket/prefix", id="a malformed URI"),
        pytest.param({"WEIGHTS_URI": "s3://b/m", "WEIGHTS_PORT": "0"}, "WEIGHTS_PORT='0': must be at least 1", id="a port out of bounds"),
        pytest.param({"WEIGHTS_URI": "s3://b/m", "WEIGHTS_PORT": "{taken}"}, "Address already in use", id="a port that is taken"),
    ],
)
def test_what_can_never_work_stops_the_start_with_one_plain_line(proxy: Proxy, aws: None, environ: dict[str, str], told: str) -> None:
    taken = {name: value.format(taken=proxy.url.rpartition(":")[2]) for name, value in environ.items()}
    command = [sys.executable, "-m", "weights_cache", "serve"]
    env = {**os.environ, "WEIGHTS_HOST": "127.0.0.1", **taken}
    failed = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith("Error: ")
    assert told in line


# When the store is away


def test_with_a_complete_snapshot_it_is_ready_without_the_store_and_says_so(
    bucket: Bucket, cache: NodeCache, puller: Callable[..., Puller], sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put(MODEL)
    snapshot = puller(bucket.uri).run()
    endpoint = f"http://127.0.0.1:{free_port()}"
    found = sidecar(bucket.uri, AWS_ENDPOINT_URL=endpoint)
    wait_until("ready", found.is_ready)
    row = found.row()
    assert (row["phase"], row["snapshot"], row["source"]) == ("complete", snapshot, "cache")
    assert (row["bytes"], row["total_bytes"], row["downloaded_bytes"]) == (TOTAL, TOTAL, 0)
    assert endpoint in row["error"]
    assert "WARNING" in found.server.said()
    assert "the complete snapshot in the cache is used" in found.server.said()


def test_without_one_it_says_why_not_and_is_ready_soon_after_the_store_is_back(
    bucket: Bucket, moto: tuple[str, int], cache: NodeCache, sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put(MODEL)
    port = free_port()
    found = sidecar(bucket.uri, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    assert found.get("/readyz").status == 503
    wait_until("an error", lambda: f"http://127.0.0.1:{port}" in (found.get("/readyz").json()["error"] or ""))
    assert found.get("/healthz").status == 200
    store = Proxy(moto, port)
    store.start()
    try:
        wait_until("ready", found.is_ready)
    finally:
        store.stop()
    assert is_complete(cache, bucket.uri)
    assert found.row()["error"] is None


def test_weights_that_appear_only_later_are_fetched_then(bucket: Bucket, cache: NodeCache, sidecar: Callable[..., Sidecar]) -> None:
    found = sidecar(bucket.uri)
    wait_until("an error", lambda: "is the prefix right?" in (found.row()["error"] or ""))
    bucket.put(MODEL)
    wait_until("ready", found.is_ready)
    assert is_complete(cache, bucket.uri)


def test_the_pauses_between_tries_double_up_to_a_limit_and_are_never_in_step() -> None:
    pauses = backoff(1, 30)
    found = [next(pauses) for _ in range(8)]
    assert all(0.75 * middle <= pause <= 1.25 * middle for pause, middle in zip(found, (1, 2, 4, 8, 16, 30, 30, 30), strict=True))
    assert len(set(found)) == 8


# Ending


def end(found: Sidecar) -> float:
    began = time.monotonic()
    found.server.signal(signal.SIGTERM)
    assert found.server.wait(30) == 0
    return time.monotonic() - began


def test_told_to_end_it_exits_with_0_at_once(bucket: Bucket, sidecar: Callable[..., Sidecar]) -> None:
    bucket.put(MODEL)
    found = sidecar(bucket.uri)
    wait_until("ready", found.is_ready)
    assert end(found) < 2


def test_told_to_end_while_the_store_stalls_it_exits_soon_and_the_next_one_carries_on(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put(MODEL)
    proxy.hold_after(2 * MIB + 500_000)
    first = sidecar(bucket.uri)
    wait_until("the hold", proxy.is_holding)
    there = wait_until("a chunk", lambda: first.row()["bytes"] >= MIB and first.row()["bytes"])
    assert end(first) < 5
    proxy.release()
    second = sidecar(bucket.uri)
    wait_until("ready", second.is_ready)
    assert is_complete(cache, bucket.uri)
    assert second.row()["downloaded_bytes"] <= TOTAL - there


def test_told_to_end_while_it_waits_for_the_store_it_exits_at_once(bucket: Bucket, sidecar: Callable[..., Sidecar]) -> None:
    found = sidecar(bucket.uri)
    wait_until("an error", lambda: found.row()["error"])
    assert end(found) < 2
