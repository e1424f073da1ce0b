"""Request headers of the user's own, for `relight invoke` and whoever else has the admin port send a request."""

import json
import re
from collections.abc import Iterable, Sequence

FIELD = "X-Relight-Headers"  # of a request to the admin port: [[name, value], …] as JSON, whose text may be of any language

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
_OURS = {
    "host": "the Service is named by its NAME, a revision of it by --tag",
    "content-length": "it follows from the body",
}

Headers = Sequence[tuple[str, str]]


def parse(texts: Iterable[str]) -> Headers:
    """Those that are written as `Name: value`. Raises ValueError, with what is wrong and what to do."""
    found = []
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon:
            raise ValueError(f"{text!r:.60} is no header; write it as 'Name: value'")
        found.append((name.strip(), value.strip()))
    return checked(found)


def checked(headers: Headers) -> Headers:
    """The same, if they may be sent on. Raises ValueError."""
    for name, value in headers:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r:.60} is no name of a header; write it as 'Name: value'")
        if not _VALUE.fullmatch(value):
            raise ValueError(f"the value of {name} has control characters")
        if name.lower() in _HOP_BY_HOP:
            raise ValueError(f"{name} is about one connection, and there are others between here and the pod; leave it out")
        if why := _OURS.get(name.lower()):
            raise ValueError(f"{name} cannot be chosen: {why}; leave it out")
    return headers


def to_field(headers: Headers) -> str:
    """The value of FIELD."""
    return json.dumps(list(headers))


def from_field(text: str) -> Headers:
    """The headers that it holds. Raises ValueError."""
    try:
        found = [(name, value) for name, value in json.loads(text) if isinstance(name, str) and isinstance(value, str)]
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{FIELD} must be [[name, value], …]") from error
    except ValueError as error:
        raise ValueError(f"{FIELD} must be [[name, value], …] as JSON: {error!s:.100}") from error
    return checked(found)
