"""The HTTP face of the function: the protocols' routes, health, metrics, and what an error looks like."""

import flask
from werkzeug.exceptions import HTTPException

from function.access import Access, Trace
from function.fast_path import FastPath
from function.gate import Gate
from function.http import Function, failure, refusal, reply
from function.metrics import Metrics
from function.model import Model
from function.protocols import openai, openapi, plain, v1, v2
from function.protocols.cloudevents import are_here
from function.settings import FunctionSettings


def create_app(settings: FunctionSettings, model: Model, metrics: Metrics | None = None) -> flask.Flask:
    """The Flask app for one model. metrics: those that it counts in; of its own by default."""
    return create(settings, model, metrics or Metrics(model, settings.model_name))[0]


def create(settings: FunctionSettings, model: Model, metrics: Metrics, trace: Trace | None = None) -> tuple[flask.Flask, FastPath]:
    """The app, and what answers ordinary requests without it, by the same rules. trace: who wants to know of each request."""
    app = flask.Flask("function", static_folder=None)
    function, gate = Function(settings, model, metrics), Gate(settings)
    access = Access(metrics, is_logged=settings.access_log, trace=trace)
    access.watch(app)
    for protocol in (plain, v1, v2, openai, openapi):
        protocol.add_routes(app, function)

    @app.get("/healthz")
    def healthz() -> flask.Response:
        if model.is_alive():
            return reply({"status": "ok"})
        return refusal(503, "stuck", f"a call of the model has not come back for more than twice FUNCTION_TIMEOUT_S={settings.timeout_s:g}")

    @app.get("/readyz")
    def readyz() -> flask.Response:
        status = model.status()
        return reply(status, 200 if status["phase"] == "ready" else 503)

    @app.get("/metrics")
    def prometheus() -> flask.Response:
        return flask.Response(metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")

    @app.before_request
    def authorize() -> None:
        request = flask.request
        is_event = request.url_rule is not None and request.url_rule.rule == "/" and are_here(request)
        gate.check(request.path, request.headers.get("Authorization", ""), is_event=is_event)

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> flask.Response:
        path, method = flask.request.path, flask.request.method
        if error.code == 404:
            return refusal(404, "not_found", f"there is no route {path!r}; POST / or /v1/models/{settings.model_name}:predict")
        response = refusal(error.code or 500, (error.name or "error").lower().replace(" ", "_"), f"{method} {path}: {error.description}")
        if allowed := getattr(error, "valid_methods", None):
            response.headers["Allow"] = ", ".join(allowed)
        return response

    @app.errorhandler(Exception)
    def other(error: Exception) -> flask.Response:
        return failure(error, flask.request.method, flask.request.path)

    return app, FastPath(function, access, gate, {"/healthz": healthz, "/readyz": readyz})
