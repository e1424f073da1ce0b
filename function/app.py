"""The HTTP face of the function: parse, hand to the model, answer."""

import logging
import time
from typing import Any

import flask
import orjson
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from function.errors import BadInput, FunctionError, NotFound, TooLarge, UnsupportedMediaType
from function.metrics import Metrics
from function.model import Model
from function.settings import FunctionSettings

log = logging.getLogger("relight.function")


def create_app(settings: FunctionSettings, model: Model) -> flask.Flask:
    """The Flask app for one model."""
    app = flask.Flask("function", static_folder=None)
    metrics = Metrics(model, settings.model_name)

    @app.post("/")
    def call() -> flask.Response:
        document = _json_body(settings.max_body_bytes)
        if isinstance(document, dict) and "instances" in document:
            return _reply({"predictions": predict(_instances(document))})
        return _reply(predict([document])[0])

    @app.post("/v1/models/<name>:predict")
    def v1_predict(name: str) -> flask.Response:
        known(name)
        return _reply({"predictions": predict(_instances(_json_body(settings.max_body_bytes)))})

    @app.get("/v1/models")
    def v1_models() -> flask.Response:
        return _reply({"models": [settings.model_name]})

    @app.get("/v1/models/<name>")
    def v1_model(name: str) -> flask.Response:
        if name.endswith(":predict"):
            raise MethodNotAllowed(["POST"], "a prediction is asked for with POST")
        known(name)
        return _reply({"name": name, "ready": model.phase == "ready"})

    @app.get("/healthz")
    def healthz() -> flask.Response:
        return _reply({"status": "ok"})

    @app.get("/readyz")
    def readyz() -> flask.Response:
        status = model.status()
        return _reply(status, 200 if status["phase"] == "ready" else 503)

    @app.get("/metrics")
    def prometheus() -> flask.Response:
        return flask.Response(metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")

    def known(name: str) -> None:
        if name != settings.model_name:
            raise NotFound(f"there is no model {name!r} here; this function serves {settings.model_name!r}")

    def predict(inputs: list[Any]) -> list[Any]:
        metrics.instances.inc(len(inputs))
        return list(model.predict(inputs))

    @app.before_request
    def begin() -> None:
        flask.g.began = time.perf_counter()

    @app.after_request
    def count(response: flask.Response) -> flask.Response:
        route = flask.request.url_rule.rule if flask.request.url_rule else "none"
        metrics.requests.labels(route, str(response.status_code)).inc()
        metrics.seconds.labels(route).observe(time.perf_counter() - flask.g.began)
        return response

    @app.errorhandler(FunctionError)
    def ours(error: FunctionError) -> flask.Response:
        response = _error(error.status, error.type, str(error))
        if error.retry_after_s is not None:
            response.headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
        if isinstance(error, TooLarge):
            response.headers["Connection"] = "close"  # the rest of the body is not read
        return response

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> flask.Response:
        path, method = flask.request.path, flask.request.method
        if error.code == 404:
            return _error(404, "not_found", f"there is no route {path!r}; POST / or /v1/models/{settings.model_name}:predict")
        response = _error(error.code or 500, (error.name or "error").lower().replace(" ", "_"), f"{method} {path}: {error.description}")
        if allowed := getattr(error, "valid_methods", None):
            response.headers["Allow"] = ", ".join(allowed)
        return response

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> flask.Response:
        log.error("%s %s failed", flask.request.method, flask.request.path, exc_info=error)
        return _error(500, "internal_error", "the function failed on this request; its log says why")

    return app


def _json_body(limit: int) -> Any:
    """The request's body, parsed.

    Reads one byte past the limit instead of trusting Content-Length: a chunked body has none.
    """
    request = flask.request
    if request.mimetype and request.mimetype != "application/json" and not request.mimetype.endswith("+json"):
        raise UnsupportedMediaType(
            f"a body of type {request.mimetype!r} is not understood here; send JSON with Content-Type: application/json"
        )
    length = request.content_length or 0
    body = request.stream.read(limit + 1) if length <= limit else b""
    if max(length, len(body)) > limit:
        raise TooLarge(f"the body is larger than {limit} bytes (FUNCTION_MAX_BODY_BYTES)")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"the body is not JSON: {error}") from None


def _instances(document: Any) -> list[Any]:
    instances = document.get("instances") if isinstance(document, dict) else None
    if not isinstance(instances, list):
        raise BadInput('the body must be {"instances": [...]} with one input an item; "instances" is missing or not a list')
    if not instances:
        raise BadInput('"instances" is empty')
    return instances


def _reply(document: Any, status: int = 200) -> flask.Response:
    try:
        body = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:
        raise TypeError(f"the agent's output is not JSON: {error}") from error
    return flask.Response(body, status, content_type="application/json")


def _error(status: int, kind: str, message: str) -> flask.Response:
    return _reply({"error": {"type": kind, "message": message}}, status)
