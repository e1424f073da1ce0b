"""What other threads want the loop to do."""

import os
from collections import deque
from collections.abc import Callable, Iterator

from function.connections import Connection

Wish = Callable[[Connection], object]


class Inbox:
    """Filled from any thread, emptied by the loop, which its descriptor wakes."""

    def __init__(self) -> None:
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wishes: deque[tuple[Connection, Wish]] = deque()
        self._is_woken = False  # the loop, and will look into it

    def fileno(self) -> int:
        """The descriptor's; it is ready to be read while there is something to look at."""
        return self._wake

    def put(self, conn: Connection, wish: Wish) -> None:
        """Have the loop do something about a connection."""
        self._wishes.append((conn, wish))
        if not self._is_woken:
            self._is_woken = True
            os.eventfd_write(self._wake, 1)

    def wake(self) -> None:
        """Have the loop look again; also from a signal's handler."""
        os.eventfd_write(self._wake, 1)

    def take(self) -> Iterator[tuple[Connection, Wish]]:
        """What is there now; what is put in meanwhile is for the next time. Call it when the descriptor is ready."""
        os.eventfd_read(self._wake)
        self._is_woken = False  # first, so that nothing that is put in meanwhile is overlooked
        for _ in range(len(self._wishes)):
            yield self._wishes.popleft()
