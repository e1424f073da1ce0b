"""What is being sent on a connection: whoever has an answer hands it over and is free; the loop sends what the client is slow to take.

It stands in for the connection's socket where gunicorn writes. Only a stream whose reader falls behind makes its writer wait.
"""

import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

AHEAD_BYTES = 64 * 1024  # unsent, beyond which a writer waits; an answer in one piece is handed over whole
SEND_S = 30.0  # for a client to take what it is sent, and beside that
SEND_BYTES_PER_S = 64 * 1024  # the least that it takes
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_MOST_AT_ONCE = 1 << 20
_GONE = select.POLLERR | select.POLLHUP


class Outbox:
    """One connection's; written to by one thread at a time, sent from by that one or the loop."""

    def __init__(self, sock: socket.socket, on_unsent: Callable[[], object]) -> None:
        """sock: one that does not block. on_unsent: is called, from any thread, when the client does not take all; it must not wait."""
        self.size = 0  # bytes that are unsent
        self.interim = b""  # may be sent before the answer: the client passes over it, if it is still there
        self._sock = sock
        self._on_unsent = on_unsent
        self._lock = threading.Lock()  # guards all of this; held whenever the socket is used, see `give_up`
        self._changed = threading.Condition(self._lock)
        self._pieces: deque[memoryview] = deque()
        self.is_broken = False  # nothing can be sent any more
        self._sent = 0  # bytes, since it was empty
        self._due = (0, math.inf)  # so many of them are to be out by then, on `time.monotonic`'s clock

    def send(self, data: bytes) -> int:
        """As a socket's, of which gunicorn makes use; all of it is taken."""
        self.sendall(data)
        return len(data)

    def sendall(self, data: bytes) -> None:
        """Hand it over. Waits while too much is unsent. Raises OSError if the client is gone, or does not read."""
        with self._lock:
            if self.size > AHEAD_BYTES:
                self._changed.wait_for(lambda: self.size <= AHEAD_BYTES or self.is_broken)
            self.interim = b""
            self._take(data)
            if self.is_broken:
                raise BrokenPipeError("the client is gone, or does not read")

    def shutdown(self, how: int) -> None:
        """As a socket's, for gunicorn, which then leaves the end of the connection to the loop. Raises OSError."""
        raise OSError("the loop ends the connection")

    def close(self) -> None:
        """As a socket's; it does nothing, as `shutdown`."""

    def flush(self) -> bool:
        """Send what the client takes now; whether all is out, or nobody takes it."""
        with self._lock:
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
            return self.is_broken or not self.size

    def give_up(self) -> None:
        """Nobody takes it: what is unsent is forgotten, and whoever writes is told.

        From then on no thread uses the socket, so that it can be closed: its descriptor may be another connection's a moment later.
        """
        with self._lock:
            self._break()
            self._changed.notify_all()

    def is_gone(self) -> bool:
        """Whether the client has hung up; asked by whoever makes the answer.

        One that has closed its side of the connection may have hung up, or be done with sending (`nc -N`) and wait for the answer: the
        kernel cannot tell. If there is an interim answer to send, whoever has hung up refuses it, as is seen at once or when this is asked
        again; whoever waits passes over it.
        """
        with self._lock:
            if self.is_broken:
                return True
            events = self._look()
            if self.interim and events & select.POLLRDHUP and not events & _GONE:
                interim, self.interim = self.interim, b""
                self._take(interim)
                events = self._look()
            return self.is_broken or bool(events & _GONE)

    @property
    def due_at(self) -> float:
        """When the client is too slow, on `time.monotonic`'s clock."""
        return self._due[1] if self.size else math.inf

    def _take(self, data: bytes) -> None:
        """Send it, or keep what the client does not take now."""
        sent = 0 if self.size or self.is_broken else self._try(data)
        if self.is_broken or sent == len(data):
            return
        self._pieces.append(memoryview(data)[sent:])
        self.size += len(data) - sent
        if len(self._pieces) == 1:
            self._sent = 0
            self._expect()
            self._on_unsent()

    def _expect(self) -> None:
        """What is unsent now is to be out in time, however much is added meanwhile."""
        self._due = self._sent + self.size, time.monotonic() + SEND_S + self.size / SEND_BYTES_PER_S

    def _try(self, data: bytes | memoryview) -> int:
        try:
            return self._sock.send(data if len(data) <= _MOST_AT_ONCE else memoryview(data)[:_MOST_AT_ONCE])
        except BlockingIOError:
            return 0
        except OSError:
            self._break()
            return 0

    def _break(self) -> None:
        self.is_broken = True
        self._pieces.clear()
        self.size = 0

    def _look(self) -> int:
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return next((events for _, events in poll.poll(0)), 0)
