"""One container as a process group: started, started again when it dies, ended with everything it started."""

import asyncio
import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from knative.local.fork_server import Forked, ForkServer
from knative.local.launch import Process

RESTART_S, RESTART_LIMIT_S = 1.0, 30.0  # between restarts, doubling
STEADY_S = 60.0  # after so long alive, a crash counts as the first one again

_prctl = ctypes.CDLL(None).prctl
_PR_SET_PDEATHSIG = 1


class ContainerProcess:
    """Keeps one process of a pod running from `start` to `stop`."""

    def __init__(self, process: Process, on_exit: Callable[[str], object], fork_server: ForkServer | None = None) -> None:
        """on_exit: called with what happened each time the process ends by itself, or cannot be started."""
        self.process = process
        self.restarts = 0
        self._on_exit = on_exit
        self._fork_server = fork_server
        self._child: asyncio.subprocess.Process | Forked | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._child is not None and self._child.returncode is None

    @property
    def is_forked(self) -> bool:
        """Whether it came from the fork server."""
        return isinstance(self._child, Forked)

    async def start(self) -> None:
        """Start the process for the first time; a command that cannot be started is treated like one that ends at once."""
        self.process.log.parent.mkdir(parents=True, exist_ok=True)
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep())

    async def restart(self) -> None:
        """End the process; the keeper starts it again."""
        self._signal(signal.SIGKILL)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL to whatever of its group is left after `grace_s`."""
        if self._keeper:
            self._keeper.cancel()
        if self._child:
            self._signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._child.wait(), grace_s)
            except TimeoutError:
                pass
            self._signal(signal.SIGKILL)
            await self._child.wait()

    def tail(self, lines: int) -> list[str]:
        """The last lines that the process wrote."""
        return tail(self.process.log, lines)

    async def _keep(self) -> None:
        pause_s = RESTART_S
        while True:
            began = time.monotonic()
            ended = "could not be started"
            if self._child:
                ended = _ending(await self._child.wait())
                self._signal(signal.SIGKILL)  # what it left behind would hold its port
                self._child = None  # from now on its number may be somebody else's
            self._on_exit(ended)
            if time.monotonic() - began > STEADY_S:
                pause_s = RESTART_S
            await asyncio.sleep(pause_s)
            pause_s = min(RESTART_LIMIT_S, pause_s * 2)
            self.restarts += 1
            await self._spawn()

    async def _spawn(self) -> None:
        self._child = None
        with self.process.log.open("ab") as log:
            if self._fork_server and (forked := await self._fork_server.fork(self.process, log)):
                self._child = forked
                return
            try:
                self._child = await asyncio.create_subprocess_exec(
                    *self.process.argv,
                    env=self.process.env,
                    cwd=self.process.cwd,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            except OSError as error:
                log.write(f"cannot start {' '.join(self.process.argv)}: {error}\n".encode())

    def _signal(self, number: int) -> None:
        """To the whole group: a server's workers must not outlive it."""
        if self._child:
            try:
                os.killpg(self._child.pid, number)
            except ProcessLookupError:
                pass  # all of it is gone


def _ending(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _die_with_parent() -> None:
    """Runs in the child before the command: if this platform is killed, the pod is told to end."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def tail(log: Path, lines: int) -> list[str]:
    """The last lines of a file; none if it is not there."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []
