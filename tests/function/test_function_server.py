"""The function as it is deployed: `python -m function` under gunicorn, driven over HTTP."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from tests.support import BIN, ROOT, Reply, Server, clean_environment, free_port, request, running, wait_until

AGENTS = """
import os, threading, time

GATE = os.environ.get("GATE")
if GATE:  # an import that takes as long as somebody wants it to
    while not os.path.exists(GATE):
        time.sleep(0.01)

class Sleeper:
    def load(self, weights, device): pass
    def predict(self, inputs):
        time.sleep(max(inputs))
        return inputs

class Holds:
    def load(self, weights, device): pass
    def predict(self, inputs):
        for path in inputs:
            if path:
                open(path + ".begun", "w").close()
            while path and not os.path.exists(path):
                time.sleep(0.005)
        return inputs

class Breaks:
    def load(self, weights, device): raise OSError("the tokenizer is missing")
    def predict(self, inputs): return inputs

class Quits:
    def load(self, weights, device): pass
    def predict(self, inputs): raise SystemExit("enough")

class Forks:
    def load(self, weights, device): pass
    def predict(self, inputs):
        pid = os.fork()
        if pid == 0 and inputs[0] == "raises": raise RuntimeError("in the child")
        if pid == 0 and inputs[0] == "exits": raise SystemExit(7)
        return ["the child's"] if pid == 0 else [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]

class Logging:
    # What an agent makes of Python's logging.
    how = "nothing"
    def load(self, weights, device):
        import logging, logging.config
        if self.how == "configures":
            logging.config.dictConfig({"version": 1})
        if self.how == "disables":
            logging.disable(logging.CRITICAL)
        if self.how == "makes records":
            logging.setLogRecordFactory(lambda *args, **more: 1 / 0)
        if self.how == "filters":
            logging.getLogger().handlers[0].addFilter(lambda record: 1 / 0)
    def predict(self, inputs): raise RuntimeError("a reason")

class Configures(Logging): how = "configures"
class Disables(Logging): how = "disables"
class Makes(Logging): how = "makes records"

class Wordless(Exception):
    def __str__(self): raise ValueError("no words")

class FailsWordless:
    def load(self, weights, device): raise Wordless
    def predict(self, inputs): return inputs

class FailsFull(FailsWordless):
    def load(self, weights, device):
        self.kept = []
        while True:
            self.kept.append(open(os.devnull))

class Threadless:
    # Threads cannot be started any more, as with a limit of processes.
    def load(self, weights, device):
        def refuse(*_): raise RuntimeError("can't start new thread")
        threading._start_new_thread = threading.Thread.start = refuse
    def predict(self, inputs): return inputs

class ForksInLoad:
    def load(self, weights, device):
        self.pid = os.fork()
        if self.pid: self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
    def predict(self, inputs): return [self.code]

class Meta(type):
    @property
    def __mro__(cls): raise ValueError("no order")

class Unordered(Exception, metaclass=Meta): pass

class RaisesUnordered:
    def load(self, weights, device): pass
    def predict(self, inputs): raise Unordered if inputs[0] else ValueError

class Moves:
    def load(self, weights, device): os.chdir("/")
    def predict(self, inputs): return inputs

class Names:
    def load(self, weights, device): self.names = list(weights)
    def warm_up(self): self.warm = True
    def predict(self, inputs): return [[self.names, self.warm, threading.current_thread().name]] * len(inputs)
"""


StartFunction = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartFunction]:
    (tmp_path / "some_agents.py").write_text(AGENTS)
    with ExitStack() as stack:

        def begin(agent: str = "some_agents:Sleeper", **settings: Any) -> Server:
            port = free_port()
            env = clean_environment(
                PYTHONPATH=str(tmp_path), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT=agent, FUNCTION_MODEL_NAME="m"
            )
            env |= {name: str(value) for name, value in settings.items()}
            return stack.enter_context(running([str(BIN / "python"), "-m", "function"], tmp_path / f"{port}.log", env, port))

        yield begin


def test_the_port_answers_probes_while_the_agent_is_still_being_imported(start: StartFunction, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    function = start(GATE=gate)
    reply = wait_until("the port", lambda: request(function.port, "GET", "/readyz"))
    assert (reply.status, reply.json()["phase"]) == (503, "importing")
    assert request(function.port, "GET", "/healthz").status == 200
    gate.touch()
    assert request(function.ready().port, "POST", "/", 0).json() == 0


def test_a_wrong_setting_stops_the_start_with_one_line(start: StartFunction) -> None:
    function = start(FUNCTION_TIMEOUT_S="-1")
    assert function.wait() == 2
    assert function.said() == "function: FUNCTION_TIMEOUT_S='-1': must be at least 0.001 and at most 3600\n"


def test_a_malformed_weights_uri_stops_the_start_with_one_line(start: StartFunction) -> None:
    function = start(WEIGHTS_URI="models/minilm")
    assert function.wait() == 2
    assert "weights URI 'models/minilm': must be s3://bucket/prefix" in function.said()
    assert function.said().count("\n") == 1


def test_an_agent_that_cannot_load_ends_the_server_and_says_why_once(start: StartFunction) -> None:
    function = start("some_agents:Breaks")
    assert function.wait() == 3
    assert function.said().count("OSError: the tokenizer is missing") == 1
    assert function.said().endswith("OSError: the tokenizer is missing\n")  # the last line is what people are shown first


def test_an_agent_that_does_not_exist_ends_the_server_and_says_so(start: StartFunction) -> None:
    function = start("some_agents:Missing")
    assert function.wait() == 2  # as for any setting that is wrong
    assert "FUNCTION_AGENT='some_agents:Missing': module 'some_agents' has no 'Missing'" in function.said()
    assert "Traceback" not in function.said()


def test_an_agent_that_quits_ends_its_own_request_alone(start: StartFunction) -> None:
    function = start("some_agents:Quits").ready()
    assert [request(function.port, "POST", "/", 1).status for _ in range(2)] == [500, 500]
    assert function.said().count("SystemExit: enough") == 2
    assert function.process.poll() is None


@contextmanager
def held(function: Server, folder: Path) -> Iterator[tuple[Future[Reply], Path]]:
    """A request that the model is at until the file is there, which it is after the `with`."""
    gate = folder / "gate"
    with ThreadPoolExecutor(1) as pool:
        in_flight = pool.submit(request, function.port, "POST", "/", str(gate))
        wait_until("it is in", Path(f"{gate}.begun").exists)
        try:
            yield in_flight, gate
        finally:
            gate.touch()


def test_sigterm_lets_a_running_request_finish_and_exits_with_0(start: StartFunction, tmp_path: Path) -> None:
    function = start("some_agents:Holds").ready()
    with held(function, tmp_path) as (in_flight, gate):
        function.signal(signal.SIGTERM)
        wait_until("draining", lambda: request(function.port, "GET", "/readyz").json()["phase"] == "draining")
        assert not in_flight.done()
        gate.touch()
        assert (in_flight.result().status, in_flight.result().json()) == (200, str(gate))
    assert function.wait(100) == 0


def test_it_is_gone_as_soon_as_the_last_answer_is_out(start: StartFunction, tmp_path: Path) -> None:
    function = start("some_agents:Holds", FUNCTION_DRAIN_S=3600).ready()
    with held(function, tmp_path) as (in_flight, gate):
        function.signal(signal.SIGTERM)
        wait_until("draining", lambda: request(function.port, "GET", "/readyz").json()["phase"] == "draining")
        gate.touch()
        assert in_flight.result().status == 200
    assert function.wait(100) == 0  # not when the grace time is over


def test_a_second_signal_does_not_wait_for_what_is_running(start: StartFunction, tmp_path: Path) -> None:
    function = start("some_agents:Holds", FUNCTION_DRAIN_S=3600).ready()
    with held(function, tmp_path) as (in_flight, _):
        function.signal(signal.SIGTERM)
        wait_until("draining", lambda: request(function.port, "GET", "/readyz").json()["phase"] == "draining")
        function.signal(signal.SIGINT)
        function.wait(100)
        with pytest.raises((OSError, HTTPException)):
            in_flight.result()


def chunked(port: int, *pieces: bytes) -> bytes:
    """The whole reply to a POST whose body is sent as these chunks."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n")
        return connection.makefile("rb").read()


def test_a_chunked_body_over_the_limit_is_refused_not_cut_short(start: StartFunction) -> None:
    port = start(FUNCTION_MAX_BODY_BYTES=1000).ready().port
    assert chunked(port, b'["' + b"a" * 800, b"b" * 800 + b'"]').startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_within_the_limit_is_read_whole(start: StartFunction) -> None:
    assert chunked(start().ready().port, b"0.", b"01").endswith(b"\r\n\r\n0.01")


def test_probes_are_answered_while_the_model_is_busy(start: StartFunction, tmp_path: Path) -> None:
    function = start("some_agents:Holds").ready()
    with held(function, tmp_path) as (in_flight, _):
        assert [request(function.port, "GET", path).status for path in ("/readyz", "/healthz", "/metrics")] == [200] * 3
        assert not in_flight.done()


def test_the_agent_is_warmed_up_and_called_in_the_models_thread(start: StartFunction) -> None:
    assert request(start("some_agents:Names").ready().port, "POST", "/", 1).json() == [[], True, "model"]


def test_a_function_waits_for_weights_that_no_sidecar_has_brought_yet(start: StartFunction, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save

    from tests.support import fill_cache

    cache = tmp_path / "cache"
    function = start("some_agents:Names", WEIGHTS_URI="s3://bucket/prefix", WEIGHTS_CACHE_DIR=cache)
    waiting = wait_until("restoring", lambda: (found := request(function.port, "GET", "/readyz").json())["phase"] == "restoring" and found)
    assert (waiting["restored_bytes"], waiting["total_bytes"]) == (0, 0)
    file = save({"b": torch.zeros(3), "a": torch.zeros(2)})
    fill_cache(cache, "s3://bucket/prefix", {"model.safetensors": file})
    assert sorted(request(function.ready().port, "POST", "/", 1).json()[0]) == ["a", "b"]
    ready = request(function.port, "GET", "/readyz").json()
    assert ready["restored_bytes"] == ready["total_bytes"] == len(file)
    assert ready["weights"]["source"] == "store"
    assert {"listen", "import", "restore", "load", "warm_up", "ready"} == set(ready["stages"])


def test_a_device_is_made_ready_while_there_are_no_weights_yet(start: StartFunction, tmp_path: Path) -> None:
    function = start("some_agents:Names", WEIGHTS_URI="s3://bucket/prefix", WEIGHTS_CACHE_DIR=tmp_path / "cache", FUNCTION_DEVICE="host")
    wait_until("the stage", lambda: "context" in request(function.port, "GET", "/readyz").json()["stages"])
    assert "load" not in request(function.port, "GET", "/readyz").json()["stages"]


def test_a_device_that_is_not_there_is_told_while_there_are_no_weights_yet(start: StartFunction, tmp_path: Path) -> None:
    function = start("some_agents:Names", WEIGHTS_URI="s3://bucket/prefix", WEIGHTS_CACHE_DIR=tmp_path / "cache", FUNCTION_DEVICE="cuda:99")
    wait_until("the warning", lambda: "device 'cuda:99' cannot be used" in function.said())


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-Proto": "https", "X-Forwarded-Ssl": "off"},
        {"X-Forwarded-Proto": "https", "X-Forwarded-Protocol": "http"},
        {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAoAAAAAIAAAAA"},  # as Java's client does
    ],
)
def test_what_proxies_and_clients_say_of_protocols_keeps_nobody_out(start: StartFunction, headers: dict[str, str]) -> None:
    assert request(start().ready().port, "POST", "/", 0, headers).json() == 0


@pytest.mark.parametrize(("how", "code"), [("returns", 0), ("raises", 1), ("exits", 7)])
def test_a_forked_child_that_comes_back_from_the_agent_ends_there(start: StartFunction, how: str, code: int) -> None:
    function = start("some_agents:Forks").ready()
    assert [request(function.port, "POST", "/", how).json() for _ in range(2)] == [code, code]


@pytest.mark.parametrize("agent", ["Configures", "Disables", "Makes"])
def test_whatever_an_agent_makes_of_logging_the_log_says_why_it_failed(start: StartFunction, agent: str) -> None:
    function = start(f"some_agents:{agent}").ready()
    reply = request(function.port, "POST", "/", 1, {"X-Request-Id": "mine"})
    assert (reply.status, reply.json()["error"]["type"]) == (500, "agent_failed")
    assert "RuntimeError: a reason" in function.said()
    assert "the agent failed on request mine" in function.said()


@pytest.mark.parametrize(("agent", "said"), [("FailsWordless", "Wordless"), ("FailsFull", "Too many open files")])
def test_an_agent_that_fails_in_an_odd_way_ends_the_server_too(start: StartFunction, agent: str, said: str) -> None:
    function = start(f"some_agents:{agent}")
    assert function.wait(60) == 3
    assert said in function.said()


def test_keys_are_found_wherever_the_agent_goes(start: StartFunction, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("key\n")
    function = start("some_agents:Moves", FUNCTION_API_KEYS_FILE=os.path.relpath(tmp_path / "keys", ROOT)).ready()
    assert request(function.port, "POST", "/", 1, {"Authorization": "Bearer key"}).status == 200


def test_what_ignored_a_hangup_goes_on_ignoring_it(tmp_path: Path) -> None:
    (tmp_path / "some_agents.py").write_text(AGENTS)
    port = free_port()
    env = clean_environment(PYTHONPATH=str(tmp_path), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT="some_agents:Sleeper")
    with running(["nohup", str(BIN / "python"), "-m", "function"], tmp_path / "log", env, port) as function:
        function.ready()
        os.killpg(function.process.pid, signal.SIGHUP)
        assert request(port, "POST", "/", 0).status == 200


def test_without_threads_a_request_that_needs_one_is_told_to_come_again(start: StartFunction) -> None:
    function = start("some_agents:Threadless").ready()
    for path in ("/metrics", "/v1/models"):
        reply = request(function.port, "GET", path)
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert request(function.port, "POST", "/", "a").json() == "a"  # which needs none
    assert request(function.port, "GET", "/healthz").status == 200


def test_a_child_that_comes_back_from_load_ends_there(start: StartFunction) -> None:
    function = start("some_agents:ForksInLoad").ready()
    assert request(function.port, "POST", "/", 1).json() == 0
    assert function.said().count("ready after") == 1


def test_an_error_that_cannot_even_be_looked_at_ends_its_request_alone(start: StartFunction) -> None:
    function = start("some_agents:RaisesUnordered").ready()
    assert [request(function.port, "POST", "/", item).status for item in (1, 0, 1)] == [500, 500, 500]


def test_sigterm_ends_it_while_it_still_imports(tmp_path: Path) -> None:
    env = clean_environment(PORT=str(free_port()), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT="function.agents.echo:Echo")
    with running([str(BIN / "python"), "-X", "importtime", "-m", "function"], tmp_path / "log", env) as function:
        wait_until("it imports", lambda: "function.settings" in function.said() or "import time" in function.said())
        function.signal(signal.SIGTERM)
        assert function.wait() in (0, 128 + signal.SIGTERM, -signal.SIGTERM)


@pytest.mark.parametrize("path", ["/v1//models", "/v1/models//model"])
def test_no_path_leads_elsewhere(start: StartFunction, path: str) -> None:
    reply = request(start().ready().port, "GET", path)
    assert (reply.status, reply.headers["content-type"]) == (404, "application/json")
