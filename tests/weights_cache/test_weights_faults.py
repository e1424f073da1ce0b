"""Whatever goes wrong between the store and the cache: no byte is lost, no wrong one is ever seen, and what is said is the reason."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from tests.support import wait_until
from tests.weights_cache.conftest import content, landed, noise, push
from tests.weights_cache.stores import Bucket, Fault, Faults, Proxy, without_etags
from weights_cache import connection, fetch, transfer
from weights_cache.cache import NodeCache
from weights_cache.chunks import CHUNK_BYTES
from weights_cache.errors import ObjectChanged, StoreError, StoreUnavailable, WeightsError
from weights_cache.fetch import Puller
from weights_cache.manifest import MANIFEST
from weights_cache.reader import Weights
from weights_cache.settings import WeightsSettings

MIB = 1 << 20
MODEL = {"config.json": b"{}", "empty": b"", "model.safetensors": noise(4 * MIB + 777)}
NEWER = {**MODEL, "model.safetensors": noise(4 * MIB + 777, seed=2)}

Pull = Callable[..., Puller]
Put = Callable[[Bucket, Mapping[str, bytes]], dict[str, bytes]]

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(params=["disk", "tmpfs"])
def cache_root(request: pytest.FixtureRequest, tmp_path: Path, tmpfs: Path) -> Path:
    """On a disk bytes are written, in memory they are read into large pages."""
    return {"disk": tmp_path, "tmpfs": tmpfs}[request.param] / "cache"


def put_plain(bucket: Bucket, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files as any program uploads them."""
    bucket.put(files)
    return dict(files)


@pytest.fixture(params=[push, put_plain], ids=["with a manifest", "without"])
def put(request: pytest.FixtureRequest, proxy: Proxy) -> Put:
    """put(bucket, files): what a pull is to bring. The manifest's own reads are left alone."""
    proxy.is_spared = lambda key: key.endswith(MANIFEST)
    found: Put = request.param
    return found


@pytest.fixture
def pushed(bucket: Bucket, proxy: Proxy) -> dict[str, bytes]:
    """MODEL with a manifest, whose own reads are left alone."""
    proxy.is_spared = lambda key: key.endswith(MANIFEST)
    return push(bucket, MODEL)


@contextmanager
def nothing_wrong_is_seen(cache: NodeCache, pull: Puller, files: Mapping[str, bytes]) -> Iterator[None]:
    """All the while, what the cache says is there has the bytes of `files`."""
    wrong: list[str] = []
    is_over = threading.Event()

    def look() -> None:
        for path, blob in cache.snapshot_blobs(pull.progress.snapshot).items() if pull.progress.snapshot else ():
            try:
                part = os.open(blob.part, os.O_RDONLY)
            except FileNotFoundError:
                continue  # it has been published, or has not been begun
            chunks = blob.chunks(os.fstat(part))
            for chunk, at in enumerate(range(0, len(files[path]), CHUNK_BYTES)):
                if chunks and chunks.has(chunk) and os.pread(part, CHUNK_BYTES, at) != files[path][at : at + CHUNK_BYTES]:
                    wrong.append(f"{path} at {at}")
            os.close(part)

    def watch() -> None:
        while not is_over.is_set():
            look()
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
    assert wrong == []


# The connection


@pytest.mark.parametrize("fault", ["cut", "no reply", "429", "500", "503", "stall", "silence"])
def test_reads_that_fail_are_made_again(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, put: Put, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(connection, "STALL_S", 0.5)
    files = put(bucket, MODEL)
    proxy.faults.extend([fault] * 6)
    pull = puller(bucket.uri, connections=3)
    with nothing_wrong_is_seen(cache, pull, files):
        assert content(cache, pull.run()) == files
    assert not proxy.faults


def test_every_read_names_the_version_it_wants(bucket: Bucket, proxy: Proxy, puller: Pull, put: Put) -> None:
    put(bucket, MODEL)
    proxy.faults.extend(["cut", "503"])
    puller(bucket.uri).run()
    listed = {item["Key"]: item["ETag"] for item in bucket.s3.list_objects_v2(Bucket=bucket.name)["Contents"]}
    assert len(proxy.asked) > 5
    assert all(read.headers.get("if-match") == listed[read.key] for read in proxy.asked)


@pytest.mark.parametrize("fault", ["429", "503"])
def test_a_store_that_says_when_to_come_back_is_left_alone_until_then(
    bucket: Bucket, proxy: Proxy, puller: Pull, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "LONGEST_RETRY_AFTER_S", 1.0)
    bucket.put({"a": noise(1000)})
    proxy.faults.append(fault)
    proxy.retry_after = "600"
    asked_at: list[float] = []
    proxy.before_read = lambda: asked_at.append(time.monotonic())
    puller(bucket.uri).run()
    refused, answered = asked_at
    assert 1.0 <= answered - refused < 60


@pytest.mark.parametrize("fault", ["cut", "503", "no reply"])
def test_a_manifest_that_does_not_come_at_once_is_asked_for_again(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, fault: Fault
) -> None:
    files = push(bucket, MODEL)
    proxy.faults.append(fault)
    assert content(cache, puller(bucket.uri).run()) == files


@pytest.mark.parametrize("fault", ["429", "500", "503", "no reply"])
def test_a_store_that_never_recovers_is_given_up_on_by_name(
    bucket: Bucket, proxy: Proxy, puller: Pull, put: Put, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 3)
    put(bucket, {"a": noise(1000)})
    proxy.always = fault
    with pytest.raises(StoreUnavailable, match=f"{bucket.uri}/a"):
        puller(bucket.uri).run()
    assert len(proxy.asked) == 3


def test_a_redirect_is_an_error_that_says_so(bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, put: Put) -> None:
    put(bucket, MODEL)
    proxy.always = "redirect"
    pull = puller(bucket.uri)
    with pytest.raises(StoreError, match="the store answers 307, it is elsewhere; is AWS_REGION the bucket's") as caught:
        pull.run()
    assert not isinstance(caught.value, StoreUnavailable)
    assert "Signature" not in str(caught.value)


def test_no_error_tells_the_signed_address(bucket: Bucket, proxy: Proxy, puller: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    bucket.put(MODEL)
    faults: tuple[Fault, ...] = ("cut", "no reply", "500", "redirect")
    for fault in faults:
        proxy.always = fault
        with pytest.raises(StoreError) as caught:
            puller(bucket.uri).run()
        assert "Signature" not in str(caught.value)


# Bytes that are not those that were pushed


def test_a_flipped_bit_is_mended_by_reading_that_chunk_again(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, pushed: dict[str, bytes]
) -> None:
    # In the middle of a part of four chunks, so in its third.
    proxy.faults.append("flipped bit")
    proxy.is_spared = lambda key: not key.endswith("model.safetensors")
    pull = puller(bucket.uri, connections=1, part_bytes=4 * MIB)
    with nothing_wrong_is_seen(cache, pull, pushed):
        assert content(cache, pull.run()) == pushed
    assert pull.progress.damaged == 1
    assert proxy.reads == [f"bytes=0-{4 * MIB - 1}", f"bytes={2 * MIB}-{4 * MIB - 1}", f"bytes={4 * MIB}-{4 * MIB + 776}"]


def test_bits_flipped_in_every_second_read_never_show(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, pushed: dict[str, bytes]
) -> None:
    turn = iter(range(1000))
    proxy.before_read = lambda: proxy.faults.append("flipped bit") if next(turn) % 2 else None
    pull = puller(bucket.uri, connections=1)
    with nothing_wrong_is_seen(cache, pull, pushed):
        assert content(cache, pull.run()) == pushed
    assert pull.progress.damaged >= 2


def test_a_bit_that_is_flipped_each_time_is_damage_in_the_store(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, pushed: dict[str, bytes]
) -> None:
    proxy.always = "flipped bit"
    pull = puller(bucket.uri)
    with (
        nothing_wrong_is_seen(cache, pull, pushed),
        pytest.raises(StoreError, match=f"^{bucket.uri}/.*: it is damaged in the store; push it again$") as caught,
    ):
        pull.run()
    assert "are not those that were pushed" in str(caught.value)
    assert not isinstance(caught.value, StoreUnavailable)
    proxy.always = None
    assert content(cache, puller(bucket.uri).run()) == pushed


@pytest.fixture(params=["moto", "seaweedfs"])
def store(request: pytest.FixtureRequest) -> tuple[Bucket, Proxy]:
    """An empty bucket and the proxy before it."""
    names = ("bucket", "proxy") if request.param == "moto" else ("seaweed_bucket", "seaweed_proxy")
    bucket, proxy = map(request.getfixturevalue, names)
    return bucket, proxy


@pytest.mark.parametrize("algorithm", ["CRC32", "CRC32C", "SHA1", "SHA256", "CRC64NVME"])
def test_without_a_manifest_damage_shows_in_the_checksum_that_the_store_keeps(
    store: tuple[Bucket, Proxy], cache: NodeCache, puller: Pull, algorithm: str
) -> None:
    bucket, proxy = store
    data = MODEL["model.safetensors"]
    try:
        bucket.s3.put_object(Bucket=bucket.name, Key="model/a", Body=data, ChecksumAlgorithm=algorithm)  # type: ignore[arg-type]
    except ClientError as error:
        pytest.skip(f"this store does not take it: {error}")
    kept = bucket.s3.head_object(Bucket=bucket.name, Key="model/a", ChecksumMode="ENABLED")
    if f"Checksum{algorithm}" not in kept:
        pytest.skip("this store does not keep it")
    proxy.faults.append("flipped bit")
    first = puller(bucket.uri)
    with pytest.raises(StoreError, match=f"{bucket.uri}/a is damaged in the store: its bytes do not have its {algorithm}; upload it again"):
        first.run()
    assert first.progress.damaged == 5
    assert list((cache.root / "blobs").iterdir()) == []
    assert content(cache, puller(bucket.uri).run()) == {"a": data}


def test_who_has_mapped_a_file_that_turns_out_to_be_damaged_is_told(bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull) -> None:
    data = MODEL["model.safetensors"]
    bucket.s3.put_object(Bucket=bucket.name, Key="model/a", Body=data, ChecksumAlgorithm="SHA256")
    proxy.faults.append("flipped bit")
    proxy.hold_after(2 * MIB)
    weights = Weights(WeightsSettings(uri=bucket.uri, cache_dir=cache.root))
    weights.watch()
    told: list[str] = []

    def read() -> None:
        try:
            weights.path("a")
        except WeightsError as error:
            told.append(str(error))

    with closing(weights), ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(puller(bucket.uri).run)
        wait_until("some bytes", lambda: weights.restored().bytes >= MIB)
        threading.Thread(target=read, daemon=True).start()
        proxy.release()
        with pytest.raises(StoreError, match="damaged in the store"):
            pulling.result(20)
    wait_until("the reader's error", lambda: told)
    assert told == ["a is damaged in the store, which was found out after some of it had been read; upload it again"]


# Stores that answer otherwise than S3 does


@pytest.mark.parametrize("fault", ["whole object", "other range", "half the range", "no etag", "too short", "too long"])
def test_ranges_answered_badly_never_lead_to_a_wrong_byte(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, put: Put, fault: Fault
) -> None:
    files = put(bucket, MODEL)
    proxy.before_read = lambda: setattr(proxy, "always", None if len(proxy.asked) > 8 else fault)
    pull = puller(bucket.uri)
    with nothing_wrong_is_seen(cache, pull, files):
        assert content(cache, pull.run()) == files


@pytest.mark.parametrize("faults", ["whole object", ("no etag", "ignores If-Match"), ("no etag", "whole object")])
def test_a_store_that_never_does_ranges_or_versions_can_still_be_pulled_from(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, put: Put, faults: Faults
) -> None:
    files = put(bucket, MODEL)
    proxy.always = faults
    assert content(cache, puller(bucket.uri).run()) == files


def test_a_store_without_versions_in_listing_and_replies_can_be_pulled_from(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull
) -> None:
    bucket.put(MODEL)
    proxy.edit_listing = without_etags
    proxy.faults.append(("no etag", "cut"))
    proxy.always = "no etag"
    pull = puller(bucket.uri)
    with nothing_wrong_is_seen(cache, pull, MODEL):
        assert content(cache, pull.run()) == MODEL
    assert all("if-match" not in read.headers for read in proxy.asked)


# Objects that are replaced and deleted


@pytest.mark.parametrize("faults", [None, "ignores If-Match"])
def test_a_model_replaced_in_the_middle_is_never_mixed(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, put: Put, faults: Faults | None
) -> None:
    put(bucket, MODEL)
    proxy.always = faults
    pull = puller(bucket.uri, connections=2)
    proxy.hold_after(2 * MIB)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pull.run)
        wait_until("the hold", proxy.is_holding)
        files = put(bucket, NEWER)
        proxy.release()
        assert content(cache, running.result(30)) == files


def test_a_model_replaced_in_the_middle_needs_no_room_for_both(bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull) -> None:
    bucket.put(MODEL)
    pull = puller(bucket.uri, connections=1, cache_bytes=5 * MIB)
    proxy.hold_after(2 * MIB)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pull.run)
        wait_until("the hold", proxy.is_holding)
        bucket.put(NEWER)
        proxy.release()
        assert content(cache, running.result(30)) == NEWER


@pytest.mark.parametrize("faults", ["no etag", ("no etag", "ignores If-Match", "whole object")])
def test_without_versions_an_object_replaced_in_the_middle_is_one_of_both(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, faults: Faults
) -> None:
    bucket.put({"a": MODEL["model.safetensors"]})
    proxy.edit_listing = without_etags
    proxy.faults.append((*((faults,) if isinstance(faults, str) else faults), "cut"))
    proxy.always = faults
    pull = puller(bucket.uri, connections=2)
    proxy.hold_after(3 * MIB // 2)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pull.run)
        wait_until("the hold", proxy.is_holding)
        bucket.put({"a": NEWER["model.safetensors"]})
        proxy.release()
        assert content(cache, running.result(30)) in ({"a": MODEL["model.safetensors"]}, {"a": NEWER["model.safetensors"]})


def test_a_file_of_a_manifest_that_is_deleted_in_the_middle_is_an_error_that_names_it(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, pushed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "RELISTINGS", 2)
    pull = puller(bucket.uri, connections=1)
    proxy.hold_after(MIB + 1000)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pull.run)
        wait_until("the hold", proxy.is_holding)
        bucket.delete("model.safetensors")
        proxy.release()
        with pytest.raises(ObjectChanged, match=f"{MANIFEST} names model.safetensors, which is not there"):
            running.result(30)
    assert not cache.is_complete(pull.progress.snapshot)
    assert landed(cache, pull.progress.snapshot) < sum(map(len, pushed.values()))


def test_a_push_on_its_way_is_waited_for(bucket: Bucket, cache: NodeCache, puller: Pull, pushed: dict[str, bytes]) -> None:
    bucket.put({"config.json": b'{"new": 1}'})  # and the manifest is that of the former version still
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(puller(bucket.uri).run)
        files = push(bucket, {**MODEL, "config.json": b'{"new": 1}'})
        assert content(cache, running.result(30)) == files


def test_strangers_below_the_prefix_of_a_pushed_model_are_not_fetched(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, pushed: dict[str, bytes]
) -> None:
    bucket.put({"checkpoint-1/model.safetensors": noise(MIB)})
    assert content(cache, puller(bucket.uri).run()) == pushed
    assert all("checkpoint-1" not in read.key for read in proxy.asked)
