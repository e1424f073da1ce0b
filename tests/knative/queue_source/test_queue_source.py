"""The queue source between an SQS server and a sink: what happens to messages when the sink is slow, busy, away, or says no."""

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import boto3
import pytest

from knative.queue_source.claim import Claims
from knative.queue_source.settings import QueueSourceSettings, from_environment
from knative.queue_source.sink import Sink as SinkClient
from knative.queue_source.source import Source, open_until, pollers
from knative.queue_source.sqs import LONGEST_HOLD_S, SqsQueue, SqsResults
from knative.queue_source.threads import Threads
from tests.knative.queue_source.stage import Post, Reply, Sink, Sqs, at_work, settings, source_running, sqs_running
from tests.support import free_port, request, wait_until


@pytest.fixture(scope="module")
def sqs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sqs]:
    with sqs_running(tmp_path_factory.mktemp("sqs")) as server:
        yield server


@pytest.fixture(autouse=True)
def keys(sqs: Sqs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in sqs.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.close()


def made(asked: QueueSourceSettings, **more: Any) -> Source:
    messages = SqsQueue(asked.url, visibility_s=asked.visibility_s, wait_s=asked.wait_s, pollers=pollers(asked.concurrency))
    assert open_until(messages.open, asked.url, threading.Event(), Threads())
    return Source(asked, messages, SinkClient(asked.sink), **more)


@contextlib.contextmanager
def running_here(url: str, sink_url: str, *, claims: Claims | None = None, results: str = "", **more: str) -> Iterator[Source]:
    """A source in this process."""
    asked = from_environment(settings(url, sink_url, **{f"QUEUE_SOURCE_{name}": value for name, value in more.items()}))
    source = made(asked, claims=claims, results=SqsResults(results, connections=2) if results else None)
    with at_work(source):
        yield source


def value(source: Source, name: str) -> float:
    """A metric of its."""
    return next(float(line.split()[1]) for line in source.metrics.text().decode().splitlines() if line.startswith(f"queue_source_{name} "))


def receives(sqs: Sqs, ids: list[str]) -> set[int]:
    """How often these messages were received."""
    repeated = sqs.stats()["repeated"]
    return {repeated.get(one, 1) for one in ids}


def test_a_message_arrives_as_an_event_and_is_deleted(sqs: Sqs, sink: Sink) -> None:
    url = sqs.queue("plain", receives=3)
    attributes = {"Priority": {"DataType": "Number", "StringValue": "6"}, "blob": {"DataType": "Binary", "BinaryValue": b"\x00\xff"}}
    with running_here(url, sink.url):
        (sent,) = sqs.send(url, 1, MessageAttributes=attributes)
        sqs.wait_empty(url)
    (post,) = sink.posts
    told = {name: post.headers.get(f"ce-{name}") for name in ("id", "source", "type", "specversion", "priority", "blob")}
    assert told == {
        "id": sent,
        "source": "arn:aws:sqs:us-east-1:123456789012:plain",
        "type": "dev.relight.queue.message",
        "specversion": "1.0",
        "priority": "6",
        "blob": "AP8=",
    }
    assert post.headers["content-type"] == "application/json"
    assert post.headers["ce-time"].endswith("Z")


def test_a_busy_sink_is_asked_again_and_holds_what_may_be_held_and_no_message_is_received_twice(sqs: Sqs, sink: Sink) -> None:
    url = sqs.queue("busy", receives=1)
    sqs.control(watch="busy")
    room = threading.Semaphore(2)

    def answer(_: Post) -> Reply:
        if not room.acquire(blocking=False):
            return Reply(503, {"Retry-After": "0"})
        time.sleep(0.02)
        room.release()
        return Reply()

    sink.answer = answer
    ids = sqs.send(url, *range(25))
    with running_here(url, sink.url, CONCURRENCY="5", VISIBILITY_S="60") as source:
        sqs.wait_empty(url)
        assert value(source, "done_total") == 25
    assert receives(sqs, ids) == {1}
    assert sqs.left(sqs.queue("busy-dead")) == 0
    assert sqs.stats()["most_in_flight"] <= 5
    sqs.control(watch="")


def test_a_cold_start_longer_than_the_visibility_costs_no_second_receive(sqs: Sqs, sink: Sink) -> None:
    url = sqs.queue("cold", receives=1)
    sqs.control(watch="cold")
    is_up = threading.Event()
    sink.answer = lambda _: Reply() if is_up.wait(60) else Reply(500)
    ids = sqs.send(url, *range(12))
    with running_here(url, sink.url, VISIBILITY_S="6", CONCURRENCY="12"):
        # The visibility is renewed when a third of it has passed: after four times each it would have run out.
        wait_until("each was renewed four times", lambda: len(sqs.stats()["changes"]) >= 12 * 4)
        is_up.set()
        sqs.wait_empty(url)
    assert receives(sqs, ids) == {1}
    assert sorted(post.json()["n"] for post in sink.posts) == list(range(12))


def test_while_the_sink_is_away_messages_are_kept_and_nothing_is_pulled(sqs: Sqs) -> None:
    url = sqs.queue("away", receives=1)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen: a connection is refused
        port = nobody.getsockname()[1]
        ids = sqs.send(url, *range(6))
        with running_here(url, f"http://127.0.0.1:{port}/", CONCURRENCY="2") as source:
            wait_until("some tries", lambda: value(source, "retried_total") > 4)
            assert (value(source, "received_total"), value(source, "paused")) == (2, 1)
            nobody.listen()
            threading.Thread(target=forward, args=(nobody,), daemon=True).start()
            sqs.wait_empty(url)
    assert receives(sqs, ids) == {1}


def forward(listener: socket.socket) -> None:
    """Answer 204 to whatever comes."""
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        with peer, contextlib.suppress(OSError):
            peer.recv(65536)
            peer.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")


def test_what_fails_comes_back_with_the_same_id_until_it_succeeds(sqs: Sqs, sink: Sink) -> None:
    url = sqs.queue("failing", receives=9)
    statuses = iter([500, 404, 409, 200])
    sink.answer = lambda _: Reply(next(statuses))
    with running_here(url, sink.url) as source:
        (sent,) = sqs.send(url, 1)
        sqs.wait_empty(url)
        assert value(source, "given_back_total") == 3
    assert [post.id for post in sink.posts] == [sent] * 4


def test_what_fails_again_comes_back_later_each_time(sqs: Sqs, sink: Sink) -> None:
    url = sqs.queue("later", receives=9)
    sqs.control(watch="later")
    times: list[float] = []

    def answer(_: Post) -> Reply:
        times.append(time.monotonic())
        return Reply(500 if len(times) < 3 else 200)

    sink.answer = answer
    with running_here(url, sink.url, VISIBILITY_S="60", BACKOFF_S="1", BACKOFF_MAX_S="300"):
        sqs.send(url, 1)
        sqs.wait_empty(url)
    assert sqs.stats()["changes"] == [1, 2]  # half of 1 and of 2 seconds by chance, in whole ones
    first, second, third = times
    assert second - first > 0.9
    assert third - second > 1.9


@pytest.mark.parametrize("asked", ["seconds", "a date"])
def test_a_busy_sink_is_left_alone_for_as_long_as_it_asks(sqs: Sqs, sink: Sink, asked: str) -> None:
    url = sqs.queue(f"asked-{asked[-4:]}", receives=1)
    times: list[float] = []

    def answer(_: Post) -> Reply:
        times.append(time.monotonic())
        return (
            Reply(429, {"Retry-After": "1" if asked == "seconds" else formatdate(time.time() + 2, usegmt=True)})
            if len(times) == 1
            else Reply()
        )

    sink.answer = answer
    ids = sqs.send(url, 1)
    with running_here(url, sink.url, CONCURRENCY="2") as source:
        wait_until("the refusal", lambda: value(source, "retried_total"))
        ids += sqs.send(url, 2)
        wait_until("the second post", lambda: len(times) > 1)
        assert times[1] - times[0] >= 1
        sqs.wait_empty(url)
    assert receives(sqs, ids) == {1}
    assert len(times) == 3


def test_a_heartbeat_asks_for_no_more_than_sqs_allows(sqs: Sqs) -> None:
    url = sqs.queue("allowed")
    sqs.control(watch="allowed")
    messages = SqsQueue(url, visibility_s=30, wait_s=1, pollers=1)
    messages.open()
    sqs.send(url, 1)
    (found,) = messages.receive(1, 1)
    for age_s in (0.0, LONGEST_HOLD_S - 10):
        messages.extend([replace(found, received=found.received - age_s)])
    messages.close()
    first, last = sqs.stats()["changes"]
    assert first == 30
    assert 0 < last <= 5


def test_what_is_held_for_as_long_as_the_queue_allows_is_given_back_and_still_done_once(
    sqs: Sqs, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SqsQueue, "longest_hold_s", 2.0)
    url = sqs.queue("held", receives=9)
    go = threading.Event()
    sink.answer = lambda _: Reply() if go.wait(60) else Reply(500)
    sqs.send(url, 1)
    with running_here(url, sink.url, VISIBILITY_S="3600") as source:
        wait_until("it is received again", lambda: value(source, "repeated_total"))
        go.set()
        sqs.wait_empty(url)
        assert value(source, "lost_total") >= 1
    assert len(sink.posts) == 1


def test_poison_goes_to_the_dead_letter_queue_and_nothing_else_does(sqs: Sqs, sink: Sink) -> None:
    url = sqs.queue("poisoned", receives=2)
    sink.answer = lambda post: Reply(422 if post.json()["n"] == "poison" else 200)
    with running_here(url, sink.url):
        sqs.send(url, 1, "poison", 2)
        (parked,) = sqs.take(sqs.queue("poisoned-dead"))
        sqs.wait_empty(url)
    assert json.loads(parked["Body"]) == {"n": "poison"}
    assert len(sink.of("poison")) == 2


def test_an_answer_that_takes_too_long_is_a_failure_of_that_message(sqs: Sqs, sink: Sink) -> None:
    url = sqs.queue("hung", receives=2)
    over = threading.Event()
    sink.answer = lambda post: (post.json()["n"] == "hang" and over.wait(30) and False) or Reply()
    with running_here(url, sink.url, TIMEOUT_S="1"):
        sqs.send(url, "hang", 1)
        (parked,) = sqs.take(sqs.queue("hung-dead"))
    over.set()
    assert json.loads(parked["Body"]) == {"n": "hang"}


def test_a_fifo_queues_groups_are_done_in_order_and_a_failure_costs_those_behind_it_nothing(sqs: Sqs, sink: Sink) -> None:
    url = sqs.queue("ordered.fifo", receives=9)
    failed: set[Any] = set()

    def answer(post: Post) -> Reply:
        number = post.json()["n"]
        if number in (2, 11) and number not in failed:
            failed.add(number)
            return Reply(500)
        return Reply()

    sink.answer = answer
    ids = []
    for number in range(6):
        for group, at in (("a", 0), ("b", 10)):
            ids += sqs.send(url, at + number, MessageGroupId=group, MessageDeduplicationId=str(at + number))
    with running_here(url, sink.url):
        sqs.wait_empty(url)
    numbers = [post.json()["n"] for post in sink.posts]
    assert [n for n in numbers if n < 10] == [0, 1, 2, 2, 3, 4, 5]
    assert [n for n in numbers if n >= 10] == [10, 11, 11, 12, 13, 14, 15]
    assert {post.headers["ce-partitionkey"] for post in sink.posts} == {"a", "b"}
    assert receives(sqs, [one for one in ids if one not in (ids[4], ids[3])]) == {1}


EVENT = {"ce-specversion": "1.0", "ce-source": "/models/m", "ce-type": "t.response", "Content-Type": "application/json"}


def test_replies_go_to_the_results_queue_and_nothing_is_deleted_before(sqs: Sqs, sink: Sink) -> None:
    url, results = sqs.queue("asked", receives=5), f"{sqs.address}/123456789012/answered.fifo"
    sink.answer = lambda post: Reply(200, {**EVENT, "ce-id": f"r-{post.json()['n']}", "ce-causationid": post.id}, post.body)
    with running_here(url, sink.url, results=results):
        sent = sqs.send(url, 1, 2)
        wait_until("both answers", lambda: len(sink.posts) == 2)
        assert sqs.left(url) == 2  # there is no results queue yet
        sqs.queue("answered.fifo")
        sqs.wait_empty(url)
    found = {event["id"]: event for event in (json.loads(one["Body"]) for one in sqs.take(results, 2))}
    assert {name: (event["causationid"], event["data"]) for name, event in found.items()} == {
        "r-1": (sent[0], {"n": 1}),
        "r-2": (sent[1], {"n": 2}),
    }


def test_a_reply_is_sent_on_in_its_requests_trace(sqs: Sqs, sink: Sink) -> None:
    url, results = sqs.queue("traced"), sqs.queue("traced-results")
    trace = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01", "tracestate": "a=b"}
    sink.answer = lambda post: Reply(200, {**EVENT, "ce-id": "r"}, post.body)
    with running_here(url, sink.url, results=results):
        sqs.send(url, 1, MessageAttributes={name: {"DataType": "String", "StringValue": value} for name, value in trace.items()})
        (found,) = sqs.take(results)
    assert {name: said["StringValue"] for name, said in found["MessageAttributes"].items()} == trace
    assert {name: sink.posts[0].headers[name] for name in trace} == trace


def test_a_claim_check_is_resolved_if_its_bucket_is_allowed_and_its_object_is_not_too_large(sqs: Sqs, sink: Sink) -> None:
    url = sqs.queue("claims", receives=1)
    store = boto3.client("s3")
    for bucket in ("good", "other"):
        store.create_bucket(Bucket=bucket)
    store.put_object(Bucket="good", Key="a b.json", Body=b'{"n": 1}', ContentType="application/x-special+json")
    store.put_object(Bucket="good", Key="large", Body=b"x" * 101)
    refused = ("s3://other/x", "s3://good/large", "s3://good/nowhere")
    with running_here(url, sink.url, claims=Claims(store, frozenset({"good"}), 100)):
        for body in ("s3://good/a b.json", *refused):
            sqs.client.send_message(QueueUrl=url, MessageBody=body)
        parked = sqs.take(sqs.queue("claims-dead"), 3)
    store.close()
    (post,) = sink.posts
    assert (post.body, post.headers["content-type"], post.headers["ce-dataref"]) == (
        b'{"n": 1}',
        "application/x-special+json",
        "s3://good/a%20b.json",
    )
    assert {one["Body"] for one in parked} == set(refused)


def test_calls_of_the_queue_that_fail_or_whose_answers_are_lost_repeat_nothing(sqs: Sqs, sink: Sink) -> None:
    url = sqs.queue("shaky", receives=5)
    sqs.send(url, *range(60))
    sqs.control(throttle=0.15, error=0.1)
    try:
        with running_here(url, sink.url):
            wait_until("all", lambda: len({post.id for post in sink.posts}) == 60)
            sqs.control(throttle=0.0, error=0.0)
            sqs.wait_empty(url)
    finally:
        sqs.control(throttle=0.0, error=0.0)
    assert len(sink.posts) == 60


def test_on_sigterm_it_finishes_what_runs_gives_back_the_rest_and_tells_until_then_how_it_is(sqs: Sqs, sink: Sink, tmp_path: Path) -> None:
    url = sqs.queue("stopped")
    begun, go = threading.Semaphore(0), threading.Event()

    def answer(post: Post) -> Reply:
        begun.release()
        if post.json()["n"] == "busy":
            return Reply(503, {"Retry-After": "600"})
        go.wait(30)
        return Reply()

    sink.answer = answer
    port = free_port()
    with source_running(tmp_path, settings(url, sink.url, QUEUE_SOURCE_VISIBILITY_S="60") | sqs.env, port=port) as source:
        source.ready()
        sqs.send(url, "work")
        assert begun.acquire(timeout=30)
        sqs.send(url, "busy")
        assert begun.acquire(timeout=30)
        metrics = request(port, "GET", "/metrics").body
        assert b"queue_source_held 2.0" in metrics
        assert (request(port, "GET", "/healthz").status, request(port, "GET", "/nowhere").status) == (200, 404)
        source.signal(signal.SIGTERM)
        wait_until("it says so", lambda: "stopping" in source.said())
        go.set()
        assert source.wait() == 0, source.said()
        assert "no redrive policy" in source.said()
    (left,) = sqs.take(url)  # at once, and not when its visibility runs out
    assert json.loads(left["Body"]) == {"n": "busy"}


def test_wrappings_are_taken_off_as_its_environment_says_and_what_s3_sends_to_try_the_queue_is_deleted(
    sqs: Sqs, sink: Sink, tmp_path: Path
) -> None:
    url = sqs.queue("wrapped", receives=1)
    record = {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "photos"}, "object": {"key": "a+b.jpg", "size": 3}}}
    with source_running(tmp_path, settings(url, sink.url, QUEUE_SOURCE_UNWRAP="sns,s3") | sqs.env):
        for inner in ({"Service": "Amazon S3", "Event": "s3:TestEvent"}, {"Records": [record]}):
            sqs.client.send_message(QueueUrl=url, MessageBody=json.dumps({"Type": "Notification", "Message": json.dumps(inner)}))
        sqs.send(url, "bare")
        (parked,) = sqs.take(sqs.queue("wrapped-dead"))
        sqs.wait_empty(url)
    assert json.loads(parked["Body"]) == {"n": "bare"}
    (post,) = sink.posts
    assert post.json() == {"uri": "s3://photos/a b.jpg", "bucket": "photos", "key": "a b.jpg", "event": "ObjectCreated:Put", "size": 3}
    assert post.headers["ce-subject"] == "a%20b.jpg"


def test_claim_checks_are_resolved_as_its_environment_says(sqs: Sqs, sink: Sink, tmp_path: Path) -> None:
    url = sqs.queue("claimed", receives=1)
    store = boto3.client("s3")
    for bucket in ("ours", "ours-too", "theirs"):
        store.create_bucket(Bucket=bucket)
        store.put_object(Bucket=bucket, Key="x", Body=b"0123456789")
    store.put_object(Bucket="ours", Key="large", Body=b"01234567890")
    store.close()
    allowed = {"QUEUE_SOURCE_CLAIM_BUCKETS": "ours, ours-too", "QUEUE_SOURCE_CLAIM_MAX_BYTES": "10"}
    with source_running(tmp_path, settings(url, sink.url, **allowed) | sqs.env):
        for body in ("s3://ours/x", "s3://ours-too/x", "s3://theirs/x", "s3://ours/large"):
            sqs.client.send_message(QueueUrl=url, MessageBody=body)
        parked = sqs.take(sqs.queue("claimed-dead"), 2)
        sqs.wait_empty(url)
    assert {one["Body"] for one in parked} == {"s3://theirs/x", "s3://ours/large"}
    assert {(post.headers["ce-dataref"], post.body) for post in sink.posts} == {
        ("s3://ours/x", b"0123456789"),
        ("s3://ours-too/x", b"0123456789"),
    }


def test_a_source_that_was_suspended_goes_on(sqs: Sqs, sink: Sink, tmp_path: Path) -> None:
    url = sqs.queue("suspended")
    with source_running(tmp_path, settings(url, sink.url) | sqs.env, port=free_port()) as source:
        source.ready()
        for number in range(3):
            source.signal(signal.SIGSTOP)
            time.sleep(1.2)  # longer than any wait of its main thread
            source.signal(signal.SIGCONT)
            sqs.send(url, number)
            wait_until("it is posted", lambda: len(sink.posts) == number + 1)  # noqa: B023  called within the turn
        sqs.wait_empty(url)
        assert "stopping" not in source.said()
        source.signal(signal.SIGTERM)
        assert source.wait() == 0, source.said()


def test_a_queue_that_is_not_there_or_a_setting_that_cannot_be_ends_the_start_in_one_line(sqs: Sqs, tmp_path: Path) -> None:
    for env, words in (
        (settings(f"{sqs.address}/123456789012/nowhere", "http://127.0.0.1:1/"), "there is no such queue"),
        ({"QUEUE_SOURCE_URL": "https://sqs.x/1/q"}, "K_SINK is not set"),
    ):
        with source_running(tmp_path, env | sqs.env) as source:
            assert source.wait() == 1
            assert words in source.said()
            assert "Traceback" not in source.said()
