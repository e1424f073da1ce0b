"""The HTTP face and the model behind it, in one process without gunicorn."""

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from function.agent import BadInput, Weights
from function.app import create_app
from function.model import Model
from function.settings import FunctionSettings
from tests.support import wait_until
from weights_cache.settings import WeightsSettings


class Probe:
    """Misbehaves on request."""

    gate = threading.Event()

    def load(self, weights: Weights, device: str) -> None:
        type(self).gate.set()
        self.threads: set[int] = set()
        self.seen: list[Any] = []

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        self.threads.add(threading.get_ident())
        outputs: list[Any] = []
        for item in inputs:
            self.seen.append(item)
            if item == "bad":
                raise BadInput("'bad' is not a word")
            if item == "crash":
                raise RuntimeError("secret detail")
            if item == "drop":
                continue
            if item == "object":
                outputs.append(object())
            elif item == "threads":
                outputs.append(len(self.threads))
            elif item == "seen":
                outputs.append({"seen": self.seen})
            else:
                if item == "hold":
                    self.gate.wait(60)
                outputs.append({"got": item})
        return outputs


class SlowToLoad(Probe):
    """Loads when it is told to."""

    may_load = threading.Event()

    def load(self, weights: Weights, device: str) -> None:
        assert self.may_load.wait(60)
        super().load(weights, device)


MakeClient = Callable[..., FlaskClient]


@pytest.fixture
def make_client(tmp_path: Path) -> Iterator[MakeClient]:
    def make(agent: str = "Probe", *, wait: bool = True, **settings: Any) -> FlaskClient:
        found = FunctionSettings(agent=f"{__name__}:{agent}", model_name="probe", **settings)
        model = Model(found, Weights(WeightsSettings(cache_dir=tmp_path)), started_at=time.monotonic())
        failed = threading.Event()
        model.start(on_failure=lambda _: failed.set())
        if wait:
            wait_until("ready", lambda: failed.is_set() or model.phase == "ready")
        return create_app(found, model).test_client()

    return make  # type: ignore[return-value]


def test_each_instance_gets_its_prediction_in_order(make_client: MakeClient) -> None:
    reply = make_client().post("/v1/models/probe:predict", json={"instances": ["a", {"b": 1}, None]})
    assert (reply.status_code, reply.json) == (200, {"predictions": [{"got": "a"}, {"got": {"b": 1}}, {"got": None}]})


def test_what_loading_left_behind_is_not_looked_at_by_each_garbage_collection(make_client: MakeClient) -> None:
    gc.unfreeze()
    make_client()
    assert gc.get_freeze_count() > 0


def test_the_functions_own_url_takes_instances_as_the_v1_route_does(make_client: MakeClient) -> None:
    assert make_client().post("/", json={"instances": ["a"]}).json == {"predictions": [{"got": "a"}]}


@pytest.mark.parametrize("value", ["text", 7, None, [1, 2], {"text": "x"}], ids=repr)
def test_any_other_json_value_at_the_functions_own_url_is_one_input_answered_bare(make_client: MakeClient, value: Any) -> None:
    reply = make_client().post("/", data=json.dumps(value), content_type="application/json")
    assert reply.json == {"got": value}


BAD_REQUESTS = [
    pytest.param("POST", "/v1/models/probe:predict", b"{", "application/json", 400, "not JSON", id="cut JSON"),
    pytest.param("POST", "/v1/models/probe:predict", b"\xff\xfe", "application/json", 400, "not JSON", id="no text"),
    pytest.param("POST", "/v1/models/probe:predict", b"", "application/json", 400, "not JSON", id="no body"),
    pytest.param("POST", "/v1/models/probe:predict", b"[]", "application/json", 400, '"instances" is missing', id="a list"),
    pytest.param("POST", "/v1/models/probe:predict", b'{"wrong": 1}', "application/json", 400, '"instances" is missing', id="no instances"),
    pytest.param("POST", "/v1/models/probe:predict", b'{"instances": 3}', "application/json", 400, "not a list", id="instances no list"),
    pytest.param("POST", "/v1/models/probe:predict", b'{"instances": []}', "application/json", 400, "is empty", id="no instance"),
    pytest.param(
        "POST", "/v1/models/probe:predict", b'{"instances": ["bad"]}', "application/json", 400, "'bad' is not a word", id="the agent's word"
    ),
    pytest.param(
        "POST",
        "/v1/models/probe:predict",
        b'{"instances": ["' + b"a" * 2000 + b'"]}',
        "application/json",
        413,
        "1000 bytes",
        id="too large",
    ),
    pytest.param(
        "POST",
        "/v1/models/other:predict",
        b'{"instances": ["a"]}',
        "application/json",
        404,
        "this function serves 'probe'",
        id="no such model",
    ),
    pytest.param("GET", "/v1/models/other", None, None, 404, "there is no model 'other'", id="no such model to describe"),
    pytest.param("GET", "/v1/models/probe:predict", None, None, 405, "with POST", id="wrong method"),
    pytest.param("POST", "/", b"plain", "text/csv", 415, "application/json", id="no JSON"),
    pytest.param("GET", "/nowhere", None, None, 404, "no route '/nowhere'", id="no such route"),
]


@pytest.mark.parametrize(("method", "path", "body", "kind", "status", "said"), BAD_REQUESTS)
def test_a_bad_request_is_told_what_is_wrong(
    make_client: MakeClient, method: str, path: str, body: bytes | None, kind: str | None, status: int, said: str
) -> None:
    reply = make_client(max_body_bytes=1000).open(path, method=method, data=body, content_type=kind)
    assert reply.status_code == status
    assert reply.json is not None
    assert said in reply.json["error"]["message"]
    assert reply.json["error"]["type"]


def test_a_body_without_a_content_type_is_taken_for_json(make_client: MakeClient) -> None:
    assert make_client().post("/", data=b'"x"').json == {"got": "x"}


@pytest.mark.parametrize("item", [pytest.param("crash", id="raises"), pytest.param("drop", id="gives too few outputs")])
def test_what_goes_wrong_in_the_agent_is_a_500_whose_reason_stays_in_the_log(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture, item: str
) -> None:
    reply = make_client().post("/", json=item)
    assert reply.status_code == 500
    assert b"secret" not in reply.data
    assert b"log" in reply.data
    assert "secret detail" in caplog.text or "predict returned 0 outputs, not a list of 1 output" in caplog.text


def test_an_output_that_json_cannot_hold_is_the_agents_fault(make_client: MakeClient, caplog: pytest.LogCaptureFixture) -> None:
    assert make_client().post("/", json="object").status_code == 500
    assert "JSON cannot hold" in caplog.text


def test_the_function_still_serves_after_its_agent_failed(make_client: MakeClient) -> None:
    client = make_client()
    client.post("/", json="crash")
    assert client.post("/", json="a").status_code == 200


def test_one_thread_owns_the_model_whoever_calls(make_client: MakeClient) -> None:
    client = make_client()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: client.application.test_client().post("/", json=n), range(12)))
    assert client.post("/", json="threads").json == 1


def test_a_call_past_its_deadline_is_a_504(make_client: MakeClient) -> None:
    client = make_client(timeout_s=0.05)
    Probe.gate.clear()
    assert client.post("/", json="hold").status_code == 504


def test_a_call_that_has_expired_in_the_queue_never_reaches_the_model(make_client: MakeClient) -> None:
    client = make_client(timeout_s=0.2)
    app = client.application
    Probe.gate.clear()
    assert app.test_client().post("/", json="hold").status_code == 504  # and the model is at it still
    assert app.test_client().post("/", json="late").status_code == 504
    Probe.gate.set()
    seen: list[Any] = wait_until("the model to be free again", lambda: (client.post("/", json="seen").json or {}).get("seen"))
    assert "hold" in seen
    assert "late" not in seen


def test_a_full_queue_is_told_at_once_and_when_to_come_back(make_client: MakeClient) -> None:
    client = make_client(max_batch=1, queue_limit=1)
    app = client.application
    with ThreadPoolExecutor(4) as pool:
        Probe.gate.clear()
        running = [pool.submit(app.test_client().post, "/", json="hold") for _ in range(4)]
        wait_until("those who are refused", lambda: sum(call.done() for call in running) == 2)  # one is computed, and one waits
        refused = [call.result() for call in running if call.done()]
        Probe.gate.set()
    assert sorted(call.result().status_code for call in running) == [200, 200, 503, 503]
    assert all(int(reply.headers["Retry-After"]) >= 1 for reply in refused)


def test_before_it_is_ready_callers_are_told_so_and_probes_learn_the_phase(make_client: MakeClient) -> None:
    SlowToLoad.may_load.clear()
    client = make_client("SlowToLoad", wait=False)
    wait_until("loading", lambda: (client.get("/readyz").json or {})["phase"] == "loading")
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200
    refused = client.post("/", json="a")
    assert refused.status_code == 503
    assert "not ready yet (loading)" in (refused.json or {})["error"]["message"]
    assert refused.headers["Retry-After"] == "1"
    SlowToLoad.may_load.set()
    wait_until("ready", lambda: client.get("/readyz").status_code == 200)


def test_readiness_tells_the_stages_of_the_cold_start(make_client: MakeClient) -> None:
    document = make_client().get("/readyz").json or {}
    assert document["phase"] == "ready"
    assert list(document["stages"]) == ["listen", "import", "load", "ready"]
    assert sorted(document["stages"].values()) == list(document["stages"].values())
    assert (document["restored_bytes"], document["total_bytes"]) == (0, 0)


def test_a_draining_function_is_not_ready(tmp_path: Path) -> None:
    settings = FunctionSettings(agent="function.agents.echo:Echo")
    model = Model(settings, Weights(WeightsSettings(cache_dir=tmp_path)), started_at=time.monotonic())
    model.start(on_failure=lambda _: None)
    wait_until("ready", lambda: model.phase == "ready")
    model.drain()
    client = create_app(settings, model).test_client()
    assert (client.get("/readyz").status_code, (client.get("/readyz").json or {})["phase"]) == (503, "draining")
    assert client.post("/", json=1).json == 1  # what still comes in is answered


def test_models_are_listed_and_described(make_client: MakeClient) -> None:
    client = make_client()
    card = {"id": "probe", "object": "model", "created": 0, "owned_by": "relight"}
    assert client.get("/v1/models").json == {"object": "list", "data": [card], "models": ["probe"]}
    assert client.get("/v1/models/probe").json == {"name": "probe", "ready": True, **card}


def test_metrics_count_requests_by_route_and_code(make_client: MakeClient) -> None:
    client = make_client()
    client.post("/", json="a")
    client.post("/", json="bad")
    client.get("/nowhere")
    text = client.get("/metrics").text
    assert 'function_requests_total{code="200",route="/"} 1.0' in text
    assert 'function_requests_total{code="400",route="/"} 1.0' in text
    assert 'function_requests_total{code="404",route="none"} 1.0' in text
    assert 'function_ready{model="probe"} 1.0' in text
    assert 'function_cold_start_seconds{model="probe",stage="load"}' in text
