"""The fork server: a warmed process that becomes a function's in milliseconds. Here: when to use it, starting it, asking it.

It is a program of the function's own (`python -m function.fork_server`, whose text describes the conversation). It is started in the
background once nothing else starts, and while it is not there, or not well, functions start as fresh processes. A spare process is kept
forked: to copy the page tables of one that has imported torch is a tenth of a start.
"""

import asyncio
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from knative.local.inheritance import inherited
from knative.local.launch import Process
from knative.local.procfs import MARK
from knative.local.tasks import Tasks, describe

PROGRAM = ("-m", "function")
ANSWER_S = 2.0  # for a fork, then it is not well
WARM_UP_S = 120.0  # on a slow disk
RESTART_S, RESTART_LIMIT_S = 1.0, 300.0  # after it ended, doubling
YIELD_S = 0.05  # between two looks whether a pod is starting, which goes first

# Read when the interpreter, the C library or torch starts, and never again. (Which CUDA devices are visible is read later.)
_READ_AT_START = re.compile(
    r"^(PYTHON|LD_|GLIBC_|MALLOC_|LC_|LANG|HOME$|OMP_|KMP_|GOMP_|MKL_|DNNL_|ONEDNN_|OPENBLAS_|BLIS_|NPY_|NUMPY_"
    r"|TORCH|PYTORCH_|ATEN_|CUDA_(?!VISIBLE_DEVICES$))"
)
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # OpenMP's threads would not live through a fork

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


class ForkServer:
    """Keeps one fork server running from `start` to `stop`, and asks it for processes."""

    def __init__(
        self,
        log: Path,
        is_busy: Callable[[], bool] = lambda: False,
        say: Callable[[str], object] = lambda text: None,
        mark: str = "",
        inherits: Iterable[str] = (),
    ) -> None:
        """is_busy: whether something starts that must not be disturbed: it waits meanwhile. say: told when it is not well.

        mark: see `procfs.MARK`; what is forked has that of the fork server, until it starts programs of its own.
        inherits: see `inheritance.inherited`.
        """
        self.starts = 0
        self._log = log
        self._is_busy = is_busy
        self._say = say
        self._env = inherited(inherits) | _ONE_THREAD | {MARK: f"{mark}fork-server/"}
        self._child: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None  # once it is warm
        self._tasks = Tasks(self._failed)
        self._asked: deque[asyncio.Future[Forked | None]] = deque()  # who is still to be told a process, in turn
        self._spare: _New | None = None
        self._spare_wanted = asyncio.Event()
        self._told = ""  # what is not well, so that it is said once

    @property
    def pid(self) -> int | None:
        """Its process, if it is there and warm."""
        return self._child.pid if self._child and self._control else None

    def status(self) -> dict[str, Any]:
        """Its entry in `/api/status`."""
        return {"warm": self.pid is not None, "starts": self.starts}

    def start(self) -> None:
        """Begin to warm one up, in the background."""
        self._tasks.start(self._keep(), "keeping a fork server")

    async def stop(self) -> None:
        """End it. What it has forked is not its own, and stays."""
        await self._tasks.stop()

    def can_be(self, process: Process) -> bool:
        """Whether a fork would be the same as a fresh process."""
        program, *arguments = process.argv
        return tuple(arguments) == PROGRAM and _is_our_python(program, process.env) and self._agrees(process.env)

    def _agrees(self, env: Mapping[str, str]) -> bool:
        return _ONE_THREAD | _read_at_start(env) == _read_at_start(self._env)

    async def fork(self, process: Process, log: IO[bytes], enter: Callable[[int], object] = lambda pid: None) -> Forked | None:
        """The container as a process, or None if it has to be a fresh one.

        enter: called with its process id before anything of it runs, to be brought into its limits; may raise OSError.
        """
        if not self._control or not self.can_be(process):
            return None
        try:
            async with asyncio.timeout(ANSWER_S):
                if spare := self._take_spare():
                    with suppress(EOFError, OSError):  # it has died meanwhile; another one need not have
                        return await _converse(spare, process, log, enter)
                return await _converse(await self._ask(), process, log, enter)
        except TimeoutError:
            self._give_up(f"did not answer within {ANSWER_S:g} s")
        except _Refused as refused:
            log.write(f"fork server: {refused}, so this is a fresh process\n".encode())
        except (EOFError, OSError):
            pass  # it has ended, which is seen elsewhere
        return None

    async def _ask(self) -> _New:
        """A new process. Raises EOFError or OSError if there is none."""
        assert self._control
        ours, theirs = socket.socketpair()
        turn: asyncio.Future[Forked | None] = asyncio.get_running_loop().create_future()
        try:
            _adopt(True)  # first: once it is asked, the process in between may be gone before the next line runs here
            with theirs:
                socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
            self._asked.append(turn)
            if not (child := await turn):
                raise EOFError
            return _New(child, ours)
        except BaseException:
            ours.close()  # which ends it, if it should still come
            _adopt(bool(self._asked))
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
        _adopt(bool(self._asked))

    def _give_up(self, reason: str) -> None:
        """It is not well: the next one is warmed up in its place."""
        if reason != self._told:
            self._say(f"the fork server {reason}; functions start as fresh processes until another one is warm")
        self._told = reason
        self._control = None
        if self._child and self._child.returncode is None:
            self._child.kill()

    async def _keep(self) -> None:
        pause_s = RESTART_S
        while True:
            running = self._tasks.start(self._run_when_quiet(), "the fork server's keeper")
            await asyncio.wait({running})
            if not running.cancelled() and not running.exception() and running.result():
                pause_s = RESTART_S
            await asyncio.sleep(pause_s)
            pause_s = min(RESTART_LIMIT_S, pause_s * 2)

    def _failed(self, what: str, error: Exception) -> None:
        """A mistake of ours: the next one is tried as after any other end."""
        self._give_up(f"is not kept: {describe(what, error)}")

    async def _run_when_quiet(self) -> bool:
        while self._is_busy():
            await asyncio.sleep(YIELD_S)
        try:
            return await self._run()
        except OSError as error:
            self._give_up(f"cannot be started ({error.strerror})")
            return False

    async def _run(self) -> bool:
        """One fork server, from its start to its end; returns whether it has been warm."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.setblocking(False)
            with theirs:
                self._child = await self._spawn(theirs.fileno())
            yielding = self._tasks.start(self._yield_to_others(self._child), "letting others start first")
            keeping: asyncio.Task[None] | None = None
            try:
                was_warm = await _receive(ours) == b"warm"
                yielding.cancel()
                if was_warm:
                    self._control, self._told = ours, ""
                    keeping = self._tasks.start(self._keep_spare(), "keeping a spare process")
                while answer := await _receive(ours):
                    self._answered(int(answer))
                if self._control or not was_warm:
                    status = await self._child.wait()
                    self._give_up(f"has ended ({status})" if was_warm else f"could not be warmed up, see {self._log}")
            finally:
                yielding.cancel()
                if keeping:
                    keeping.cancel()
                self._control = None
                while self._asked:
                    self._hand_out(None)
                if spare := self._take_spare():
                    spare.conversation.close()
                    _kill(spare.child.pid)  # it may be stopped
                    await spare.child.wait()
                if self._child.returncode is None:
                    self._child.kill()
                await self._child.wait()
        return was_warm

    async def _spawn(self, control: int) -> asyncio.subprocess.Process:
        self.starts += 1
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "function.fork_server",
                str(control),
                env=self._env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[control],
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


class _Refused(Exception):
    """A fork would not be the same as a fresh process; its text says why."""


async def _converse(new: _New, process: Process, log: IO[bytes], enter: Callable[[int], object]) -> Forked:
    """Let a new process be what is ordered. Raises _Refused, EOFError or OSError if it ends instead, which it does if this is given up."""
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
            raise _Refused(answer)
        enter(new.child.pid)
        writer.write(b"\n")
        return new.child
    finally:
        writer.close()


async def _receive(control: socket.socket) -> bytes:
    """The next message, nothing if there will be none."""
    try:
        return await asyncio.get_running_loop().sock_recv(control, 16)
    except ConnectionError:
        return b""


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _adopt(orphans: bool) -> None:
    """Whether orphans below us become our children. Only while something is forked for us: all others are their group's to end."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(orphans))


def _is_our_python(program: str, env: Mapping[str, str]) -> bool:
    """Whether a command is the interpreter that we run in, of the same virtual environment."""
    if os.sep in program and not Path(program).is_absolute():
        return False
    found = shutil.which(program, path=env.get("PATH", os.defpath))
    ours = Path(sys.executable)
    return found is not None and Path(found).samefile(ours) and Path(found).parent.samefile(ours.parent)


def _read_at_start(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if _READ_AT_START.match(name)}


def _killed_with_parent() -> None:
    """Runs in the child before the command. Not SIGTERM: it may be stopped just then."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
