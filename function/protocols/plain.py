"""`POST /`, the function's own URL: JSON in, JSON out; or events; or the bytes of an image and the like, for an agent that takes them."""

import os

import flask

from function.http import Function, PredictRoute, reply
from function.protocols import cloudevents, raw
from function.protocols.events import Events
from function.protocols.v1 import of_value


def add_routes(app: flask.Flask, function: Function) -> None:
    """Add `POST /`."""
    function.predictions["/"] = PredictRoute("/", of_value)
    answers = Events(function, cloudevents.own_source(function.settings.model_name, os.environ.get("K_SERVICE")))

    @app.post("/")
    def call() -> flask.Response:
        if cloudevents.are_here(flask.request):
            return answers.answer()
        asked = raw.of_body(function) or of_value(function.json_body())
        return reply(asked.answer(function.predict(asked)))
