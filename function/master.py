"""The first process: it holds the port open, has the worker as its child, and ends with it."""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from gunicorn import sock
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from function import children
from function.ending import END_S, HURRY_S

log = logging.getLogger("relight.function")

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)
# What a worker puts into its file for the master: that the log says already why it ends, or that SIGTERM told it to.
HAS_EXPLAINED, WAS_TOLD = "!", "~"
_LATE_S = 1.5  # beyond the time that the worker's end is given, before it is killed


class Master(Arbiter):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's own, but for how it ends: with its worker, whatever ended that, and with nothing left behind."""

    LISTENERS: list[Any]
    _is_ending = False
    _last_line: str | None = None  # what the log is to end with

    def spawn_worker(self) -> None:
        """Fork; returns here alone. Signals that come meanwhile wait until the worker has its own handlers. Called by gunicorn."""
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        try:
            super().spawn_worker()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)

    def reap_workers(self) -> None:
        """Take note of who has ended. A worker that nobody told to ends the server, for whoever runs it to see. Called by gunicorn."""
        for pid, status in _ended_children():
            if worker := self.WORKERS.pop(pid, None):
                note = os.pread(worker.tmp.fileno(), 4096, 0).decode(errors="replace")
                worker.tmp.close()
                if note[:1] == WAS_TOLD and not status and not self._is_ending:
                    status = signal.SIGTERM  # it ended as it was told, and we were not: somebody has meant the worker alone
                reason = note[1:] or None if note[:1] == HAS_EXPLAINED else obituary(status)
                if not self._is_ending:
                    raise HaltServer(reason, exit_status(status))
                self._last_line = self._last_line or (reason if status else None)

    def stop(self, graceful: bool = True) -> None:
        """End the worker, and wait for that for the grace time at most; then end what it has left. Called by gunicorn."""
        self._is_ending = True
        sock.close_sockets(self.LISTENERS, unlink=False)
        self.LISTENERS = []
        self.kill_workers(signal.SIGTERM if graceful else signal.SIGQUIT)
        hurry_s = 2 * HURRY_S + _LATE_S
        ends = time.monotonic() + (self.cfg.graceful_timeout + END_S + _LATE_S if graceful else hurry_s)
        while self.WORKERS and (left_s := ends - time.monotonic()) > 0:
            if not {signal.SIGINT, signal.SIGQUIT}.isdisjoint(self.wait_for_signals(left_s)):  # SIGCHLD is one, too
                self.kill_workers(signal.SIGQUIT)
                ends = min(ends, time.monotonic() + hurry_s)
            self.reap_workers()
        if self.WORKERS:
            self._last_line = "the function's process was killed: it did not end in time"
            self.kill_workers(signal.SIGKILL)
        children.end_descendants()

    def halt(self, reason: str | None = None, exit_status: int = 0) -> None:
        """The end: SystemExit. Called by gunicorn."""
        self.stop()
        if last_line := reason or self._last_line:
            log.error("%s", last_line)
        sys.exit(exit_status)

    def _ignore(self) -> None:
        """There is one model, in one process, with settings that do not change: nothing to load again, and no more or less of it."""

    handle_hup = handle_ttin = handle_ttou = handle_usr1 = handle_usr2 = handle_winch = _ignore


def _ended_children() -> Iterator[tuple[int, int]]:
    """The children that have ended, and how."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        yield pid, status


def exit_status(status: int) -> int:
    """The exit status that tells how a process ended, of what `waitpid` says: its own, or 128 and the signal's number."""
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def obituary(status: int) -> str:
    """How the worker ended, of what `waitpid` says, when nobody has told it to."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"the function's process ended by itself with status {code}"
    hints: dict[int, str] = {signal.SIGKILL: ": the kernel may have ended it for want of memory; raise the container's memory limit"}
    hints |= dict.fromkeys(_CRASHES, ": native code has failed; above is where Python was")
    return f"the function's process was ended by {_name(-code)}{hints.get(-code, '')}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
