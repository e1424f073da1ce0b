"""The Open Inference Protocol: in one process without gunicorn, and with Triton's own client against the server as it is deployed."""

import contextlib
import http.client
import json
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import orjson
import pytest
import torch
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from function.agent import BadInput, TensorSpec, Weights
from function.app import create_app
from function.model import Model
from function.protocols import tensors
from function.protocols.tensors import DATATYPES, Tensor, from_outputs, inferred, read, rows
from function.settings import FunctionSettings
from function.values import dumps, plain
from tests.support import BIN, Server, clean_environment, free_port, running, wait_until
from weights_cache.settings import WeightsSettings


class Gives:
    """Answers each row as it is, or with what `answers` has for it."""

    answers: dict[str, Any] = {  # noqa: RUF012  read only
        "array": np.array([1.5, 2.5], np.float32),
        "scalar": np.int16(7),
        "arrays": [np.array([1], np.uint8), np.array([2], np.uint8)],
        "no numbers": np.array([np.nan, -np.inf, 1], np.float32),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "text array": np.array(["cat"]),
        "0d": np.array(3.5),
        "torch": torch.tensor([1.0], requires_grad=True),
        "bfloat16": torch.tensor([1.5], dtype=torch.bfloat16),
        "bytes": b"\xff\xfe",
        "object": {"a": [1, None]},
        "odd": object(),
        "vector": [0.5, 1.0],
        "longer": [0.5, 1.0, 2.0],
        "number": 3,
        "real": 0.25,
        "truth": True,
        "wide": 2**64 - 1,
        "wider": 2**64,
    }

    def load(self, weights: Weights, device: str) -> None:
        self.seen: list[Any] = []

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        if "bad" in inputs:
            raise BadInput("'bad' is not a word")
        if "crash" in inputs:
            raise RuntimeError("secret detail")
        if "slow" in inputs:
            time.sleep(0.2)
        if "seen" in inputs:
            return [self.seen for _ in inputs]
        self.seen += inputs
        return [self.answers.get(item, item) if isinstance(item, str) else item for item in inputs]


class Declared(Gives):
    """Adds two numbers; says what it takes and gives."""

    inputs = (TensorSpec("a", "INT32", (-1,)), TensorSpec("b", "FP32", (-1, 2)))
    outputs = (TensorSpec("sum", "FP32", (-1,)), TensorSpec("note", "BYTES", (-1,)), TensorSpec("size", "INT8", (-1, 1)))

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return [{"sum": row["a"] + sum(row["b"]), "note": {"of": row["a"]}, "size": [min(row["a"], 200)]} for row in inputs]


class Embeds(Gives):
    """Declares one output."""

    outputs = (TensorSpec("embedding", "FP32", (-1, 2)),)
    answers: dict[str, Any] = {  # noqa: RUF012  read only
        "short": [1],
        "wide": [1e39, float("inf")],
        "text": ["a", "b"],
        "truth": np.array([True, False]),
        "short array": np.ones(1),
        "wide array": np.array([np.nan, -1e39]),
        "array": np.array([1.5, -np.inf]),
        "counts": np.array([1, 2], np.int16),
    }

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return [self.answers.get(item, [1, float("-inf")]) for item in inputs]


class Forgets(Declared):
    """Leaves out what it declares."""

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return [{"sum": 1, "note": ""} if row["a"] else [1, "", 1] for row in inputs]


class Computes(Gives):
    """Is handed arrays, and says what they are."""

    arrays = True

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return [self.of(row) for row in inputs]

    def of(self, row: Any) -> Any:
        if isinstance(row, dict):
            return {name: self.of(part) for name, part in row.items()}
        if isinstance(row, np.ndarray | np.generic):
            return {"dtype": str(row.dtype), "shape": row.shape, "may_be_written": row.flags.writeable, "has": row.tolist()}
        return repr(row)


class Talks(Gives):
    """Streams the words of its prompt, a step for all at a time."""

    def start(self, item: Any) -> list[Any]:
        if item["text_input"] == "bad":
            raise BadInput("'bad' is not a prompt")
        pause_s = item["parameters"].get("pause_s", 0)
        return [(pause_s, word) for word in item["parameters"].get("words", item["text_input"].split(" "))]

    def step(self, sequences: list[list[Any]]) -> list[Any]:
        self.shared = max(getattr(self, "shared", 0), len(sequences))
        pieces = []
        for sequence in sequences:
            pause_s, piece = sequence.pop(0) if sequence else (0, None)
            time.sleep(pause_s)
            if piece == "company?" and self.shared < 2:
                sequence.insert(0, (0.005, piece))
            if piece == "crash":
                raise RuntimeError("secret detail")
            pieces.append(piece)
        return pieces


class Pauses(Gives):
    """Streams two words, the second one when it is told to."""

    may_go_on = threading.Event()

    def stream(self, item: Any) -> Iterator[str]:
        yield "a"
        assert self.may_go_on.wait(10)
        yield "b"


class Slow(Gives):
    """Takes its time to load."""

    may_load = threading.Event()

    def load(self, weights: Weights, device: str) -> None:
        assert self.may_load.wait(10)
        super().load(weights, device)


MakeClient = Callable[..., FlaskClient]


def client_of(folder: Path, agent: str = "Gives", *, wait: bool = True, **changed: Any) -> FlaskClient:
    found = FunctionSettings(agent=agent if ":" in agent else f"{__name__}:{agent}", model_name="m", **changed)
    model = Model(found, Weights(WeightsSettings(cache_dir=folder)), started_at=time.monotonic())
    failed = threading.Event()
    model.start(on_failure=lambda _: failed.set())
    if wait:
        wait_until("ready", lambda: failed.is_set() or model.phase == "ready", 10)
    return create_app(found, model).test_client()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    return client_of(tmp_path_factory.mktemp("v2"), max_inputs=16)


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    return client_of(tmp_path_factory.mktemp("v2"), "function.agents.echo:Echo")


@pytest.fixture
def make_client(tmp_path: Path) -> MakeClient:
    return lambda *agent, **changed: client_of(tmp_path, *agent, **changed)


def tensor(data: Any, datatype: str = "BYTES", shape: Any = None, name: str = "input", **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": [len(data)] if shape is None else shape, "datatype": datatype, "data": data, **more}


def infer(client: FlaskClient, *inputs: Any, **more: Any) -> TestResponse:
    return client.post("/v2/models/m/infer", json={"inputs": list(inputs), **more})


def infer_binary(client: FlaskClient, document: Any, data: bytes, **headers: str) -> TestResponse:
    text = json.dumps(document).encode()
    said = {"Inference-Header-Content-Length": str(len(text)), "Content-Type": "application/octet-stream"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    return client.post("/v2/models/m/infer", data=text + data, headers=said)


def one_output(reply: TestResponse) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    assert reply.json is not None
    (found,) = reply.json["outputs"]
    assert isinstance(found, dict)
    return found


def said(reply: TestResponse, status: int) -> str:
    """The message of an error in the protocol's own shape."""
    assert reply.status_code == status, reply.text
    assert reply.json is not None
    assert list(reply.json) == ["error"]
    message = reply.json["error"]
    assert isinstance(message, str)
    return message


# What the server and the model say of themselves


def test_the_server_says_who_it_is_and_what_it_can(client: FlaskClient) -> None:
    document = client.get("/v2").json or {}
    assert (document["name"], document["extensions"]) == ("relight", ["binary_tensor_data", "generate"])
    assert document["version"]


def test_health_and_readiness_are_told_in_the_protocols_words(client: FlaskClient) -> None:
    found = [(reply.status_code, reply.json) for reply in map(client.get, ("/v2/health/live", "/v2/health/ready", "/v2/models/m/ready"))]
    assert found == [(200, {"live": True}), (200, {"ready": True}), (200, {"name": "m", "ready": True})]


def test_a_model_that_declares_nothing_takes_and_gives_one_tensor_of_strings(client: FlaskClient) -> None:
    assert client.get("/v2/models/m").json == {
        "name": "m",
        "versions": ["1"],
        "platform": "relight",
        "inputs": [{"name": "input", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": "output", "datatype": "BYTES", "shape": [-1]}],
    }


def test_a_models_own_declaration_is_what_its_metadata_says(make_client: MakeClient) -> None:
    document = make_client("Declared").get("/v2/models/m").json or {}
    assert document["inputs"] == [{"name": "a", "datatype": "INT32", "shape": [-1]}, {"name": "b", "datatype": "FP32", "shape": [-1, 2]}]
    assert [spec["name"] for spec in document["outputs"]] == ["sum", "note", "size"]


def test_before_the_agent_has_loaded_the_function_is_live_not_ready_and_does_not_guess_what_the_agent_takes(
    make_client: MakeClient,
) -> None:
    Slow.may_load.clear()
    client = make_client("Slow", wait=False)
    wait_until("loading", lambda: (client.get("/readyz").json or {})["phase"] == "loading", 5)
    assert client.get("/v2/health/live").status_code == 200
    ready, model_ready, described = map(client.get, ("/v2/health/ready", "/v2/models/m/ready", "/v2/models/m"))
    assert (ready.status_code, ready.json) == (503, {"ready": False})
    assert (model_ready.status_code, model_ready.json) == (503, {"name": "m", "ready": False})
    assert said(described, 503) == "what the model takes is not known yet (loading)"
    refused = infer(client, tensor(["a"]))
    assert said(refused, 503) == "the function is not ready yet (loading)"
    assert (described.headers["Retry-After"], refused.headers["Retry-After"]) == ("1", "1")
    Slow.may_load.set()
    wait_until("ready", lambda: client.get("/v2/health/ready").status_code == 200, 5)


@pytest.mark.parametrize("route", ["", "/ready", "/infer", "/generate", "/generate_stream"])
def test_the_only_version_may_be_named_and_no_other(client: FlaskClient, route: str) -> None:
    body = {"inputs": [tensor(["a"])]} if route == "/infer" else {"text_input": "a"}

    def call(version: str, model: str = "m") -> TestResponse:
        path = f"/v2/models/{model}/versions/{version}{route}"
        return client.get(path) if route in ("", "/ready") else client.post(path, json=body)

    assert call("1").status_code == (400 if route == "/generate_stream" else 200)  # this agent does not stream
    assert said(call("2"), 404) == "there is no version '2' of model 'm' here, only '1'"
    assert said(call("1", "other"), 404) == "there is no model 'other' here; this function serves 'm'"


# Inference with JSON


def test_each_row_is_an_input_and_each_output_a_row(client: FlaskClient) -> None:
    reply = infer(client, tensor(["a", "b"]), id="7")
    assert reply.json == {
        "model_name": "m",
        "model_version": "1",
        "id": "7",
        "outputs": [{"name": "output", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}],
    }


ROWS = [
    pytest.param(tensor(["a", "b", "c", "d"], shape=[2, 2]), [["a", "b"], ["c", "d"]], id="strings in rows"),
    pytest.param(tensor([1, 2, 3], "INT64"), [1, 2, 3], id="numbers"),
    pytest.param(tensor([1, 0.5], "FP32"), [1.0, 0.5], id="whole numbers where real ones go"),
    pytest.param(tensor([1, 2, 3, 4], "UINT8", [2, 2]), [[1, 2], [3, 4]], id="rows of numbers"),
    pytest.param(tensor([[1, 2], [3, 4]], "UINT8", [2, 2]), [[1, 2], [3, 4]], id="nested data"),
    pytest.param(tensor(list(range(8)), "FP64", [2, 2, 2]), [[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0], [6.0, 7.0]]], id="three dimensions"),
    pytest.param(tensor([True, False], "BOOL"), [True, False], id="truth values"),
]


@pytest.mark.parametrize(("given", "wanted"), ROWS)
def test_the_agent_is_handed_rows_as_they_are(make_client: MakeClient, given: dict[str, Any], wanted: list[Any]) -> None:
    client = make_client()
    assert infer(client, given).status_code == 200
    assert repr(client.post("/", json="seen").json) == repr(wanted)  # 1 is not 1.0


def test_rows_of_several_tensors_are_joined_by_name(make_client: MakeClient) -> None:
    client = make_client()
    assert infer(client, tensor(["a", "b"], name="x"), tensor([1, 2, 3, 4], "INT8", [2, 2], name="y")).status_code == 200
    assert client.post("/", json="seen").json == [{"x": "a", "y": [1, 2]}, {"x": "b", "y": [3, 4]}]


OUTPUTS = [
    (["a", "b"], "BYTES", [2], ["a", "b"]),
    (["number", "number"], "INT64", [2], [3, 3]),
    (["number", "real"], "FP64", [2], [3.0, 0.25]),
    (["truth"], "BOOL", [1], [True]),
    (["vector", "vector"], "FP64", [2, 2], [0.5, 1.0, 0.5, 1.0]),
    (["array"], "FP32", [1, 2], [1.5, 2.5]),
    (["scalar"], "INT64", [1], [7]),
    (["array", "array"], "FP32", [2, 2], [1.5, 2.5, 1.5, 2.5]),
    (["array", "vector"], "FP64", [2, 2], [1.5, 2.5, 0.5, 1.0]),
    (["arrays", "arrays"], "UINT8", [2, 2, 1], [1, 2, 1, 2]),
    (["no numbers"], "FP32", [1, 3], [None, None, 1.0]),
    (["transposed"], "FP64", [1, 3, 2], [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]),
    (["text array"], "BYTES", [1, 1], ["cat"]),
    (["0d"], "FP64", [1], [3.5]),
    (["torch"], "FP32", [1, 1], [1.0]),
    (["bfloat16"], "FP32", [1, 1], [1.5]),
    (["wide", "number"], "UINT64", [2], [2**64 - 1, 3]),
    (["vector", "longer"], "BYTES", [2], ["[0.5,1.0]", "[0.5,1.0,2.0]"]),
    (["array", "longer"], "BYTES", [2], ["[1.5,2.5]", "[0.5,1.0,2.0]"]),
    (["object", "a"], "BYTES", [2], ['{"a":[1,null]}', '"a"']),
    (["bytes", "number"], "BYTES", [2], ['{"b64":"//4="}', "3"]),
]


@pytest.mark.parametrize(("given", "datatype", "shape", "data"), OUTPUTS, ids=lambda value: str(value)[:30])
def test_outputs_become_a_tensor_of_the_datatype_that_suits_them(
    client: FlaskClient, given: list[str], datatype: str, shape: list[int], data: list[Any]
) -> None:
    assert one_output(infer(client, tensor(given))) == {"name": "output", "datatype": datatype, "shape": shape, "data": data}


def test_declared_inputs_and_outputs_are_kept_to(make_client: MakeClient) -> None:
    reply = infer(make_client("Declared"), tensor([1, 2], "INT32", name="a"), tensor([1, 2, 3, 4.5], "FP32", [2, 2], name="b"))
    assert (reply.json or {})["outputs"] == [
        {"name": "sum", "datatype": "FP32", "shape": [2], "data": [4.0, 9.5]},
        {"name": "note", "datatype": "BYTES", "shape": [2], "data": ['{"of":1}', '{"of":2}']},
        {"name": "size", "datatype": "INT8", "shape": [2, 1], "data": [1, 2]},
    ]


def test_the_rows_of_the_only_declared_output_come_bare_and_may_be_infinite(make_client: MakeClient) -> None:
    client = make_client("Embeds")
    assert one_output(infer(client, tensor(["a"]))) == {"name": "embedding", "datatype": "FP32", "shape": [1, 2], "data": [1.0, None]}
    reply = infer(client, tensor(["a"]), parameters={"binary_data_output": True})
    assert reply.data.endswith(struct.pack("<2f", 1, float("-inf")))


@pytest.mark.parametrize(
    ("given", "data"),
    [("array", [1.5, None]), ("counts", [1.0, 2.0]), ("list", [1.0, None])],
)
def test_an_array_is_converted_to_the_datatype_that_is_declared(make_client: MakeClient, given: str, data: list[Any]) -> None:
    assert one_output(infer(make_client("Embeds"), tensor([given]))) == {
        "name": "embedding", "datatype": "FP32", "shape": [1, 2], "data": data,
    }  # fmt: skip


TWO = [tensor([1], "INT32", name="a"), tensor([1, 2], "FP32", [1, 2], name="b")]
NONE = [tensor([0], "INT32", name="a"), tensor([1, 2], "FP32", [1, 2], name="b")]


@pytest.mark.parametrize(
    ("agent", "given", "reason"),
    [
        pytest.param("Embeds", [tensor(["short"])], "and gave shape [1, 1]", id="another shape"),
        pytest.param("Embeds", [tensor(["short array"])], "and gave shape [1, 1]", id="an array of another shape"),
        pytest.param("Embeds", [tensor(["wide"])], "1e+39 is out of range for FP32", id="out of range beside infinity"),
        pytest.param("Embeds", [tensor(["wide array"])], "-1e+39 is out of range for FP32", id="an array out of range beside nan"),
        pytest.param("Embeds", [tensor(["text"])], "an element is 'a', which is no FP32", id="another type"),
        pytest.param("Embeds", [tensor(["truth"])], "the elements are bool, which is no FP32", id="an array of another type"),
        pytest.param("Declared", [tensor([200], "INT32", name="a"), TWO[1]], "200 is out of range for INT8", id="out of range"),
        pytest.param("Forgets", TWO, "declares the outputs ['sum', 'note', 'size'], and gave ['sum', 'note']", id="an output missing"),
        pytest.param("Forgets", NONE, "declares the outputs ['sum', 'note', 'size'], and gave a list", id="no outputs by name"),
        pytest.param("Gives", [tensor(["odd"])], "output[0] is of type object, which JSON cannot hold", id="not JSON"),
        pytest.param("Gives", [tensor(["wider"])], "output[0] is an integer beyond 64 bits", id="a number too large for JSON"),
        pytest.param("Gives", [tensor(["crash"])], "secret detail", id="an exception"),
    ],
)
def test_an_agent_that_does_not_keep_its_word_is_a_500_whose_reason_is_in_the_log_once(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture, agent: str, given: list[Any], reason: str
) -> None:
    client = make_client(agent)
    assert said(infer(client, *given), 500) == "the model failed on this request; the function's log says why"
    (logged,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert logged.exc_info
    assert reason in str(logged.exc_info[1])


def test_only_the_outputs_that_are_asked_for_are_sent_in_their_order(make_client: MakeClient) -> None:
    given = tensor([1], "INT32", name="a"), tensor([1, 2], "FP32", [1, 2], name="b")
    reply = infer(make_client("Declared"), *given, outputs=[{"name": "note"}, {"name": "sum", "parameters": {"binary_data": False}}])
    assert [output["name"] for output in (reply.json or {})["outputs"]] == ["note", "sum"]


def test_a_request_holds_no_more_inputs_than_the_setting_allows(client: FlaskClient) -> None:
    assert "at most 16 (FUNCTION_MAX_INPUTS)" in said(infer(client, tensor(["a"] * 17)), 400)


def test_a_bad_row_is_the_callers_error_in_the_agents_words(client: FlaskClient) -> None:
    assert said(infer(client, tensor(["a", "bad"])), 400) == "'bad' is not a word"


WRONG = [
    ({}, '"inputs" is missing'),
    ({"inputs": []}, '"inputs" is missing, empty'),
    ({"inputs": {}}, "not a list"),
    ({"inputs": [3]}, "inputs[0] must be an object"),
    ({"inputs": [{"shape": [1], "datatype": "BYTES", "data": ["a"]}]}, 'inputs[0]: "name" is missing'),
    ({"inputs": [tensor(["a"], name=7)]}, 'inputs[0]: "name" is missing or not a string'),  # type: ignore[arg-type]
    ({"inputs": [tensor(["a"], "FP99")]}, 'inputs[0] ("input"): "datatype" must be one of BOOL, INT8,'),
    ({"inputs": [tensor(["a"], "FP99")]}, "FP64, BYTES, and in binary BF16"),
    ({"inputs": [tensor(["a"], ["BYTES"])]}, '"datatype" must be one of'),  # type: ignore[arg-type]
    ({"inputs": [tensor([1], "BF16")]}, "BF16 is taken in binary only"),
    ({"inputs": [tensor(["a"], shape="1")]}, '"shape" must be a list'),
    ({"inputs": [tensor(["a"], shape=[])]}, '"shape" must be a list of 1 to 32 whole numbers'),
    ({"inputs": [tensor(["a"], shape=[-1])]}, '"shape" must be a list of 1 to 32 whole numbers above 0'),
    ({"inputs": [tensor([], shape=[0])]}, '"shape" must be a list of 1 to 32 whole numbers above 0'),
    ({"inputs": [tensor([], shape=[10**12, 0])]}, '"shape" must be a list of 1 to 32 whole numbers above 0'),
    ({"inputs": [tensor(["a"], shape=[1.0])]}, '"shape" must be a list of 1 to 32 whole numbers'),
    ({"inputs": [tensor(["a"], shape=[True])]}, '"shape" must be a list of 1 to 32 whole numbers'),
    ({"inputs": [tensor(["a"], shape=[1] * 33)]}, '"shape" must be a list of 1 to 32 whole numbers'),
    ({"inputs": [tensor(["a"], shape=[2])]}, 'shape [2] is 2 elements, "data" has 1'),
    ({"inputs": [tensor([1, 2, 3], "INT8", [2, 2])]}, 'shape [2, 2] is 4 elements, "data" has 3'),
    ({"inputs": [tensor([[1, 2], [3]], "INT8", [2, 2])]}, '"data" is nested, but not as shape [2, 2] says'),
    ({"inputs": [tensor([[1], [2]], "INT8", [2])]}, "an element is a list, which is no INT8"),
    ({"inputs": [tensor([1, [2]], "INT8")]}, "an element is a list, which is no INT8"),
    ({"inputs": [tensor("a")]}, '"data" must be a list'),
    ({"inputs": [tensor(["a", 1])]}, "an element is 1, which is no BYTES"),
    ({"inputs": [tensor([{}])]}, "an element is an object, which is no BYTES"),
    ({"inputs": [tensor(["1"], "INT8")]}, "an element is '1', which is no INT8"),
    ({"inputs": [tensor([1.0], "INT8")]}, "an element is 1.0, which is no INT8"),
    ({"inputs": [tensor([True], "INT8")]}, "an element is True, which is no INT8"),
    ({"inputs": [tensor([1], "BOOL")]}, "an element is 1, which is no BOOL"),
    ({"inputs": [tensor([None], "FP32")]}, "an element is null, which is no FP32"),
    ({"inputs": [tensor([1, 128], "INT8")]}, "128 is out of range for INT8"),
    ({"inputs": [tensor([-1, 1], "UINT64")]}, "-1 is out of range for UINT64"),
    ({"inputs": [tensor([2**63], "INT64")]}, "9223372036854775808 is out of range for INT64"),
    ({"inputs": [tensor([65520], "FP16")]}, "65520 is out of range for FP16"),
    ({"inputs": [tensor([-1e39], "FP32")]}, "-1e+39 is out of range for FP32"),
    ({"inputs": [tensor(["a"]), tensor(["b"])]}, "inputs: each name may be there only once"),
    ({"inputs": [tensor(["a"], name="x"), tensor(["b", "c"], name="y")]}, "all inputs must have the same first dimension"),
    ({"inputs": [tensor(["a"], parameters=[])]}, '"parameters" must be an object'),
    ({"inputs": [tensor(["a"], parameters={"shared_memory_region": "x"})]}, "shared memory is not supported"),
    ({"inputs": [tensor(["a"], parameters={"binary_data_size": 5})]}, 'either "data" or the parameter "binary_data_size"'),
    ({"inputs": [{"name": "i", "shape": [1], "datatype": "BYTES"}]}, 'either "data" or the parameter "binary_data_size"'),
    (
        {"inputs": [{"name": "i", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}}]},
        "the header Inference-Header-Content-Length must say where the JSON ends",
    ),
    ({"inputs": [tensor(["a"])], "id": 7}, '"id" must be a string'),
    ({"inputs": [tensor(["a"])], "parameters": 7}, 'the request: "parameters" must be an object'),
    ({"inputs": [tensor(["a"])], "parameters": {"binary_data_output": 1}}, '"binary_data_output" must be true or false'),
    ({"inputs": [tensor(["a"])], "outputs": 7}, '"outputs" must be a list'),
    ({"inputs": [tensor(["a"])], "outputs": ["output"]}, 'outputs[0] must be an object with "name"'),
    ({"inputs": [tensor(["a"])], "outputs": [{"name": "x"}]}, "outputs[0]: there is no output 'x'; this model has 'output'"),
    ({"inputs": [tensor(["a"])], "outputs": [{"name": "output"}] * 2}, "outputs: each name may be there only once"),
    ({"inputs": [tensor(["a"])], "outputs": [{"name": "output", "parameters": {"binary_data": "yes"}}]}, '"binary_data" must be true'),
    ({"inputs": [tensor(["a"])], "outputs": [{"name": "output", "parameters": {"classification": 2}}]}, "classification is not supported"),
    (
        {"inputs": [tensor(["a"])], "outputs": [{"name": "output", "parameters": {"binary": True}}]},
        "outputs[0]: \"parameters\": 'binary' is not",
    ),
    ({"inputs": [tensor(["a"])], "outputs": [{"name": "output", "binary_data": True}]}, "outputs[0]: 'binary_data' is not understood"),
    ({"inputs": [tensor(["a"])], "output": []}, "the request: 'output' is not understood; known are id, inputs"),
]


@pytest.mark.parametrize(("document", "message"), WRONG, ids=[f"{n} {message[:40]}" for n, (_, message) in enumerate(WRONG)])
def test_what_is_wrong_with_a_request_is_said(client: FlaskClient, document: Any, message: str) -> None:
    assert message in said(client.post("/v2/models/m/infer", json=document), 400)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param([tensor([1], "INT32", name="a")], 'the inputs must be "a", "b", not "a"', id="one missing"),
        pytest.param([tensor([1], "INT32", name="input")], 'the inputs must be "a", "b", not "input"', id="another name"),
        pytest.param(
            [tensor([1], "INT64", name="a"), tensor([1, 2], "FP32", [1, 2], name="b")],
            'input "a" must be INT32 of shape [-1], not INT64 of [1]',
            id="another datatype",
        ),
        pytest.param(
            [tensor([1], "INT32", name="a"), tensor([1, 2, 3], "FP32", [1, 3], name="b")],
            'input "b" must be FP32 of shape [-1, 2], not FP32 of [1, 3]',
            id="another shape",
        ),
    ],
)
def test_inputs_other_than_declared_are_refused(make_client: MakeClient, given: list[Any], message: str) -> None:
    assert said(infer(make_client("Declared"), *given), 400) == message


# Errors that no route of the protocol makes


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "status", "message"),
    [
        pytest.param("POST", "/v2/models/m/infer", b"{", "application/json", 400, "not JSON", id="cut JSON"),
        pytest.param("POST", "/v2/models/m/infer", b"[]", "application/json", 400, "must be a JSON object", id="a list"),
        pytest.param("POST", "/v2/models/m/infer", b"{}", "application/octet-stream", 415, "send JSON", id="binary without a header"),
        pytest.param("POST", "/v2/models/m/infer", b"a" * 2000, "application/json", 413, "1000 bytes", id="too large"),
        pytest.param("GET", "/v2/models/m/infer", None, None, 405, "GET /v2/models/m/infer", id="another method"),
        pytest.param("POST", "/v2", b"{}", "application/json", 405, "POST /v2", id="another method at the top"),
        pytest.param("POST", "/v2/models/other/infer", b"{}", "application/json", 404, "no model 'other'", id="another model"),
        pytest.param("GET", "/v2/models/other", None, None, 404, "no model 'other'", id="another model's metadata"),
        pytest.param("GET", "/v2/nowhere", None, None, 404, "no route '/v2/nowhere'", id="no route"),
    ],
)
def test_every_error_below_v2_has_the_protocols_shape(
    make_client: MakeClient, method: str, path: str, body: bytes | None, kind: str | None, status: int, message: str
) -> None:
    reply = make_client(max_body_bytes=1000).open(path, method=method, data=body, content_type=kind)
    assert message in said(reply, status)
    assert (status == 405) == ("Allow" in reply.headers)


def test_errors_elsewhere_keep_their_own_shape(client: FlaskClient) -> None:
    assert (client.get("/v2x").json or {})["error"]["type"] == "not_found"


def test_a_call_past_its_deadline_is_told_so_in_the_protocols_shape(client: FlaskClient) -> None:
    document = {"inputs": [tensor(["slow"])]}
    reply = client.post("/v2/models/m/infer", json=document, headers={"X-Request-Timeout-Ms": "50"})
    assert said(reply, 504) == "no answer within 0.05 s"


# Binary tensor data


def sized(size: Any, datatype: str = "BYTES", shape: Any = (1,), name: str = "input") -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}


def test_binary_inputs_and_outputs_are_laid_out_as_the_extension_says(make_client: MakeClient) -> None:
    client = make_client()
    document = {
        "inputs": [sized(8, "UINT32", [2], "x"), tensor(["a", "b"], name="y"), sized(4, "BOOL", [2, 2], "z")],
        "parameters": {"binary_data_output": True},
    }
    reply = infer_binary(client, document, b"\x01\0\0\0\xff\xff\xff\xff" + b"\0\1\1\0")
    assert (reply.status_code, reply.content_type) == (200, "application/octet-stream")
    length = int(reply.headers["Inference-Header-Content-Length"])
    (output,) = json.loads(reply.data[:length])["outputs"]
    wanted = [b'{"x":1,"y":"a","z":[false,true]}', b'{"x":4294967295,"y":"b","z":[true,false]}']
    binary = b"".join(struct.pack("<I", len(text)) + text for text in wanted)
    assert output == {"name": "output", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(binary)}}
    assert reply.data[length:] == binary
    assert client.post("/", json="seen").json == [
        {"x": 1, "y": "a", "z": [False, True]},
        {"x": 2**32 - 1, "y": "b", "z": [True, False]},
    ]


def test_what_an_output_asks_for_wins_over_what_the_request_asks_for(client: FlaskClient) -> None:
    asked = [{"name": "output", "parameters": {"binary_data": False}}]
    reply = infer(client, tensor(["a"]), parameters={"binary_data_output": True}, outputs=asked)
    assert one_output(reply)["data"] == ["a"]
    asked = [{"name": "output", "parameters": {"binary_data": True}}]
    assert infer(client, tensor(["a"]), outputs=asked).data.endswith(b"}\x01\0\0\0a")


def test_an_input_that_is_no_text_reaches_the_agent_as_bytes_and_comes_back_in_binary_only(client: FlaskClient) -> None:
    data = b"\x04\0\0\0\xff\xd8\xff\xe0"
    document: dict[str, Any] = {"inputs": [sized(8)]}
    assert 'ask for it with "binary_data": true' in said(infer_binary(client, document, data), 400)
    document["parameters"] = {"binary_data_output": True}
    assert infer_binary(client, document, data).data.endswith(data)


def test_binary_data_may_be_sent_as_json_too_and_nothing_else(client: FlaskClient) -> None:
    document, data = {"inputs": [sized(5)]}, b"\x01\0\0\0a"
    assert infer_binary(client, document, data, Content_Type="application/json").status_code == 200
    assert "send binary data as application/octet-stream" in said(infer_binary(client, document, data, Content_Type="text/plain"), 415)


def test_arrays_are_sent_in_binary_as_they_lie_in_memory(client: FlaskClient) -> None:
    reply = infer(client, tensor(["array", "array"]), parameters={"binary_data_output": True})
    assert reply.data.endswith(struct.pack("<4f", 1.5, 2.5, 1.5, 2.5))
    reply = infer(client, tensor(["transposed"]), parameters={"binary_data_output": True})
    assert reply.data.endswith(struct.pack("<6d", 0, 3, 1, 4, 2, 5))


# What an agent is handed that asks for arrays


def has(dtype: str, shape: list[int], elements: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "may_be_written": False, "has": elements}


AS_ARRAYS = [
    pytest.param(tensor([1, 2, 3, 4], "FP32", [2, 2]), [has("float32", [2], [1.0, 2.0]), has("float32", [2], [3.0, 4.0])], id="rows"),
    pytest.param(tensor([[[1], [2]]], "INT64", [1, 2, 1]), [has("int64", [2, 1], [[1], [2]])], id="nested data"),
    pytest.param(tensor([1, 2], "UINT8"), [has("uint8", [], 1), has("uint8", [], 2)], id="scalars"),
    pytest.param(tensor([0.5], "FP16"), [has("float16", [], 0.5)], id="half precision"),
    pytest.param(tensor([True], "BOOL", [1, 1]), [has("bool", [1], [True])], id="truth values"),
    pytest.param(tensor([2**64 - 1], "UINT64"), [has("uint64", [], 2**64 - 1)], id="a large integer"),
    pytest.param(tensor(["a"]), ["'a'"], id="texts"),
    pytest.param(tensor(["a", "b"], shape=[1, 2]), ["['a', 'b']"], id="rows of texts"),
]


def outputs_of(reply: TestResponse) -> list[Any]:
    return [json.loads(text) if text.startswith("{") else text for text in one_output(reply)["data"]]


@pytest.mark.parametrize(("given", "wanted"), AS_ARRAYS)
@pytest.mark.parametrize("sends_binary", [False, True], ids=["in JSON", "in binary"])
def test_an_agent_that_asks_for_arrays_is_handed_them(
    make_client: MakeClient, given: dict[str, Any], wanted: list[Any], sends_binary: bool
) -> None:
    client = make_client("Computes")
    if sends_binary:
        (found,) = read([given], None)
        data = bytes(found.to_bytes())
        reply = infer_binary(client, {"inputs": [sized(len(data), found.datatype, found.shape)]}, data)
    else:
        reply = infer(client, given)
    assert outputs_of(reply) == wanted


def test_arrays_of_several_tensors_are_joined_by_name(make_client: MakeClient) -> None:
    reply = infer(make_client("Computes"), tensor(["a"], name="x"), tensor([1, 2], "INT8", [1, 2], name="y"))
    assert outputs_of(reply) == [{"x": "'a'", "y": has("int8", [2], [1, 2])}]


def test_other_protocols_hand_such_an_agent_what_they_hand_any(make_client: MakeClient) -> None:
    assert make_client("Computes").post("/", json=[1, 2]).json == "[1, 2]"


def test_arrays_are_the_requests_own_bytes_where_their_place_allows_it() -> None:
    body = b"{}" + b"\0" * 6 + struct.pack("<3f", 1, 2, 3)
    base = np.frombuffer(body, np.uint8)
    for at in (8, 7):
        (found,) = read([sized(12 if at == 8 else 8, "FP32", [1, 3 if at == 8 else 2])], memoryview(body)[at : at + (12 if at == 8 else 8)])
        (row,) = found.rows(as_arrays=True)
        assert row.flags.aligned
        assert not row.flags.writeable
        assert np.shares_memory(row, base) == (at == 8)


@pytest.mark.parametrize("as_arrays", [False, True], ids=["lists", "arrays"])
def test_bf16_is_handed_on_as_the_same_numbers_in_fp32(as_arrays: bool) -> None:
    numbers = np.array([[1.5, -2.0], [3e38, np.inf]], ml_dtypes.bfloat16)
    data = numbers.tobytes()
    found = rows(read([sized(len(data), "BF16", [2, 2])], data), as_arrays=as_arrays)
    assert [row if isinstance(row, list) else row.tolist() for row in found] == numbers.astype(np.float32).tolist()
    assert not as_arrays or [str(row.dtype) for row in found] == ["float32"] * 2


def test_bf16_of_another_length_than_the_shape_says_is_refused() -> None:
    with pytest.raises(BadInput, match=r'shape \[2\] of BF16 is 4 bytes, "binary_data_size" is 6'):
        read([sized(6, "BF16", [2])], b"\0" * 6)


def test_lists_take_no_more_memory_than_they_must() -> None:
    shape = (1, 3, 200, 500)
    data = np.random.default_rng(0).random(shape, np.float32).tobytes()
    tracemalloc.start()
    try:
        found = rows(read([sized(len(data), "FP32", list(shape))], data))
        size, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found[0][2][199]) == 500
    assert size <= 8.2 * len(data)  # a float of 24 bytes and a pointer for each element of 4
    assert peak <= 1.2 * size


WRONG_BINARY = [
    pytest.param([sized(5)], b"\x01\0\0\0", '"binary_data_size" is 5, but only 4 bytes are left', id="cut"),
    pytest.param([sized(5)], b"\x01\0\0\0aa", '6 bytes follow the JSON, but "binary_data_size" of all inputs comes to 5', id="more bytes"),
    pytest.param([tensor(["a"])], b"a", "1 bytes follow the JSON", id="bytes that no input claims"),
    pytest.param([sized(5)], b"\x02\0\0\0a", "element 0 of the BYTES data is cut short", id="an element cut short"),
    pytest.param([sized(4)], b"\xff\xff\xff\xff", "element 0 of the BYTES data is cut short", id="a huge element"),
    pytest.param([sized(3)], b"\0\0\0", "element 0 of the BYTES data is cut short", id="a length cut short"),
    pytest.param([sized(4, shape=[2])], b"\0\0\0\0", "the shape is 2 elements, the BYTES data has 1", id="too few elements"),
    pytest.param([sized(400)], b"\0" * 400, "the shape is 1 elements, the BYTES data has more", id="too many elements"),
    pytest.param([sized(7, "INT32", [2])], b"\0" * 7, 'shape [2] of INT32 is 8 bytes, "binary_data_size" is 7', id="cut numbers"),
    pytest.param([sized(4, "INT32", [10**18, 10**18])], b"\0" * 4, "of INT32 is 4" + "0" * 36 + " bytes", id="a huge shape"),
    pytest.param([sized(2, "BOOL", [2])], b"\0\2", "a BOOL is a byte of 0 or 1", id="no truth value"),
    pytest.param([sized(-1)], b"", '"binary_data_size" must be a number of bytes', id="a negative size"),
    pytest.param([sized("5")], b"", '"binary_data_size" must be a number of bytes', id="a size in words"),
    pytest.param([sized(True)], b"", '"binary_data_size" must be a number of bytes', id="a size that is none"),
    pytest.param([sized(5), sized(5)], b"\x01\0\0\0a" * 2, "each name may be there only once", id="a name twice"),
]


@pytest.mark.parametrize(("inputs", "data", "message"), WRONG_BINARY)
def test_what_is_wrong_with_binary_data_is_said(client: FlaskClient, inputs: list[Any], data: bytes, message: str) -> None:
    assert message in said(infer_binary(client, {"inputs": inputs}, data), 400)


@pytest.mark.parametrize("length", ["", "-1", "x", "1e1", "99999", "9" * 5000, "\u0661"])
def test_a_length_of_the_json_that_cannot_be_is_refused(client: FlaskClient, length: str) -> None:
    said_ = {"Inference-Header-Content-Length": length.encode().decode("latin-1")}
    reply = client.post("/v2/models/m/infer", data=b"{}", headers=said_, content_type="application/octet-stream")
    assert "is not a length within the body's 2 bytes" in said(reply, 400)


def test_json_that_is_cut_by_its_length_is_refused(client: FlaskClient) -> None:
    document = {"inputs": [sized(5)]}
    reply = infer_binary(client, document, b"\x01\0\0\0a", Inference_Header_Content_Length="5")
    assert "not JSON" in said(reply, 400)
    assert "must be an object" in said(infer_binary(client, [], b""), 400)


# Round trips of anything

BOUNDS = {
    f"{sign}INT{bits}": (0 if sign else -(2 ** (bits - 1)), 2 ** (bits - (not sign)) - 1) for sign in ("", "U") for bits in (8, 16, 32, 64)
}
KEPT = settings(derandomize=True, deadline=None)
MANY = settings(KEPT, max_examples=300)
ELEMENTS: dict[str, st.SearchStrategy[Any]] = {
    "BOOL": st.booleans(),
    "BYTES": st.text(max_size=20),
    "FP16": st.floats(width=16, allow_nan=False, allow_infinity=False),
    "FP32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "FP64": st.floats(allow_nan=False, allow_infinity=False),
    **{name: st.integers(*bounds) for name, bounds in BOUNDS.items()},
}


@st.composite
def a_tensor(draw: st.DrawFn, first: int | None = None) -> Tensor:
    datatype = draw(st.sampled_from(DATATYPES))
    shape = (first or draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 3), max_size=3)))
    count = int(np.prod(shape))
    return Tensor(draw(st.text(min_size=1)), datatype, shape, draw(st.lists(ELEMENTS[datatype], min_size=count, max_size=count)))


def test_there_is_a_strategy_for_each_datatype() -> None:
    assert sorted(ELEMENTS) == sorted(DATATYPES)


def described(tensor: Tensor, **more: Any) -> dict[str, Any]:
    return {**tensor.document(), "shape": list(tensor.shape), **more}


@KEPT
@given(a_tensor())
def test_a_tensor_survives_json_and_binary(tensor: Tensor) -> None:
    flat, nested = tensor.data(), rows([tensor])
    binary = tensor.to_bytes()
    from_flat = read([described(tensor, data=flat)], None)
    from_nested = read([described(tensor, data=nested)], b"")
    (from_binary,) = read([described(tensor, parameters={"binary_data_size": len(binary)})], binary)
    assert from_flat == from_nested == [tensor]
    assert replace(from_binary, elements=tensor.elements) == tensor
    assert repr(from_binary.rows()) == repr(tensor.rows())  # 1 is not 1.0


@KEPT
@given(a_tensor())
def test_binary_data_is_what_numpy_makes_of_it(tensor: Tensor) -> None:
    if tensor.datatype == "BYTES":
        return
    kind = tensor.datatype.lower().replace("fp", "float")
    assert tensor.to_bytes() == np.array(rows([tensor]), np.dtype(kind).newbyteorder("<")).tobytes()


def test_an_arrays_bytes_are_where_it_lies() -> None:
    for array in (np.ones(3, np.float16), np.zeros(0, np.float32), np.array([True])):
        found = inferred("y", [array]).to_bytes()
        assert (bytes(found), np.shares_memory(np.frombuffer(found, np.uint8), array)) == (array.tobytes(), array.size > 0)


@KEPT
@given(a_tensor())
def test_an_agent_that_echoes_its_rows_gives_them_back_whatever_their_shape(tensor: Tensor) -> None:
    back = inferred("output", rows([tensor]))
    assert (back.shape, back.elements) == (tensor.shape, tensor.elements)
    assert back.datatype == {"BYTES": "BYTES", "BOOL": "BOOL", "UINT64": back.datatype}.get(
        tensor.datatype, "INT64" if "INT" in tensor.datatype else "FP64"
    )


@KEPT
@given(a_tensor(), st.integers(1, 8))
def test_a_tensor_is_the_same_however_small_the_pieces_are_that_it_is_looked_at_in(tensor: Tensor, size: int) -> None:
    binary, nested = tensor.to_bytes(), tensor.rows()
    with mock.patch.object(tensors, "_PIECE", size):
        assert tensor.to_bytes() == binary
        written = orjson.loads(dumps(tensor.data()))
        for data in (tensor.elements, nested):
            assert read([described(tensor, data=data)], None) == [tensor]
        (from_binary,) = read([described(tensor, parameters={"binary_data_size": len(binary)})], binary)
        assert repr(from_binary.rows()) == repr(nested)
        back = inferred("output", nested)
        assert (back.shape, back.elements) == (tensor.shape, tensor.elements)
    assert written == tensor.elements


@KEPT
@given(a_tensor())
def test_an_agent_that_echoes_its_arrays_gives_them_back(tensor: Tensor) -> None:
    back = inferred("output", [plain(row) for row in tensor.rows(as_arrays=True)])
    assert back.shape == tensor.shape
    assert back.rows() == tensor.rows() if tensor.datatype == "BYTES" else np.array_equal(back.elements, tensor.elements)
    if len(tensor.shape) > 1:  # a row that is a scalar is a number of Python's
        assert (back.datatype, back.to_bytes()) == (tensor.datatype, tensor.to_bytes())


@KEPT
@given(a_tensor())
def test_arrays_and_lists_of_the_same_numbers_are_the_same_tensor_where_it_is_declared(tensor: Tensor) -> None:
    spec = TensorSpec("output", tensor.datatype, tuple(-1 for _ in tensor.shape))
    from_lists = from_outputs(tensor.rows(), spec)
    from_arrays = from_outputs([plain(row) for row in tensor.rows(as_arrays=True)], spec)
    assert from_lists.to_bytes() == from_arrays.to_bytes() == tensor.to_bytes()
    assert (from_lists.shape, from_arrays.shape) == (tensor.shape, tensor.shape)


def test_a_large_output_is_the_same_document_as_a_small_one() -> None:
    numbers = np.arange(100_000, dtype=np.float32)
    for outputs in ([numbers], [numbers.tolist()]):
        assert orjson.loads(dumps(inferred("output", outputs).data())) == numbers.tolist()


@KEPT
@given(st.integers(1, 3).flatmap(lambda n: st.lists(a_tensor(n), min_size=2, max_size=3, unique_by=lambda tensor: tensor.name)))
def test_several_tensors_become_rows_that_hold_each_ones_row(tensors: list[Tensor]) -> None:
    for n, row in enumerate(rows(tensors)):
        assert row == {tensor.name: tensor.rows()[n] for tensor in tensors}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def or_any(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(strategy, strategy, strategy, JSON)


INPUTS = st.fixed_dictionaries(
    {},
    optional={
        "name": or_any(st.sampled_from(["input", "a"])),
        "shape": or_any(st.lists(st.integers(-1, 3), max_size=3)),
        "datatype": or_any(st.sampled_from([*DATATYPES, "FP99"])),
        "data": or_any(st.lists(JSON, max_size=3)),
        "parameters": or_any(st.fixed_dictionaries({}, optional={"binary_data_size": or_any(st.integers(0, 12))})),
    },
)
REQUESTS = st.fixed_dictionaries(
    {"inputs": or_any(st.lists(INPUTS, max_size=2))},
    optional={
        "id": or_any(st.text(max_size=3)),
        "parameters": or_any(st.fixed_dictionaries({}, optional={"binary_data_output": or_any(st.booleans())})),
        "outputs": or_any(st.lists(st.fixed_dictionaries({"name": or_any(st.just("output"))}, optional={"parameters": JSON}), max_size=2)),
    },
)


@MANY
@given(document=REQUESTS, binary=st.none() | st.binary(max_size=24), off=st.sampled_from([0, 0, 0, -1, 1]))
def test_nothing_that_a_client_sends_is_a_server_error(echo: FlaskClient, document: Any, binary: bytes | None, off: int) -> None:
    text = json.dumps(document).encode()
    headers = {} if binary is None else {"Inference-Header-Content-Length": str(len(text) + off)}
    reply = echo.post("/v2/models/m/infer", data=text + (binary or b""), headers=headers, content_type="application/json")
    assert reply.status_code == 200 or said(reply, 400)


@MANY
@given(st.lists(a_tensor(2), min_size=1, max_size=2, unique_by=lambda tensor: tensor.name), st.booleans(), st.booleans())
def test_whatever_is_well_formed_is_answered(echo: FlaskClient, tensors: list[Tensor], sends_binary: bool, wants_binary: bool) -> None:
    data = [tensor.to_bytes() if sends_binary else b"" for tensor in tensors]
    inputs = [
        described(tensor, **({"parameters": {"binary_data_size": len(part)}} if sends_binary else {"data": tensor.data()}))
        for tensor, part in zip(tensors, data, strict=True)
    ]
    wanted = [{"name": "output", "parameters": {"binary_data": wants_binary}}]
    reply = infer_binary(echo, {"inputs": inputs, "outputs": wanted}, b"".join(data))
    assert reply.status_code == 200, reply.data
    assert ("Inference-Header-Content-Length" in reply.headers) == wants_binary


@pytest.mark.parametrize("count", [1, 2])
@KEPT
@given(parts=st.lists(st.binary(max_size=6), min_size=2, max_size=2))
def test_bytes_of_any_kind_are_echoed(echo: FlaskClient, count: int, parts: list[bytes]) -> None:
    data = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    inputs = [sized(len(data), shape=[2], name=f"x{n}") for n in range(count)]
    reply = infer_binary(echo, {"inputs": inputs, "parameters": {"binary_data_output": True}}, data * count)
    assert reply.status_code == 200, reply.data
    assert reply.data.endswith(data) or count == 2


# generate


def test_an_agent_that_cannot_stream_generates_with_predict(client: FlaskClient) -> None:
    reply = client.post("/v2/models/m/generate", json={"text_input": "go", "parameters": {"n": 1}, "top_k": 2, "id": "7"})
    handed = {"text_input": "go", "parameters": {"n": 1, "top_k": 2}}
    assert reply.json == {"model_name": "m", "model_version": "1", "text_output": handed}


def test_an_agent_that_cannot_stream_is_not_asked_to(client: FlaskClient) -> None:
    reply = client.post("/v2/models/m/generate_stream", json={"text_input": "go"})
    assert "makes its answers in one go; ask without streaming" in said(reply, 400)


def test_generate_joins_the_pieces_of_a_stream(make_client: MakeClient) -> None:
    client = make_client("Talks")
    reply = client.post("/v2/models/m/generate", json={"text_input": "a b c"})
    assert reply.json == {"model_name": "m", "model_version": "1", "text_output": "abc"}
    reply = client.post("/v2/models/m/generate", json={"text_input": "", "parameters": {"words": ["a", 1]}})
    assert (reply.json or {})["text_output"] == ["a", 1]


def test_generate_shares_its_steps_with_other_callers(make_client: MakeClient) -> None:
    app = make_client("Talks").application
    body = {"text_input": "", "parameters": {"words": ["company?"]}}  # goes on until a step has had two sequences
    with ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda _: app.test_client().post("/v2/models/m/generate", json=body), range(2)))
    assert [reply.status_code for reply in replies] == [200, 200]


def test_generate_keeps_the_deadline_for_the_whole_answer(make_client: MakeClient) -> None:
    body = {"text_input": "", "parameters": {"words": ["a"] * 20, "pause_s": 0.05}}
    reply = make_client("Talks").post("/v2/models/m/generate", json=body, headers={"X-Request-Timeout-Ms": "200"})
    assert "the answer was not complete within 0.2 s" in said(reply, 504)


def test_a_stream_is_one_event_a_piece(make_client: MakeClient) -> None:
    reply = make_client("Talks").post("/v2/models/m/generate_stream", json={"text_input": "", "parameters": {"words": ["a", {"n": 1}]}})
    assert (reply.status_code, reply.content_type) == (200, "text/event-stream; charset=utf-8")
    assert [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n\n")[:-1]] == [
        {"model_name": "m", "model_version": "1", "text_output": piece} for piece in ("a", {"n": 1})
    ]


def test_while_the_model_is_silent_a_comment_line_keeps_the_connection_alive(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("function.http.HEARTBEAT_S", 0.02)
    Pauses.may_go_on.clear()
    lines = make_client("Pauses").post("/v2/models/m/generate_stream", json={"text_input": ""}).iter_encoded()
    found = [next(lines) for _ in range(4)]
    Pauses.may_go_on.set()
    found += lines
    words = [line for line in found if line.startswith(b"data: ")]
    assert [json.loads(word.removeprefix(b"data: "))["text_output"] for word in words] == ["a", "b"]
    assert found[1:4] == [b": still working\n\n"] * 3
    assert {*found} - {*words} == {b": still working\n\n"}


def test_an_error_half_way_is_an_event_in_the_protocols_shape(make_client: MakeClient) -> None:
    body = {"text_input": "", "parameters": {"words": ["a", "crash"]}}
    events = make_client("Talks").post("/v2/models/m/generate_stream", json=body).text.split("\n\n")[:-1]
    assert json.loads(events[0].removeprefix("data: "))["text_output"] == "a"
    told = json.loads(events[1].removeprefix("data: "))
    assert told == {"error": "the model failed on this request; the function's log says why"}
    assert len(events) == 2


def test_a_stream_that_cannot_begin_is_an_error_with_its_status(make_client: MakeClient) -> None:
    reply = make_client("Talks").post("/v2/models/m/generate_stream", json={"text_input": "bad"})
    assert said(reply, 400) == "'bad' is not a prompt"


@pytest.mark.parametrize("route", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, '"text_input" is missing or not a string'),
        ({"text_input": 7}, '"text_input" is missing or not a string'),
        ({"text_input": "a", "parameters": 7}, '"parameters" must be an object'),
        ([], "must be a JSON object"),
    ],
    ids=str,
)
def test_a_prompt_that_is_none_is_refused(client: FlaskClient, route: str, document: Any, message: str) -> None:
    assert message in said(client.post(f"/v2/models/m/{route}", json=document), 400)


# Triton's own client, against the server as it is deployed

AGENTS = """
import os, time

class Plain:
    def load(self, weights, device): pass
    def predict(self, inputs): return inputs
    def stream(self, item):
        yield "piece0"
        while not os.path.exists(item["text_input"]):
            time.sleep(0.01)
        yield "piece1"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "plain_agents.py").write_text(AGENTS)
    port = free_port()
    env = clean_environment(
        PYTHONPATH=str(folder), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT="plain_agents:Plain", FUNCTION_MODEL_NAME="m"
    )
    with running([str(BIN / "python"), "-m", "function"], folder / "log", env, port) as found:
        yield found.ready()


@pytest.fixture
def triton(server: Server) -> Iterator[Any]:
    import tritonclient.http

    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.port}") as found:
        yield found


def test_tritons_client_finds_the_server_alive_and_ready_and_reads_its_metadata(triton: Any) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("m")
    assert triton.is_model_ready("m", "1")
    assert not triton.is_model_ready("other")
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data", "generate"]
    assert triton.get_model_metadata("m")["inputs"] == [{"name": "input", "datatype": "BYTES", "shape": [-1]}]


ARRAYS = [
    np.array(["a", "grün", ""], np.object_),
    np.array([["a", "b"]], np.object_),
    np.array([True, False]),
    *(np.array([[0, 1], [2, 100]], f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *(np.array([[[0.5, -1.25]]], f"float{bits}") for bits in (16, 32, 64)),
]


@pytest.mark.parametrize("sends_binary", [True, False], ids=["binary in", "JSON in"])
@pytest.mark.parametrize("wants_binary", [True, False], ids=["binary out", "JSON out"])
def test_tritons_client_gets_back_every_datatype_that_it_sends(triton: Any, sends_binary: bool, wants_binary: bool) -> None:
    from tritonclient.http import InferInput, InferRequestedOutput
    from tritonclient.utils import np_to_triton_dtype

    for array in ARRAYS:
        if array.dtype == np.float16 and not sends_binary:
            continue  # the client has no JSON for it
        given = InferInput("input", array.shape, np_to_triton_dtype(array.dtype))
        given.set_data_from_numpy(array, binary_data=sends_binary)
        outputs = [InferRequestedOutput("output", binary_data=wants_binary)]
        result = triton.infer("m", [given], outputs=outputs, request_id="7", model_version="1")
        back = result.as_numpy("output")
        assert result.get_response()["id"] == "7"
        assert back.shape == array.shape
        texts = [item.decode() if isinstance(item, bytes) else item for item in back.ravel()]
        assert texts == array.ravel().tolist()


def test_tritons_client_asks_for_binary_outputs_by_default_and_gets_them(triton: Any) -> None:
    from tritonclient.http import InferInput

    given = InferInput("input", [2], "BYTES")
    given.set_data_from_numpy(np.array([b"\xff\xd8", b"a"], np.object_))
    result = triton.infer("m", [given])
    assert result.get_output("output")["parameters"] == {"binary_data_size": 11}
    assert result.as_numpy("output").tolist() == [b"\xff\xd8", b"a"]


def test_tritons_client_understands_our_errors(triton: Any) -> None:
    from tritonclient.http import InferInput
    from tritonclient.utils import InferenceServerException

    given = InferInput("input", [1], "FP32")
    given.set_data_from_numpy(np.array([1], np.float32))
    with pytest.raises(InferenceServerException, match="there is no model 'other' here; this function serves 'm'") as caught:
        triton.infer("other", [given])
    assert caught.value.status() == "404"


def test_pieces_of_a_plain_agent_are_sent_as_they_are_made(server: Server, tmp_path: Path) -> None:
    gate = tmp_path / "gate"  # the second piece is not made before the first has come
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
        body = json.dumps({"text_input": str(gate)})
        connection.request("POST", "/v2/models/m/generate_stream", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        first = reply.readline()
        gate.touch()
        rest = reply.read()
    told = {"model_name": "m", "model_version": "1"}
    assert json.loads(first.removeprefix(b"data: ")) == {**told, "text_output": "piece0"}
    assert json.loads(rest.strip().removeprefix(b"data: ")) == {**told, "text_output": "piece1"}
