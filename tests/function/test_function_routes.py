"""One question, one answer: what is asked is answered the same by every route, with the same values and the same status."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support import BIN, Reply, Server, clean_environment, free_port, request, running

AGENT = """
import dataclasses, json, uuid
import numpy as np, torch
from function.agent import BadInput

@dataclasses.dataclass
class Box:
    label: str
    corners: tuple

MADE = {
    "transposed": lambda: np.arange(6.).reshape(2, 3).T,
    "texts": lambda: np.array(["cat"]),
    "no dimension": lambda: np.array(3.5),
    "big-endian": lambda: np.arange(3, dtype=">i4"),
    "strided": lambda: np.arange(10, dtype=np.float32)[::3],
    "torch": lambda: torch.tensor([1.0]),
    "torch half": lambda: torch.tensor([[0.5], [1.5]], dtype=torch.bfloat16, requires_grad=True),
    "scalar": lambda: np.float32(0.25),
    "tuple": lambda: (1, 2),
    "set": lambda: {3, 1, 2},
    "dataclass": lambda: Box("cat", (1, 2)),
    "keys": lambda: {1: "one", None: 0},
    "bytes": lambda: b"\\x00\\xff",
    "uuid": lambda: uuid.UUID(int=0),
    "nan": lambda: float("nan"),
    "object": lambda: object(),
    "generator": lambda: (x for x in "ab"),
    "too large": lambda: 2**64,
    "surrogate": lambda: chr(0xD800),
    "deep": lambda: __import__("functools").reduce(lambda inner, _: [inner], range(300), 1),
}

class Agent:
    def load(self, weights, device):
        pass
    def predict(self, inputs):
        return [self.one(item if isinstance(item, str) else item.get("text_input") or item.get("prompt") or item["messages"][0]["content"])
                for item in inputs]
    def one(self, text):
        kind, _, rest = text.partition(":")
        if kind == "bad":
            raise BadInput("not this one")
        if kind == "crash":
            raise RuntimeError("secret")
        return MADE[rest]() if kind == "made" else json.loads(rest)
"""
NAME = "org/m"
JSON = {"Content-Type": "application/json"}
EVENT = {"specversion": "1.0", "source": "/test", "type": "asked"}
CE = {f"ce-{name}": value for name, value in EVENT.items()}
EVENTS, BATCH = "application/cloudevents+json", "application/cloudevents-batch+json"


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("routes"), free_port()
    (folder / "routes_agent.py").write_text(AGENT)
    env = clean_environment(PYTHONPATH=str(folder), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT="routes_agent:Agent")
    env |= {"FUNCTION_MODEL_NAME": NAME, "FUNCTION_EVENT_MEMORY": "0"}
    with running([str(BIN / "python"), "-m", "function"], folder / "log", env, port) as server:
        yield server.ready()


Ask = Callable[[int, str], tuple[Reply, Any]]  # of a port and a text: the reply, and what the agent's output is by it


def _v1(path: str, headers: dict[str, str]) -> Ask:
    def ask(port: int, text: str) -> tuple[Reply, Any]:
        reply = request(port, "POST", path, {"instances": [text]}, headers)
        return reply, reply.json()["predictions"][0] if reply.status == 200 else None

    return ask


def _bare(kind: dict[str, str]) -> Ask:
    def ask(port: int, text: str) -> tuple[Reply, Any]:
        reply = request(port, "POST", "/", json.dumps(text).encode(), kind)
        if reply.headers.get("content-type") == "application/octet-stream":  # bytes, which an event's data may be
            return reply, as_json(reply.body)
        return reply, reply.json() if reply.status == 200 else None

    return ask


def _structured(port: int, text: str) -> tuple[Reply, Any]:
    event = {**EVENT, "id": "1", "datacontenttype": "application/json", "data": text}
    reply = request(port, "POST", "/", json.dumps(event).encode(), {"Content-Type": EVENTS})
    return reply, _data_of(reply.json()) if reply.status == 200 else None


def _batch(port: int, text: str) -> tuple[Reply, Any]:
    event = {**EVENT, "id": "1", "datacontenttype": "application/json", "data": text}
    reply = request(port, "POST", "/", json.dumps([event]).encode(), {"Content-Type": BATCH})
    return reply, _data_of(reply.json()[0]) if reply.status == 200 else None


def _data_of(event: dict[str, Any]) -> Any:
    return {"b64": event["data_base64"]} if "data_base64" in event else event["data"]


def _infer(path: str) -> Ask:
    def ask(port: int, text: str) -> tuple[Reply, Any]:
        body = {"inputs": [{"name": "input", "datatype": "BYTES", "shape": [1], "data": [text]}]}
        reply = request(port, "POST", path, body, JSON)
        return reply, reply.json()["outputs"][0] if reply.status == 200 else None

    return ask


def _generate(port: int, text: str) -> tuple[Reply, Any]:
    reply = request(port, "POST", f"/v2/models/{NAME}/generate", {"text_input": text})
    return reply, reply.json()["text_output"] if reply.status == 200 else None


ROUTES: dict[str, Ask] = {
    "the loop": _v1(f"/v1/models/{NAME}:predict", {}),
    "the loop, with a query and an escaped slash": _v1(f"/v1/models/{quote(NAME, safe='')}:predict?a=b", {}),
    "Flask": _v1(f"/v1/models/{NAME}:predict", {"TE": "trailers"}),
    "Flask, with an escaped slash": _v1(f"/v1/models/{quote(NAME, safe='')}:predict", {"TE": "trailers"}),
    "one value": _bare(JSON),
    "one value, by Flask": _bare({**JSON, "TE": "trailers"}),
    "a binary event": _bare({**JSON, **CE, "ce-id": "1"}),
    "a structured event": _structured,
    "a batch of events": _batch,
    "generate": _generate,
}
TENSORS: dict[str, Ask] = {
    "infer": _infer(f"/v2/models/{NAME}/infer"),
    "infer, by version and escaped": _infer(f"/v2/models/{quote(NAME, safe='')}/versions/1/infer"),
}


def as_json(data: bytes) -> dict[str, str]:
    import base64

    return {"b64": base64.b64encode(data).decode()}


def shaped(tensor: dict[str, Any]) -> Any:
    """The one row of a tensor, as lists."""
    items = tensor["data"]
    for size in reversed(tensor["shape"][1:]):
        items = [items[at : at + size] for at in range(0, len(items), size)] if size else [[]]
    return items[0]


def is_the_same(tensor: dict[str, Any], value: Any) -> bool:
    """Whether a tensor says what V1 does: as it is, or as JSON's text where tensors have no words for it."""
    found = shaped(tensor)
    return bool(found == value or (isinstance(found, str) and json.loads(found) == value))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(value=JSON_VALUES)
@example(value=[[1, 2], [3, 4]])
@example(value=["a", "b"])
@example(value={"a": [1.5, None]})
@example(value=[2**53 + 1, 0.5])
@settings(max_examples=40, deadline=None)
def test_any_value_is_the_same_by_every_route(function: Server, value: Any) -> None:
    text = "json:" + json.dumps(value)
    for name, ask in ROUTES.items():
        reply, found = ask(function.port, text)
        assert (name, reply.status, found) == (name, 200, value)
    for name, ask in TENSORS.items():
        reply, found = ask(function.port, text)
        assert (name, reply.status) == (name, 200)
        assert is_the_same(found, value), (name, found, value)


@pytest.mark.parametrize(
    ("made", "value"),
    [
        ("transposed", [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]),
        ("texts", ["cat"]),
        ("no dimension", 3.5),
        ("big-endian", [0, 1, 2]),
        ("strided", [0.0, 3.0, 6.0, 9.0]),
        ("torch", [1.0]),
        ("torch half", [[0.5], [1.5]]),
        ("scalar", 0.25),
        ("tuple", [1, 2]),
        ("set", [1, 2, 3]),
        ("dataclass", {"label": "cat", "corners": [1, 2]}),
        ("keys", {"1": "one", "null": 0}),
        ("uuid", "00000000-0000-0000-0000-000000000000"),
        ("nan", None),
    ],
)
def test_what_is_no_json_becomes_the_same_values_by_every_route(function: Server, made: str, value: Any) -> None:
    for name, ask in {**ROUTES, **TENSORS}.items():
        reply, found = ask(function.port, f"made:{made}")
        assert (name, reply.status) == (name, 200)
        assert is_the_same(found, value) if name in TENSORS else found == value, (name, found)


def test_bytes_are_base64_in_json_and_themselves_where_the_protocol_has_bytes(function: Server) -> None:
    for name, ask in ROUTES.items():
        reply, found = ask(function.port, "made:bytes")
        assert (name, reply.status, found) == (name, 200, {"b64": "AP8="})
    for ask in TENSORS.values():
        reply, _ = ask(function.port, "made:bytes")
        assert reply.status == 400  # they are no text; the caller is told to ask for binary data
        assert "binary_data" in reply.json()["error"]


@pytest.mark.parametrize("made", ["object", "generator", "too large", "surrogate", "deep"])
def test_what_cannot_be_written_is_the_same_500_by_every_route(function: Server, made: str) -> None:
    statuses = {}
    for name, ask in {**ROUTES, **TENSORS}.items():
        reply, _ = ask(function.port, f"made:{made}")
        error = reply.json()["error"]
        statuses[name] = (reply.status, (error if isinstance(error, str) else error["message"]).removeprefix("1 of the 1 events failed"))
    assert {status for status, _ in (statuses[name] for name in statuses if name != "a batch of events")} == {500}
    assert statuses["a batch of events"][0] == 503  # of a batch something failed: it is sent again
    assert "which JSON cannot" in function.said() or "deep" in function.said()


@pytest.mark.parametrize(("text", "status"), [("bad:", 400), ("crash:", 500)])
def test_what_the_agent_refuses_has_the_same_status_by_every_route(function: Server, text: str, status: int) -> None:
    for name, ask in {**ROUTES, **TENSORS}.items():
        reply, _ = ask(function.port, text)
        expected = 503 if (name, status) == ("a batch of events", 500) else status
        assert (name, reply.status) == (name, expected)
        assert b"secret" not in reply.body


@pytest.mark.parametrize("path", ["/v1/models/org/m", "/v1/models/org%2Fm", "/v2/models/org/m", "/v2/models/org%2Fm/versions/1"])
def test_a_name_with_a_slash_is_found_by_every_route_that_tells_of_the_model(function: Server, path: str) -> None:
    reply = request(function.port, "GET", path)
    assert (reply.status, reply.json()["name"]) == (200, NAME)


@pytest.mark.parametrize("size", [10, 20_000])
@pytest.mark.parametrize("name", ["other", "org/other", "org"])
def test_another_models_name_is_a_404_however_large_the_request(function: Server, name: str, size: int) -> None:
    reply = request(function.port, "POST", f"/v1/models/{name}:predict", {"instances": ["a" * size]})
    assert reply.status == 404
    assert f"there is no model {name!r} here" in reply.json()["error"]["message"]


def test_an_embedding_is_a_vector_whatever_holds_it(function: Server) -> None:
    body = {"model": NAME, "input": ["made:strided", "made:torch"]}
    found = request(function.port, "POST", "/v1/embeddings", body)
    assert [row["embedding"] for row in found.json()["data"]] == [[0.0, 3.0, 6.0, 9.0], [1.0]]
    assert not math.isnan(found.json()["data"][0]["embedding"][0])


def test_a_vector_that_float32_cannot_hold_is_the_agents_failure_in_base64_alone(function: Server) -> None:
    body = {"model": NAME, "input": "json:[1e300]"}
    assert request(function.port, "POST", "/v1/embeddings", body).json()["data"][0]["embedding"] == [1e300]
    reply = request(function.port, "POST", "/v1/embeddings", {**body, "encoding_format": "base64"})
    assert (reply.status, reply.json()["error"]["code"]) == (500, "agent_failed")


@pytest.mark.parametrize("value", ["text", {"a": 1}, [1, 2], None])
def test_a_completion_is_the_output_as_text(function: Server, value: Any) -> None:
    text = "json:" + json.dumps(value)
    expected = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    plain = request(function.port, "POST", "/v1/completions", {"model": NAME, "prompt": text})
    chat = request(function.port, "POST", "/v1/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": text}]})
    assert plain.json()["choices"][0]["text"] == expected
    assert chat.json()["choices"][0]["message"]["content"] == expected
