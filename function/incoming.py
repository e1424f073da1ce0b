"""A request's body as it comes, in however many segments: how much is there, and where it ends.

The loop feeds it, so that a slow sender holds no thread. With a Content-Length it ends there; chunked (RFC 9112, section 7.1) it ends with
the last chunk and its trailers, which nobody here wants.
"""

import re

from function.errors import BadInput, FunctionError, TooLarge

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t -~]*)?")
_MOST_LINE = 4096  # bytes of a line of the framing
_MOST_TRAILERS = 16 * 1024


class Body:
    """The body of one request, of known length. Once it `is_whole`, either `take` has it, or `error` says why there is none."""

    def __init__(self, length: int, limit: int) -> None:
        """length, limit: in bytes; a longer one than the limit is an error, and is not kept."""
        self.error: FunctionError | None = None
        self.is_whole = length == 0
        self.size = 0  # bytes that are kept
        self._limit = limit
        self._left = length  # of the body, or of the present chunk
        self._pieces: list[bytes] = []
        if length > limit:
            self._fail_large()

    def feed(self, data: bytes) -> bytes:
        """More has come; returns what is behind the body."""
        data = self._keep(data)
        self.is_whole = self.is_whole or not self._left
        return data

    def fail(self, error: FunctionError) -> None:
        """There will be no body: what came of it is forgotten, and what still comes is not known."""
        error.ends_connection = True
        self.error, self.is_whole, self.size, self._pieces = error, True, 0, []

    def take(self) -> bytes:
        """All of it, once."""
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def put_back(self, data: bytes) -> None:
        """What was taken, for somebody else to take."""
        self._pieces = [data]

    def _keep(self, data: bytes) -> bytes:
        piece = data[: self._left]
        self._left -= len(piece)
        self.size += len(piece)
        self._pieces.append(piece)
        return data[len(piece) :]

    def _fail_large(self) -> None:
        self.fail(TooLarge(f"the body is larger than {self._limit} bytes (FUNCTION_MAX_BODY_BYTES)"))


class ChunkedBody(Body):
    """One that says its length piece by piece."""

    def __init__(self, limit: int) -> None:
        super().__init__(0, limit)
        self.is_whole = False
        self._framing = b""  # what has come of a line that is not all there
        self._expects = self._size_line  # what is next once a chunk's data are all there

    def feed(self, data: bytes) -> bytes:
        """More has come; returns what is behind the body."""
        while data and not self.is_whole:
            if self._left:
                data = self._keep(data)
                continue
            data, self._framing = self._framing + data, b""
            used = self._expects(data)
            if used == 0:  # not all there
                self._framing, data = data, b""
            data = data[used:]
        return data

    def _size_line(self, data: bytes) -> int:
        end = data.find(b"\r\n", 0, _MOST_LINE)
        if end < 0:
            if len(data) >= _MOST_LINE:
                self._fail(data)
            return 0
        found = _SIZE_LINE.fullmatch(data, 0, end)
        if not found:
            self._fail(data[:end])
            return 0
        self._left = int(found[1], 16)
        self._expects = self._end_of_chunk if self._left else self._trailers
        if self.size + self._left > self._limit:
            self._fail_large()
        return end + 2

    def _end_of_chunk(self, data: bytes) -> int:
        if len(data) < 2:
            return 0
        if not data.startswith(b"\r\n"):
            self._fail(data)
            return 0
        self._expects = self._size_line
        return 2

    def _trailers(self, data: bytes) -> int:
        end = 2 if data.startswith(b"\r\n") else data.find(b"\r\n\r\n") + 4
        if end < 4 and end != 2:
            if len(data) > _MOST_TRAILERS:
                self._fail(data)
            return 0
        self.is_whole = True
        return end

    def _fail(self, data: bytes) -> None:
        self.fail(BadInput(f"the body is not framed as HTTP has it: {data[:40]!r} where a chunk should begin or end"))
