"""Lines of the log, of which none can be written by somebody else: a message, a sink's answer or a broker's reason holds what it likes."""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable

from weights_cache.environment import hiding, masked

MOST = 2000  # characters of a message
MOST_TRACE = 8000  # and of a traceback below it
MOST_A_MINUTE = 30  # lines of one kind
MINUTE_S = 60.0
KINDS = 200  # that are told apart
# Control characters, line ends of other scripts, and what shows text in another order than it has.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def line(text: str, most: int = MOST) -> str:
    """Foreign text on one line, without credentials, of bounded length."""
    if len(text) > most:  # before it is looked at; what follows may be longer by an escape for each character
        text = f"{text[: most // 2]}…{text[len(text) - most // 2 :]}"
    return _UNSAFE.sub(lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}", masked(text))


class LineFormatter(logging.Formatter):
    """One line for each message; those of a traceback are indented. What the environment calls a secret is not told, whoever repeats it."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self._hide = hiding(os.environ)

    def format(self, record: logging.LogRecord) -> str:
        """Called by logging."""
        plain = logging.makeLogRecord(record.__dict__)
        plain.msg, plain.args, plain.exc_info, plain.exc_text = line(self._hide(record.getMessage())), None, None, None
        first = super().format(plain)
        trace = self.formatException(record.exc_info)[-MOST_TRACE:] if record.exc_info else ""
        return "\n".join([first, *(f"    {line(one)}" for one in self._hide(trace).splitlines())])


class Seldom(logging.Filter):
    """Lets so many lines of one kind through in a minute, and then tells how many there were: a queue or a sink may be away for hours.

    A message that can never succeed has its line in any case: nothing else names it.
    """

    def __init__(self, most: int = MOST_A_MINUTE, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows
        self._kinds: dict[str, tuple[float, int]] = {}  # by the text without its values: when its minute began, and its lines since then

    def filter(self, record: logging.LogRecord) -> bool:
        """Called by logging."""
        if record.levelno >= logging.ERROR:
            return True
        kind, now = str(record.msg), self._clock()
        with self._lock:
            began, count = self._kinds.get(kind, (now, 0))
            if now - began >= MINUTE_S:
                if (left_out := count - self._most) > 0:
                    record.msg, record.args = f"{record.getMessage()} ({left_out} more like it were left out)", ()
                began, count = now, 0
            self._kinds[kind] = began, count + 1
            if len(self._kinds) > KINDS:
                del self._kinds[next(iter(self._kinds))]
            return count < self._most


def configure() -> None:
    """Write to stderr what is worth a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Seldom())
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("botocore").setLevel(logging.WARNING)
    logging.getLogger("pika").setLevel(logging.ERROR)
