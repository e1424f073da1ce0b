"""The V1 protocol of KServe and TensorFlow Serving: {"instances": [...]} → {"predictions": [...]}."""

from typing import Any

import flask

from function.errors import BadInput, HttpError
from function.http import Function, PredictRequest, PredictRoute, reply

# "signature_name" is what clients of TensorFlow Serving send besides.
_KNOWN = ("instances", "parameters", "signature_name")


def add_routes(app: flask.Flask, function: Function) -> None:
    """Add `/v1/models…`."""
    name = function.settings.model_name
    predictions = "/v1/models/<path:wanted>:predict"  # a name may have slashes
    function.predictions[f"/v1/models/{name}:predict"] = PredictRoute(predictions, of_instances)
    card = {"id": name, "object": "model", "created": 0, "owned_by": "relight"}

    @app.get("/v1/models")
    def v1_models() -> flask.Response:
        return reply({"object": "list", "data": [card], "models": [name]})

    @app.get("/v1/models/<path:wanted>")
    def v1_model(wanted: str) -> flask.Response:
        if wanted.endswith(":predict"):
            raise HttpError(405, "method_not_allowed", f"GET {flask.request.path!s:.200}: it is asked for with POST", {"Allow": "POST"})
        function.known(wanted)
        return reply({"name": name, "ready": function.model.phase == "ready", **card})

    @app.post(predictions)
    def v1_predict(wanted: str) -> flask.Response:
        function.known(wanted)
        asked = of_instances(function.json_body())
        return reply(asked.answer(function.predict(asked)))


def of_instances(document: Any) -> PredictRequest:
    """What a V1 body asks. Raises BadInput."""
    found = document.get("instances") if isinstance(document, dict) else None
    if not isinstance(found, list):
        raise BadInput('the body must be {"instances": [...]} with one input an item; "instances" is missing or not a list')
    if not found:
        raise BadInput('"instances" is empty')
    parameters = document.get("parameters")
    if not isinstance(parameters, dict | None):
        raise BadInput('"parameters" must be an object')
    if others := [name for name in document if name not in _KNOWN]:
        raise BadInput(f'{others[0]!r:.100} is not understood beside "instances"; known is "parameters", for agents that take them')
    if document.get("signature_name") not in (None, "", "serving_default"):
        raise BadInput('"signature_name" must be "serving_default": there is no other signature')
    return PredictRequest(found, is_bare=False, parameters=parameters)


def of_value(document: Any) -> PredictRequest:
    """What any JSON value asks: {"instances": [...]} as in V1, everything else is one input. Raises BadInput."""
    if isinstance(document, dict) and "instances" in document:
        return of_instances(document)
    return PredictRequest([document], is_bare=True)
