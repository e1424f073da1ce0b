"""`POST /`, the function's own URL: JSON in, JSON out."""

from typing import Any

import flask

from function.http import Function, reply
from function.protocols.v1 import instances


def add_routes(app: flask.Flask, function: Function) -> None:
    """Add `POST /`."""

    @app.post("/")
    def call() -> flask.Response:
        return reply(answer(function, function.json_body()))


def answer(function: Function, document: Any) -> Any:
    """{"instances": [...]} is answered as in V1; any other value is one input, answered bare."""
    if isinstance(document, dict) and "instances" in document:
        return {"predictions": function.predict(instances(document))}
    return function.predict([document])[0]
