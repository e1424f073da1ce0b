"""File descriptors: as many as the machine allows for the platform, as many as before for its pods, and what is said when they run out."""

import errno
import os
import resource
import time
from collections.abc import Callable

from knative.local.errors import PlatformError

NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # of a call that would have opened one
MOST = 1 << 20  # Linux's own limit for a process, unless somebody has raised it
STEADY_S = 10.0  # without want, until it is said to be over
QUIET_S = 60.0  # from then until it is said again


class NoDescriptors(PlatformError):
    """A connection could not be opened for want of a file descriptor, or of a port: who was to be reached has no part in it."""

    @staticmethod
    def explains(error: OSError) -> bool:
        """Whether it is that."""
        return error.errno in (*NO_ROOM, errno.EADDRNOTAVAIL)


def raise_limit() -> None:
    """Let this process open as many files as it may, and those that it starts as many as before.

    Some programs go through all numbers below their limit, or use select(), which knows 1,024 of them.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if hard == resource.RLIM_INFINITY else min(MOST, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        os.register_at_fork(after_in_child=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))


def as_before() -> None:
    """For the `preexec_fn` of a process that has no other: without one, what is registered for a fork is not done."""


class Descriptors:
    """How many are left; says when they run out, and when there are some again."""

    def __init__(self, say: Callable[[str], object], limit: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """limit: the process's own, unless a test has another."""
        self._say = say
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._limit = limit or (MOST if soft == resource.RLIM_INFINITY else soft)
        self._clock = clock
        self._missed_at = self._over_at = float("-inf")  # when one was last missing, and when that was last said to be over
        self._is_told = False

    def has_room(self, share: float) -> bool:
        """Whether one may be used by those who are to leave the rest of all that there may be to others."""
        try:
            lowest = os.dup(0)  # the lowest number that is free
        except OSError as error:
            return error.errno not in NO_ROOM
        os.close(lowest)
        return lowest < self._limit * share

    def missed(self) -> None:
        """One was wanted, and there was none."""
        self._missed_at = self._clock()
        if not self._is_told and self._missed_at - self._over_at > QUIET_S:
            self._is_told = True
            limit = f"(ulimit -n: {self._limit})"
            self._say(f"[yellow]file descriptors run out[/] {limit}: connections at rest are closed, and new ones wait until there is room")

    def look(self) -> None:
        """From time to time: whether it is over."""
        if self._is_told and self._clock() - self._missed_at > STEADY_S:
            self._is_told = False
            self._over_at = self._clock()
            self._say("there are file descriptors again")
