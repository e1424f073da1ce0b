"""Who may ask, and what is noted of it: keys, request ids, the log's lines, Server-Timing, the metrics' own port."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from function import log
from function.access import Access, finish
from function.agent import Weights
from function.cors import Cors
from function.metrics import Metrics
from function.model import Model
from function.settings import FunctionSettings
from tests.support import BIN, Server, clean_environment, free_port, request, running, wait_until
from weights_cache.settings import WeightsSettings

METRICS = Metrics(Model(FunctionSettings(agent="function.agents.echo:Echo"), Weights(WeightsSettings()), started_at=0.0), "m")
StartFunction = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartFunction]:
    with ExitStack() as stack:

        def begin(**settings: Any) -> Server:
            port = free_port()
            env = clean_environment(
                PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT="function.agents.echo:Echo", FUNCTION_MODEL_NAME="m"
            )
            env |= {name: str(value) for name, value in settings.items()}
            return stack.enter_context(running([str(BIN / "python"), "-m", "function"], tmp_path / f"{port}.log", env, port))

        yield begin


def lines(function: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in function.said().splitlines() if line.startswith("{")]


def test_each_request_has_an_id_and_a_line_in_the_log(start: StartFunction) -> None:
    function = start().ready()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    told = request(function.port, "POST", "/", "a", {"X-Request-Id": "mine", "traceparent": trace})
    assert told.headers["x-request-id"] == "mine"
    made = request(function.port, "POST", "/nowhere", "a", {"X-Request-Id": "not one"})
    assert re.fullmatch("[0-9a-f]{32}", made.headers["x-request-id"])
    request(function.port, "GET", "/metrics")
    first, second = wait_until("both lines", lambda: len(found := lines(function)) == 2 and found)
    assert (first["request_id"], first["traceparent"], first["method"], first["path"], first["status"]) == ("mine", trace, "POST", "/", 200)
    assert first["total_s"] >= first["queue_s"] + first["model_s"] > 0
    assert (second["request_id"], second["status"], second["traceparent"]) == (made.headers["x-request-id"], 404, None)


RAW = st.text(st.characters(max_codepoint=0xFF) | st.sampled_from('\n\r\x1b\x85\x9b\u2028\u202e{}"\\'), max_size=2000)


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=RAW, path=RAW, headers=st.dictionaries(st.sampled_from(["x-request-id", "traceparent"]), RAW))
@example(method="\U0001f600" * 900, path="\U0001f600" * 900, headers={"traceparent": "\U0001f600" * 900, "x-request-id": "~" * 128})
def test_whatever_a_caller_sends_its_line_is_one_without_control_characters_that_fits_into_a_pipe(
    method: str, path: str, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(log, "write", written.append)
    access = Access(METRICS, Cors(""), is_logged=True)
    note = access.open(method, path, headers)
    access.end(note, "none", 404)
    finish(note)
    (line,) = written
    assert re.fullmatch("\\{[^\0-\x1f\x7f-\x9f\u2028-\u202e]*\\}\n", line.decode())
    assert len(line) <= 4096
    said = json.loads(line)
    assert (said["path"], said["method"]) == (path[:400], method[:20])


def test_callers_are_told_where_their_time_went(start: StartFunction) -> None:
    reply = request(start().ready().port, "POST", "/", "a")
    assert re.fullmatch(r"queue;dur=[\d.]+, model;dur=[\d.]+, total;dur=[\d.]+", reply.headers["server-timing"])


def test_the_log_can_be_silent(start: StartFunction) -> None:
    function = start(FUNCTION_ACCESS_LOG="false").ready()
    assert request(function.port, "POST", "/", "a").status == 200
    assert lines(function) == []


def test_with_keys_everything_but_the_probes_needs_one(start: StartFunction, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst-key\n\nsecond-key\n")
    port = start(FUNCTION_API_KEYS_FILE=keys).ready().port
    assert request(port, "GET", "/healthz").status == 200
    for path in ("/metrics", "/v1/models", "/nowhere"):
        assert request(port, "GET", path).status == 401
    for value in ("", "Bearer", "Bearer ", "Bearer wrong", "Basic first-key", "first-key", "Bearer # ours"):
        refused = request(port, "POST", "/", "a", {"Authorization": value} if value else {})
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["type"] == "unauthorized"
    for key in ("first-key", "second-key"):
        assert request(port, "POST", "/", "a", {"Authorization": f"Bearer {key}"}).status == 200


def test_keys_may_be_changed_while_it_runs(start: StartFunction, tmp_path: Path) -> None:
    keys, draft = tmp_path / "keys", tmp_path / "draft"
    keys.write_text("old\n")
    port = start(FUNCTION_API_KEYS_FILE=keys).ready().port
    draft.write_text("new\n")
    draft.rename(keys)
    statuses = [request(port, "POST", "/", "a", {"Authorization": f"Bearer {key}"}).status for key in ("old", "new")]
    assert statuses == [401, 200]


def test_keys_that_were_taken_away_are_gone_and_the_log_says_so_once(start: StartFunction, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")
    function = start(FUNCTION_API_KEYS_FILE=keys).ready()
    asked = {"Authorization": "Bearer a-key"}
    assert request(function.port, "POST", "/", "a", asked).status == 200
    keys.write_text("")
    for method, path in (("POST", "/"), ("POST", "/v1/models/m:predict"), ("GET", "/metrics"), ("GET", "/v1/models")):
        refused = request(function.port, method, path, {"instances": [1]} if method == "POST" else None, asked)
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        assert refused.json()["error"] == {
            "type": "unavailable",
            "message": "the keys cannot be checked now; the function's log says why",
        }
    keys.unlink()
    assert request(function.port, "POST", "/", "a", asked).status == 503
    assert [request(function.port, "GET", path).status for path in ("/healthz", "/readyz")] == [200, 200]
    keys.write_text("a-key\n")
    assert request(function.port, "POST", "/", "a", asked).status == 200
    said = function.said()
    assert said.count("WARNING relight.function: FUNCTION_API_KEYS_FILE=") == 1
    assert f"FUNCTION_API_KEYS_FILE='{keys}': holds no key; one a line is expected; calls that need a key are refused until" in said
    assert said.count(f"INFO relight.function: FUNCTION_API_KEYS_FILE='{keys}' holds keys again") == 1


def test_no_credentials_reach_the_log_or_an_answer(start: StartFunction, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("right-s3cret\n")
    function = start(FUNCTION_API_KEYS_FILE=keys).ready()
    for value in (
        "Bearer right-s3cret",
        "Bearer wrong-s3cret",
        "right-s3cret",
        "Basic s3cret",
        "Bearer \xe9-s3cret",
        "Bearer s3cret s3cret",
    ):
        for path in ("/", "/v1/models/m:predict", "/v2/models/m/infer", "/nowhere"):
            answer = request(function.port, "POST", path, {"instances": "no"}, {"Authorization": value, "X-Request-Id": "told"})
            assert b"s3cret" not in answer.body + repr(answer.headers).encode()
    for line in (
        "Authorization Bearer s3cret-key",
        "Authorization : Bearer s3cret-key",
        "Authorization: Bearer s3cret-key\x01",
        "Expect: no",
    ):
        head = f"POST / HTTP/1.1\r\nHost: x\r\n{line}\r\nContent-Length: 3\r\n\r\n"
        with socket.create_connection(("127.0.0.1", function.port)) as connection:
            connection.sendall(head.encode() + b'"a"')
            answer_to_odd = connection.recv(1 << 16)
        assert answer_to_odd.startswith(b"HTTP/1.1 4")
        assert b"s3cret" not in answer_to_odd
    keys.write_text("")
    assert request(function.port, "POST", "/", "a", {"Authorization": "Bearer right-s3cret"}).status == 503
    wait_until("all lines", lambda: len(lines(function)) == 25)
    assert "s3cret" not in function.said()


@pytest.mark.parametrize(("content", "said"), [(None, "No such file or directory"), ("# none\n", "holds no key")])
def test_a_file_without_keys_stops_the_start_with_one_line(start: StartFunction, tmp_path: Path, content: str | None, said: str) -> None:
    keys = tmp_path / "keys"
    if content:
        keys.write_text(content)
    function = start(FUNCTION_API_KEYS_FILE=keys)
    assert function.wait() == 2
    assert function.said().startswith(f"function: FUNCTION_API_KEYS_FILE='{keys}': {said}")
    assert function.said().count("\n") == 1


def test_metrics_have_a_port_of_their_own_that_needs_no_key(start: StartFunction, tmp_path: Path) -> None:
    keys, metrics_port = tmp_path / "keys", free_port()
    keys.write_text("key\n")
    port = start(FUNCTION_API_KEYS_FILE=keys, FUNCTION_METRICS_PORT=metrics_port).ready().port
    request(port, "POST", "/", "a", {"Authorization": "Bearer key"})
    assert 'function_requests_total{code="200",route="/"} 1.0' in request(metrics_port, "GET", "/metrics").body.decode()
