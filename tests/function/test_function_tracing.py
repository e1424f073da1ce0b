"""Traces, as a collector gets them: real functions, and a receiver of OTLP over HTTP."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from function import tracing
from tests.support import BIN, Server, clean_environment, free_port, request, running, wait_until

AGENT = """
import os, sys, time

class Agent:
    def load(self, weights, device): pass
    def predict(self, inputs):
        if "modules" in inputs:
            return [sorted({name.split(".")[0] for name in sys.modules})] * len(inputs)
        if "break" in inputs:
            raise OSError("broken")
        while "wait" in inputs and not os.path.exists(os.environ["GATE"]):
            time.sleep(0.005)
        return inputs
    def stream(self, item):
        yield "a"
        if "break" in item["prompt"]:
            raise OSError("broken")
        yield "b"
"""
StartFunction = Callable[..., Server]


class Collector:
    """Takes traces on a loopback port. `may_answer`: cleared, it leaves whoever sends some waiting."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.asked = threading.Event()
        self.received: list[tuple[dict[str, str], Span]] = []  # the resource's attributes with each
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.asked.set()
                collector.may_answer.wait()
                assert self.path == "/v1/traces"
                for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                    about = {item.key: item.value.string_value for item in group.resource.attributes}
                    collector.received += [(about, span) for scope in group.scope_spans for span in scope.spans]
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def spans(self, trace_id: str | None = None) -> list[Span]:
        return [span for _, span in self.received if trace_id in (None, span.trace_id.hex())]

    def server_span(self, trace_id: str) -> Span:
        """The one of a request, once it is here."""
        return wait_until("the span", lambda: next((span for span in self.spans(trace_id) if span.kind == Span.SPAN_KIND_SERVER), None))

    def close(self) -> None:
        self.may_answer.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartFunction]:
    folder = tmp_path_factory.mktemp("tracing")
    (folder / "traced_agent.py").write_text(AGENT)
    with ExitStack() as stack:

        def begin(*path: Path, **more: Any) -> Server:
            port = free_port()
            env = clean_environment(
                PYTHONPATH=":".join(map(str, (*path, folder))), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_MODEL_NAME="m"
            )
            env |= {"FUNCTION_AGENT": "traced_agent:Agent", **{name: str(value) for name, value in more.items()}}
            return stack.enter_context(running([str(BIN / "python"), "-m", "function"], folder / f"{port}.log", env, port)).ready()

        yield begin


@pytest.fixture(scope="module")
def function(start: StartFunction, collector: Collector) -> Server:
    return start(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY=50)


class Trace:
    """A caller's: its ids, and the header that carries them."""

    def __init__(self, number: int, flags: str = "01") -> None:
        self.trace_id, self.span_id = f"{number:032x}", f"{number:016x}"
        self.headers = {"traceparent": f"00-{self.trace_id}-{self.span_id}-{flags}", "tracestate": "vendor=1"}


def attributes(of: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in of.attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind)
        found[item.key] = [entry.string_value for entry in value.values] if kind == "array_value" else value
    return found


def children(collector: Collector, of: Span) -> dict[str, Span]:
    return {span.name: span for span in collector.spans(of.trace_id.hex()) if span.parent_span_id == of.span_id}


def test_a_prediction_is_a_server_span_of_the_callers_trace_with_its_parts_below(function: Server, collector: Collector) -> None:
    trace = Trace(1)
    before = time.time_ns()
    assert request(function.port, "POST", "/?a=b", {"instances": [1, 2]}, trace.headers).status == 200
    # A query makes it a request for Flask; without one the worker's loop answers.
    assert request(function.port, "POST", "/", {"instances": [1, 2]}, Trace(2).headers | {"X-Request-Id": "mine"}).status == 200
    after = time.time_ns()
    span, ordinary = collector.server_span(trace.trace_id), collector.server_span(Trace(2).trace_id)
    assert (span.name, ordinary.name) == ("POST /", "POST /")
    assert (span.parent_span_id.hex(), span.trace_state) == (trace.span_id, "vendor=1")
    said = attributes(ordinary)
    assert said == {
        "http.request.method": "POST",
        "http.request.header.x-request-id": ["mine"],
        "http.response.status_code": 200,
        "http.route": "/",
        "url.path": "/",
        "url.scheme": "http",
    }
    assert attributes(span).keys() == said.keys()
    for one in (span, ordinary):
        queue, model = children(collector, one)["queue"], children(collector, one)["model"]
        assert attributes(model) == {"relight.batch_inputs": 2}
        moments = [before, one.start_time_unix_nano, queue.start_time_unix_nano, queue.end_time_unix_nano]
        moments += [model.start_time_unix_nano, model.end_time_unix_nano, one.end_time_unix_nano, after]
        slack_ns = 50_000_000  # the wall clock may be set meanwhile
        assert all(first <= second + slack_ns for first, second in pairwise(moments))
        assert one.status.code == Status.STATUS_CODE_UNSET
    about = next(about for about, found in collector.received if found.span_id == span.span_id)
    assert about["service.name"] == "m"


def test_probes_and_metrics_make_no_spans(function: Server, collector: Collector) -> None:
    for number, path in enumerate(("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"), start=100):
        assert request(function.port, "GET", path, headers=Trace(number).headers).status == 200
        assert request(function.port, "GET", f"{path}?a=b", headers=Trace(number).headers).status == 200
    assert request(function.port, "GET", "/v1/models", headers=Trace(110).headers).status == 200
    assert collector.server_span(Trace(110).trace_id).name == "GET /v1/models"
    assert [span.name for number in range(100, 110) for span in collector.spans(Trace(number).trace_id)] == []


def test_a_caller_who_is_not_sampled_makes_no_spans(function: Server, collector: Collector) -> None:
    request(function.port, "POST", "/", 1, Trace(120, flags="00").headers)
    request(function.port, "POST", "/", 1, Trace(121).headers)
    collector.server_span(Trace(121).trace_id)
    assert collector.spans(Trace(120).trace_id) == []


def test_a_request_without_a_trace_begins_one(function: Server, collector: Collector) -> None:
    for headers in ({}, {"traceparent": "nonsense"}):
        request(function.port, "POST", "/", 1, headers | {"X-Request-Id": "root"})
    roots = wait_until(
        "both",
        lambda: (
            len(found := [s for s in collector.spans() if attributes(s).get("http.request.header.x-request-id") == ["root"]]) == 2 and found
        ),
    )
    assert [span.parent_span_id for span in roots] == [b"", b""]
    assert roots[0].trace_id != roots[1].trace_id


def test_a_stream_tells_when_its_first_piece_was_there_and_ends_with_its_last(function: Server, collector: Collector) -> None:
    reply = request(function.port, "POST", "/v1/completions", {"model": "m", "prompt": "x", "stream": True}, Trace(130).headers)
    assert reply.status == 200
    assert "queue;dur=" in reply.headers["server-timing"]
    assert "first_piece;dur=" in reply.headers["server-timing"]
    span = collector.server_span(Trace(130).trace_id)
    assert [event.name for event in span.events] == ["first_piece"]
    assert children(collector, span)["queue"].end_time_unix_nano <= span.events[0].time_unix_nano <= span.end_time_unix_nano


@pytest.mark.parametrize(
    ("number", "method", "path", "body", "status", "name", "error"),
    [
        pytest.param(140, "POST", "/", {"instances": ["break"]}, 500, "POST /", "500", id="an agent that fails is an error"),
        pytest.param(141, "POST", "/", b"{", 400, "POST /", None, id="a bad input is the caller's"),
        pytest.param(142, "GET", "/nowhere", None, 404, "GET", None, id="what has no route is named after its method"),
        pytest.param(143, "BREW", "/", None, 405, "HTTP", None, id="a method that is none"),
        pytest.param(
            144,
            "POST",
            "/v1/completions",
            {"model": "m", "prompt": "break", "stream": True},
            200,
            "POST /v1/completions",
            "agent_failed",
            id="a stream that breaks is an error although its status was out",
        ),
    ],
)
def test_what_goes_wrong_here_is_an_error(
    function: Server, collector: Collector, number: int, method: str, path: str, body: Any, status: int, name: str, error: str | None
) -> None:
    headers = Trace(number).headers | ({"Content-Type": "application/json"} if body else {})
    assert request(function.port, method, path, body, headers).status == status
    span = collector.server_span(Trace(number).trace_id)
    said = attributes(span)
    assert (span.name, said["http.response.status_code"], said.get("error.type")) == (name, status, error)
    assert span.status.code == (Status.STATUS_CODE_ERROR if error else Status.STATUS_CODE_UNSET)
    assert (said["http.request.method"], said.get("http.request.method_original")) == (
        ("_OTHER", method) if method == "BREW" else (method, None)
    )


def test_a_request_that_is_refused_unread_is_an_error_of_its_callers_trace(
    start: StartFunction, collector: Collector, tmp_path: Path
) -> None:
    function = start(
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{collector.url}/v1/traces",
        OTEL_SERVICE_NAME="named",
        FUNCTION_ACCESS_LOG="false",
        GATE=tmp_path / "gate",
    )
    with ThreadPoolExecutor(1) as callers:
        held = callers.submit(request, function.port, "POST", "/", "wait", Trace(150).headers)
        wait_until("the call", lambda: b"function_instances_total 1.0" in request(function.port, "GET", "/metrics").body)
        function.signal(signal.SIGTERM)
        wait_until("the end", lambda: request(function.port, "GET", "/readyz").json()["phase"] == "draining")
        assert request(function.port, "POST", "/", 1, Trace(151).headers).status == 503
        (tmp_path / "gate").touch()
        assert held.result().status == 200
    assert function.wait() == 0
    span = collector.server_span(Trace(151).trace_id)
    assert (span.name, span.parent_span_id.hex(), attributes(span)["error.type"]) == ("POST", Trace(151).span_id, "503")
    assert span.status.code == Status.STATUS_CODE_ERROR
    about = next(about for about, found in collector.received if found == span)
    assert about["service.name"] == "named"
    assert collector.server_span(Trace(150).trace_id).name == "POST /"  # with the log silent, too


def test_the_last_spans_are_sent_before_the_process_ends(start: StartFunction, collector: Collector) -> None:
    function = start(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY=3_600_000)
    for number in (160, 161):
        request(function.port, "POST", "/", 1, Trace(number).headers)
    assert collector.spans(Trace(160).trace_id) == []
    function.signal(signal.SIGTERM)
    assert function.wait() == 0
    assert [len(collector.spans(Trace(number).trace_id)) for number in (160, 161)] == [3, 3]


def test_a_collector_that_hangs_disturbs_neither_callers_nor_the_end(start: StartFunction) -> None:
    collector = Collector()
    collector.may_answer.clear()
    function = start(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY=10, FUNCTION_DRAIN_S=3600)
    assert request(function.port, "POST", "/", 1).status == 200
    assert collector.asked.wait(60)
    assert [request(function.port, "POST", "/", 1).status for _ in range(20)] == [200] * 20
    began = time.monotonic()
    function.signal(signal.SIGTERM)
    told = wait_until("a refusal", lambda: (reply := request(function.port, "POST", "/", 1)).status == 503 and reply)
    assert told.headers["connection"] == "close"
    assert function.wait(100) == 0
    assert time.monotonic() - began >= tracing.FLUSH_S
    assert "the collector did not take the last traces within 5 s" in function.said()
    collector.close()


def test_traces_have_no_more_than_the_grace_time(start: StartFunction) -> None:
    collector = Collector()
    collector.may_answer.clear()
    function = start(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, FUNCTION_DRAIN_S=1)
    assert request(function.port, "POST", "/", 1).status == 200
    function.signal(signal.SIGTERM)
    assert function.wait() == 0
    assert "did not take" not in function.said()
    collector.close()


@pytest.mark.parametrize("environ", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}])
def test_nothing_of_it_is_imported_unless_it_is_asked_for(start: StartFunction, environ: dict[str, str]) -> None:
    function = start(**environ)
    request(function.port, "POST", "/", 1)
    modules = request(function.port, "POST", "/", "modules").json()
    assert "function" in modules
    assert {"opentelemetry", "requests", "google"}.isdisjoint(modules)


def test_without_the_extra_it_serves_and_says_once_what_to_install(start: StartFunction, tmp_path: Path) -> None:
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry/__init__.py").touch()  # before the one that is installed here
    function = start(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    assert request(function.port, "POST", "/", 1).status == 200
    assert function.said().count("OTEL_EXPORTER_OTLP_ENDPOINT is set: OpenTelemetry is not installed; pip install 'relight[otel]'") == 1
    assert "Traceback" not in function.said()


def test_an_sdk_that_cannot_be_set_up_is_told_once_and_disturbs_nobody(start: StartFunction, tmp_path: Path) -> None:
    (tmp_path / "opentelemetry/sdk/trace").mkdir(parents=True)
    (tmp_path / "opentelemetry/sdk/trace/__init__.py").touch()
    (tmp_path / "opentelemetry/exporter/otlp/proto/http/trace_exporter").mkdir(parents=True)
    (tmp_path / "opentelemetry/exporter/otlp/proto/http/trace_exporter/__init__.py").touch()
    (tmp_path / "opentelemetry/__init__.py").touch()
    function = start(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    for _ in range(2):
        assert request(function.port, "POST", "/", 1).status == 200
    wait_until("the reason", lambda: "OpenTelemetry cannot be set up" in function.said())
    function.signal(signal.SIGTERM)
    assert function.wait() == 0
    assert function.said().count("cannot be set up") == 1


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        pytest.param({}, None, id="nothing is asked for"),
        pytest.param({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None, id="an empty variable is none"),
        pytest.param({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, None, id="traces are switched off"),
        pytest.param(
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"},
            "OTEL_EXPORTER_OTLP_ENDPOINT='collector:4318' must be a URL that begins with http:// or https://",
            id="no URL",
        ),
        pytest.param(
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL='grpc': only http/protobuf is spoken here",
            id="another protocol",
        ),
    ],
)
def test_what_cannot_be_done_is_said_at_the_start(environ: dict[str, str], said: str | None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert tracing.from_environment("m", environ) is None
    assert len(caplog.records) == (said is not None)
    assert (said or "") in caplog.text
