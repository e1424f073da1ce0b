"""What usual clients send is ordinary: their small predictions take the fast path, and their other requests are answered as well."""

import asyncio
import http.client
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from tests.support import BIN, Server, clean_environment, free_port, request, running

COUNT = 100  # predictions of each client
BODY = {"instances": ["x" * 1000]}
LARGE = {"instances": ["x" * 100_000]}
NODE = """
const [url, body, count] = process.argv.slice(1)
const ask = () => fetch(url, {method: "POST", headers: {"content-type": "application/json"}, body}).then(r => r.json())
let last
for (let i = 0; i < count; i++) last = await ask()
console.log(JSON.stringify(last))
"""


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    env = clean_environment(PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT="function.agents.echo:Echo")
    with running([str(BIN / "python"), "-m", "function"], tmp_path_factory.mktemp("clients") / "log", env, port) as server:
        yield server.ready()


Ask = Callable[[str, str, int], object]  # posts a body so many times; the last answer


def with_requests(url: str, body: str, count: int) -> object:
    import requests

    with requests.Session() as session:
        for _ in range(count):
            reply = session.post(url, data=body, headers={"Content-Type": "application/json"}, timeout=20)
    return reply.json()


def with_requests_one_by_one(url: str, body: str, count: int) -> object:
    import requests

    for _ in range(count):
        reply = requests.post(url, json=json.loads(body), timeout=20)
    return reply.json()


def with_urllib3(url: str, body: str, count: int) -> object:
    import urllib3

    with urllib3.PoolManager() as pool:
        for _ in range(count):
            reply = pool.request("POST", url, body=body, headers={"Content-Type": "application/json"}, timeout=20)
    return reply.json()


def with_http_client(url: str, body: str, count: int) -> object:
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=20)
    for _ in range(count):
        connection.request("POST", "/" + url.split("/", 3)[3], body, {"Content-Type": "application/json"})
        found = json.load(connection.getresponse())
    connection.close()
    return found


def with_urllib_request(url: str, body: str, count: int) -> object:
    for _ in range(count):
        asked = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})  # noqa: S310  http
        with urllib.request.urlopen(asked, timeout=20) as reply:  # noqa: S310
            found = json.load(reply)
    return found


def with_aiohttp(url: str, body: str, count: int) -> object:
    import aiohttp

    async def ask() -> object:
        async with aiohttp.ClientSession() as session:
            for _ in range(count):
                async with session.post(url, json=json.loads(body)) as reply:
                    found: object = await reply.json()
            return found

    return asyncio.run(ask())


def with_curl(url: str, body: str, count: int) -> object:
    command = ["curl", "-s", "--fail", "-H", "Content-Type: application/json", "--data-binary", "@-", f"{url}?[1-{count}]"]
    done = subprocess.run(command, input=body.encode(), capture_output=True, timeout=60, check=True)
    return json.JSONDecoder().raw_decode(done.stdout.decode())[0]


def with_node(url: str, body: str, count: int) -> object:
    command = ["node", "--input-type=module", "-e", NODE, "--", url, body, str(count)]
    return json.loads(subprocess.run(command, capture_output=True, timeout=60, check=True).stdout)


CLIENTS: list[Ask] = [with_requests, with_requests_one_by_one, with_urllib3, with_http_client, with_urllib_request, with_aiohttp]
PROGRAMS = [
    pytest.param(ask, marks=pytest.mark.skipif(not shutil.which(name), reason=f"{name} is not there"))
    for name, ask in (("curl", with_curl), ("node", with_node))
]


def counted(function: Server) -> tuple[float, float]:
    """Predictions that took the fast path, and all."""
    lines = [line.split() for line in request(function.port, "GET", "/metrics").body.decode().splitlines() if line.startswith("function_")]
    fast = sum(float(value) for name, value in lines if name.startswith("function_fast_path_total"))
    return fast, sum(float(value) for name, value in lines if name.startswith("function_requests_total{") and "predict" in name)


@pytest.mark.parametrize("ask", [*CLIENTS, *PROGRAMS])
def test_ordinary_predictions_of_usual_clients_take_the_fast_path(function: Server, ask: Ask) -> None:
    fast_before, all_before = counted(function)
    url = f"http://127.0.0.1:{function.port}/v1/models/model:predict"
    assert ask(url, json.dumps(BODY), COUNT) == {"predictions": BODY["instances"]}
    fast, all_ = counted(function)
    assert all_ - all_before == COUNT
    assert (fast - fast_before) / COUNT >= 0.99


@pytest.mark.parametrize("ask", [*CLIENTS, *PROGRAMS])
def test_their_larger_ones_are_answered_as_well(function: Server, ask: Ask) -> None:
    url = f"http://127.0.0.1:{function.port}/v1/models/model:predict"
    assert ask(url, json.dumps(LARGE), 3) == {"predictions": LARGE["instances"]}
