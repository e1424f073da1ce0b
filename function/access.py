"""What is noted of each request: its id, how long it took and where, one JSON line in the log, `Server-Timing` for the caller."""

import os
import re
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import flask
import orjson

from function.metrics import Metrics

_ID = re.compile(r"[!-~]{1,128}")
_QUIET = ("/healthz", "/readyz", "/metrics")  # asked every second; a line for each would bury what matters


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
    began: float
    timing: dict[str, float] = field(default_factory=dict)  # seconds in each part, noted as they pass
    line: dict[str, Any] | None = None  # for the log, once the answer is known


class Access:
    """Takes note of all requests, whoever answers them."""

    def __init__(self, metrics: Metrics, *, is_logged: bool) -> None:
        """is_logged: one line on stderr for each request."""
        self._metrics = metrics
        self._is_logged = is_logged

    def watch(self, app: flask.Flask) -> None:
        """Take note of what the app is asked."""

        @app.before_request
        def begin() -> None:
            request = flask.request
            flask.g.note = self.begin(request.method, request.path, request.headers)

        @app.after_request
        def end(response: flask.Response) -> flask.Response:
            note, rule = flask.g.note, flask.request.url_rule
            response.headers.update(self.end(note, rule.rule if rule else "none", response.status_code))
            if note.line:  # is written when the answer is out, which for a stream is later than its head
                response.call_on_close(lambda: write(note))
            return response

    def begin(self, method: str, path: str, headers: Headers) -> Note:
        """A request has come."""
        said = headers.get("x-request-id") or ""
        request_id = said if _ID.fullmatch(said) else uuid.uuid4().hex
        return Note(method, path, request_id, headers.get("traceparent"), time.perf_counter())

    def end(self, note: Note, route: str, status: int) -> dict[str, str]:
        """The answer is known; returns headers for it. Afterwards `write` the note, if it has a line."""
        seconds = time.perf_counter() - note.began
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
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
        timing = {**note.timing, "total": seconds}
        return {
            "X-Request-Id": note.request_id,
            "Server-Timing": ", ".join(f"{name};dur={found * 1000:.2f}" for name, found in timing.items()),
        }


def write(note: Note) -> None:
    """Write the line of a request whose answer is out."""
    line = {**(note.line or {}), "total_s": round(time.perf_counter() - note.began, 6)}
    try:
        os.write(2, orjson.dumps(line) + b"\n")  # one call, which no other line can come into
    except OSError:
        pass  # nobody reads the log any more
