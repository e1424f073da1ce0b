"""`/openapi.json` is true: it is held against the app by hand, and by schemathesis, which makes requests from it."""

import io
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import flask
import pytest
import schemathesis
from flask.testing import FlaskClient
from hypothesis import HealthCheck, Phase, assume, given, settings
from schemathesis import BaseSchema, Case, GenerationMode
from schemathesis.checks import CheckFunction, load_all_checks, not_a_server_error
from schemathesis.specs.openapi import checks as openapi_checks
from werkzeug.test import TestResponse

from function.agent import BadInput, Weights
from function.app import create_app
from function.errors import TooSlow
from function.guarded_agent import GuardedAgent, Traits
from function.model import Model
from function.protocols.openapi import describe
from function.settings import FunctionSettings
from tests.support import wait_until
from weights_cache.settings import WeightsSettings

EXAMPLES = 10  # of each kind for each route


class Agent:
    """Can do all that there is a route for: a vector for a text, its input for anything else, a piece a letter as a stream."""

    gate = threading.Event()
    sampling_parameters: ClassVar = {"top_k": {"type": "integer", "minimum": 1}, "mode": {"enum": ["a", "b"]}}
    abilities = ("logprobs", "tools", "response_format")

    def load(self, weights: Weights, device: str) -> None:
        pass

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        for item in inputs:
            if item == "bad":
                raise BadInput("'bad' is not a word")
            if item == "crash":
                raise RuntimeError("secret detail")
            if item == "slow":
                Agent.gate.wait(100)
        return [[len(item), 0.5] if isinstance(item, str) else item for item in inputs]

    def start(self, item: Any) -> Iterator[str]:
        text = item["messages"][-1]["content"] if "messages" in item else item.get("prompt", item.get("text_input"))
        self.predict([text])
        return iter(text)

    def step(self, sequences: Sequence[Iterator[str]]) -> list[str | None]:
        return [next(sequence, None) for sequence in sequences]


class Unready(Agent):
    """Loads for as long as a test lasts."""

    may_load = threading.Event()

    def load(self, weights: Weights, device: str) -> None:
        self.may_load.wait(60)


def make_app(folder: Path, agent: str = "Agent", *, is_ready: bool = True, **more: Any) -> flask.Flask:
    found = FunctionSettings(agent=f"{__name__}:{agent}", model_name="m", access_log=False, **more)
    model = Model(found, Weights(WeightsSettings(cache_dir=folder)), started_at=time.monotonic())
    model.start(on_failure=lambda _: None)
    wait_until("as ready as it gets", lambda: model.phase == ("ready" if is_ready else "loading"))
    return create_app(found, model)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> flask.Flask:
    return make_app(tmp_path_factory.mktemp("cache"), max_body_bytes=100_000)


@pytest.fixture(scope="module")
def unready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlaskClient]:
    yield make_app(tmp_path_factory.mktemp("cache"), "Unready", is_ready=False).test_client()
    Unready.may_load.set()


DOCUMENT = describe(FunctionSettings(agent="any:Agent", model_name="m"), GuardedAgent(Agent()).traits())
OPERATIONS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]
CALLS = [path for path, method in OPERATIONS if method == "post"]


def test_the_document_is_served_and_is_openapi_3_1(app: flask.Flask) -> None:
    reply = app.test_client().get("/openapi.json")
    assert (reply.status_code, reply.content_type, reply.json) == (200, "application/json", json.loads(json.dumps(DOCUMENT)))
    schemathesis.openapi.from_dict(DOCUMENT).validate()


def test_what_the_agent_declares_is_in_the_document_and_nothing_else() -> None:
    def properties(document: Any, route: str) -> Any:
        return document["paths"][f"/v1/{route}"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]

    plain = describe(FunctionSettings(agent="any:Agent", model_name="m"), Traits())
    for route in ("completions", "chat/completions"):
        declared, without = properties(DOCUMENT, route), properties(plain, route)
        assert declared["top_k"] == {"description": declared["top_k"]["description"], "type": ["integer", "null"], "minimum": 1}
        assert "top_k" not in without
        assert "enum" not in declared["logprobs"]
        assert without["logprobs"]["enum"] in ([None], [False, None])
    assert properties(DOCUMENT, "chat/completions")["tools"]["type"] == ["array", "null"]
    assert properties(plain, "chat/completions")["tools"]["enum"] == [[], None]


def test_the_headers_that_an_agent_asks_for_are_in_the_document_and_parameters_if_it_takes_them() -> None:
    document = describe(
        FunctionSettings(agent="any:Agent", model_name="m"), Traits(headers=("x-tenant", "priority"), takes_parameters=True)
    )
    assert document["components"]["parameters"]["x-tenant"]["in"] == "header"
    for methods in document["paths"].values():
        for method, operation in methods.items():
            named = [one["$ref"].rpartition("/")[2] for one in operation["parameters"]]
            assert [name for name in named if name.lower() in ("x-tenant", "priority")] == ["Priority", "x-tenant"] * (method == "post")
    body = document["paths"]["/v1/models/{model}:predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["parameters"] == {"type": "object"}
    schemathesis.openapi.from_dict(document).validate()


def test_every_route_of_the_app_is_described_and_no_other(app: flask.Flask) -> None:
    words = {"wanted": "model", "name": "model"}
    found = {
        (re.sub(r"<(?:path:)?(\w+)>", lambda match: f"{{{words.get(match[1], match[1])}}}", rule.rule), method.lower())
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert set(OPERATIONS) == found


def test_where_keys_are_asked_for_the_document_says_so(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    client = make_app(tmp_path, api_keys_file=keys).test_client()
    assert client.get("/openapi.json").status_code == 401
    document = client.get("/openapi.json", headers={"Authorization": "Bearer secret"}).json or {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            status = client.open(path.format(model="m", version="1"), method=method).status_code
            assert ("401" in operation["responses"], "security" in operation) == (status == 401,) * 2, path


# Each status, brought about

BODIES = {
    "/": "{word}",
    "/v1/models/{model}:predict": {"instances": ["{word}"]},
    "/v1/embeddings": {"model": "m", "input": "{word}"},
    "/v1/completions": {"model": "m", "prompt": "{word}"},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "{word}"}]},
    "infer": {"inputs": [{"name": "input", "shape": [1], "datatype": "BYTES", "data": ["{word}"]}]},
    "generate": {"text_input": "{word}"},
    "generate_stream": {"text_input": "{word}"},
}


class Stalled(io.BytesIO):
    """A body that stops coming, as the loop tells it."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise TooSlow("the body did not come in time")


def ask(client: FlaskClient, path: str, word: str = "a", **kwargs: Any) -> TestResponse:
    """A call whose one input is `word`."""
    body = json.dumps(BODIES.get(path) or BODIES[path.rpartition("/")[2]]).replace("{word}", word)
    return client.post(path.format(model="m", version="1"), **{"data": body, "content_type": "application/json", **kwargs})


def too_slow(client: FlaskClient, path: str) -> TestResponse:
    """The answer to one who does not wait for as long as the model takes, however long that is."""
    Agent.gate.clear()
    try:
        return ask(client, path, "slow", headers={"X-Request-Timeout-Ms": "20"})
    finally:
        Agent.gate.set()


@pytest.mark.parametrize("path", CALLS)
def test_each_status_that_is_described_for_a_call_is_what_the_server_gives(app: flask.Flask, unready: FlaskClient, path: str) -> None:
    client = app.test_client()
    found = {
        200: ask(client, path),
        400: ask(client, path, "bad"),
        408: ask(client, path, environ_overrides={"wsgi.input": Stalled(), "wsgi.input_terminated": True}),
        413: ask(client, path, "a" * 100_000),
        415: ask(client, path, content_type="text/csv"),
        500: ask(client, path, "crash"),
        503: ask(unready, path),
        504: too_slow(client, path),
    }
    if "{model}" in path:
        found[404] = client.post(path.format(model="other", version="1"))
    elif path != "/":
        found[404] = client.post(path, json={**BODIES[path], "model": "other"})  # type: ignore[dict-item]
    assert {status: reply.status_code for status, reply in found.items()} == {status: status for status in found}
    assert set(DOCUMENT["paths"][path]["post"]["responses"]) == set(map(str, found))
    for status in set(found) - {200}:
        error = (found[status].json or {})["error"]
        assert error if path.startswith("/v2/") else error["message"]


@pytest.mark.parametrize("path", [path for path, method in OPERATIONS if method == "get"])
def test_each_status_that_is_described_for_a_look_is_what_the_server_gives(app: flask.Flask, unready: FlaskClient, path: str) -> None:
    found = {
        client.get(path.format(model=name, version="1")).status_code for client in (app.test_client(), unready) for name in ("m", "other")
    }
    if path in ("/healthz", "/v2/health/live"):
        found.add(503)  # for good, once a call of the agent does not come back: not to be brought about here
    assert set(DOCUMENT["paths"][path]["get"]["responses"]) == set(map(str, found))


# Requests made from the document

load_all_checks()
# What a schema cannot say: the vectors' length, that data is as long as its shape, that any value is an input.
UNSAID: dict[str, list[CheckFunction]] = {
    "/": [openapi_checks.negative_data_rejection],
    "/v1/embeddings": [openapi_checks.positive_data_acceptance],
    "/v2/models/{model}/infer": [openapi_checks.positive_data_acceptance],
    "/v2/models/{model}/versions/{version}/infer": [openapi_checks.positive_data_acceptance],
}
FUZZED = [
    pytest.param(path, method, mode, id=f"{mode.value} {method} {path}")
    for path, method in OPERATIONS
    for mode in GenerationMode
    if path != "/openapi.json" and "{version}" not in path and (mode is GenerationMode.POSITIVE or method == "post" or "{" in path)
]


@pytest.fixture(scope="module")
def schema(app: flask.Flask) -> BaseSchema:
    return schemathesis.openapi.from_wsgi("/openapi.json", app)


def has_large_integer(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(has_large_integer, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and not -(2**63) <= value < 2**64


@pytest.mark.parametrize(("path", "method", "mode"), FUZZED)
def test_requests_made_from_the_document_are_answered_as_it_says(schema: BaseSchema, path: str, method: str, mode: GenerationMode) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path][method].as_strategy(mode))
    def answered(case: "Case[Any]") -> None:
        assume(not has_large_integer(case.body))  # which no schema says of any value, and a 400 of its own does
        reply = case.call()
        assert reply.status_code < 500 or reply.status_code in (503, 504)
        if reply.status_code >= 400:
            assert reply.headers["content-type"] == ["application/json"]
            assert "error" in reply.json()
        case.validate_response(reply, excluded_checks=[not_a_server_error, *UNSAID.get(path, [])])

    answered()
