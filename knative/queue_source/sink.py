"""Posts of events to the sink, over connections that are kept and shared."""

import contextlib
import http.client
import socket
import ssl
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from knative.queue_source.errors import NoAnswer, SinkAway
from knative.queue_source.event import Event

CONNECT_S = 10.0
LONGEST_REPLY_BYTES = 16 << 20  # no queue takes as much


@dataclass(frozen=True, slots=True)
class Answer:
    """What the sink said; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Call:
    """One post, which another thread may cut short."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows
        self._socket: socket.socket | None = None
        self._cut = False

    def cut(self) -> None:
        """Whoever waits for the answer gets NoAnswer, now or as soon as the post begins."""
        with self._lock:
            self._cut = True
            if self._socket:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def begin(self, connected: socket.socket) -> None:
        """Raises NoAnswer if it was cut before."""
        with self._lock:
            if self._cut:
                raise NoAnswer("the post was cut short")
            self._socket = connected

    def end(self) -> bool:
        """Whether it was never cut, so that its connection can be used again."""
        with self._lock:
            self._socket = None
            return not self._cut


class _Broken(NoAnswer):
    """The connection ended before the answer began."""


class Sink:
    """Where events go."""

    def __init__(self, url: str, *, ca_certs: str = "") -> None:
        """ca_certs: in PEM, besides the system's."""
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self._tls = ssl.create_default_context()
            if ca_certs:
                self._tls.load_verify_locations(cadata=ca_certs)
        self._idle: deque[http.client.HTTPConnection] = deque()  # the last one used goes first

    def post(self, event: Event, call: Call) -> Answer:
        """The sink's answer, however long it takes. Raises SinkAway or NoAnswer."""
        headers = event.headers()
        with contextlib.suppress(IndexError):
            connection = self._idle.pop()
            # A connection that was kept may have been closed meanwhile, and one learns of it by using it.
            with contextlib.suppress(_Broken):
                return self._post(connection, event.data, headers, call)
        return self._post(self._connect(), event.data, headers, call)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        while self._idle:
            self._idle.pop().close()

    def _connect(self) -> http.client.HTTPConnection:
        if self._tls:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, self._port, timeout=CONNECT_S, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.connect()
        except (OSError, ValueError) as error:  # a host's name can be one that no resolver takes
            connection.close()
            raise SinkAway(f"the sink cannot be reached: {error}") from error
        assert connection.sock is not None
        connection.sock.settimeout(None)  # `cut` ends what takes too long, wherever it is
        return connection

    def _post(self, connection: http.client.HTTPConnection, data: bytes, headers: Mapping[str, str], call: Call) -> Answer:
        fine = has_begun = False
        try:
            call.begin(connection.sock)
            connection.request("POST", self._path, data, headers)
            reply = connection.getresponse()
            has_begun = True
            body = reply.read(LONGEST_REPLY_BYTES + 1)
            if len(body) > LONGEST_REPLY_BYTES:
                raise NoAnswer(f"the sink's answer is longer than {LONGEST_REPLY_BYTES} bytes")
            fine = not reply.will_close
            return Answer(reply.status, {name.lower(): value for name, value in reply.headers.items()}, body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            kind = _Broken if isinstance(error, ConnectionError) and not has_begun else NoAnswer
            raise kind(f"the sink gave no answer: {error or type(error).__name__}") from error
        finally:
            if call.end() and fine:
                self._idle.append(connection)
            else:
                connection.close()
