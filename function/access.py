"""What is noted of each request: its id, how long it took and where, one JSON line in the log, `Server-Timing` for the caller, a trace."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import flask

from function import log
from function.batcher import Span
from function.cors import Cors
from function.metrics import Metrics

_ID = re.compile(r"[!-~]{1,128}")
# Asked every second; a line or a trace for each would bury what matters.
_QUIET = ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")
NO_ROUTE = "none"
REFUSED = "*"  # any of them
# A line of the log is to fit into any pipe in one piece (4096 bytes), even if each character is written as six.
_MOST_PATH, _MOST_METHOD, _MOST_TRACEPARENT = 400, 20, 64


class Headers(Protocol):
    """A request's; asked for with names in lower case."""

    def get(self, name: str, /) -> str | None:
        """A header's value, None if it is not there."""


@dataclass(slots=True)
class Note:
    """What is known of a request that is being answered."""

    method: str
    path: str
    request_id: str
    traceparent: str | None
    began: float  # on `time.monotonic`'s clock
    timing: dict[str, float] = field(default_factory=dict)  # seconds in each part, noted as they pass
    spans: list[Span] | None = None  # the parts one by one, if it is traced
    tracestate: str | None = None  # the same
    # Once the answer is known
    route: str = NO_ROUTE
    status: int = 0
    origin: str | None = None  # of the page that a browser calls from
    error: str | None = None  # the type of one that came after the status was out
    line: dict[str, Any] | None = None  # for the log
    trace: "Trace | None" = None  # who else wants it

    @property
    def is_wanted(self) -> bool:
        """Whether it is to be finished once the answer is out."""
        return self.line is not None or self.trace is not None


Trace = Callable[[Note], object]  # is handed what was noted of a request whose answer is out, probes excepted; from any thread


class Access:
    """Takes note of all requests, whoever answers them."""

    def __init__(self, metrics: Metrics, cors: Cors, *, is_logged: bool, trace: Trace | None = None) -> None:
        """is_logged: one line on stderr for each request."""
        self._metrics = metrics
        self._cors = cors
        self._is_logged = is_logged
        self._trace = trace

    def watch(self, app: flask.Flask) -> None:
        """Take note of what the app is asked."""

        @app.before_request
        def begin() -> None:
            request = flask.request
            flask.g.note = self.open(request.method, request.path, request.headers)

        @app.before_request
        def preflight() -> flask.Response | None:
            """Before anybody is asked for a key, which browsers do not send with this question."""
            request = flask.request
            if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
                return None
            said = self._cors.preflight(request.headers.get("Origin"), request.headers.get("Access-Control-Request-Headers"))
            return None if said is None else flask.Response(status=204, headers=dict(said))

        @app.after_request
        def end(response: flask.Response) -> flask.Response:
            note, rule = flask.g.note, flask.request.url_rule
            response.headers.update(self.end(note, rule.rule if rule else NO_ROUTE, response.status_code))
            if note.is_wanted:  # when the answer is out, which for a stream is later than its head
                response.call_on_close(lambda: finish(note))
            return response

    def open(self, method: str, path: str, headers: Headers) -> Note:
        """A request has come."""
        said = headers.get("x-request-id") or ""
        request_id = said if _ID.fullmatch(said) else os.urandom(16).hex()
        traceparent = (headers.get("traceparent") or "")[:_MOST_TRACEPARENT] or None
        note = Note(method[:_MOST_METHOD], path[:_MOST_PATH], request_id, traceparent, time.monotonic())
        note.origin = headers.get("origin")
        if self._trace:
            note.spans, note.tracestate = [], headers.get("tracestate")
        return note

    def end(self, note: Note, route: str, status: int) -> dict[str, str]:
        """The answer is known; returns headers for it. When it is out, `finish` the note, if it is wanted."""
        seconds = time.monotonic() - note.began
        self._metrics.requests(route, status).inc()
        if route != REFUSED:  # those take no time, and may be many
            self._metrics.seconds(route).observe(seconds)
        if self._is_logged and route not in _QUIET:
            note.line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": note.request_id,
                "traceparent": note.traceparent,
                "method": note.method,
                "path": note.path,
                "status": status,
                **{f"{name}_s": round(found, 6) for name, found in note.timing.items()},
            }
        if self._trace and route not in _QUIET:
            note.route, note.status, note.trace = route, status, self._trace
        timing = {**note.timing, "total": seconds}
        return {
            "X-Request-Id": note.request_id,
            "Server-Timing": ", ".join([f"{name};dur={found * 1000:.2f}" for name, found in timing.items()]),
            **self._cors.headers(note.origin),
        }

    def refused(self, head: bytes, began: float, status: int) -> tuple[Note, dict[str, str]]:
        """A request is refused before anybody has looked at more than its head; returns what `open` and `end` do."""
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, *_ = *first.split(" "), "", ""
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        note = self.open(method, path.partition("?")[0], headers)
        note.began = began
        said = self.end(note, REFUSED, status)
        note.route = NO_ROUTE  # to a trace that is none
        return note, said


def finish(note: Note) -> None:
    """The answer is out: hand it to the trace, write its line."""
    if note.trace:
        note.trace(note)
    if note.line is None:
        return
    broken = {"error": note.error} if note.error else {}  # after the status was out
    log.write(log.json_line({**note.line, **broken, "total_s": round(time.monotonic() - note.began, 6)}))
