"""A request's body as it comes, in however many segments: how much is there, and where it ends.

The loop feeds it, so that a slow sender holds no thread. With a Content-Length it ends there; chunked (RFC 9112, section 7.1) it ends with
the last chunk and its trailers, which nobody here wants.
"""

import io
import re

from function.errors import BadInput, FunctionError, TooLarge

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t -~]*)?\r\n")
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
        self._kept = io.BytesIO()  # takes no more memory than the bytes do, however small the pieces are
        if length > limit:
            self._fail_large()

    def feed(self, data: bytes) -> bytes:
        """More has come; returns what is behind the body."""
        data = data[self._keep(data, 0) :]
        self.is_whole = self.is_whole or not self._left
        return data

    def fail(self, error: FunctionError) -> None:
        """There will be no body: what came of it is forgotten, and what still comes is not known."""
        error.ends_connection = True
        self.error, self.is_whole, self.size, self._kept = error, True, 0, io.BytesIO()

    def take(self) -> bytes:
        """All of it; not copied, and not kept any more."""
        kept, self._kept = self._kept, io.BytesIO()
        return kept.getvalue()

    def _keep(self, data: bytes, begin: int) -> int:
        """What belongs to the body or the chunk; returns where that ends."""
        piece = data[begin : begin + self._left]
        self._left -= len(piece)
        self.size += len(piece)
        self._kept.write(piece)
        return begin + len(piece)

    def _fail_large(self) -> None:
        self.fail(TooLarge(f"the body is larger than {self._limit} bytes (FUNCTION_MAX_BODY_BYTES)"))


class ChunkedBody(Body):
    """One that says its length piece by piece."""

    def __init__(self, limit: int) -> None:
        super().__init__(0, limit)
        self.is_whole = False
        self._framing = b""  # what has come of a line that is not all there
        self._expects = self._size_line  # what is next once a chunk's data are all there; returns where that ends, 0 if it is not all there

    def feed(self, data: bytes) -> bytes:
        """More has come; returns what is behind the body."""
        if self._framing:
            data, self._framing = self._framing + data, b""
        at = 0
        while at < len(data) and not self.is_whole:
            if self._left:
                at = self._keep(data, at)
            elif end := self._expects(data, at):
                at = end
            else:
                self._framing, at = data[at:], len(data)
        return data[at:]

    def _size_line(self, data: bytes, begin: int) -> int:
        found = _SIZE_LINE.match(data, begin)
        if not found:
            self._check(data, begin, b"\r\n", _MOST_LINE)
            return 0
        self._left = int(found[1], 16)
        self._expects = self._end_of_chunk if self._left else self._trailers
        if self.size + self._left > self._limit:
            self._fail_large()
        return found.end()

    def _end_of_chunk(self, data: bytes, begin: int) -> int:
        if not data.startswith(b"\r\n", begin):
            self._check(data, begin, b"", 2)
            return 0
        self._expects = self._size_line
        return begin + 2

    def _trailers(self, data: bytes, begin: int) -> int:
        end = begin if data.startswith(b"\r\n", begin) else data.find(b"\r\n\r\n", begin) + 2
        if end < begin + 2 and end != begin:
            self._check(data, begin, b"\r\n\r\n", _MOST_TRAILERS)
            return 0
        self.is_whole = True
        return end + 2

    def _check(self, data: bytes, begin: int, end: bytes, most: int) -> None:
        """What is there is not what should be: it may still become so, unless it is so long, or has its end already."""
        if len(data) - begin >= most or (end and end in data[begin : begin + most]):
            shown = data[begin : begin + 40]
            self.fail(BadInput(f"the body is not framed as HTTP has it: {shown!r} where a chunk should begin or end"))
