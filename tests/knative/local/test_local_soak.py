"""Fifty thousand requests of every kind through the activator: its memory and its descriptors stay what they were."""

import contextlib
import http.client
import json
import os
import random
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.knative.local.running import ANNOTATION, Platform, platform_running
from tests.support import wait_until

CLIENTS = 8
MOST_GROWTH = 0.05
PREDICT = "/v1/models/model:predict"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    container = {
        "name": "function",
        "command": ["python", "-m", "function"],
        "env": [{"name": "FUNCTION_AGENT", "value": "function.agents.echo:Echo"}, {"name": "FUNCTION_ACCESS_LOG", "value": "false"}],
        "readinessProbe": {"httpGet": {"path": "/readyz"}},
    }
    template: dict[str, Any] = {"metadata": {"annotations": {ANNOTATION + "max-scale": "1"}}, "spec": {"containers": [container]}}
    service = {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": "echo"},
        "spec": {"template": template},
    }
    with platform_running(tmp_path / "state", [service], "--no-fork-server") as running:
        running.wait_for("echo", "ready", lambda found: found["state"] == "ready")
        yield running


def predict(connection: http.client.HTTPConnection, text: str) -> int:
    connection.request("POST", PREDICT, json.dumps({"instances": [text]}), JSON)
    reply = connection.getresponse()
    assert json.loads(reply.read()) == {"predictions": [text]}
    return reply.status


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None, **headers: str) -> int:
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    reply.read()
    return reply.status


def leave(port: int, chance: random.Random) -> int:
    """A caller who goes away at some point, in one of the ways to go."""
    sent = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 30000\r\n\r\n" + b" " * 30_000
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(sent[: chance.randrange(len(sent))])
        if chance.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return 0


def one(connection: http.client.HTTPConnection, port: int, chance: random.Random) -> int:
    """Its status; 0 for one that nobody waits for."""
    roll = chance.random()
    if roll < 0.7:
        return predict(connection, "a")
    if roll < 0.8:
        return predict(connection, "a" * chance.randrange(100_000))
    if roll < 0.85:
        return ask(connection, "POST", PREDICT, b"no JSON", Content_Type="application/json")
    if roll < 0.9:
        return ask(connection, "GET", f"/nowhere/{chance.random()}", Connection="close, X-Hop", X_Hop="1")
    if roll < 0.95:
        return ask(connection, "POST", PREDICT, iter([b'{"instances"', b': ["a"]}']), Content_Type="application/json")  # type: ignore[arg-type]
    return leave(port, chance)


def storm(platform: Platform, seed: int, count: int) -> Counter[int]:
    """Requests of several clients at once, over connections that are kept and new ones by turns."""

    def client(number: int) -> Counter[int]:
        chance, found = random.Random(f"{seed} {number}"), Counter[int]()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", platform.port, timeout=60)) as connection:
            for _ in range(count // CLIENTS):
                found[one(connection, platform.port, chance)] += 1
                if chance.random() < 0.02:
                    connection.close()
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(client, range(CLIENTS)), Counter[int]())


def rss_bytes(platform: Platform) -> int:
    return int(Path(f"/proc/{platform.server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(platform: Platform) -> int:
    return len(list(Path(f"/proc/{platform.server.process.pid}/fd").iterdir()))


def check(platform: Platform, count: int) -> float:
    """How much the platform's memory has grown, as a share of what it was after a tenth of the requests."""
    least = descriptors(platform)
    storm(platform, 0, count // 10)
    before = rss_bytes(platform)
    found = storm(platform, 1, count)
    grown = rss_bytes(platform) / before - 1
    assert found.keys() <= {0, 200, 400, 404}, found
    wait_until("descriptors as before", lambda: descriptors(platform) <= least + CLIENTS)  # ways to the pod are kept a while
    assert platform.call("echo", PREDICT, "POST", {"instances": ["a"]}).json() == {"predictions": ["a"]}
    assert "Traceback" not in platform.server.said()
    assert platform.pods("echo")[0]["concurrency"] == 0
    return grown


def test_a_thousand_requests_leave_nothing_behind(platform: Platform) -> None:
    check(platform, 1000)


@pytest.mark.soak
def test_the_activators_memory_is_flat_over_fifty_thousand_requests(platform: Platform) -> None:
    assert check(platform, 50_000) <= MOST_GROWTH
