"""The connections of one server: which are open, what each is at, and which one gives way when there are too many.

All of it is the loop's: no other thread touches a connection but through its outbox.
"""

import enum
import errno
import itertools
import logging
import math
import select
import socket
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from function import access
from function.incoming import Body
from function.outbox import Outbox

log = logging.getLogger("relight.function")

_READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT
_WRITE = select.EPOLLOUT | select.EPOLLONESHOT
YOUNG_S = 1.0  # for which one that is at rest, or a request that is on its way, is taken to go on at once
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class State(enum.IntEnum):
    """What a connection is at."""

    ENDING = 0  # it is answered for the last time; whatever still comes is thrown away
    IDLE = 1  # between two requests
    RECEIVING = 2  # a request is on its way
    SENDING = 3  # its answer is
    WORKING = 4  # somebody makes its answer; never gives way to others


_LAST = ((State.IDLE, math.inf), (State.RECEIVING, math.inf), (State.SENDING, math.inf))  # to give way


class Connection:
    """One client's."""

    def __init__(self, raw: socket.socket, client: Any, server: Any, on_unsent: "Callable[[Connection], object]") -> None:
        """client, server: their addresses."""
        self.raw = raw
        self.sock = Outbox(raw, lambda: on_unsent(self))  # gunicorn's name for where it writes
        self.client = client
        self.server = server
        self.state = State.IDLE
        self.since = 0.0  # when it came to that
        self.began = self.expires = 0.0  # a request to come, and when it is late, on `time.monotonic`'s clock
        self.received = b""  # of a request's head, and behind one whose end is known
        self.note: access.Note | None = None  # of the answer that the loop gives
        self.is_last = False  # no request can follow the one that is being answered
        self.is_open = True
        self.forget_request()

    def forget_request(self) -> None:
        """It is answered."""
        self.parsed = b""  # the head of the request that is received or answered
        self.head: Any = None  # the same as a fast_path.Head, if it is ordinary
        self.request: Any = None  # gunicorn's, of one that is not
        self.body: Body | None = None  # while it is received
        self.content = b""  # the body, once it is there
        self.fast_call: Any = None  # a fast_path.FastCall, if the loop answers it

    def has_data(self) -> bool:
        """Whether something has come that nobody has read."""
        try:
            return bool(self.raw.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def finish_note(self) -> None:
        """The answer is out, or nobody takes it."""
        note, self.note = self.note, None
        if note and note.is_wanted:
            access.finish(note)


class Connections:
    """All of them."""

    def __init__(self, epoll: select.epoll, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._epoll = epoll
        self._clock = clock
        self._limit = limit
        self._open: dict[int, Connection] = {}  # by file descriptor
        self.get = self._open.get
        self._by_state: tuple[dict[Connection, None], ...] = tuple({} for _ in State)  # each in the order they came to it
        self._registered: set[int] = set()

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._open.values()))

    def at(self, state: State) -> Collection[Connection]:
        """Those that are at it."""
        return self._by_state[state].keys()

    def add(self, conn: Connection) -> None:
        """A new one; the oldest that is of no use gives way if there are too many."""
        if len(self._open) >= self._limit:
            self.evict()
        conn.since = self._clock()
        self._open[conn.raw.fileno()] = conn
        self._by_state[conn.state][conn] = None

    def evict(self) -> bool:
        """Close the one that is missed least; False if all are being worked on.

        Those that have been at rest for a while go first, then those whose requests take long to come; of each the oldest. Who was just
        answered, or has just come, is likely to ask.
        """
        young = self._clock() - YOUNG_S
        for state, since in ((State.ENDING, math.inf), (State.IDLE, young), (State.RECEIVING, young), *_LAST):
            if found := self._oldest(state, since):
                self.drop(found)
                return True
        return False

    def _oldest(self, state: State, since: float) -> Connection | None:
        """The first one that came to this state before then, and whose next request is not there already."""
        conns = itertools.takewhile(lambda conn: conn.since < since, self._by_state[state])
        return next((conn for conn in conns if state is not State.IDLE or not conn.has_data()), None)

    def drop(self, conn: Connection) -> None:
        """Close it."""
        if conn.is_open:
            conn.is_open = False
            fd = conn.raw.fileno()
            del self._open[fd]
            del self._by_state[conn.state][conn]
            self._registered.discard(fd)
            conn.sock.give_up()
            conn.raw.close()
            conn.finish_note()

    def enter(self, conn: Connection, state: State, seconds: float | None = None) -> None:
        """It is at something else now, for so long at most; None leaves the time as it is."""
        now = self._clock()
        if conn.state is not state:
            del self._by_state[conn.state][conn]
            conn.state, conn.since = state, now
            self._by_state[state][conn] = None
        if seconds is not None:
            conn.expires = now + seconds

    def await_data(self, conn: Connection) -> None:
        """Have the poller say when something comes."""
        fd = conn.raw.fileno()
        if fd in self._registered:
            self._epoll.modify(fd, _READ)
        else:
            self._registered.add(fd)
            self._epoll.register(fd, _READ)

    def await_room(self, conn: Connection) -> None:
        """Have it say when more can be sent."""
        self._epoll.modify(conn.raw.fileno(), _WRITE)

    def expired(self, now: float) -> list[Connection]:
        """Those whose time is up, whatever they are at: the client does not send, or does not take what it is sent."""
        waiting = (State.ENDING, State.IDLE, State.RECEIVING)
        late = [conn for state in waiting for conn in self._by_state[state] if conn.expires < now]
        return late + [conn for state in (State.SENDING, State.WORKING) for conn in self._by_state[state] if conn.sock.due_at < now]

    def unsent_bytes(self) -> int:
        """What clients have not taken yet."""
        return sum(conn.sock.size for state in (State.SENDING, State.WORKING) for conn in self._by_state[state])

    def slowest(self) -> Connection | None:
        """The one that has been sending for longest."""
        return next(iter(self._by_state[State.SENDING]), None)


class Listener:
    """Takes in who comes, and pauses until it is told to go on when there are no file descriptors for more."""

    def __init__(self, sock: socket.socket, epoll: select.epoll) -> None:
        self._sock = sock
        self._epoll = epoll
        self._is_paused = False
        self._is_short = False  # of descriptors, as the log says
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
        self._address = sock.getsockname()
        epoll.register(sock.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """The socket's."""
        return self._sock.fileno()

    def accept(self, at_once: int, make_room: Callable[[], bool]) -> Iterator[tuple[socket.socket, Any, Any]]:
        """Those who have come, so many at most. make_room: closes a connection, if there is one to close."""
        for _ in range(at_once):
            try:
                sock, client = self._sock.accept()
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    return
                self._say_short(error)
                if not make_room():
                    self._pause()
                    return
                continue
            sock.setblocking(False)
            yield sock, client, self._address

    def resume(self) -> None:
        """Go on, if it has paused."""
        if self._is_paused:
            self._is_paused = False
            self._epoll.modify(self._sock.fileno(), select.EPOLLIN)

    def _pause(self) -> None:
        self._is_paused = True
        self._epoll.modify(self._sock.fileno(), 0)

    def _say_short(self, error: OSError) -> None:
        if not self._is_short:
            self._is_short = True
            log.warning(
                "%s: idle connections are closed, and new ones wait; raise the limit (ulimit -n) or look for what the agent keeps open",
                error.strerror,
            )
