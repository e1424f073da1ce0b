"""What is being sent on a connection: whoever has an answer hands it over and is free; the loop sends what the client is slow to take.

It stands in for the connection's socket where gunicorn writes. Only a stream whose reader falls behind makes its writer wait.
"""

import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

AHEAD_BYTES = 64 * 1024  # unsent, beyond which a writer waits; an answer in one piece is handed over whole
SEND_S = 30.0  # for a client to take what it is sent, and beside that
SEND_BYTES_PER_S = 64 * 1024  # the least that it takes
_MOST_AT_ONCE = 1 << 20


class Outbox:
    """One connection's; written to by one thread at a time, sent from by that one or the loop."""

    def __init__(self, sock: socket.socket, on_unsent: Callable[[], object]) -> None:
        """sock: one that does not block. on_unsent: is called, from any thread, when the client does not take all at once."""
        self.size = 0  # bytes that are unsent
        self._sock = sock
        self._on_unsent = on_unsent
        self._changed = threading.Condition(threading.Lock())  # guards all that follows, and `size`
        self._pieces: deque[memoryview] = deque()
        self._is_broken = False
        self._sent = 0  # bytes, since it was empty
        self._due = (0, math.inf)  # so many of them are to be out by then, on `time.monotonic`'s clock

    def fileno(self) -> int:
        """The socket's."""
        return self._sock.fileno()

    def send(self, data: bytes) -> int:
        """As a socket's, of which gunicorn makes use; all of it is taken."""
        self.sendall(data)
        return len(data)

    def sendall(self, data: bytes) -> None:
        """Hand it over. Waits while too much is unsent. Raises OSError if the client is gone, or does not read."""
        with self._changed:
            self._changed.wait_for(lambda: self.size <= AHEAD_BYTES or self._is_broken)
            rest = memoryview(data)
            if not self.size:
                rest = rest[self._try(rest) :]
            if self._is_broken:
                raise BrokenPipeError("the client is gone, or does not read")
            if not rest:
                return
            is_first = not self.size
            self._pieces.append(rest)
            self.size += len(rest)
            if is_first:
                self._sent = 0
                self._expect()
        if is_first:
            self._on_unsent()

    def shutdown(self, how: int) -> None:
        """As a socket's, for gunicorn, which then leaves the end of the connection to the loop. Raises OSError."""
        raise OSError("the loop ends the connection")

    def flush(self) -> bool:
        """Send what the client takes now; whether all is out, or nobody takes it."""
        with self._changed:
            while self._pieces and (sent := self._try(self._pieces[0])):
                self.size -= sent
                self._sent += sent
                if sent == len(self._pieces[0]):
                    self._pieces.popleft()
                else:
                    self._pieces[0] = self._pieces[0][sent:]
            if self._sent >= self._due[0]:
                self._expect()
            self._changed.notify_all()
            return self._is_broken or not self.size

    def give_up(self) -> None:
        """Nobody takes it: what is unsent is forgotten, and whoever writes is told."""
        with self._changed:
            self._is_broken = True
            self._pieces.clear()
            self.size = 0
            self._changed.notify_all()

    @property
    def is_broken(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._is_broken

    @property
    def due_at(self) -> float:
        """When the client is too slow, on `time.monotonic`'s clock."""
        return self._due[1] if self.size else math.inf

    def _expect(self) -> None:
        """What is unsent now is to be out in time, however much is added meanwhile."""
        self._due = self._sent + self.size, time.monotonic() + SEND_S + self.size / SEND_BYTES_PER_S

    def _try(self, data: memoryview) -> int:
        try:
            return self._sock.send(data[:_MOST_AT_ONCE], socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            self._is_broken = True
            self._pieces.clear()
            self.size = 0
            return 0
