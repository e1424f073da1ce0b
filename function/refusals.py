"""Those who are told no before anybody has looked at more than a head: at once, but not more than a thousand a second, since who is refused
and asks again at once takes the processor from those who are served.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable

from function import error_shapes
from function.access import Access
from function.connections import Connection
from function.errors import FunctionError, HttpError
from function.http import written

REFUSALS_PER_S = 1000.0
REFUSALS_AT_ONCE = 100


class Refusals:
    """Those of one server; the loop's."""

    def __init__(self, access: Access, reply: Callable[[Connection, bytes], object]) -> None:
        """reply: sends an answer that says itself whether the connection ends, as `is_last` of it says, too."""
        self._access = access
        self._reply = reply
        self.waiting: deque[tuple[Connection, FunctionError, float]] = deque()  # who is still to be told, and since when
        self._allowed = 0.0  # how many may be told now
        self._seen = time.monotonic()

    def add(self, conn: Connection, error: FunctionError) -> None:
        """One more is to be told."""
        self.waiting.append((conn, error, time.monotonic()))

    def tell(self, now: float) -> None:
        """Tell as many as may be told now."""
        self._allowed = min(self._allowed + (now - self._seen) * REFUSALS_PER_S, REFUSALS_AT_ONCE)
        self._seen = now
        while self.waiting and self._allowed >= 1:
            self._allowed -= 1
            self.answer(*self.waiting.popleft())

    def tell_all(self) -> None:
        """Tell all of them."""
        while self.waiting:
            self.answer(*self.waiting.popleft())

    def answer(self, conn: Connection, error: FunctionError, began: float) -> None:
        """Say no to one, whose head is known; not all of its body may be there."""
        if not conn.is_open:
            return
        conn.note, headers = self._access.refused(conn.parsed.removesuffix(b"\r\n\r\n"), began, error.status)
        shape = error_shapes.shape_of(conn.note.path)
        said = _reply(error.status, error.type, str(error), error.retry_after_s, shape, conn.is_last)
        own = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
        status, _, others = said.partition(b"\r\n")
        self._reply(conn, status + b"\r\n" + own + others)


@functools.lru_cache(64)
def _reply(status: int, kind: str, message: str, retry_after_s: float | None, shape: error_shapes.Shape, is_last: bool) -> bytes:
    error = HttpError(status, kind, message)
    error.retry_after_s = retry_after_s
    response = written(error, shape)
    return wire(response.status, response.headers, response.get_data(), close=is_last)


def wire(status: str, headers: Iterable[tuple[str, str]], body: bytes, *, close: bool) -> bytes:
    """An answer as it goes over the wire."""
    own = [f"{name}: {value}" for name, value in headers if name.lower() != "connection"]
    lines = [f"HTTP/1.1 {status}", *own, f"Connection: {'close' if close else 'keep-alive'}"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
