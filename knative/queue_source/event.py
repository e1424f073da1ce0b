"""A message as a CloudEvent, in binary mode.

Message attributes become extensions: their names in lower case, without what is neither a letter nor a digit (`Trace-Id` → `traceid`). Of
two that fall together so the first by name counts. An attribute that is called like one of the event's own gives it its value where that
does no harm (`type`, `subject`, `dataschema`, and `contenttype` or `datacontenttype` for the Content-Type), and is left out otherwise.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote

from knative.queue_source.queue import Message

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
BYTES = "application/octet-stream"

_TAKEN = ("type", "subject", "dataschema")
_KEPT = ("id", "source", "specversion", "time", "data", "database64")  # ours alone
_TYPE_NAMES = ("contenttype", "datacontenttype")
_NO_NAME = re.compile(r"[^a-z0-9]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_SAFE = "".join(sign for sign in map(chr, range(0x21, 0x7F)) if sign not in '"%')  # in a header; HTTP binding, section 3.1.3.2
_PLAIN = re.compile(r"[!#$&-~]*")  # what needs no escape
_TRACE = ("traceparent", "tracestate")


@dataclass(frozen=True, slots=True)
class Event:
    """The event's attributes, and its data."""

    attributes: Mapping[str, str]
    content_type: str
    data: bytes

    def headers(self) -> dict[str, str]:
        """As HTTP headers; the trace stands there as an HTTP server looks for it, too."""
        made = {f"ce-{name}": value if _PLAIN.fullmatch(value) else quote(value, safe=_SAFE) for name, value in self.attributes.items()}
        made["Content-Type"] = self.content_type
        for name in _TRACE:
            if name in self.attributes:
                made[name] = made[f"ce-{name}"]
        return made


def detect(data: bytes) -> str:
    """The media type of a body that comes without one: JSON, text, or anything."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return BYTES
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return TEXT
    return JSON


def make(
    message: Message,
    *,
    source: str,
    type: str,  # noqa: A002  as CloudEvents calls it
    extensions: Mapping[str, str],
    data: bytes,
    content_type: str | None = None,
    subject: str | None = None,
    attributes: Mapping[str, str] | None = None,
) -> Event:
    """The event of a message. extensions: those that every event gets. attributes: in place of the message's own."""
    made = {"specversion": "1.0", "id": message.id, "source": source, "type": type}
    if message.sent is not None:
        made["time"] = datetime.fromtimestamp(message.sent, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if subject:
        made["subject"] = _clean(subject)
    if message.group:
        made["partitionkey"] = _clean(message.group)
    if message.sequence:
        made["sequence"] = message.sequence
    content_type = content_type or message.content_type
    found = message.attributes if attributes is None else attributes
    for name in sorted(found):
        short, value = _NO_NAME.sub("", name.lower()), _clean(found[name])
        if short in _TYPE_NAMES:
            content_type = content_type or value
        elif short and value and short not in _KEPT and (short in _TAKEN or short not in made):
            made[short] = value
    made |= extensions
    return Event(made, _clean(content_type or "") or detect(data), data)


def _clean(value: str) -> str:
    """Without the control characters that no attribute may have."""
    return _CONTROL.sub(" ", value).strip()
