"""Posts of events to the sink, over connections that are kept and shared."""

import base64
import contextlib
import socket
import ssl
import threading
from collections import deque
from urllib.parse import unquote_to_bytes, urlsplit

from knative.queue_source.connection import KEPT_BYTES, LONGEST_BODY_BYTES, Answer, BadAnswer, Connection
from knative.queue_source.errors import NoAnswer, SinkAway
from knative.queue_source.event import Event


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

    def begin(self, used: socket.socket) -> None:
        """It goes by this socket now, be it connected or not. Raises NoAnswer if it was cut before."""
        with self._lock:
            if self._cut:
                raise NoAnswer("the post was cut short")
            self._socket = used

    def end(self) -> bool:
        """Whether it was never cut, so that its connection can be used again."""
        with self._lock:
            self._socket = None
            return not self._cut


class _Broken(NoAnswer):
    """The connection ended before the answer began."""


class Sink:
    """Where events go."""

    def __init__(self, url: str, *, ca_certs: str = "", wants_answers: bool = True) -> None:
        """url: with the user and password that the sink is to be told, if it has any. ca_certs: in PEM, besides the system's.

        wants_answers: whether anybody wants all of an answer's body.
        """
        parts = urlsplit(url)
        user, _, where = parts.netloc.rpartition("@")
        self._host, self._port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._request = f"POST {target} HTTP/1.1\r\nHost: {where}\r\nUser-Agent: relight-queue-source\r\n"
        if user:
            name, _, password = user.partition(":")
            said = base64.b64encode(unquote_to_bytes(name) + b":" + unquote_to_bytes(password)).decode()
            self._request += f"Authorization: Basic {said}\r\n"
        self._kept = LONGEST_BODY_BYTES if wants_answers else KEPT_BYTES
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self._tls = ssl.create_default_context()
            if ca_certs:
                self._tls.load_verify_locations(cadata=ca_certs)
        self._idle: deque[Connection] = deque()  # the last one used goes first

    def post(self, event: Event, call: Call) -> Answer:
        """The sink's answer, however long it takes. Raises SinkAway or NoAnswer."""
        headers = "".join(f"{name}: {value}\r\n" for name, value in event.headers().items())
        head = f"{self._request}{headers}Content-Length: {len(event.data)}\r\n\r\n".encode("latin-1", "replace")
        with contextlib.suppress(IndexError):
            connection = self._idle.pop()
            # A connection that was kept may have been closed meanwhile, and one learns of it by using it.
            with contextlib.suppress(_Broken):
                return self._post(connection, head, event.data, call)
        return self._post(self._connect(call), head, event.data, call)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        while self._idle:
            self._idle.pop().close()

    def _connect(self, call: Call) -> Connection:
        try:
            return Connection(self._host, self._port, self._tls, call.begin)
        except (OSError, ValueError) as error:  # a host's name can be one that no resolver takes
            raise SinkAway(f"the sink cannot be reached: {error}") from error

    def _post(self, connection: Connection, head: bytes, data: bytes, call: Call) -> Answer:
        answer = None
        try:
            call.begin(connection.socket)
            answer = connection.post(head, data, self._kept)
            return answer
        except (OSError, BadAnswer) as error:
            kind = _Broken if isinstance(error, ConnectionError) and not connection.has_begun else NoAnswer
            raise kind(f"the sink gave no answer: {error}") from error
        finally:
            if call.end() and answer and connection.is_reusable:
                self._idle.append(connection)
            else:
                connection.close()
