"""The V1 protocol of KServe and TensorFlow Serving: {"instances": [...]} → {"predictions": [...]}."""

from typing import Any

import flask
from werkzeug.exceptions import MethodNotAllowed

from function.errors import BadInput
from function.http import Function, PredictRequest, PredictRoute, reply


def add_routes(app: flask.Flask, function: Function) -> None:
    """Add `/v1/models…`."""
    name = function.settings.model_name
    predictions = "/v1/models/<wanted>:predict"
    function.predictions[predictions.replace("<wanted>", name)] = PredictRoute(predictions, of_instances)
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

    @app.post(predictions)
    def v1_predict(wanted: str) -> flask.Response:
        function.known(wanted)
        asked = of_instances(function.json_body())
        return reply(asked.answer(function.predict(asked.inputs)))


def of_instances(document: Any) -> PredictRequest:
    """What a V1 body asks. Raises BadInput."""
    found = document.get("instances") if isinstance(document, dict) else None
    if not isinstance(found, list):
        raise BadInput('the body must be {"instances": [...]} with one input an item; "instances" is missing or not a list')
    if not found:
        raise BadInput('"instances" is empty')
    return PredictRequest(found, is_bare=False)


def of_value(document: Any) -> PredictRequest:
    """What any JSON value asks: {"instances": [...]} as in V1, everything else is one input. Raises BadInput."""
    if isinstance(document, dict) and "instances" in document:
        return of_instances(document)
    return PredictRequest([document], is_bare=True)
