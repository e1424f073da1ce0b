"""What the queue source keeps within bounds: threads, bytes, connections, the time of its end, and what it writes into its log."""

import base64
import contextlib
import http.client
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from knative.queue_source import holding as holding_module
from knative.queue_source import monitor as monitor_module
from knative.queue_source import settler as settler_module
from knative.queue_source.connection import KEPT_BYTES
from knative.queue_source.errors import QueueSourceError
from knative.queue_source.event import Event
from knative.queue_source.holding import Held, Holding, Lease
from knative.queue_source.log import LineFormatter, Seldom, line
from knative.queue_source.monitor import Monitor
from knative.queue_source.queue import Message, Outcome
from knative.queue_source.settings import from_environment
from knative.queue_source.settler import Settler
from knative.queue_source.sink import Call
from knative.queue_source.sink import Sink as SinkClient
from knative.queue_source.source import Source, open_until
from knative.queue_source.threads import Threads
from knative.queue_source.workers import Workers
from tests.knative.queue_source.stage import Post, Reply, Sink, Sqs, at_work, settings, source_running, sqs_running
from tests.support import free_port, request, wait_until

EVENT = Event({"id": "1"}, "application/json", b"{}")
LOOP = ("poll", "keep", "delete", "give back", "work")


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.close()


@pytest.fixture(scope="module")
def sqs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sqs]:
    with sqs_running(tmp_path_factory.mktemp("sqs")) as server:
        yield server


class Memory:
    """A queue in this process."""

    source = "memory"
    longest_hold_s = 3600.0
    dead_letters: bool | None = True

    def __init__(self, *bodies: bytes, size: int = 10) -> None:
        self.waiting = [Message(str(number), str(number), body, 1, number) for number, body in enumerate(bodies)]
        self.deleted: list[str] = []
        self.released: list[str] = []
        self.closed = 0
        self._size = size
        self._lock = threading.Lock()

    def open(self) -> None:
        pass

    def receive(self, limit: int, wait_s: int) -> list[Message]:
        with self._lock:
            found = self.waiting[: min(limit, self._size)]
            del self.waiting[: len(found)]
        if not found:
            time.sleep(0.01)
        return found

    def extend(self, messages: Sequence[Message]) -> Outcome:
        return Outcome()

    def delete(self, messages: Sequence[Message]) -> Outcome:
        self.deleted += [message.id for message in messages]
        return Outcome()

    def release(self, messages: Sequence[tuple[Message, float]]) -> Outcome:
        self.released += [message.id for message, _ in messages]
        return Outcome()

    def close(self) -> None:
        self.closed += 1


def asked(url: str, **more: str) -> Any:
    return from_environment(settings("http://127.0.0.1:1/0/work", url, **{f"QUEUE_SOURCE_{name}": value for name, value in more.items()}))


# Threads


def test_a_source_ends_every_thread_that_it_began(sink: Sink) -> None:
    messages = Memory(*[b'{"n": 1}'] * 200)
    source = Source(asked(sink.url, CONCURRENCY="40"), messages, SinkClient(sink.url))
    with at_work(source):
        names = {thread.name for thread in source.threads._threads}
        wait_until("all done", lambda: len(messages.deleted) == 200)
    assert {"poll", "keep", "delete", "give back"} <= names
    assert not [thread for thread in threading.enumerate() if thread.name in LOOP]
    assert messages.closed == 1


@pytest.mark.parametrize("hang", ["answer", "connect", "tls", "body"])
def test_it_ends_in_bounded_time_though_its_sink_hangs(monkeypatch: pytest.MonkeyPatch, hang: str) -> None:
    monkeypatch.setattr("knative.queue_source.connection.CONNECT_S", 3600.0)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as peers:
        port = listener.getsockname()[1]
        if hang == "connect":  # the kernel takes no more than these in
            for _ in range(4):
                full = peers.enter_context(socket.socket())
                full.setblocking(False)
                full.connect_ex(("127.0.0.1", port))
        url = f"{'https' if hang == 'tls' else 'http'}://127.0.0.1:{port}/"
        source = Source(asked(url, DRAIN_S="0", CONCURRENCY="2"), messages := Memory(b"{}", b"{}"), SinkClient(url))
        source.start()
        wait_until("posts", lambda: sum(held.call is not None for held in source._holding.all()) == 2)
        if hang == "body":
            for _ in range(2):
                peer = peers.enter_context(listener.accept()[0])
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")
        source.stop()
        assert source.threads.join(60) == []
        assert (sorted(messages.released), messages.deleted) == (["0", "1"], [])


def test_a_thread_that_fails_is_known_with_its_reason_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    threads = Threads()

    def fail(reason: str) -> Callable[[], None]:
        def run() -> None:
            raise ValueError(reason)

        return run

    threads.start("first", fail("no room")).join()
    threads.start("second", fail("no time")).join()
    assert (threads.failure, threads.join(0)) == ("first: ValueError('no room')", [])
    assert len(caplog.records) == 2


def test_a_source_whose_queue_fails_in_no_known_way_says_so(sink: Sink) -> None:
    messages = Memory()
    messages.receive = lambda limit, wait_s: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    source = Source(asked(sink.url), messages, SinkClient(sink.url))
    source.start()
    wait_until("its failure", lambda: source.threads.failure)
    assert source.threads.failure.startswith("poll: ZeroDivisionError")
    source.stop()
    assert source.threads.join(60) == []


def test_a_queue_that_cannot_be_opened_in_no_known_way_ends_the_start() -> None:
    with pytest.raises(QueueSourceError, match="queue: cannot be opened: open: ZeroDivisionError"):
        open_until(lambda: 1 / 0, "queue", threading.Event(), Threads())  # type: ignore[arg-type]


def test_a_stop_does_not_wait_for_a_queue_that_is_being_opened() -> None:
    told, opening, over = threading.Event(), threading.Event(), threading.Event()

    def stall() -> None:
        opening.set()
        over.wait(60)

    threads = Threads()

    def stop() -> None:
        opening.wait(60)
        told.set()

    threads.start("stop", stop)
    assert not open_until(stall, "queue", told, threads)
    assert threads.join(0) == ["open"]
    over.set()
    assert threads.join(60) == []


def test_workers_and_settlers_end_with_what_they_are_at() -> None:
    threads, entered, go = Threads(), threading.Semaphore(0), threading.Event()

    def work(item: Any) -> Any:
        entered.release()
        go.wait(60)
        return item if isinstance(item, list) else None  # to be tried again

    workers = Workers[int](work, limit=2, spawn=threads.start)
    settler = Settler[int]("settle", work, threads=2)
    settler.start(threads.start)
    workers.put([1, 2, 3, 4])
    settler.put([1])
    for _ in range(3):
        assert entered.acquire(timeout=60)
    workers.stop()
    settler.stop()
    assert threads.join(0) == ["settle", "work"]
    go.set()
    assert threads.join(60) == []
    assert not entered.acquire(blocking=False)
    workers.put([5])
    assert threads.join(0) == []


# What is held


def held(holding: Holding, key: str, body: bytes = b"") -> Held:
    added = holding.add(Message(key, key, body, 1, "h"))
    assert added
    return added[0]


def taking(holding: Holding, most: int) -> tuple[threading.Thread, list[int]]:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(holding.take_room(most)), daemon=True)
    thread.start()
    return thread, found


def waits(thread: threading.Thread) -> None:
    """It does so now, for good as far as it knows."""
    wait_until("a poller that waits", lambda: "wait" in _at(thread))


def _at(thread: threading.Thread) -> list[str]:
    frame = sys._current_frames().get(thread.ident or 0)
    names = []
    while frame:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


def test_a_poller_that_waits_for_any_room_is_woken_by_the_first_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding_module, "PATIENCE_S", 0.0)
    holding = Holding(3, 30)
    holding.take_room(3)
    messages = [held(holding, key) for key in "abc"]
    thread, found = taking(holding, 10)
    waits(thread)
    holding.remove(messages[:1])
    thread.join(60)
    assert found == [1]


def test_a_poller_that_waits_for_room_for_ten_is_woken_when_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding_module, "PATIENCE_S", 3600.0)
    holding = Holding(20, 30)
    holding.take_room(10)
    holding.take_room(10)
    messages = [held(holding, str(number)) for number in range(20)]
    thread, found = taking(holding, 10)
    waits(thread)
    patient: list[float | None] = []
    wait = holding._room_made.wait

    def noted(timeout: float | None = None) -> bool:
        patient.append(timeout)
        return wait(timeout)

    monkeypatch.setattr(holding._room_made, "wait", noted)
    holding.remove(messages[:9])
    wait_until("patience", lambda: any(patient))
    waits(thread)
    assert not found
    holding.remove(messages[9:10])
    thread.join(60)
    assert found == [10]


def test_who_waits_for_the_end_is_woken_by_the_last_message() -> None:
    holding = Holding(12, 30)
    holding.take_room(10)  # by a poller whose queue does not answer
    holding.take_room(2)
    messages = [held(holding, str(number)) for number in range(2)]
    holding.stop()
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(holding.wait_empty(3600)), daemon=True)
    thread.start()
    waits(thread)
    holding.remove(messages[:1])
    waits(thread)
    time.sleep(0.01)  # it has looked, and waits again
    holding.remove(messages[1:])
    thread.join(60)
    assert found == [True]


def test_pollers_wait_while_what_is_held_has_too_many_bytes() -> None:
    holding = Holding(12, 30, most_bytes=1000)
    holding.take_room(10)
    first, second = held(holding, "a", bytes(600)), held(holding, "b", bytes(600))
    thread, found = taking(holding, 10)
    waits(thread)
    assert holding.gauges()["held_bytes"] == 1200
    holding.remove([first])  # which would be too little room to wake it for
    thread.join(60)
    assert found == [3]
    holding.remove([second])
    assert (holding._bytes, holding.gauges()["held_bytes"]) == (0, 0)


def test_objects_are_fetched_one_at_a_time_where_there_is_no_room_for_two() -> None:
    holding = Holding(100, 30, most_bytes=1000)
    holding.take_room(10)
    one, two, three = (held(holding, key) for key in "abc")
    assert holding.reserve(one, 5000)  # however large it may be
    results: dict[str, bool] = {}
    threads = Threads()
    threads.start("two", lambda: results.__setitem__("two", holding.reserve(two, 900)))
    wait_until("a wait", lambda: any("reserve" in _at(thread) for thread in threads._threads))
    assert not results
    holding.fetched(one, 50)  # it was much smaller
    wait_until("its turn", lambda: results == {"two": True})
    threads.start("three", lambda: results.__setitem__("three", holding.reserve(three, 900)))
    holding.remove([two])
    assert threads.join(60) == []
    assert results == {"two": True, "three": True}
    holding.remove([one, three])
    assert (holding._bytes, holding._objects) == (0, 0)


def test_who_waits_to_fetch_does_not_when_the_message_is_lost_or_it_is_time_to_stop() -> None:
    holding = Holding(100, 30, most_bytes=1000)
    holding.take_room(10)
    one, two, three = (held(holding, key) for key in "abc")
    assert holding.reserve(one, 5000)
    results: list[bool] = []
    threads = Threads()
    threads.start("two", lambda: results.append(holding.reserve(two, 900)))
    wait_until("a wait", lambda: any("wait" in _at(thread) for thread in threads._threads))
    holding.lose(two)
    assert threads.join(60) == []
    threads.start("three", lambda: results.append(holding.reserve(three, 900)))
    wait_until("a wait", lambda: any("wait" in _at(thread) for thread in threads._threads))
    holding.stop()
    assert threads.join(60) == []
    assert results == [False, False]
    assert three.lease is Lease.KEPT


def test_what_a_source_holds_stays_within_the_bound_though_more_could_be_held(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    sink.answer = lambda _: (go.wait(60) and Reply()) or Reply()
    messages = Memory(*[b"x" * 1000] * 100, size=1)
    source = Source(asked(sink.url, CONCURRENCY="100"), messages, SinkClient(sink.url))
    source._holding._most_bytes = 20_000
    with at_work(source):
        wait_until("as many as may be", lambda: source._holding._bytes >= 20_000)
        most = 20 + 4  # one receive of each poller may be under way
        for _ in range(20):
            assert len(source._holding.all()) <= most
            time.sleep(0.005)
        go.set()
        wait_until("all done", lambda: len(messages.deleted) == 100)


def test_the_source_has_no_more_connections_than_messages(sink: Sink) -> None:
    sink.answer = lambda _: time.sleep(0.005) or Reply()  # type: ignore[func-returns-value]
    messages = Memory(*[b"{}"] * 300)
    client = SinkClient(sink.url)
    source = Source(asked(sink.url, CONCURRENCY="7"), messages, client)
    with at_work(source):
        wait_until("all done", lambda: len(messages.deleted) == 300)
        assert (sink.most_busy <= 7, len(client._idle) <= 7) == (True, True)
    assert not client._idle


def test_of_an_answer_that_nobody_wants_a_little_is_kept(sink: Sink) -> None:
    sink.answer = lambda _: Reply(500, body=b"x" * 1_000_000)
    client = SinkClient(sink.url, wants_answers=False)
    assert [len(client.post(EVENT, Call()).body) for _ in range(2)] == [KEPT_BYTES] * 2
    assert len(client._idle) == 1
    client.close()
    client = SinkClient(sink.url)
    assert [len(client.post(EVENT, Call()).body) for _ in range(2)] == [1_000_000] * 2
    assert len(client._idle) == 1
    client.close()


# Settling


def test_a_call_that_returns_settles_what_came_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settler_module, "LINGER_S", 3600.0)
    batches: list[list[int]] = []
    entered, go = threading.Semaphore(0), threading.Event()

    def settle(batch: Sequence[int]) -> Sequence[int]:
        batches.append(list(batch))
        entered.release()
        if batch == [0]:
            go.wait(60)
        return ()

    threads = Threads()
    settler = Settler[int]("settle", settle, threads=2)
    settler.start(threads.start)
    settler.put([0])
    assert entered.acquire(timeout=60)
    settler.put([1, 2])
    go.set()
    assert entered.acquire(timeout=60)
    assert batches == [[0], [1, 2]]
    settler.stop()
    assert threads.join(60) == []


# Credentials and the log


@pytest.mark.parametrize(
    ("user", "said"),
    [("user:sinkpass", b"user:sinkpass"), ("user", b"user:"), (":token", b":token"), ("a%40b:p%3Aw%2F%C3%BC", "a@b:p:w/ü".encode())],
)
def test_the_sink_is_told_the_user_of_its_url(sink: Sink, user: str, said: bytes) -> None:
    client = SinkClient(sink.url.replace("://", f"://{user}@"))
    client.post(EVENT, Call())
    client.close()
    headers = sink.posts[0].headers
    assert headers["authorization"] == "Basic " + base64.b64encode(said).decode()
    assert "@" not in headers["host"]


def test_a_sink_without_a_user_gets_no_authorization(sink: Sink) -> None:
    client = SinkClient(sink.url)
    client.post(EVENT, Call())
    client.close()
    assert "authorization" not in sink.posts[0].headers


def test_a_password_is_in_no_line_of_the_log_and_no_error(sqs: Sqs, sink: Sink, tmp_path: Path) -> None:
    sink.answer = lambda _: Reply(500, body=b"see http://user:hunter2@host/?X-Amz-Signature=hunter3&a=b\n\x1b[2Jhunt")
    url = sqs.queue("secret").replace("://", "://me:hunter4@")
    sqs.send(url.replace("me:hunter4@", ""), 1)
    env = {**sqs.env, **settings(url, sink.url.replace("://", "://user:hunter5@") + "?token=hunter6", QUEUE_SOURCE_BACKOFF_S="60")}
    env |= {"QUEUE_SOURCE_BACKOFF_MAX_S": "60"}
    with source_running(tmp_path, env) as server:
        wait_until("its failure", lambda: "the sink said 500" in server.said())
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
        said = server.said()
    assert "hunter" not in said
    assert "\x1b" not in said
    assert [text for text in said.splitlines() if not text.startswith("20")] == []
    for wrong in ({"K_SINK": "ftp://user:hunter2@host/"}, {"K_CE_OVERRIDES": '{"a": "http://user:hunter2@h/"'}):
        found = subprocess.run(
            [sys.executable, "-m", "knative.queue_source"], env={**os.environ, **env, **wrong}, capture_output=True, text=True, check=False
        )
        assert (found.returncode, "hunter" in found.stderr, found.stderr.count("\n")) == (1, False, 1)


def test_a_line_of_the_log_is_one_line_without_control_characters_of_bounded_length() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("foreign")
    logger.addHandler(handler)
    logger.warning("%s: %s", "id\n2026 INFO fine", "\x1b[2J\u202e\u2028\x85\ud800" + "x" * 100_000)
    try:
        raise ValueError("a\n2026 INFO fine\n" + "y" * 100_000)
    except ValueError:
        logger.exception("failed")
    lines = stream.getvalue().split("\n")
    assert lines[0].startswith(r"WARNING id\x0a2026 INFO fine: \x1b[2J\u202e\u2028\x85\ud800x")
    assert [text for text in lines[1:] if text and not text.startswith(("    ", "ERROR failed"))] == []
    assert max(map(len, lines)) < 9000
    assert len(line("\n" * 100_000)) <= 4 * 2000 + 1


def test_an_outage_of_hours_is_told_now_and_then_and_each_poisonous_message_once() -> None:
    now = [0.0]
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(Seldom(most=3, clock=lambda: now[0]))
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("away")
    logger.addHandler(handler)
    for second in range(121):
        now[0] = second
        logger.warning("%s: away", f"id{second}")
        logger.error("%s: poison", f"id{second}")
    lines = stream.getvalue().splitlines()
    assert sum(text.endswith("poison") for text in lines) == 121
    assert [text for text in lines if "away" in text] == [
        *(f"WARNING id{second}: away" for second in (0, 1, 2)),
        "WARNING id60: away (57 more like it were left out)",
        *(f"WARNING id{second}: away" for second in (61, 62)),
        "WARNING id120: away (57 more like it were left out)",
    ]
    for number in range(5000):  # a text that is never the same
        now[0] += 1
        logger.warning(f"text {number}")
    assert len(handler.filters[0]._kinds) <= 200  # type: ignore[union-attr]


# The monitor


@contextlib.contextmanager
def monitoring(failure: str = "") -> Iterator[tuple[int, Threads]]:
    port, threads = free_port(), Threads()
    monitor = Monitor("127.0.0.1", port, threads, failure=lambda: failure, is_ready=lambda: True, metrics=lambda: b"metric 1\n")
    try:
        yield port, threads
    finally:
        monitor.close()
        assert (threads.join(60), threads.failure) == ([], "")


def test_the_monitor_answers_and_is_gone_when_it_is_closed() -> None:
    with monitoring() as (port, _):
        paths = ("/healthz", "/readyz?a", "/metrics", "/nowhere")
        assert [request(port, "GET", path).status for path in paths] == [200, 200, 200, 404]
        assert request(port, "GET", "/metrics").body == b"metric 1\n"
        assert request(port, "POST", "/healthz", {}).status == 405
        assert request(port, "HEAD", "/healthz").body == b""
        with pytest.raises(QueueSourceError, match=f"QUEUE_SOURCE_PORT={port}: cannot listen at 127.0.0.1"):
            Monitor("127.0.0.1", port, Threads(), failure=lambda: "", is_ready=lambda: True, metrics=lambda: b"")
    with pytest.raises(OSError, match="refused"):
        request(port, "GET", "/healthz")
    with monitoring("poll") as (port, _):
        assert request(port, "GET", "/healthz").status == 503


def test_silent_slow_and_loud_clients_keep_no_probe_from_its_answer() -> None:
    with monitoring() as (port, threads), contextlib.ExitStack() as rude:
        for number in range(500):
            client = rude.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            with contextlib.suppress(OSError):  # it has given way
                client.sendall((b"", b"GET /hea", b"\r\n", b"x" * 20_000)[number % 4])
        assert [request(port, "GET", "/healthz").status for _ in range(20)] == [200] * 20
        assert [thread.name for thread in threads._threads] == ["monitor"]


def test_a_request_that_does_not_come_in_time_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "CONNECTION_S", 0.05)
    with monitoring() as (port, _), socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(100) == b""


def test_a_head_that_is_too_long_is_refused() -> None:
    with monitoring() as (port, _), socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nA: " + b"x" * 17_000)
        assert client.recv(100).startswith(b"HTTP/1.1 431 ")


def test_without_descriptors_the_monitor_says_one_line_and_answers_again(tmp_path: Path) -> None:
    program = """
import resource, sys, logging
logging.basicConfig()
from knative.queue_source.monitor import Monitor
from knative.queue_source.threads import Threads
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
threads = Threads()
Monitor("127.0.0.1", int(sys.argv[1]), threads, failure=lambda: "", is_ready=lambda: True, metrics=lambda: b"")
threads.join(600)
"""
    port = free_port()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", program, str(port)], stderr=log)
    try:
        wait_until("the monitor", lambda: _answers(port))
        with contextlib.ExitStack() as rude:
            for _ in range(100):
                rude.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            wait_until("an answer", lambda: _answers(port))
        assert len((tmp_path / "log").read_text().splitlines()) <= 1
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return request(port, "GET", "/healthz").status == 200
    return False


# The whole


def test_sigterm_ends_it_though_the_sink_hangs_and_its_messages_come_back(sqs: Sqs, tmp_path: Path) -> None:
    url = sqs.queue("hanging")
    sqs.send(url, 1, 2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        env = {**sqs.env, **settings(url, f"http://127.0.0.1:{listener.getsockname()[1]}/", QUEUE_SOURCE_DRAIN_S="0")}
        with source_running(tmp_path, env) as server:
            peers = [listener.accept()[0] for _ in range(2)]
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
            assert "stopped" in server.said()
            assert "not waited for" not in server.said()
            for peer in peers:
                peer.close()
    assert len(sqs.take(url, 2)) == 2


def test_sigterm_ends_it_though_the_queues_service_hangs_at_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        env = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        env |= settings(f"http://127.0.0.1:{listener.getsockname()[1]}/123456789012/work", "http://127.0.0.1:9/")
        with source_running(tmp_path, env) as server:
            peer = listener.accept()[0]
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
            peer.close()


def flat(sqs: Sqs, tmp_path: Path, name: str, count: int, most_bytes: int) -> None:
    """So many messages of all kinds of outcomes, after a fifth of them that warm it up: memory, threads and descriptors stay."""

    def answer(post: Post) -> Reply:
        number = post.json()["n"]
        if number % 50 == 3:
            return Reply(400, body=b"no" * 1000)
        return Reply(200, body=b"x" * (50_000 if number % 20 == 0 else 10))

    sink = Sink(answer)
    url = sqs.queue(name, receives=1)
    port = free_port()
    try:
        with source_running(tmp_path, {**sqs.env, **settings(url, sink.url, QUEUE_SOURCE_CONCURRENCY="40")}, port=port) as server:
            seen = []
            for part in (count // 5, count - count // 5):
                sqs.control(fill={"queue": name, "count": part, "depth": 200})
                wait_until("an empty queue", lambda: sqs.stats()["left"] == 0 and not sqs.stats()["unfilled"], 3600)
                sink.posts.clear()
                seen.append(_size(server.process.pid))
    finally:
        sink.close()
    (before, threads, files), (after, threads_after, files_after) = seen
    print(f"{count} messages: {before >> 10} KiB, then {after >> 10} KiB; threads {threads}, {threads_after}; files {files}, {files_after}")
    assert after - before <= max(before // 20, most_bytes)
    assert (threads_after <= 40 + 12, files_after <= 40 + 30) == (True, True)  # a thread and a connection for each message


def _size(pid: int) -> tuple[int, int, int]:
    folder = Path(f"/proc/{pid}")
    resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(list((folder / "task").iterdir())), len(list((folder / "fd").iterdir()))


def test_two_thousand_messages_leave_nothing_behind(sqs: Sqs, tmp_path: Path) -> None:
    flat(sqs, tmp_path, "flat", 2_000, 16 << 20)  # so few do not warm it up: a message that stayed would be 20 MB with its answers


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_fifty_thousand_messages_leave_nothing_behind(sqs: Sqs, tmp_path: Path) -> None:
    flat(sqs, tmp_path, "flat-soak", 50_000, 4 << 20)


def test_a_line_of_the_log_has_no_secret_of_the_environment_whoever_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "k3y-of-the-queue")
    record = logging.makeLogRecord({"msg": "the queue refused %s", "args": ("k3y-of-the-queue",)})
    assert LineFormatter("%(message)s").format(record) == "the queue refused ***"
