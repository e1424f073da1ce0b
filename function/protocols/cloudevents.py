"""CloudEvents 1.0 as HTTP has them: what a request's events say, and how their replies are written.

The mode is told by the Content-Type alone: `application/cloudevents-batch…` is a batch, other `application/cloudevents…` one structured
event, anything else a binary event if an event's `ce-` headers are there.

An event's data is what the agent is handed: JSON (`{"instances": [...]}` or any one value, as at `POST /`), text as a string, anything
else as bytes; an event without data is the one input None. A binary event without a Content-Type is JSON if it can be.

The reply has the request's type with `.response` behind it, so that a broker that filters by type does not deliver it here again, and an
id that follows from the request's `source`, `id`, `type` and data, so that an event that is delivered twice gets one reply as far as its
receivers can tell, whichever pod answers, and one that only has the same id gets another.
"""

import base64
import binascii
import hashlib
import re
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cached_property
from itertools import chain
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import flask
import orjson
from werkzeug.datastructures import Headers
from werkzeug.http import parse_options_header

from function.errors import BadInput
from function.http import JSON, PredictRequest
from function.protocols.v1 import of_value
from function.values import dumps

EVENT = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"
REPLY = ".response"  # behind the request's type

PREFIX = "application/cloudevents"
BATCH_PREFIX = "application/cloudevents-batch"
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

Parse = Callable[[bytes], Any]  # of JSON; raises FunctionError


@dataclass(frozen=True)
class Event:
    """A valid event: its attributes, all as strings, and what it asks."""

    attributes: Mapping[str, str]
    question: PredictRequest

    @cached_property
    def digest(self) -> bytes:
        """Of what makes it what it is: its source, id and type, and what the agent is handed of it, in whichever mode it came."""
        found, asked = hashlib.blake2b(digest_size=32), self.question
        parts = [self.attributes[name].encode() for name in ("source", "id", "type")]
        parts += [b"bare" if asked.is_bare else b"instances", *canonical(asked.parameters)]
        for part in chain(parts, chain.from_iterable(map(canonical, asked.inputs))):
            found.update(len(part).to_bytes(8, "big"))  # where one part ends is part of it
            found.update(part)
        return found.digest()

    def key(self, caller: str) -> bytes:
        """What says that it is the same one: the same caller sends the same event again."""
        return hashlib.blake2b(self.digest + caller.encode("utf-8", "surrogatepass"), digest_size=32).digest()

    @property
    def urgency(self) -> int | None:
        """The extension `priority`, 0 to 7 on the scale of RFC 9218; None if there is none that makes sense."""
        said = self.attributes.get("priority")
        return int(said) if said else None


def canonical(value: Any) -> tuple[bytes, bytes]:
    """A value's kind and bytes: the same for the same value, however it was written, and others for any other."""
    return (b"bytes", value) if isinstance(value, bytes) else (b"json", orjson.dumps(value, option=orjson.OPT_SORT_KEYS))


@dataclass(frozen=True, slots=True)
class Reply:
    """The event that answers one: its attributes, and its data as they are written, JSON or not."""

    attributes: Mapping[str, str]
    data: bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of all that it says."""
        return len(self.data) + sum(map(sys.getsizeof, self.attributes.values()))

    def in_binary(self) -> flask.Response:
        """As the answer to a binary event."""
        headers = {f"ce-{name}": quote(value, safe=_SAFE) for name, value in self.attributes.items() if name != "datacontenttype"}
        return flask.Response(self.data, headers=headers, content_type=self.attributes["datacontenttype"])

    def in_json(self) -> bytes:
        """As a document, alone or in a batch."""
        if self.attributes["datacontenttype"] == JSON:
            return orjson.dumps({**self.attributes, "data": orjson.Fragment(self.data)})
        return dumps({**self.attributes, "data_base64": base64.b64encode(self.data).decode()})


def are_here(request: flask.Request) -> bool:
    """Whether a request is an event or a batch of them, valid or not."""
    return request.mimetype.startswith(PREFIX) or any(name in request.environ for name in _MARKS)


def own_source(model_name: str, service: str | None) -> str:
    """The `source` of our replies. service: the Knative Service's name, where there is one: two of them may call their models alike."""
    return (f"/services/{quote(service, safe='')}" if service else "") + f"/models/{quote(model_name, safe='')}"


# What was sent


def from_http(headers: Headers, body: bytes, parse: Parse) -> Event:
    """An event in binary mode."""
    found: dict[str, Any] = {}
    for name, value in headers.items():
        name = name.lower()
        if name.startswith("ce-") and name != "ce-datacontenttype":  # which is the Content-Type's
            found[name[3:]] = value if name == "ce-priority" else _unescaped(name, value)
    kind: str = headers.get("Content-Type", "")
    attributes = _checked(found | {"datacontenttype": kind or None})
    if kind:
        return Event(attributes, of_value(_parsed(body, kind, parse)))
    try:  # clients that leave it away mean JSON, as at POST /; but it may be anything
        data = _parsed(body, JSON, parse)
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
        raise BadInput(f"{name}: {short(value)} is not percent-encoded UTF-8") from None


def from_batch(document: Any, parse: Parse) -> list[Event]:
    """The events of a batch, all of them valid."""
    if not isinstance(document, list):
        raise BadInput("a batch must be a JSON array of events")
    events = []
    for number, item in enumerate(document):
        try:
            events.append(from_json(item, parse))
        except BadInput as error:
            raise BadInput(f"event {number} of the batch (they count from 0): {error}; none was run") from None
    return events


def from_json(document: Any, parse: Parse) -> Event:
    """An event in the JSON format."""
    if not isinstance(document, dict):
        raise BadInput("an event must be a JSON object")
    attributes = _checked({name: value for name, value in document.items() if name not in ("data", "data_base64")})
    return Event(attributes, of_value(_data(document, attributes.get("datacontenttype"), parse)))


def _data(document: dict[str, Any], kind: str | None, parse: Parse) -> Any:
    """What `data` or `data_base64` holds; None if neither is there. kind: the media type of it, None for JSON in `data`."""
    data, encoded = document.get("data"), document.get("data_base64")
    if encoded is not None:
        if data is not None:
            raise BadInput("an event has `data` or `data_base64`, not both")
        try:
            decoded = base64.b64decode(encoded, validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise BadInput("`data_base64` is not a string of base64") from None
        return _parsed(decoded, kind, parse) if kind else decoded
    if kind is None or data is None or _is_json(kind):
        return data
    if not isinstance(data, str):
        raise BadInput(f"`data` of type {short(kind)} must be a string, or `data_base64`")
    return data if _is_text(kind) else data.encode()


def _parsed(data: bytes, kind: str, parse: Parse) -> Any:
    """Data as the agent is handed it. kind: its media type."""
    if _is_json(kind):
        return parse(data) if data else None
    if not _is_text(kind):
        return data
    charset = parse_options_header(kind)[1].get("charset", "").lower()
    if charset not in _CHARSETS:
        raise BadInput(f"the charset {short(charset)} is not understood here; send UTF-8")
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
            raise BadInput(f"{short(name)} is no attribute's name: those are of lower-case letters and digits, and not `data`")
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
            raise BadInput(f"the attribute {name!r} has control characters or code points that are no characters: {short(value)}")
        if value:
            attributes[name] = value
    missing = [name for name in _REQUIRED if name not in attributes]
    if missing:
        raise BadInput(f"the event lacks {' and '.join(map(repr, missing))}; required are {', '.join(_REQUIRED)}, none of them empty")
    if attributes["specversion"] != "1.0":
        raise BadInput(f"specversion {short(attributes['specversion'])} is not understood here; send events of version '1.0'")
    if not _is_time(attributes.get("time", "1970-01-01T00:00:00Z")):
        raise BadInput(f"`time` {short(attributes['time'])} is not a time as in RFC 3339, such as '2030-04-05T17:31:00Z'")
    if not _MEDIA_TYPE.fullmatch(attributes.get("datacontenttype", "a/b")):
        raise BadInput(f"{short(attributes['datacontenttype'])} is not a media type")
    return attributes


def _is_time(text: str) -> bool:
    found = _TIME.fullmatch(text)
    try:
        return found is not None and bool(date(*map(int, found.group(1, 2, 3))))
    except ValueError:
        return False


def short(text: str) -> str:
    """A text of somebody else's as an error message has it."""
    return repr(text if len(text) <= 60 else text[:60] + "…")


# What is sent back


def reply_to(source: str, event: Event, outputs: list[Any]) -> Reply:
    """The reply to an event."""
    answer, asked = event.question.answer(outputs), event.attributes
    # A copy, since what orjson gives holds on to a buffer of some KiB, and the reply may be kept.
    data = answer if isinstance(answer, bytes) else bytes(memoryview(dumps(answer)))
    attributes = {
        "specversion": "1.0",
        "id": str(uuid.uuid5(_REPLIES, event.digest.hex())),
        "source": source,
        "type": asked["type"] + REPLY,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/octet-stream" if isinstance(answer, bytes) else JSON,
        "causationid": asked["id"],
    }
    return Reply(attributes | {name: asked[name] for name in _CARRIED if name in asked}, data)
