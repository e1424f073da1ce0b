"""The body of a request that may have to wait: a bounded part is read ahead, then its sender is held up.

That a client went away is only seen by who reads on, as the end of a connection comes after everything that was sent over it; and small
bodies, which most are, wait in memory. Of larger ones TCP tells what it can (see Connections.look).
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
from aiohttp.web import RequestPayloadError

from knative.local.errors import RequestError
from knative.local.tasks import Tasks

EACH_BYTES = 1 << 20  # read ahead of one body
ALL_BYTES = 64 << 20  # of all that wait
PIECE_BYTES = 64 << 10  # handed on at a time


class BadBody(RequestError):
    """What the client sends as a body is none."""

    status = 400
    type = "bad_request"

    def __init__(self) -> None:
        super().__init__("the body of the request is not what its head says, or no chunks")


class Room:
    """What is left for bodies that wait."""

    def __init__(self, limit: int = ALL_BYTES) -> None:
        self._limit = limit
        self.taken = 0

    @property
    def left(self) -> int:
        """So many bytes more may be kept."""
        return max(0, self._limit - self.taken)


class Body:
    """One request's, for whoever it is handed to: an async iterable."""

    def __init__(self, content: aiohttp.StreamReader, room: Room, on_broken: Callable[[], object]) -> None:
        """on_broken: called when whoever reads it has found that what the client sends is no body."""
        self.awaited = False  # whether somebody who takes it waits for the client to send more
        self.on_much: Callable[[], object] = lambda: None  # called when so much has come as is read ahead
        self.came_at = 0.0  # on the loop's clock: when somebody who takes it last got something from the client
        self._content = content
        self._room = room
        self._on_broken = on_broken
        self._early = bytearray()  # what came while nobody took it
        self._is_passing = False  # what is handed on is not kept

    @property
    def is_broken(self) -> bool:
        """Whether what the client sends is no body."""
        return isinstance(self._content.exception(), RequestPayloadError)

    @asynccontextmanager
    async def read_on(self) -> AsyncIterator[None]:
        """For as long as it is entered, what comes is kept, as far as there is room."""
        tasks = Tasks(lambda _, error: self._tell())  # another error of the connection is there again for who reads next
        tasks.start(self._keep(), "reading a body ahead")
        try:
            yield
        finally:
            await tasks.stop()

    def _tell(self) -> None:
        if self.is_broken:
            self._on_broken()

    async def _keep(self) -> None:
        while self._left and (first := await self._content.read(1)):
            self._add(first)
            if left := self._left:
                self._add(self._content.read_nowait(left))

    @property
    def _left(self) -> int:
        return min(EACH_BYTES - len(self._early), self._room.left)

    def _add(self, piece: bytes) -> None:
        self._early += piece
        self._room.taken += len(piece)
        self._measure()

    def _measure(self) -> None:
        if self._content.total_bytes >= EACH_BYTES:
            self.on_much()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """From its beginning; a second time only if no more than what was kept has been handed on. Raises ConnectionError otherwise."""
        if self._is_passing:
            raise ConnectionError("a part of the body is gone, and it cannot be sent again")
        has_begun = bool(self._early)
        for begin in range(0, len(self._early), PIECE_BYTES):
            yield bytes(self._early[begin : begin + PIECE_BYTES])
        self._is_passing = True
        self.close()
        clock = asyncio.get_running_loop().time
        try:
            if not has_begun:
                self._measure()
                yield self._content.read_nowait(PIECE_BYTES)  # if nothing is there yet, the head goes on nevertheless
            self.awaited = True
            async for piece in self._content.iter_any():
                self.awaited, self.came_at = False, clock()
                self._measure()
                yield piece
                self.awaited = True
        except RequestPayloadError:
            self._tell()
            raise
        self.awaited, self.came_at = False, clock()

    def close(self) -> None:
        """Forget what was kept."""
        self._room.taken -= len(self._early)
        self._early = bytearray()
