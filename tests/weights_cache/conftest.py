"""The object store that these tests talk to: moto over HTTP, behind a proxy that counts and breaks what passes."""

import logging
import os
import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.weights_cache.stores import Bucket, Proxy
from weights_cache.cache import NodeCache
from weights_cache.fetch import Puller
from weights_cache.store import Store
from weights_cache.uri import WeightsUri


@pytest.fixture(scope="session")
def moto() -> Iterator[tuple[str, int]]:
    """Host and port of an S3 server."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


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
def s3_session() -> boto3.session.Session:
    """Made once: most of a client's cost is in reading its service's description."""
    return boto3.session.Session("AKIATEST", "secret", region_name="us-east-1")


@pytest.fixture
def bucket(aws: None, moto: tuple[str, int], s3_session: boto3.session.Session) -> Iterator[Bucket]:
    """An empty bucket of this test's own."""
    s3 = s3_session.client("s3", endpoint_url=f"http://{moto[0]}:{moto[1]}")
    name = f"test-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=name)
    yield Bucket(name, s3)
    s3.close()


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
