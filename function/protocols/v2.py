"""The Open Inference Protocol (KServe's V2, Triton's), with binary tensor data and the generate extension.

One row of the input tensors is one input of the agent; its outputs become the rows of the output tensors.
"""

import functools
import io
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import flask

from function.agent import TensorSpec
from function.errors import BadInput, HttpError, NotFound, Unavailable, UnsupportedMediaType
from function.guarded_agent import Traits, to_function_error
from function.http import Function, PredictRequest, events, reply
from function.protocols import tensors
from function.protocols.tensors import Tensor
from function.values import dumps

VERSION = "1"  # of the model; there is never another beside it
HEADER_LENGTH = "Inference-Header-Content-Length"
# The last two are hints that MLServer's clients send along.
_OF_PROTOCOL = ("binary_data_output", "binary_data_size", "content_type", "headers")
_OF_OUTPUTS = ("binary_data", "binary_data_size", "classification", "content_type", "headers")
_OF_REQUEST = ("id", "inputs", "outputs", "parameters", "model_name", "model_version")  # the last two are KServe's client's
_COPIED_AT_ONCE = 1 << 20  # bytes
_ACTIONS = ("/infer", "/generate", "/generate_stream")  # no model's name ends so
_ANY_INPUT, _ANY_OUTPUT = list(Traits().inputs), list(Traits().outputs)  # what the model says for an agent that declares nothing


def add_routes(app: flask.Flask, function: Function) -> None:
    """Add `/v2…`."""
    model = function.model

    @app.get("/v2")
    def v2_server() -> flask.Response:
        return reply({"name": "relight", "version": _version(), "extensions": ["binary_tensor_data", "generate"]})

    @app.get("/v2/health/live")
    def v2_live() -> flask.Response:
        is_live = model.is_alive()
        return reply({"live": is_live}, 200 if is_live else 503)

    @app.get("/v2/health/ready")
    def v2_ready() -> flask.Response:
        is_ready = model.phase == "ready"
        return reply({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/v2/models/<path:name>")
    @app.get("/v2/models/<path:name>/versions/<version>")
    def v2_model(name: str, version: str = VERSION) -> flask.Response:
        if name.endswith(_ACTIONS):
            raise HttpError(405, "method_not_allowed", f"GET {flask.request.path!s:.200}: it is asked for with POST", {"Allow": "POST"})
        _known(function, name, version)
        if model.phase in ("importing", "restoring", "loading"):
            raise Unavailable(f"what the model takes is not known yet ({model.phase})", retry_after_s=1)
        described = {"inputs": _described(model.traits.inputs), "outputs": _described(model.traits.outputs)}
        return reply({"name": name, "versions": [VERSION], "platform": "relight", **described})

    @app.get("/v2/models/<path:name>/ready")
    @app.get("/v2/models/<path:name>/versions/<version>/ready")
    def v2_model_ready(name: str, version: str = VERSION) -> flask.Response:
        _known(function, name, version)
        is_ready = model.phase == "ready"
        return reply({"name": name, "ready": is_ready}, 200 if is_ready else 503)

    @app.post("/v2/models/<path:name>/infer")
    @app.post("/v2/models/<path:name>/versions/<version>/infer")
    def v2_infer(name: str, version: str = VERSION) -> flask.Response:
        _known(function, name, version)
        return infer(function)

    @app.post("/v2/models/<path:name>/generate")
    @app.post("/v2/models/<path:name>/versions/<version>/generate")
    def v2_generate(name: str, version: str = VERSION) -> flask.Response:
        _known(function, name, version)
        return reply(_text_output(name, generate(function, _prompt(function.json_object()))))

    @app.post("/v2/models/<path:name>/generate_stream")
    @app.post("/v2/models/<path:name>/versions/<version>/generate_stream")
    def v2_generate_stream(name: str, version: str = VERSION) -> flask.Response:
        _known(function, name, version)
        stream = function.stream(_prompt(function.json_object()))
        return events(stream, lambda piece: _text_output(name, piece))


def infer(function: Function) -> flask.Response:
    """The answer to an inference request. Raises what Function.predict does, and BadInput."""
    document, binary = _read(function)
    _check_names(document, _OF_REQUEST, "the request")
    wanted = document.get("outputs") or []
    if not isinstance(wanted, list):
        raise BadInput('"outputs" must be a list')
    is_binary = _asked(tensors.parameters(document, "the request"), "binary_data_output", default=False)
    outputs_said = list(function.model.traits.outputs)
    in_binary = _wanted(wanted, [spec.name for spec in outputs_said], is_binary)
    request_id = document.get("id", "")
    if not isinstance(request_id, str):
        raise BadInput('"id" must be a string')

    given = tensors.read(document.get("inputs"), binary)
    inputs_said = list(function.model.traits.inputs)
    if inputs_said != _ANY_INPUT:
        tensors.fit(given, inputs_said)
    if given[0].shape[0] > function.settings.max_inputs:
        raise function.too_many(given[0].shape[0])
    rows = tensors.rows(given, as_arrays=function.model.traits.takes_arrays)
    outputs = function.predict(PredictRequest(rows, is_bare=False, parameters=_for_agent(document)))
    found = {tensor.name: tensor for tensor in _outputs(outputs, outputs_said)}

    head = {"model_name": function.settings.model_name, "model_version": VERSION} | ({"id": request_id} if request_id else {})
    return _answer(head, [(found[name], as_bytes) for name, as_bytes in in_binary.items()])


def _for_agent(document: dict[str, Any]) -> dict[str, Any] | None:
    """The parameters of the request and of its tensors that are not the protocol's own, as one. Raises BadInput if they disagree."""
    found: dict[str, Any] = {}
    for index, entry in enumerate([document, *document["inputs"]]):
        for name, value in tensors.parameters(entry, f"inputs[{index - 1}]" if index else "the request").items():
            if name in _OF_PROTOCOL:
                continue
            if name in found and found[name] != value:
                raise BadInput(f"the parameter {name!r:.100} is said twice, with different values")
            found[name] = value
    return found or None


def generate(function: Function, item: dict[str, Any]) -> Any:
    """The whole answer to one prompt, made among the streams where the agent can stream, so that it shares their forward passes.

    Raises what Function.predict and Function.stream do.
    """
    if not function.model.traits.can_stream:
        said = item["parameters"] if function.model.traits.takes_parameters else None  # they are in the item, too
        return function.predict(PredictRequest([item], is_bare=True, parameters=said))[0]
    pieces = function.stream(item).whole("the answer was not complete within {} s; ask for a stream, or for less")
    return "".join(pieces) if all(isinstance(piece, str) for piece in pieces) else pieces


def _known(function: Function, name: str, version: str) -> None:
    if name.startswith(function.settings.model_name + "/"):
        raise NotFound(f"there is no route {flask.request.path!r:.200}; this model has infer, generate, generate_stream and ready")
    function.known(name)
    if version != VERSION:
        raise NotFound(f"there is no version {version!r} of model {name!r} here, only {VERSION!r}")


@functools.cache
def _version() -> str:
    try:
        return metadata.version("relight")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "0"


def _described(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in specs]


def _read(function: Function) -> tuple[dict[str, Any], memoryview | None]:
    """The request's JSON, and the bytes behind it, None if it does not say where the JSON ends."""
    said = flask.request.headers.get(HEADER_LENGTH)
    if said is None:
        return function.json_object(), None
    kind = flask.request.mimetype
    if kind and kind not in ("application/octet-stream", "application/json"):
        raise UnsupportedMediaType(f"a body of type {kind!r} is not understood here; send binary data as application/octet-stream")
    body = function.body()
    if not (said.isascii() and said.isdigit()) or len(said) > 18 or int(said) > len(body):
        raise BadInput(f"{HEADER_LENGTH}: {said[:40]!r} is not a length within the body's {len(body)} bytes")
    document = function.parse(body[: int(said)])
    if not isinstance(document, dict):
        raise BadInput("the JSON before the binary data must be an object")
    return document, memoryview(body)[int(said) :]


def _wanted(entries: list[Any], known: list[str], is_binary: bool) -> dict[str, bool]:
    """The names of the outputs to send, and whether each is wanted in binary."""
    if not entries:
        return dict.fromkeys(known, is_binary)
    names: list[str] = []
    in_binary: list[bool] = []
    for index, entry in enumerate(entries):
        where = f"outputs[{index}]"
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise BadInput(f'{where} must be an object with "name", a string')
        if name not in known:
            raise BadInput(f"{where}: there is no output {name[:100]!r}; this model has {', '.join(map(repr, known))}")
        asked = tensors.parameters(entry, where)
        _check_names(entry, ("name", "parameters"), where)
        _check_names(asked, _OF_OUTPUTS, f'{where}: "parameters"')
        if asked.get("classification"):
            raise BadInput(f"{where}: classification is not supported")
        names.append(name)
        in_binary.append(_asked(asked, "binary_data", default=is_binary))
    tensors.once(names, "outputs")
    return dict(zip(names, in_binary, strict=True))


def _check_names(entry: dict[str, Any], known: Sequence[str], where: str) -> None:
    """Raises BadInput for what would be dropped in silence."""
    if others := [name for name in entry if name not in known]:
        raise BadInput(f"{where}: {others[0]!r:.100} is not understood; known are {', '.join(known)}")


def _asked(parameters: dict[str, Any], name: str, *, default: bool) -> bool:
    found = parameters.get(name, default)
    if not isinstance(found, bool):
        raise BadInput(f'the parameter "{name}" must be true or false')
    return found


def _outputs(outputs: list[Any], specs: Sequence[TensorSpec]) -> list[Tensor]:
    """The agent's outputs as tensors. Raises AgentFailed if they are not what the agent declares."""
    if specs == _ANY_OUTPUT:
        return [tensors.inferred("output", outputs)]
    try:
        if len(specs) == 1:
            return [tensors.from_outputs(outputs, specs[0])]
        names = [spec.name for spec in specs]
        for output in outputs:
            if not isinstance(output, dict) or not output.keys() >= set(names):
                has = list(output) if isinstance(output, dict) else f"a {type(output).__name__}"
                raise ValueError(f"the agent declares the outputs {names}, and gave {has!s:.200}")
        return [tensors.from_outputs([output[spec.name] for output in outputs], spec) for spec in specs]
    except ValueError as error:
        raise to_function_error(error) from error


def _answer(head: dict[str, Any], outputs: list[tuple[Tensor, bool]]) -> flask.Response:
    """The reply with these tensors, each as JSON or in binary."""
    documents: list[dict[str, Any]] = []
    binary: list[bytes | memoryview] = []
    for tensor, as_bytes in outputs:
        if as_bytes:
            binary.append(tensor.to_bytes())
            documents.append({**tensor.document(), "parameters": {"binary_data_size": len(binary[-1])}})
        else:
            documents.append({**tensor.document(), "data": tensor.data()})
    text = dumps({**head, "outputs": documents})
    if not binary:
        return flask.Response(text, content_type="application/json")
    return flask.Response(_joined([text, *binary]), content_type="application/octet-stream", headers={HEADER_LENGTH: str(len(text))})


def _joined(parts: Sequence[bytes | memoryview]) -> bytes:
    """As `b"".join`, which would keep the interpreter to itself for as long as it takes to copy all of it."""
    out = io.BytesIO()
    for part in parts:
        for at in range(0, len(part), _COPIED_AT_ONCE):
            out.write(memoryview(part)[at : at + _COPIED_AT_ONCE])
    return out.getvalue()


def _prompt(document: dict[str, Any]) -> dict[str, Any]:
    """What the agent is handed. Properties beside "parameters" are parameters too, as the generate extension has it."""
    text = document.get("text_input")
    if not isinstance(text, str):
        raise BadInput('the body must be {"text_input": "...", "parameters": {...}}; "text_input" is missing or not a string')
    beside = {name: value for name, value in document.items() if name not in ("text_input", "parameters", "id")}
    return {"text_input": text, "parameters": beside | tensors.parameters(document, "the request")}


def _text_output(name: str, piece: Any) -> dict[str, Any]:
    return {"model_name": name, "model_version": VERSION, "text_output": piece}
