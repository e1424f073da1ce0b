"""Lines of the log, of which none can be written by somebody else: a message, a sink's answer or a broker's reason holds what it likes."""

import logging
import re
import sys

from weights_cache.environment import masked

MOST = 2000  # characters of a message
MOST_TRACE = 8000  # and of a traceback below it
# Control characters, line ends of other scripts, and what shows text in another order than it has.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def line(text: str, most: int = MOST) -> str:
    """Foreign text on one line, without credentials, of bounded length."""
    if len(text) > most:  # before it is looked at; what follows may be longer by an escape for each character
        text = f"{text[: most // 2]}…{text[len(text) - most // 2 :]}"
    return _UNSAFE.sub(lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}", masked(text))


class LineFormatter(logging.Formatter):
    """One line for each message; those of a traceback are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Called by logging."""
        plain = logging.makeLogRecord(record.__dict__)
        plain.msg, plain.args, plain.exc_info, plain.exc_text = line(record.getMessage()), None, None, None
        first = super().format(plain)
        trace = self.formatException(record.exc_info)[-MOST_TRACE:] if record.exc_info else ""
        return "\n".join([first, *(f"    {line(one)}" for one in trace.splitlines())])


def configure() -> None:
    """Write to stderr what is worth a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("botocore").setLevel(logging.WARNING)
    logging.getLogger("pika").setLevel(logging.ERROR)
