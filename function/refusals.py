"""Those who are told no before anybody has looked at more than a head: at once, but not more than a thousand a second, since who is refused
and asks again at once takes the processor from those who are served.
"""

import functools
import re
import time
from collections import deque
from collections.abc import Callable, Iterable

from function import error_shapes
from function.access import Access, finish
from function.connections import Connection
from function.errors import FunctionError, HttpError
from function.http import written

REFUSALS_PER_S = 1000.0
REFUSALS_AT_ONCE = 100
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)


class Refusals:
    """Those of one server; the loop's."""

    def __init__(self, access: Access, conclude: Callable[[Connection, bool], object], is_ending: Callable[[], bool]) -> None:
        """conclude: is told of each whose answer was written, and whether another request may follow. is_ending: no other may."""
        self._access = access
        self._conclude = conclude
        self._is_ending = is_ending
        self._waiting: deque[tuple[Connection, FunctionError, float]] = deque()  # who is still to be told, and since when
        self._allowed = 0.0  # how many may be told now
        self._seen = time.monotonic()

    def add(self, conn: Connection, error: FunctionError) -> None:
        """One more is to be told; its head is the first thing in what was received."""
        self._waiting.append((conn, error, time.monotonic()))

    def __len__(self) -> int:
        return len(self._waiting)

    def tell(self, now: float) -> None:
        """Tell as many as may be told now."""
        self._allowed = min(self._allowed + (now - self._seen) * REFUSALS_PER_S, REFUSALS_AT_ONCE)
        self._seen = now
        while self._waiting and self._allowed >= 1:
            self._allowed -= 1
            self.answer(*self._waiting.popleft())

    def tell_all(self) -> None:
        """Tell all of them."""
        while self._waiting:
            self.answer(*self._waiting.popleft())

    def answer(self, conn: Connection, error: FunctionError, began: float, head: bytes | None = None) -> None:
        """Say no to one. head: of its request, if it is not in what was received any more: then its body is not all there."""
        if not conn.is_open:
            return
        is_whole = False
        if head is None:
            head, _, rest = conn.received.partition(b"\r\n\r\n")
            length = _LENGTH.search(head + b"\r\n")
            is_whole = not self._is_ending() and b"chunked" not in head.lower() and len(rest) == (int(length[1]) if length else 0)
        conn.received = b""
        note, headers = self._access.refused(head, began, error.status)
        said = _reply(error.status, error.type, str(error), error.retry_after_s, error_shapes.shape_of(note.path), is_whole)
        own = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
        status, _, others = said.partition(b"\r\n")
        try:
            conn.sock.sendall(status + b"\r\n" + own + others)
        except OSError:
            pass  # it is not there any more, as is found next
        self._conclude(conn, is_whole)
        if note.is_wanted:
            finish(note)


@functools.lru_cache(64)
def _reply(status: int, kind: str, message: str, retry_after_s: float | None, shape: error_shapes.Shape, is_whole: bool) -> bytes:
    error = HttpError(status, kind, message)
    error.retry_after_s = retry_after_s
    response = written(error, shape)
    return wire(response.status, response.headers, response.get_data(), close=not is_whole)


def wire(status: str, headers: Iterable[tuple[str, str]], body: bytes, *, close: bool) -> bytes:
    """An answer as it goes over the wire."""
    own = (f"{name}: {value}" for name, value in headers if name.lower() != "connection")
    lines = [f"HTTP/1.1 {status}", *own, f"Connection: {'close' if close else 'keep-alive'}"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
