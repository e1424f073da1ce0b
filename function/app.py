"""The HTTP face of the function: the protocols' routes, health, metrics, and what an error looks like."""

import logging

import flask
from werkzeug.exceptions import HTTPException

from function.access import Access
from function.errors import FunctionError, TooLarge, TooSlow, Unauthorized
from function.http import Function, refusal, reply
from function.keys import Keys
from function.metrics import Metrics
from function.model import Model
from function.protocols import openai, openapi, plain, v1, v2
from function.protocols.events import are_here
from function.settings import FunctionSettings

OPEN = ("/healthz", "/readyz")  # need no key

log = logging.getLogger("relight.function")


def create_app(settings: FunctionSettings, model: Model, metrics: Metrics | None = None) -> flask.Flask:
    """The Flask app for one model. metrics: those that it counts in; of its own by default."""
    app = flask.Flask("function", static_folder=None)
    metrics = metrics or Metrics(model, settings.model_name)
    function = Function(settings, model, metrics)
    Access(app, metrics, is_logged=settings.access_log)
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

    keys = Keys(settings.api_keys_file) if settings.api_keys_file else None
    senders = None
    if settings.oidc_audience:
        from function.oidc import Senders  # an extra, which not every function has

        senders = Senders(settings)
    if keys or senders:

        @app.before_request
        def authorize() -> None:
            request = flask.request
            authorization = request.headers.get("Authorization", "")
            if senders and request.url_rule and request.url_rule.rule == "/" and are_here(request):
                if not keys or not _has_key(keys, authorization):
                    senders.check(authorization)
            elif keys and request.path not in OPEN:
                keys.check(authorization)

    @app.errorhandler(FunctionError)
    def ours(error: FunctionError) -> flask.Response:
        response = refusal(error.status, error.type, str(error), error.retry_after_s)
        if isinstance(error, Unauthorized):
            response.headers["WWW-Authenticate"] = "Bearer"
        if isinstance(error, TooLarge | TooSlow):
            response.headers["Connection"] = "close"  # the rest of the body is not read
        return response

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
    def unexpected(error: Exception) -> flask.Response:
        log.error("%s %s failed", flask.request.method, flask.request.path, exc_info=error)
        return refusal(500, "internal_error", "the function failed on this request; its log says why")

    return app


def _has_key(keys: Keys, authorization: str) -> bool:
    try:
        keys.check(authorization)
    except Unauthorized:
        return False
    return True
