"""What other services wrap messages in: SNS envelopes and S3 event notifications, taken off on request."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote_plus

from knative.queue_source.errors import Unacceptable


@dataclass(frozen=True, slots=True)
class Content:
    """What a message says, once it is unwrapped."""

    data: bytes
    attributes: Mapping[str, str]
    subject: str | None = None
    is_test: bool = False  # what S3 sends when notifications are set up: nobody's work


def unwrap(content: Content, layers: tuple[str, ...]) -> Content:
    """Without these layers (`sns`, `s3`), the outermost first. Raises Unacceptable if one is not there."""
    for layer in layers:
        if not content.is_test:
            content = _LAYERS[layer](content)
    return content


def _sns(content: Content) -> Content:
    envelope = _document(content.data, "an SNS envelope")
    text = envelope.get("Message")
    if envelope.get("Type") != "Notification" or not isinstance(text, str):
        raise Unacceptable("the body is no SNS envelope ({'Type': 'Notification', 'Message': …}); is the subscription's raw delivery on?")
    attributes = {
        name: str(said.get("Value", "")) for name, said in (envelope.get("MessageAttributes") or {}).items() if isinstance(said, dict)
    }
    return Content(text.encode(), {**content.attributes, **attributes}, envelope.get("Subject") or content.subject)


def _s3(content: Content) -> Content:
    notification = _document(content.data, "an S3 event notification")
    if notification.get("Event") == "s3:TestEvent":
        return replace(content, is_test=True)
    try:
        objects = [_object(record) for record in notification["Records"]]
    except (KeyError, TypeError) as error:
        raise Unacceptable(f"the body is no S3 event notification ({{'Records': [{{'s3': …}}]}}): {error!r} is missing") from None
    if not objects:
        raise Unacceptable("the S3 event notification has no records")
    data: Any = objects[0] if len(objects) == 1 else {"instances": objects}
    return Content(json.dumps(data, ensure_ascii=False).encode(), content.attributes, objects[0]["key"])


def _object(record: dict[str, Any]) -> dict[str, Any]:
    """What a record tells of its object; the key as it is, not as the record spells it."""
    bucket, told = record["s3"]["bucket"]["name"], record["s3"]["object"]
    key = unquote_plus(told["key"])
    found = {"uri": f"s3://{bucket}/{key}", "bucket": bucket, "key": key, "event": record.get("eventName"), "time": record.get("eventTime")}
    found |= {"size": told.get("size"), "etag": told.get("eTag"), "version": told.get("versionId")}
    return {name: value for name, value in found.items() if value is not None}


def _document(data: bytes, what: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise Unacceptable(f"the body is not {what}: it is no JSON object")
    return document


_LAYERS = {"sns": _sns, "s3": _s3}
