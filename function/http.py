"""What all protocols share: reading a request within bounds, answering in JSON or in server-sent events."""

import base64
import difflib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import unquote

import flask

from function import error_shapes
from function.access import Headers, Note
from function.batcher import Call, CallContext
from function.bodies import ParseBudget, decompress, parse_json
from function.errors import AgentFailed, BadInput, ClientGone, FunctionError, NotFound, TooLarge, UnsupportedMediaType
from function.headers import chosen
from function.merged import Merged
from function.metrics import Metrics
from function.model import Model
from function.priority import Priority
from function.settings import FunctionSettings
from function.streams import Stream, is_empty
from function.values import dumps

log = logging.getLogger("relight.function")

_Begun = TypeVar("_Begun", Stream, Merged)

JSON = "application/json"
HEARTBEAT_S = 10.0  # a comment line when the model is silent for so long, so that nothing in between takes the connection for dead
_SETTLED_S = 0.01  # who asked so lately is there; the look costs more than it would save


@dataclass(slots=True)
class PredictRequest:
    """What a caller asks of the model, in JSON or in an event. Nobody changes it; not frozen, for the same reason as CallContext."""

    inputs: list[Any]
    is_bare: bool  # one value, answered as such
    parameters: Mapping[str, Any] | None = None

    def answer(self, outputs: list[Any]) -> Any:
        """The outputs in the shape of the request."""
        return outputs[0] if self.is_bare else {"predictions": outputs}

    def explained(self, error: Exception) -> Exception:
        """The same, with a hint where what was refused is an object that was meant to be {"instances": …}, by the look of it."""
        item = self.inputs[0] if self.is_bare and isinstance(error, BadInput) else None
        if not isinstance(item, dict) or not (meant := [name for name in list(item)[:10] if _is_like_instances(name)]):
            return error
        return BadInput(f'{error} (a request is {{"instances": […]}}; an object without "instances", as with {meant[0]!r}, is one input)')


@dataclass(frozen=True)
class PredictRoute:
    """A route whose requests are a JSON document, and their answer too."""

    rule: str
    read: Callable[[Any], PredictRequest]  # from the document; raises BadInput


@dataclass(frozen=True)
class Function:
    """The model and what its routes need besides."""

    settings: FunctionSettings
    model: Model
    metrics: Metrics
    parse_budget: ParseBudget
    predictions: dict[str, PredictRoute] = field(default_factory=dict)  # by path: what may be answered without Flask, too

    def known(self, name: Any) -> None:
        """Raises NotFound unless it is our model's name."""
        if name != self.settings.model_name:
            raise NotFound(f"there is no model {name!r:.100} here; this function serves {self.settings.model_name!r}")

    def predict(self, request: PredictRequest, context: CallContext | None = None) -> list[Any]:
        """One output for each input. Raises what Model.predict does, and BadInput when there are too many."""
        context = context or self.context()
        try:
            return self.model.predict(self._inputs(request), context, request.parameters)
        except BadInput as error:
            raise request.explained(error) from error.__cause__

    def submit(self, request: PredictRequest, context: CallContext, then: Callable[[], object]) -> Call:
        """The same without waiting: see Model.submit."""
        return self.model.submit(self._inputs(request), context, then, request.parameters)

    def _inputs(self, request: PredictRequest) -> list[Any]:
        """Counted; bytes where they are in base64, for an agent that takes bytes."""
        inputs = request.inputs
        if len(inputs) > self.settings.max_inputs:
            raise self.too_many(len(inputs))
        self.metrics.instances.inc(len(inputs))
        return list(map(_decoded, inputs)) if self.model.traits.media_types else inputs

    def too_many(self, count: int) -> BadInput:
        """What is said of more inputs than one request may hold."""
        return BadInput(f"{count} inputs in one request; at most {self.settings.max_inputs} (FUNCTION_MAX_INPUTS)")

    def stream(self, item: Any) -> Stream:
        """The answer to one input, piece by piece, once its first piece is there. Raises what Model.stream does."""
        self.metrics.instances.inc()
        return self._first(lambda: self.model.stream(item, self.context()))

    def merged(self, items: Sequence[Any]) -> Merged:
        """The answers to several inputs as one stream, once the first piece of the first is there. Raises what Model.stream does."""
        self.metrics.instances.inc(len(items))
        calls = [(item, self.context()) for item in items]
        return self._first(lambda: Merged(calls, self.model.streams, min(self.settings.max_batch, self.settings.queue_limit)))

    def _first(self, begin: Callable[[], _Begun]) -> _Begun:
        """What is begun, and the time that it took noted."""
        note: Note = flask.g.note
        with self.metrics.first_piece.time():
            begun = begin()
        note.timing.setdefault("first_piece", time.monotonic() - note.began)
        return begun

    def context(self, urgency: int | None = None) -> CallContext:
        """What Flask's request says of its deadline and its priority. urgency: said elsewhere than in the Priority header."""
        request = flask.request
        return self.context_of(request.headers, request.environ.get("gunicorn.socket"), flask.g.note, urgency)

    def context_of(self, headers: Headers, sock: Any, note: Note, urgency: int | None = None) -> CallContext:
        """The same of any request. sock: its connection; note: where its time is noted. Raises BadInput."""
        own_s, said = self.settings.timeout_s, headers.get("x-request-timeout-ms")
        timeout_s = own_s if said is None else min(own_s, _milliseconds(said) / 1000)
        priority = Priority.of_header(headers.get("priority") or "") if urgency is None else Priority.of_urgency(urgency)
        asked_for = self.model.traits.headers
        mine = chosen(asked_for, headers) if asked_for else None
        return CallContext(timeout_s, timeout_s == own_s, priority, _is_gone(sock), note.request_id, note.timing, note.spans, mine)

    # The request's body

    def json_body(self) -> Any:
        """The request's body, parsed. Raises what `body` and `parse` do."""
        request = flask.request
        if request.mimetype and request.mimetype != JSON and not request.mimetype.endswith("+json"):
            others = "".join(f", or {kind} at POST /" for kind in self.model.traits.media_types)
            raise UnsupportedMediaType(
                f"a body of type {request.mimetype!r:.100} is not understood here; send JSON with Content-Type: application/json{others}"
            )
        return self.parse(self.body())

    def json_object(self) -> dict[str, Any]:
        """The same where it has to be an object."""
        document = self.json_body()
        if not isinstance(document, dict):
            raise BadInput(f"the body must be a JSON object, not {_kind(document)}")
        return document

    def parse(self, body: bytes) -> Any:
        """JSON, the memory of which is counted until the request is answered. Raises BadInput, TooLarge and Unavailable."""
        document, reservation = parse_json(body, self.parse_budget, self.settings.max_inputs)
        flask.g.setdefault("reservations", []).append(reservation)
        return document

    def body(self) -> bytes:
        """The request's body, as it was before it was compressed.

        Raises Unavailable, before anything is read, if the request would be refused anyway, and TooLarge: it reads one byte past the limit
        instead of trusting Content-Length, as a chunked body has none.
        """
        request, limit = flask.request, self.settings.max_body_bytes
        self.model.admit(Priority.of_request({name.lower(): value for name, value in request.headers.items()}))
        length = request.content_length or 0
        body: bytes = request.stream.read(limit + 1) if length <= limit else b""  # the loop has all of it
        if max(length, len(body)) > limit:
            raise TooLarge(f"the body is larger than {limit} bytes (FUNCTION_MAX_BODY_BYTES)")
        coding = request.headers.get("Content-Encoding", "")
        return decompress(body, coding, limit) if coding else body


def _is_like_instances(name: str) -> bool:
    """Whether it is a misspelt "instances", or what another server has in its place."""
    return name in ("inputs", "input") or bool(difflib.get_close_matches(name[:20].lower(), ["instances"], cutoff=0.75))


def _decoded(item: Any) -> Any:
    """The bytes of {"b64": text}, as clients of TensorFlow Serving send them; anything else as it is. Raises BadInput."""
    if not (isinstance(item, dict) and item.keys() == {"b64"} and isinstance(item["b64"], str)):
        return item
    try:
        return base64.b64decode(item["b64"], validate=True)
    except ValueError:
        raise BadInput('"b64" of an input is not base64') from None


def path_of(target: str) -> str:
    """The path that a request's target names, as Flask has it."""
    path = target.partition("?")[0]
    return unquote(path) if "%" in path else path


def reply(document: Any, status: int = 200) -> flask.Response:
    """A JSON answer."""
    return flask.Response(dumps(document), status, content_type=JSON)


def failure(error: Exception, method: str, path: str) -> flask.Response:
    """What is answered when a request ends in an error, in the shape of its path; what nobody raised on purpose goes to the log."""
    if not isinstance(error, FunctionError):
        log.error("%s %s failed", method, path, exc_info=error)
        error = FunctionError("the function failed on this request; its log says why")
    return written(error, error_shapes.shape_of(path))


def written(error: FunctionError, shape: error_shapes.Shape) -> flask.Response:
    """What is answered for an error."""
    response = reply(shape(error), error.status)
    response.headers.update(error.headers)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = retry_after(error.retry_after_s)
    if error.ends_connection:
        response.headers["Connection"] = "close"  # the rest of the body is not read
    return response


def retry_after(seconds: float) -> str:
    """The header's value: whole seconds, at least one."""
    return str(max(1, math.ceil(seconds)))


def events(
    stream: Stream | Merged, shape: Callable[[Any], Any], last: Callable[[], list[bytes]] = list, first: Sequence[bytes] = ()
) -> flask.Response:
    """Server-sent events: `first`, each piece as `shape` makes it, and what `last` gives, which may ask `stream.usage` how it ended.

    An error half-way is told in an event, in the shape of the path, since the status is out already. The stream ends when the client
    leaves.
    """

    note: Note = flask.g.note
    shape_error = error_shapes.shape_of(flask.request.path)

    def lines() -> Iterator[bytes]:
        try:
            yield from first
            for piece in stream.pieces(HEARTBEAT_S):
                if not is_empty(piece):
                    yield b": still working\n\n" if piece is None else event(shape(piece))
            yield from last()
        except GeneratorExit:
            note.error = ClientGone.type
            raise
        except Exception as error:  # noqa: BLE001  what is no FunctionError is logged there
            found = error if isinstance(error, FunctionError) else _failed(error)
            note.error = found.type
            yield event(shape_error(found))
        finally:
            stream.close()

    return flask.Response(
        lines(), content_type="text/event-stream; charset=utf-8", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )


def _failed(error: Exception) -> FunctionError:
    log.error("a stream failed", exc_info=error)
    return AgentFailed("the function failed on this request; its log says why")


def event(document: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(document) + b"\n\n"


def _milliseconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise BadInput(f"X-Request-Timeout-Ms: {text!r:.60} is not a number of milliseconds above 0")
    return found


def _is_gone(sock: Any) -> Callable[[], bool]:
    """Asks whether the other side of a connection (an Outbox) has hung up, of a request that has been waiting for a moment."""
    if sock is None:
        return lambda: False
    asked_first = time.monotonic() + _SETTLED_S
    return lambda: time.monotonic() >= asked_first and sock.is_gone()


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}.get(
        type(value), "null"
    )
