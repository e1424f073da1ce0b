"""The process's log on stderr: writing it never holds anybody up, and no line of it can be made by somebody else.

`write` is for whole lines that are safe as they are, such as JSON. All else goes through `logging`, whose records `LineFormatter` makes
safe.
"""

import logging
import os
import re
import select
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import orjson

from weights_cache.environment import hiding, masked

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
MOST_RECORD = 16 * 1024  # characters of one record
MOST_QUEUED_BYTES = 1 << 20
FLUSH_S = 1.0  # for the last lines, at the end of the process
_PIECE_BYTES = select.PIPE_BUF  # a pipe that is ready takes so many without waiting, and keeps them together

# What moves a terminal's cursor, ends a line for some reader, or shows text in another order than it has
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

log = logging.getLogger("relight.function")


class LogWriter:
    """Writes to a descriptor without ever waiting for whoever reads it.

    What the descriptor takes at once is written at once, so that it stays in order with what others print; the rest waits for a thread.
    Once too much waits, lines are lost until all that waits is out; then a line says how many.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._begin()
        os.register_at_fork(after_in_child=self._begin)  # what was queued is the parent's to write, and so is the lock

    def _begin(self) -> None:
        self._changed = threading.Condition()  # guards what follows; a signal handler may write while its own thread holds it
        self._queue: deque[bytes] = deque()  # the first one is being written
        self._queued_bytes = 0
        self._lost = 0  # lines
        self._thread: threading.Thread | None = None
        self._can_refuse = True  # the kernel can be told not to wait; otherwise it is asked before

    def write(self, data: bytes) -> None:
        """Have whole lines written; returns at once and raises nothing. From any thread, and from signal handlers."""
        with self._changed:
            if self._lost or self._queued_bytes + len(data) > MOST_QUEUED_BYTES:
                self._lost += data.count(b"\n")
            elif rest := data if self._queue else self._offer(data):
                self._put(rest)
            if self._queue or self._lost:
                self._wake()

    def flush(self, timeout_s: float) -> None:
        """Until all is written, so long at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._lost, timeout_s)

    def _offer(self, data: bytes) -> bytes:
        """Write what is taken at once; returns the rest."""
        try:
            while data and (taken := self._write_at_once(data[:_PIECE_BYTES])):
                data = data[taken:]
        except BlockingIOError:
            return data
        except OSError:
            return b""  # nobody can read it any more
        return data

    def _write_at_once(self, piece: bytes) -> int:
        """How much of it was written. Raises OSError."""
        if self._can_refuse:
            try:
                return os.pwritev(self._fd, [piece], -1, os.RWF_NOWAIT)
            except BlockingIOError:
                return 0
            except OSError:  # a kind of file, or a kernel, that does not know this
                self._can_refuse = False
        if os.isatty(self._fd) or not _poll(self._fd, 0):  # a terminal says that it is ready when it would take less than this
            return 0
        return os.write(self._fd, piece)

    def _put(self, data: bytes) -> None:
        size = len(data)  # not in one line with the sum: a signal handler that writes could come between
        self._queue.append(data)
        self._queued_bytes += size

    def _wake(self) -> None:
        if self._thread:
            self._changed.notify_all()
            return
        self._thread = threading.Thread(target=self._drain, name="log", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread can be had now; the next line tries again
            self._thread = None

    def _drain(self) -> None:
        """Write what is queued, in a thread of its own."""
        while True:
            data = self._next()
            self._write_out(data)
            with self._changed:
                self._queue.popleft()
                size = len(data)
                self._queued_bytes -= size

    def _next(self) -> bytes:
        with self._changed:
            while not self._queue:
                if self._lost:
                    lost, self._lost = self._lost, 0
                    self._put(_record(f"{lost} lines of the log were lost, as nobody read them"))
                else:
                    self._changed.notify_all()  # those who flush
                    self._changed.wait()
            return self._queue[0]

    def _write_out(self, data: bytes) -> None:
        while data:
            _poll(self._fd, None)
            try:
                data = data[os.write(self._fd, data[:_PIECE_BYTES]) :]
            except BlockingIOError:
                continue
            except OSError:
                return  # nobody can read it any more


class LineFormatter(logging.Formatter):
    """A record as text in which only our own first line begins at the left margin, without control characters and credentials."""

    def __init__(self, form: str, hide: Callable[[str], str] = masked) -> None:
        """hide: what takes credentials out of a text."""
        super().__init__(form)
        self._hide = hide

    def format(self, record: logging.LogRecord) -> str:
        """The record, of bounded length. Called by logging."""
        text = cut(super().format(record), 4 * MOST_RECORD)  # so that what follows takes no longer for a longer one
        return cut(_UNSAFE.sub(_escaped, self._hide(text)).replace("\n", "\n    "))


class LogHandler(logging.Handler):
    """Hands each record to a writer."""

    def __init__(self, writer: LogWriter, hide: Callable[[str], str] = masked) -> None:
        """hide: see LineFormatter."""
        super().__init__()
        self._writer = writer
        self.setFormatter(LineFormatter(FORMAT, hide))

    def emit(self, record: logging.LogRecord) -> None:
        """Write it. Called by logging."""
        try:
            text = self.format(record)
        except Exception as error:  # noqa: BLE001  whatever an argument of the message does when it is printed
            kind = type(error).__name__
            text = self.format(_made(f"a message cannot be written, {kind}: {record.pathname}, line {record.lineno}", record.name))
        self._writer.write(_encoded(text))

    def flush(self) -> None:
        """Wait for a moment for all to be written; `logging.shutdown` calls it."""
        self._writer.flush(FLUSH_S)


class OwnLogger(logging.Logger):
    """One of ours: whatever an agent makes of `logging`, such as a configuration that silences all other loggers, it writes on."""

    disabled = property(lambda self: False, lambda self, value: None)

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802  logging's name
        """By its own level alone."""
        return level >= self.level

    def makeRecord(self, *args: Any, extra: Any = None, **more: Any) -> logging.LogRecord:  # noqa: N802  logging's name
        """Python's own, whatever factory an agent has set."""
        name, level, file, line, message, values, error, *others = args
        function, stack = (*others, None, None)[0], more.get("sinfo", others[2] if len(others) > 2 else None)
        return logging.LogRecord(name, level, file, line, message, values, error, more.get("func", function), stack)


def json_line(said: dict[str, Any]) -> bytes:
    """A JSON object as a line to `write`; each of its characters takes six bytes at most."""
    line = orjson.dumps(said)
    if not line.isascii() or b"\x7f" in line:
        line = _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", line.decode()).encode()
    return line + b"\n"


def cut(text: str, most: int = MOST_RECORD) -> str:
    """A text of bounded length: of one that is longer the middle is left out, and what stands there says so."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}    … {len(text) - 2 * half} characters left out …    {text[-half:]}"


def _poll(fd: int, timeout_ms: int | None) -> bool:
    """Whether it can be written to, or never again; None waits for that."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(timeout_ms))


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def _made(message: str, name: str) -> logging.LogRecord:
    return logging.makeLogRecord({"levelno": logging.WARNING, "levelname": "WARNING", "name": name, "msg": message})


def _record(message: str) -> bytes:
    return _encoded(LineFormatter(FORMAT).format(_made(message, log.name)))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace") + b"\n"


OURS = ("relight.function", "relight.weights")
STDERR = LogWriter(2)
write = STDERR.write


def install(level: int = logging.INFO) -> None:
    """Have all of the process's log written here: that of `logging`, of gunicorn, warnings, and errors that nobody caught."""
    _hold(2)
    handler = LogHandler(STDERR, hiding(os.environ))
    logging.basicConfig(level=level, handlers=[handler])
    for name in OURS:
        own = logging.getLogger(name)
        own.__class__ = OwnLogger
        own.handlers, own.propagate = [handler], False
        own.setLevel(level)
    logging.getLogger("gunicorn.error").addHandler(handler)  # whose records go no further; its own handler is off by `errorlog`
    logging.captureWarnings(True)
    threading.excepthook = _thread_failed
    sys.unraisablehook = _unraisable


def _hold(fd: int) -> None:
    """Keep a descriptor that is closed from becoming that of another file, or of a caller's connection."""
    try:
        os.fstat(fd)
    except OSError:
        found = os.open(os.devnull, os.O_WRONLY)
        if found != fd:
            os.dup2(found, fd)
            os.close(found)


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_type is not SystemExit:
        name = failed.thread.name if failed.thread else "?"
        log.error("the thread %r ended by an error", name, exc_info=failed.exc_value)


def _unraisable(failed: Any) -> None:
    log.error("%s: %.200r", failed.err_msg or "an error that nobody could be told of", failed.object, exc_info=failed.exc_value)
