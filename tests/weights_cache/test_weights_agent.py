"""The agent of a node and the sidecars of its pods, which see the cache read-only and have no credentials."""

import contextlib
import functools
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, free_port, request, wait_until
from tests.weights_cache.conftest import Sidecar, content, counted, current, noise, push
from tests.weights_cache.mounts import on_read_only
from tests.weights_cache.stores import Bucket, Proxy
from weights_cache.cache import NodeCache
from weights_cache.fetch import Puller
from weights_cache.keeper import SOCKET
from weights_cache.reader import Weights
from weights_cache.settings import WeightsSettings
from weights_cache.sidecar import Sidecar as Agent

MIB = 1 << 20
MODEL = {"config.json": b"{}", "model.safetensors": noise(3 * MIB + 777)}
NEWER = {**MODEL, "config.json": b'{"new": 1}'}

# Credentials that would be refused, were they ever used, and a store that is not there.
NOTHING = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}

Start = Callable[..., Sidecar]


@pytest.fixture
def agent(sidecar: Start) -> Callable[..., Sidecar]:
    """agent(): the node's, answering."""
    return functools.partial(sidecar, "", "--agent")


@pytest.fixture
def pod(sidecar: Start, cache: NodeCache) -> Start:
    """pod(uri): a sidecar that sees the cache read-only."""
    return functools.partial(sidecar, within=functools.partial(on_read_only, cache.root), **NOTHING)


def ask(cache: NodeCache, body: bytes, path: str = "/v1/snapshots", **headers: str) -> tuple[int, Any]:
    """A POST through the agent's socket."""
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(cache.root / SOCKET))
    try:
        with contextlib.suppress(BrokenPipeError):  # a body that is too large is refused before all of it is sent
            connection.request("POST", path, body, headers)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def order(uri: str) -> bytes:
    return json.dumps({"uri": uri}).encode()


def ordered(cache: NodeCache, uri: str) -> Any:
    """The row that is told at once when a URI is asked for, of an agent that keeps nothing else."""
    status, document = ask(cache, order(uri))
    assert status == 200
    (row,) = document["snapshots"]
    return row


def is_settled(found: Sidecar) -> bool:
    return bool(found.rows()) and all(row["phase"] == "complete" for row in found.rows())


# A pod that cannot write


def test_a_pod_that_can_only_read_has_its_weights_brought_by_the_agent(bucket: Bucket, cache: NodeCache, agent: Start, pod: Start) -> None:
    files = push(bucket, MODEL)
    node, found = agent(), pod(bucket.uri)
    wait_until("ready", found.is_ready)
    snapshot = current(cache, bucket.uri)
    row = wait_until("the row", lambda: found.row()["phase"] == "complete" and found.row())
    assert (row["snapshot"], row["error"], row["checked"], row["total_bytes"]) == (snapshot, None, True, sum(map(len, files.values())))
    assert node.metrics()["weights_cache_misses_total"] == 1
    assert found.metrics()[f'weights_cache_ready{{uri="{bucket.uri}"}}'] == 1
    weights = Weights(WeightsSettings(uri=bucket.uri, cache_dir=cache.root))
    assert weights.path("model.safetensors").read_bytes() == MODEL["model.safetensors"]


def test_the_function_beside_it_reads_the_weights_there(bucket: Bucket, cache: NodeCache, agent: Start, pod: Start) -> None:
    push(bucket, MODEL)
    agent()
    wait_until("ready", pod(bucket.uri).is_ready)
    code = """
import pathlib, sys
from weights_cache.reader import Weights
from weights_cache.settings import WeightsSettings
weights = Weights(WeightsSettings(uri=sys.argv[1], cache_dir=pathlib.Path(sys.argv[2])))
print(weights.path("model.safetensors").stat().st_size, weights.restored().source)
"""
    command = on_read_only(cache.root, [sys.executable, "-c", code, bucket.uri, str(cache.root)])
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.split() == [str(3 * MIB + 777), "cache"]


def test_pods_that_ask_at_the_same_time_share_one_download(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, agent: Start, pod: Start
) -> None:
    bucket.put(MODEL)
    proxy.hold_after(MIB)
    node, pair = agent(), [pod(bucket.uri) for _ in range(2)]
    wait_until("the hold", proxy.is_holding)
    proxy.release()
    for found in pair:
        wait_until("ready", found.is_ready)
    assert proxy.sent == sum(map(len, MODEL.values()))
    assert len(node.rows()) == 1


def test_while_the_agent_is_away_a_pod_starts_on_what_is_complete_and_says_so(
    bucket: Bucket, cache: NodeCache, agent: Start, pod: Start
) -> None:
    bucket.put(MODEL)
    node, first = agent(), pod(bucket.uri)
    wait_until("complete", lambda: first.is_ready() and first.row()["phase"] == "complete")
    node.server.signal(signal.SIGKILL)
    node.server.wait()
    assert first.is_ready()
    second = pod(bucket.uri)
    wait_until("ready", second.is_ready)
    wait_until("the error", lambda: "serve --agent" in (second.row()["error"] or ""))
    assert second.is_ready()


def test_without_an_agent_a_pod_says_what_to_run_and_is_ready_once_it_runs(
    bucket: Bucket, cache: NodeCache, agent: Start, pod: Start
) -> None:
    bucket.put(MODEL)
    found = pod(bucket.uri)
    told = wait_until("the error", lambda: found.get("/readyz").json()["error"])
    assert str(cache.root) in told
    assert "run `python -m weights_cache serve --agent` with this directory on the node" in told
    assert not found.is_ready()
    agent()
    wait_until("ready", found.is_ready)


def test_what_the_agent_is_refused_by_the_store_the_pod_repeats(bucket: Bucket, proxy: Proxy, agent: Start, pod: Start) -> None:
    bucket.put(MODEL)
    proxy.refusal = 403, "AccessDenied"
    agent()
    found = pod(bucket.uri)
    wait_until("the error", lambda: "refused for access key AKIATEST" in (found.row()["error"] or ""))
    proxy.refusal = None
    wait_until("ready", found.is_ready)


@pytest.mark.parametrize("revalidate", ["after", "before"])
def test_a_pod_that_starts_later_has_the_new_version_brought(
    bucket: Bucket, cache: NodeCache, agent: Start, pod: Start, revalidate: str
) -> None:
    push(bucket, MODEL)
    agent()
    first = pod(bucket.uri)
    wait_until("complete", lambda: first.is_ready() and first.row()["phase"] == "complete")
    old = current(cache, bucket.uri)
    push(bucket, NEWER)
    second = pod(bucket.uri, WEIGHTS_REVALIDATE=revalidate)
    row = wait_until("its row", lambda: second.row()["checked"] and second.row())
    assert row["snapshot"] != old
    wait_until("the new one", lambda: current(cache, bucket.uri) == row["snapshot"])
    wait_until("ready", second.is_ready)


def test_told_to_end_it_exits_with_0_and_its_socket_is_gone(bucket: Bucket, cache: NodeCache, agent: Start, pod: Start) -> None:
    bucket.put(MODEL)
    node, found = agent(), pod(bucket.uri)
    wait_until("ready", found.is_ready)
    assert (cache.root / SOCKET).is_socket()
    for one in (found, node):
        one.server.signal(signal.SIGTERM)
        assert one.server.wait(60) == 0
    assert not (cache.root / SOCKET).exists()


def test_what_the_agent_brought_is_a_cold_start_of_the_pod_and_what_was_there_is_none(bucket: Bucket, agent: Start, pod: Start) -> None:
    total = sum(map(len, push(bucket, MODEL).values()))
    agent()
    for cold_starts, wanted in ((1, {"misses": 1, "neighbour": total}), (0, {"hits": 1, "cache": total})):
        found = pod(bucket.uri)
        wait_until("its end", lambda found=found: counted(found)["hits"] + counted(found)["misses"])  # type: ignore[misc]
        assert {name: number for name, number in counted(found).items() if number} == wanted
        assert found.metrics()["weights_cache_cold_start_seconds_count"] == cold_starts
        found.server.kill()


def test_an_agent_that_dies_during_a_pull_is_asked_again_when_there_is_another_one(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, agent: Start, pod: Start
) -> None:
    files = push(bucket, MODEL)
    proxy.is_spared = lambda key: not key.endswith("model.safetensors")
    proxy.hold_after(2 * MIB)
    first, found = agent(), pod(bucket.uri)
    wait_until("the hold", proxy.is_holding)
    wait_until("that the pod knows of it", lambda: found.row()["phase"] == "fetching")
    found.server.signal(signal.SIGSTOP)  # between two questions of the pod's, as far as it can tell
    first.server.kill()
    second = agent()
    found.server.signal(signal.SIGCONT)
    wait_until("that it is asked", second.rows)
    proxy.release()
    wait_until("ready", found.is_ready)
    assert content(cache, current(cache, bucket.uri)) == files
    assert found.metrics()["weights_cache_failures_total"] <= 1


# The agent by itself


def test_an_agent_with_nothing_to_do_is_ready(agent: Start) -> None:
    node = agent()
    assert node.is_ready()
    assert node.rows() == []


def test_one_bad_order_does_not_make_the_agent_unready(bucket: Bucket, cache: NodeCache, agent: Start) -> None:
    node = agent()
    assert ask(cache, order(bucket.uri))[0] == 200
    wait_until("the error", lambda: "is the prefix right?" in (node.row()["error"] or ""))
    assert node.is_ready()


def test_each_order_asks_the_store_anew(bucket: Bucket, cache: NodeCache, agent: Start) -> None:
    bucket.put(MODEL)
    node = agent()
    for number in (1, 2, 3):
        # What is told at once already is about the pull that was just asked for. (An order that comes in the very moment in which the
        # one before it ends is served by that.)
        told = wait_until("a pull of its own", lambda number=number: (row := ordered(cache, bucket.uri))["pulls"] == number and row)  # type: ignore[misc]
        assert told["uri"] == bucket.uri
        wait_until("its end", lambda number=number: node.row()["pulls"] == number and is_settled(node))  # type: ignore[misc]


def test_an_order_is_not_served_by_a_pull_that_only_waits_for_the_disk(
    bucket: Bucket, cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(bucket, MODEL)
    is_slow, go_on = threading.Event(), threading.Event()

    def settle(puller: Puller) -> None:
        is_slow.set()
        assert go_on.wait(60)

    monkeypatch.setattr(Puller, "settle", settle)
    node = Agent(WeightsSettings(cache_dir=cache.root))
    try:
        node.pulls.ask(bucket.uri)
        assert is_slow.wait(60)
        push(bucket, NEWER)
        node.pulls.ask(bucket.uri)
        (row,) = node.pulls.rows()
        assert row["pulls"] == 2
        wait_until("the new one", lambda: node.pulls.rows()[0]["phase"] == "complete")
        assert node.pulls.rows()[0]["snapshot"] != row["snapshot"]
    finally:
        go_on.set()


def test_several_models_are_kept_side_by_side(bucket: Bucket, cache: NodeCache, agent: Start) -> None:
    bucket.put({"a/x": b"1", "b/x": b"22"})
    node = agent()
    uris = [f"{bucket.uri}/{name}" for name in "ab"]
    for uri in uris:
        ask(cache, order(uri))
    wait_until("both", lambda: len(node.rows()) == 2 and is_settled(node))
    assert [row["uri"] for row in node.rows()] == uris
    assert [cache.is_complete(current(cache, uri)) for uri in uris] == [True, True]


def test_a_second_agent_on_the_same_directory_is_refused_and_the_first_goes_on(bucket: Bucket, cache: NodeCache, agent: Start) -> None:
    node = agent()
    command = [sys.executable, "-m", "weights_cache", "serve", "--agent"]
    ours = {"WEIGHTS_CACHE_DIR": str(cache.root), "WEIGHTS_HOST": "127.0.0.1", "WEIGHTS_PORT": str(free_port())}
    refused = subprocess.run(command, cwd=ROOT, env={**os.environ, **ours}, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert refused.stderr == f"Error: another agent is answering at {cache.root / SOCKET}\n"
    bucket.put(MODEL)
    assert ask(cache, order(bucket.uri))[0] == 200
    wait_until("the pull", lambda: is_settled(node))


def test_the_socket_of_a_killed_agent_is_replaced(bucket: Bucket, cache: NodeCache, agent: Start) -> None:
    node = agent()
    node.server.signal(signal.SIGKILL)
    node.server.wait()
    assert (cache.root / SOCKET).is_socket()
    again = agent()
    bucket.put(MODEL)
    assert ask(cache, order(bucket.uri))[0] == 200
    wait_until("the pull", lambda: is_settled(again))


def test_a_path_that_is_too_long_for_a_socket_is_an_error_that_says_so(aws: None, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    command = [sys.executable, "-m", "weights_cache", "serve", "--agent"]
    ours = {"WEIGHTS_CACHE_DIR": str(folder), "WEIGHTS_HOST": "127.0.0.1", "WEIGHTS_PORT": str(free_port())}
    refused = subprocess.run(command, cwd=ROOT, env={**os.environ, **ours}, capture_output=True, text=True, timeout=60, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "such a path may have 107 bytes" in refused.stderr


@pytest.fixture
def node(agent: Start) -> Sidecar:
    return agent()


def test_orders_come_through_the_socket_alone(bucket: Bucket, node: Sidecar) -> None:
    reply = request(node.port, "POST", "/v1/snapshots", {"uri": bucket.uri})
    assert reply.status == 405
    assert SOCKET in reply.json()["error"]["message"]
    assert node.rows() == []


@pytest.mark.parametrize("uri", ["model", "s3://", "s3://b/m#short", "", "https://b/m", "s3://b"])
def test_an_order_for_no_uri_is_refused(cache: NodeCache, node: Sidecar, uri: str) -> None:
    status, document = ask(cache, order(uri))
    assert status == 400
    assert "must be" in document["error"]["message"]
    assert node.rows() == []


def test_an_order_that_is_none_is_refused_and_the_next_one_is_taken(bucket: Bucket, cache: NodeCache, node: Sidecar) -> None:
    bodies = [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b'"s3://b/m"',
        b"{}",
        b'{"uri": null}',
        b'{"uri": 7}',
        b'{"uri": ["s3://b/m"]}',
        b"\xff",
        b"[" * 9999,
    ]
    for body in bodies:
        assert ask(cache, body)[0] == 400, body
    assert ask(cache, order("s3://b/m"), path="/healthz")[0] == 405
    assert ask(cache, b"x" * 70_000)[0] == 413
    assert ask(cache, b"x", **{"Content-Length": "many"})[0] == 411
    assert node.rows() == []
    assert ask(cache, order(bucket.uri))[0] == 200
