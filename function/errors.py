"""What a caller can be told.

request → parse (Unauthorized, Forbidden, BadInput, NotFound, TooLarge, TooSlow, UnsupportedMediaType) → admit (Unavailable) → agent
(AgentFailed, TimedOut, CannotStream) → reply. Each error knows its HTTP status; only these reach the caller, anything else stays in the
log.
"""

import logging

log = logging.getLogger("relight.function")


class FunctionError(Exception):
    """Base of what callers are told. `retry_after_s`: when the same request may succeed, unchanged."""

    status = 500
    type = "internal_error"
    retry_after_s: float | None = None


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


class TooSlow(FunctionError):
    """The body stopped coming."""

    status = 408
    type = "too_slow"


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


def to_function_error(error: Exception) -> FunctionError:
    """What the caller is told of what the agent raised; the log has the rest."""
    if isinstance(error, FunctionError):
        return error
    log.error("the agent failed", exc_info=error)
    return AgentFailed("the model failed on this request; the function's log says why")
