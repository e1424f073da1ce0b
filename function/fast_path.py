"""Ordinary requests, answered without a thread of their own: there is nothing about them that needs a second look.

The worker's loop reads them, the model's thread computes, the loop answers: two thread switches for a batch, where a thread for each
request, gunicorn's parser and Flask cost five for each, and three times the processor. Everything else goes there, so what is read here
may be narrow: whatever it does not know is not ordinary. The rules are those of Flask's routes, and in the same places: Gate, Function,
PredictRoute, Access and `failure`.
"""

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flask

from function.access import Access, Note
from function.batcher import Call
from function.bodies import parse_json
from function.gate import Gate
from function.http import JSON, Function, PredictRequest, PredictRoute, failure, path_of
from function.receiver import END, HEAD_BYTES
from function.values import dumps

MOST_BYTES = 16 * 1024  # of a body; a larger one would keep the loop from others

# A subset of what gunicorn accepts, with the same meaning. Names with `_`, values with anything but printable ASCII and other line ends
# are for gunicorn to judge.
_HEAD = re.compile(rb"(GET|HEAD|POST) (/[!-~]*) HTTP/1\.1\r\n((?:[A-Za-z0-9-]+:[ -~]*\r\n)*)\r\n")
_HEADER = re.compile(r"([A-Za-z0-9-]+):([ -~]*)\r\n")
_MOST_HEAD_BYTES, _MOST_HEADERS = 4000, 100  # within gunicorn's limits; and a line of the log fits into any pipe that is ready
_UNKNOWN = {"transfer-encoding", "upgrade"}  # with which it is for gunicorn to say where the request ends
_EXTRAORDINARY = {"content-encoding", "expect", "te", "trailer"}
_is_of_event = operator.methodcaller("startswith", "ce-")  # a header
# What is enough of any other GET or HEAD
_MOST_LINE_BYTES, _MOST_HEADER_BYTES = 8190, 32 * 1024  # gunicorn's, as the server sets them: what is beyond is for it to refuse
_FIRST_LINE = re.compile(rb"(GET|HEAD) (/[!-~]*) HTTP/1\.([01])\r\n")
_LINE = re.compile(r"[A-Za-z0-9_-]+:[^\r\n]*")
_ENDING = {"connection", "content-length", "expect", "transfer-encoding", "upgrade"}  # say where a request ends, or what follows


class Head(NamedTuple):
    """Of a request of which it is known where it ends, or of a probe."""

    method: str
    path: str  # of the target
    headers: Mapping[str, str]  # by name, in lower case
    length: int = 0  # of the body, in bytes
    is_last: bool = False  # no other request can follow: the client says so, or nobody has looked where this one ends
    is_ordinary: bool = True


class Answer(NamedTuple):
    """An answer that is to be sent."""

    status: str  # with its reason
    headers: Iterable[tuple[str, str]]
    body: bytes


def read(data: bytes) -> Head | None:
    """The head that data begins with; None if gunicorn has to read it."""
    found = _HEAD.match(data)
    if not found or found.end() > _MOST_HEAD_BYTES:
        return None
    lines = _HEADER.findall(found[3].decode("ascii"))
    headers = {name.lower(): value.strip() for name, value in lines}
    if len(headers) != len(lines) or len(lines) > _MOST_HEADERS:  # one that comes twice is not ordinary
        return None
    method, size, connection = found[1].decode(), headers.get("content-length"), headers.get("connection", "keep-alive").lower()
    if not _UNKNOWN.isdisjoint(headers) or connection not in ("keep-alive", "close"):
        return None
    has_length = size is not None and size.isdecimal() and len(size) <= 15
    if not (has_length if method == "POST" else size is None):
        return None  # a GET has no body, a POST says how long its is
    is_ordinary = _EXTRAORDINARY.isdisjoint(headers) and not any(map(_is_of_event, headers))
    return Head(method, path_of(found[2].decode()), headers, int(size or 0), connection == "close", is_ordinary)


def glance(data: bytes) -> Head | None:
    """The same of a GET or HEAD that is not ordinary, for answers that depend on nothing else of it. Its body, if it has one, is left."""
    found, end = _FIRST_LINE.match(data), data.find(END, 0, HEAD_BYTES)
    if not found or end < 0 or found.end() - len(b"\r\n") > _MOST_LINE_BYTES:
        return None
    lines = [line for line in data[found.end() : end].decode("latin-1").split("\r\n") if line]
    if len(lines) > _MOST_HEADERS or any(len(line) + len("\r\n") > _MOST_HEADER_BYTES for line in lines):
        return None
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    is_last = found[3] == b"0" or not _ENDING.isdisjoint(headers) or not all(map(_LINE.fullmatch, lines))
    return Head(found[1].decode(), path_of(found[2].decode()), headers, is_last=is_last)


class FastCall:
    """A prediction that was begun."""

    __slots__ = ("call", "failed", "head", "note", "request", "route")

    def __init__(self, route: PredictRoute, head: Head, note: Note) -> None:
        self.route = route
        self.head = head
        self.note = note
        self.request: PredictRequest | None = None
        self.call: Call | None = None  # None if it did not get so far
        self.failed: Exception | None = None  # before it was a call

    def outcome(self) -> Any:
        """The document that is its answer, once it is settled. Raises why there is none."""
        error = self.failed or (self.call and self.call.reply.error)
        if error:
            raise self.request.explained(error) if self.request else error
        assert self.request
        assert self.call
        return self.request.answer(self.call.reply.outputs)


class FastPath:
    """Answers for one function; used by the worker's loop alone."""

    def __init__(self, function: Function, access: Access, gate: Gate, probes: Mapping[str, Callable[[], flask.Response]]) -> None:
        """probes: by path, what answers a GET or HEAD at once, whoever asks."""
        self._function = function
        self.access = access
        self._gate = gate
        self._probes = probes
        self._calls: dict[int, Call] = {}  # that were begun and have no answer yet, by identity
        self.wake_at = math.inf  # when `expire` is wanted, on `time.monotonic`'s clock

    def probe(self, head: Head) -> Answer | None:
        """The answer to a probe; None if it is another request."""
        view = self._probes.get(head.path)
        if view is None or head.method == "POST":
            return None
        note = self.access.open(head.method, head.path, head.headers)
        try:
            response = view()
        except Exception as error:  # noqa: BLE001  see `failure`
            response = failure(error, head.method, head.path)
        answer = self._answer(response, note, head.path)
        return answer._replace(body=b"") if head.method == "HEAD" else answer

    def submit(self, head: Head, body: bytes, sock: Any, then: Callable[[], object]) -> FastCall | None:
        """Begin a prediction; None if the request is no ordinary one. `then` is called from any thread, unless it has failed already."""
        route = self._function.predictions.get(head.path)
        kind = head.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if not route or head.method != "POST" or kind != JSON or len(body) > MOST_BYTES:
            return None
        fast_call = FastCall(route, head, self.access.open(head.method, head.path, head.headers))
        try:
            self._gate.check(head.path, head.headers.get("authorization", ""), method=head.method)
            request = fast_call.request = route.read(parse_json(body)[0])
            context = self._function.context_of(head.headers, sock, fast_call.note)
            call = fast_call.call = self._function.submit(request, context, then)
            self._calls[id(call)] = call
            self.wake_at = min(self.wake_at, call.arrived + context.timeout_s)
        except Exception as error:  # noqa: BLE001  see `failure`
            fast_call.failed = error
        else:
            self._function.metrics.fast_path += 1
        return fast_call

    def expire(self, now: float) -> None:
        """Fail the calls whose deadline has come."""
        if now < self.wake_at:
            return
        for call in list(self._calls.values()):
            if now >= call.arrived + call.context.timeout_s:
                call.fail(call.context.late())
                self._calls.pop(id(call), None)
        self.wake_at = min((call.arrived + call.context.timeout_s for call in self._calls.values()), default=math.inf)

    def answer(self, fast_call: FastCall) -> Answer:
        """The answer to a prediction that has failed or whose call is settled."""
        head, note, rule = fast_call.head, fast_call.note, fast_call.route.rule
        self._calls.pop(id(fast_call.call), None)
        try:
            body = dumps(fast_call.outcome())
        except Exception as error:  # noqa: BLE001  see `failure`
            return self._answer(failure(error, head.method, head.path), note, rule)
        headers = {"Content-Type": JSON, "Content-Length": str(len(body)), **self.access.end(note, rule, 200)}
        return Answer("200 OK", headers.items(), body)

    def _answer(self, response: flask.Response, note: Note, route: str) -> Answer:
        response.headers.update(self.access.end(note, route, response.status_code))
        return Answer(response.status, list(response.headers), response.get_data())
