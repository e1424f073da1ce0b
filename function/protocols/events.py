"""CloudEvents 1.0 over HTTP, at `POST /`: an event in, a reply event out.

The mode is told by the Content-Type alone: `application/cloudevents-batch…` is a batch, other `application/cloudevents…` one structured
event, anything else a binary event if an event's `ce-` headers are there. The answer is in the request's mode.

An event's data is what the agent is handed: JSON (`{"instances": [...]}` or any one value, as at `POST /`), text as a string, anything
else as bytes; an event without data is the one input None. A binary event without a Content-Type is JSON if it can be.

The reply has the request's type with `.response` behind it, so that a broker that filters by type does not deliver it here again, and an
id that follows from the request's `source` and `id`, so that an event that is delivered twice gets one reply as far as its receivers can
tell.

Statuses are what Knative acts upon: 2xx only when the work is done, 400 for what would fail again (it is not sent again), 503, 504 and
429 for what may go well later.
"""

import base64
import binascii
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import flask
from werkzeug.datastructures import Headers
from werkzeug.http import parse_options_header

from function.batcher import Ask
from function.errors import AgentFailed, BadInput, ClientGone, FunctionError, TimedOut, Unavailable, UnsupportedMediaType
from function.http import URGENCY_OF_BATCH, Function, Question, dumps, parse_json
from function.protocols.v1 import of_value

EVENT = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"
REPLY = ".response"  # behind the request's type

_PREFIX = "application/cloudevents"
_BATCH_PREFIX = "application/cloudevents-batch"
_REQUIRED = ("specversion", "id", "source", "type")
_CORE = (*_REQUIRED, "subject", "time", "datacontenttype", "dataschema")  # strings, always
_MARKS = tuple(f"HTTP_CE_{name.upper()}" for name in _REQUIRED)  # as WSGI spells them: there is an event
_URGENCIES = tuple("01234567")
_CARRIED = ("subject", "correlationid", "traceparent", "tracestate")  # from an event to its reply

_NAME = re.compile(r"[a-z0-9]+")
_NO_CHARACTERS = "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF)) + "\ufdd0-\ufdef\ud800-\udfff"
_UNSAYABLE = re.compile(f"[\x00-\x1f\x7f-\x9f{_NO_CHARACTERS}]")
_TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)[Tt ]([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)", re.ASCII)
_MEDIA_TYPE = re.compile(r"[\w!#$%&'*+.^`|~-]+/[\w!#$%&'*+.^`|~-]+[ \t]*(;.*)?", re.ASCII | re.DOTALL)
_CHARSETS = {"": "utf-8", "utf-8": "utf-8", "utf8": "utf-8", "us-ascii": "ascii", "iso-8859-1": "latin-1", "windows-1252": "cp1252"}
_SAFE = "".join(sign for sign in map(chr, range(0x21, 0x7F)) if sign not in '"%')  # in a header; HTTP binding, section 3.1.3.2
_REPLIES = uuid.UUID("6f0b6a5c-9c1e-5b0e-8f6e-2f5f3f1f7a11")  # the namespace of our replies' ids


@dataclass(frozen=True)
class Event:
    """A valid event: its attributes, all as strings, and what it asks."""

    attributes: Mapping[str, str]
    question: Question

    @property
    def urgency(self) -> int | None:
        """The extension `priority`, 0 to 7 on the scale of RFC 9218; None if there is none that makes sense."""
        said = self.attributes.get("priority")
        return int(said) if said else None


def are_here(request: flask.Request) -> bool:
    """Whether a request is an event or a batch of them, valid or not."""
    return request.mimetype.startswith(_PREFIX) or any(name in request.environ for name in _MARKS)


def answer(function: Function, source: str) -> flask.Response:
    """The reply to the request's events. source: the replies' own.

    Raises BadInput, UnsupportedMediaType for an event format other than JSON, and what Function.body and Model.predict do. Of a batch all
    is done, or it raises: BadInput if an event is not valid (then none was run) or the agent cannot use one, otherwise Unavailable.
    """
    kind = flask.request.mimetype
    if not kind.startswith(_PREFIX):
        event = _from_http(flask.request.headers, function.body())
        return _in_binary(*_reply(source, event, _ask(function, event)))
    if kind not in (_PREFIX, EVENT, _BATCH_PREFIX, BATCH):
        raise UnsupportedMediaType(f"events in the format {kind!r} are not understood here; send {EVENT} or {BATCH}")
    document = parse_json(function.body())
    if not kind.startswith(_BATCH_PREFIX):
        event = _from_json(document)
        return flask.Response(_in_json(*_reply(source, event, _ask(function, event))), content_type=EVENT)
    events = _from_batch(document)
    replies = [_in_json(*_reply(source, event, said)) for event, said in zip(events, _ask_all(function, events), strict=True)]
    return flask.Response(b"[" + b",".join(replies) + b"]", content_type=BATCH)


def own_source(model_name: str, service: str | None) -> str:
    """The `source` of our replies. service: the Knative Service's name, where there is one: two of them may call their models alike."""
    return (f"/services/{quote(service, safe='')}" if service else "") + f"/models/{quote(model_name, safe='')}"


# What was sent


def _from_http(headers: Headers, body: bytes) -> Event:
    """An event in binary mode."""
    found: dict[str, Any] = {}
    for name, value in headers.items():
        name = name.lower()
        if name.startswith("ce-") and name != "ce-datacontenttype":  # which is the Content-Type's
            found[name[3:]] = value if name == "ce-priority" else _unescaped(name, value)
    kind: str = headers.get("Content-Type", "")
    attributes = _checked(found | {"datacontenttype": kind or None})
    if kind:
        return Event(attributes, of_value(_parsed(body, kind)))
    try:  # clients that leave it away mean JSON, as at POST /; but it may be anything
        data = _parsed(body, "application/json")
    except BadInput:
        data = body
    return Event(attributes, of_value(data))


def _unescaped(name: str, value: str) -> str:
    """A header's value as section 3.1.3.2 of the HTTP binding has it: quotes first, then percent signs. Raises BadInput."""
    if quoted := re.fullmatch(r'"((?:[^"\\]|\\.)*)"', value):
        value = re.sub(r"\\(.)", r"\1", quoted[1])
    try:
        return unquote_to_bytes(value.encode("latin-1")).decode()
    except UnicodeError:
        raise BadInput(f"{name}: {_short(value)} is not percent-encoded UTF-8") from None


def _from_batch(document: Any) -> list[Event]:
    """The events of a batch, all of them valid."""
    if not isinstance(document, list):
        raise BadInput("a batch must be a JSON array of events")
    events = []
    for number, item in enumerate(document):
        try:
            events.append(_from_json(item))
        except BadInput as error:
            raise BadInput(f"event {number} of the batch (they count from 0): {error}; none was run") from None
    return events


def _from_json(document: Any) -> Event:
    """An event in the JSON format."""
    if not isinstance(document, dict):
        raise BadInput("an event must be a JSON object")
    attributes = _checked({name: value for name, value in document.items() if name not in ("data", "data_base64")})
    return Event(attributes, of_value(_data(document, attributes.get("datacontenttype"))))


def _data(document: dict[str, Any], kind: str | None) -> Any:
    """What `data` or `data_base64` holds; None if neither is there. kind: the media type of it, None for JSON in `data`."""
    data, encoded = document.get("data"), document.get("data_base64")
    if encoded is not None:
        if data is not None:
            raise BadInput("an event has `data` or `data_base64`, not both")
        try:
            decoded = base64.b64decode(encoded, validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise BadInput("`data_base64` is not a string of base64") from None
        return _parsed(decoded, kind) if kind else decoded
    if kind is None or data is None or _is_json(kind):
        return data
    if not isinstance(data, str):
        raise BadInput(f"`data` of type {_short(kind)} must be a string, or `data_base64`")
    return data if _is_text(kind) else data.encode()


def _parsed(data: bytes, kind: str) -> Any:
    """Data as the agent is handed it. kind: its media type."""
    if _is_json(kind):
        return parse_json(data) if data else None
    if not _is_text(kind):
        return data
    charset = parse_options_header(kind)[1].get("charset", "").lower()
    if charset not in _CHARSETS:
        raise BadInput(f"the charset {_short(charset)} is not understood here; send UTF-8")
    try:
        return data.decode(_CHARSETS[charset])
    except UnicodeDecodeError as error:
        raise BadInput(f"the data is not {charset or 'UTF-8'}: {error.reason}") from None


def _is_json(kind: str) -> bool:
    return _bare(kind).endswith(("/json", "+json"))


def _is_text(kind: str) -> bool:
    return _bare(kind).startswith("text/")


def _bare(kind: str) -> str:
    return kind.partition(";")[0].strip().lower()


def _checked(found: Mapping[str, Any]) -> dict[str, str]:
    """An event's attributes in their canonical string form, those left out that are empty. Raises BadInput."""
    attributes: dict[str, str] = {}
    for name, value in found.items():
        if not _NAME.fullmatch(name) or name == "data":
            raise BadInput(f"{_short(name)} is no attribute's name: those are of lower-case letters and digits, and not `data`")
        if name == "priority":  # never an error
            if isinstance(value, int | str) and str(value) in _URGENCIES:
                attributes[name] = str(value)
            continue
        if isinstance(value, bool):
            value = "true" if value else "false"
        elif isinstance(value, int):
            value = str(value)
        if value is not None and (not isinstance(value, str) or (name in _CORE and not isinstance(found[name], str))):
            raise BadInput(f"the attribute {name!r} must be a string" + ("" if name in _CORE else ", an integer or a boolean"))
        if value and _UNSAYABLE.search(value):
            raise BadInput(f"the attribute {name!r} has control characters or code points that are no characters: {_short(value)}")
        if value:
            attributes[name] = value
    missing = [name for name in _REQUIRED if name not in attributes]
    if missing:
        raise BadInput(f"the event lacks {' and '.join(map(repr, missing))}; required are {', '.join(_REQUIRED)}, none of them empty")
    if attributes["specversion"] != "1.0":
        raise BadInput(f"specversion {_short(attributes['specversion'])} is not understood here; send events of version '1.0'")
    if not _is_time(attributes.get("time", "1970-01-01T00:00:00Z")):
        raise BadInput(f"`time` {_short(attributes['time'])} is not a time as in RFC 3339, such as '2030-04-05T17:31:00Z'")
    if not _MEDIA_TYPE.fullmatch(attributes.get("datacontenttype", "a/b")):
        raise BadInput(f"{_short(attributes['datacontenttype'])} is not a media type")
    return attributes


def _is_time(text: str) -> bool:
    found = _TIME.fullmatch(text)
    try:
        return found is not None and bool(date(*map(int, found.group(1, 2, 3))))
    except ValueError:
        return False


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")


# What is asked of the model


def _ask(function: Function, event: Event) -> Any:
    """The answer to one event."""
    return event.question.answer(function.predict(event.question.inputs, function.ask(event.urgency)))


def _ask_all(function: Function, events: Sequence[Event]) -> list[Any]:
    """The answer to each event of a batch.

    They go to the model in whole batches of its own, interactive ones first, all within the one deadline of the request; the outcomes are
    kept apart by event, so that those which are done could be remembered when others are not.
    """
    total, most = sum(len(event.question.inputs) for event in events), function.settings.max_inputs
    if total > most:
        raise BadInput(f"{total} inputs in one batch of events; at most {most} (FUNCTION_MAX_INPUTS)")
    function.metrics.instances.inc(total)
    patience = _Patience(function.ask())
    outcomes: dict[int, Any] = {}
    for is_batch in (False, True):
        numbers = [number for number, event in enumerate(events) if patience.is_batch(event) == is_batch]
        for group in _groups(events, numbers, function.settings.max_batch):
            outcomes |= _outcomes(function, events, group, patience, is_batch)
    failed = {number: error for number, error in sorted(outcomes.items()) if isinstance(error, FunctionError)}
    if not failed:
        return [outcomes[number] for number in range(len(events))]
    bad = {number: error for number, error in failed.items() if isinstance(error, BadInput)}
    if bad:
        raise BadInput(f"{_told(events, bad)}; leave out what is bad and send the rest of the batch again")
    retry_after_s = max(error.retry_after_s or 1 for error in failed.values())
    raise Unavailable(f"{_told(events, failed)}; send the batch again", retry_after_s)


def _groups(events: Sequence[Event], numbers: Sequence[int], room: int) -> Iterator[list[int]]:
    """Events that fill a batch of the model together; one that is larger stands alone."""
    group: list[int] = []
    taken = 0
    for number in numbers:
        size = len(events[number].question.inputs)
        if group and taken + size > room:
            yield group
            group, taken = [], 0
        group.append(number)
        taken += size
    if group:
        yield group


def _outcomes(function: Function, events: Sequence[Event], group: list[int], patience: "_Patience", is_batch: bool) -> dict[int, Any]:
    """The answer to each event of a group, or the error it fails with; halved until the culprit is alone."""
    try:
        outputs = function.model.predict([item for number in group for item in events[number].question.inputs], patience.ask(is_batch))
    except ClientGone:
        raise
    except TimedOut:
        return dict.fromkeys(group, patience.over())
    except (BadInput, AgentFailed) as error:
        if len(group) == 1:
            return {group[0]: error}
        half = len(group) // 2
        first = _outcomes(function, events, group[:half], patience, is_batch)
        return first | _outcomes(function, events, group[half:], patience, is_batch)
    except FunctionError as error:
        return dict.fromkeys(group, error)
    rest = iter(outputs)
    return {number: events[number].question.answer([next(rest) for _ in events[number].question.inputs]) for number in group}


class _Patience:
    """One deadline for all calls of a request."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._began: float | None = None

    def is_batch(self, event: Event) -> bool:
        """Whether it may wait for interactive ones. The request's own priority counts where the event's is silent."""
        return self._ask.is_batch if event.urgency is None else event.urgency >= URGENCY_OF_BATCH

    def ask(self, is_batch: bool) -> Ask:
        """For the next call; others may have used up some of the time. Raises TimedOut when it is up."""
        if self._began is None:
            self._began = time.monotonic()
            return replace(self._ask, is_batch=is_batch)
        left_s = self._began + self._ask.timeout_s - time.monotonic()
        if left_s <= 0:
            raise self.over()
        return replace(self._ask, is_batch=is_batch, timeout_s=left_s, is_own_deadline=False)

    def over(self) -> TimedOut:
        """What is said when the time is up."""
        return TimedOut(f"the batch was not done within {self._ask.timeout_s:g} s")


def _told(events: Sequence[Event], failed: Mapping[int, FunctionError]) -> str:
    """Which events failed and why; the first few."""
    said = [f"event {number} (id {_short(events[number].attributes['id'])}): {error}" for number, error in list(failed.items())[:5]]
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    return f"{len(failed)} of the {len(events)} events failed (they count from 0): " + "; ".join(said) + more


# What is sent back


def _reply(source: str, event: Event, data: Any) -> tuple[dict[str, str], Any]:
    """The attributes and the data of the reply to an event."""
    asked = event.attributes
    attributes = {
        "specversion": "1.0",
        "id": str(uuid.uuid5(_REPLIES, f"{len(asked['source'])} {asked['source']} {asked['id']}")),
        "source": source,
        "type": asked["type"] + REPLY,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/octet-stream" if isinstance(data, bytes) else "application/json",
        "causationid": asked["id"],
    }
    return attributes | {name: asked[name] for name in _CARRIED if name in asked}, data


def _in_binary(attributes: Mapping[str, str], data: Any) -> flask.Response:
    headers = {f"ce-{name}": quote(value, safe=_SAFE) for name, value in attributes.items() if name != "datacontenttype"}
    body = data if isinstance(data, bytes) else dumps(data)
    return flask.Response(body, headers=headers, content_type=attributes["datacontenttype"])


def _in_json(attributes: Mapping[str, str], data: Any) -> bytes:
    if isinstance(data, bytes):
        return dumps({**attributes, "data_base64": base64.b64encode(data).decode()})
    return dumps({**attributes, "data": data})
