"""The ONNX agent, on models of a few nodes, beside onnxruntime itself."""

import json
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from function.agent import BadInput, TensorSpec, Weights
from function.agents import examples
from function.agents.onnx import Session, external_files
from tests.support import ROOT, Server, clean_environment, fill_cache, free_port, request, running
from weights_cache.environment import SettingsError
from weights_cache.errors import WeightsError
from weights_cache.settings import WeightsSettings

URI = "s3://models/onnx"
RANDOM = np.random.default_rng(5)
Loader = Callable[..., Session]


def value(name: str, kind: int, shape: list[int | str | None] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: list[Any], inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto], **tensors: np.ndarray[Any, Any]
) -> onnx.ModelProto:
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def linear(rows: int | str = "rows", kind: int = TensorProto.FLOAT, dtype: str = "float32") -> onnx.ModelProto:
    weight = RANDOM.random((3, 2)).astype(dtype)
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], [value("x", kind, [rows, 3])], [value("y", kind, [rows, 2])], w=weight)


def two() -> onnx.ModelProto:
    """Two inputs, the first with an axis of any size, and two outputs."""
    return model(
        [
            helper.make_node("ReduceSum", ["words", "axes"], ["sum"], keepdims=0),
            helper.make_node("Cast", ["sum"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["real", "scale"], ["scaled"]),
        ],
        [value("words", TensorProto.INT64, ["n", "length"]), value("scale", TensorProto.FLOAT, ["n"])],
        [value("sum", TensorProto.INT64, ["n"]), value("scaled", TensorProto.FLOAT, ["n"])],
        axes=np.array([1]),
    )


def texts() -> onnx.ModelProto:
    labels = {"keys_strings": ["é", "ab"], "values_int64s": [1, 2]}
    return model(
        [
            helper.make_node("Identity", ["text"], ["same"]),
            helper.make_node("LabelEncoder", ["text"], ["label"], domain="ai.onnx.ml", **labels),
        ],
        [value("text", TensorProto.STRING, ["n"])],
        [value("same", TensorProto.STRING, ["n"]), value("label", TensorProto.INT64, ["n"])],
    )


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    def load(files: onnx.ModelProto | Mapping[str, bytes], device: str = "cpu", **settings: str) -> Session:
        fill_cache(tmp_path, URI, {"model.onnx": files.SerializeToString()} if isinstance(files, onnx.ModelProto) else files)
        for name, text in {"FUNCTION_AGENT": "function.agents.onnx:Session", **settings}.items():
            monkeypatch.setenv(name, text)
        agent = Session()
        agent.load(Weights(WeightsSettings(uri=URI, cache_dir=tmp_path)), device)
        return agent

    return load


def theirs(made: onnx.ModelProto, **feeds: np.ndarray[Any, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(None, feeds)
    return found


@pytest.mark.parametrize(
    ("kind", "dtype"), [(TensorProto.FLOAT, "float32"), (TensorProto.DOUBLE, "float64"), (TensorProto.FLOAT16, "float16")]
)
def test_rows_share_a_call_and_are_what_onnxruntime_gives(load: Loader, kind: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = linear(kind=kind, dtype=dtype)
    agent = load(made)
    x = RANDOM.random((4, 3)).astype(dtype)
    calls = []
    run = agent._session.run

    def counted(*given: Any) -> Any:
        calls.append(given)
        return run(*given)

    monkeypatch.setattr(agent, "_session", SimpleNamespace(run=counted))
    assert np.array_equal(np.stack(agent.predict(list(x))), theirs(made, x=x)[0])
    assert len(calls) == 1
    assert [row.dtype for row in agent.predict(x.tolist())] == [dtype] * 4


@pytest.mark.parametrize("rows", [1, 4])
def test_a_first_axis_of_a_fixed_size_is_run_one_input_at_a_time(load: Loader, rows: int) -> None:
    made = linear(rows)
    agent = load(made)
    assert agent.inputs == [TensorSpec("x", "FP32", (-1, 3) if rows == 1 else (-1, 4, 3))]
    x = RANDOM.random((5, 3) if rows == 1 else (5, 4, 3)).astype("float32")
    expected = [theirs(made, x=one.reshape(rows, 3))[0].reshape(-1) for one in x]
    assert [output.reshape(-1).tolist() for output in agent.predict(list(x))] == [output.tolist() for output in expected]


def test_several_inputs_and_outputs_have_their_names_and_rows_of_one_length_share_a_call(load: Loader) -> None:
    agent = load(two())
    assert agent.inputs == [TensorSpec("words", "INT64", (-1, -1)), TensorSpec("scale", "FP32", (-1,))]
    assert agent.outputs == [TensorSpec("sum", "INT64", (-1,)), TensorSpec("scaled", "FP32", (-1,))]
    inputs = [{"words": [1, 2], "scale": 2}, {"words": [3], "scale": 0.5}, {"words": [4, 5], "scale": 1.0}]
    assert agent.predict(inputs) == [{"sum": 3, "scaled": 6.0}, {"sum": 3, "scaled": 1.5}, {"sum": 9, "scaled": 9.0}]
    assert [agent.size(one) for one in inputs] == [3, 2, 3]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        pytest.param(linear(), [1.0, 1.0, 1.0], id="rows"),
        pytest.param(linear(4), [[1.0] * 3] * 4, id="a fixed size"),
        pytest.param(two(), {"words": [1], "scale": 1.0}, id="several"),
        pytest.param(texts(), "text", id="texts"),
    ],
)
def test_the_example_of_a_file_fits_it(made: onnx.ModelProto, expected: Any, load: Loader, tmp_path: Path) -> None:
    onnx.save(made, tmp_path / "model.onnx")
    assert examples.of_onnx(tmp_path / "model.onnx") == {"instances": [expected]}
    assert len(load(made).predict([expected])) == 1


def test_a_large_input_has_no_example(tmp_path: Path) -> None:
    shape: list[int | str | None] = ["n", 3, 32, 32]
    picture = [value(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    onnx.save(model([helper.make_node("Identity", ["x"], ["y"])], picture[:1], picture[1:]), tmp_path / "model.onnx")
    assert examples.of_onnx(tmp_path / "model.onnx") is None


def test_texts_go_in_and_come_out(load: Loader) -> None:
    agent = load(texts())
    assert agent.predict(["é", "ab"]) == [{"same": "é", "label": 1}, {"same": "ab", "label": 2}]
    with pytest.raises(BadInput, match="input 'text' must be BYTES"):
        agent.predict([b"\xff"])


def test_a_classifiers_probabilities_which_are_no_tensor_come_out_as_objects(load: Loader) -> None:
    made = model(
        [helper.make_node("ZipMap", ["x"], ["probabilities"], domain="ai.onnx.ml", classlabels_strings=["cat", "dog"])],
        [value("x", TensorProto.FLOAT, ["n", 2])],
        [
            helper.make_value_info(
                "probabilities",
                helper.make_sequence_type_proto(
                    helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
                ),
            )
        ],
    )
    agent = load(made)
    assert agent.outputs == [TensorSpec("probabilities", "BYTES", (-1,))]
    assert agent.predict([[0.25, 0.75], [1, 0]]) == [{"cat": 0.25, "dog": 0.75}, {"cat": 1.0, "dog": 0.0}]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        pytest.param({"words": [1.5], "scale": 1}, r"input 'words' must be INT64 of shape \[-1\] .* not FP64$", id="a real"),
        pytest.param({"words": [1], "scale": [1]}, r"'scale' must be FP32 of shape \[\] .* not shape \[1\]$", id="a shape"),
        pytest.param({"words": [[1], [2, 3]], "scale": 1}, "'words' must be INT64 .* not lists of different lengths", id="ragged"),
        pytest.param({"words": ["a"], "scale": 1}, "'words' must be INT64 .* not texts$", id="texts"),
        pytest.param({"words": [2**63], "scale": 1}, "'words' must be INT64 .* not UINT64", id="too large"),
        pytest.param({"words": [1], "scale": 1e300}, "'scale' must be FP32", id="beyond its range"),
        pytest.param({"words": [True], "scale": 1}, "'words' must be INT64 .* not BOOL", id="truth"),
        pytest.param({"words": [1]}, r"must have the inputs \['words', 'scale'\], not \['words'\]", id="one is missing"),
        pytest.param([1], r"must be an object with the inputs \['words', 'scale'\], not a list", id="no names"),
    ],
)
def test_what_the_model_does_not_take_is_refused_with_what_it_takes(load: Loader, item: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        load(two()).predict([item])


def test_axes_of_one_name_must_have_one_size_and_what_onnxruntime_refuses_is_the_callers_fault(load: Loader) -> None:
    named = model(
        [helper.make_node("Add", ["a", "b"], ["y"])],
        [value("a", TensorProto.FLOAT, ["n", "m"]), value("b", TensorProto.FLOAT, ["n", "m"])],
        [value("y", TensorProto.FLOAT, ["n", "m"])],
    )
    with pytest.raises(BadInput, match="input 'b': its axis 'm' has 3 elements, that of another input 2"):
        load(named).predict([{"a": [1, 2], "b": [1, 2, 3]}])


def test_an_index_beyond_the_table_is_the_callers_fault(load: Loader) -> None:
    table = model(
        [helper.make_node("Gather", ["table", "word"], ["y"])],
        [value("word", TensorProto.INT64, ["n"])],
        [value("y", TensorProto.FLOAT, ["n", 2])],
        table=np.ones((3, 2), "float32"),
    )
    with pytest.raises(BadInput, match=r"the model refuses this.*idx=9"):
        load(table).predict([9])


def test_external_data_lies_beside_the_model_and_a_name_chooses_among_several(load: Loader, tmp_path: Path) -> None:
    made, folder = linear(), tmp_path / "made"
    folder.mkdir()
    onnx.save_model(
        onnx.ModelProto.FromString(made.SerializeToString()),
        folder / "b.onnx",
        save_as_external_data=True,
        location="b.bin",
        size_threshold=0,
    )
    files = {f"onnx/{path.name}": path.read_bytes() for path in folder.iterdir()} | {"a.onnx": made.SerializeToString()}
    agent = load(files, FUNCTION_ONNX_FILE="onnx/b.onnx")
    x = np.ones((1, 3), "float32")
    assert np.array_equal(agent.predict([[1, 1, 1]])[0], theirs(made, x=x)[0][0])
    with pytest.raises(SettingsError, match=r"no such file; there are b\.onnx"):
        load(files, FUNCTION_ONNX_FILE="onnx/c.onnx")
    with pytest.raises(SettingsError, match=r"name one in FUNCTION_ONNX_FILE: a\.onnx, onnx/b\.onnx"):
        load(files, FUNCTION_ONNX_FILE="")


def test_weights_without_a_model_and_a_device_without_a_provider_are_told(load: Loader) -> None:
    with pytest.raises(WeightsError, match=r"no \.onnx file among the weights; there are model\.safetensors"):
        load({"model.safetensors": b"x"})
    with pytest.raises(SettingsError, match=r"this onnxruntime computes with .*CPUExecutionProvider only"):
        load(linear(), "cuda:0")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_cannot_be_used_is_not_replaced_by_the_processor(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(SettingsError, match="onnxruntime cannot use CUDAExecutionProvider: its libraries"):
        load(linear(), "cuda:0")


def test_a_file_that_is_no_model_is_told_with_its_name(load: Loader) -> None:
    with pytest.raises(WeightsError, match=r"onnxruntime .* cannot load model\.onnx: "):
        load({"model.onnx": b"no model"})


def test_an_output_that_does_not_count_rows_is_not_taken_for_one(load: Loader) -> None:
    twice = model(
        [helper.make_node("Concat", ["x", "x"], ["y"], axis=0)],
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, [None, 3])],
    )
    with pytest.raises(ValueError, match=r"output 'y' has shape \(2, 3\) for 1 rows"):
        load(twice).predict([[1, 1, 1]])


def test_an_output_of_which_the_file_says_nothing_is_the_whole_of_it_where_it_is_no_row(load: Loader) -> None:
    made = model(
        [helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0)],
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("most", TensorProto.FLOAT, None)],
    )
    agent = load(made)
    assert (agent.inputs, agent.outputs) == ([TensorSpec("x", "FP32", (-1, 3))], [TensorSpec("most", "FP32", (-1,))])
    assert agent.predict([[1, 2, 3], [6, 5, 4]]) == [3, 6]


def test_a_model_that_makes_one_row_of_several_is_called_for_each(load: Loader, caplog: pytest.LogCaptureFixture) -> None:
    first = model(
        [helper.make_node("Compress", ["x", "is_first"], ["y"], axis=0)],
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 3])],
        is_first=np.array([True]),
    )
    agent = load(first)
    rows = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    for _ in range(2):
        assert [output.tolist() for output in agent.predict(rows)] == rows
    assert ["each row is a call of its own" in record.message for record in caplog.records] == [True]


def test_rows_that_the_model_mixes_are_called_for_each_which_is_said_once(load: Loader, caplog: pytest.LogCaptureFixture) -> None:
    """Softmax over the rows, a recurrent network whose first axis is time, a sum over them."""
    soft = model(
        [helper.make_node("Softmax", ["x"], ["y"], axis=0)],
        [value("x", TensorProto.FLOAT, ["n", 2])],
        [value("y", TensorProto.FLOAT, ["n", 2])],
    )
    recurrent = model(
        [helper.make_node("RNN", ["x", "w", "r"], ["all", ""], hidden_size=2), helper.make_node("Squeeze", ["all", "axes"], ["y"])],
        [value("x", TensorProto.FLOAT, ["time", "n", 3])],
        [value("y", TensorProto.FLOAT, ["time", "n", 2])],
        w=RANDOM.random((1, 2, 3)).astype("float32"),
        r=RANDOM.random((1, 2, 2)).astype("float32"),
        axes=np.array([1]),
    )
    for made, rows in ((soft, [[1.0, 2.0], [5.0, 0.0]]), (recurrent, RANDOM.random((3, 1, 3)).tolist())):
        caplog.clear()
        agent = load(made)
        alone = [agent.predict([row])[0] for row in rows]
        assert np.array_equal(agent.predict(rows), alone)
        assert ["together give other outputs" in record.message for record in caplog.records] == [True]


def test_rows_of_which_none_could_be_tried_are_called_for_each(load: Loader, caplog: pytest.LogCaptureFixture) -> None:
    """A reshape that wants 100 numbers a row, which the file does not say."""
    made = model(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", "m"])],
        [value("y", TensorProto.FLOAT, ["n", 10, 10])],
        shape=np.array([-1, 10, 10]),
    )
    agent = load(made)
    assert [output.shape for output in agent.predict([[0.5] * 100] * 2)] == [(10, 10)] * 2
    assert ["could not be tried" in record.message for record in caplog.records] == [True]


def test_values_that_a_model_fails_on_are_the_callers_fault_while_it_takes_others(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(
        [helper.make_node("Expand", ["one", "x"], ["y"])],
        [value("x", TensorProto.INT64, [2])],
        [value("y", TensorProto.FLOAT, [None, None])],
        one=np.ones(1, "float32"),
    )
    agent = load(made)
    assert agent.predict([[2, 2]])[0].shape == (2, 2)
    with pytest.raises(BadInput, match="the model fails on this, and not on other values"):
        agent.predict([[-5, 1]])
    monkeypatch.setattr(agent, "_taken", {"x": np.array([-5, 1])})  # as if nothing worked any more
    with pytest.raises(Exception, match="Expand") as raised:
        agent.predict([[-5, 1]])
    assert not isinstance(raised.value, BadInput)


def test_a_project_saves_a_model_with_the_files_of_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made").mkdir()
    options: dict[str, Any] = {"save_as_external_data": True, "location": "my.onnx.data", "size_threshold": 0}
    onnx.save_model(linear(), tmp_path / "made/my.onnx", **options)
    (tmp_path / "made/other.data").write_bytes(b"x")
    assert external_files(tmp_path / "made/my.onnx") == [Path("my.onnx.data")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["save_weights.py", "made/my.onnx"])
    runpy.run_path(str(ROOT / "knative/project/templates/onnx/save_weights.py.txt"), run_name="__main__")
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["model.onnx", "my.onnx.data"]
    assert "saved weights/model.onnx, my.onnx.data" in capsys.readouterr().out
    (tmp_path / "made/my.onnx.data").unlink()
    with pytest.raises(SystemExit, match=r"made/my\.onnx cannot be loaded: "):
        runpy.run_path(str(ROOT / "knative/project/templates/onnx/save_weights.py.txt"), run_name="__main__")


# Through the server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that has no torch."""
    folder = tmp_path_factory.mktemp("onnx")
    fill_cache(folder / "cache", URI, {"model.onnx": two().SerializeToString()})
    (folder / "without").mkdir()
    (folder / "without" / "torch.py").write_text("raise ImportError")
    port = free_port()
    env = clean_environment(
        PYTHONPATH=str(folder / "without"),
        FUNCTION_AGENT="function.agents.onnx:Session",
        FUNCTION_HOST="127.0.0.1",
        PORT=str(port),
        WEIGHTS_URI=URI,
        WEIGHTS_CACHE_DIR=str(folder / "cache"),
    )
    with running([sys.executable, "-m", "function"], folder / "log", env, port) as server:
        yield server.ready()


def test_v1_and_v2_answer_by_name(server: Server) -> None:
    instances = [{"words": [1, 2], "scale": 2}, {"words": [3], "scale": 0.5}]
    assert request(server.port, "POST", "/", {"instances": instances}).json() == {
        "predictions": [{"sum": 3, "scaled": 6.0}, {"sum": 3, "scaled": 1.5}]
    }
    assert request(server.port, "GET", "/v2/models/model").json()["inputs"] == [
        {"name": "words", "datatype": "INT64", "shape": [-1, -1]},
        {"name": "scale", "datatype": "FP32", "shape": [-1]},
    ]


def test_tritons_client_sends_and_gets_binary_tensors(server: Server) -> None:
    client = pytest.importorskip("tritonclient.http")
    words, scale = RANDOM.integers(0, 9, (6, 5)), RANDOM.random(6).astype("float32")
    inputs = [client.InferInput("words", [6, 5], "INT64"), client.InferInput("scale", [6], "FP32")]
    inputs[0].set_data_from_numpy(words)
    inputs[1].set_data_from_numpy(scale)
    with client.InferenceServerClient(f"127.0.0.1:{server.port}") as caller:
        found = caller.infer("model", inputs)
        assert np.array_equal(found.as_numpy("sum"), words.sum(1))
        assert np.array_equal(found.as_numpy("scaled"), words.sum(1).astype("float32") * scale)


def test_a_wrong_row_is_its_senders_400_which_names_the_tensor(server: Server) -> None:
    wrong = request(server.port, "POST", "/", {"instances": [{"words": "a", "scale": 1}]})
    assert wrong.status == 400
    assert "input 'words' must be INT64 of shape [-1]" in json.dumps(wrong.json())
