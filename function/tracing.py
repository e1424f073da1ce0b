"""OpenTelemetry, where its own environment variables ask for it: each request's spans, sent to a collector over OTLP/HTTP.

Spans are made when the answer is out, from what was noted of the request, and in a thread of their own: neither callers nor the loop wait
for them. The first one imports the SDK, so that a cold start does without; and nothing of it is there in a function that is not traced.
"""

import importlib.util
import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from function.access import Note

if TYPE_CHECKING:
    from function.spans import Spans

log = logging.getLogger("relight.function")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
FLUSH_S = 5.0  # for a collector to take the last ones; a process that ends does not wait longer
_WAITING = 2048  # requests whose spans are still to be made; beyond it they are lost (the SDK keeps as many spans)


class Tracing:
    """Takes requests that are over, from any thread; makes and sends their spans in its own."""

    def __init__(self, service: str) -> None:
        """service: its name, unless the environment has another."""
        self._service = service
        self._todo: queue.SimpleQueue[tuple[Note, float] | threading.Event] = queue.SimpleQueue()
        self._is_lost = False  # if the SDK cannot be set up

    def start(self) -> None:
        """Begin, in the process that serves."""
        threading.Thread(target=self._run, name="traces", daemon=True).start()

    def finished(self, note: Note) -> None:
        """The answer to a request is out, now. Does not wait."""
        if not self._is_lost and self._todo.qsize() < _WAITING:
            self._todo.put((note, time.monotonic()))

    def flush(self) -> None:
        """Return when all is sent, or after FLUSH_S."""
        done = threading.Event()
        self._todo.put(done)
        if not done.wait(FLUSH_S):
            log.warning("the collector did not take the last traces within %g s", FLUSH_S)

    def _run(self) -> None:
        spans: Spans | None = None
        while True:
            todo = self._todo.get()
            try:
                if isinstance(todo, threading.Event):
                    if spans:
                        spans.flush()
                    todo.set()
                elif not self._is_lost:
                    spans = spans or _set_up(self._service)
                    spans.make(*todo)
            except Exception:
                self._is_lost = spans is None
                log.exception("no traces are sent: OpenTelemetry cannot be set up" if self._is_lost else "a trace is lost")


def from_environment(service: str, environ: Mapping[str, str] = os.environ) -> Tracing | None:
    """What the standard variables ask for: None if nothing, and, with a line in the log, if it is not possible."""
    endpoint = next((name for name in ENDPOINTS if environ.get(name)), None)
    is_disabled = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    if endpoint is None or is_disabled:
        return None
    protocol = next((name for name in PROTOCOLS if environ.get(name)), None)
    if not environ[endpoint].startswith(("http://", "https://")):
        log.warning("no traces are sent: %s=%r must be a URL that begins with http:// or https://", endpoint, environ[endpoint])
    elif protocol and environ[protocol] != "http/protobuf":
        log.warning("no traces are sent: %s=%r: only http/protobuf is spoken here (port 4318)", protocol, environ[protocol])
    elif not _is_installed():
        log.warning("no traces are sent, although %s is set: OpenTelemetry is not installed; pip install 'relight[otel]'", endpoint)
    else:
        return Tracing(service)
    return None


def _set_up(service: str) -> "Spans":
    from function.spans import Spans  # the SDK is an extra, and takes a while

    return Spans(service)


def _is_installed() -> bool:
    try:
        return all(importlib.util.find_spec(f"opentelemetry.{name}") for name in ("sdk.trace", "exporter.otlp.proto.http.trace_exporter"))
    except ModuleNotFoundError:  # of a package above
        return False
