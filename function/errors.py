"""What a caller can be told.

request → parse (Unauthorized, Forbidden, BadInput, NotFound, TooLarge, TooSlow, UnsupportedMediaType) → admit (Unavailable) → agent
(AgentFailed, TimedOut, CannotStream) → reply. Each error knows its HTTP status; only these reach the caller, anything else stays in the
log. How they are written is each protocol's own (see `http.failure`).
"""

from collections.abc import Mapping
from types import MappingProxyType


class FunctionError(Exception):
    """Base of what callers are told.

    `retry_after_s`: when the same request may succeed, unchanged; `param`: the parameter that is wrong, for protocols that name it;
    `headers`: what the answer says besides; `ends_connection`: some of the request was left unread, so that no other can follow it.
    """

    status = 500
    type = "internal_error"
    retry_after_s: float | None = None
    param: str | None = None
    headers: Mapping[str, str] = MappingProxyType({})
    ends_connection = False


class HttpError(FunctionError):
    """What HTTP itself has a status for: no such route, another method, a head that is none."""

    def __init__(self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.type, self.headers = status, kind, headers or {}


class BadInput(FunctionError):
    """The request or one of its inputs is not what it should be; an agent raises it for an input it cannot use."""

    status = 400
    type = "bad_input"


class CannotStream(BadInput):
    """The agent makes its answers in one go."""

    type = "cannot_stream"


class Unauthorized(FunctionError):
    """The request has no key that is known here; an event, no good token of its sender."""

    status = 401
    type = "unauthorized"
    headers = MappingProxyType({"WWW-Authenticate": "Bearer"})


class Forbidden(FunctionError):
    """Who asks is known, and not let in."""

    status = 403
    type = "forbidden"


class NotFound(FunctionError):
    """There is no such model."""

    status = 404
    type = "not_found"


class TooLarge(FunctionError):
    """The body is larger than FUNCTION_MAX_BODY_BYTES."""

    status = 413
    type = "too_large"
    ends_connection = True


class TooSlow(FunctionError):
    """The body stopped coming."""

    status = 408
    type = "too_slow"
    ends_connection = True


class UnsupportedMediaType(FunctionError):
    """The body is of a type that is not understood here."""

    status = 415
    type = "unsupported_media_type"


class AgentFailed(FunctionError):
    """The agent raised something; what, is in the log and not for the caller."""

    type = "agent_failed"


class Unavailable(FunctionError):
    """The function cannot take the request now: it is not ready, its queue is full, or its breaker is open."""

    status = 503
    type = "unavailable"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClientGone(FunctionError):
    """Nobody waits for the answer any more; nobody reads this either."""

    status = 499
    type = "client_gone"


class TimedOut(FunctionError):
    """The answer was not there by the request's deadline."""

    status = 504
    type = "timed_out"


class NoPlace(TimedOut):
    """The same for a stream that others left no place until then: the model itself is well."""


_MOST_TEXT = 1000  # characters of somebody else's text in an error


def bounded(text: str, most: int = _MOST_TEXT) -> str:
    """A text of somebody else's as an error may quote it: the middle of a long one is left out, and UTF-8 can say all of it."""
    if len(text) > most:
        text = f"{text[: most // 2]} … {text[-(most // 2) :]}"
    return text.encode("utf-8", "backslashreplace").decode()
