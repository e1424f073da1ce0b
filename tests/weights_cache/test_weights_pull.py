"""Pulls through a real store over HTTP: what crosses the wire, what is on the disk, and what goes wrong in between."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support import ROOT, free_port, wait_until
from tests.weights_cache.conftest import content, current, kill, landed, noise, pull_process
from tests.weights_cache.stores import PIECE_BYTES, Bucket, Fault, Proxy
from weights_cache import fetch, transfer
from weights_cache.cache import FileRef, NodeCache, snapshot_id
from weights_cache.errors import CacheError, ObjectChanged, StoreError, StoreUnavailable
from weights_cache.fetch import Puller

MIB = 1 << 20
MODEL = {"config.json": b"{}", "model.safetensors": noise(3 * MIB + 777), "tokenizer/empty.txt": b"", "tokenizer/vocab.txt": noise(5000)}
NEWER = {**MODEL, "model.safetensors": noise(3 * MIB + 777, seed=2)}
TOTAL = sum(map(len, MODEL.values()))

Pull = Callable[..., Puller]


# When all goes well


def test_every_file_below_the_prefix_ends_up_in_the_snapshot_byte_for_byte(bucket: Bucket, cache: NodeCache, puller: Pull) -> None:
    bucket.put(MODEL)
    bucket.s3.put_object(Bucket=bucket.name, Key="model2/other", Body=b"not below it")
    bucket.s3.put_object(Bucket=bucket.name, Key="model/tokenizer/", Body=b"")  # what consoles leave for a folder
    snapshot = puller(bucket.uri).run()
    assert content(cache, snapshot) == MODEL
    assert cache.is_complete(snapshot)


def test_the_uri_stands_for_the_snapshot_and_the_snapshot_is_named_by_what_was_listed(
    bucket: Bucket, cache: NodeCache, puller: Pull
) -> None:
    bucket.put(MODEL)
    snapshot = puller(bucket.uri).run()
    listed = bucket.s3.list_objects_v2(Bucket=bucket.name)["Contents"]
    files = [FileRef(item["Key"].removeprefix("model/"), item["Size"], item["ETag"]) for item in listed]
    assert snapshot == snapshot_id(f"{bucket.name}/model", files)
    assert current(cache, bucket.uri) == snapshot


@pytest.mark.parametrize("part_bytes", [MIB, 64 * MIB])
@pytest.mark.parametrize("connections", [1, 8])
def test_each_byte_crosses_the_wire_once(bucket: Bucket, proxy: Proxy, puller: Pull, connections: int, part_bytes: int) -> None:
    bucket.put(MODEL)
    pull = puller(bucket.uri, connections=connections, part_bytes=part_bytes)
    pull.run()
    assert proxy.sent == TOTAL
    assert pull.progress.downloaded_bytes == TOTAL


def test_a_second_pull_downloads_nothing(bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull) -> None:
    bucket.put(MODEL)
    first = puller(bucket.uri).run()
    again = puller(bucket.uri)
    assert again.run() == first
    assert proxy.sent == TOTAL
    assert (again.progress.downloaded_bytes, again.progress.source) == (0, "cache")
    assert again.progress.bytes_there() == TOTAL


def test_a_new_version_costs_only_the_files_that_changed(bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull) -> None:
    bucket.put(MODEL)
    first = puller(bucket.uri).run()
    bucket.put({"config.json": b'{"v": 2}'})
    second = puller(bucket.uri).run()
    assert proxy.sent == TOTAL + len(b'{"v": 2}')
    assert content(cache, first) == MODEL
    assert content(cache, second) == {**MODEL, "config.json": b'{"v": 2}'}


def test_a_file_that_is_gone_from_the_store_is_not_in_the_next_snapshot(bucket: Bucket, cache: NodeCache, puller: Pull) -> None:
    bucket.put(MODEL)
    puller(bucket.uri).run()
    bucket.delete("tokenizer/vocab.txt")
    assert "tokenizer/vocab.txt" not in content(cache, puller(bucket.uri).run())


def test_progress_is_told_while_it_runs(bucket: Bucket, proxy: Proxy, puller: Pull) -> None:
    bucket.put(MODEL)
    pull = puller(bucket.uri, connections=1)
    proxy.hold_after(2 * MIB)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pull.run)
        wait_until("the hold", proxy.is_holding)
        wait_until("a chunk", lambda: pull.progress.downloaded_bytes >= MIB)
        progress = pull.progress
        assert progress.total_bytes == TOTAL
        assert progress.source == "store"
        assert 0 < progress.bytes_there() < TOTAL
        proxy.release()
        assert running.result(20) == progress.snapshot
    assert progress.bytes_there() == progress.downloaded_bytes == TOTAL


# When the store stumbles


@pytest.mark.parametrize("fault", ["cut", "503", "no reply"])
def test_a_read_that_fails_is_made_again(bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, fault: Fault) -> None:
    bucket.put(MODEL)
    proxy.faults.extend([fault, fault])
    assert content(cache, puller(bucket.uri).run()) == MODEL
    assert not proxy.faults


def test_every_second_read_cut_short_the_pull_still_ends_well(bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull) -> None:
    bucket.put(MODEL)
    turn = iter(range(1000))
    proxy.before_read = lambda: proxy.faults.append("cut") if next(turn) % 2 else None
    assert content(cache, puller(bucket.uri).run()) == MODEL


def test_a_read_that_was_cut_is_continued_from_its_last_whole_chunk(bucket: Bucket, proxy: Proxy, puller: Pull) -> None:
    bucket.put({"model.safetensors": MODEL["model.safetensors"]})
    proxy.faults.append("cut")
    puller(bucket.uri, part_bytes=64 * MIB).run()
    size = 3 * MIB + 777
    assert proxy.reads == [f"bytes=0-{size - 1}", f"bytes={MIB}-{size - 1}"]


def test_a_store_that_cuts_every_reply_is_given_up_on_and_what_came_is_kept(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 4)
    bucket.put(MODEL)
    first = puller(bucket.uri, connections=1)
    proxy.before_read = lambda: setattr(proxy, "always", "cut" if len(proxy.reads) > 2 else None)
    with pytest.raises(StoreUnavailable, match=f"{bucket.uri}/model.safetensors"):
        first.run()
    assert proxy.reads.count(f"bytes={2 * MIB}-{3 * MIB - 1}") == 4
    proxy.before_read, proxy.always = lambda: None, None
    kept = landed(cache, first.progress.snapshot)
    assert kept >= MIB
    second = puller(bucket.uri)
    assert content(cache, second.run()) == MODEL
    assert second.progress.downloaded_bytes == TOTAL - kept


@pytest.mark.parametrize("fault", ["whole object", "other range", "half the range", "no etag", "too short", "too long"])
def test_a_range_that_is_not_what_was_asked_for_has_the_object_read_as_a_whole(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, fault: Fault
) -> None:
    bucket.put(MODEL)
    proxy.before_read = lambda: setattr(proxy, "always", None if len(proxy.reads) > 6 else fault)
    assert content(cache, puller(bucket.uri).run()) == MODEL
    assert "" in proxy.reads  # it was asked for without a range


def test_another_version_never_reaches_the_disk(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "RELISTINGS", 1)
    bucket.put({"model.safetensors": MODEL["model.safetensors"]})
    proxy.always = "other version"
    pull = puller(bucket.uri, connections=1)
    with pytest.raises(ObjectChanged, match=r'model/model\.safetensors changed while being read: version "other"'):
        pull.run()
    assert landed(cache, pull.progress.snapshot) == 0


def test_a_store_that_cannot_be_reached_is_an_error_that_names_its_endpoint(
    bucket: Bucket, cache: NodeCache, puller: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreUnavailable, match=f"cannot list s3://{bucket.name}/model at {endpoint}"):
        puller(bucket.uri).run()


# When objects are replaced


def test_an_object_replaced_in_the_middle_is_fetched_anew_and_never_mixed(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull
) -> None:
    bucket.put(MODEL)
    pull = puller(bucket.uri, connections=1)
    proxy.hold_after(2 * MIB)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pull.run)
        wait_until("the hold", proxy.is_holding)
        given_up = pull.progress.snapshot
        bucket.put(NEWER)
        proxy.release()
        snapshot = running.result(30)
    assert snapshot != given_up
    assert content(cache, snapshot) == NEWER
    assert not cache.is_complete(given_up)


def test_an_object_deleted_in_the_middle_is_not_in_the_snapshot(bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull) -> None:
    bucket.put(MODEL)
    pull = puller(bucket.uri, connections=1)
    proxy.hold_after(MIB)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pull.run)
        wait_until("the hold", proxy.is_holding)
        bucket.delete("model.safetensors")
        proxy.release()
        assert set(content(cache, running.result(30))) == set(MODEL) - {"model.safetensors"}


def test_objects_replaced_faster_than_they_can_be_read_end_in_an_error_that_says_so(
    bucket: Bucket, proxy: Proxy, puller: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "RELISTINGS", 2)
    bucket.put(MODEL)
    versions = iter(range(1000))
    proxy.before_read = lambda: bucket.put({"model.safetensors": noise(2 * MIB, seed=next(versions))})
    with pytest.raises(ObjectChanged, match=r"model/model\.safetensors changed while being read"):
        puller(bucket.uri).run()


# When a pull is stopped, or killed


def test_a_stopped_pull_ends_with_an_error_and_the_next_one_carries_on(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull
) -> None:
    bucket.put(MODEL)
    first = puller(bucket.uri, connections=1)
    proxy.hold_after(2 * MIB + PIECE_BYTES)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(first.run)
        wait_until("a chunk", lambda: landed(cache, first.progress.snapshot) > MIB)
        first.cancel()
        proxy.release()
        with pytest.raises(StoreError, match="the pull was stopped"):
            running.result(20)
    kept = landed(cache, first.progress.snapshot)
    second = puller(bucket.uri)
    assert content(cache, second.run()) == MODEL
    assert second.progress.downloaded_bytes == TOTAL - kept


def test_a_pull_killed_half_way_is_resumed_with_what_is_missing(bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull) -> None:
    bucket.put(MODEL)
    proxy.hold_after(2 * MIB + 500_000)
    process = pull_process(cache, bucket.uri)
    wait_until("the hold", proxy.is_holding)
    kill(process)
    proxy.release()
    kept = landed(cache, current(cache, bucket.uri))
    second = puller(bucket.uri)
    snapshot = second.run()
    assert content(cache, snapshot) == MODEL
    assert second.progress.downloaded_bytes == TOTAL - kept


def test_two_at_once_share_one_download(bucket: Bucket, proxy: Proxy, cache: NodeCache) -> None:
    bucket.put(MODEL)
    proxy.hold_after(MIB)
    pair = [pull_process(cache, bucket.uri) for _ in range(2)]
    wait_until("the hold", proxy.is_holding)
    proxy.release()
    for process in pair:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert f'"bytes": {TOTAL}' in out
    assert proxy.sent == TOTAL
    assert content(cache, current(cache, bucket.uri)) == MODEL


def test_who_waits_for_another_pull_carries_on_when_that_one_is_killed(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull
) -> None:
    bucket.put(MODEL)
    proxy.hold_after(2 * MIB + 500_000)
    leader = pull_process(cache, bucket.uri)
    wait_until("the hold", proxy.is_holding)
    follower = puller(bucket.uri)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(follower.run)
        wait_until("the follower", lambda: follower.progress.total_bytes)
        there = wait_until("what the leader has done", follower.progress.bytes_there)
        assert follower.progress.downloaded_bytes == 0
        kill(leader)
        proxy.release()
        snapshot = running.result(30)
    assert content(cache, snapshot) == MODEL
    assert follower.progress.downloaded_bytes <= TOTAL - there
    assert follower.progress.source == "store"


# Pulls in processes of their own that are made by forking, for all of them to begin at once and soon.
CROWD = """
import os, pathlib, sys, traceback
from weights_cache.cache import NodeCache
from weights_cache.fetch import Puller
from weights_cache.settings import WeightsSettings
from weights_cache.store import Store
from weights_cache.uri import WeightsUri

uri, root, count = sys.argv[1:]
store = Store(WeightsUri.parse(uri))
children = []
for _ in range(int(count)):
    if child := os.fork():
        children.append(child)
        continue
    try:
        pull = Puller(store, NodeCache(pathlib.Path(root)), WeightsSettings(connections=4, part_bytes=1 << 20), uri=uri)
        found = f"{pull.run()} {pull.progress.downloaded_bytes}\\n"
        os.write(1, found.encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def crowd(cache: NodeCache, uri: str, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CROWD, uri, str(cache.root), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sixteen_at_once_share_one_download(bucket: Bucket, proxy: Proxy, cache: NodeCache) -> None:
    bucket.put(MODEL)
    found = crowd(cache, bucket.uri, 16)
    out, err = found.communicate(timeout=60)
    assert found.returncode == 0, err
    results = [line.split() for line in out.splitlines()]
    assert [snapshot for snapshot, _ in results] == [current(cache, bucket.uri)] * 16
    assert sum(int(downloaded) for _, downloaded in results) == proxy.sent == TOTAL
    assert content(cache, current(cache, bucket.uri)) == MODEL


def test_sixteen_that_wait_for_one_that_is_killed_share_what_is_left(bucket: Bucket, proxy: Proxy, cache: NodeCache) -> None:
    bucket.put(MODEL)
    proxy.hold_after(2 * MIB + 500_000)
    leader = pull_process(cache, bucket.uri, WEIGHTS_CONNECTIONS="1")
    wait_until("the hold", proxy.is_holding)
    found = crowd(cache, bucket.uri, 16)
    there = wait_until(
        "two chunks", lambda: landed(cache, current(cache, bucket.uri)) >= 2 * MIB and landed(cache, current(cache, bucket.uri))
    )
    kill(leader)
    proxy.release()
    out, err = found.communicate(timeout=60)
    assert found.returncode == 0, err
    assert sum(int(line.split()[1]) for line in out.splitlines()) == TOTAL - there
    assert content(cache, current(cache, bucket.uri)) == MODEL


# A pinned snapshot


def test_a_pinned_snapshot_that_the_prefix_holds_is_fetched(bucket: Bucket, cache: NodeCache, puller: Pull) -> None:
    bucket.put(MODEL)
    snapshot = puller(bucket.uri).run()
    pinned = f"{bucket.uri}#{snapshot}"
    for path in (cache.root / "blobs").iterdir():
        path.unlink()
    assert puller(pinned).run() == snapshot
    assert content(cache, snapshot) == MODEL
    assert current(cache, pinned) == snapshot


def test_a_pinned_snapshot_that_the_prefix_no_longer_holds_is_refused_with_the_one_it_holds(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull
) -> None:
    bucket.put(NEWER)
    held = puller(bucket.uri).run()
    sent = proxy.sent
    pinned = f"{bucket.uri}#{'0' * 32}"
    with pytest.raises(StoreError, match=f"{pinned}: the prefix now holds snapshot {held}"):
        puller(pinned).run()
    assert proxy.sent == sent
    assert cache.ref(pinned) is None


def test_a_pinned_snapshot_in_the_cache_is_had_although_the_prefix_moved_on(bucket: Bucket, cache: NodeCache, puller: Pull) -> None:
    bucket.put(MODEL)
    snapshot = puller(bucket.uri).run()
    bucket.put(NEWER)
    assert puller(bucket.uri).run() != snapshot
    assert puller(f"{bucket.uri}#{snapshot}").run() == snapshot
    assert content(cache, snapshot) == MODEL


def test_a_pinned_snapshot_in_the_cache_needs_no_store(
    bucket: Bucket, cache: NodeCache, puller: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(MODEL)
    snapshot = puller(bucket.uri).run()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    pull = puller(f"{bucket.uri}#{snapshot}")
    assert pull.run() == snapshot
    assert (pull.progress.total_bytes, pull.progress.bytes_there(), pull.progress.source) == (TOTAL, TOTAL, "cache")


# What cannot be laid out


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/passwd", "a//b"])
def test_a_key_that_would_leave_the_cache_is_refused(bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, key: str) -> None:
    bucket.put({"config.json": b"{}", key: b"x"})
    listed = [item["Key"] for item in bucket.s3.list_objects_v2(Bucket=bucket.name)["Contents"]]
    assert f"model/{key}" in listed
    with pytest.raises(CacheError, match="cannot be a file below the snapshot"):
        puller(bucket.uri).run()
    assert proxy.sent == 0
    assert list((cache.root / "blobs").iterdir()) == []


def test_a_blob_that_somebody_removed_is_fetched_again(bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull) -> None:
    bucket.put(MODEL)
    snapshot = puller(bucket.uri).run()
    cache.snapshot_blobs(snapshot)["tokenizer/vocab.txt"].path.unlink()
    puller(bucket.uri).run()
    assert proxy.sent == TOTAL + 5000
    assert content(cache, snapshot) == MODEL
