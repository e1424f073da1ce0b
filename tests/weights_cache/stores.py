"""Object stores for tests: a bucket of a real S3 server, a proxy before it that counts, holds and breaks what passes, and SeaweedFS."""

import contextlib
import http.client
import http.server
import itertools
import json
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

import boto3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.support import BIN, clean_environment, free_port, request, running, wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

# What may happen to one read of an object.
Fault = Literal[
    "no reply",  # the connection is closed instead
    "silence",  # the connection stays open instead, and nothing comes
    "429",  # an error, with a Retry-After if the proxy has one
    "500",
    "503",
    "redirect",  # a 307 to the same path `elsewhere`
    "ignores If-Match",
    "whole object",  # 200 and all of it although a range was asked for
    "half the range",  # a 206 that admits to being less than what was asked for
    "no etag",
    "other version",  # another ETag
    "other range",  # another Content-Range
    "too short",  # half of the range; only Content-Length admits it
    "too long",  # some bytes more than the range; only Content-Length admits it
    "flipped bit",  # in the middle
    "cut",  # half of the body, then the end
    "stall",  # half of the body, then nothing, the connection stays open
    "drip",  # half of the body, then a byte now and then
]
Faults = Fault | tuple[Fault, ...]

PIECE_BYTES = 64 * 1024
_POLL_S = 0.05
_HOP_BY_HOP = {"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding"}


@dataclass(frozen=True)
class Bucket:
    """A fresh bucket, written to without passing the proxy; the model under test is below `model/`."""

    name: str
    s3: "S3Client"

    @property
    def uri(self) -> str:
        return f"s3://{self.name}/model"

    def put(self, files: Mapping[str, bytes]) -> None:
        for path, data in files.items():
            self.s3.put_object(Bucket=self.name, Key=f"model/{path}", Body=data)

    def delete(self, path: str) -> None:
        self.s3.delete_object(Bucket=self.name, Key=f"model/{path}")


# The proxy


@dataclass(frozen=True)
class Read:
    """One read of an object as the client asked for it; header names in lower case."""

    key: str
    headers: Mapping[str, str]


class Proxy:
    """Stands on a loopback port before `upstream`; only reads of objects are counted, held and broken.

    identity: access key id and secret, for an upstream that checks signatures: where a fault changes what is asked, it is signed anew.
    """

    def __init__(self, upstream: tuple[str, int], port: int = 0, identity: tuple[str, str] | None = None) -> None:
        self.upstream = upstream
        self.identity = identity
        self.sent = 0  # body bytes of objects
        self.asked: list[Read] = []  # in the order they came
        self.peak = 0  # the most reads at the same time; one that the client left counts until that is noticed
        self.refusal: tuple[int, str] | None = None  # status and S3 error code for every request
        self.retry_after: str | None = None  # a header of every error
        self.elsewhere = f"http://{upstream[0]}:{upstream[1]}"  # where redirects lead
        self.page: int | None = None  # the most objects that one reply to a listing names
        self.edit_listing: Callable[[bytes], bytes] = lambda data: data
        self.is_spared: Callable[[str], bool] = lambda key: False  # whose reads pass as all else does
        self.before_read: Callable[[], object] = lambda: None
        self.faults: deque[Faults] = deque()  # for the next reads, one each
        self.always: Faults | None = None  # for every read that has none of its own
        self.rate: int | None = None  # bytes per second of each connection
        self.drip_s = 0.2  # from one byte to the next
        self.stopping = threading.Event()
        self._limit: int | None = None
        self._now = 0
        self._open: set[socket.socket] = set()
        self._turn = threading.Condition()  # guards all of the above
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def reads(self) -> list[str]:
        """The Range headers, in the order they came."""
        return [read.headers.get("range", "") for read in self.asked]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self.release()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.drop_connections()

    def drop_connections(self) -> None:
        """End every connection, whatever passes there right now."""
        with self._turn:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def hold_after(self, count: int) -> None:
        """Let `count` more bytes of objects pass, then nothing until `release`."""
        with self._turn:
            self._limit = self.sent + count

    def release(self) -> None:
        with self._turn:
            self._limit = None
            self._turn.notify_all()

    def is_holding(self) -> bool:
        """Whether all that may pass has passed."""
        with self._turn:
            return self._limit is not None and self.sent >= self._limit

    def opened(self, connection: socket.socket) -> None:
        with self._turn:
            self._open.add(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._turn:
            self._open.discard(connection)

    def begin_read(self, read: Read) -> tuple[Fault, ...]:
        """Take note of a read; returns what is to happen to it."""
        with self._turn:
            self.asked.append(read)
            self._now += 1
            self.peak = max(self.peak, self._now)
            faults = self.faults.popleft() if self.faults else self.always
            return (faults,) if isinstance(faults, str) else faults or ()

    def end_read(self) -> None:
        with self._turn:
            self._now -= 1

    def take(self, wanted: int, is_gone: Callable[[], bool]) -> int:
        """Wait until bytes may pass, and count them: how many of `wanted`, none if the client left meanwhile."""
        with self._turn:
            while self._limit is not None and self.sent >= self._limit and not is_gone():
                self._turn.wait(_POLL_S)
            if is_gone():
                return 0
            count = wanted if self._limit is None else min(wanted, self._limit - self.sent)
            self.sent += count
            return count


def without_etags(listing: bytes) -> bytes:
    """For `edit_listing`: as some stores list."""
    return re.sub(rb"<ETag>.*?</ETag>", b"", listing)


def signed(identity: tuple[str, str], method: str, url: str, headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a request without a body, and the signature in place of any that was there."""
    asked = AWSRequest(method, url, dict(headers))
    S3SigV4Auth(Credentials(*identity), "s3", "us-east-1").add_auth(asked)
    return dict(asked.headers.items())


@dataclass
class _Reply:
    """An answer on its way. `length` is what Content-Length says; a body that turns out shorter ends the connection."""

    status: int
    headers: dict[str, str]
    body: Iterable[bytes]
    length: int

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str], data: bytes) -> "_Reply":
        return cls(status, dict(headers), [data], len(data))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self._is_reading = False
        self.proxy.opened(self.connection)

    def finish(self) -> None:
        self.proxy.closed(self.connection)
        super().finish()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client may be killed at any moment, and the proxy stopped
            super().handle()

    def is_gone(self) -> bool:
        """Whether the client left, or the proxy is to stop."""
        try:
            return self.proxy.stopping.is_set() or not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def silence(self) -> Iterator[bytes]:
        """No bytes for as long as the client waits for some."""
        while not self.is_gone():
            self.proxy.stopping.wait(_POLL_S)
        yield from ()

    def drops(self, data: bytes) -> Iterator[bytes]:
        """The same bytes one by one, with pauses."""
        for byte in data:
            self.proxy.stopping.wait(self.proxy.drip_s)
            yield bytes([byte])

    def _forward(self) -> None:
        asked = {name.lower(): value for name, value in self.headers.items() if name.lower() != "connection"}
        body = self.rfile.read(int(asked.get("content-length", 0)))
        path, _, query = self.path.partition("?")
        key = unquote(path.lstrip("/").partition("/")[2])
        if self.proxy.refusal:
            self._answer(self._error(*self.proxy.refusal))
        elif self.command == "GET" and key and not self.proxy.is_spared(key):
            self.proxy.before_read()
            faults = self.proxy.begin_read(Read(key, dict(asked)))
            self._is_reading = True
            try:
                self._read(faults, asked)
            finally:
                self._end_read()
        elif self.command == "GET" and "list-type=2" in query:
            self._list(asked)
        else:
            with self._ask(self.path, asked, body) as reply:
                self._answer(reply)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815  the base class's names

    def _read(self, faults: tuple[Fault, ...], asked: dict[str, str]) -> None:
        before = dict(asked)
        for fault in faults:
            if fault in ("silence", "no reply"):
                self.close_connection = True
                list(self.silence() if fault == "silence" else ())
                return
            if fault in _ERRORS:
                self._answer(self._error(*_ERRORS[fault]))
                return
            _ASK.get(fault, _leave)(asked)
        with self._ask(self.path, asked, changed=asked != before) as reply:
            is_object = reply.status < 300
            for fault in faults if is_object else ():
                _ANSWER.get(fault, _leave)(reply, self)
            self._answer(reply, is_object=is_object)

    def _list(self, asked: dict[str, str]) -> None:
        page = f"&max-keys={self.proxy.page}" if self.proxy.page else ""
        with self._ask(self.path + page, asked, changed=bool(page)) as reply:
            self._answer(_Reply.of(reply.status, reply.headers, self.proxy.edit_listing(b"".join(reply.body))))

    def _error(self, status: int, code: str) -> _Reply:
        headers = {} if self.proxy.retry_after is None else {"retry-after": self.proxy.retry_after}
        if 300 <= status < 400:
            headers["location"] = self.proxy.elsewhere + self.path
        return _Reply.of(status, headers, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())

    @contextlib.contextmanager
    def _ask(self, path: str, asked: Mapping[str, str], body: bytes = b"", *, changed: bool = False) -> Iterator[_Reply]:
        """What upstream says, while it says it."""
        if changed and self.proxy.identity and "authorization" in asked:  # a signature in the address covers no more than the host
            asked = signed(self.proxy.identity, self.command, f"http://{asked['host']}{path}", asked)
        with contextlib.closing(http.client.HTTPConnection(*self.proxy.upstream, timeout=60)) as up:
            up.request(self.command, path, body or None, asked)
            reply = up.getresponse()
            headers = {name.lower(): value for name, value in reply.getheaders() if name.lower() not in _HOP_BY_HOP}
            if self.command == "HEAD":
                headers["content-length"] = reply.getheader("Content-Length", "0")
            if reply.length is None:  # it comes in chunks
                yield _Reply.of(reply.status, headers, reply.read())
            else:
                yield _Reply(reply.status, headers, iter(lambda: reply.read(PIECE_BYTES), b""), reply.length)

    def _answer(self, reply: _Reply, *, is_object: bool = False) -> None:
        if not is_object:
            self._end_read()
        self.send_response(reply.status)
        for name, value in ({"content-length": str(reply.length)} | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        sent = 0
        for piece in self._passing(reply.body) if is_object else reply.body:
            sent += len(piece)
            if sent >= reply.length:
                self._end_read()  # not later: with the last byte the client may begin another
            self.wfile.write(piece)
        if sent < reply.length:
            self.close_connection = True

    def _passing(self, body: Iterable[bytes]) -> Iterator[bytes]:
        """The body in pieces as they may pass, until the client leaves."""
        due = time.monotonic()
        for piece in body:
            at = 0
            while at < len(piece):
                rate = self.proxy.rate
                count = self.proxy.take(min(len(piece) - at, max(1, rate // 20) if rate else PIECE_BYTES), self.is_gone)
                if not count:
                    return
                yield piece[at : at + count]
                at += count
                if rate:
                    due = max(due, time.monotonic()) + count / rate
                    self.proxy.stopping.wait(due - time.monotonic())

    def _end_read(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self.proxy.end_read()


# What each fault does: an error in place of the reply, a change to what is asked, or a change to what is answered.


def _leave(*_: object) -> None:
    pass


def _ask_half(asked: dict[str, str]) -> None:
    if match := re.fullmatch(r"bytes=(\d+)-(\d+)", asked.get("range", "")):
        start, last = map(int, match.groups())
        asked["range"] = f"bytes={start}-{(start + last) // 2}"


def _halves(body: Iterable[bytes], length: int) -> Iterator[tuple[bytes, bytes]]:
    """The pieces of a body: of each, what belongs to the first half and what to the second."""
    left = length // 2
    for piece in body:
        yield piece[:left], piece[left:]
        left -= min(left, len(piece))


def _half(reply: _Reply) -> Iterator[bytes]:
    def first(pairs: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
        for first, second in pairs:
            yield first
            if second:
                return

    return first(_halves(reply.body, reply.length))


def _cut(reply: _Reply, _: _Handler) -> None:
    reply.body = _half(reply)


def _stall(reply: _Reply, handler: _Handler) -> None:
    reply.body = itertools.chain(_half(reply), handler.silence())


def _drip(reply: _Reply, handler: _Handler) -> None:
    pairs = _halves(reply.body, reply.length)
    reply.body = (piece for first, second in pairs for piece in itertools.chain([first], handler.drops(second)))


def _shorten(reply: _Reply, _: _Handler) -> None:
    reply.body, reply.length = _half(reply), reply.length // 2


def _lengthen(reply: _Reply, _: _Handler) -> None:
    reply.body, reply.length = itertools.chain(reply.body, [b"\0" * 1000]), reply.length + 1000


def _flip(reply: _Reply, _: _Handler) -> None:
    def flipped(pairs: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
        is_done = False
        for first, second in pairs:
            if second and not is_done:
                second = bytes([second[0] ^ 1]) + second[1:]
                is_done = True
            yield first + second

    reply.body = flipped(_halves(reply.body, reply.length))


def _other_range(reply: _Reply, _: _Handler) -> None:
    reply.headers["content-range"] = f"bytes 1-{reply.length}/{reply.length + 1}"


_ERRORS: Mapping[Fault, tuple[int, str]] = {
    "redirect": (307, "TemporaryRedirect"),
    "429": (429, "TooManyRequests"),
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
}
_ASK: Mapping[Fault, Callable[[dict[str, str]], object]] = {
    "whole object": lambda asked: asked.pop("range", None),
    "half the range": _ask_half,
    "ignores If-Match": lambda asked: asked.pop("if-match", None),
}
_ANSWER: Mapping[Fault, Callable[[_Reply, _Handler], object]] = {
    "no etag": lambda reply, _: reply.headers.pop("etag", None),
    "other version": lambda reply, _: reply.headers.update(etag='"other"'),
    "other range": _other_range,
    "too short": _shorten,
    "too long": _lengthen,
    "flipped bit": _flip,
    "cut": _cut,
    "stall": _stall,
    "drip": _drip,
}


# SeaweedFS


@dataclass(frozen=True)
class Seaweed:
    """A SeaweedFS of this machine's own, which unlike moto checks who asks. Its identities: access key id and secret."""

    port: int
    owner: tuple[str, str] = ("AKIAOWNER", "the secret of the owner")
    reader: tuple[str, str] = ("AKIAREADER", "the secret of the reader")  # may list and read, not write

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def s3(self) -> "S3Client":
        """A client of the server itself; made once, for it takes a while."""
        return boto3.session.Session(*self.owner, region_name="us-east-1").client("s3", endpoint_url=self.url)


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[Seaweed]:
    """A SeaweedFS with its data in `folder`, once it takes objects: about two seconds."""
    ports: dict[str, int] = {}
    for service in ("master", "volume", "filer", "s3"):
        for kind in (f"{service}.port", f"{service}.port.grpc"):
            ports[kind] = next(port for port in iter(free_port, None) if port not in ports.values())
    server = Seaweed(ports["s3.port"])
    identities = [
        {"name": key_id, "credentials": [{"accessKey": key_id, "secretKey": secret}], "actions": actions}
        for (key_id, secret), actions in ((server.owner, ["Admin"]), (server.reader, ["List", "Read"]))
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    options = {
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "dir": folder / "data",
        "filer.localSocket": folder / "filer.sock",
        "master.peers": "none",  # then it need not wait for others before it elects itself
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 64,
        "volume.max": 1000,  # each bucket takes one, and another for each 64 MB
        "s3.config": folder / "s3.json",
        "s3.autoCreateBucket": "false",
        "s3.localSocket": folder / "s3.sock",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        **ports,
    }
    command = [str(BIN / "weed"), "-logtostderr=true", "server", "-s3", *(f"-{name}={value}" for name, value in options.items())]
    environ = clean_environment(HOME=str(folder), WEED_MASTER_VOLUME_GROWTH_COPY_1="1")
    try:
        with running(command, folder / "log", environ) as weed:
            # The master answers this one once there is a place for objects.
            paths = ((ports["s3.port"], "/status"), (ports["master.port"], "/dir/assign"))
            wait_until("SeaweedFS", lambda: weed.process.poll() or all(request(port, "GET", path).status == 200 for port, path in paths))
            assert weed.process.poll() is None, weed.said()
            yield server
    finally:
        for name, port in ports.items():  # it has these nowhere else
            Path(f"/tmp/seaweedfs-{name.partition('.')[0]}-grpc-{port}.sock").unlink(missing_ok=True)  # noqa: S108
