"""What is noted of each request: its id, how long it took and where, one JSON line in the log, `Server-Timing` for the caller."""

import os
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import flask
import orjson

from function.metrics import Metrics

_ID = re.compile(r"[!-~]{1,128}")
_QUIET = ("/healthz", "/readyz", "/metrics")  # asked every second; a line for each would bury what matters


class Access:
    """Registers itself with the app."""

    def __init__(self, app: flask.Flask, metrics: Metrics, *, is_logged: bool) -> None:
        """is_logged: one line on stderr for each request."""
        self._metrics = metrics
        self._is_logged = is_logged
        app.before_request(self._begin)
        app.after_request(self._end)

    def _begin(self) -> None:
        flask.g.began = time.perf_counter()
        said = flask.request.headers.get("X-Request-Id", "")
        flask.g.request_id = said if _ID.fullmatch(said) else uuid.uuid4().hex
        flask.g.timing = {}

    def _end(self, response: flask.Response) -> flask.Response:
        request, seconds = flask.request, time.perf_counter() - flask.g.began
        route = request.url_rule.rule if request.url_rule else "none"
        self._metrics.requests.labels(route, str(response.status_code)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        response.headers["X-Request-Id"] = flask.g.request_id
        timing: dict[str, float] = {**flask.g.timing, "total": seconds}
        response.headers["Server-Timing"] = ", ".join(f"{name};dur={found * 1000:.2f}" for name, found in timing.items())
        if self._is_logged and route not in _QUIET:
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": flask.g.request_id,
                "traceparent": request.headers.get("traceparent"),
                "method": request.method,
                "path": request.path,
                "status": response.status_code,
                **{f"{name}_s": round(found, 6) for name, found in flask.g.timing.items()},
            }
            response.call_on_close(_Line(line, flask.g.began))
        return response


class _Line:
    """Is written when the answer is out, which for a stream is later than its head."""

    def __init__(self, line: dict[str, Any], began: float) -> None:
        self._line = line
        self._began = began

    def __call__(self) -> None:
        self._line["total_s"] = round(time.perf_counter() - self._began, 6)
        os.write(2, orjson.dumps(self._line) + b"\n")  # one call, which no other line can come into
