"""One process of the fork server: from its start, over its imports, to its end; and the spare process that it keeps forked.

It is a program of the function's own (`python -m function.fork_server`, whose text describes the conversation).
"""

import asyncio
import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from knative.local.launch import Process
from knative.local.tasks import Tasks

WARM_UP_S = 120.0  # on a slow disk
YIELD_S = 0.05  # between two looks whether a pod is starting, which goes first
MESSAGE_BYTES = 1 << 16

_prctl = ctypes.CDLL(None).prctl
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Forked:
    """A process that was forked for us and is our child: what asyncio.subprocess.Process is for one that we started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._fd = os.pidfd_open(pid)
        loop.add_reader(self._fd, self._reap)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
        try:
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        except ChildProcessError:  # it gave up before it was ours, and whoever waits for its end must learn of it nevertheless
            self.returncode = 1
        self._ended.set_result(self.returncode)

    async def wait(self) -> int:
        """Its exit status, negative for a signal, once it has ended."""
        status: int = await asyncio.shield(self._ended)
        return status


@dataclass(frozen=True)
class _New:
    """A process that was forked and waits for its order."""

    child: Forked
    conversation: socket.socket


class Refused(Exception):
    """A fork would not be the same as a fresh process; its text says why."""


class WarmProcess:
    """Runs once, from `run` to its end."""

    def __init__(self, env: Mapping[str, str], log: Path, is_busy: Callable[[], bool], tasks: Tasks) -> None:
        """is_busy: whether something starts that must not be disturbed: it waits meanwhile. tasks: where what it does besides is kept."""
        self.order: Mapping[str, Any] = {}  # what it is to import, see function/warm_imports.py; set before it runs
        self.libraries: dict[str, float] = {}  # what it holds, with the seconds that each took
        self.own_bytes = 0  # its memory that is no file's
        self.importing = ""  # the library that it was at last
        self.without: dict[str, Any] = {}  # the library that keeps it from being warm: `library`, `reason`, `stamp`
        self.settled = asyncio.Event()  # set once it is warm, or over
        self.was_warm = False
        self.is_dismissed = False  # by us
        self.pid: int | None = None  # while it is there
        self._env = env
        self._log = log
        self._is_busy = is_busy
        self._tasks = tasks
        self._child: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None  # while it is warm
        self._asked: deque[asyncio.Future[Forked | None]] = deque()  # who is still to be told a process, in turn
        self._spare: _New | None = None
        self._spare_wanted = asyncio.Event()

    @property
    def is_warm(self) -> bool:
        """Whether it can be asked for processes."""
        return self._control is not None

    async def run(self) -> int:
        """From its start to its end; its exit status. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with ours:
                ours.setblocking(False)
                with theirs:
                    self._child = await self._spawn(theirs.fileno())
                self.pid = self._child.pid
                return await self._attend(self._child, ours)
        finally:
            self.pid = None
            self.settled.set()

    async def fork(self, process: Process, log: IO[bytes], enter: Callable[[int], object]) -> Forked:
        """The container as a process. Raises Refused, EOFError or OSError if there is none."""
        if spare := self._take_spare():
            with suppress(EOFError, OSError):  # it has died meanwhile; another one need not have
                return await _converse(spare, process, log, enter)
        return await _converse(await self._ask(), process, log, enter)

    def retire(self) -> None:
        """Another one takes its place: it ends once it has answered whom it was asked by."""
        self.is_dismissed = True
        if control := self._control:
            self._control = None
            control.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """It is not well."""
        self.is_dismissed = True
        self._control = None
        if self._child and self._child.returncode is None:
            self._child.kill()

    async def _attend(self, child: asyncio.subprocess.Process, ours: socket.socket) -> int:
        yielding = self._tasks.start(self._yield_to_others(child), "letting others start first")
        ended = self._tasks.start(_end(child), "waiting for the fork server's end")
        keeping: asyncio.Task[None] | None = None
        try:
            await self._import(ours, ended)
            yielding.cancel()
            if self.was_warm:
                self._control = ours
                self.settled.set()
                keeping = self._tasks.start(self._keep_spare(), "keeping a spare process")
            while not self.without and (answer := await _receive(ours, ended)):
                self._answered(int(answer))
            if self.without:
                _kill(child.pid)  # it ends, unless what the library has left behind keeps it from that
            return await child.wait()
        finally:
            yielding.cancel()
            ended.cancel()
            if keeping:
                keeping.cancel()
            self._control = None
            while self._asked:
                self._hand_out(None)
            if spare := self._take_spare():
                spare.conversation.close()
                _kill(spare.child.pid)  # it may be stopped
                await spare.child.wait()
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with whatever a library has started
            await child.wait()

    async def _import(self, ours: socket.socket, ended: asyncio.Task[None]) -> None:
        """Hear what it imports, until it is warm or over."""
        while message := await _receive(ours, ended):
            word, _, rest = message.decode().partition(" ")
            if word == "importing":
                self.importing = rest
            elif word == "without":
                self.without = json.loads(rest)
                return
            elif word == "warm":
                document = json.loads(rest)
                self.libraries, self.own_bytes, self.was_warm = document["libraries"], document["bytes"], True
                return

    async def _ask(self) -> _New:
        """A new process. Raises EOFError or OSError if there is none."""
        if not self._control:
            raise EOFError
        ours, theirs = socket.socketpair()
        turn: asyncio.Future[Forked | None] = asyncio.get_running_loop().create_future()
        try:
            _adopt_for(turn)  # first: once it is asked, the process in between may be gone before the next line runs here
            with theirs:
                socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
            self._asked.append(turn)
            if not (child := await turn):
                raise EOFError
            return _New(child, ours)
        except BaseException:
            ours.close()  # which ends it, if it should still come
            if turn not in self._asked:
                _adopted(turn)
            raise

    def _take_spare(self) -> _New | None:
        spare, self._spare = self._spare, None
        self._spare_wanted.set()
        return spare

    async def _keep_spare(self) -> None:
        """Have a process ready whenever nothing else starts."""
        self._spare_wanted.set()
        while True:
            await self._spare_wanted.wait()
            self._spare_wanted.clear()
            while self._is_busy():
                await asyncio.sleep(YIELD_S)
            if not self._spare:
                try:
                    self._spare = await self._ask()
                except (EOFError, OSError):
                    return  # it has ended, which is seen elsewhere

    def _answered(self, pid: int) -> None:
        """It has forked, perhaps for somebody who does not wait any more; then too the process is ours to reap."""
        self._hand_out(Forked(pid) if pid else None)

    def _hand_out(self, child: Forked | None) -> None:
        turn = self._asked.popleft()
        if not turn.done():
            turn.set_result(child)
        _adopted(turn)

    async def _spawn(self, control: int) -> asyncio.subprocess.Process:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log, tempfile.TemporaryFile() as file:
            file.write(json.dumps(self.order).encode())
            file.flush()
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "function.fork_server",
                str(control),
                str(file.fileno()),
                env=self._env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[control, file.fileno()],
                preexec_fn=_killed_with_parent,
            )

    async def _yield_to_others(self, child: asyncio.subprocess.Process) -> None:
        """Stop it for as long as somebody else starts, and see that it is warm in time."""
        is_stopped = False
        left_s = WARM_UP_S
        with suppress(ProcessLookupError):
            try:
                while left_s > 0:
                    if self._is_busy() != is_stopped:
                        is_stopped = not is_stopped
                        child.send_signal(signal.SIGSTOP if is_stopped else signal.SIGCONT)
                    await asyncio.sleep(YIELD_S)
                    left_s -= 0 if is_stopped else YIELD_S
                child.kill()
            finally:
                child.send_signal(signal.SIGCONT)  # it may have said that it is warm, and have been stopped just then


async def _converse(new: _New, process: Process, log: IO[bytes], enter: Callable[[int], object]) -> Forked:
    """Let a new process be what is ordered. Raises Refused, EOFError or OSError if it ends instead, which it does if this is given up."""
    try:
        socket.send_fds(new.conversation, [b"\n"], [log.fileno()])
    except OSError:
        new.conversation.close()
        raise
    reader, writer = await asyncio.open_unix_connection(sock=new.conversation)
    try:
        order = {"env": dict(process.env), "cwd": process.cwd and str(process.cwd), "parent": os.getpid()}
        writer.write(json.dumps(order).encode() + b"\n")
        if (answer := (await reader.readuntil()).decode().strip()) != "ready":
            raise Refused(answer)
        enter(new.child.pid)
        writer.write(b"\n")
        return new.child
    finally:
        writer.close()


async def _end(child: asyncio.subprocess.Process) -> None:
    await child.wait()


async def _receive(control: socket.socket, ended: asyncio.Task[None]) -> bytes:
    """The next message, nothing if there will be none: it has ended, though what a library has forked may hold the other end open."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(control, _resolve, readable)
    try:
        await asyncio.wait({readable, ended}, return_when=asyncio.FIRST_COMPLETED)
        return control.recv(MESSAGE_BYTES)
    except (BlockingIOError, ConnectionError):
        return b""
    finally:
        loop.remove_reader(control)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# For whom orphans below us become our children. Only while something is forked for us: all others are their group's to end.
_adopting: set[asyncio.Future[Any]] = set()


def _adopt_for(turn: asyncio.Future[Any]) -> None:
    _adopting.add(turn)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _adopted(turn: asyncio.Future[Any]) -> None:
    _adopting.discard(turn)
    _prctl(_PR_SET_CHILD_SUBREAPER, int(bool(_adopting)))


def _killed_with_parent() -> None:
    """Runs in the child before the command. Not SIGTERM: it may be stopped just then."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
