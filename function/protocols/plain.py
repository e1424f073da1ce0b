"""`POST /`, the function's own URL: JSON in, JSON out; or events."""

import os

import flask

from function.http import Function, reply
from function.protocols import events
from function.protocols.events import Question


def add_routes(app: flask.Flask, function: Function) -> None:
    """Add `POST /`."""
    source = events.own_source(function.settings.model_name, os.environ.get("K_SERVICE"))

    @app.post("/")
    def call() -> flask.Response:
        if events.are_here(flask.request):
            return events.answer(function, source)
        question = Question.of(function.json_body())
        return reply(question.answer(function.predict(question.inputs)))
