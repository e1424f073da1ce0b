"""The object stores that these tests talk to: moto over HTTP, behind a proxy that counts and breaks what passes, and SeaweedFS."""

import contextlib
import functools
import hashlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import botocore.session
import pytest

from tests.support import ROOT, Reply, Server, clean_environment, free_port, request, running, wait_until
from tests.weights_cache.node import URI, Node
from tests.weights_cache.stores import Bucket, Proxy, Seaweed, seaweedfs
from weights_cache import resident, transfer
from weights_cache.cache import NodeCache
from weights_cache.chunks import CHUNK_BYTES
from weights_cache.digest import chunk_digest
from weights_cache.fetch import Puller
from weights_cache.loop import Loop
from weights_cache.manifest import MANIFEST, Entry, dump
from weights_cache.reader import Weights
from weights_cache.settings import WeightsSettings
from weights_cache.sidecar import _bound
from weights_cache.store import Store
from weights_cache.uri import WeightsUri

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


@pytest.fixture(scope="session", autouse=True)
def _loaded_once() -> Iterator[None]:
    """What botocore knows of S3 is read from its files once, not for each client: that is most of what making one takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", functools.cache(botocore.session.create_loader))
        yield


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
    lead_to(monkeypatch, proxy.url, "AKIATEST", "secret")


def lead_to(monkeypatch: pytest.MonkeyPatch, endpoint: str, key_id: str, secret: str) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "WEIGHTS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
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


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A SeaweedFS, which takes about two seconds to start."""
    with seaweedfs(tmp_path_factory.mktemp("seaweed")) as found:
        yield found
        found.s3.close()


@pytest.fixture
def seaweed_bucket(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket of this test's own, in an environment that leads straight to SeaweedFS."""
    lead_to(monkeypatch, seaweed.url, *seaweed.owner)
    name = f"test-{uuid.uuid4().hex}"
    seaweed.s3.create_bucket(Bucket=name)
    return Bucket(name, seaweed.s3)


@pytest.fixture
def seaweed_proxy(seaweed: Seaweed, seaweed_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before SeaweedFS, which the environment now leads to."""
    proxy = Proxy(("127.0.0.1", seaweed.port), identity=seaweed.owner)
    proxy.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.stop()


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    """A folder in memory, where a cache is filled through large pages."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def cache_root(tmp_path: Path) -> Path:
    """Where `cache` lies."""
    return tmp_path / "cache"


@pytest.fixture
def cache(cache_root: Path) -> NodeCache:
    cache = NodeCache(cache_root)
    cache.create()
    return cache


@pytest.fixture
def node(cache: NodeCache) -> Iterator[Node]:
    node = Node(cache)
    yield node
    node.leave()


@pytest.fixture
def weights(cache: NodeCache) -> Iterator[Weights]:
    with contextlib.closing(Weights(WeightsSettings(uri=URI, cache_dir=cache.root))) as weights:
        yield weights


@contextlib.contextmanager
def answering(residents: resident.Residents, folder: Path) -> Iterator[None]:
    """The tier answers in this process, at its socket in a folder."""
    loop = Loop()
    loop.listen(_bound(folder / resident.SOCKET, socket.SOCK_SEQPACKET), lambda sock: resident.FunctionPeer(sock, residents), 64)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield
    finally:
        loop.stop()
        thread.join()
        loop.close()


@pytest.fixture
def residents(cache: NodeCache) -> Iterator[resident.Residents]:
    """The tier, answering in this process; for 64 MiB."""
    residents = resident.Residents(64 << 20)
    with answering(residents, cache.root):
        yield residents
    residents.close()


@pytest.fixture
def puller(cache: NodeCache) -> Callable[..., Puller]:
    """puller(uri, **settings): a pull into `cache`, not yet running."""

    def make(uri: str, *, connections: int = 4, part_bytes: int = 1 << 20, **settings: Any) -> Puller:
        chosen = WeightsSettings(connections=connections, part_bytes=part_bytes, **settings)
        return Puller(Store(WeightsUri.parse(uri)), cache, chosen, uri=uri)

    return make


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to no pauses between the tries of a pull in this process."""
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(transfer, "LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr(transfer, "LOOK_S", 0.05)


@pytest.fixture
def run(aws: None, tmp_path: Path) -> "Callable[..., subprocess.CompletedProcess[str]]":
    """run(*arguments, **environment): `python -m weights_cache` to its end."""

    def start(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "weights_cache", *arguments],
            cwd=ROOT,
            env={**os.environ, "WEIGHTS_CACHE_DIR": str(tmp_path / "cache"), **environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return start


@dataclass
class Sidecar:
    """`python -m weights_cache serve` and its port."""

    server: Server
    port: int

    def get(self, path: str) -> Reply:
        return request(self.port, "GET", path)

    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("/v1/snapshots").json()["snapshots"]
        return found

    def row(self) -> dict[str, Any]:
        (row,) = self.rows()
        return row

    def is_ready(self) -> bool:
        return self.get("/readyz").status == 200

    def metrics(self) -> dict[str, float]:
        """The samples by name and labels."""
        lines = self.get("/metrics").body.decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


@pytest.fixture
def sidecar(aws: None, cache: NodeCache, tmp_path: Path) -> Iterator[Callable[..., Sidecar]]:
    """sidecar(uri, *options, within=…, **environment): starts one; it answers when this returns. `within` wraps its command."""
    with contextlib.ExitStack() as started:

        def start(uri: str, *options: str, within: Callable[[list[str]], list[str]] = lambda command: command, **environ: str) -> Sidecar:
            port = free_port()
            ours = {
                "WEIGHTS_URI": uri,
                "WEIGHTS_HOST": "127.0.0.1",
                "WEIGHTS_PORT": str(port),
                "WEIGHTS_CACHE_DIR": str(cache.root),
                "WEIGHTS_PART_BYTES": str(CHUNK_BYTES),
            }
            command = within([sys.executable, "-m", "weights_cache", "serve", *options])
            log = tmp_path / f"sidecar-{port}.log"
            found = Sidecar(started.enter_context(running(command, log, {**os.environ, **ours, **environ})), port)
            wait_until("/healthz", lambda: found.server.process.poll() is not None or found.get("/healthz").status == 200)
            assert found.server.process.poll() is None, found.server.said()
            return found

        yield start


def counted(found: Sidecar) -> dict[str, float]:
    """Its counters, by their names without prefix and suffix."""
    names = ("hits", "misses", "failures", "waits", "wait_seconds", "evictions", "verify_failures")
    sources = ("store", "neighbour", "cache")
    numbers = found.metrics()
    return {name: numbers[f"weights_cache_{name}_total"] for name in names} | {
        source: numbers[f'weights_cache_bytes_total{{source="{source}"}}'] for source in sources
    }


def push(bucket: Bucket, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Put files and the manifest that describes them, as `relight push` does; returns all of it."""
    bucket.put(files)
    entries = {}
    for path, data in files.items():
        etag = bucket.s3.head_object(Bucket=bucket.name, Key=f"model/{path}")["ETag"]
        digests = [chunk_digest(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)]
        entries[path] = Entry(len(data), etag, hashlib.sha256(data).hexdigest(), digests)
    bucket.put({MANIFEST: dump(entries)})
    return {**files, MANIFEST: dump(entries)}


def content(cache: NodeCache, snapshot: str) -> dict[str, bytes]:
    """Every file of a snapshot, as any program would open it."""
    top = cache.snapshot_path(snapshot)
    return {path.relative_to(top).as_posix(): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}


def landed(cache: NodeCache, snapshot: str) -> int:
    """Bytes of a snapshot that are on the disk, as the cache itself counts them."""
    there = 0
    for blob in cache.snapshot_blobs(snapshot).values():
        chunks = blob.chunks()
        there += blob.path.stat().st_size if blob.is_complete() else chunks.bytes_there() if chunks else 0
    return there


def current(cache: NodeCache, uri: str) -> str:
    """The snapshot that a URI stands for."""
    ref = cache.ref(uri)
    assert ref is not None
    return ref.snapshot


def pull_process(cache: NodeCache, uri: str, **environ: str) -> "subprocess.Popen[str]":
    """`relight pull` into the cache, running."""
    command = [sys.executable, "-m", "weights_cache", "pull", uri, "--cache-dir", str(cache.root), "--json"]
    settings = {**os.environ, "WEIGHTS_PART_BYTES": str(CHUNK_BYTES), **environ}
    return subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill(process: "subprocess.Popen[str]") -> None:
    """End it in the middle of whatever it does."""
    process.kill()
    process.communicate()


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that repeat nowhere, so that one in the wrong place shows."""
    return random.Random(seed).randbytes(size)
