"""The end of the worker's process: orderly, as that of a Python program is, and bounded, as that of a server must be.

After the last answer, or the failure: the agent is closed in its thread; the functions of `atexit` run in the main thread; all output is
written; `os._exit`, since the model's thread may be in a call that never returns.
"""

import atexit
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any, NoReturn

from function import children
from function.process import explain

log = logging.getLogger("relight.function")

CLOSE_S = 3.0  # for the agent to be closed after a failure; otherwise it has what is left of the grace time
END_S = 4.0  # for all that comes after
HURRY_S = 1.0  # in place of each of them, if nobody wants to wait
_EXECUTORS_S = 1.0  # of END_S, for the executors' threads and processes
_LAST_LINE_S = 1.0  # for the last line in the log
_LOOK_S = 0.05
_AGAIN_S = 0.5

_QUITTING = (signal.SIGINT, signal.SIGQUIT)
_FAILING = signal.SIGUSR1


class Ending:
    """Ends the process in which it is made. From `arm` on, SIGINT and SIGQUIT end it without waiting for what is running."""

    def __init__(
        self,
        close: Callable[[float], bool],
        *,
        drain_s: float,
        ports: Collection[int],
        on_failure: Callable[[], object] = lambda: None,
        flush: Callable[[float], object] = lambda timeout_s: None,
    ) -> None:
        """close: the agent, within so many seconds. ports: the server's. on_failure: told in the model's thread. flush: the log."""
        self._close = close
        self._drain_s = drain_s
        self._ports = ports
        self._on_failure = on_failure
        self._flush = flush
        self._pid, self._parent = os.getpid(), os.getppid()
        self._told_at: float | None = None  # by SIGTERM
        self._status = 0
        self._has_failed = False
        self._is_hurried = False
        self._is_leaving = threading.Event()
        self._ends = 0.0  # when the rest is cut off

    def arm(self) -> None:
        """In the main thread, once gunicorn has set its own handlers."""
        for number in _QUITTING:
            signal.signal(number, self._on_quit)
        signal.signal(_FAILING, self._on_failing)

    def told(self) -> None:
        """SIGTERM has come: the grace time begins."""
        self._told_at = self._told_at or time.monotonic()

    def fail(self, status: int, error: BaseException | None = None) -> None:
        """End the process from another thread, with this status: nobody can be answered any more. Returns once that is under way."""
        if os.getpid() != self._pid:  # an agent's child that came back from the agent
            self._write_out()
            os._exit(status)
        self._status, self._has_failed = status, True
        for step in (lambda: _say(explain(error)), self._on_failure, lambda: _shut(self._ports)):
            with contextlib.suppress(BaseException):  # what an agent raised, or has used up, is not to keep the process from its end
                step()
        for _ in range(int(END_S / _AGAIN_S)):
            signal.pthread_kill(threading.main_thread().ident or 0, _FAILING)
            if self._is_leaving.wait(_AGAIN_S):
                return
        os._exit(status)  # the main thread is stuck

    def leave(self, status: int = 0) -> NoReturn:
        """End the process; in the main thread."""
        self._status = self._status or status
        self._is_leaving.set()
        with contextlib.suppress(SystemExit):  # in a hurry
            self._close_agent()
        for number in (*_QUITTING, signal.SIGTERM):
            signal.signal(number, self._on_hurry)
        self._ends = time.monotonic() + (HURRY_S if self._is_hurried else END_S)
        self._guard()
        _end_executors()
        atexit._run_exitfuncs()  # noqa: SLF001  the interpreter's own end would wait for the model's thread
        if os.getppid() != self._parent:  # which would have done it
            children.end_descendants(HURRY_S / 2)
        self._write_out()
        os._exit(self._status)

    # Signals; in the main thread

    def _on_quit(self, number: int, frame: FrameType | None) -> None:
        if not self._is_hurried:
            self._is_hurried = True
            raise SystemExit(self._status)

    def _on_failing(self, number: int, frame: FrameType | None) -> None:
        if self._has_failed and not self._is_leaving.is_set():
            raise SystemExit(self._status)

    def _on_hurry(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGTERM:
            self._ends = min(self._ends, time.monotonic() + HURRY_S)

    # The steps

    def _close_agent(self) -> None:
        began = time.monotonic()
        seconds = HURRY_S if self._is_hurried else CLOSE_S
        if self._told_at is not None and not self._is_hurried and not self._has_failed:
            seconds = max(0.0, self._told_at + self._drain_s - began)
        if not self._close(seconds) and time.monotonic() - began >= seconds:
            log.warning("the agent was not closed: its thread was busy for %.1f s after the last answer", seconds)

    def _write_out(self) -> None:
        """Everything that was said is out."""
        with contextlib.suppress(Exception):
            logging.shutdown()
        with contextlib.suppress(Exception):
            self._flush(END_S)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    # What sees to it that it ends

    def _guard(self) -> None:
        """Have the rest cut off in time. What lets no other thread run is the kernel's to end."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, END_S + 2 * _LAST_LINE_S)
        with contextlib.suppress(RuntimeError):  # no more threads
            threading.Thread(target=self._watch, name="end", daemon=True).start()

    def _watch(self) -> None:
        """First end the processes that the agent has left running, as a plain Python would wait for them; then this one."""
        children_at = (time.monotonic() + self._ends) / 2
        while (now := time.monotonic()) < self._ends:
            if now > children_at:
                children_at = self._ends
                children.signal_all(children.descendants(self._pid), signal.SIGTERM)
            time.sleep(_LOOK_S)
        with contextlib.suppress(RuntimeError):  # the log may not be taken
            threading.Thread(target=self._exit_after, args=(_LAST_LINE_S,), daemon=True).start()
        log.error("the end of the process was cut off: it took too long in %s", _position())
        self._flush(_LAST_LINE_S)
        os._exit(self._status)

    def _exit_after(self, seconds: float) -> None:
        time.sleep(seconds)
        os._exit(self._status)


def _say(explanation: str | None) -> None:
    if explanation:
        log.error("%s", explanation)


def _end_executors() -> None:
    """What `concurrent.futures` does at the end of the main thread, before `atexit`; waits no longer than is good for what follows."""
    functions: list[Callable[[], Any]] = list(getattr(threading, "_threading_atexits", ()))

    def run() -> None:
        for function in reversed(functions):
            with contextlib.suppress(Exception):
                function()

    with contextlib.suppress(RuntimeError):  # no more threads
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(_EXECUTORS_S)


def _shut(ports: Collection[int]) -> None:
    """Listen no more, in no process, and end all connections: who called gets no answer here."""
    for descriptor in children.sockets_at(ports):
        with contextlib.suppress(OSError):
            sock = socket.socket(fileno=os.dup(descriptor))
            with sock:
                sock.shutdown(socket.SHUT_RDWR)


def _position() -> str:
    """What the main thread is in: the function that the end has called, and where that is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001  there is no other name for it
    called: FrameType | None = None
    while frame is not None and frame.f_code.co_filename != _position.__code__.co_filename:
        called, frame = frame, frame.f_back
    if called is None:
        return "what was still to be written"
    return f"{called.f_code.co_qualname} ({called.f_code.co_filename}:{called.f_lineno})"
