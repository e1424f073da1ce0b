"""The sidecar as a process beside a function: what its probes say, and what it does when the store is away."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import ROOT, free_port, wait_until
from tests.weights_cache.conftest import Sidecar, counted, current, noise, push
from tests.weights_cache.stores import Bucket, Proxy
from weights_cache.cache import NodeCache
from weights_cache.connection import STALL_S
from weights_cache.fetch import Puller
from weights_cache.pulls import backoff
from weights_cache.reader import Weights
from weights_cache.settings import WeightsSettings

MIB = 1 << 20
MODEL = {"config.json": b"{}", "model.safetensors": noise(3 * MIB + 777)}
NEWER = {**MODEL, "model.safetensors": noise(3 * MIB + 777, seed=2)}
TOTAL = sum(map(len, MODEL.values()))


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
    assert {name: row[name] for name in ("uri", "phase", "error", "snapshot", "source", "total_bytes", "pulls", "checked")} == {
        "uri": bucket.uri,
        "phase": "fetching",
        "error": None,
        "snapshot": current(cache, bucket.uri),
        "source": "store",
        "total_bytes": TOTAL,
        "pulls": 1,
        "checked": True,
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
    numbers = found.metrics()
    of_uri = f'{{uri="{bucket.uri}"}}'
    assert numbers[f"weights_cache_ready{of_uri}"] == 1
    assert numbers[f"weights_cache_present_bytes{of_uri}"] == numbers[f"weights_cache_total_bytes{of_uri}"] == TOTAL
    assert numbers[f"weights_cache_bytes_per_second{of_uri}"] > 0
    assert numbers['weights_cache_bytes_total{source="store"}'] == TOTAL
    assert numbers['weights_cache_bytes_total{source="neighbour"}'] == numbers['weights_cache_bytes_total{source="cache"}'] == 0
    assert numbers["weights_cache_misses_total"] == numbers["weights_cache_cold_start_seconds_count"] == 1
    for name in ("hits", "failures", "waits", "wait_seconds", "evictions", "verify_failures", "stale"):
        assert numbers[f"weights_cache_{name}_total"] == 0


def test_what_is_in_the_cache_already_is_not_downloaded(
    bucket: Bucket, proxy: Proxy, puller: Callable[..., Puller], sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put(MODEL)
    puller(bucket.uri).run()
    sent = proxy.sent
    found = sidecar(bucket.uri)
    wait_until("complete", lambda: found.row()["phase"] == "complete")
    assert (found.row()["source"], found.row()["bytes"], found.row()["downloaded_bytes"]) == ("cache", TOTAL, 0)
    assert proxy.sent == sent
    wait_until("its metric", lambda: found.metrics()["weights_cache_hits_total"] == 1)
    assert found.metrics()['weights_cache_bytes_total{source="cache"}'] == TOTAL


def test_who_waited_for_a_neighbours_download_counts_the_wait_and_what_the_neighbour_brought(
    bucket: Bucket, proxy: Proxy, sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put(MODEL)
    proxy.hold_after(2 * MIB)
    first = sidecar(bucket.uri)
    wait_until("the hold", proxy.is_holding)
    second = sidecar(bucket.uri)
    wait_until("that it waits", lambda: second.row().get("total_bytes") == TOTAL)
    time.sleep(1)  # what it knows by then it has looked up a moment before it waits
    proxy.release()
    for found in (first, second):
        wait_until("its end", lambda found=found: counted(found)["misses"] == 1)  # type: ignore[misc]
    numbers = counted(second)
    assert (numbers["waits"], numbers["store"]) == (1, 0)
    assert numbers["wait_seconds"] > 0.1
    assert numbers["neighbour"] > 0
    assert numbers["neighbour"] + numbers["cache"] == TOTAL == counted(first)["store"]
    assert counted(first)["waits"] == 0


def test_what_had_to_go_to_make_room_is_counted(bucket: Bucket, puller: Callable[..., Puller], sidecar: Callable[..., Sidecar]) -> None:
    bucket.put({f"{name}/x": noise(MIB, seed=number) for number, name in enumerate("abc")})
    for name in "ab":
        pull = puller(f"{bucket.uri}/{name}")
        pull.run()
        pull.close()
    found = sidecar(f"{bucket.uri}/c", WEIGHTS_CACHE_BYTES=str(MIB))
    wait_until("its end", lambda: counted(found)["misses"] == 1)
    assert counted(found)["evictions"] == 2


def test_a_chunk_that_came_damaged_is_counted(bucket: Bucket, proxy: Proxy, sidecar: Callable[..., Sidecar]) -> None:
    files = push(bucket, MODEL)
    proxy.is_spared = lambda key: not key.endswith("model.safetensors")
    proxy.faults.append("flipped bit")
    found = sidecar(bucket.uri)
    wait_until("its end", lambda: counted(found)["misses"] == 1)
    assert counted(found)["verify_failures"] == 1
    assert counted(found)["store"] == sum(map(len, files.values())) + MIB  # that chunk came twice


def test_what_a_pull_did_that_failed_at_last_is_counted_too(
    bucket: Bucket, proxy: Proxy, puller: Callable[..., Puller], sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put({"old/x": noise(MIB, seed=1)})
    pull = puller(f"{bucket.uri}/old")
    pull.run()
    pull.close()
    push(bucket, {"x": noise(MIB)})
    proxy.is_spared = lambda key: not key.endswith("/x")
    proxy.always = "flipped bit"
    found = sidecar(bucket.uri, WEIGHTS_CACHE_BYTES=str(2 * MIB - 1))
    wait_until("its failure", lambda: counted(found)["failures"] >= 1)
    numbers = counted(found)
    assert numbers["evictions"] == 1
    assert numbers["verify_failures"] >= 3
    assert numbers["store"] >= 3 * MIB
    assert numbers["hits"] == numbers["misses"] == found.metrics()["weights_cache_cold_start_seconds_count"] == 0


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


@pytest.mark.parametrize("revalidate", ["after", "before"])
def test_with_a_complete_snapshot_it_is_ready_without_the_store_and_says_so(
    bucket: Bucket, puller: Callable[..., Puller], sidecar: Callable[..., Sidecar], revalidate: str
) -> None:
    bucket.put(MODEL)
    snapshot = puller(bucket.uri).run()
    endpoint = f"http://127.0.0.1:{free_port()}"
    found = sidecar(bucket.uri, AWS_ENDPOINT_URL=endpoint, WEIGHTS_REVALIDATE=revalidate)
    wait_until("ready", found.is_ready)
    row = wait_until("the error", lambda: found.row()["error"] and found.row())
    assert (row["phase"], row["snapshot"], row["source"]) == ("complete", snapshot, "cache")
    assert (row["bytes"], row["total_bytes"], row["downloaded_bytes"], row["checked"]) == (TOTAL, TOTAL, 0, True)
    assert endpoint in row["error"]
    wait_until("its metric", lambda: found.metrics()["weights_cache_stale_total"] >= 1)
    assert "WARNING" in found.server.said()
    assert "the complete snapshot in the cache is used" in found.server.said()


def test_a_store_that_refuses_does_not_stop_a_start_on_what_is_here(
    bucket: Bucket, proxy: Proxy, puller: Callable[..., Puller], sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put(MODEL)
    puller(bucket.uri).run()
    proxy.refusal = 403, "AccessDenied"
    found = sidecar(bucket.uri)
    wait_until("an error", lambda: "refused for access key AKIATEST" in (found.row()["error"] or ""))
    assert found.is_ready()
    assert not found.row()["checked"]


def test_told_to_ask_first_it_is_not_ready_while_the_store_refuses(
    bucket: Bucket, proxy: Proxy, puller: Callable[..., Puller], sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put(MODEL)
    puller(bucket.uri).run()
    proxy.refusal = 403, "AccessDenied"
    found = sidecar(bucket.uri, WEIGHTS_REVALIDATE="before")
    wait_until("an error", lambda: "refused for access key AKIATEST" in (found.row()["error"] or ""))
    assert not found.is_ready()
    proxy.refusal = None
    wait_until("ready", found.is_ready)
    assert found.row()["checked"]


def test_a_function_starts_on_what_is_here_without_the_store(
    bucket: Bucket, cache: NodeCache, puller: Callable[..., Puller], sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put(MODEL)
    puller(bucket.uri).run()
    found = sidecar(bucket.uri, AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}")
    wait_until("ready", found.is_ready)
    weights = Weights(WeightsSettings(uri=bucket.uri, cache_dir=cache.root, port=found.port))
    assert weights.path("model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert weights.restored().source == "cache"


def test_a_pinned_snapshot_that_is_nowhere_is_an_error_that_names_both(
    bucket: Bucket, puller: Callable[..., Puller], sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put(MODEL)
    held = puller(bucket.uri).run()
    found = sidecar(f"{bucket.uri}#{'0' * 32}")
    told = wait_until("an error", lambda: found.row()["error"])
    assert held in told
    assert "0" * 32 in told
    assert not found.is_ready()


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
    assert found.metrics()["weights_cache_failures_total"] >= 1


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


# When there is a new version


def test_it_is_ready_on_the_old_weights_while_the_new_ones_are_on_their_way(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Callable[..., Puller], sidecar: Callable[..., Sidecar]
) -> None:
    push(bucket, MODEL)
    old = puller(bucket.uri).run()
    push(bucket, NEWER)
    proxy.hold_after(2 * MIB)
    found = sidecar(bucket.uri)
    wait_until("the hold", proxy.is_holding)
    assert found.is_ready()
    ref = cache.ref(bucket.uri)
    assert ref is not None
    assert ref.snapshot == old
    assert ref.next == found.row()["snapshot"]
    weights = Weights(WeightsSettings(uri=bucket.uri, cache_dir=cache.root))
    assert weights.path("model.safetensors").read_bytes() == MODEL["model.safetensors"]
    proxy.release()
    new = wait_until("the new one", lambda: current(cache, bucket.uri) != old and current(cache, bucket.uri))
    assert new == ref.next
    assert cache.is_complete(new)
    later = Weights(WeightsSettings(uri=bucket.uri, cache_dir=cache.root))
    assert later.path("model.safetensors").read_bytes() == NEWER["model.safetensors"]
    assert weights.path("model.safetensors").read_bytes() == MODEL["model.safetensors"]


def test_told_to_ask_first_nobody_starts_before_the_store_has_answered(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Callable[..., Puller], sidecar: Callable[..., Sidecar]
) -> None:
    push(bucket, MODEL)
    old = puller(bucket.uri).run()
    push(bucket, NEWER)
    may_answer, is_asked = threading.Event(), threading.Event()

    def hold(listing: bytes) -> bytes:
        is_asked.set()
        may_answer.wait(20)
        return listing

    proxy.edit_listing = hold
    found = sidecar(bucket.uri, WEIGHTS_REVALIDATE="before")
    weights = Weights(WeightsSettings(uri=bucket.uri, cache_dir=cache.root, port=found.port, revalidate="before"))
    weights.watch()
    wait_until("the question", is_asked.is_set)
    assert not found.is_ready()
    assert not found.row()["checked"]
    assert weights.restored().total_bytes == 0
    may_answer.set()
    row = wait_until("the answer", lambda: found.row()["checked"] and found.row())
    assert row["snapshot"] != old
    assert weights.path("model.safetensors").read_bytes() == NEWER["model.safetensors"]
    wait_until("ready", found.is_ready)


# Ending


def end(found: Sidecar) -> None:
    """Have it end, before any wait for the store is over."""
    found.server.signal(signal.SIGTERM)
    assert found.server.wait(0.9 * STALL_S) == 0


def test_told_to_end_it_exits_with_0_at_once(bucket: Bucket, sidecar: Callable[..., Sidecar]) -> None:
    bucket.put(MODEL)
    found = sidecar(bucket.uri)
    wait_until("ready", found.is_ready)
    end(found)


def test_told_to_end_while_the_store_stalls_it_exits_soon_and_the_next_one_carries_on(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put(MODEL)
    proxy.hold_after(2 * MIB + 500_000)
    first = sidecar(bucket.uri)
    wait_until("the hold", proxy.is_holding)
    there = wait_until("a chunk", lambda: first.row()["bytes"] >= MIB and first.row()["bytes"])
    end(first)
    proxy.release()
    second = sidecar(bucket.uri)
    wait_until("ready", second.is_ready)
    assert is_complete(cache, bucket.uri)
    assert second.row()["downloaded_bytes"] <= TOTAL - there


def test_told_to_end_while_it_waits_for_the_store_it_exits_at_once(bucket: Bucket, sidecar: Callable[..., Sidecar]) -> None:
    found = sidecar(bucket.uri)
    wait_until("an error", lambda: found.row()["error"])
    end(found)
