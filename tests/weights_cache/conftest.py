"""The object store that these tests talk to: moto over HTTP, behind a proxy that counts and breaks what passes."""

import os
import random
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest

from tests.support import clean_environment, free_port, request, running, wait_until
from tests.weights_cache.stores import Bucket, Proxy
from weights_cache.cache import NodeCache
from weights_cache.fetch import Puller
from weights_cache.store import Store
from weights_cache.uri import WeightsUri

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Host and port of an S3 server; a process of its own, so that it has a core of its own."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with running(command, tmp_path_factory.mktemp("moto") / "log", clean_environment()):
        wait_until("the S3 server", lambda: request(port, "GET", "/"))
        yield "127.0.0.1", port


@pytest.fixture
def proxy(moto: tuple[str, int]) -> Iterator[Proxy]:
    """What AWS_ENDPOINT_URL points at."""
    proxy = Proxy(moto)
    proxy.start()
    yield proxy
    proxy.stop()


@pytest.fixture
def aws(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose AWS variables lead to the proxy, and whose other settings are the defaults."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "WEIGHTS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)


@pytest.fixture(scope="session")
def s3(moto: tuple[str, int]) -> "Iterator[S3Client]":
    """A client of the server itself, past the proxy; made once, for it takes a while."""
    session = boto3.session.Session("AKIATEST", "secret", region_name="us-east-1")
    client = session.client("s3", endpoint_url=f"http://{moto[0]}:{moto[1]}")
    yield client
    client.close()


@pytest.fixture
def bucket(aws: None, s3: "S3Client") -> Bucket:
    """An empty bucket of this test's own."""
    name = f"test-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=name)
    return Bucket(name, s3)


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    cache = NodeCache(tmp_path / "cache")
    cache.create()
    return cache


@pytest.fixture
def puller(cache: NodeCache) -> Callable[..., Puller]:
    """puller(uri): a pull into `cache`, not yet running."""

    def make(uri: str, connections: int = 4, part_bytes: int = 1 << 20) -> Puller:
        store = Store(WeightsUri.parse(uri), connections=connections)
        return Puller(store, cache, uri=uri, connections=connections, part_bytes=part_bytes)

    return make


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that repeat nowhere, so that one in the wrong place shows."""
    return random.Random(seed).randbytes(size)
