"""Request headers reach an agent that asks for them, on all routes alike, and nobody else's answer depends on them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from function.agent import load_agent
from function.headers import CREDENTIALS, chosen, declared
from tests.support import BIN, Server, clean_environment, free_port, request, running, wait_until
from weights_cache.environment import SettingsError

AGENT = """
import json, os, time

class Takes:
    headers = ("X-Tenant", "Accept-Language")
    def load(self, weights, device):
        pass
    def predict(self, inputs, headers):
        if "wait" in inputs:
            open(os.environ["GATE"] + ".busy", "w").close()
        while "wait" in inputs and not os.path.exists(os.environ["GATE"]):
            time.sleep(0.005)
        headers["count"] = len(inputs)  # its own
        return [json.dumps(headers) for _ in inputs]
    def start(self, input, headers):
        return [json.dumps(headers), None]
    def step(self, sequences):
        return [sequence.pop(0) for sequence in sequences]
"""
V1, V2 = "/v1/models/m:predict", "/v2/models/m"
SENT = {"X-TENANT": " acme ", "Accept-Language": "de", "Authorization": "Bearer secret", "X-Other": "1"}
WANTED = {"x-tenant": "acme", "accept-language": "de"}
EVENT = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "data": "a"}
TENSOR = {"name": "input", "datatype": "BYTES", "shape": [1], "data": ["a"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("headers")
    (folder / "headers_agent.py").write_text(AGENT)
    port = free_port()
    env = clean_environment(PYTHONPATH=str(folder), FUNCTION_HOST="127.0.0.1", FUNCTION_MODEL_NAME="m", GATE=str(folder / "gate"))
    env |= {"FUNCTION_AGENT": "headers_agent:Takes", "PORT": str(port)}
    with running([str(BIN / "python"), "-m", "function"], folder / "log", env, port) as found:
        yield found.ready()


ROUTES = [
    pytest.param("/", "a", {}, id="/, in the loop"),
    pytest.param("/", "a", {"TE": "trailers"}, id="/, by Flask"),
    pytest.param(V1, {"instances": ["a"]}, {}, id="V1, in the loop"),
    pytest.param(V1, {"instances": ["a"]}, {"TE": "trailers"}, id="V1, by Flask"),
    pytest.param(f"{V2}/infer", {"inputs": [TENSOR]}, {}, id="V2"),
    pytest.param(f"{V2}/generate", {"text_input": "a"}, {}, id="generate"),
    pytest.param(f"{V2}/generate_stream", {"text_input": "a"}, {}, id="generate_stream"),
    pytest.param("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "a"}]}, {}, id="chat"),
    pytest.param("/v1/completions", {"model": "m", "prompt": "a"}, {}, id="completions"),
    pytest.param("/", "a", {f"ce-{name}": text for name, text in EVENT.items() if name != "data"}, id="an event"),
    pytest.param("/", {**EVENT, "id": "2"}, {"Content-Type": "application/cloudevents+json"}, id="a structured event"),
    pytest.param("/", [{**EVENT, "id": "3"}], {"Content-Type": "application/cloudevents-batch+json"}, id="a batch of events"),
]


@pytest.mark.parametrize(("path", "body", "more"), ROUTES)
def test_the_agent_gets_what_it_asks_for_as_it_was_sent_and_nothing_else(
    server: Server, path: str, body: Any, more: dict[str, str]
) -> None:
    reply = request(server.port, "POST", path, body, {**more, **SENT})
    assert reply.status == 200
    said = reply.body.decode().replace("\\", "")
    assert '"x-tenant": "acme", "accept-language": "de"' in said
    assert "secret" not in said
    assert "other" not in said


@pytest.mark.parametrize("more", [{}, {"TE": "trailers"}])
@pytest.mark.parametrize(("sent", "got"), [({}, '{"count": 1}'), ({"X-Tenant": ""}, '{"x-tenant": "", "count": 1}')])
def test_what_was_not_sent_is_not_there(server: Server, more: dict[str, str], sent: dict[str, str], got: str) -> None:
    assert request(server.port, "POST", "/", "a", {**more, **sent}).json() == got


def test_requests_with_other_headers_share_no_batch(server: Server) -> None:
    gate = server.log.parent / "gate"
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(request, server.port, "POST", V1, {"instances": ["wait"]})
        wait_until("the model is busy", gate.with_suffix(".busy").exists)
        others = [
            pool.submit(request, server.port, "POST", V1, {"instances": ["a"]}, {"X-Tenant": str(number % 2), "X-Other": str(number)})
            for number in range(6)
        ]
        wait_until("they wait", lambda: b'function_waiting{model="m"} 6.0' in request(server.port, "GET", "/metrics").body)
        gate.touch()
        said = [other.result().json()["predictions"][0] for other in others]
        assert first.result().status == 200
    assert all(f'"x-tenant": "{number % 2}"' in text for number, text in enumerate(said))


def test_an_event_that_comes_again_with_other_headers_is_another_one(server: Server) -> None:
    def sent(tenant: str) -> str:
        headers = {f"ce-{name}": text for name, text in {**EVENT, "id": "again"}.items() if name != "data"}
        return str(request(server.port, "POST", "/", "a", {**headers, "X-Tenant": tenant}).json())

    assert [sent("one"), sent("two"), sent("one")] == [f'{{"x-tenant": "{name}", "count": 1}}' for name in ("one", "two", "one")]


# What an agent may declare


@pytest.mark.parametrize(
    ("found", "names"),
    [
        (("X-Tenant", "x-tenant", "Accept"), ("x-tenant", "accept")),
        (["A"], ("a",)),
        ("X-Tenant", ("x-tenant",)),
        ((), ()),
        (None, ()),
        ({"Authorization": "of the agent's own requests"}, ()),
    ],
)
def test_names_are_in_small_letters_and_what_is_no_list_is_something_else(found: Any, names: tuple[str, ...]) -> None:
    assert declared(found) == names


@pytest.mark.parametrize("found", [("X Tenant",), ("X_Tenant",), ("",), (1,), "X:", ("X-Ténant",)])
def test_what_is_no_name_is_refused(found: Any) -> None:
    with pytest.raises(ValueError, match="no name of a header"):
        declared(found)


@pytest.mark.parametrize("name", sorted(CREDENTIALS))
def test_credentials_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="says who calls"):
        declared(("X-Tenant", name.title()))


def test_only_those_that_were_sent_are_chosen() -> None:
    assert chosen(("a", "b"), {"a": " 1 ", "c": "2"}) == {"a": "1"}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('headers = ("X-Tenant",)', r"write `def predict\(self, inputs, headers\)`"),
        ("def predict(self, inputs, headers): return inputs", r'write `headers = \("X-Tenant",\)` in the class'),
        ("def stream(self, input, headers=None): yield input", r"stream has an argument `headers`, and nothing says which"),
        ("headers = ('Cookie',)\n    def predict(self, inputs, headers): return inputs", "headers has 'Cookie', which says who calls"),
        ("def predict(self, inputs, context): return inputs", r"further arguments only as `parameters` and `headers`"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_line_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, said: str
) -> None:
    name = f"headers_{abs(hash(lines))}"
    (tmp_path / f"{name}.py").write_text(
        "class Agent:\n    def load(self, weights, device): pass\n    def predict(self, inputs): return inputs\n    " + lines + "\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SettingsError, match=said):
        load_agent(f"{name}:Agent")


def test_parameters_and_headers_may_both_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "both_agent.py").write_text(
        "class Agent:\n    headers = 'X-Tenant'\n    def load(self, weights, device): pass\n"
        "    def predict(self, inputs, parameters, *, headers): return inputs\n    def start(self, input, headers): return input\n"
        "    def step(self, sequences): return sequences\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    load_agent("both_agent:Agent")
