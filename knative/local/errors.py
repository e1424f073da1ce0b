"""What the local platform can tell its user, at start or in an answer."""

from dataclasses import replace

from knative.local.plain import line
from knative.local.trouble import Trouble
from weights_cache.environment import masked


class PlatformError(Exception):
    """Base of every error this package raises on purpose; its text is for the person who has to act, and holds no password of a URL."""

    def __init__(self, text: str = "") -> None:
        super().__init__(masked(text))


class ManifestError(PlatformError):
    """A manifest cannot be used; says in which file and where, what was found and what is allowed."""

    def __init__(self, file: str, where: str, message: str) -> None:
        text = f"{file}: {where}: {message}" if where else f"{file}: {message}"
        # A name from a manifest may hold anything, and the message is to stay one line.
        super().__init__(line(text, len(text)))


class RequestError(PlatformError):
    """Base of what a caller is answered by the platform itself, as opposed to by a pod."""

    status = 503
    type = "unavailable"

    def __init__(self, message: str, *, retry_after_s: float | None = None, trouble: Trouble | None = None) -> None:
        """message: for anybody. trouble: what it is about, whose log is for whoever runs the platform."""
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self._trouble = trouble

    @property
    def whole(self) -> str:
        """What whoever runs the platform is told: with the log of the container that is to blame."""
        return replace(self._trouble, reason=str(self)).whole if self._trouble else str(self)


class Overloaded(RequestError):
    """The activator's queue is full."""

    type = "overloaded"


class RevisionFailed(RequestError):
    """The revision's pods cannot be started."""

    type = "revision_failed"

    def __init__(self, trouble: Trouble, *, retry_after_s: float) -> None:
        super().__init__(trouble.reason, retry_after_s=retry_after_s, trouble=trouble)


class Forbidden(RequestError):
    """A request that another site may have made somebody's browser send."""

    status = 403
    type = "forbidden"


class Stopping(RequestError):
    """The platform is shutting down."""

    type = "stopping"


class BadGateway(RequestError):
    """The pod went away before it answered; whether it did the work is not known."""

    status = 502
    type = "bad_gateway"


class TooSlow(RequestError):
    """The answer was not there within the Service's timeoutSeconds."""

    status = 504
    type = "timed_out"


class PodUnreached(PlatformError):
    """Nothing of the request has reached the pod: another pod may have it."""
