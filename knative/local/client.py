"""The admin port from outside, for the commands that talk to a running platform."""

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode, urlsplit

from knative.local.errors import PlatformError
from knative.local.sent_headers import FIELD, Headers, to_field

CONNECT_S = 5.0
ANSWER_S = 30.0  # for a document, of which the platform makes none that takes a second
PIECE_BYTES = 64 * 1024


class NoPlatform(PlatformError):
    """Nothing answers at the admin address."""

    def __init__(self, admin: str, reason: object) -> None:
        super().__init__(f"no platform answers at {admin} ({reason}); start one with `relight run`, or name its admin port with --admin")


class Client:
    """Asks one platform."""

    def __init__(self, admin: str) -> None:
        """admin: as `http://127.0.0.1:8081`. Raises PlatformError for anything else."""
        parts = urlsplit(admin)
        try:
            port = parts.port or 80
        except ValueError:
            port = 0
        if parts.scheme != "http" or not parts.hostname or not port:
            raise PlatformError(f"--admin {admin!r}: must be http://HOST:PORT")
        self._admin = admin
        self._host, self._port = parts.hostname, port

    @contextmanager
    def ask(
        self,
        route: str,
        query: Mapping[str, str] | None = None,
        *,
        method: str = "GET",
        body: bytes | None = None,
        content_type: str = "",
        sent_headers: Headers = (),
        patience_s: float | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """One answer, to be read while it is entered. Raises NoPlatform, or PlatformError if somebody else answers.

        sent_headers: of the request that the platform is to send.
        patience_s: for each part of the answer; without it there is none, as it may wait for a cold start, or be a log.
        """
        connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        headers = {"X-Relight": "1"} | ({"Content-Type": content_type} if content_type else {})
        if sent_headers:
            headers[FIELD] = to_field(sent_headers)
        try:
            try:
                connection.connect()
                connection.sock.settimeout(patience_s)
                connection.request(method, route + (f"?{urlencode(query)}" if query else ""), body, headers)
                reply = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise NoPlatform(self._admin, getattr(error, "strerror", None) or error) from error
            if "X-Relight" not in reply.headers:
                raise PlatformError(f"what answers at {self._admin} is no platform's admin port; name that with --admin")
            yield reply
        finally:
            connection.close()

    def get(self, route: str, query: Mapping[str, str] | None = None) -> Any:
        """A document. Raises NoPlatform, or PlatformError with what the platform said."""
        with self.ask(route, query, patience_s=ANSWER_S) as reply:
            try:
                document = parse(reply.read())
            except (OSError, http.client.HTTPException) as error:
                raise NoPlatform(self._admin, getattr(error, "strerror", None) or error) from error
        if reply.status != http.client.OK:
            raise PlatformError(explain(document) or f"{self._admin}{route} answered {reply.status}")
        return document

    def events(self) -> Iterator[Any]:
        """The status document, as often as it changes, without end. Raises PlatformError when the platform ends."""
        with self.ask("/api/events", patience_s=ANSWER_S) as reply:  # there is one each second
            if reply.status != http.client.OK:
                raise PlatformError(explain(parse(reply.read())) or f"{self._admin} answered {reply.status}")
            try:
                for line in lines(reply):
                    if line.startswith(b"data: "):
                        yield json.loads(line.removeprefix(b"data: "))
            except (OSError, http.client.HTTPException):
                pass  # it was killed
        raise PlatformError(f"the platform at {self._admin} has ended")


def lines(reply: http.client.HTTPResponse) -> Iterator[bytes]:
    """Its lines as they come. Raises OSError or HTTPException when it is cut off, which the response's own iterator hides."""
    rest = b""
    while piece := reply.read1(PIECE_BYTES):
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
    if rest:
        yield rest


def parse(body: bytes) -> Any:
    """JSON, or None if it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def explain(document: Any) -> str:
    """The message of an error document, or nothing."""
    error = document.get("error") if isinstance(document, dict) else None
    return str(error.get("message", "")) if isinstance(error, dict) else ""
