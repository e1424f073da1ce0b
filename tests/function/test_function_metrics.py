"""What `/metrics` says after traffic that is known to the last request."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import BIN, clean_environment, fill_cache, free_port, request, running, wait_until

AGENT = """
import time
from function.agent import BadInput

class Slow:
    def load(self, weights, device):
        weights.path("model.bin")
    def predict(self, inputs):
        if "bad" in inputs:
            raise BadInput("not this one")
        time.sleep(0.02)
        return inputs
    def start(self, input):
        return list(input["text_input"])
    def step(self, sequences):
        time.sleep(0.01)
        return [sequence.pop(0).strip() if sequence else None for sequence in sequences]
"""
PREDICT = "/v1/models/m:predict"
STREAM = "/v2/models/<path:name>/generate_stream"
WEIGHTS = b"some weights"


@dataclass(frozen=True)
class Scrape:
    """What is told at one time."""

    values: dict[tuple[str, frozenset[tuple[str, str]]], float]
    within_s: float = 0.0  # all that it tells of

    def __call__(self, name: str, **labels: str) -> float:
        """A sample's value."""
        return self.values[f"function_{name}", frozenset(labels.items())]

    def is_complete(self) -> bool:
        """Whether the last request has been counted, and its last step."""
        return self.histogram("step_sequences")[0] == 5 and any(("route", STREAM) in labels for _, labels in self.values)

    def histogram(self, name: str, **labels: str) -> tuple[float, float]:
        """How many were observed, and their sum."""
        return self(f"{name}_count", **labels), self(f"{name}_sum", **labels)


def scrape(port: int) -> Scrape:
    families = text_string_to_metric_families(request(port, "GET", "/metrics").body.decode())
    return Scrape({(sample.name, frozenset(sample.labels.items())): sample.value for family in families for sample in family.samples})


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scrape]:
    """After three, six and two inputs in batches of at most four, a bad one, and a stream of three pieces and a blank."""
    folder, port = tmp_path_factory.mktemp("metrics"), free_port()
    (folder / "slow_agent.py").write_text(AGENT)
    fill_cache(folder / "cache", "s3://bucket/prefix", {"model.bin": WEIGHTS})
    env = clean_environment(PYTHONPATH=str(folder), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT="slow_agent:Slow")
    env |= {"FUNCTION_MODEL_NAME": "m", "FUNCTION_MAX_BATCH": "4"}
    env |= {"WEIGHTS_URI": "s3://bucket/prefix", "WEIGHTS_CACHE_DIR": str(folder / "cache")}
    with running([str(BIN / "python"), "-m", "function"], folder / "log", env, port) as server:
        server.ready()
        began = time.monotonic()
        for count in (3, 6, 2):
            assert request(port, "POST", PREDICT, {"instances": [0] * count}).status == 200
        assert request(port, "POST", "/", "bad").status == 400
        assert request(port, "POST", "/v2/models/m/generate_stream", {"text_input": "a bc"}).body.count(b"data: ") == 3
        # The model's thread notes the last step, and the worker the last request, after the caller has its end.
        found = wait_until("all", lambda: (found := scrape(port)).is_complete() and found)
        yield replace(found, within_s=time.monotonic() - began)


def test_batches(told: Scrape) -> None:
    assert told.histogram("batch_inputs") == (5, 3 + 4 + 2 + 2 + 1)
    assert [told("batch_inputs_bucket", le=le) for le in ("1.0", "2.0", "4.0", "8.0")] == [1, 3, 5, 5]
    assert told("instances_total") == 3 + 6 + 2 + 1 + 1


def test_seconds_in_the_model(told: Scrape) -> None:
    count, seconds = told.histogram("model_seconds")
    assert count == 5
    assert 4 * 0.02 <= seconds < told.within_s


def test_seconds_in_the_queue_are_told_once_for_each_call(told: Scrape) -> None:
    count, seconds = told.histogram("queue_seconds")
    assert count == 4
    assert 0 < seconds < told.within_s


def test_steps_and_pieces(told: Scrape) -> None:
    assert told.histogram("step_sequences") == (5, 5)
    assert 5 * 0.01 <= told("step_seconds_total") < told.within_s
    assert told("pieces_total") == 3


def test_the_first_piece(told: Scrape) -> None:
    count, seconds = told.histogram("first_piece_seconds")
    assert count == 1
    assert 0.01 <= seconds < told.within_s


def test_requests_and_their_seconds_by_route(told: Scrape) -> None:
    route = "/v1/models/<path:wanted>:predict"
    assert told("requests_total", route=route, code="200") == 3
    assert told("requests_total", route="/", code="400") == 1
    assert told("requests_total", route=STREAM, code="200") == 1
    count, seconds = told.histogram("request_seconds", route=route)
    assert count == 3
    assert 4 * 0.02 <= seconds < told.within_s
    assert told.histogram("request_seconds", route="/")[0] == 1


def test_the_state(told: Scrape) -> None:
    assert told("weights_bytes", model="m") == len(WEIGHTS)
    assert told("ready", model="m") == 1
    assert told("waiting", model="m") == told("active_streams", model="m") == told("breaker_trips_total", model="m") == 0
    assert told("breaker_state", model="m", state="closed") == 1
    assert 0 < told("cold_start_seconds", model="m", stage="import") <= told("cold_start_seconds", model="m", stage="ready")
