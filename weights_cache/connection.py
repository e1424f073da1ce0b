"""One keep-alive HTTP connection to the object store, reading into memory that the caller owns.

A library's response object costs a call into Python for every 64 KiB or so; here the kernel fills the caller's whole buffer in one call,
and keeps the time-out too. That is a twentieth of what a fetch takes; everything unusual is left to boto3 (see `Store.stream`).
"""

import base64
import contextlib
import http.client
import io
import re
import socket
import ssl
import struct
import time
import urllib.request
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from urllib.parse import SplitResult, unquote, urlsplit

from weights_cache.errors import StoreUnavailable
from weights_cache.store import Store

CONNECT_S = 10.0
STALL_S = 20.0  # without a byte
HEAD_S = 60.0  # for all of an answer's head

_BYTES_RECEIVED_AT = 128  # tcpi_bytes_received in Linux' struct tcp_info
_PORTS = {"http": 80, "https": 443}
_HEAD_BYTES = 64 * 1024
_ERROR_BODY_BYTES = 64 * 1024


class Reply:
    """The head of an answer; its body is read with `readinto`, straight from the socket."""

    def __init__(self, sock: socket.socket) -> None:
        """Raises OSError or HTTPException if no head comes."""
        head, self._early = _head(sock)
        line, _, lines = head.partition(b"\r\n")
        found = re.fullmatch(rb"HTTP/1\.[01] (\d{3})(?: .*)?", line)
        if not found:
            raise http.client.BadStatusLine(line[:80].decode(errors="replace"))
        self.status = int(found[1])
        self._headers = http.client.parse_headers(io.BytesIO(lines))
        self._sock = sock
        length = self.header("Content-Length")
        self._left = int(length) if length.isdigit() else None

    def header(self, name: str) -> str:
        """A header's value, empty if there is none."""
        return str(self._headers.get(name, ""))

    def error_code(self) -> str:
        """The S3 error code in the body, empty if there is none."""
        body, limit = self._early, _ERROR_BODY_BYTES if self._left is None else min(self._left, _ERROR_BODY_BYTES)
        self._left = None  # it may come in any form; the connection is not used again
        with contextlib.suppress(OSError):
            while not (found := re.search(rb"<Code>([^<]{1,100})</Code>", body)) and len(body) < limit and not body.endswith(b"0\r\n\r\n"):
                if not (piece := self._sock.recv(16 * 1024)):
                    break
                body += piece
        return found[1].decode(errors="replace") if found else ""

    def retry_after(self) -> float:
        """How many seconds the store asks us to wait, 0 if it does not."""
        text = self.header("Retry-After")
        try:
            return max(0.0, float(text) if text[:1].isdigit() else parsedate_to_datetime(text).timestamp() - time.time())
        except ValueError:
            return 0.0

    def readinto(self, buffer: memoryview) -> None:
        """Fill the whole buffer. Raises OSError if the body ends before, or if nothing comes for STALL_S."""
        have = min(len(self._early), len(buffer))
        buffer[:have], self._early = self._early[:have], self._early[have:]
        while have < len(buffer):
            # A TLS socket takes no flags, and brings a record at a time.
            flags = 0 if isinstance(self._sock, ssl.SSLSocket) else socket.MSG_WAITALL
            with _in_words():
                got = self._sock.recv_into(buffer[have:], 0, flags)
            if not got:
                raise ConnectionResetError(f"the reply ended {len(buffer) - have} bytes early")
            have += got
        if self._left is not None:
            self._left -= have

    def is_over(self) -> bool:
        """Whether the connection can be used for another request."""
        return self._left == 0 and self.header("Connection").lower() != "close"


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """What the kernel's own time-out is called."""
    try:
        yield
    except BlockingIOError:
        raise TimeoutError(f"nothing came for {STALL_S:g} s") from None


def _head(sock: socket.socket) -> tuple[bytes, bytes]:
    """What comes up to the empty line, and what came with it of the body."""
    data, late_at = b"", time.monotonic() + HEAD_S
    while (end := data.find(b"\r\n\r\n")) < 0:
        if time.monotonic() > late_at:
            raise TimeoutError(f"an answer of which the head is not there after {HEAD_S:g} s")
        with _in_words():
            piece = sock.recv(16 * 1024)
        if not piece:
            raise ConnectionResetError("the connection was closed")
        data += piece
        if len(data) > _HEAD_BYTES:
            raise http.client.LineTooLong("head")
    return data[: end + 4], data[end + 4 :]


class Connection:
    """Opened when it is first needed, and again after an error. Used by one thread; `abort` may be called by any."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sock: socket.socket | None = None
        self._host = ""
        self._relay = b""  # credentials for a proxy that is told whole addresses, as a header; b"" without such a proxy
        self._is_relayed = False
        self._reply: Reply | None = None
        self._received_before = 0  # by connections that are closed

    def received(self) -> int:
        """The bytes that have come so far, headers included; the kernel counts those that nobody has read yet, too."""
        with contextlib.suppress(OSError, AttributeError):  # AttributeError: closed meanwhile
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)  # type: ignore[union-attr]
            return self._received_before + int(struct.unpack_from("Q", info, _BYTES_RECEIVED_AT)[0])
        return self._received_before

    def get(self, address: str, headers: Mapping[str, str]) -> Reply:
        """Ask for a URL. Raises StoreUnavailable if no answer begins."""
        url = urlsplit(address)
        is_used = self._sock is not None and self._host == url.netloc and self._reply is not None and self._reply.is_over()
        if not is_used:
            self.close()
        while True:
            try:
                if self._sock is None:
                    self._open(url)
                assert self._sock is not None
                target = address if self._is_relayed else f"{url.path}?{url.query}"
                host = url.netloc.rpartition("@")[2]
                lines = [f"GET {target} HTTP/1.1", f"Host: {host}", "Accept-Encoding: identity", "User-Agent: relight"]
                lines += [f"{name}: {value}" for name, value in headers.items()]
                self._sock.sendall("\r\n".join(lines).encode() + b"\r\n" + self._relay + b"\r\n")
                self._reply = Reply(self._sock)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.close()
                if is_used and isinstance(error, ConnectionError):
                    is_used = False  # the store had closed it meanwhile, as it may: once more on a new one
                    continue
                raise StoreUnavailable(f"no answer from {url.netloc.rpartition('@')[2]}: {error or type(error).__name__}") from error
            return self._reply

    def _open(self, url: SplitResult) -> None:
        via = _proxy_for(url) or url
        self._host = url.netloc
        sock = self._connect(via.hostname or "", via.port or _PORTS.get(via.scheme, 80))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secret = base64.b64encode(f"{unquote(via.username or '')}:{unquote(via.password or '')}".encode())
        authorization = b"Proxy-Authorization: Basic " + secret + b"\r\n" if via.username else b""
        self._is_relayed = via is not url and url.scheme == "http"
        self._relay = authorization if self._is_relayed else b""
        if url.scheme == "https":
            if via is not url:
                name = f"{url.hostname}:{url.port or 443}".encode()
                sock.sendall(b"CONNECT " + name + b" HTTP/1.1\r\nHost: " + name + b"\r\n" + authorization + b"\r\n")
                if (status := Reply(sock).status) != 200:
                    raise OSError(f"the proxy {via.hostname} answers {status}")
            tls = self._sock = self._store.tls().wrap_socket(sock, server_hostname=url.hostname, do_handshake_on_connect=False)
            tls.settimeout(STALL_S)
            tls.do_handshake()
        else:
            sock.settimeout(None)  # the kernel keeps the time, so that it may wait for the whole buffer
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(STALL_S))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(STALL_S))

    def _connect(self, host: str, port: int) -> socket.socket:
        """A connection to the first of its addresses that takes one; `abort` ends the waiting for it, too."""
        found: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            self.close()
            self._sock = socket.socket(family, kind, protocol)
            self._sock.settimeout(CONNECT_S)
            try:
                self._sock.connect(address)
            except OSError as error:
                found = found or error
            else:
                return self._sock
        raise found or OSError(f"{host} has no address")

    def abort(self) -> None:
        """Make a read that another thread is waiting in fail now."""
        with contextlib.suppress(OSError, AttributeError):  # AttributeError: closed meanwhile
            self._sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def close(self) -> None:
        """Let go of the connection; the next `get` opens another."""
        if self._sock:
            self._received_before = self.received()
            self._sock.close()
            self._sock = self._reply = None


def _proxy_for(url: SplitResult) -> SplitResult | None:
    """What HTTP_PROXY, HTTPS_PROXY and NO_PROXY say."""
    proxy = urllib.request.getproxies().get(url.scheme)
    if not proxy or urllib.request.proxy_bypass(url.hostname or ""):
        return None
    return urlsplit(proxy if "//" in proxy else f"//{proxy}")


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
