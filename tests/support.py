"""What tests of several packages use: free ports, waiting with a deadline, HTTP as it is on the wire, servers as real processes."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from weights_cache.blob import BlobWriter

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
T = TypeVar("T")


def free_port() -> int:
    """A loopback port that nobody has right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(what: str, probe: Callable[[], T | Literal[False] | None], seconds: float = 60.0) -> T:
    """The first true value of `probe`, which may fail to connect meanwhile; an AssertionError that says `what` after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if found := probe():
                return found
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {seconds:g} s")


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


def request(port: int, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = 60.0) -> Reply:
    """One request over a connection of its own; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if body is None or isinstance(body, bytes) else {"Content-Type": "application/json"}
        connection.request(method, path, data, {**kind, **(headers or {})})
        reply = connection.getresponse()
        return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
    finally:
        connection.close()


def clean_environment(**settings: str) -> dict[str, str]:
    """Our environment without what would configure the program under test, plus `settings`."""
    ours = ("FUNCTION_", "WEIGHTS_", "QUEUE_SOURCE_", "AWS_", "K_", "OTEL_", "PORT", "MAKE", "MFLAGS")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | settings


class Server:
    """A program of ours as a process group of its own, its output in a file. `port`: where it is expected to answer."""

    def __init__(self, command: list[str], log: Path, env: Mapping[str, str], port: int = 0) -> None:
        self.log = log
        self.port = port
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def said(self) -> str:
        """Everything it has written so far."""
        return self.log.read_text(errors="replace")

    def ready(self) -> "Server":
        """Itself, once its `/readyz` says 200."""
        wait_until("ready", lambda: self.process.poll() is not None or request(self.port, "GET", "/readyz").status == 200)
        assert self.process.poll() is None, self.said()
        return self

    def signal(self, number: int) -> None:
        """To the process alone, not its group."""
        self.process.send_signal(number)

    def wait(self, seconds: float = 30.0) -> int:
        """Its exit status."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """End the whole group, whatever state it is in."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running(command: list[str], log: Path, env: Mapping[str, str], port: int = 0) -> Iterator[Server]:
    """A Server for the length of a `with`."""
    server = Server(command, log, env, port)
    try:
        yield server
    finally:
        server.kill()


def fill_cache(cache_dir: Path, uri: str, files: Mapping[str, bytes]) -> str:
    """Put a complete snapshot of `files` into a node cache, as a sidecar would have; returns its id."""
    from weights_cache import room
    from weights_cache.blob import BlobWriter
    from weights_cache.cache import FileRef, NodeCache, Ref

    cache = NodeCache(cache_dir)
    cache.create()
    refs = [FileRef(path, len(data), '"test"') for path, data in files.items()]
    lease, _ = room.reserve(cache, "bucket/prefix", refs, limit=None, uri=uri)
    with lease:
        for path, blob in cache.snapshot_blobs(lease.snapshot).items():
            if writer := BlobWriter.try_acquire(blob, len(files[path])):
                with writer:
                    write_chunks(writer, files[path])
                    writer.publish()
        cache.set_ref(Ref(uri, lease.snapshot, time.time()))
    return lease.snapshot


def write_chunks(writer: "BlobWriter", data: bytes, *chunks: int) -> None:
    """Write these chunks of a file, or all of them, and say that they are there, as a pull does."""
    from weights_cache.chunks import CHUNK_BYTES
    from weights_cache.digest import chunk_digest

    for chunk in chunks or range(writer.chunks.chunks):
        piece = data[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]
        writer.write(piece, chunk * CHUNK_BYTES)
        writer.chunks.set(chunk, chunk_digest(piece))
