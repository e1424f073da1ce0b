"""Lines of the log: one for each message, whatever it quotes, and without secrets.

A text from outside (a URI that somebody asked for, what a store answered) could otherwise write lines of its own.
"""

import logging
import sys

from weights_cache.excerpt import told

MAX_LINE_SIGNS = 2000
_FORM = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LineFormatter(logging.Formatter):
    """Of a traceback, too, each line is marked as one that belongs to the message before."""

    def __init__(self) -> None:
        super().__init__(_FORM)

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and those of its traceback indented."""
        first, *rest = super().format(self._plain(record)).split("\n")
        if not record.exc_info and not record.stack_info:
            return first
        return "\n".join([first, *(f"    {told(line)}" for line in rest[-60:])])

    def _plain(self, record: logging.LogRecord) -> logging.LogRecord:
        plain = logging.makeLogRecord(record.__dict__)
        plain.msg, plain.args = told(record.getMessage(), MAX_LINE_SIGNS), None
        return plain


def configure() -> None:
    """Have everything that is worth a line written to stderr, unless somebody has seen to that already."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("botocore").setLevel(logging.WARNING)
    for name in ("urllib3", "boto3"):
        logging.getLogger(name).setLevel(logging.WARNING)
