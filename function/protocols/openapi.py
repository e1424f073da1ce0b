"""`/openapi.json`: what the routes take and what they answer, as OpenAPI 3.1.

It is this function's own: the model's name is the one it has, and keys are asked for where it asks for them. A test holds it against the
app: the routes are all there, and each status is one that the server gives.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import flask

from function.guarded_agent import Traits
from function.http import Function
from function.protocols import cloudevents, tensors, v2
from function.protocols.openai import schemas
from function.settings import FunctionSettings
from function.values import dumps

Schema = dict[str, Any]

JSON = "application/json"
SSE = "text/event-stream; charset=utf-8"
BINARY = "application/octet-stream"
METRICS = "text/plain; version=0.0.4; charset=utf-8"

# What a request can come to, if not to an answer.
REASONS = {
    400: "The request or an input in it is not what it should be; the message says what and why.",
    401: "No key that is known here: send `Authorization: Bearer <key>`.",
    403: "The sender of the event is not let in (FUNCTION_OIDC_SUBJECTS).",
    404: "There is no model of this name here.",
    408: "The body stopped coming.",
    413: "The body is larger than FUNCTION_MAX_BODY_BYTES.",
    415: "A body of this type is not understood here.",
    500: "The agent failed; the function's log says why.",
    503: "Not now: not ready yet, too many requests wait already, or the model has stopped answering. Retry-After says when.",
    504: "No answer by the deadline.",
}
READING, RUNNING = (400, 408, 413, 415), (500, 503, 504)  # a body; the model


def add_routes(app: flask.Flask, function: Function) -> None:
    """Add `/openapi.json`."""
    latest: list[Any] = [None, b""]  # what the agent declares, and the document that says so

    @app.get("/openapi.json")
    def openapi() -> flask.Response:
        traits = function.model.traits
        if latest[0] is not traits:
            latest[:] = traits, dumps(describe(function.settings, traits))
        return flask.Response(latest[1], content_type=JSON)


def describe(settings: FunctionSettings, traits: Traits) -> dict[str, Any]:
    """The document."""
    declared = _declared(traits.headers)
    instances = _instances(takes_parameters=traits.takes_parameters)
    paths: dict[str, Any] = {}
    for path, method, operation in (
        *_probes(),
        *_own(instances),
        *_v1(instances),
        *_openai(settings.model_name, schemas.bodies(traits)),
        *_v2(),
    ):
        names = [name for name in _IN_PATHS if f"{{{name}}}" in path]
        of_calls = (*_HEADERS, *declared) if method == "post" else ()
        operation["parameters"] = [_ref("parameters", name) for name in (*names, *of_calls)]
        if settings.api_keys_file and path not in ("/healthz", "/readyz"):
            operation["responses"]["401"] = _refusal(401, _ref("schemas", "V2Error" if path.startswith("/v2") else "Error"))
            operation["security"] = [{"key": []}]
        if settings.oidc_audience and path == "/":
            for status in (401, 403):
                operation["responses"][str(status)] = _refusal(status, _ref("schemas", "Error"))
        paths.setdefault(path, {})[method] = operation
    in_path = {"model": settings.model_name, "version": v2.VERSION}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"Relight function: {settings.model_name}", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "parameters": {name: _in_path(name, in_path[name]) for name in _IN_PATHS} | _HEADERS | declared,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


# Pieces

_STRING: Schema = {"type": "string"}
_BOOLEAN: Schema = {"type": "boolean"}
_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_ATTRIBUTE: Schema = {"type": "string", "pattern": "^[ -~]+$"}  # of an event; other characters, but for control characters, do as well
_IN_PATHS = ("model", "version")
_HEADERS: dict[str, Schema] = {
    "X-Request-Timeout-Ms": {
        "name": "X-Request-Timeout-Ms",
        "in": "header",
        "description": "The caller's own deadline, in milliseconds, if it is shorter than FUNCTION_TIMEOUT_S.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
    "Priority": {
        "name": "Priority",
        "in": "header",
        "description": "RFC 9218: urgency `u=5` and above is batch work, which waits for interactive calls.",
        "schema": {"type": "string"},
        "example": "u=5",
    },
}


def _declared(names: Iterable[str]) -> dict[str, Schema]:
    """The request headers that the agent asks for."""
    ours = {name.lower() for name in _HEADERS}
    said = {"in": "header", "description": "The agent is handed it.", "schema": {"type": "string"}}
    return {name: {"name": name, **said} for name in names if name not in ours}


def _object(required: Mapping[str, Schema] | None = None, optional: Mapping[str, Schema] | None = None, **more: Any) -> Schema:
    required, optional = required or {}, optional or {}
    return {"type": "object", "properties": {**required, **optional}, **({"required": list(required)} if required else {}), **more}


_PARAMETERS = _object(propertyNames={"not": {"enum": ["shared_memory_region"]}})  # of the Open Inference Protocol


def _list(items: Schema | None = None, least: int = 0) -> Schema:
    return {"type": "array", "items": items or {}, **({"minItems": least} if least else {})}


def _instances(*, takes_parameters: bool) -> Schema:
    parameters: Schema = {"type": "object", **({} if takes_parameters else {"maxProperties": 0})}
    signature = {"enum": [None, "", "serving_default"]}
    return _object({"instances": _list(least=1)}, {"signature_name": signature, "parameters": parameters}, additionalProperties=False)


def _ref(kind: str, name: str) -> Schema:
    return {"$ref": f"#/components/{kind}/{name}"}


def _in_path(name: str, only: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "enum": [only]}}


def _content(kinds: Mapping[str, Schema]) -> dict[str, Any]:
    return {kind: {"schema": schema} for kind, schema in kinds.items()}


def _refusal(status: int, error: Schema) -> dict[str, Any]:
    response: dict[str, Any] = {"description": REASONS[status], "content": _content({JSON: error})}
    if status == 503:
        response["headers"] = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}, "description": "Seconds."}}
    return response


def _operation(
    summary: str,
    answer: Mapping[str, Schema],
    *,
    body: Mapping[str, Schema] | None = None,
    refusals: Iterable[int] = (),
    error: str = "Error",
    also: Mapping[int, Schema] | None = None,
) -> dict[str, Any]:
    """answer, body: schemas by media type; also: JSON that statuses have which are no errors in `error`'s shape."""
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": _content(answer)}}
    responses |= {str(status): {"description": "Not now.", "content": _content({JSON: schema})} for status, schema in (also or {}).items()}
    responses |= {str(status): _refusal(status, _ref("schemas", error)) for status in refusals}
    request = {"requestBody": {"required": True, "content": _content(body)}} if body else {}
    return {"summary": summary, **request, "responses": responses}


Routes = Iterable[tuple[str, str, dict[str, Any]]]  # path, method, operation


# The routes


def _probes() -> Routes:
    status = _ref("schemas", "Status")
    yield (
        "/healthz",
        "get",
        _operation("Whether the process can still serve", {JSON: _object({"status": _STRING})}, also={503: _ref("schemas", "Error")}),
    )
    yield "/readyz", "get", _operation("Whether traffic may come", {JSON: status}, also={503: status})
    yield "/metrics", "get", _operation("Metrics for Prometheus", {METRICS: _STRING})
    yield "/openapi.json", "get", _operation("This document", {JSON: _object()})


def _own(instances: Schema) -> Routes:
    event = _ref("schemas", "Event")
    anything = {"description": 'One input; or {"instances": [...]}, as in V1.', "anyOf": [instances, {"not": _object({"instances": {}})}]}
    replied = _object({"specversion": {"enum": ["1.0"]}, "id": _STRING, "source": _STRING, "type": _STRING})
    yield (
        "/",
        "post",
        _operation(
            "Call the function: JSON in, JSON out; a CloudEvent in, a CloudEvent out",
            {JSON: {}, BINARY: {}, cloudevents.EVENT: replied, cloudevents.BATCH: _list(replied)},
            body={JSON: anything, cloudevents.EVENT: event, cloudevents.BATCH: _list(event)},
            refusals=(*READING, *RUNNING),
        ),
    )


def _v1(instances: Schema) -> Routes:
    card: dict[str, Schema] = {"id": _STRING, "object": {"enum": ["model"]}, "created": _COUNT, "owned_by": _STRING}
    listed = _object({"object": {"enum": ["list"]}, "data": _list(_object(card)), "models": _list(_STRING)})
    yield "/v1/models", "get", _operation("The models: one", {JSON: listed})
    yield (
        "/v1/models/{model}",
        "get",
        _operation("The model", {JSON: _object({"name": _STRING, "ready": _BOOLEAN, **card})}, refusals=[404]),
    )
    yield (
        "/v1/models/{model}:predict",
        "post",
        _operation(
            "One prediction for each instance",
            {JSON: _object({"predictions": _list(least=1)})},
            body={JSON: instances},
            refusals=(*READING, 404, *RUNNING),
        ),
    )


def _openai(name: str, bodies: schemas.Bodies) -> Routes:
    usage = _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT})
    vector = _object({"object": {"enum": ["embedding"]}, "index": _COUNT, "embedding": {"anyOf": [_list(_NUMBER), _STRING]}})
    head: dict[str, Schema] = {"id": _STRING, "created": _COUNT, "model": {"enum": [name]}}
    choice: dict[str, Schema] = {"index": _COUNT, "finish_reason": _STRING}
    message = _object({"role": {"enum": ["assistant"]}, "content": _STRING})
    embedded = _object({"object": {"enum": ["list"]}, "data": _list(vector, 1), "model": {"enum": [name]}, "usage": usage})
    completed = _object(
        {**head, "object": {"enum": ["text_completion"]}, "choices": _list(_object({**choice, "text": _STRING}), 1), "usage": usage}
    )
    chatted = _object(
        {**head, "object": {"enum": ["chat.completion"]}, "choices": _list(_object({**choice, "message": message}), 1), "usage": usage}
    )
    streamed = {SSE: {"description": 'With "stream": true: chunks as server-sent events, then `[DONE]`.'}}
    for path, summary, body, answer in (
        ("embeddings", "A vector for each text", schemas.EMBEDDINGS, {JSON: embedded}),
        ("completions", "Go on with a text", bodies.completions, {JSON: completed, **streamed}),
        ("chat/completions", "The next message of a chat", bodies.chat, {JSON: chatted, **streamed}),
    ):
        model = {**body["properties"]["model"], "enum": [name]}
        body = {**body, "properties": {**body["properties"], "model": model}}
        yield (
            f"/v1/{path}",
            "post",
            _operation(summary, answer, body={JSON: body}, refusals=(*READING, 404, *RUNNING), error="OpenAIError"),
        )


def _v2() -> Routes:
    text_in = _object({"text_input": _STRING}, {"parameters": _PARAMETERS})
    text_out = _object({"model_name": _STRING, "model_version": _STRING, "text_output": {}})
    tensor, calls = _ref("schemas", "Tensor"), (*READING, 404, *RUNNING)
    flags = {"binary_data": _BOOLEAN, "binary_data_size": {}, "classification": {"enum": [0]}, "content_type": {}, "headers": {}}
    output = _object({"name": _STRING}, {"parameters": _object({}, flags, additionalProperties=False)}, additionalProperties=False)
    named: dict[str, Schema] = {"model_name": {}, "model_version": {}}
    infer = _object(
        {"inputs": _list(tensor, 1)},
        {"id": _STRING, "parameters": _PARAMETERS, "outputs": _list(output), **named},
        additionalProperties=False,
    )
    inferred = _object({"model_name": _STRING, "model_version": _STRING, "outputs": _list(tensor)}, {"id": _STRING})
    spec = _object({"name": _STRING, "datatype": _STRING, "shape": _list({"type": "integer"})})
    model = _object({"name": _STRING, "versions": _list(_STRING), "platform": _STRING, "inputs": _list(spec), "outputs": _list(spec)})
    ready = _object({"name": _STRING, "ready": _BOOLEAN})

    def operation(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return _operation(*args, **kwargs, error="V2Error")

    yield "/v2", "get", operation("The server", {JSON: _object({"name": _STRING, "version": _STRING, "extensions": _list(_STRING)})})
    for word in ("live", "ready"):
        health = _object({word: _BOOLEAN})
        yield f"/v2/health/{word}", "get", operation(f"Whether the server is {word}", {JSON: health}, also={503: health})
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        yield path, "get", operation("The model and its tensors", {JSON: model}, refusals=(404, 503))
        yield f"{path}/ready", "get", operation("Whether the model is ready", {JSON: ready}, also={503: ready}, refusals=[404])
        yield (
            f"{path}/infer",
            "post",
            operation("One row out for each row in", {JSON: inferred, BINARY: {}}, body={JSON: infer}, refusals=calls),
        )
        yield f"{path}/generate", "post", operation("Go on with a text", {JSON: text_out}, body={JSON: text_in}, refusals=calls)
        yield (
            f"{path}/generate_stream",
            "post",
            operation(
                "The same, piece by piece",
                {SSE: {"description": "Each event is an answer whose text is a piece."}},
                body={JSON: text_in},
                refusals=calls,
            ),
        )


_SCHEMAS: dict[str, Schema] = {
    "Error": _object({"error": _object({"type": _STRING, "message": _STRING})}),
    "V2Error": _object({"error": _STRING}),
    "OpenAIError": _object(
        {
            "error": _object(
                {"message": _STRING, "type": _STRING, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}
            )
        }
    ),
    "Status": _object(
        {
            "phase": {"enum": ["importing", "restoring", "loading", "warming", "ready", "failed", "tripped", "draining"]},
            "restored_bytes": _COUNT,
            "total_bytes": _COUNT,
            "stages": {"type": "object", "additionalProperties": _NUMBER},
        }
    ),
    "Event": _object(
        {"specversion": {"enum": ["1.0"]}, "id": _ATTRIBUTE, "source": _ATTRIBUTE, "type": _ATTRIBUTE},
        {"data": {}, "datacontenttype": {"enum": [JSON]}, "subject": _ATTRIBUTE},
        propertyNames={"pattern": "^[a-z0-9]+$"},
        additionalProperties={"anyOf": [_ATTRIBUTE, _BOOLEAN]},
        description="A CloudEvent in the JSON format.",
    ),
    "Tensor": _object(
        {
            "name": {"type": "string", "minLength": 1},
            "datatype": {"enum": [*tensors.DATATYPES, "BF16"]},
            "shape": {**_list({"type": "integer", "minimum": 1}, 1), "maxItems": tensors.MAX_DIMENSIONS},
            "data": _list(),
        },
        {"parameters": _PARAMETERS},
        description="`data` is flat, or nested as the shape says. In binary it is behind the JSON instead.",
    ),
}
