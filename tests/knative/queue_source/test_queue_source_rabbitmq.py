"""The queue source and a real RabbitMQ: quorum queues, acknowledgements, dead letters, connections that end."""

import contextlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pika
import pytest

from knative.queue_source.errors import QueueUnavailable
from knative.queue_source.queue import Message
from knative.queue_source.rabbitmq import RabbitQueue, RabbitResults, message_of, parse
from knative.queue_source.settings import from_environment
from knative.queue_source.sink import Sink as SinkClient
from knative.queue_source.source import Source
from knative.queue_source.threads import Threads
from tests.knative.queue_source.stage import Post, Reply, Sink, at_work, settings, source_running
from tests.support import clean_environment, free_port, running, wait_until

SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # the one on PATH insists on a user of its own


class Broker:
    """A running broker."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.address = f"amqp://guest:guest@127.0.0.1:{port}/%2F"

    @contextlib.contextmanager
    def channel(self) -> Iterator[Any]:
        connection = pika.BlockingConnection(pika.URLParameters(self.address))
        try:
            yield connection.channel()
        finally:
            connection.close()

    def queue(self, name: str, *, deliveries: int = 20) -> str:
        """The URL of a new quorum queue; what was delivered more often goes to `NAME-dead`."""
        with self.channel() as channel:
            channel.queue_declare(f"{name}-dead", durable=True, arguments={"x-queue-type": "quorum"})
            more = {"x-delivery-limit": deliveries, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{name}-dead"}
            channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum", **more})
        return f"{self.address}/{name}"

    def send(self, name: str, *numbers: Any, **properties: Any) -> None:
        with self.channel() as channel:
            channel.confirm_delivery()
            for number in numbers:
                made = pika.BasicProperties(
                    **{"message_id": f"id-{number}", "content_type": "application/json", "delivery_mode": 2, **properties}
                )
                channel.basic_publish("", name, json.dumps({"n": number}).encode(), made)

    def take(self, name: str, count: int) -> list[Any]:
        """(properties, body) of so many messages."""
        found: list[Any] = []

        def look() -> bool:
            with self.channel() as channel:
                _, properties, body = channel.basic_get(name, auto_ack=True)
                if body is not None:
                    found.append((properties, json.loads(body)))
            return len(found) >= count

        wait_until(f"{count} messages in {name}", look)
        return found

    def ready(self, name: str) -> int:
        """Messages that nobody has."""
        with self.channel() as channel:
            count: int = channel.queue_declare(name, passive=True).method.message_count
            return count


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    if not SERVER.exists():
        pytest.skip("there is no rabbitmq-server; .ci/run installs Debian's")
    epmd = shutil.which("epmd")
    assert epmd
    folder = tmp_path_factory.mktemp("rabbitmq")
    port, epmd_port, distribution = free_port(), free_port(), free_port()
    env = clean_environment(
        HOME=str(folder),
        ERL_EPMD_PORT=str(epmd_port),
        ERL_EPMD_ADDRESS="127.0.0.1",
        RABBITMQ_CONF_ENV_FILE=os.devnull,
        RABBITMQ_NODENAME=f"relight-{port}@localhost",
        RABBITMQ_NODE_IP_ADDRESS="127.0.0.1",
        RABBITMQ_NODE_PORT=str(port),
        RABBITMQ_DIST_PORT=str(distribution),
        RABBITMQ_MNESIA_BASE=str(folder / "data"),
        RABBITMQ_LOG_BASE=str(folder / "log"),
        RABBITMQ_PID_FILE=str(folder / "pid"),
        RABBITMQ_CONFIG_FILE=str(folder / "none"),
        RABBITMQ_ENABLED_PLUGINS_FILE=str(folder / "plugins"),
        RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1} +S 1:1",
    )
    (folder / "plugins").write_text("[].")
    made = Broker(port)
    # Erlang's name server is started here, in the foreground: a node that finds none leaves one behind.
    with (
        running([epmd, "-address", "127.0.0.1", "-port", str(epmd_port)], folder / "epmd.log", env),
        running([str(SERVER)], folder / "out.log", env) as server,
    ):

        def answers() -> bool:
            assert server.process.poll() is None, server.said()
            socket.create_connection(("127.0.0.1", port), 1).close()  # pika logs each refusal at length
            with made.channel():
                return True

        wait_until("the broker", answers)
        yield made


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.close()


@contextlib.contextmanager
def running_here(url: str, sink_url: str, *, results: str = "", **more: str) -> Iterator[Source]:
    """A source in this process."""
    asked = from_environment(settings(url, sink_url, **{f"QUEUE_SOURCE_{name}": value for name, value in more.items()}))
    threads = Threads()
    messages = RabbitQueue(asked.url, prefetch=asked.concurrency, threads=threads)
    messages.open()
    answers = RabbitResults(results) if results else None
    if answers:
        answers.open()
    source = Source(asked, messages, SinkClient(asked.sink), results=answers, threads=threads)
    with at_work(source):
        yield source


def test_a_message_arrives_as_an_event_and_is_acknowledged(broker: Broker, sink: Sink) -> None:
    url = broker.queue("plain")
    broker.send("plain", 1, headers={"Priority": 6, "x-hidden": 1}, correlation_id="c", type="special", timestamp=1)
    with running_here(url, sink.url) as source:
        wait_until("done", lambda: b"queue_source_done_total 1.0" in source.metrics.text())
    assert broker.ready("plain") == 0  # and it did not come back when the connection ended
    (post,) = sink.posts
    told = {
        name: unquote(post.headers.get(f"ce-{name}", ""))
        for name in ("id", "source", "type", "priority", "correlationid", "time", "xhidden")
    }
    assert told == {
        "id": "id-1",
        "source": f"amqp://127.0.0.1:{broker.port}/%2F/plain",
        "type": "special",
        "priority": "6",
        "correlationid": "c",
        "time": "1970-01-01T00:00:01.000Z",
        "xhidden": "",
    }
    assert (post.headers["content-type"], post.json()) == ("application/json", {"n": 1})


def test_poison_is_dead_lettered_what_fails_comes_back_and_replies_go_to_the_results_queue(broker: Broker, sink: Sink) -> None:
    url, results = broker.queue("work", deliveries=2), broker.queue("answers")
    failed = threading.Event()
    event = {"ce-specversion": "1.0", "ce-source": "/m", "ce-type": "t.response", "Content-Type": "application/json"}

    def answer(post: Post) -> Reply:
        number = post.json()["n"]
        if number == "poison":
            return Reply(400)
        if number == 2 and not failed.is_set():
            failed.set()
            return Reply(500)
        return Reply(200, {**event, "ce-id": f"r-{number}"}, post.body)

    sink.answer = answer
    broker.send("work", 1, "poison", 2)
    with running_here(url, sink.url, results=results):
        ((_, parked),) = broker.take("work-dead", 1)
        found = broker.take("answers", 2)
    assert parked == {"n": "poison"}
    assert len(sink.of("poison")) == 3  # the first and two more
    assert sorted((properties.correlation_id, reply["id"], reply["data"]["n"]) for properties, reply in found) == [
        ("id-1", "r-1", 1),
        ("id-2", "r-2", 2),
    ]
    assert [post.id for post in sink.of(2)] == ["id-2"] * 2


def test_a_reply_is_sent_on_in_its_requests_trace(broker: Broker, sink: Sink) -> None:
    url, results = broker.queue("traced"), broker.queue("traced-results")
    trace = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01", "tracestate": "a=b"}
    event = {"ce-specversion": "1.0", "ce-id": "r", "ce-source": "/m", "ce-type": "t.response"}
    sink.answer = lambda post: Reply(200, event, post.body)
    broker.send("traced", 1, headers=trace)
    with running_here(url, sink.url, results=results):
        ((properties, _),) = broker.take("traced-results", 1)
    assert {name: properties.headers[name] for name in trace} == trace


def test_a_sink_that_is_busy_costs_no_delivery_and_no_more_are_unacknowledged_than_may_be(broker: Broker, sink: Sink) -> None:
    url = broker.queue("busy", deliveries=1)
    is_up = threading.Event()
    sink.answer = lambda _: Reply() if is_up.is_set() else Reply(503, {"Retry-After": "0"})
    broker.send("busy", *range(8))
    with running_here(url, sink.url, CONCURRENCY="3") as source:
        wait_until("the first refusals", lambda: sink.posts)
        assert broker.ready("busy") >= 5
        is_up.set()
        wait_until("done", lambda: b"queue_source_done_total 8.0" in source.metrics.text())
    assert broker.ready("busy") == broker.ready("busy-dead") == 0


def test_what_was_held_when_the_source_died_comes_back_with_the_same_id(broker: Broker, sink: Sink, tmp_path: Path) -> None:
    url = broker.queue("killed")
    go = threading.Event()
    sink.answer = lambda _: (go.wait(30) and Reply()) or Reply(500)
    env = settings(url, sink.url)
    with source_running(tmp_path, env) as first:
        broker.send("killed", 1)
        wait_until("the post", lambda: sink.posts)
        first.kill()
    go.set()
    with source_running(tmp_path, env) as second:
        wait_until("the second delivery", lambda: len(sink.posts) == 2)
        wait_until("done", lambda: broker.ready("killed") == 0)
        second.process.terminate()
        assert second.wait() == 0, second.said()
    assert {post.id for post in sink.posts} == {"id-1"}


# When the broker ends the subscription


@contextlib.contextmanager
def consuming(url: str, *, prefetch: int = 10) -> Iterator[RabbitQueue]:
    """A queue that is open, without a source."""
    messages = RabbitQueue(url, prefetch=prefetch, threads=Threads())
    messages.open()
    try:
        yield messages
    finally:
        messages.close()


def received(messages: RabbitQueue) -> Message:
    """The next message, however often the queue is out of reach meanwhile."""

    def look() -> Message | None:
        with contextlib.suppress(QueueUnavailable):
            return next(iter(messages.receive(1, 1)), None)
        return None

    return wait_until("a message", look)


def test_a_queue_that_is_deleted_makes_the_source_unready_and_one_that_is_declared_again_is_consumed(broker: Broker, sink: Sink) -> None:
    url = broker.queue("deleted")
    with running_here(url, sink.url) as source:
        broker.send("deleted", 1)
        wait_until("done", lambda: b"queue_source_done_total 1.0" in source.metrics.text())
        with broker.channel() as channel:
            channel.queue_delete("deleted")
        wait_until("not ready", lambda: not source.is_ready)
        broker.queue("deleted")
        broker.send("deleted", 2)
        wait_until("done", lambda: b"queue_source_done_total 2.0" in source.metrics.text())
        assert source.is_ready


def test_a_channel_that_the_broker_closes_is_opened_again_and_what_was_not_acknowledged_comes_back(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    url = broker.queue("closed")
    with consuming(url) as messages:
        broker.send("closed", 1, 2)
        first, second = received(messages), received(messages)
        messages.delete([first])
        # A tag that it does not know ends the channel, as a time-out does.
        messages._connection.add_callback_threadsafe(lambda: messages._channel.basic_ack(99))
        again = received(messages)
        assert (again.id, again.receives) == (second.id, 2)
        assert messages.extend([second]).gone == [second]
    assert "PRECONDITION_FAILED" in caplog.text


def test_what_was_given_back_and_is_done_after_all_costs_the_others_nothing(broker: Broker) -> None:
    url = broker.queue("late")
    with consuming(url) as messages:
        broker.send("late", 1, 2)
        first, second = received(messages), received(messages)
        messages.release([(first, 0.0)])
        again = received(messages)
        assert messages.delete([first]).gone == [first]
        assert messages.delete([second, again]).gone == []
        assert messages.delete([second, again]).gone == [second, again]
    assert broker.ready("late") == 0


# The time for which the broker lets a message be held


def test_a_message_that_is_held_too_long_is_given_back_whatever_the_visibility(
    broker: Broker, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RabbitQueue, "longest_hold_s", 1.5)
    url = broker.queue("long")
    go = threading.Event()
    sink.answer = lambda _: Reply() if len(sink.posts) > 1 or go.wait(60) else Reply(500)
    with running_here(url, sink.url, VISIBILITY_S="43200") as source:
        broker.send("long", 1)
        wait_until("the second delivery", lambda: len(sink.posts) == 2)
        go.set()
        wait_until("done", lambda: b"queue_source_done_total 2.0" in source.metrics.text())
        assert b"queue_source_lost_total 1.0" in source.metrics.text()
    assert [post.id for post in sink.posts] == ["id-1"] * 2


def test_a_delay_ends_when_the_broker_would_wait_no_longer(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RabbitQueue, "longest_hold_s", 1.0)
    with consuming(broker.queue("delayed")) as messages:
        broker.send("delayed", 1)
        messages.release([(received(messages), 300.0)])
        assert received(messages).receives == 2


def test_what_nobody_takes_for_too_long_goes_back_to_the_queue(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RabbitQueue, "longest_hold_s", 1.0)
    url = broker.queue("waiting")
    with consuming(url, prefetch=1) as messages:
        broker.send("waiting", 1)
        wait_until("its delivery", lambda: broker.ready("waiting") == 0)
        with broker.channel() as channel:  # of somebody else, who has it once it is given back
            found = wait_until("the message", lambda: next(channel.consume("waiting", inactivity_timeout=1.0))[0])
            assert found.redelivered
            assert messages.receive(1, 0) == []


# Starting


def test_a_queue_that_is_not_there_ends_the_start_in_one_line_without_the_password(broker: Broker, tmp_path: Path) -> None:
    with source_running(tmp_path, settings(f"{broker.address}/nowhere", "http://127.0.0.1:1/")) as source:
        assert source.wait() == 1
        assert "there is no such queue" in source.said()
        assert "guest" not in source.said()
        assert "Traceback" not in source.said()


@pytest.mark.parametrize(
    ("url", "vhost", "queue", "source"),
    [
        ("amqp://u:p@rabbit:5672/%2F/work", "/", "work", "amqp://rabbit:5672/%2F/work"),
        ("amqp://u:p@rabbit/team/a%2Fb", "team", "a/b", "amqp://rabbit/team/a%2Fb"),
        ("amqps://rabbit/work", "/", "work", "amqps://rabbit/%2F/work"),
    ],
)
def test_the_url_names_host_and_queue(url: str, vhost: str, queue: str, source: str) -> None:
    parameters, name, uri = parse(url)
    assert (parameters.virtual_host, name, uri) == (vhost, queue, source)


def test_a_message_without_an_id_gets_one_that_a_second_delivery_has_too() -> None:
    def delivery(tag: int, body: bytes, **headers: Any) -> Message:
        return message_of("q", (1, tag), pika.BasicProperties(headers=headers, timestamp=5), body)

    first, again = delivery(1, b"x", a=1), delivery(2, b"x", a=1, **{"x-delivery-count": 1})
    assert first.id == again.id
    assert first.key != again.key
    assert (first.receives, again.receives) == (1, 2)
    assert first.id != delivery(3, b"y", a=1).id


# A broker that says nothing any more


class Stalling:
    """A way to the broker on which nothing comes through from some time on."""

    def __init__(self, port: int) -> None:
        self._stalls = threading.Event()
        self._target = port
        self._threads = Threads()
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads.start("accept", self._accept)

    def stall(self) -> None:
        self._stalls.set()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for end in [self._listener, *self._ends]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        assert self._threads.join(60) == []
        for end in [self._listener, *self._ends]:
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._ends += [near, far]
                self._threads.start("there", lambda near=near, far=far: self._copy(near, far))  # type: ignore[misc]
                self._threads.start("back", lambda near=near, far=far: self._copy(far, near))  # type: ignore[misc]

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self._stalls.is_set():
                    target.sendall(data)


def test_it_ends_in_bounded_time_though_the_broker_says_nothing_any_more(broker: Broker, sink: Sink, tmp_path: Path) -> None:
    url, results = broker.queue("stalling"), broker.queue("stalling-results")
    way = Stalling(broker.port)
    env = settings(url.replace(str(broker.port), str(way.port)), sink.url, QUEUE_SOURCE_DRAIN_S="0")
    env["QUEUE_SOURCE_RESULTS_URL"] = results.replace(str(broker.port), str(way.port))
    sink.answer = lambda _: Reply(200, {"ce-id": "1", "ce-source": "s", "ce-specversion": "1.0", "ce-type": "t"})
    try:
        with source_running(tmp_path, env) as server:
            broker.send("stalling", 1)
            broker.take("stalling-results", 1)
            way.stall()
            broker.send("stalling", 2)
            server.process.terminate()
            assert server.process.wait(45) == 0  # less than the heartbeats of a connection take
    finally:
        way.close()


def test_a_connection_that_is_made_while_the_queue_is_closed_ends(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads()
    messages = RabbitQueue(broker.queue("closed"), prefetch=1, threads=threads)
    messages.open()
    connected = pika.BlockingConnection
    made: list[Any] = []

    def connect(parameters: Any) -> Any:
        found = connected(parameters)
        made.append(found)
        messages.close()  # by another thread, just now
        return found

    monkeypatch.setattr(pika, "BlockingConnection", connect)
    with messages._lock:
        old = messages._connection
    old.add_callback_threadsafe(old.close)  # as if the broker had done it
    assert threads.join(60) == []
    assert (threads.failure, [one.is_open for one in made]) == ("", [False])
