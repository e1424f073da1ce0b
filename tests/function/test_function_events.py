"""CloudEvents at the function's own URL: a real server, and the CloudEvents SDK as the client that knows the specification."""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.bindings import http
from cloudevents.core.v1.event import CloudEvent
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from function.protocols.cloudevents import own_source
from tests.support import BIN, Reply, Server, clean_environment, free_port, request, running

AGENT = """
import os, time
from function.agent import BadInput

class Probe:
    def load(self, weights, device):
        self.calls = []

    def predict(self, inputs):
        if inputs == ["calls"]:  # what was asked since the last time
            calls, self.calls = self.calls, []
            return [calls]
        self.calls.append([repr(item) for item in inputs])
        outputs = []
        for item in inputs:
            if item == "bad":
                raise BadInput("'bad' is not a word")
            if item == "crash":
                raise RuntimeError("secret detail")
            while isinstance(item, dict) and "hold" in item and not os.path.exists(item["hold"]):
                time.sleep(0.005)
            if item == "picture":
                outputs.append(bytes([0, 255]))
            elif isinstance(item, bytes):
                outputs.append({"bytes": item.hex()})
            else:
                outputs.append({"got": item})
        return outputs
"""
REQUIRED = {"specversion": "1.0", "id": "e1", "source": "/t", "type": "relight.test"}
STRUCTURED, BATCH = "application/cloudevents+json", "application/cloudevents-batch+json"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("events")
    (folder / "probe_agent.py").write_text(AGENT)
    port = free_port()
    env = clean_environment(
        PYTHONPATH=str(folder),
        PORT=str(port),
        FUNCTION_HOST="127.0.0.1",
        FUNCTION_AGENT="probe_agent:Probe",
        FUNCTION_MODEL_NAME="m",
        FUNCTION_MAX_BATCH="8",
        FUNCTION_MAX_INPUTS="40",
        FUNCTION_MAX_BODY_BYTES="20000",
        FUNCTION_EVENT_MEMORY="0",  # most events here have the same id; test_function_event_memory.py has it
        K_SERVICE="hello",
    )
    with running([str(BIN / "python"), "-m", "function"], folder / "log", env, port) as found:
        yield found.ready()


def binary(server: Server, body: bytes = b"", kind: str | None = None, **attributes: str | None) -> Reply:
    """Post a binary event; an attribute of None is left away."""
    headers = {f"ce-{name}": value for name, value in (REQUIRED | attributes).items() if value is not None}
    return request(server.port, "POST", "/", body, headers | ({"Content-Type": kind} if kind else {}))


def structured(server: Server, document: Any, headers: Mapping[str, str] | None = None, kind: str = STRUCTURED) -> Reply:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return request(server.port, "POST", "/", body, {"Content-Type": kind} | dict(headers or {}))


def batch(server: Server, *events: Any, **headers: str) -> Reply:
    """Post a batch; what is no event is the data of one."""
    full = [event if is_event(event) else {**REQUIRED, "id": f"e{n}", "data": event} for n, event in enumerate(events)]
    return structured(server, full, {name.replace("_", "-"): value for name, value in headers.items()}, BATCH)


def is_event(event: Any) -> bool:
    return isinstance(event, dict) and "type" in event


def calls(server: Server) -> list[list[str]]:
    """What the agent was asked since the last time, as `repr` has it."""
    found: list[list[str]] = request(server.port, "POST", "/", "calls").json()
    return found


def said(reply: Reply, status: int) -> str:
    """The message of an error of ours."""
    assert reply.status == status, reply.body
    message: str = reply.json()["error"]["message"]
    return message


# The three modes, as the SDK speaks them


def test_a_binary_event_of_the_sdk_is_answered_with_a_binary_event_that_it_understands(server: Server) -> None:
    attributes = {"type": "relight.test", "source": "/t", "subject": "größe 1%", "datacontenttype": "application/json"}
    event = CloudEvent(attributes, {"text": "ä"})
    sent = http.to_binary_event(event)
    found = request(server.port, "POST", "/", sent.body, sent.headers)
    reply = http.from_binary_event(http.HTTPMessage(dict(found.headers), found.body))
    assert found.status == 200
    assert (reply.get_type(), reply.get_source(), reply.get_subject()) == ("relight.test.response", "/services/hello/models/m", "größe 1%")
    assert (reply.get_specversion(), reply.get_datacontenttype()) == ("1.0", "application/json")
    assert reply.get_extension("causationid") == event.get_id()
    assert reply.get_data() == {"got": {"text": "ä"}}
    assert abs((reply.get_time() or datetime.min.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds() < 60


def test_a_structured_event_of_the_sdk_is_answered_with_a_structured_event_that_it_understands(server: Server) -> None:
    event = CloudEvent({"type": "relight.test", "source": "/t", "subject": "größe 1%"}, {"instances": ["a", "b"]})
    sent = http.to_structured_event(event)
    found = request(server.port, "POST", "/", sent.body, sent.headers)
    assert (found.status, found.headers["content-type"]) == (200, STRUCTURED)
    assert not any(name.startswith("ce-") for name in found.headers)
    reply = http.from_structured_event(http.HTTPMessage(dict(found.headers), found.body))
    assert (reply.get_type(), reply.get_subject(), reply.get_extension("causationid")) == (
        "relight.test.response",
        "größe 1%",
        event.get_id(),
    )
    assert reply.get_data() == {"predictions": [{"got": "a"}, {"got": "b"}]}


def test_a_batch_of_the_sdks_events_is_answered_with_a_batch_in_the_same_order(server: Server) -> None:
    events = [CloudEvent({"type": f"t{n}", "source": "/t", "id": str(n)}, {"n": n}) for n in range(20)]
    calls(server)
    found = structured(server, [json.loads(http.to_structured_event(event).body) for event in events], kind=BATCH + "; charset=UTF-8")
    assert (found.status, found.headers["content-type"]) == (200, BATCH)
    replies = [http.from_structured_event(http.HTTPMessage({}, json.dumps(reply).encode())) for reply in found.json()]
    assert [(reply.get_type(), reply.get_data()) for reply in replies] == [(f"t{n}.response", {"got": {"n": n}}) for n in range(20)]
    assert [len(call) for call in calls(server)] == [8, 8, 4]  # FUNCTION_MAX_BATCH


def test_an_sdk_event_without_a_content_type_is_json(server: Server) -> None:
    sent = http.to_binary_event(CloudEvent({"type": "relight.test", "source": "/t"}, {"text": "x"}))
    assert "content-type" not in sent.headers
    assert request(server.port, "POST", "/", sent.body, sent.headers).json() == {"got": {"text": "x"}}


TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cn"]), min_size=1, max_size=30
)  # what CloudEvents calls a string: no surrogates, controls, or code points that are no characters
EXTENSIONS = st.dictionaries(st.from_regex(r"x[a-z0-9]{0,18}", fullmatch=True), TEXT, max_size=3)
KEPT = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True, max_examples=100)


@KEPT
@given(id=TEXT, source=TEXT, type=TEXT, subject=TEXT, extensions=EXTENSIONS, text=TEXT)
@example(id='"quoted"', source=" ", type="%41", subject="Euro € 😀", extensions={"priority": "high"}, text="\\")
def test_whatever_characters_an_event_is_made_of_come_back_in_its_reply_in_both_modes(
    server: Server,
    id: str,
    source: str,
    type: str,
    subject: str,
    extensions: dict[str, str],
    text: str,
) -> None:
    attributes = {"id": id, "source": source, "type": type, "subject": subject, "traceparent": subject, **extensions}
    event = CloudEvent({**attributes, "datacontenttype": "application/json"}, {"text": text})
    sent = http.to_binary_event(event), http.to_structured_event(event)
    found = [request(server.port, "POST", "/", message.body, message.headers) for message in sent]
    assert [reply.status for reply in found] == [200, 200], [reply.body for reply in found]
    replies = [
        http.from_binary_event(http.HTTPMessage(dict(found[0].headers), found[0].body)),
        http.from_structured_event(http.HTTPMessage(dict(found[1].headers), found[1].body)),
    ]
    for reply in replies:
        assert (reply.get_type(), reply.get_subject(), reply.get_extension("causationid")) == (type + ".response", subject, id)
        assert reply.get_extension("traceparent") == subject
        assert reply.get_data() == {"got": {"text": text}}
    assert replies[0].get_id() == replies[1].get_id()


# Which mode it is


@pytest.mark.parametrize("stray", [{"ce-id": "misleading"}, {"ce-specversion": "0.3"}, {"ce-type": "%ff"}], ids=str)
def test_a_structured_event_wins_over_stray_headers(server: Server, stray: dict[str, str]) -> None:
    reply = structured(server, {**REQUIRED, "data": 1}, stray)
    assert (reply.status, reply.json()["causationid"]) == (200, "e1")


@pytest.mark.parametrize("kind", ["Application/CloudEvents+JSON", "application/cloudevents", f"{STRUCTURED}; charset=utf-8"])
def test_the_media_type_is_told_apart_however_it_is_spelt(server: Server, kind: str) -> None:
    assert structured(server, {**REQUIRED, "data": 1}, kind=kind).json()["data"] == {"got": 1}


@pytest.mark.parametrize("kind", ["application/cloudevents+avro", "application/cloudevents-batch+protobuf", "application/cloudevents2"])
def test_another_event_format_is_a_415_that_names_ours(server: Server, kind: str) -> None:
    assert STRUCTURED in said(structured(server, REQUIRED, {"ce-id": "1"}, kind), 415)


def test_headers_that_are_no_events_make_no_event(server: Server) -> None:
    reply = request(server.port, "POST", "/", "x", {"ce-other": "1"})
    assert (reply.status, reply.json(), "ce-id" in reply.headers) == (200, {"got": "x"}, False)


def test_a_type_of_body_that_is_not_understood_is_a_415_only_for_what_is_no_event(server: Server) -> None:
    assert request(server.port, "POST", "/", b"x", {"Content-Type": "application/x-unknown"}).status == 415
    assert binary(server, b"x", "application/x-unknown").json() == {"bytes": "78"}


# Data

BINARY_DATA: list[tuple[bytes, str | None, Any]] = [
    (b'{"a": 1}', "application/json", {"got": {"a": 1}}),
    (b'{"a": 1}', "application/vnd.x+json; charset=utf-8", {"got": {"a": 1}}),
    (b'"x"', "text/json", {"got": "x"}),
    (b"7", None, {"got": 7}),
    (b"\xff", None, {"bytes": "ff"}),
    (b"", None, {"got": None}),
    (b"", "application/json", {"got": None}),
    (b"gr\xc3\xbc\xc3\x9fe", "text/plain", {"got": "grüße"}),
    (b"gr\xfc\xdfe", "text/plain; charset=ISO-8859-1", {"got": "grüße"}),
    (b"\x80", 'text/plain; charset="windows-1252"', {"got": "€"}),
    (b"a,b", "TEXT/CSV", {"got": "a,b"}),
    (b"", "text/plain", {"got": ""}),
    (b"{", "application/octet-stream", {"bytes": "7b"}),
    (b"<a/>", "application/xml", {"bytes": "3c612f3e"}),
    (b"a=1", "application/x-www-form-urlencoded", {"bytes": "613d31"}),
    (b"", "image/png", {"bytes": ""}),
]


@pytest.mark.parametrize(("body", "kind", "answer"), BINARY_DATA, ids=str)
def test_the_agent_is_handed_what_the_content_type_says(server: Server, body: bytes, kind: str | None, answer: Any) -> None:
    reply = binary(server, body, kind)
    assert (reply.status, reply.json(), reply.headers["content-type"]) == (200, answer, "application/json")


JSON_DATA: list[tuple[dict[str, Any], Any]] = [
    ({}, {"got": None}),
    ({"data": None}, {"got": None}),
    ({"data": "text"}, {"got": "text"}),
    ({"data": '{"not": "parsed"}', "datacontenttype": "application/json"}, {"got": '{"not": "parsed"}'}),
    ({"data": [1, 2]}, {"got": [1, 2]}),
    ({"data": {"instances": [1, 2]}}, {"predictions": [{"got": 1}, {"got": 2}]}),
    ({"data": "text", "datacontenttype": "text/plain; charset=utf-16"}, {"got": "text"}),
    ({"data": "<a/>", "datacontenttype": "application/xml"}, {"bytes": "3c612f3e"}),
    ({"data_base64": "AP8="}, {"bytes": "00ff"}),
    ({"data_base64": ""}, {"bytes": ""}),
    ({"data_base64": "eyJ4IjogMX0=", "datacontenttype": "application/json"}, {"got": {"x": 1}}),
    ({"data_base64": "eyJ4IjogMX0="}, {"bytes": b'{"x": 1}'.hex()}),  # the format forbids to take it for JSON
    ({"data_base64": "w6Q=", "datacontenttype": "text/plain"}, {"got": "ä"}),
    ({"data": None, "data_base64": "AP8="}, {"bytes": "00ff"}),
    ({"data": 1, "subject": None, "time": None, "unset": None}, {"got": 1}),
]


@pytest.mark.parametrize(("members", "answer"), JSON_DATA, ids=str)
def test_the_agent_is_handed_what_a_structured_event_holds(server: Server, members: dict[str, Any], answer: Any) -> None:
    reply = structured(server, REQUIRED | members)
    assert (reply.status, reply.json().get("data")) == (200, answer)


def test_bytes_that_the_agent_answers_with_are_the_replys_data_as_they_are(server: Server) -> None:
    reply = binary(server, b'"picture"', "application/json")
    assert (reply.body, reply.headers["content-type"]) == (b"\x00\xff", "application/octet-stream")
    document = structured(server, {**REQUIRED, "data": "picture"}).json()
    assert (document["datacontenttype"], base64.b64decode(document["data_base64"]), "data" in document) == (
        "application/octet-stream",
        b"\x00\xff",
        False,
    )


# Attributes

BAD_ATTRIBUTES: list[tuple[dict[str, Any], str]] = [
    ({"specversion": None}, "lacks 'specversion'"),
    ({"id": None}, "lacks 'id'"),
    ({"source": None, "type": None}, "lacks 'source' and 'type'"),
    ({"id": ""}, "lacks 'id'"),
    ({"specversion": "0.3"}, "specversion '0.3'"),
    ({"specversion": "1.0.2"}, "specversion '1.0.2'"),
    ({"time": "yesterday"}, "RFC 3339"),
    ({"time": "2030-02-30T00:00:00Z"}, "RFC 3339"),
    ({"time": "2030-01-01T00:00:00"}, "RFC 3339"),
    ({"time": "2030-01-01T24:00:00Z"}, "RFC 3339"),
    ({"under_score": "x"}, "'under_score' is no attribute's name"),
    ({"das-h": "x"}, "'das-h' is no attribute's name"),
    ({"data": "x"}, "'data' is no attribute's name"),
]


@pytest.mark.parametrize(("change", "message"), [pair for pair in BAD_ATTRIBUTES if "under_score" not in pair[0]], ids=str)
def test_a_binary_event_with_bad_attributes_is_a_400_that_says_which(server: Server, change: dict[str, Any], message: str) -> None:
    assert message in said(binary(server, b"1", "application/json", **change), 400)  # gunicorn drops names with an underscore


BAD_IN_JSON: list[tuple[dict[str, Any], str]] = [
    *(pair for pair in BAD_ATTRIBUTES if "data" not in pair[0]),
    ({"id": 5}, "'id' must be a string"),
    ({"id": True}, "'id' must be a string"),
    ({"subject": {}}, "'subject' must be a string"),
    ({"Upper": "x"}, "'Upper' is no attribute's name"),
    ({"": "x"}, "'' is no attribute's name"),
    ({"ext": 1.5}, "'ext' must be a string, an integer or a boolean"),
    ({"ext": ["x"]}, "'ext' must be a string, an integer or a boolean"),
    ({"type": "a\nb"}, "'type' has control characters"),
    ({"ext": "\ufffe"}, "'ext' has control characters"),
    ({"ext": "\U0010ffff"}, "'ext' has control characters"),
    ({"datacontenttype": "json"}, "'json' is not a media type"),
    ({"data": 1, "data_base64": "AA=="}, "not both"),
    ({"data_base64": "!"}, "base64"),
    ({"data_base64": "ä"}, "base64"),
    ({"data_base64": {}}, "base64"),
    ({"data": {}, "datacontenttype": "text/plain"}, "must be a string"),
    ({"data_base64": "ew==", "datacontenttype": "application/json"}, "not JSON"),
    ({"data": {"instances": 3}}, "not a list"),
    ({"data": "bad"}, "'bad' is not a word"),
]


@pytest.mark.parametrize(("change", "message"), BAD_IN_JSON, ids=str)
def test_a_bad_structured_event_is_a_400_that_says_what_is_wrong(server: Server, change: dict[str, Any], message: str) -> None:
    assert message in said(structured(server, REQUIRED | change), 400)


@pytest.mark.parametrize(
    ("body", "kind", "attributes", "message"),
    [
        (b"{", "application/json", {}, "not JSON"),
        (b'{"instances": 3}', "application/json", {}, "not a list"),
        (b'{"instances": 3}', None, {}, "not a list"),
        (b"x", "json", {}, "not a media type"),
        (b"\xff", "text/plain", {}, "not UTF-8"),
        (b"x", "text/plain; charset=utf-7", {}, "charset 'utf-7'"),
        (b"x", "text/plain", {"subject": "%ff"}, "percent-encoded UTF-8"),
        (b"x", "text/plain", {"subject": "%C0%A0"}, "percent-encoded UTF-8"),
        (b"x", "text/plain", {"subject": "a%0Ab"}, "control characters"),
        (b'"bad"', "application/json", {}, "'bad' is not a word"),
    ],
    ids=str,
)
def test_a_bad_binary_event_is_a_400_that_says_what_is_wrong(
    server: Server, body: bytes, kind: str | None, attributes: dict[str, str], message: str
) -> None:
    assert message in said(binary(server, body, kind, **attributes), 400)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),  # the specification's own example
        ("%e2%82%ac", "€"),
        ("%41b", "Ab"),
        ('"with spaces and \\"quotes\\" and \\\\"', 'with spaces and "quotes" and \\'),
        ('"%41"', "A"),
        ("%2541", "%41"),  # one round only
        ("100%", "100%"),
        ("plain words", "plain words"),
        ('5" disk', '5" disk'),
    ],
)
def test_a_headers_value_is_decoded_as_the_http_binding_has_it(server: Server, value: str, meant: str) -> None:
    reply = binary(server, b"1", "application/json", subject=value)
    assert http.from_binary_event(http.HTTPMessage(dict(reply.headers), reply.body)).get_subject() == meant
    assert re.fullmatch(r"[!#$&-~]+|(?:[!#$&-~]|%[0-9A-F]{2})+", reply.headers["ce-subject"])


@pytest.mark.parametrize(
    "time", ["1985-04-12T23:20:50.52Z", "1990-12-31T15:59:60-08:00", "2030-01-01t00:00:00z", "2000-02-29T00:00:00+23:59"]
)
def test_a_time_may_be_whatever_rfc_3339_allows(server: Server, time: str) -> None:
    assert binary(server, b"1", "application/json", time=time).status == 200


def test_an_empty_optional_attribute_is_as_good_as_none(server: Server) -> None:
    reply = binary(server, b"1", "application/json", subject="", time="")
    assert (reply.status, "ce-subject" in reply.headers) == (200, False)


def test_the_content_type_wins_over_a_header_for_it(server: Server) -> None:
    assert binary(server, b"1", "text/plain", datacontenttype="application/json").json() == {"got": "1"}


# Replies


def test_a_redelivered_event_gets_a_reply_of_the_same_id_and_another_event_does_not(server: Server) -> None:
    def reply_id(**attributes: str) -> str:
        return binary(server, b"1", "application/json", **attributes).headers["ce-id"]

    assert reply_id() == reply_id(time="2030-01-01T00:00:00Z") == structured(server, {**REQUIRED, "data": 1}).json()["id"]
    others = [reply_id(id="e2"), reply_id(source="/u"), reply_id(source="/t%20e", id="1"), reply_id(source="/t", id="e%201")]
    others += [reply_id(type="another"), structured(server, {**REQUIRED, "data": 2}).json()["id"]]
    assert len({reply_id(), *others}) == 7


def test_what_a_trace_needs_is_carried_over_and_nothing_else(server: Server) -> None:
    carried = {"subject": "s", "correlationid": "c", "traceparent": "00-1-2-01", "tracestate": "a=b"}
    reply = structured(server, {**REQUIRED, **carried, "dataschema": "urn:x", "priority": 2, "other": 5, "data": 1}).json()
    own = {"specversion", "id", "source", "type", "time", "datacontenttype", "causationid", "data"}
    assert set(reply) == own | set(carried)
    assert {name: reply[name] for name in carried} == carried


def test_errors_have_our_usual_shape_and_are_no_events(server: Server) -> None:
    reply = binary(server, b"1", "application/json", id=None)
    assert (reply.status, reply.json()["error"]["type"], "ce-id" in reply.headers) == (400, "bad_input", False)
    crashed = binary(server, b'"crash"', "application/json")
    assert (crashed.status, b"secret" in crashed.body) == (500, False)


def test_a_call_past_its_deadline_is_a_504(server: Server, tmp_path: Path) -> None:
    headers = {"Content-Type": STRUCTURED, "X-Request-Timeout-Ms": "50"}
    assert request(server.port, "POST", "/", {**REQUIRED, "data": {"hold": str(tmp_path / "gate")}}, headers).status == 504
    (tmp_path / "gate").touch()


@pytest.mark.parametrize("kind", [STRUCTURED, BATCH, "application/octet-stream"])
def test_a_body_that_is_too_large_is_refused_in_each_mode(server: Server, kind: str) -> None:
    headers = {f"ce-{name}": value for name, value in REQUIRED.items()}
    assert request(server.port, "POST", "/", b"x" * 20_001, {"Content-Type": kind, **headers}).status == 413


def test_replies_come_from_the_service_and_its_model() -> None:
    assert own_source("my model", None) == "/models/my%20model"
    assert own_source("org/m", "hello") == "/services/hello/models/org%2Fm"


# Batches


def test_an_empty_batch_is_done_already(server: Server) -> None:
    assert (batch(server).status, batch(server).json()) == (200, [])


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([1, {**REQUIRED, "id": ""}, 3], "event 1 of the batch (they count from 0): the event lacks 'id'"),
        ([1, 2, {**REQUIRED, "data": {"instances": []}}], 'event 2 of the batch (they count from 0): "instances" is empty'),
    ],
)
def test_of_a_batch_with_an_invalid_event_none_is_run(server: Server, events: list[Any], message: str) -> None:
    calls(server)
    assert message in said(batch(server, *events), 400)
    assert calls(server) == []


@pytest.mark.parametrize("document", [{}, "x", None, [1], [[]], [None]], ids=repr)
def test_a_batch_is_an_array_of_objects(server: Server, document: Any) -> None:
    assert "must be a JSON" in said(structured(server, document, kind=BATCH), 400)


def test_a_batch_obeys_the_limit_of_inputs_as_a_whole(server: Server) -> None:
    assert batch(server, *[{"instances": [1, 2]}] * 20).status == 200
    calls(server)
    assert "41 inputs in one batch of events; at most 40 (FUNCTION_MAX_INPUTS)" in said(
        batch(server, *[{"instances": [1, 2]}] * 20, 1), 400
    )
    assert calls(server) == []


def test_events_of_several_inputs_share_the_models_batches_and_get_their_own_answers(server: Server) -> None:
    calls(server)
    reply = batch(server, {"instances": [1, 2, 3]}, 4, {"instances": list(range(10))}, 5, {"instances": [6]})
    answers = [event["data"] for event in reply.json()]
    assert answers == [
        {"predictions": [{"got": 1}, {"got": 2}, {"got": 3}]},
        {"got": 4},
        {"predictions": [{"got": n} for n in range(10)]},
        {"got": 5},
        {"predictions": [{"got": 6}]},
    ]
    assert [len(call) for call in calls(server)] == [4, 8, 2, 2]  # ten are more than a batch of the model holds


def test_an_input_that_the_agent_refuses_is_named_and_the_batch_is_not_to_be_sent_again_as_it_is(server: Server) -> None:
    message = said(batch(server, 1, 2, "bad", 3, "crash", "bad"), 400)
    assert message == (
        "2 of the 6 events failed (they count from 0): event 2 (id 'e2'): 'bad' is not a word; event 5 (id 'e5'): 'bad' is not a word; "
        "leave out what is bad and send the rest of the batch again"
    )


def test_a_batch_of_which_an_event_could_not_be_done_is_a_503_that_names_it(server: Server) -> None:
    calls(server)
    reply = batch(server, 1, 2, 3, "crash", 4)
    assert said(reply, 503).startswith("1 of the 5 events failed (they count from 0): event 3 (id 'e3'): the model failed on this request")
    assert reply.headers["retry-after"] == "1"
    assert b"secret" not in reply.body
    alone = [call for call in calls(server) if "'crash'" not in call]
    assert sorted(item for call in alone for item in call) == ["1", "2", "3", "4"]  # the others were done


def test_a_batch_has_one_deadline_and_says_503_when_it_is_over(server: Server, tmp_path: Path) -> None:
    for deadline_s in (0.4, 2, 10, 25):  # until this machine has the first eight done by then
        calls(server)
        gate = tmp_path / f"{deadline_s}"
        reply = batch(server, *[1] * 8, {"hold": str(gate)}, *[2] * 15, X_Request_Timeout_Ms=f"{deadline_s * 1000:g}")
        gate.touch()
        message = said(reply, 503)
        if not message.startswith("24 of"):
            break
    assert message.startswith(
        f"16 of the 24 events failed (they count from 0): event 8 (id 'e8'): no answer within {deadline_s:g} s; event 9"
    )
    assert message.endswith("; and 11 more; send the batch again")
    assert [len(call) for call in calls(server)] == [8, 8]  # what was left when the time was up is not begun


def test_interactive_events_of_a_batch_go_first(server: Server) -> None:
    def asked(*priorities: Any, **headers: str) -> list[list[str]]:
        calls(server)
        events = [{**REQUIRED, "priority": priority, "data": n} for n, priority in enumerate(priorities)]
        reply = batch(server, *events, **headers)
        assert [event["data"]["got"] for event in reply.json()] == list(range(len(priorities)))
        return calls(server)

    assert asked(6, 0, None, "7", 4, 5) == [["1", "2", "4"], ["0", "3", "5"]]
    assert asked(6, 8, "high", -1, 7.0, [], {}, True) == [["1", "2", "3", "4", "5", "6", "7"], ["0"]]  # what makes no sense is no error
    assert asked(None, 3, "x", Priority="u=6") == [["1"], ["0", "2"]]  # the request's own counts where an event is silent


@pytest.mark.parametrize("priority", ["6", "0", "8", "-1", "%ff", "a%0Ab", "soon"])
def test_a_priority_is_never_an_error(server: Server, priority: str) -> None:
    assert binary(server, b"1", "application/json", priority=priority).status == 200
    assert structured(server, {**REQUIRED, "priority": priority, "data": 1}).status == 200


# Junk

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*REQUIRED, "subject", "time", "datacontenttype", "dataschema", "priority", "data", "data_base64"]) | st.text(
    max_size=8
)


@KEPT
@given(changes=st.dictionaries(NAMES, ANY_JSON, max_size=4), kind=st.sampled_from([STRUCTURED, BATCH]))
def test_no_structured_event_makes_the_function_fail(server: Server, changes: dict[str, Any], kind: str) -> None:
    event = REQUIRED | changes
    reply = structured(server, [REQUIRED, event] if kind == BATCH else event, kind=kind)
    assert reply.status in (200, 400), reply.body
    assert ("error" in reply.json()) == (reply.status == 400)


HEADER = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=20)


@KEPT
@given(
    attributes=st.dictionaries(st.sampled_from([*REQUIRED, "subject", "time", "priority", "x", "x-y"]), HEADER, max_size=4),
    kind=st.sampled_from(["application/json", "text/plain", "text/html; charset=x", "application/octet-stream"]) | HEADER,
    body=st.binary(max_size=40),
)
def test_no_binary_event_makes_the_function_fail(server: Server, attributes: dict[str, str], kind: str, body: bytes) -> None:
    headers = {f"ce-{name}": value.strip() for name, value in (REQUIRED | attributes).items()}
    reply = request(server.port, "POST", "/", body, {**headers, "Content-Type": kind.strip()})
    assert reply.status in (200, 400, 415), reply.body


@KEPT
@given(body=st.binary(max_size=60), kind=st.sampled_from([STRUCTURED, BATCH]))
@example(body=b"[" * 5000, kind=BATCH)
@example(body=b'{"a":' * 3000, kind=STRUCTURED)
@example(body=(b'{"priority":' + b"[" * 900 + b"]" * 900 + b"}"), kind=STRUCTURED)
@example(body=(b'{"ext":' + b"[" * 900 + b"]" * 900 + b"}"), kind=STRUCTURED)
def test_no_body_makes_the_function_fail(server: Server, body: bytes, kind: str) -> None:
    reply = structured(server, body, kind=kind)
    if kind == BATCH and body.strip() == b"[]":  # nothing to do, and that is done
        assert (reply.status, reply.json()) == (200, [])
    else:
        assert (reply.status, reply.json()["error"]["type"]) == (400, "bad_input")
