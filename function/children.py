"""The processes below ours: what an agent forks is a plain Python process, and nothing of it outlives the server."""

import contextlib
import ctypes
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

GRACE_S = 1.0  # from SIGTERM to SIGKILL
_STUBBORN_S = 1.0  # for the kernel to end what was killed
_LOOK_S = 0.01

_PR_SET_CHILD_SUBREAPER = 36

Handlers = Mapping[int, Any]


# What is forked


def handlers() -> Handlers:
    """What this process does on each signal, as far as Python knows."""
    return {number: handler for number in signal.valid_signals() if (handler := signal.getsignal(number)) is not None}


def make_plain(plain: Handlers, descriptors: Callable[[], Iterable[int]], ports: Collection[int]) -> None:
    """From now on, have what this process forks begin like a fresh Python.

    That is with these signal handlers, and with nothing behind `descriptors`, asked in the child, and behind sockets at `ports`. A signal
    that comes to a child before that is dealt with as a fresh Python would.
    """
    masks = threading.local()  # of the threads that are forking
    is_plain = False

    def before() -> None:
        masks.mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    def after() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.mask)

    def after_in_child() -> None:
        nonlocal is_plain
        try:
            if not is_plain:  # what a child has made of itself is its own children's, too
                is_plain = True
                _restore(plain)
                _abandon(sockets_at(ports))
                _abandon(descriptors())
        finally:
            after()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after_in_child)


def _restore(plain: Handlers) -> None:
    signal.set_wakeup_fd(-1)
    for number, handler in plain.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _abandon(descriptors: Iterable[int]) -> None:
    """Let go of what is behind these. The numbers stay taken: objects that the server has made still believe that they own them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # -1, of what was being closed just then
            os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)


def sockets_at(ports: Collection[int]) -> list[int]:
    """The descriptors of this process that listen at one of these ports, or are connected there."""
    return [int(name) for name in os.listdir("/proc/self/fd") if _port(int(name)) in ports]  # noqa: PTH208  names are enough


def _port(descriptor: int) -> int | None:
    """At which a socket of the internet's is bound; None for anything else."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return None
        sock = socket.socket(fileno=descriptor)
    except OSError:  # it is not there any more
        return None
    try:
        return sock.getsockname()[1] if sock.family in (socket.AF_INET, socket.AF_INET6) else None
    except OSError:
        return None
    finally:
        sock.detach()


# What is left


def adopt_orphans() -> None:
    """Become the parent of each process below this one whose own parent ends, as process 1 of a container is."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(grace_s: float = GRACE_S) -> None:
    """Return once nothing is left that this process, or what it has adopted, has started: SIGTERM, after `grace_s` SIGKILL."""
    began = time.monotonic()
    told: set[int] = set()
    while _reap() and (took_s := time.monotonic() - began) < grace_s + _STUBBORN_S:
        found = descendants(os.getpid())
        signal_all(found if took_s > grace_s else found - told, signal.SIGKILL if took_s > grace_s else signal.SIGTERM)
        told |= found
        time.sleep(_LOOK_S)


def signal_all(pids: Iterable[int], number: int) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def descendants(pid: int) -> set[int]:
    """The processes below `pid`."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found: set[int] = set()
    todo = [pid]
    while todo:
        new = [child for child in children.get(todo.pop(), ()) if child not in found]
        found.update(new)
        todo += new
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """Each process and its parent."""
    for name in os.listdir("/proc"):  # noqa: PTH208  names are enough
        if name.isdigit():
            with contextlib.suppress(OSError):
                yield int(name), int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])


def _reap() -> bool:
    """Take note of the children that have ended; whether there are others."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True
