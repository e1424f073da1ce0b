"""An object store for tests: a bucket of a real S3 server, and a proxy before it that counts, holds and breaks what passes."""

import contextlib
import http.client
import http.server
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

# What may happen to one read of an object: half of the body, then the end; a plain 503; no reply at all; the whole object although a
# range was asked for; a reply that names another version; a reply that names another range.
Fault = Literal["cut", "503", "no reply", "whole object", "other version", "other range"]

PIECE_BYTES = 64 * 1024
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


class Proxy:
    """Stands on a loopback port before `upstream`; only reads of objects are counted, held and broken."""

    def __init__(self, upstream: tuple[str, int], port: int = 0) -> None:
        self.upstream = upstream
        self.sent = 0  # body bytes of objects
        self.reads: list[str] = []  # the Range headers, in the order they came
        self.refusal: tuple[int, str] | None = None  # status and S3 error code for every request
        self.page: int | None = None  # the most objects that one reply to a listing names
        self.before_read: Callable[[], object] = lambda: None
        self.faults: deque[Fault] = deque()  # for the next reads, one each
        self.always: Fault | None = None  # for every read that has none of its own
        self._limit: int | None = None
        self._turn = threading.Condition()  # guards all of the above
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.release()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

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

    def next_fault(self, ranges: str) -> Fault | None:
        with self._turn:
            self.reads.append(ranges)
            return self.faults.popleft() if self.faults else self.always

    def await_turn(self, wanted: int) -> int:
        """How many of `wanted` bytes may pass now; at least one."""
        with self._turn:
            self._turn.wait_for(lambda: self._limit is None or self.sent < self._limit)
            return wanted if self._limit is None else min(wanted, self._limit - self.sent)

    def count(self, amount: int) -> None:
        with self._turn:
            self.sent += amount


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        pass

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.proxy.refusal:
            status, code = self.proxy.refusal
            self._answer(status, {}, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())
            return
        ranges = self.headers.get("Range") if self.command == "GET" else None
        fault = None
        if ranges:
            self.proxy.before_read()
            fault = self.proxy.next_fault(ranges)
        if fault == "503":
            self._answer(503, {}, b"")
            return
        if fault == "no reply":
            self.close_connection = True
            return
        if fault == "whole object":
            del self.headers["Range"]
        status, headers, data = self._ask(body)
        if fault == "other version":
            headers["etag"] = '"other"'
        if fault == "other range":
            headers["content-range"] = f"bytes 1-{len(data)}/{len(data) + 1}"
        self._answer(status, headers, data, counted=bool(ranges) and status < 300, stop=len(data) // 2 if fault == "cut" else None)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815  the base class's names

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        with contextlib.closing(http.client.HTTPConnection(*self.proxy.upstream, timeout=60)) as up:
            passed = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            page = f"&max-keys={self.proxy.page}" if self.proxy.page and "list-type=2" in self.path else ""
            up.request(self.command, self.path + page, body or None, passed)
            reply = up.getresponse()
            data = reply.read()
            headers = {name.lower(): value for name, value in reply.getheaders() if name.lower() not in _HOP_BY_HOP}
            if self.command == "HEAD":
                headers["content-length"] = reply.getheader("Content-Length", "0")
            return reply.status, headers, data

    def _answer(self, status: int, headers: Mapping[str, str], data: bytes, *, counted: bool = False, stop: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(data))} | dict(headers)).items():
            self.send_header(name, value)
        with contextlib.suppress(OSError):  # the client may be killed at any moment
            self.end_headers()
            for piece in self._pieces(data[:stop]) if counted else [data]:
                self.wfile.write(piece)
        if stop is not None:
            self.close_connection = True

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        at = 0
        while at < len(data):
            count = self.proxy.await_turn(min(PIECE_BYTES, len(data) - at))
            if self._client_is_gone():
                return
            self.proxy.count(count)
            yield data[at : at + count]
            at += count

    def _client_is_gone(self) -> bool:
        ready, _, _ = select.select([self.connection], [], [], 0)
        return bool(ready) and not self.connection.recv(1, socket.MSG_PEEK)
