"""The HTTP face of the function: the protocols' routes, health, metrics, and what an error looks like."""

import flask
from werkzeug.exceptions import HTTPException

from function.access import Access, Trace
from function.bodies import ParseBudget
from function.cors import Cors
from function.error_shapes import OPENAI_PATHS
from function.errors import HttpError, NotFound
from function.fast_path import FastPath
from function.gate import Gate
from function.http import Function, failure, reply
from function.metrics import Metrics
from function.model import Model
from function.protocols import openai, openapi, plain, v1, v2
from function.settings import FunctionSettings


def create_app(settings: FunctionSettings, model: Model, metrics: Metrics | None = None) -> flask.Flask:
    """The Flask app for one model. metrics: those that it counts in; of its own by default."""
    return create(settings, model, metrics or Metrics(model, settings.model_name))[0]


def create(settings: FunctionSettings, model: Model, metrics: Metrics, trace: Trace | None = None) -> tuple[flask.Flask, FastPath]:
    """The app, and what answers ordinary requests without it, by the same rules. trace: who wants to know of each request."""
    app = flask.Flask("function", static_folder=None)
    app.url_map.merge_slashes = False  # a path is one that is known, or a 404; never a redirect
    budget = ParseBudget.for_bodies_of(settings.max_body_bytes)
    function, gate = Function(settings, model, metrics, budget), Gate(settings)
    access = Access(metrics, Cors(settings.cors_origins), is_logged=settings.access_log, trace=trace)
    access.watch(app)
    for protocol in (plain, v1, v2, openai, openapi):
        protocol.add_routes(app, function)
    if gate.may_wait("/"):
        del function.predictions["/"]  # it has to have a thread, which may wait for the issuer of tokens

    @app.get("/healthz")
    def healthz() -> flask.Response:
        if model.is_alive():
            return reply({"status": "ok"})
        raise HttpError(
            503, "stuck", f"a call of the model has not come back for more than twice FUNCTION_TIMEOUT_S={settings.timeout_s:g}"
        )

    @app.get("/readyz")
    def readyz() -> flask.Response:
        return reply(model.status(), 200 if model.wants_calls() else 503)

    @app.get("/metrics")
    def prometheus() -> flask.Response:
        return flask.Response(metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")

    @app.before_request
    def authorize() -> None:
        request = flask.request
        flask.g.caller = gate.check(request.path, request.headers.get("Authorization", ""), method=request.method)

    @app.teardown_request
    def release(_: BaseException | None) -> None:
        for reservation in flask.g.pop("reservations", ()):
            reservation.release()

    @app.errorhandler(HTTPException)
    def routing(error: HTTPException) -> flask.Response:
        path, method = flask.request.path, flask.request.method
        if error.code == 404:
            known = f"POST / or /v1/models/{settings.model_name}:predict"
            if path.startswith("/v1/") and not path.startswith("/v1/models"):  # OpenAI has more of them
                known = f"of OpenAI's there are {', '.join(OPENAI_PATHS)} and /v1/models; besides, {known}"
            return failure(NotFound(f"there is no route {path!r:.200}; {known}"), method, path)
        kind = (error.name or "error").lower().replace(" ", "_")
        allowed = getattr(error, "valid_methods", None)
        headers = {"Allow": ", ".join(allowed)} if allowed else {}
        said = f"it is asked for with {headers['Allow']}" if allowed else error.description
        return failure(HttpError(error.code or 500, kind, f"{method} {path!s:.200}: {said}", headers), method, path)

    @app.errorhandler(Exception)
    def other(error: Exception) -> flask.Response:
        return failure(error, flask.request.method, flask.request.path)

    return app, FastPath(function, access, gate, {"/healthz": healthz, "/readyz": readyz})
