"""The V1 protocol of KServe and TensorFlow Serving: {"instances": [...]} → {"predictions": [...]}."""

from typing import Any

import flask
from werkzeug.exceptions import MethodNotAllowed

from function.errors import BadInput
from function.http import Function, reply


def add_routes(app: flask.Flask, function: Function) -> None:
    """Add `/v1/models…`."""
    name = function.settings.model_name
    card = {"id": name, "object": "model", "created": 0, "owned_by": "relight"}

    @app.get("/v1/models")
    def v1_models() -> flask.Response:
        return reply({"object": "list", "data": [card], "models": [name]})

    @app.get("/v1/models/<wanted>")
    def v1_model(wanted: str) -> flask.Response:
        if wanted.endswith(":predict"):
            raise MethodNotAllowed(["POST"], "a prediction is asked for with POST")
        function.known(wanted)
        return reply({"name": name, "ready": function.model.phase == "ready", **card})

    @app.post("/v1/models/<wanted>:predict")
    def v1_predict(wanted: str) -> flask.Response:
        function.known(wanted)
        return reply({"predictions": function.predict(instances(function.json_body()))})


def instances(document: Any) -> list[Any]:
    """The inputs in a V1 body. Raises BadInput."""
    found = document.get("instances") if isinstance(document, dict) else None
    if not isinstance(found, list):
        raise BadInput('the body must be {"instances": [...]} with one input an item; "instances" is missing or not a list')
    if not found:
        raise BadInput('"instances" is empty')
    return found
