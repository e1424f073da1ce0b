"""Small requests over HTTP/1.1, for programs that answer probes and little else: a `Peer` of the loop for each connection.

A request is a head and perhaps a body with its length; nobody sends more to a sidecar. Each piece of it has a bound and a time.
"""

import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from weights_cache.excerpt import quoted
from weights_cache.loop import READ, WRITE, Peer

MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 64 * 1024
REQUEST_S = 10.0  # for all of a request, from its first byte
IDLE_S = 75.0  # between two requests
ANSWER_S = 10.0  # for an answer to be read
LINGER_S = 2.0  # for what comes behind a request that was refused to be thrown away
_LINGER_BYTES = 1 << 20

_LINE = re.compile(rb"([A-Z]{1,20}) ([!-~]{1,8000}) HTTP/1\.([01])")
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*(.*?)[ \t]*", re.DOTALL)


@dataclass(frozen=True)
class Request:
    """What somebody asks."""

    method: str
    target: str
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What is said to it."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


def document(status: int, content: Mapping[str, Any], **headers: str) -> Answer:
    """An answer in JSON. headers: `Retry_After="1"` is `Retry-After: 1`."""
    return Answer(status, json.dumps(content).encode(), headers={name.replace("_", "-"): value for name, value in headers.items()})


def refusal(status: int, kind: str, message: str, **headers: str) -> Answer:
    """An answer in JSON that says what is wrong."""
    return document(status, {"error": {"type": kind, "message": message}}, **headers)


Reply = Callable[[Answer], object]
Respond = Callable[[Request, Reply], object]
"""Answers a request, at once or later, by calling the reply once, in any thread. Is called in the loop's, and must not wait there."""


class _Refused(Exception):
    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


@dataclass
class _Head:
    method: str
    target: str
    length: int  # of the body
    is_last: bool  # the connection ends with the answer
    is_asking: bool  # whether the body is wanted


class HttpPeer(Peer):
    """A connection that asks one thing after the other."""

    def __init__(self, sock: socket.socket, respond: Respond) -> None:
        super().__init__(sock)
        self._respond = respond
        self._came = bytearray()
        self._head: _Head | None = None
        self._out = memoryview(b"")
        self._is_closing = False  # after what is being sent
        self._thrown_away: int | None = None  # bytes that came behind the end; None: it is not over
        self.deadline = self.since + REQUEST_S

    def ready(self) -> None:
        """Read or write what goes without waiting."""
        if self._thrown_away is not None:
            self._throw_away()
        elif self._out:
            self._send()
        else:
            self._read()

    def rank(self) -> int | None:
        """First those that are over, then those at rest, those whose request has not come yet, those that read an answer."""
        if not self.interest:
            return None  # it is being answered
        if self._thrown_away is not None:
            return 0
        return 3 if self._out else 2 if self._came else 1

    def expire(self) -> None:
        """Nobody waits for longer than that."""
        if self._came and not self._out and self._thrown_away is None:
            self._answer(refusal(408, "timeout", f"the request was not there after {REQUEST_S:g} s"), is_last=True)
        else:
            self.close()

    def _read(self) -> None:
        try:
            data = self.sock.recv(MAX_HEAD_BYTES)
        except BlockingIOError:
            return
        if not data:
            self.close()
            return
        if not self._came:
            self.since = time.monotonic()
            self.deadline = self.since + REQUEST_S
        self._came += data
        self._take()

    def _take(self) -> None:
        """Answer the request, if all of it is there."""
        try:
            self._head = self._head or self._parse_head()
            if self._head is None:
                return
            if len(self._came) < self._head.length:
                if self._head.is_asking and not self._came:
                    self._head.is_asking = False
                    self.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                return
        except _Refused as refused:
            self._answer(refused.answer, is_last=True)
            return
        head, self._head = self._head, None
        body = bytes(self._came[: head.length])
        del self._came[: head.length]
        self.deadline, self.interest = None, 0
        is_answered = False

        def reply(answer: Answer) -> None:
            nonlocal is_answered
            if not is_answered:
                is_answered = True
                self.door.loop.call(lambda: self._reply(answer, is_last=head.is_last))

        self._respond(Request(head.method, head.target, body), reply)

    def _parse_head(self) -> _Head | None:
        end = self._came.find(b"\r\n\r\n")
        if end < 0:
            if len(self._came) >= MAX_HEAD_BYTES:
                raise _Refused(refusal(431, "bad_request", f"the head of a request may have {MAX_HEAD_BYTES} bytes"))
            return None
        first, *lines = bytes(self._came[:end]).lstrip(b"\r\n").split(b"\r\n")
        line = _LINE.fullmatch(first)
        if not line:
            raise _Refused(refusal(400, "bad_request", f"{quoted(first[:100].decode('latin-1'))} is no request of HTTP/1.1"))
        headers: dict[str, str] = {}
        for text in lines:
            found = _FIELD.fullmatch(text)
            name = found[1].decode().lower() if found else ""
            if not found or (name in ("content-length", "transfer-encoding") and name in headers):
                raise _Refused(refusal(400, "bad_request", f"{quoted(text[:100].decode('latin-1'))} is no header, or stands twice"))
            headers[name] = found[2].decode("latin-1")
        del self._came[: end + 4]
        kept = line[3] == b"1" and "close" not in headers.get("connection", "").lower()
        return _Head(line[1].decode(), line[2].decode(), _length(headers), not kept, "expect" in headers)

    def _reply(self, answer: Answer, *, is_last: bool) -> None:
        """In the loop's thread, some time after the request."""
        if self.sock.fileno() < 0:
            return
        try:
            self._answer(answer, is_last=is_last)
        except OSError:
            self.close()
        self.door.loop.watch(self)

    def _answer(self, answer: Answer, *, is_last: bool) -> None:
        self._is_closing = is_last
        headers = {"Content-Type": answer.content_type, "Content-Length": str(len(answer.body)), **answer.headers}
        if is_last:
            headers["Connection"] = "close"
        lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        self._out = memoryview("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + answer.body)
        self.since = time.monotonic()
        self.deadline = self.since + ANSWER_S
        self._send()

    def _send(self) -> None:
        try:
            self._out = self._out[self.sock.send(self._out) :]
        except BlockingIOError:
            pass
        self.interest = WRITE if self._out else READ
        if self._out:
            return
        self.since = time.monotonic()
        if self._is_closing:
            # Closed at once, with something unread, the answer might be lost on its way.
            self.sock.shutdown(socket.SHUT_WR)
            self._came.clear()
            self._thrown_away, self.deadline = 0, self.since + LINGER_S
            return
        self.deadline = self.since + (REQUEST_S if self._came else IDLE_S)
        if self._came:
            self._take()  # the next one is there already

    def _throw_away(self) -> None:
        assert self._thrown_away is not None
        try:
            data = self.sock.recv(64 * 1024)
        except BlockingIOError:
            return
        self._thrown_away += len(data)
        if not data or self._thrown_away > _LINGER_BYTES:
            self.close()


def _length(headers: Mapping[str, str]) -> int:
    """Of the body. Raises _Refused."""
    text = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not re.fullmatch("[0-9]+", text):
        raise _Refused(refusal(411, "bad_request", f"a body of at most {MAX_BODY_BYTES} bytes is needed, with its length"))
    if len(text) > 9 or int(text) > MAX_BODY_BYTES:
        raise _Refused(refusal(413, "bad_request", f"a body of at most {MAX_BODY_BYTES} bytes is needed, with its length"))
    return int(text)
