"""A request as OpenTelemetry has it, made from what was noted of it: one server span by the conventions for HTTP, its parts below."""

import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from function.access import NO_ROUTE, Note

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
_MOST = 128  # parts of one request: as many as the SDK keeps of events; a long call in small batches has more


class Spans:
    """Makes spans, and has them sent; sampler, limits, endpoint, headers and the like are the SDK's to read from the environment."""

    def __init__(self, service: str) -> None:
        """Starts a thread, which no fork would keep. service: its name, unless the environment has another."""
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: service}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("relight.function")
        self._propagator = TraceContextTextMapPropagator()

    def make(self, note: Note, ended: float) -> None:
        """The spans of a request that ended then, on `time.monotonic`'s clock."""
        shift = time.time_ns() - time.monotonic_ns()

        def at(moment: float) -> int:
            return int(moment * 1e9) + shift

        attributes, error = _attributes(note), note.error or (str(note.status) if note.status >= 500 else None)
        if error:
            attributes["error.type"] = error
        name = note.method if note.method in _METHODS else "HTTP"
        span = self._tracer.start_span(
            name if note.route == NO_ROUTE else f"{name} {note.route}",
            self._propagator.extract({name: value for name in ("traceparent", "tracestate") if (value := getattr(note, name))}),
            SpanKind.SERVER,
            attributes,
            start_time=at(note.began),
        )
        if span.is_recording():
            inside = set_span_in_context(span)
            for part in (note.spans or [])[:_MOST]:
                shared = {"relight.batch_inputs": part.inputs} if part.inputs else None
                self._tracer.start_span(part.name, inside, attributes=shared, start_time=at(part.began)).end(at(part.ended))
            if first_piece_s := note.timing.get("first_piece"):
                span.add_event("first_piece", timestamp=at(note.began + first_piece_s))
            if error:
                span.set_status(StatusCode.ERROR)
        span.end(at(ended))

    def flush(self) -> None:
        """Send all that was made."""
        self._provider.force_flush()


def _attributes(note: Note) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue] = {
        "http.request.method": note.method if note.method in _METHODS else "_OTHER",
        "http.request.header.x-request-id": [note.request_id],
        "http.response.status_code": note.status,
        "url.path": note.path,
        "url.scheme": "http",
    }
    if note.route != NO_ROUTE:
        found["http.route"] = note.route
    if note.method not in _METHODS:
        found["http.request.method_original"] = note.method
    return found
