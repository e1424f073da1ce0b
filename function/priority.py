"""Who is served first: interactive callers before batch work."""

import enum
import re
from collections.abc import Mapping

_URGENCY = re.compile(r"(?:^|,)\s*u=([0-7])\s*(?:[,;]|$)")
_BATCH_URGENCY = 5  # RFC 9218; below it is interactive


class Priority(enum.IntEnum):
    """A class of calls; the lower one goes first. Each has a queue of its own."""

    INTERACTIVE = 0
    BATCH = 1

    @classmethod
    def of_urgency(cls, urgency: int) -> "Priority":
        """The class of an urgency on the scale of RFC 9218, 0 (first) to 7."""
        return cls.BATCH if urgency >= _BATCH_URGENCY else cls.INTERACTIVE

    @classmethod
    def of_header(cls, text: str) -> "Priority":
        """The class that a Priority header (RFC 9218) asks for; interactive if it says nothing that makes sense."""
        found = _URGENCY.search(text) if text else None
        return cls.of_urgency(int(found[1])) if found else cls.INTERACTIVE

    @classmethod
    def of_request(cls, headers: Mapping[str, str]) -> "Priority":
        """The class of a request whose body nobody has read. headers: by name, in lower case.

        A binary event says it in `ce-priority`, which counts before the header Priority, as it does once the event is read.
        """
        said = headers.get("ce-priority", "").strip()
        return cls.of_urgency(int(said)) if said in _URGENCIES else cls.of_header(headers.get("priority", ""))


_URGENCIES = frozenset("01234567")
