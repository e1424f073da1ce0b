"""The proxy that stands before a store in other tests: each fault is what its name says, and without one nothing is changed."""

import contextlib
import http.client
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.support import Reply, wait_until
from tests.weights_cache.conftest import noise
from tests.weights_cache.stores import Bucket, Fault, Proxy, signed, without_etags

DATA = noise(300_000)
WANTED = DATA[50_000:250_000]
HALF = WANTED[:100_000]
RANGE = "bytes 50000-249999/300000"


@dataclass(frozen=True)
class Setup:
    """A bucket that holds DATA as `a`, and a proxy before it."""

    bucket: Bucket
    proxy: Proxy
    identity: tuple[str, str]

    def get(self, path: str, headers: Mapping[str, str], timeout: float = 20) -> Reply:
        """What a client gets that believes all it is told: the body as far as it comes within `timeout`."""
        headers = signed(self.identity, "GET", f"{self.proxy.url}{path}", headers)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.proxy.port, timeout=timeout)) as connection:
            connection.request("GET", path, headers=headers)
            reply = connection.getresponse()
            body = b""
            with contextlib.suppress(TimeoutError):
                while piece := reply.read1(1 << 20):
                    body += piece
            return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, body)

    def read(self, fault: Fault | None = None, etag: str | None = None, timeout: float = 20) -> Reply:
        if fault:
            self.proxy.faults.append(fault)
        condition = {"If-Match": etag} if etag else {}
        return self.get(f"/{self.bucket.name}/model/a", {"Range": "bytes=50000-249999", **condition}, timeout)


@pytest.fixture(params=["moto", "SeaweedFS"])
def store(request: pytest.FixtureRequest) -> Setup:
    def fixture(name: str) -> object:
        return request.getfixturevalue(name)

    bucket, proxy = map(fixture, ("bucket", "proxy") if request.param == "moto" else ("seaweed_bucket", "seaweed_proxy"))
    assert isinstance(bucket, Bucket)
    assert isinstance(proxy, Proxy)
    bucket.put({"a": DATA})
    return Setup(bucket, proxy, proxy.identity or ("AKIATEST", "secret"))


@pytest.mark.parametrize(
    ("fault", "status", "content_range", "length", "body"),
    [
        (None, 206, RANGE, 200_000, WANTED),
        ("whole object", 200, None, 300_000, DATA),
        ("half the range", 206, "bytes 50000-149999/300000", 100_000, HALF),
        ("other range", 206, "bytes 1-200000/200001", 200_000, WANTED),
        ("too short", 206, RANGE, 100_000, HALF),
        ("too long", 206, RANGE, 201_000, WANTED + bytes(1000)),
        ("flipped bit", 206, RANGE, 200_000, HALF + bytes([WANTED[100_000] ^ 1]) + WANTED[100_001:]),
        ("cut", 206, RANGE, 200_000, HALF),
        ("stall", 206, RANGE, 200_000, HALF),
    ],
)
def test_what_a_read_is_answered(
    store: Setup, fault: Fault | None, status: int, content_range: str | None, length: int, body: bytes
) -> None:
    found = store.read(fault, timeout=2 if fault == "stall" else 20)
    assert (found.status, found.headers.get("content-range"), found.headers["content-length"]) == (status, content_range, str(length))
    assert found.body == body
    assert store.proxy.sent == len(body)
    assert store.read().body == WANTED


def test_a_reply_that_drips_makes_progress_but_never_much(store: Setup) -> None:
    store.proxy.drip_s = 0.01
    store.proxy.always = "drip"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(store.read)
        wait_until("some drops", lambda: store.proxy.sent > len(HALF) + 5)
        assert store.proxy.sent < len(HALF) + 1000
        store.proxy.drop_connections()
        assert WANTED.startswith(running.result().body)


def test_a_reply_may_lack_its_version_or_name_another(store: Setup) -> None:
    assert store.read().headers["etag"]
    assert "etag" not in store.read("no etag").headers
    assert store.read("other version").headers["etag"] == '"other"'


def test_a_condition_may_be_ignored(store: Setup) -> None:
    assert store.read(etag='"not this one"').status == 412
    assert store.read("ignores If-Match", etag='"not this one"').body == WANTED


@pytest.mark.parametrize(("fault", "code"), [("429", "TooManyRequests"), ("500", "InternalError"), ("503", "SlowDown")])
def test_an_error_says_when_to_try_again_if_told_to(store: Setup, fault: Fault, code: str) -> None:
    found = store.read(fault)
    assert (found.status, "retry-after" in found.headers) == (int(fault), False)
    assert f"<Code>{code}</Code>".encode() in found.body
    store.proxy.retry_after = "3"
    assert store.read(fault).headers["retry-after"] == "3"


def test_a_redirect_leads_to_the_same_path_elsewhere(store: Setup) -> None:
    store.proxy.elsewhere = "http://127.0.0.1:1"
    found = store.read("redirect")
    assert (found.status, found.headers["location"]) == (307, f"http://127.0.0.1:1/{store.bucket.name}/model/a")


def test_there_may_be_no_reply_at_all(store: Setup) -> None:
    with pytest.raises(http.client.RemoteDisconnected):
        store.read("no reply")
    with pytest.raises(TimeoutError):
        store.read("silence", timeout=0.3)


def test_faults_can_come_together_and_for_every_read(store: Setup) -> None:
    store.proxy.always = ("ignores If-Match", "no etag", "too short")
    for _ in range(2):
        found = store.read(etag='"not this one"')
        assert (found.status, "etag" in found.headers, found.body) == (206, False, HALF)


def test_a_listing_may_lack_the_versions_and_come_in_pages(store: Setup) -> None:
    store.bucket.put({"b": b"2", "c": b"3"})
    listing = f"/{store.bucket.name}?list-type=2&prefix=model%2F"
    assert store.get(listing, {}).body.count(b"<ETag>") == 3
    store.proxy.page = 2
    store.proxy.edit_listing = without_etags
    found = store.get(listing, {}).body
    assert (found.count(b"<Key>"), found.count(b"<ETag>")) == (2, 0)


def test_what_was_asked_for_is_kept(store: Setup) -> None:
    store.read(etag='"1"')
    (asked,) = store.proxy.asked
    assert (asked.key, asked.headers["range"], asked.headers["if-match"]) == ("model/a", "bytes=50000-249999", '"1"')
    assert store.proxy.reads == ["bytes=50000-249999"]


def test_reads_at_the_same_time_are_counted(store: Setup) -> None:
    for _ in range(3):
        store.read()
    assert store.proxy.peak == 1
    store.proxy.hold_after(0)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(store.read) for _ in range(3)]
        wait_until("three reads", lambda: store.proxy.peak == 3)
        store.proxy.release()
        assert [reading.result().body for reading in running] == [WANTED] * 3
    store.read()
    assert store.proxy.peak == 3


def test_each_connection_may_be_slow(store: Setup) -> None:
    store.proxy.rate = 400_000

    def time_of(count: int) -> float:
        began = time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            assert [reading.body for reading in pool.map(lambda _: store.read(), range(count))] == [WANTED] * count
        return time.monotonic() - began

    one_s = time_of(1)
    assert one_s > 0.4
    # Three that had to share would always take three times as long; on a busy machine some do nevertheless.
    wait_until("three in the time of one", lambda: time_of(3) < 2 * one_s)


def test_a_proxy_that_stops_leaves_no_connection_open(moto: tuple[str, int]) -> None:
    proxy = Proxy(moto)
    proxy.start()
    proxy.always = "silence"
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)) as connection:
        connection.request("GET", "/bucket/a")
        wait_until("the read", lambda: proxy.asked)
        proxy.stop()
        with pytest.raises(ConnectionError):
            connection.getresponse()
