"""Lines of the log: one for each message, whatever it quotes, and without secrets.

A text from outside (a URI that somebody asked for, what a store answered) could otherwise write lines of its own.
"""

import contextlib
import logging
import os
import queue
import sys
from collections.abc import Iterator
from typing import Any

from weights_cache.environment import hiding
from weights_cache.excerpt import told
from weights_cache.threads import Threads

MAX_LINE_SIGNS = 2000
MAX_LINES = 1000  # that nobody has read yet
FLUSH_S = 0.5  # for the last of them
_FORM = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LineFormatter(logging.Formatter):
    """Of a traceback, too, each line is marked as one that belongs to the message before.

    What the environment calls a secret is not told, whoever repeats it.
    """

    def __init__(self) -> None:
        super().__init__(_FORM)
        self._hide = hiding(os.environ)

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and those of its traceback indented."""
        first, *rest = super().format(self._plain(record)).split("\n")
        if not record.exc_info and not record.stack_info:
            return first
        return "\n".join([first, *(f"    {told(self._hide(line))}" for line in rest[-60:])])

    def _plain(self, record: logging.LogRecord) -> logging.LogRecord:
        plain = logging.makeLogRecord(record.__dict__)
        plain.msg, plain.args = told(self._hide(record.getMessage()), MAX_LINE_SIGNS), None
        return plain


class Unhurried(logging.Handler):
    """Has a thread write the lines, so that nobody waits for whoever reads them; once too many wait, lines are lost, and counted."""

    def __init__(self, to: "logging.StreamHandler[Any]") -> None:
        super().__init__()
        self._to = to
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_LINES)
        self._lost = 0
        self._threads = Threads(lambda name, error: None)  # there is nobody left to tell
        self._threads.start("log", self._write)

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging."""
        self._put(self._to.format(record))

    def _put(self, line: str | None) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            lost, self._lost = self._lost, 0
            self._to.stream.write(f"{line}\n" + (f"{lost} lines of the log were lost, as nobody read them\n" if lost else ""))
            self._to.flush()

    def finish(self, seconds: float) -> None:
        """Wait for what is there to be written, for so long at most."""
        self._put(None)
        self._threads.join(seconds)


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """What has been written by `configure`'s handler is written by a thread meanwhile."""
    root = logging.getLogger()
    before = list(root.handlers)
    unhurried = {
        one: Unhurried(one) for one in before if isinstance(one, logging.StreamHandler) and isinstance(one.formatter, LineFormatter)
    }
    root.handlers = [unhurried.get(one, one) for one in before]  # type: ignore[call-overload]
    try:
        yield
    finally:
        root.handlers = before
        for one in unhurried.values():
            one.finish(FLUSH_S)


def configure() -> None:
    """Have everything that is worth a line written to stderr, unless somebody has seen to that already."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("botocore").setLevel(logging.WARNING)
    for name in ("urllib3", "boto3"):
        logging.getLogger(name).setLevel(logging.WARNING)
