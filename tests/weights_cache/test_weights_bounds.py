"""What the node's agent takes is bounded by numbers of its own, whatever it is asked for: pulls, asks, clients, memory, descriptors."""

import contextlib
import http.client
import json
import logging
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, free_port, request, wait_until
from tests.weights_cache.conftest import Sidecar, noise, push
from tests.weights_cache.stores import Bucket, Proxy
from tests.weights_cache.test_weights_agent import ask, order
from weights_cache import access, manifest, pulls, store
from weights_cache.access import Access
from weights_cache.cache import NodeCache
from weights_cache.errors import CacheError, StoreError, WeightsError
from weights_cache.fetch import Puller, list_snapshot
from weights_cache.keeper import SOCKET, Delegate, Pulled, _Busy
from weights_cache.pulls import AT_ONCE, WAITING, Busy, Pulls
from weights_cache.settings import WeightsSettings
from weights_cache.sidecar import _bound
from weights_cache.store import Store
from weights_cache.uri import WeightsUri

MIB = 1 << 20
MODEL = {"config.json": b"{}", "model.safetensors": noise(MIB + 777)}


def memory_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def count(pid: int, what: str) -> int:
    return len(list(Path(f"/proc/{pid}/{what}").iterdir()))


# Pulls


class Slow:
    """A keeper whose pulls end when the test says so."""

    def __init__(self, uri: str, pulls: int, go_on: threading.Event) -> None:
        self.uri, self.ready, self.is_closed = uri, False, False
        self._pulls, self._go_on, self._phase = pulls, go_on, "waiting"

    def begin(self) -> None:
        self._pulls += 1

    def pull(self) -> Callable[[], None]:
        self._phase = "fetching"
        assert self._go_on.wait(60)
        if "nowhere" in self.uri:
            self._phase = "failed"
            raise StoreError("no objects")
        self._phase, self.ready = "complete", True
        return lambda: None

    def cancel(self) -> None:
        self._go_on.set()

    def close(self) -> None:
        self.is_closed = True

    def state(self) -> tuple[str, str | None]:
        return self._phase, "no objects" if self._phase == "failed" else None

    def row(self) -> dict[str, Any]:
        return {"uri": self.uri, "phase": self._phase, "error": self.state()[1], "pulls": self._pulls}


@pytest.fixture
def go_on() -> threading.Event:
    return threading.Event()


@pytest.fixture
def made() -> list[Slow]:
    return []


@pytest.fixture
def agent(go_on: threading.Event, made: list[Slow]) -> Iterator[Pulls]:
    def make(uri: str, before: int) -> Slow:
        made.append(Slow(uri, before, go_on))
        return made[-1]

    found = Pulls(make, ["s3://b/kept"], lambda *_: None)
    yield found
    assert found.stop(60)


def phases(agent: Pulls) -> list[str]:
    return [row["phase"] for row in agent.rows() if row["uri"] != "s3://b/kept"]


def test_so_many_pulls_run_so_many_wait_and_who_comes_then_is_told_to_come_again(agent: Pulls, go_on: threading.Event) -> None:
    for number in range(AT_ONCE + WAITING):
        agent.ask(f"s3://b/{number}")
        if number < AT_ONCE:
            wait_until("it runs", lambda number=number: phases(agent).count("fetching") == number + 1)  # type: ignore[misc]
    assert phases(agent) == ["fetching"] * AT_ONCE + ["waiting"] * WAITING
    with pytest.raises(Busy, match=f"{AT_ONCE} pulls run and {WAITING} wait; ask again in 5 s"):
        agent.ask("s3://b/one-more")
    agent.ask("s3://b/0")  # it is being served
    go_on.set()
    wait_until("all", lambda: len(agent.keepers()) == 1)
    agent.ask("s3://b/one-more")


def test_what_was_asked_for_is_forgotten_after_its_pull_but_not_how_it_ended(
    agent: Pulls, go_on: threading.Event, made: list[Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on.set()
    for uri in ("s3://b/a", "s3://b/nowhere"):
        agent.ask(uri)
    wait_until("both", lambda: len(agent.keepers()) == 1)
    assert [keeper.uri for keeper in agent.keepers()] == ["s3://b/kept"]
    assert [keeper.is_closed for keeper in made] == [False, True, True]
    assert [(row["uri"], row["phase"], row["error"]) for row in agent.rows()[1:]] == [
        ("s3://b/a", "complete", None),
        ("s3://b/nowhere", "failed", "no objects"),
    ]
    assert [row["uri"] for row in agent.rows("s3://b/nowhere")] == ["s3://b/nowhere"]
    monkeypatch.setattr(pulls, "ENDED_S", 0.0)
    assert [row["uri"] for row in agent.rows()] == ["s3://b/kept"]


def test_asked_again_it_is_pulled_again_and_numbered_on(agent: Pulls, go_on: threading.Event) -> None:
    go_on.set()
    for number in (1, 2, 3):
        agent.ask("s3://b/a")
        wait_until("its end", lambda: len(agent.keepers()) == 1)
        assert agent.rows("s3://b/a")[0]["pulls"] == number


def test_of_very_many_ends_the_last_ones_are_known(agent: Pulls, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulls, "ENDED", 3)
    go_on.set()
    for number in range(10):
        agent.ask(f"s3://b/{number}")
        wait_until("its end", lambda: len(agent.keepers()) == 1)
    assert [row["uri"] for row in agent.rows()[1:]] == ["s3://b/7", "s3://b/8", "s3://b/9"]


def test_where_no_thread_can_be_had_who_asks_is_told_and_nothing_is_left(agent: Pulls, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(agent._threads, "start", none)
    with pytest.raises(Busy, match="no thread can be had for a pull: can't start new thread"):
        agent.ask("s3://b/a")
    assert len(agent.keepers()) == 1


def test_a_pull_that_fails_unexpectedly_is_said_and_the_next_one_is_served(
    agent: Pulls, go_on: threading.Event, made: list[Slow], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(keeper: Slow) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Slow, "pull", fail)
        agent.ask("s3://b/a")
        wait_until("its end", lambda: len(agent.keepers()) == 1)
    assert "the pull of s3://b/a failed unexpectedly" in caplog.text
    go_on.set()
    agent.ask("s3://b/b")
    wait_until("the next one", lambda: agent.rows("s3://b/b")[0]["phase"] == "complete")


# Over the socket


def test_an_agent_that_has_no_place_answers_503_and_when_to_come_again(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, sidecar: Callable[..., Sidecar]
) -> None:
    may_answer = threading.Event()
    proxy.edit_listing = lambda listing: (may_answer.wait(60) and listing) or listing
    node = sidecar("", "--agent")
    try:
        statuses = [ask(cache, order(f"{bucket.uri}/{number}"))[0] for number in range(AT_ONCE + WAITING + 5)]
        assert statuses[: AT_ONCE + WAITING] == [200] * (AT_ONCE + WAITING)
        assert statuses[-1] == 503
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(cache.root / SOCKET))
        with contextlib.closing(connection):
            connection.request("POST", "/v1/snapshots", order(f"{bucket.uri}/late"))
            reply = connection.getresponse()
            assert (reply.status, reply.getheader("Retry-After")) == (503, "5")
            assert "ask again in 5 s" in json.loads(reply.read())["error"]["message"]
        assert node.get("/healthz").status == 200
        series = [name for name in node.metrics() if "uri=" in name]
        assert len(series) == 4 * (AT_ONCE + WAITING)
        # In the middle of pulls from a store that stalls:
        node.server.signal(signal.SIGTERM)
        assert node.server.wait(30) == 0
        assert not (cache.root / SOCKET).exists()
    finally:
        may_answer.set()


class Answers:
    """An agent's answers to one pod, one after the other."""

    def __init__(self, delegate: Delegate, monkeypatch: pytest.MonkeyPatch, answers: list[Any]) -> None:
        self.asked: list[str] = []
        self.paused: list[float] = []
        rest = iter(answers)

        def answer(method: str, body: object = None) -> Any:
            self.asked.append(method)
            found = next(rest)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(delegate, "_ask", answer)
        monkeypatch.setattr(delegate, "_pause", self.paused.append)


def test_a_pod_waits_for_a_place_and_asks_again_for_what_the_agent_has_forgotten(cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Delegate(WeightsSettings(cache_dir=cache.root), "s3://b/a", lambda pulled: None)
    failed = {"uri": "s3://b/a", "pulls": 4, "phase": "failed", "error": "no objects", "total_bytes": 0}
    forgotten, waiting = {"pulls": -1, "phase": "waiting"}, {"pulls": 4, "phase": "waiting", "error": None}
    answers = Answers(
        found, monkeypatch, [_Busy("full", "7"), _Busy("full", "junk"), {"pulls": 9}, forgotten, {"pulls": 4}, waiting, failed]
    )
    with pytest.raises(StoreError, match=r"^no objects$"):
        found.pull()
    assert answers.asked == ["POST", "POST", "POST", "GET", "POST", "GET", "GET"]
    assert answers.paused[:2] == [7.0, 1.0]
    assert found.state() == ("failed", "no objects")


@pytest.mark.parametrize(
    "body",
    [b"junk", b"[]", b"7", b'{"snapshots": 7}', b'{"snapshots": [{"uri": 1}]}', b'{"snapshots": [7]}', b"[" * 9999],
    ids=lambda body: body[:20].decode(),
)
def test_a_pod_takes_no_harm_from_an_agent_that_answers_nonsense(cache: NodeCache, body: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(cache.root / SOCKET))
        door.listen()

        def answer() -> None:
            connection, _ = door.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

        thread = threading.Thread(target=answer)
        thread.start()
        found = Delegate(WeightsSettings(cache_dir=cache.root), "s3://b/a", lambda pulled: None)
        reports: list[Pulled] = []
        found._report = reports.append
        try:
            with contextlib.suppress(StoreError):
                found._order()
        finally:
            thread.join()
    assert len(found.state()[1] or "") < 2100


@pytest.mark.parametrize("files", [128, 1024])
def test_with_few_descriptors_and_many_who_ask_for_nothing_probes_are_answered(
    bucket: Bucket, cache: NodeCache, sidecar: Callable[..., Sidecar], files: int
) -> None:
    push(bucket, MODEL)
    few = ["prlimit", f"--nofile={files}:{files}"]
    node = sidecar("", "--agent", within=lambda command: [*few, *command], WEIGHTS_RESIDENT_BYTES="1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for number in range(400):
            port = stack.enter_context(socket.create_connection(("127.0.0.1", node.port)))
            agent = stack.enter_context(socket.socket(socket.AF_UNIX))
            agent.connect(str(cache.root / SOCKET))
            function = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            function.connect(str(cache.root / "resident.sock"))
            if number % 2:
                with contextlib.suppress(OSError):  # it has given way already
                    port.sendall(b"GET /hea")
                    agent.sendall(b"POST /v1/snap")
        assert node.get("/healthz").status == node.get("/readyz").status == 200
        assert count(node.server.process.pid, "fd") < files
        assert ask(cache, order(bucket.uri))[0] == 200  # and pulls have descriptors left
        wait_until("the pull", lambda: node.row()["phase"] == "complete")
    said = node.server.said()
    assert "Traceback" not in said
    assert said.count("give way") <= 3  # a line for each socket


def test_memory_descriptors_threads_and_series_are_what_they_were_after_many_addresses(
    bucket: Bucket, cache: NodeCache, sidecar: Callable[..., Sidecar]
) -> None:
    bucket.put({f"{number}/a": noise(1000, seed=number) for number in range(30)})
    node = sidecar("", "--agent")
    pid = node.server.process.pid
    before = memory_mb(pid), count(pid, "fd"), len(node.metrics()), count(pid, "task")
    uris = [f"{bucket.uri}/{number}" for number in range(60)]  # of which half are nowhere
    for uri in uris:
        wait_until("a place", lambda uri=uri: ask(cache, order(uri))[0] == 200)  # type: ignore[misc]
    wait_until("the last", lambda: node.metrics()["weights_cache_failures_total"] + node.metrics()["weights_cache_misses_total"] == 60)
    wait_until("its end", lambda: count(pid, "task") <= before[3])
    assert node.metrics()["weights_cache_failures_total"] == 30
    assert len(node.metrics()) == before[2]
    assert count(pid, "fd") <= before[1] + 12  # ten idle connections to the store stay
    assert memory_mb(pid) - before[0] < 20  # each client of the store would take 15
    assert len(node.rows()) <= pulls.ENDED


# The client of the store


def test_one_client_serves_all(bucket: Bucket) -> None:
    shared = Access()
    assert Store(WeightsUri("b", "a"), shared)._s3 is Store(WeightsUri("b", "b"), shared)._s3


def test_after_a_refusal_the_next_pull_looks_for_credentials_anew_but_not_each(
    bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(MODEL)
    shared, uri = Access(), WeightsUri.parse(bucket.uri)
    first = Store(uri, shared)
    proxy.refusal = 403, "AccessDenied"
    with contextlib.suppress(StoreError):
        first.list()
    assert Store(uri, shared)._s3 is first._s3  # it is young
    monkeypatch.setattr(access, "RENEW_S", 0.0)
    with pytest.raises(StoreError, match="refused for access key AKIATEST"):
        first.list()
    proxy.refusal = None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAOTHER")
    second = Store(uri, shared)
    assert second._s3 is not first._s3
    assert second._identity() == "access key AKIAOTHER"
    assert second.list()
    assert Store(uri, shared)._s3 is second._s3


def test_credentials_that_come_later_are_found(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put(MODEL)
    monkeypatch.setattr(access, "RENEW_S", 0.0)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    shared, uri = Access(), WeightsUri.parse(bucket.uri)
    with pytest.raises(StoreError, match="no credentials"):
        Store(uri, shared).list()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    assert len(Store(uri, shared).list()) == 2


# What is read of a store


def test_a_prefix_of_very_many_objects_is_no_model(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put({str(number): b"" for number in range(4)})
    monkeypatch.setattr(store, "MAX_FILES", 3)
    with pytest.raises(StoreError, match=r"more than 3 objects below .*/model/; is the prefix right?"):
        Store(WeightsUri.parse(bucket.uri)).list()


def test_a_manifest_of_many_bytes_is_not_read(bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    push(bucket, MODEL)
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(StoreError, match="100 are allowed; push the weights again"):
        list_snapshot(Store(WeightsUri.parse(bucket.uri)))
    assert proxy.reads == []


@pytest.mark.parametrize("data", [b'{"files": ' + b"[" * 500, b'{"relight": [' + b"{}," * 500, b"{" + b'"a":1,' * 500], ids=["[", "{", '"'])
def test_a_manifest_with_more_values_than_its_files_need_is_not_parsed(
    bucket: Bucket, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put({"a": b"1", manifest.MANIFEST: data})
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("it was parsed"))
    with pytest.raises(StoreError, match="it has more in it than these files need"):
        list_snapshot(Store(WeightsUri.parse(bucket.uri)))


def test_a_manifest_whose_paths_are_full_of_quotes_is_read(bucket: Bucket) -> None:
    push(bucket, {'"{["' * 50: b"1", "b": b"2"})
    assert len(list_snapshot(Store(WeightsUri.parse(bucket.uri)))[1]) == 2


def test_a_file_of_the_cache_is_read_no_further_than_such_a_one_can_be(cache: NodeCache) -> None:
    uri = "s3://b/a"
    with cache._ref_path(uri).open("wb") as huge:
        huge.truncate(1 << 40)
    assert cache.ref(uri) is None
    with (cache.root / "FORMAT").open("wb") as huge:
        huge.write(b"9" * 5000)
        huge.truncate(1 << 40)
    with pytest.raises(CacheError, match="has layout") as caught:
        cache.check_format()
    assert len(str(caught.value)) < 2100


def test_a_probe_looks_at_no_disk(bucket: Bucket, cache: NodeCache, sidecar: Callable[..., Sidecar]) -> None:
    push(bucket, MODEL)
    found = sidecar(bucket.uri)
    wait_until("ready", found.is_ready)
    # A record of a file that nobody can read: what looks at the cache waits for whoever opens it, for ever.
    (digest, *_) = (cache.root / "digests").iterdir()
    digest.unlink()
    os.mkfifo(digest)
    hung = threading.Thread(target=_ignored, args=(found.port,))
    hung.start()
    wait_until("the probes", lambda: found.get("/healthz").status == 200 and found.get("/readyz").status == 200)
    found.server.signal(signal.SIGTERM)
    assert found.server.wait(30) == 0
    hung.join()


def _ignored(port: int) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        request(port, "GET", "/v1/snapshots")


def test_a_socket_whose_agent_is_busy_is_not_taken_for_that_of_one_that_was_killed(cache: NodeCache) -> None:
    path = cache.root / SOCKET
    with socket.socket(socket.AF_UNIX) as busy, contextlib.ExitStack() as stack:
        busy.bind(str(path))
        busy.listen(0)
        for _ in range(4):  # its queue is full
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            waiting.connect_ex(str(path))
        with pytest.raises(WeightsError, match="another agent is busy at"):
            _bound(path, socket.SOCK_STREAM)
        assert path.is_socket()


def test_the_log_of_an_agent_names_no_secret(
    bucket: Bucket, cache: NodeCache, sidecar: Callable[..., Sidecar], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    endpoint = f"http://user:hunter2@127.0.0.1:{free_port()}"
    node = sidecar("", "--agent", AWS_ENDPOINT_URL=endpoint, HTTP_PROXY="http://me:hunter3@127.0.0.1:9", NO_PROXY="nowhere")
    status, answer = ask(cache, order("s3://AKIA:hunter4@bucket/model"))
    assert (status, "hunter" in json.dumps(answer)) == (400, False)
    status, answer = ask(cache, order("s3://bucket/model\n2026-01-01 INFO relight: all is well"))
    assert status == 400
    assert ask(cache, order("s3://bucket/model"))[0] == 200
    row = wait_until("the error", lambda: (row := node.row())["phase"] == "failed" and row)
    assert row["error"]
    assert "hunter" not in json.dumps(row) + node.server.said() + node.get("/metrics").body.decode()
    assert "\n2026-01-01" not in node.server.said()


def test_a_pull_that_is_cancelled_before_it_begins_asks_nobody(bucket: Bucket, proxy: Proxy, puller: Callable[..., Puller]) -> None:
    bucket.put(MODEL)
    found = puller(bucket.uri)
    asked = len(proxy.asked)
    found.cancel()
    with pytest.raises(StoreError, match="the pull was stopped"):
        found.run()
    assert len(proxy.asked) == asked


def test_a_log_that_nobody_reads_holds_nobody_up(aws: None, cache: NodeCache) -> None:
    port = free_port()
    ours = {"WEIGHTS_HOST": "127.0.0.1", "WEIGHTS_PORT": str(port), "WEIGHTS_CACHE_DIR": str(cache.root)}
    command = [sys.executable, "-m", "weights_cache", "serve", "--agent"]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ours}, stderr=subprocess.PIPE) as node:
        wait_until("/healthz", lambda: request(port, "GET", "/healthz").status == 200)
        long = "x" * 900
        for number in range(150):  # each has a line of some 2000 characters; a pipe takes 64 KiB
            wait_until("a place", lambda number=number: ask(cache, order(f"s3://nowhere/{number}/{long}"))[0] == 200)  # type: ignore[misc]
        failures = lambda: b"weights_cache_failures_total 150.0" in request(port, "GET", "/metrics").body  # noqa: E731
        wait_until("the last failure", failures)
        assert request(port, "GET", "/healthz").status == 200
        node.send_signal(signal.SIGTERM)
        assert node.wait(30) == 0
        assert node.stderr
        assert b"keeping what is asked for" in node.stderr.read(100_000)


def test_an_agent_whose_socket_was_taken_away_is_one_to_be_replaced(aws: None, cache: NodeCache, sidecar: Callable[..., Sidecar]) -> None:
    node = sidecar("", "--agent")
    (cache.root / SOCKET).unlink()
    found = wait_until("that it notices", lambda: (reply := node.get("/healthz")).status == 503 and reply)
    assert found.json() == {"status": "failed", "error": f"{cache.root / SOCKET} has been taken away, and nobody can ask there any more"}
    assert node.get("/readyz").status == 503
    with socket.socket(socket.AF_UNIX) as other:  # another one's
        other.bind(str(cache.root / SOCKET))
        node.server.signal(signal.SIGTERM)
        assert node.server.wait(30) == 0
        assert (cache.root / SOCKET).is_socket()


def test_a_descriptor_that_takes_long_to_close_keeps_no_probe_waiting(aws: None, cache: NodeCache, sidecar: Callable[..., Sidecar]) -> None:
    node = sidecar("", "--agent", WEIGHTS_RESIDENT_BYTES="1000000")
    with contextlib.ExitStack() as stack:
        door = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        slow = stack.enter_context(socket.create_connection(door.getsockname()))
        peer = stack.enter_context(door.accept()[0])
        talk = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        talk.connect(str(cache.root / "resident.sock"))
        slow.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                slow.send(b"x" * 65536)  # which nobody reads
        slow.setblocking(True)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 300))  # whoever closes it last waits for that
        message = json.dumps({"do": "keep", "key": "k", "device": "host", "bytes": 1, "uri": "u"}).encode()
        node.server.signal(signal.SIGSTOP)
        socket.send_fds(talk, [message], [slow.fileno()])
        slow.close()
        node.server.signal(signal.SIGCONT)
        time.sleep(0.5)  # until it waits
        assert node.get("/healthz").status == node.get("/readyz").status == 200
        node.server.signal(signal.SIGTERM)
        assert node.server.wait(30) == 0
        peer.close()
