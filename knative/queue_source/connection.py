"""One kept HTTP/1.1 connection, as cheap as Python allows: `http.client` needs several times the processor time for a post."""

import contextlib
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass

CONNECT_S = 10.0
LONGEST_HEAD_BYTES = 64 << 10
LONGEST_BODY_BYTES = 16 << 20  # no queue takes as much
KEPT_BYTES = 4 << 10  # of an answer that only a log line may quote
_RECEIVE_BYTES = 64 << 10


class BadAnswer(ValueError):
    """The answer is not HTTP, or longer than anybody needs."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the sink said; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connection:
    """To one server. Raises OSError or BadAnswer, and is of no use then."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, begin: Callable[[socket.socket], None]) -> None:
        """Connects. begin: told each socket before anything waits for it, so that somebody else may shut it down; may raise."""
        self.socket = _connected(host, port, begin)
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls:
                self.socket = tls.wrap_socket(self.socket, server_hostname=host, do_handshake_on_connect=False)
                begin(self.socket)
                self.socket.do_handshake()
            self.socket.settimeout(None)  # whoever waits too long shuts the socket down
        except BaseException:
            self.socket.close()
            raise
        self._got = bytearray()
        self.has_begun = False  # some of the last answer came
        self.is_reusable = False

    def post(self, head: bytes, data: bytes, kept: int = LONGEST_BODY_BYTES) -> Answer:
        """The answer to a request. head: with the empty line behind it. kept: bytes of the answer's body that anybody wants."""
        self._kept = kept
        self.has_begun = self.is_reusable = False
        with contextlib.suppress(BrokenPipeError):  # a server that does not read it all may have answered nevertheless
            if len(data) < _RECEIVE_BYTES:
                self.socket.sendall(head + data)
            else:
                self.socket.sendall(head)
                self.socket.sendall(data)
        while True:
            status, version, headers = self._head()
            if status >= 200:
                break
        keep = headers.get("connection", "").lower()
        self.is_reusable = "close" not in keep and (version == "HTTP/1.1" or "keep-alive" in keep)
        body = b"" if status in (204, 304) else self._body(headers)
        self.is_reusable = self.is_reusable and not self._got
        return Answer(status, headers, body)

    def close(self) -> None:
        """Close it."""
        self.socket.close()

    def _head(self) -> tuple[int, str, dict[str, str]]:
        """Status, HTTP version and headers."""
        while (end := self._got.find(b"\r\n\r\n")) < 0:
            if len(self._got) > LONGEST_HEAD_BYTES:
                raise BadAnswer(f"its head is longer than {LONGEST_HEAD_BYTES} bytes")
            self._receive()
        lines = self._take(end + 4)[:-4].decode("latin-1").split("\r\n")
        version, _, rest = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
            raise BadAnswer(f"{lines[0][:80]!r} is no HTTP")
        headers: dict[str, str] = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return int(rest[:3]), version, headers

    def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower().endswith("chunked"):
            return self._chunks()
        body = bytearray()
        if "content-length" in headers:
            self._read(body, _length(headers["content-length"], 10))
            return bytes(body)
        self.is_reusable = False
        size = 0
        while self._got or self._receive(may_end=True):
            size += len(self._got)
            _check(size)
            self._keep(body, self._take(len(self._got)))
        return bytes(body)

    def _chunks(self) -> bytes:
        body, whole = bytearray(), 0
        while size := _length(self._line().partition(b";")[0].strip().decode("latin-1"), 16):
            whole += size
            _check(whole)
            self._read(body, size)
            self._line()
        while self._line():
            pass  # trailers
        return bytes(body)

    def _line(self) -> bytearray:
        while (end := self._got.find(b"\r\n")) < 0:
            if len(self._got) > LONGEST_HEAD_BYTES:
                raise BadAnswer("a chunk of it does not begin as one")
            self._receive()
        return self._take(end + 2)[:-2]

    def _read(self, body: bytearray, size: int) -> None:
        """So much of it."""
        _check(size)
        while size:
            if not self._got:
                self._receive()
            piece = self._take(size)
            size -= len(piece)
            self._keep(body, piece)

    def _keep(self, body: bytearray, piece: bytearray) -> None:
        if len(body) < self._kept:
            body += piece[: self._kept - len(body)]

    def _take(self, size: int) -> bytearray:
        taken = self._got[:size]
        del self._got[:size]
        return taken

    def _receive(self, *, may_end: bool = False) -> bool:
        """Whether there was more."""
        piece = self.socket.recv(_RECEIVE_BYTES)
        if not piece and not may_end:
            raise ConnectionResetError("the connection ended")
        self.has_begun = self.has_begun or bool(piece)
        self._got += piece
        return bool(piece)


def _connected(host: str, port: int, begin: Callable[[socket.socket], None]) -> socket.socket:
    """To the first of its addresses that answers. Raises OSError."""
    failure = OSError("it has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        made = socket.socket(family, kind, protocol)
        try:
            made.settimeout(CONNECT_S)
            begin(made)
            made.connect(address)
            return made
        except OSError as error:
            made.close()
            failure = error
        except BaseException:
            made.close()
            raise
    raise failure


def _length(text: str, base: int) -> int:
    try:
        length = int(text, base)
    except ValueError:
        length = -1
    if length < 0:
        raise BadAnswer(f"{text[:40]!r} is no length")
    return length


def _check(size: int) -> None:
    if size > LONGEST_BODY_BYTES:
        raise BadAnswer(f"it is longer than {LONGEST_BODY_BYTES} bytes")
