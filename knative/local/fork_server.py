"""The fork server: a warmed process that becomes a function's in milliseconds. Here: when to use it, starting it, asking it.

It is a program of the function's own (`python -m function.fork_server`, whose text describes the conversation). It is started in the
background once nothing else starts, and while it is not there, or not well, functions start as fresh processes.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from knative.local.launch import Process, inherited

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
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        self._ended.set_result(self.returncode)

    async def wait(self) -> int:
        """Its exit status, negative for a signal, once it has ended."""
        status: int = await asyncio.shield(self._ended)
        return status


class ForkServer:
    """Keeps one fork server running from `start` to `stop`, and asks it for processes."""

    def __init__(self, log: Path, is_busy: Callable[[], bool] = lambda: False, say: Callable[[str], object] = lambda text: None) -> None:
        """is_busy: whether something starts that must not be disturbed: it waits meanwhile. say: told when it is not well."""
        self.starts = 0
        self._log = log
        self._is_busy = is_busy
        self._say = say
        self._env = inherited() | _ONE_THREAD
        self._child: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None  # once it is warm
        self._keeper: asyncio.Task[None] | None = None
        self._forking = 0

    @property
    def pid(self) -> int | None:
        """Its process, if it is there and warm."""
        return self._child.pid if self._child and self._control else None

    def start(self) -> None:
        """Begin to warm one up, in the background."""
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """End it. What it has forked is not its own, and stays."""
        if self._keeper:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    def can_be(self, process: Process) -> bool:
        """Whether a fork would be the same as a fresh process."""
        program, *arguments = process.argv
        return tuple(arguments) == PROGRAM and _is_our_python(program, process.env) and self._agrees(process.env)

    def _agrees(self, env: Mapping[str, str]) -> bool:
        return _ONE_THREAD | _read_at_start(env) == _read_at_start(self._env)

    async def fork(self, process: Process, log: IO[bytes]) -> Forked | None:
        """The container as a process, or None if it has to be a fresh one."""
        if not self._control or not self.can_be(process):
            return None
        ours, theirs = socket.socketpair()
        with ours, self._adopting():
            ours.setblocking(False)
            try:
                with theirs:
                    socket.send_fds(self._control, [b"fork"], [theirs.fileno(), log.fileno()])
                async with asyncio.timeout(ANSWER_S):
                    return await _converse(ours, process)
            except TimeoutError:
                self._give_up(f"did not answer within {ANSWER_S:g} s")
            except (EOFError, OSError):
                pass  # it has ended, which is seen elsewhere, or has said in its log why it cannot fork
            except _Refused as refused:
                log.write(f"fork server: {refused}, so this is a fresh process\n".encode())
            return None

    def _give_up(self, reason: str) -> None:
        """It is not well: the next one is warmed up in its place."""
        self._say(f"fork server {reason}; functions start as fresh processes until another one is warm")
        self._control = None
        if self._child and self._child.returncode is None:
            self._child.kill()

    async def _keep(self) -> None:
        pause_s = RESTART_S
        while True:
            while self._is_busy():
                await asyncio.sleep(YIELD_S)
            if await self._run():
                pause_s = RESTART_S
            await asyncio.sleep(pause_s)
            pause_s = min(RESTART_LIMIT_S, pause_s * 2)

    async def _run(self) -> bool:
        """One fork server, from its start to its end; returns whether it has been warm."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        was_warm = False
        with ours:
            ours.setblocking(False)
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with theirs, self._log.open("ab") as log:
                self.starts += 1
                self._child = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "function.fork_server",
                    str(theirs.fileno()),
                    env=self._env,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[theirs.fileno()],
                    preexec_fn=_killed_with_parent,
                )
            yielding = asyncio.create_task(self._yield_to_others(self._child))
            try:
                loop = asyncio.get_running_loop()
                try:
                    was_warm = await loop.sock_recv(ours, 16) == b"warm"
                finally:
                    yielding.cancel()
                if was_warm:
                    self._control = ours
                status = await self._child.wait()
                if self._control:
                    self._give_up(f"has ended ({status})")
                elif not was_warm:
                    self._give_up(f"could not be warmed up, see {self._log}")
            except ConnectionError:
                pass
            finally:
                self._control = None
                if self._child.returncode is None:
                    self._child.kill()
                    await self._child.wait()
        return was_warm

    async def _yield_to_others(self, child: asyncio.subprocess.Process) -> None:
        """Stop it for as long as somebody else starts, and see that it is warm in time."""
        is_stopped = False
        left_s = WARM_UP_S
        while left_s > 0:
            if self._is_busy() != is_stopped:
                is_stopped = not is_stopped
                child.send_signal(signal.SIGSTOP if is_stopped else signal.SIGCONT)
            await asyncio.sleep(YIELD_S)
            left_s -= 0 if is_stopped else YIELD_S
        child.kill()

    @contextmanager
    def _adopting(self) -> Iterator[None]:
        """For as long as it is entered, orphans below us become our children: what is forked for us is one."""
        self._forking += 1
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        try:
            yield
        finally:
            self._forking -= 1
            if not self._forking:
                _prctl(_PR_SET_CHILD_SUBREAPER, 0)


class _Refused(Exception):
    """A fork would not be the same as a fresh process; its text says why."""


async def _converse(ours: socket.socket, process: Process) -> Forked:
    """Order a process and let it run. Raises _Refused, EOFError if it ends before it runs, OSError."""
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    try:
        order = {"env": dict(process.env), "cwd": process.cwd and str(process.cwd), "parent": os.getpid()}
        writer.write(json.dumps(order).encode() + b"\n")
        child = Forked(int(await reader.readuntil()))
        answer = (await reader.readuntil()).decode().strip()
        if answer != "ready":
            raise _Refused(answer)
        writer.write(b"\n")  # 1 byte into an empty buffer goes out at once
        return child
    finally:
        writer.close()


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
