"""What is said when the object store says no: which endpoint, bucket, key and identity, and whether trying again may help."""

import re
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.support import free_port
from tests.weights_cache.stores import Bucket, Proxy, without_etags
from weights_cache.cache import FileRef
from weights_cache.errors import ObjectChanged, StoreError, StoreUnavailable
from weights_cache.store import Store, is_pinnable
from weights_cache.uri import WeightsUri


@pytest.fixture
def store(bucket: Bucket) -> Store:
    return Store(WeightsUri.parse(bucket.uri))


def test_objects_are_listed_in_path_order_with_size_and_version(bucket: Bucket, store: Store) -> None:
    bucket.put({"b": b"22", "a/z": b"", "a": b"1"})
    listed = store.list()
    assert [(file.path, file.size) for file in listed] == [("a", 1), ("a/z", 0), ("b", 2)]
    assert all(file.etag.startswith('"') for file in listed)


def test_more_objects_than_fit_on_one_page_are_all_listed(bucket: Bucket, store: Store, proxy: Proxy) -> None:
    names = [f"shard-{number}" for number in range(7)]
    bucket.put(dict.fromkeys(names, b"x"))
    proxy.page = 3
    assert [file.path for file in store.list()] == names


@pytest.mark.parametrize("name", ["with space", "100%", "a+b&c=d", "重み", "quote'\"", "#hash?"])
def test_a_name_survives_the_way_to_the_store_and_back(store: Store, tmp_path: Path, bucket: Bucket, name: str) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    store.upload(tmp_path / "file", name, lambda amount: None)
    (listed,) = store.list()
    assert listed.path == name
    assert store.read(listed) == b"12345"
    with urlopen(store.address(listed)) as reply:  # noqa: S310  a loopback address
        assert reply.read() == b"12345"


def test_what_is_written_is_read(bucket: Bucket, store: Store) -> None:
    store.write("a/b", b"12345")
    (file,) = store.list()
    assert (file.path, store.read(file)) == ("a/b", b"12345")


def test_an_address_is_signed_once_until_it_is_asked_for_afresh(bucket: Bucket, store: Store) -> None:
    bucket.put({"a": b"1"})
    (file,) = store.list()
    address = store.address(file)
    assert store.address(file) == address
    assert "secret" not in address
    assert "X-Amz-Signature=" in address
    assert store.address(file, afresh=True).partition("?")[0] == address.partition("?")[0]


def test_a_listing_without_versions_tells_them_apart_by_their_time(bucket: Bucket, store: Store, proxy: Proxy) -> None:
    bucket.put({"a": b"1"})
    proxy.edit_listing = without_etags
    (file,) = store.list()
    assert file.etag.startswith("modified 20")
    assert not is_pinnable(file)
    assert store.read(file) == b"1"
    assert "if-match" not in proxy.asked[-1].headers


def test_a_listing_that_does_not_say_how_it_goes_on_is_not_taken_for_the_whole(bucket: Bucket, store: Store, proxy: Proxy) -> None:
    bucket.put({"a": b"1", "b": b"2"})
    proxy.page = 1
    proxy.edit_listing = lambda listing: re.sub(rb"<NextContinuationToken>.*?</NextContinuationToken>", b"", listing)
    with pytest.raises(StoreError, match=f"^{proxy.url} says that {bucket.uri}/ has more objects, and does not say how to go on$"):
        store.list()


def test_another_version_is_not_read(bucket: Bucket, store: Store) -> None:
    bucket.put({"a": b"one"})
    (file,) = store.list()
    bucket.put({"a": b"two"})
    with pytest.raises(ObjectChanged, match=f"^{bucket.uri}/a changed while being read$"):
        store.read(file)


def test_an_object_that_is_gone_has_changed_too(bucket: Bucket, store: Store) -> None:
    bucket.put({"a": b"one"})
    (file,) = store.list()
    bucket.delete("a")
    with pytest.raises(ObjectChanged, match="changed while being read: it is gone"):
        store.read(file)


def test_a_reply_cut_short_is_worth_another_try(bucket: Bucket, store: Store, proxy: Proxy) -> None:
    bucket.put({"a": b"x" * 100})
    (file,) = store.list()
    proxy.faults.append("cut")
    with pytest.raises(StoreUnavailable, match=f"{bucket.uri}/a"):
        store.read(file)


def test_a_bucket_is_made_only_if_there_is_none(bucket: Bucket, aws: None) -> None:
    for name in (bucket.name, f"{bucket.name}-new"):
        store = Store(WeightsUri(name, "model"))
        store.ensure_bucket()
        with pytest.raises(StoreError, match="no objects"):
            store.list()


# What is said


def refusal(call: Callable[[], object]) -> StoreError:
    """The error of a call that fails, of one line and no more."""
    with pytest.raises(StoreError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_missing_prefix_is_an_error_that_names_it_and_the_endpoint(proxy: Proxy, bucket: Bucket, store: Store) -> None:
    assert str(refusal(store.list)) == f"no objects below {bucket.uri}/ at {proxy.url}; is the prefix right?"


def test_a_missing_bucket_is_an_error_that_names_it_and_the_endpoint(proxy: Proxy, aws: None) -> None:
    told = refusal(Store(WeightsUri("nowhere-at-all", "model")).list)
    assert str(told) == f"cannot list s3://nowhere-at-all/model at {proxy.url}: there is no such bucket"


@pytest.mark.parametrize("ends", ["soon", "late"])
def test_a_missing_bucket_is_said_of_an_upload_too(
    proxy: Proxy, aws: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    if ends == "late":  # the threads of the upload, which have the refusal too
        monkeypatch.setattr("s3transfer.manager.TransferCoordinatorController.remove_transfer_coordinator", lambda *_: None)
    (tmp_path / "file").write_bytes(b"x")
    store = Store(WeightsUri("nowhere-at-all", "model"))
    told = refusal(lambda: store.upload(tmp_path / "file", "a", lambda amount: None))
    assert str(told) == f"cannot write s3://nowhere-at-all/model/a at {proxy.url}: there is no such bucket"


def test_missing_credentials_are_said_with_the_remedy(bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    told = str(refusal(Store(WeightsUri.parse(bucket.uri)).list))
    assert told.startswith(f"cannot list {bucket.uri} at {proxy.url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        pytest.param(403, "AccessDenied", StoreError, "refused for access key AKIATEST (AccessDenied)", id="not allowed"),
        pytest.param(403, "SignatureDoesNotMatch", StoreError, "refused for access key AKIATEST", id="a wrong secret"),
        pytest.param(401, "Unauthorized", StoreError, "refused for access key AKIATEST", id="not known"),
        pytest.param(400, "AuthorizationHeaderMalformed", StoreError, "answered 400 AuthorizationHeaderMalformed", id="a wrong region"),
        pytest.param(503, "ServiceUnavailable", StoreUnavailable, "answered 503 ServiceUnavailable", id="too busy"),
        pytest.param(500, "InternalError", StoreUnavailable, "answered 500 InternalError", id="broken"),
    ],
)
def test_a_refusal_says_what_by_whom_and_for_whom(
    bucket: Bucket, store: Store, proxy: Proxy, status: int, code: str, kind: type[StoreError], said: str
) -> None:
    proxy.refusal = status, code
    told = refusal(store.list)
    assert type(told) is kind
    assert str(told).startswith(f"cannot list {bucket.uri} at {proxy.url}: ")
    assert said in str(told)
    assert "secret" not in str(told)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        pytest.param(429, "TooManyRequests", StoreUnavailable, id="too often"),
        pytest.param(503, "SlowDown", StoreUnavailable, id="too fast"),
        pytest.param(400, "RequestTimeout", StoreUnavailable, id="too slow"),
        pytest.param(200, "InternalError", StoreUnavailable, id="an error behind a good status"),
        pytest.param(412, "PreconditionFailed", ObjectChanged, id="another version"),
        pytest.param(412, "", ObjectChanged, id="another version, without a code"),
        pytest.param(404, "NoSuchBucket", StoreError, id="no bucket"),
        pytest.param(404, "", ObjectChanged, id="no object"),
        pytest.param(416, "InvalidRange", ObjectChanged, id="a shorter one"),
        pytest.param(307, "TemporaryRedirect", StoreError, id="elsewhere"),
        pytest.param(405, "MethodNotAllowed", StoreError, id="not that way"),
    ],
)
def test_only_what_may_pass_is_worth_another_try(aws: None, status: int, code: str, kind: type[StoreError]) -> None:
    told = Store(WeightsUri("bucket", "model")).refusal(FileRef("a", 1, '"1"'), status, code)
    assert type(told) is kind
    assert "s3://bucket/model/a" in str(told)


def test_a_store_that_is_not_there_is_unavailable_for_reads_and_writes_too(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    store = Store(WeightsUri.parse(bucket.uri))
    (tmp_path / "file").write_bytes(b"x")
    for call in (lambda: store.read(FileRef("a", 1, '"1"')), lambda: store.upload(tmp_path / "file", "a", lambda amount: None)):
        told = refusal(call)
        assert isinstance(told, StoreUnavailable)
        assert f"{bucket.uri}/a at {endpoint}" in str(told)


def test_an_endpoint_that_is_no_address_is_an_error_that_repeats_it(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    assert "localhost" in str(refusal(lambda: Store(WeightsUri("bucket", "model"))))


def test_a_bucket_name_that_none_can_have_is_an_error_that_repeats_it(aws: None) -> None:
    assert "No_Such Bucket!" in str(refusal(Store(WeightsUri("No_Such Bucket!", "model")).list))


def test_a_profile_that_is_not_configured_is_an_error_that_names_it(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "nobody" in str(refusal(lambda: Store(WeightsUri("bucket", "model"))))
