"""The queue source's parts that decide: settings, verdicts, events, wrappings, claims, replies, and what is held."""

import json
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from knative.queue_source import event, results, unwrap, verdict
from knative.queue_source.claim import reference
from knative.queue_source.errors import ResultRefused, Unacceptable
from knative.queue_source.holding import Holding, Lease
from knative.queue_source.queue import Message
from knative.queue_source.settings import address, from_environment
from knative.queue_source.settler import Settler
from knative.queue_source.sqs import arn_of, client, traceparent
from knative.queue_source.verdict import Verdict
from knative.queue_source.workers import Workers
from weights_cache.environment import SettingsError

NEEDED = {"QUEUE_SOURCE_URL": "https://sqs.eu-west-1.amazonaws.com/1/work", "K_SINK": "http://minilm.default.svc.cluster.local"}


def message(body: str = "{}", **more: Any) -> Message:
    return Message(key="k", id="m-1", body=body.encode(), receives=more.pop("receives", 1), handle="h", **more)


def made(given: Message, **more: Any) -> event.Event:
    return event.make(given, source="arn:q", type="t", extensions=more.pop("extensions", {}), data=given.body, **more)


# Settings


def test_the_defaults_are_enough() -> None:
    settings = from_environment(NEEDED)
    assert (settings.visibility_s, settings.concurrency, settings.buckets, settings.extensions) == (30, 10, frozenset(), {})


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        pytest.param({"K_SINK": ""}, "K_SINK is not set", id="no sink"),
        pytest.param({"QUEUE_SOURCE_URL": ""}, "QUEUE_SOURCE_URL is not set", id="no queue"),
        pytest.param({"K_SINK": "minilm"}, "K_SINK='minilm': must be a URL", id="a sink that is no URL"),
        pytest.param({"QUEUE_SOURCE_URL": "sqs://x/y"}, "QUEUE_SOURCE_URL='sqs://x/y': must be a URL", id="a queue of another kind"),
        pytest.param({"QUEUE_SOURCE_URL": "https://sqs.x/"}, "and a queue's name", id="no queue in the URL"),
        pytest.param({"QUEUE_SOURCE_VISIBILITY_S": "1"}, "QUEUE_SOURCE_VISIBILITY_S='1': must be at least 3", id="too short"),
        pytest.param({"QUEUE_SOURCE_VISIBILITY_S": "43201"}, "at most 43200", id="longer than SQS allows"),
        pytest.param({"QUEUE_SOURCE_CONCURENCY": "8"}, "did you mean QUEUE_SOURCE_CONCURRENCY", id="misspelt"),
        pytest.param({"QUEUE_SOURCE_UNWRAP": "s3,sns"}, "must be one of none, s3, sns, sns,s3", id="the wrong order"),
        pytest.param({"QUEUE_SOURCE_CLAIM_BUCKETS": "good,Bad_One"}, "'Bad_One' is no bucket's name", id="no bucket"),
        pytest.param({"QUEUE_SOURCE_RESULTS_URL": NEEDED["QUEUE_SOURCE_URL"]}, "for ever", id="results into the queue itself"),
        pytest.param({"QUEUE_SOURCE_BACKOFF_S": "400"}, "must be at least QUEUE_SOURCE_BACKOFF_S", id="bounds that cross"),
        pytest.param({"K_CE_OVERRIDES": "[]"}, "K_CE_OVERRIDES", id="overrides that are none"),
        pytest.param({"K_CE_OVERRIDES": '{"extensions": {"a-b": "c"}}'}, "'a-b' is no extension's name", id="an impossible extension"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_its_bound(environ: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        from_environment({**NEEDED, **environ})
    assert words in str(caught.value)


def test_a_password_is_not_told() -> None:
    with pytest.raises(SettingsError) as caught:
        from_environment({**NEEDED, "QUEUE_SOURCE_URL": "ampq://user:secret@rabbit/vhost/queue"})
    assert "rabbit" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "password", ["hunter2", "hun#ter2", "hun?ter2", "12?hunter2", "hun ter2", "hun/ter2", "hun@ter2", "hun[ter2", "hunter2\n"]
)
@pytest.mark.parametrize("name", ["QUEUE_SOURCE_URL", "K_SINK", "QUEUE_SOURCE_RESULTS_URL"])
def test_whatever_signs_a_password_has_no_error_tells_a_part_of_it(name: str, password: str) -> None:
    with pytest.raises(SettingsError) as caught:
        from_environment({**NEEDED, name: f"xmpp://user:{password}@rabbit/vhost/queue"})
    assert name in str(caught.value)
    assert not {"hun", "ter2", "user"} & set(re.findall("[a-z0-9]+", str(caught.value)))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:pass@sink:80/a?code=key", "http://sink:80/a?…"),
        ("amqp://host/vhost/queue", "amqp://host/vhost/queue"),
        ("https://sqs.eu-west-1.amazonaws.com/1/work", "https://sqs.eu-west-1.amazonaws.com/1/work"),
    ],
)
def test_the_log_tells_of_a_url_where_it_leads_to(url: str, shown: str) -> None:
    assert address(url) == shown


# Verdicts


@pytest.mark.parametrize(
    ("statuses", "wanted"),
    [
        ((200, 202, 204), Verdict.DONE),
        ((429, 503), Verdict.BUSY),
        ((404, 408, 409, 500, 502, 504, 302), Verdict.FAILED),
        ((400, 401, 413, 415, 422), Verdict.POISON),
    ],
)
def test_what_a_status_means(statuses: tuple[int, ...], wanted: Verdict) -> None:
    assert {verdict.of_status(status) for status in statuses} == {wanted}


@pytest.mark.parametrize(
    ("value", "date", "wanted"),
    [
        (None, None, None),
        ("7", None, 7.0),
        ("soon", None, None),
        ("-1", None, None),
        ("999999", None, verdict.LONGEST_RETRY_AFTER_S),
        ("Thu, 01 Jan 1970 00:01:40 GMT", "Thu, 01 Jan 1970 00:01:30 GMT", 10.0),  # the sink's own clock
        ("Thu, 01 Jan 1970 00:01:40 GMT", None, 60.0),
        ("Thu, 01 Jan 1970 00:00:01 GMT", None, 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, date: str | None, wanted: float | None) -> None:
    assert verdict.retry_after_s(value, date, now=40.0) == wanted


def test_delays_double_up_to_their_bound() -> None:
    def least(low: float, _: float) -> float:
        return low

    assert [verdict.backoff_s(receives, 1, 10, least) for receives in (1, 2, 3, 4, 5, 1000)] == [0.5, 1, 2, 4, 5, 5]
    assert [round(verdict.pause_s(tries, None, least), 2) for tries in (1, 2, 3, 100)] == [0.08, 0.16, 0.32, 8.0]
    assert verdict.pause_s(1, 3.0, least) == 3.0


# Events


def test_an_event_has_what_the_message_has() -> None:
    found = made(message('{"n": 1}', sent=1.5, group="g", sequence="7"), subject="s")
    wanted = {"specversion": "1.0", "id": "m-1", "source": "arn:q", "type": "t", "time": "1970-01-01T00:00:01.500Z"}
    assert found.attributes == wanted | {"subject": "s", "partitionkey": "g", "sequence": "7"}
    assert (found.content_type, found.data) == ("application/json", b'{"n": 1}')


def test_attributes_become_extensions_by_the_letters_and_digits_of_their_names() -> None:
    attributes = {
        "Priority": "6",
        "trace-id": "t",
        "Trace_Id": "first",
        "ID": "not",
        "source": "not",
        "time": "not",
        "data": "not",
        "--": "x",
    }
    found = made(message(attributes=attributes | {"type": "special", "subject": "what", "empty": ""})).attributes
    assert found == {
        "specversion": "1.0",
        "id": "m-1",
        "source": "arn:q",
        "type": "special",
        "subject": "what",
        "priority": "6",
        "traceid": "first",
    }


def test_overrides_have_the_last_word() -> None:
    assert made(message(attributes={"team": "a"}), extensions={"team": "b"}).attributes["team"] == "b"


def test_header_values_are_percent_encoded_and_the_trace_is_an_http_servers_too() -> None:
    headers = made(message(attributes={"who": 'Zoë "Z" 100%\n', "traceparent": "00-a-b-01", "Content-Type": "text/csv"})).headers()
    assert headers["ce-who"] == "Zo%C3%AB%20%22Z%22%20100%25"
    assert headers["traceparent"] == headers["ce-traceparent"] == "00-a-b-01"
    assert headers["Content-Type"] == "text/csv"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'{"a": 1}', "application/json"),
        (b"12", "application/json"),
        (b"a man", "text/plain; charset=utf-8"),
        (b"", "text/plain; charset=utf-8"),
        (b"\xff\x00", "application/octet-stream"),
        (b"[" * 100_000, "text/plain; charset=utf-8"),
    ],
)
def test_the_content_type_is_seen(data: bytes, kind: str) -> None:
    assert event.detect(data) == kind


def test_an_x_ray_header_becomes_a_trace_context() -> None:
    header = "Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8;Sampled=1"
    assert traceparent(header) == "00-5759e988bd862e3fe1be46a994272793-53995c3f42cd8ad8-01"
    assert traceparent("Root=1-5759e988-bd862e3fe1be46a994272793") is None


# Wrappings


def content(document: Any, **attributes: str) -> unwrap.Content:
    return unwrap.Content(json.dumps(document).encode(), attributes)


RECORD = {
    "eventName": "ObjectCreated:Put",
    "s3": {"bucket": {"name": "photos"}, "object": {"key": "a+b/%C3%BC.jpg", "size": 3, "eTag": "e"}},
}


def test_an_sns_envelope_is_taken_off_with_its_attributes() -> None:
    envelope = {
        "Type": "Notification",
        "Message": "hello",
        "Subject": "greeting",
        "MessageAttributes": {"who": {"Type": "String", "Value": "me"}},
    }
    found = unwrap.unwrap(content(envelope, team="a"), ("sns",))
    assert (found.data, found.attributes, found.subject) == (b"hello", {"team": "a", "who": "me"}, "greeting")


def test_an_s3_notification_in_an_sns_envelope_becomes_the_object() -> None:
    envelope = {"Type": "Notification", "Message": json.dumps({"Records": [RECORD]})}
    found = unwrap.unwrap(content(envelope), ("sns", "s3"))
    wanted = {"uri": "s3://photos/a b/ü.jpg", "bucket": "photos", "key": "a b/ü.jpg", "event": "ObjectCreated:Put", "size": 3, "etag": "e"}
    assert json.loads(found.data) == wanted
    assert found.subject == "a b/ü.jpg"


def test_several_records_are_several_inputs_of_one_event() -> None:
    assert len(json.loads(unwrap.unwrap(content({"Records": [RECORD, RECORD]}), ("s3",)).data)["instances"]) == 2


def test_what_s3_sends_to_try_the_queue_is_nobodys_work() -> None:
    assert unwrap.unwrap(content({"Service": "Amazon S3", "Event": "s3:TestEvent"}), ("s3",)).is_test


@pytest.mark.parametrize(("document", "layer"), [({"a": 1}, "sns"), ([], "sns"), ({"a": 1}, "s3"), ({"Records": []}, "s3")])
def test_what_is_not_wrapped_as_it_should_is_poison(document: Any, layer: str) -> None:
    with pytest.raises(Unacceptable):
        unwrap.unwrap(content(document), (layer,))


# Claims and replies


@pytest.mark.parametrize(
    ("body", "attributes", "wanted"),
    [
        ("s3://bucket/key.bin\n", {}, "s3://bucket/key.bin"),
        ("{}", {"dataref": "s3://bucket/x"}, "s3://bucket/x"),
        ('["software.amazon.payloadoffloading.PayloadS3Pointer",{"s3BucketName":"b","s3Key":"k"}]', {}, "s3://b/k"),
        ('["something.else",{"s3BucketName":"b","s3Key":"k"}]', {}, None),
        ("look at s3://bucket/key", {}, None),
        ("s3://bucket/a\ns3://bucket/b", {}, None),
        ("{}", {"dataref": "http://elsewhere/x"}, None),
    ],
)
def test_what_is_a_reference(body: str, attributes: dict[str, str], wanted: str | None) -> None:
    assert reference(body.encode(), attributes) == wanted


def test_a_reply_becomes_one_event_in_json() -> None:
    headers = {"ce-specversion": "1.0", "ce-id": "r", "ce-source": "/s", "ce-type": "t.response", "ce-who": "Zo%C3%AB"}
    found = json.loads(results.reply_event({**headers, "content-type": "application/json"}, b"[1]") or b"")
    assert found == {
        "specversion": "1.0",
        "id": "r",
        "source": "/s",
        "type": "t.response",
        "who": "Zoë",
        "datacontenttype": "application/json",
        "data": [1],
    }
    assert json.loads(results.reply_event({**headers, "content-type": "image/png"}, b"\x00") or b"")["data_base64"] == "AA=="
    assert results.reply_event({"content-type": "application/cloudevents+json; charset=utf-8"}, b"{}") == b"{}"
    assert results.reply_event({"content-type": "application/json"}, b"{}") is None
    with pytest.raises(ResultRefused, match="lacks source and type"):
        results.reply_event({"ce-specversion": "1.0", "ce-id": "r"}, b"")


# Where SQS is


@pytest.mark.parametrize(
    ("url", "endpoint", "region"),
    [
        ("https://sqs.eu-west-1.amazonaws.com/1/work", "https://sqs.eu-west-1.amazonaws.com", "eu-west-1"),
        ("http://127.0.0.1:4566/000000000000/work", "http://127.0.0.1:4566", "us-east-1"),
    ],
)
def test_the_service_is_found_by_the_queues_url(url: str, endpoint: str, region: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    found = client(url, connections=1, read_timeout_s=1)
    assert (found.meta.endpoint_url, found.meta.region_name) == (endpoint, region)


def test_the_arn_follows_from_the_url() -> None:
    assert arn_of("https://sqs.eu-west-1.amazonaws.com/123/work", "eu-west-1", "aws") == "arn:aws:sqs:eu-west-1:123:work"


# What is held


def test_room_is_what_is_not_held() -> None:
    holding = Holding(3, 30)
    assert holding.take_room(10) == 3
    holding.give_room(1)
    held = [added[0] for key in "ab" if (added := holding.add(Message(key, key, b"", 1, "h")))]
    assert holding.take_room(10) == 1
    holding.remove(held, done=True)
    assert holding.take_room(10) == 2


def test_a_second_delivery_of_what_is_held_replaces_the_first() -> None:
    holding = Holding(2, 30)
    assert holding.take_room(2) == 2
    first, second = Message("a", "a", b"", 1, "old"), Message("a", "a", b"", 2, "new")
    held = (holding.add(first) or (None,))[0]
    assert held
    holding.lose(held)
    assert holding.add(second) == (held, False)
    assert (held.message.handle, held.lease) == ("new", Lease.KEPT)
    assert holding.take_room(2) == 1


def test_a_delivery_of_what_was_just_done_is_told_apart_and_of_what_is_being_given_back_is_new() -> None:
    holding = Holding(2, 30)
    holding.take_room(2)
    done, returned = (added[0] for key in "ab" if (added := holding.add(Message(key, key, b"", 1, "h"))))
    holding.remove([done], done=True)
    returned.lease = Lease.RELEASING
    holding.take_room(1)
    assert holding.add(Message("a", "a", b"", 2, "h")) is None
    again = holding.add(Message("b", "b", b"", 2, "h"))
    assert again
    assert again[1]
    holding.remove([returned])
    assert holding.all() == [again[0]]


def test_pollers_go_on_when_what_was_turned_away_is_given_back() -> None:
    holding = Holding(30, 30)
    holding.take_room(10)
    held = [added[0] for key in range(10) if (added := holding.add(Message(str(key), "m", b"", 1, "h")))]
    holding.turned_away(held[0], 0.0)
    found: list[int] = []
    poller = threading.Thread(target=lambda: found.append(holding.take_room(10)), daemon=True)
    poller.start()
    holding.remove([held[1]])
    poller.join(0.1)
    assert not found
    holding.remove([held[0]])
    poller.join(30)
    assert found == [10]


# Threads and batches


def test_a_crowd_of_items_is_worked_on_at_once_and_no_more_than_the_limit() -> None:
    entered, over = threading.Semaphore(0), threading.Event()

    def work(_: int) -> None:
        entered.release()
        over.wait(30)

    threads: list[str] = []

    def spawn(name: str, run: Callable[[], None]) -> None:
        threads.append(name)
        threading.Thread(target=run, daemon=True).start()

    workers = Workers(work, limit=3, spawn=spawn)
    workers.put([1, 2, 3, 4, 5])
    for _ in range(3):
        assert entered.acquire(timeout=30)
    assert not entered.acquire(timeout=0.05)
    over.set()
    for _ in range(2):
        assert entered.acquire(timeout=30)
    assert threads == ["work"] * 3


def test_one_item_is_settled_at_once_and_what_comes_meanwhile_does_not_wait_for_a_call_that_takes_long() -> None:
    batches: list[list[int]] = []
    entered, go = threading.Semaphore(0), threading.Event()

    def settle(batch: Sequence[int]) -> Sequence[int]:
        batches.append(list(batch))
        again = [item for item in batch if item == 5 and len(batches) == 2]  # that one is to be tried again
        entered.release()
        if batch[0] == 0:
            go.wait(30)
        return again

    settler = Settler[int]("test", settle, threads=2)
    settler.start(lambda _, run: threading.Thread(target=run, daemon=True).start())
    settler.put([0])
    assert entered.acquire(timeout=30)
    settler.put(range(1, 10))  # fewer than are worth a call of their own
    for _ in range(2):  # and 5 once more
        assert entered.acquire(timeout=30)
    settler.put(range(10, 25))
    for _ in range(2):
        assert entered.acquire(timeout=30)
    assert batches == [[0], list(range(1, 10)), [5], list(range(10, 20)), list(range(20, 25))]
    go.set()
