"""A function that cannot start: what is said of it, to whom, and for how long."""

import http.server
import json
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from function.agent import load_agent
from function.errors import Unavailable
from function.failing import MOST_REASON, Failing, Patience, ends_with_reason, reason_of, told_of
from function.process import trim
from tests.support import BIN, Server, clean_environment, free_port, request, running, wait_until
from weights_cache.environment import SettingsError
from weights_cache.errors import WeightsError

AGENTS = """
import signal

class Breaks:
    def load(self, weights, device): raise OSError("the tokenizer is missing")
    def predict(self, inputs): return inputs

class Lines(Breaks):
    def load(self, weights, device):
        error = ValueError("sizes differ\\nERROR relight: fine\\n\\tkey a")
        error.add_note("of a note")
        raise error

class Leaks(Breaks):
    def load(self, weights, device): raise RuntimeError("https://user:geheim@host/x is away\\nand more")

class Signals(Breaks):
    def load(self, weights, device): signal.signal(signal.SIGTERM, signal.SIG_DFL)

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
        ("failing_agents:Breaks", "the agent failing_agents:Breaks could not be brought up: OSError; the function's log says why"),
        ("failing_agents:Lines", "the agent failing_agents:Lines could not be brought up: ValueError; the function's log says why"),
        (
            "failing_agents:Signals",
            "the agent failing_agents:Signals could not be brought up: ValueError; an agent runs in a thread of its own",
        ),
        ("failing_agents:None", "FUNCTION_AGENT='failing_agents:None': module 'failing_agents' has no 'None'"),
        ("nowhere:Agent", "FUNCTION_AGENT='nowhere:Agent': there is no module 'nowhere'; looked in "),
    ],
)
def test_callers_are_told_why_it_cannot_start_where_a_setting_says_so(start: StartFunction, agent: str, reason: str) -> None:
    function = start(agent, FUNCTION_TELL_FAILURE_S="60")
    found = wait_until("its failure", lambda: (reply := request(function.port, "GET", "/readyz")).status == 200 and reply.json())
    assert found["phase"] == "failed"
    assert found["error"].startswith(reason)
    for path in ("/", "/v1/models/model:predict", "/v2/models/model/infer", "/v1/embeddings", "/v1/chat/completions"):
        reply = request(function.port, "POST", path, {"instances": ["x"], "input": "x", "messages": [], "inputs": []})
        assert (reply.status, reply.headers["retry-after"]) == (503, "10"), path
        assert reason in json.dumps(reply.json()).replace("\\\\", "\\"), path
        assert not [word for word in ("Traceback", "File ", "sizes differ", "tokenizer", "of a note") if word in reply.body.decode()]
    assert request(function.port, "GET", "/v2/health/ready").status == 503
    assert request(function.port, "GET", "/v1/models/model").json()["ready"] is False
    assert request(function.port, "GET", "/healthz").status == 200
    function.signal(signal.SIGTERM)
    assert function.wait() in (0, 2, 3)


@pytest.mark.parametrize("tell_s", ["0", "0.5"])
def test_it_ends_with_its_status_and_the_reason_as_the_last_line(start: StartFunction, tell_s: str) -> None:
    function = start("failing_agents:Lines", FUNCTION_TELL_FAILURE_S=tell_s)
    assert function.wait() == 3
    last = function.said().splitlines()[-1]
    assert last.endswith("ERROR relight.function: the agent failing_agents:Lines could not be brought up: ValueError: sizes differ")


def test_the_reason_is_the_last_line_behind_those_of_callers_who_were_told(start: StartFunction) -> None:
    function = start("failing_agents:Breaks", FUNCTION_TELL_FAILURE_S="3")
    wait_until("its failure", lambda: request(function.port, "GET", "/readyz").status == 200)
    assert request(function.port, "POST", "/", 1).status == 503
    assert function.wait() == 3
    *others, last = function.said().splitlines()
    assert last.endswith("the agent failing_agents:Breaks could not be brought up: OSError: the tokenizer is missing")
    assert '"status":503' in others[-1].replace(" ", "")


def test_the_last_line_is_masked_too(start: StartFunction) -> None:
    function = start("failing_agents:Leaks")
    assert function.wait() == 3
    assert function.said().splitlines()[-1].endswith("could not be brought up: RuntimeError: https://***@host/x is away")
    assert "geheim" not in function.said()


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
    told = told_of("a:A", error)
    assert told == reason if "could not" not in reason else told.endswith(f"{type(error).__name__}; the function's log says why")


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


@pytest.mark.parametrize(("is_waiting", "ends"), [(True, [NONE_THERE]), (False, [])], ids=["it waits", "they have come"])
def test_weights_that_do_not_come_are_given_up_after_a_while(is_waiting: bool, ends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("function.failing.LOOK_S", 0.01)
    monkeypatch.setattr("function.failing.PATIENCE_S", 0.05)
    ended: list[BaseException] = []
    patience = Patience(lambda: NONE_THERE, lambda: is_waiting, ended.append)
    patience.start()
    wait_until("its end", lambda: not patience._thread.is_alive())
    patience.stop()
    assert [str(error) for error in ended] == ends


def test_a_problem_that_passes_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("function.failing.LOOK_S", 0.0)
    ended: list[BaseException] = []
    looks: list[int] = []
    clock = iter(range(0, 10_000, 20))  # seconds between two looks: less than the patience, and two of them more
    monkeypatch.setattr("function.failing.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    said = iter([NONE_THERE, NONE_THERE, None] * 10)

    def problem() -> str | None:
        looks.append(1)
        return next(said)

    Patience(problem, lambda: len(looks) < 20, ended.append)._run()
    assert (ended, len(looks)) == ([], 20)


def test_the_function_says_what_the_sidecar_says(start: StartFunction, tmp_path: Path) -> None:
    with Sidecar() as sidecar:
        sidecar.row = {"uri": URI, "phase": "failed", "error": NONE_THERE}
        settings = {"WEIGHTS_URI": URI, "WEIGHTS_PORT": str(sidecar.port), "WEIGHTS_CACHE_DIR": str(tmp_path / "cache")}
        function = start("failing_agents:Waits", **settings)
        found = wait_until("what it says", lambda: (document := request(function.port, "GET", "/readyz").json()).get("error") and document)
        assert (found["error"], found["phase"]) == (f"the sidecar says: {NONE_THERE}", "restoring")
        assert request(function.port, "GET", "/readyz").status == 503  # it may still come
        sidecar.row = {"uri": URI, "phase": "fetching", "error": NONE_THERE}
        wait_until("no word of it", lambda: "error" not in request(function.port, "GET", "/readyz").json())


def test_of_two_failures_the_first_one_counts_and_the_end_comes_once() -> None:
    entered: list[str] = []
    ended: list[BaseException] = []
    failing = Failing("a:A", 0.0, lambda: entered.append("failed"), lambda: NONE_THERE)
    failing.check()
    assert failing.reason == NONE_THERE
    failing.check()  # it may pass
    failing.fail(WeightsError("first"), ended.append)
    failing.fail(WeightsError("second"), ended.append)
    assert ([str(error) for error in ended], entered, failing.reason) == (["first"], ["failed"], "first")
    with pytest.raises(Unavailable, match="the function cannot start: first"):
        failing.check()


def test_a_probe_has_a_moment_to_see_why_even_if_callers_are_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("function.failing.MOMENT_S", 60.0)
    ended: list[BaseException] = []
    failing = Failing("a:A", 0.0, lambda: None)
    thread = threading.Thread(target=failing.fail, args=(WeightsError("x"), ended.append))
    thread.start()
    wait_until("the reason", lambda: failing.reason == "x")
    assert (thread.is_alive(), ended) == (True, [])
    failing.stop()
    thread.join(30)
    assert not thread.is_alive()


def test_who_is_told_to_end_meanwhile_ends_as_told() -> None:
    ended: list[BaseException] = []
    failing = Failing("a:A", 60.0, lambda: None)
    thread = threading.Thread(target=failing.fail, args=(WeightsError("x"), ended.append))
    thread.start()
    failing.stop()
    thread.join(30)
    assert (thread.is_alive(), ended) == (False, [])


@pytest.mark.parametrize(
    ("module", "files"),
    [("def broken(:", []), ("import other", ["agent.py", "other.py"]), ("class A:\n    def __init__(self): 1 / 0", ["agent.py"])],
    ids=["syntax", "import", "constructor"],
)
def test_a_traceback_has_the_frames_of_the_agents_author_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, files: list[str]
) -> None:
    (tmp_path / "agent.py").write_text(module)
    (tmp_path / "other.py").write_text("1 / 0")
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        with pytest.raises((SyntaxError, ZeroDivisionError)) as raised:
            load_agent("agent:A", [str(tmp_path)])
    finally:
        for name in ("agent", "other"):
            sys.modules.pop(name, None)
    error = raised.value
    error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # behind the test itself
    trim(error)
    assert [Path(frame.filename).name for frame in traceback.extract_tb(error.__traceback__)] == files


def test_a_traceback_without_any_frame_of_an_author_stays_as_it_is() -> None:
    error = ValueError()
    with pytest.raises(SettingsError) as raised:
        load_agent("json:tool")
    ours = error.__traceback__ = raised.traceback[-1]._rawentry  # a frame of agent.py
    trim(error)
    assert error.__traceback__ is ours
