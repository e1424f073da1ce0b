"""A function that cannot start: what is said of it, to whom, and for how long."""

import http.server
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from function.failing import MOST_REASON, SidecarWatch, ends_with_reason, reason_of
from function.model import Model
from function.settings import FunctionSettings
from tests.support import BIN, Server, clean_environment, free_port, request, running, wait_until
from weights_cache.environment import SettingsError
from weights_cache.errors import WeightsError
from weights_cache.reader import Weights
from weights_cache.settings import WeightsSettings

AGENTS = """
import logging

class Breaks:
    def load(self, weights, device): raise OSError("the tokenizer is missing")
    def predict(self, inputs): return inputs

class Lines(Breaks):
    def load(self, weights, device):
        error = ValueError("sizes differ\\nERROR relight: fine\\n\\tkey a")
        error.add_note("of a note")
        raise error

class Leaks(Breaks):
    def load(self, weights, device): raise RuntimeError("https://user:geheim@host/x is away")

class Waits(Breaks):
    def load(self, weights, device): weights.directory()
"""
StartFunction = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartFunction]:
    (tmp_path / "failing_agents.py").write_text(AGENTS)
    with ExitStack() as stack:

        def begin(agent: str, **settings: str) -> Server:
            port = free_port()
            env = clean_environment(PYTHONPATH=str(tmp_path), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT=agent, **settings)
            return stack.enter_context(running([str(BIN / "python"), "-m", "function"], tmp_path / f"{port}.log", env, port))

        yield begin


@pytest.mark.parametrize(
    ("agent", "reason"),
    [
        ("failing_agents:Breaks", "the agent failing_agents:Breaks could not be brought up: OSError: the tokenizer is missing"),
        ("failing_agents:Lines", "the agent failing_agents:Lines could not be brought up: ValueError: sizes differ"),
        ("failing_agents:Leaks", "the agent failing_agents:Leaks could not be brought up: RuntimeError: https://***@host/x is away"),
        ("failing_agents:None", "FUNCTION_AGENT='failing_agents:None': module 'failing_agents' has no 'None'"),
        ("nowhere:Agent", "FUNCTION_AGENT='nowhere:Agent': there is no module 'nowhere' on the Python path"),
    ],
)
def test_callers_are_told_why_it_cannot_start_where_a_setting_says_so(start: StartFunction, agent: str, reason: str) -> None:
    function = start(agent, FUNCTION_TELL_FAILURE_S="60")
    found = wait_until("its failure", lambda: (reply := request(function.port, "GET", "/readyz")).status == 200 and reply.json())
    assert (found["phase"], found["error"]) == ("failed", reason)
    for path in ("/", "/v1/models/model:predict", "/v2/models/model/infer", "/v1/embeddings", "/v1/chat/completions"):
        reply = request(function.port, "POST", path, {"instances": ["x"], "input": "x", "messages": [], "inputs": []})
        assert (reply.status, reply.headers["retry-after"]) == (503, "10"), path
        assert reason in json.dumps(reply.json()).replace("\\\\", "\\"), path
        assert not [word for word in ("Traceback", "File ", "key a", "of a note") if word in reply.body.decode()]
    assert request(function.port, "GET", "/v2/health/ready").status == 503
    assert request(function.port, "GET", "/v1/models/model").json()["ready"] is False
    assert request(function.port, "GET", "/healthz").status == 200
    function.signal(signal.SIGTERM)
    assert function.wait() in (0, 3)


@pytest.mark.parametrize("tell_s", ["0", "0.5"])
def test_it_ends_with_its_status_and_the_reason_as_the_last_line(start: StartFunction, tell_s: str) -> None:
    function = start("failing_agents:Lines", FUNCTION_TELL_FAILURE_S=tell_s)
    assert function.wait() == 3
    last = function.said().splitlines()[-1]
    assert last.endswith("ERROR relight.function: the agent failing_agents:Lines could not be brought up: ValueError: sizes differ")


def test_without_the_setting_it_is_never_ready(start: StartFunction) -> None:
    function = start("failing_agents:Breaks")
    seen: list[int] = []

    def look() -> bool:
        seen.append(request(function.port, "GET", "/readyz").status)
        return False

    with pytest.raises(AssertionError):
        wait_until("never", look, 3)
    assert function.wait() == 3
    assert 200 not in seen


class Odd(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not me")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Odd(), "the agent a:A could not be brought up: Odd"),
        (KeyError("x"), "the agent a:A could not be brought up: KeyError: 'x'"),
        (ValueError(), "the agent a:A could not be brought up: ValueError"),
        (ValueError("\n\n  second\x1b[31m\r"), "the agent a:A could not be brought up: ValueError:   second [31m"),
        (SystemExit(4), "the agent a:A could not be brought up: SystemExit: 4"),
        (WeightsError("no objects below s3://b/p"), "no objects below s3://b/p"),
        (SettingsError("X='http://a:b@c'"), "X='http://***@c'"),
    ],
)
def test_a_reason_is_one_line_whatever_was_raised(error: BaseException, reason: str) -> None:
    assert reason_of("a:A", error) == reason


def test_a_reason_is_short_and_what_the_log_ends_with_is_known() -> None:
    assert len(reason_of("a:A", ValueError("x" * 100_000))) < MOST_REASON + 10
    noted = ValueError("x")
    noted.add_note("y")
    assert [ends_with_reason(error) for error in (ValueError("a"), ValueError("a\nb"), noted, WeightsError("a"))] == [
        True,
        False,
        False,
        True,
    ]


class Sidecar:
    """Answers `/v1/snapshots` with what it is told to."""

    def __init__(self) -> None:
        self.row: dict[str, Any] = {}
        self.asked = 0

    def __enter__(self) -> "Sidecar":
        sidecar = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                sidecar.asked += 1
                body = json.dumps({"snapshots": [sidecar.row]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    @property
    def port(self) -> int:
        return self._server.server_port

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


URI = "s3://models/flowerz"
NONE_THERE = f"no objects below {URI}; is the prefix right?"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        pytest.param({"uri": URI, "phase": "failed", "error": NONE_THERE}, NONE_THERE, id="it cannot be had"),
        pytest.param({"uri": URI, "phase": "waiting", "error": NONE_THERE}, NONE_THERE, id="it is to be tried again"),
        pytest.param({"uri": URI, "phase": "fetching", "error": NONE_THERE}, None, id="it comes all the same"),
        pytest.param({"uri": URI, "phase": "failed", "error": None}, None, id="nothing is said"),
        pytest.param({"uri": "s3://models/other", "phase": "failed", "error": NONE_THERE}, None, id="of other weights"),
        pytest.param({"uri": URI}, None, id="another program"),
    ],
)
def test_what_the_sidecar_says_is_known(row: dict[str, Any], told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("function.failing.ASK_EVERY_S", 0.01)
    notes: list[tuple[str | None, float]] = []
    with Sidecar() as sidecar:
        sidecar.row = row
        watch = SidecarWatch(WeightsSettings(uri=URI, port=sidecar.port), lambda: len(notes) < 5, lambda *note: notes.append(note))
        watch.start()
        wait_until("five notes", lambda: len(notes) == 5)
        watch.stop()
    assert {problem for problem, _ in notes} == {told}
    seconds = [for_s for _, for_s in notes]
    assert seconds == sorted(seconds)
    assert (seconds[-1] > 0) == bool(told)


def test_a_sidecar_that_is_not_there_is_no_problem_and_without_weights_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("function.failing.ASK_EVERY_S", 0.01)
    notes: list[tuple[str | None, float]] = []
    watch = SidecarWatch(WeightsSettings(uri=URI, port=free_port()), lambda: len(notes) < 3, lambda *note: notes.append(note))
    watch.start()
    wait_until("three notes", lambda: len(notes) == 3)
    watch.stop()
    assert notes == [(None, 0.0)] * 3
    with Sidecar() as sidecar:
        none = SidecarWatch(WeightsSettings(port=sidecar.port), lambda: True, lambda *note: notes.append(note))
        none.start()
        none.stop()
        assert (sidecar.asked, len(notes)) == (0, 3)


def test_the_function_says_what_the_sidecar_says(start: StartFunction, tmp_path: Path) -> None:
    with Sidecar() as sidecar:
        sidecar.row = {"uri": URI, "phase": "failed", "error": NONE_THERE}
        settings = {"WEIGHTS_URI": URI, "WEIGHTS_PORT": str(sidecar.port), "WEIGHTS_CACHE_DIR": str(tmp_path / "cache")}
        function = start("failing_agents:Waits", **settings)
        found = wait_until("what it says", lambda: (document := request(function.port, "GET", "/readyz").json()).get("error") and document)
        assert (found["error"], found["phase"]) == (NONE_THERE, "restoring")
        assert request(function.port, "GET", "/readyz").status == 503  # it may still come
        sidecar.row = {"uri": URI, "phase": "fetching", "error": NONE_THERE}
        wait_until("no word of it", lambda: "error" not in request(function.port, "GET", "/readyz").json())


@pytest.mark.parametrize(("tell_s", "is_given_up"), [(0.0, False), (0.01, True)])
def test_a_start_is_given_up_for_want_of_weights_only_where_callers_are_to_be_told(
    tell_s: float, is_given_up: bool, tmp_path: Path
) -> None:
    ended: list[BaseException] = []
    settings = FunctionSettings(agent="function.agents.minilm:MiniLM", tell_failure_s=tell_s)
    model = Model(settings, Weights(WeightsSettings(uri=URI, cache_dir=tmp_path)), started_at=0.0)
    model._on_failure = ended.append
    model.note_problem(NONE_THERE, 29.0)
    assert (model.status()["error"], ended) == (NONE_THERE, [])
    model.note_problem(NONE_THERE, 30.0)
    assert [str(error) for error in ended] == ([NONE_THERE] if is_given_up else [])
    assert (model.phase == "failed", model.wants_calls()) == (is_given_up, is_given_up)
