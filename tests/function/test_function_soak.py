"""Twenty thousand requests of every kind, most of them wrong: the function stays up, stays small, and never blames itself."""

import random
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import BIN, Server, clean_environment, free_port, request, running

AGENT = """
import itertools

class Echo:
    def load(self, weights, device): pass
    def predict(self, inputs): return inputs
    def start(self, input): return iter(range(3))
    def step(self, sequences): return [next(sequence, None) for sequence in sequences]
"""
PATHS: tuple[str, ...] = (
    "/",
    "/v1/models",
    "/v1/models/m:predict",
    "/v1/models/m",
    "/v2/models/m/infer",
    "/v2/models/m/generate",
    "/v2/models/m/generate_stream",
)
PATHS += (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/healthz",
    "/readyz",
    "/metrics",
    "/nowhere",
    "/v2",
    "/%00",
    "/é",
    "//",
)
KINDS = (
    "application/json",
    "application/cloudevents+json",
    "application/cloudevents-batch+json",
    "text/plain",
    "application/octet-stream",
    "",
    "x",
)
BODIES = (
    '{"instances": ["a"]}',
    '{"instances": []}',
    "[]",
    "{}",
    '"a"',
    "null",
    "{",
    "\xff",
    "[" * 300,
    '{"inputs": [{"name": "input", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}',
    '{"model": "m", "messages": [{"role": "user", "content": "a"}], "stream": true}',
    "",
    '{"model": "m", "prompt": "a", "max_tokens": 1e99}',
    '{"text_input": "a", "parameters": {"x": 1}}',
    '{"model": "m", "input": ["a", 1]}',
    '{"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "data": {"instances": ["a"]}}',
    '{"specversion": "1.0", "id": ""}',
)
HEADERS: tuple[str, ...] = (
    "Priority: u=9",
    "X-Request-Timeout-Ms: -1",
    "X-Request-Id: \x01",
    "ce-id: %zz",
    "ce-specversion: 1.0",
    "ce-source: /s",
    "ce-type: t",
    "X: é",
)
HEADERS += (
    "Transfer-Encoding: chunked",
    "Expect: 100-continue",
    "Inference-Header-Content-Length: 99999",
    "Connection: close",
    "Content-Length: 5",
)


@pytest.fixture
def function(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "soak_agent.py").write_text(AGENT)
    port = free_port()
    env = clean_environment(PYTHONPATH=str(tmp_path), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_MODEL_NAME="m")
    env |= {"FUNCTION_AGENT": "soak_agent:Echo", "FUNCTION_ACCESS_LOG": "false"}
    with running([str(BIN / "python"), "-m", "function"], tmp_path / "log", env, port) as server:
        yield server.ready()


def generated(chance: random.Random) -> bytes:
    """One request, as often as not somehow wrong."""
    body = chance.choice(BODIES).encode("latin-1")
    lines = [
        f"{chance.choice(('GET', 'POST', 'POST', 'POST', 'PUT', 'HEAD', 'X'))} {chance.choice(PATHS)} HTTP/1.{chance.choice('011')}",
        "Host: x",
    ]
    lines += [f"Content-Type: {chance.choice(KINDS)}", f"Content-Length: {len(body)}"]
    lines += chance.sample(HEADERS, chance.choice((0, 0, 1, 2, 4)))
    whole = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
    roll = chance.random()
    if roll < 0.1:
        return whole[: chance.randrange(len(whole))]
    if roll < 0.2:
        at = chance.randrange(len(whole))
        return whole[:at] + chance.randbytes(chance.randrange(1, 20)) + whole[at:]
    if roll < 0.25:
        return chance.randbytes(chance.randrange(1, 400))
    return whole * 2 if roll < 0.3 else whole


def statuses(port: int, sent: bytes) -> list[int]:
    """What came back for it, until the function closes the connection or we do."""
    data = b""
    with socket.create_connection(("127.0.0.1", port), timeout=15) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                data += piece
        except (ConnectionResetError, BrokenPipeError):
            pass
    return [int(part[2:5]) for part in data.split(b"HTTP/1.")[1:] if part[2:5].isdigit()]


def rss_bytes(server: Server) -> int:
    """Of the largest process of its group: the worker."""
    sizes = []
    for folder in Path("/proc").iterdir():
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == server.process.pid:
                sizes.append(int((folder / "statm").read_text().split()[1]) * 4096)
        except (OSError, ValueError, IndexError):
            continue
    return max(sizes)


def storm(function: Server, seeds: range) -> Counter[int]:
    found: Counter[int] = Counter()
    with ThreadPoolExecutor(8) as pool:
        for answers in pool.map(lambda seed: statuses(function.port, generated(random.Random(seed))), seeds):
            found.update(answers)
    return found


def check(function: Server, count: int) -> None:
    storm(function, range(count // 10))
    before = rss_bytes(function)
    found = storm(function, range(count // 10, count))
    assert not {status for status in found if status >= 500} - {503, 504}, found
    assert found[200] > count / 50
    assert found[400] > count / 50
    assert rss_bytes(function) - before < 50e6
    assert request(function.port, "POST", "/", "a").json() == "a"
    assert request(function.port, "GET", "/readyz").status == 200
    assert "Traceback" not in function.said()


def test_a_thousand_requests_of_every_kind(function: Server) -> None:
    check(function, 1_000)


@pytest.mark.soak
def test_twenty_thousand_requests_of_every_kind(function: Server) -> None:
    check(function, 20_000)
