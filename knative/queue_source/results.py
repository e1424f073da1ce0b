"""A sink's reply event as what is sent to the results queue: one CloudEvent in the JSON format."""

import base64
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from knative.queue_source.errors import ResultRefused

EVENT = "application/cloudevents+json"
_REQUIRED = ("specversion", "id", "source", "type")


def reply_event(headers: Mapping[str, str], body: bytes) -> bytes | None:
    """The event that an answer holds, in JSON; None if it holds none. headers: their names in lower case.

    Raises ResultRefused for what says it is an event and is not.
    """
    kind = headers.get("content-type", "")
    bare = kind.partition(";")[0].strip().lower()
    if bare == EVENT:
        return body
    if bare.startswith("application/cloudevents"):
        raise ResultRefused(f"the sink answered with {bare}; one event is expected, in binary mode or as {EVENT}")
    event: dict[str, Any] = {
        name[3:]: unquote_to_bytes(value).decode(errors="replace") for name, value in headers.items() if name.startswith("ce-")
    }
    if not event:
        return None
    if missing := [name for name in _REQUIRED if name not in event]:
        raise ResultRefused(f"the sink's reply event lacks {' and '.join(missing)}")
    if kind:
        event["datacontenttype"] = kind
    if body:
        event |= _data(body, bare)
    return json.dumps(event, ensure_ascii=False).encode()


def _data(body: bytes, kind: str) -> dict[str, Any]:
    """`data` for JSON and text, `data_base64` for what is neither."""
    try:
        if kind.endswith(("/json", "+json")) or not kind:
            return {"data": json.loads(body)}
        if kind.startswith("text/"):
            return {"data": body.decode()}
    except (ValueError, RecursionError):
        pass  # it is not what it says
    return {"data_base64": base64.b64encode(body).decode()}
