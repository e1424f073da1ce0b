"""What a request says besides its inputs, and bodies that are no JSON: all of it reaches an agent that takes it, or is refused by name."""

import gzip
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support import BIN, Reply, Server, clean_environment, free_port, request, running, wait_until

AGENT = """
import os, time
from function.agent import BadInput

class Takes:
    media_types = ("image/*", "text/csv")
    def load(self, weights, device):
        pass
    def predict(self, inputs, parameters):
        while "wait" in inputs and not os.path.exists(os.environ["GATE"]):
            time.sleep(0.005)
        said = lambda item: item.decode("latin-1") if isinstance(item, bytes) else item
        return [{"input": said(item), "parameters": parameters, "together": len(inputs)} for item in inputs]

class TakesNone:
    def load(self, weights, device):
        pass
    def predict(self, inputs, threshold=0.5):
        if any(isinstance(item, dict) and "b64" not in item for item in inputs):
            raise BadInput("an object")
        return [[item, threshold] for item in inputs]
"""
V1 = "/v1/models/m:predict"
V2 = "/v2/models/m/infer"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    folder = tmp_path_factory.mktemp("parameters")
    (folder / "parameters_agent.py").write_text(AGENT)
    env = clean_environment(PYTHONPATH=str(folder), FUNCTION_HOST="127.0.0.1", FUNCTION_MODEL_NAME="m", GATE=str(folder / "gate"))
    env |= {"FUNCTION_CORS_ORIGINS": "https://app.example.com,http://localhost:3000", "FUNCTION_MAX_BODY_BYTES": "100000"}
    (folder / "keys").write_text("key\n")
    more = {"Takes": {}, "TakesNone": {}, "closed": {"FUNCTION_API_KEYS_FILE": str(folder / "keys")}}
    with ExitStack() as stack:

        def start(name: str, extra: dict[str, str]) -> Server:
            port = free_port()
            agent = {"FUNCTION_AGENT": f"parameters_agent:{'Takes' if name == 'closed' else name}", "PORT": str(port)}
            command = [str(BIN / "python"), "-m", "function"]
            return stack.enter_context(running(command, folder / f"{name}.log", {**env, **agent, **extra}, port))

        started = {name: start(name, extra) for name, extra in more.items()}
        yield {name: server.ready() for name, server in started.items()}


@pytest.fixture
def takes(servers: dict[str, Server]) -> Server:
    return servers["Takes"]


@pytest.fixture
def takes_none(servers: dict[str, Server]) -> Server:
    return servers["TakesNone"]


def tensor(*data: str, **more: Any) -> dict[str, Any]:
    return {"name": "input", "datatype": "BYTES", "shape": [len(data)], "data": list(data), **more}


ASKED = [
    pytest.param(V1, {"instances": ["a"], "parameters": {"top_k": 1}}, {}, id="V1, in the loop"),
    pytest.param(V1, {"instances": ["a"], "parameters": {"top_k": 1}}, {"TE": "trailers"}, id="V1, by Flask"),
    pytest.param("/", {"instances": ["a"], "parameters": {"top_k": 1}}, {}, id="/"),
    pytest.param(
        "/",
        {"instances": ["a"], "parameters": {"top_k": 1}},
        {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/s", "ce-type": "t"},
        id="an event",
    ),
    pytest.param(V2, {"inputs": [tensor("a")], "parameters": {"top_k": 1}}, {}, id="V2, of the request"),
    pytest.param(V2, {"inputs": [tensor("a", parameters={"top_k": 1})]}, {}, id="V2, of a tensor"),
    pytest.param(
        V2,
        {"inputs": [tensor("a", parameters={"top_k": 1, "content_type": "str"})], "parameters": {"top_k": 1, "content_type": "np"}},
        {},
        id="V2, of both, with the hints of a client",
    ),
]


@pytest.mark.parametrize(("path", "body", "headers"), ASKED)
def test_parameters_reach_an_agent_that_takes_them(takes: Server, path: str, body: Any, headers: dict[str, str]) -> None:
    reply = request(takes.port, "POST", path, body, headers)
    assert reply.status == 200
    assert b"top_k" in reply.body


@pytest.mark.parametrize(("path", "body", "headers"), ASKED)
def test_parameters_that_no_agent_takes_are_refused_with_their_names(
    takes_none: Server, path: str, body: Any, headers: dict[str, str]
) -> None:
    reply = request(takes_none.port, "POST", path, body, headers)
    assert reply.status == 400
    assert "'top_k'" in reply.body.decode()


@pytest.mark.parametrize("body", [{"instances": ["a"], "parameters": {}}, {"instances": ["a"], "parameters": None}])
def test_no_parameters_are_no_reason_to_refuse(takes_none: Server, body: Any) -> None:
    assert request(takes_none.port, "POST", V1, body).json() == {"predictions": [["a", 0.5]]}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (V1, {"instances": ["a"], "parameters": [1]}, '"parameters" must be an object'),
        (V1, {"instances": ["a"], "parametres": {}}, "'parametres' is not understood"),
        (V1, {"instances": ["a"], "signature_name": "other"}, '"signature_name" must be'),
        (V2, {"inputs": [tensor("a", parameters={"k": 1})], "parameters": {"k": 2}}, "'k' is said twice"),
    ],
)
def test_what_is_not_understood_is_refused(takes: Server, path: str, body: Any, said: str) -> None:
    reply = request(takes.port, "POST", path, body)
    assert reply.status == 400
    assert said in reply.body.decode().replace('\\"', '"')


@pytest.mark.parametrize("headers", [{}, {"TE": "trailers"}], ids=["in the loop", "by Flask"])
@pytest.mark.parametrize(
    ("body", "is_hinted"),
    [({"instance": ["a"]}, True), ({"Instances": ["a"]}, True), ({"inputs": "a"}, True), ({"text": "a"}, False)],
)
def test_an_object_that_was_meant_to_have_instances_is_told_so_once_the_agent_refused_it(
    takes_none: Server, headers: dict[str, str], body: Any, is_hinted: bool
) -> None:
    reply = request(takes_none.port, "POST", "/", body, headers)
    assert (reply.status, reply.json()["error"]["type"]) == (400, "bad_input")
    assert ('a request is {"instances": […]}' in reply.json()["error"]["message"]) == is_hinted


def test_a_route_of_openais_that_is_not_here_is_told_which_ones_are(takes_none: Server) -> None:
    reply = request(takes_none.port, "POST", "/v1/responses", {})
    assert reply.status == 404
    assert "/v1/chat/completions" in reply.json()["error"]["message"]


def test_a_client_of_tensorflow_serving_may_say_its_signature(takes_none: Server) -> None:
    assert request(takes_none.port, "POST", V1, {"instances": ["a"], "signature_name": "serving_default"}).status == 200


GROUPS = [1, True, 1.0]  # which are one to Python


def test_calls_with_different_parameters_share_no_batch(takes: Server) -> None:
    gate = takes.log.parent / "gate"
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(request, takes.port, "POST", V1, {"instances": ["wait"]})
        wait_until("the model is busy", lambda: b"function_instances_total 0.0" not in request(takes.port, "GET", "/metrics").body)
        others = [
            pool.submit(request, takes.port, "POST", V1, {"instances": [str(number)], "parameters": {"group": GROUPS[number % 3]}})
            for number in range(6)
        ]
        wait_until("they wait", lambda: b'function_waiting{model="m"} 6.0' in request(takes.port, "GET", "/metrics").body)
        gate.touch()
        replies: list[Reply] = [other.result() for other in others]
        assert first.result().status == 200
    for number, reply in enumerate(replies):
        (found,) = reply.json()["predictions"]
        assert (found["input"], found["parameters"]) == (str(number), {"group": GROUPS[number % 3]})
        assert type(found["parameters"]["group"]) is type(GROUPS[number % 3])
    gate.unlink()


# Bodies that are not JSON


@pytest.mark.parametrize("kind", ["image/jpeg", "image/png; x=y", "text/csv"])
def test_bytes_of_a_type_that_the_agent_takes_are_one_input(takes: Server, kind: str) -> None:
    reply = request(takes.port, "POST", "/", b"\xff\xd8abc", {"Content-Type": kind})
    assert (reply.status, reply.json()["input"]) == (200, "\xff\xd8abc")


def test_bytes_of_another_type_are_refused(takes: Server, takes_none: Server) -> None:
    assert request(takes.port, "POST", "/", b"abc", {"Content-Type": "audio/wav"}).status == 415
    assert request(takes_none.port, "POST", "/", b"abc", {"Content-Type": "image/jpeg"}).status == 415


@pytest.mark.parametrize("path", ["/", V1])
def test_bytes_in_base64_are_bytes_for_an_agent_that_takes_them(takes: Server, takes_none: Server, path: str) -> None:
    body = {"instances": [{"b64": "/9hhYmM="}, {"b64": 1}, {"b64": "a", "c": 1}]}
    reply = request(takes.port, "POST", path, body)
    assert [found["input"] for found in reply.json()["predictions"]] == ["\xff\xd8abc", {"b64": 1}, {"b64": "a", "c": 1}]
    assert request(takes_none.port, "POST", path, body).json()["predictions"][0] == [{"b64": "/9hhYmM="}, 0.5]
    assert request(takes.port, "POST", path, {"instances": [{"b64": "a b"}]}).status == 400


def test_parameters_of_generate_reach_an_agent_that_takes_them(takes: Server) -> None:
    found = request(takes.port, "POST", "/v2/models/m/generate", {"text_input": "a", "parameters": {"top_k": 1}}).json()["text_output"]
    assert found == {"input": {"text_input": "a", "parameters": {"top_k": 1}}, "parameters": {"top_k": 1}, "together": 1}


def test_a_type_that_is_not_taken_is_told_which_ones_are(takes: Server) -> None:
    said = request(takes.port, "POST", "/", b"abc", {"Content-Type": "audio/wav"}).json()["error"]["message"]
    assert "application/json, or image/* at POST /" in said


FORM = (
    b'--x\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n3\r\n'
    b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.png"\r\nContent-Type: image/png\r\n\r\nfirst\r\n'
    b'--x\r\nContent-Disposition: form-data; name="b"; filename="b.png"\r\nContent-Type: image/png\r\n\r\nsecond\r\n--x--\r\n'
)


def test_each_file_of_a_form_is_an_input_and_its_fields_are_parameters(takes: Server) -> None:
    reply = request(takes.port, "POST", "/", FORM, {"Content-Type": "multipart/form-data; boundary=x"})
    assert [found["input"] for found in reply.json()["predictions"]] == ["first", "second"]
    assert [found["parameters"] for found in reply.json()["predictions"]] == [{"top_k": "3"}] * 2


def test_a_field_that_comes_more_than_once_is_a_list(takes: Server) -> None:
    field = FORM.split(b"--x\r\n")[1]
    reply = request(
        takes.port, "POST", "/", b"--x\r\n" + field.replace(b"3", b"4") + FORM, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert reply.json()["predictions"][0]["parameters"] == {"top_k": ["4", "3"]}


def test_files_may_be_empty_and_have_names_of_any_language(takes: Server) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="a"; filename="%s"\r\nContent-Type: image/png\r\n\r\n%s\r\n'
    form = (
        part % ("ünï.png".encode(), b"first")
        + part.replace(b"image/png", b"text/plain") % (b"", b"")
        + part % (b"empty.png", b"")
        + b"--x--\r\n"
    )
    reply = request(takes.port, "POST", "/", form, {"Content-Type": 'multipart/form-data; boundary="x"'})
    assert [found["input"] for found in reply.json()["predictions"]] == ["first", ""]  # no file was chosen in the second


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (FORM.replace(b"image/png", b"text/html"), "multipart/form-data; boundary=x", "'text/html' is not taken"),
        (FORM[:-10], "multipart/form-data; boundary=x", "is no form"),
        (b"junk", "multipart/form-data; boundary=x", "is no form"),
        (b"junk", "multipart/form-data", "is no form"),
        (FORM.split(b'--x\r\nContent-Disposition: form-data; name="a"')[0] + b"--x--\r\n", "multipart/form-data; boundary=x", "no file"),
    ],
)
def test_a_form_that_is_none_is_refused_with_the_reason(takes: Server, body: bytes, kind: str, said: str) -> None:
    reply = request(takes.port, "POST", "/", body, {"Content-Type": kind})
    assert reply.status == 400
    assert said in reply.body.decode()


@pytest.mark.parametrize(
    ("coding", "compress"), [("gzip", gzip.compress), ("GZIP", gzip.compress), ("deflate", zlib.compress), ("Identity", lambda data: data)]
)
@pytest.mark.parametrize("path", ["/", V1, "/v2/models/m/infer"])
def test_a_compressed_body_is_read_whoever_asks(takes: Server, path: str, coding: str, compress: Any) -> None:
    body = b'{"inputs": [{"name": "input", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}' if "v2" in path else b'{"instances": ["a"]}'
    reply = request(takes.port, "POST", path, compress(body), {"Content-Type": "application/json", "Content-Encoding": coding})
    assert reply.status == 200


def test_what_is_too_large_once_it_is_decompressed_is_a_413_and_another_coding_says_which_are_known(takes: Server) -> None:
    bomb = gzip.compress(b'"' + b"a" * 200_000 + b'"')
    kind = {"Content-Type": "application/json"}
    assert request(takes.port, "POST", "/", bomb, {**kind, "Content-Encoding": "gzip"}).status == 413
    reply = request(takes.port, "POST", "/", b"1", {**kind, "Content-Encoding": "br"})
    assert (reply.status, reply.headers["accept-encoding"]) == (415, "gzip, deflate")


# Browsers


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def test_a_browser_of_a_page_that_is_let_in_is_told_so_before_it_is_asked_for_a_key(servers: dict[str, Server]) -> None:
    reply = request(servers["closed"].port, "OPTIONS", "/v1/chat/completions", None, {**PREFLIGHT, "Origin": "https://app.example.com"})
    assert reply.status == 204
    assert reply.headers["access-control-allow-origin"] == "https://app.example.com"
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert reply.headers["access-control-allow-headers"] == "authorization,content-type"
    assert reply.headers["access-control-allow-credentials"] == "true"


@pytest.mark.parametrize(("path", "status"), [("/", 401), (V1, 401), ("/v2/models/m/infer", 401), ("/nowhere", 401)])
def test_errors_can_be_read_by_that_page_too(servers: dict[str, Server], path: str, status: int) -> None:
    reply = request(servers["closed"].port, "POST", path, {"instances": [1]}, {"Origin": "http://localhost:3000"})
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (status, "http://localhost:3000")
    assert "Origin" in reply.headers["vary"]


def test_another_page_is_told_nothing(servers: dict[str, Server]) -> None:
    evil = {"Origin": "http://evil.example"}
    assert request(servers["closed"].port, "OPTIONS", "/", None, {**PREFLIGHT, **evil}).status == 401
    reply = request(servers["Takes"].port, "POST", "/", "a", evil)
    assert (reply.status, reply.headers.get("access-control-allow-origin")) == (200, None)
