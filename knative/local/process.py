"""One container as a process group: started, started again when it dies, ended with everything it started."""

import asyncio
import ctypes
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from knative.local.fork_server import Forked, ForkServer
from knative.local.launch import Process
from knative.local.limits import Confinement, Limiter
from knative.local.procfs import MARK, end_marked

# As the kubelet has them: the first restart is at once, the next after 10 s, doubling.
RESTART_S, RESTART_LIMIT_S = 10.0, 300.0
STEADY_S = 600.0  # after so long alive, a crash counts as the first one again
# A log that has become so long is put aside, in the place of the one that was put aside before (the kubelet's default size).
LOG_BYTES = 10 << 20
LOG_LOOK_S = 5.0

_prctl = ctypes.CDLL(None).prctl
_PR_SET_PDEATHSIG = 1


class ContainerProcess:
    """Keeps one process of a pod running from `start` to `stop`."""

    def __init__(
        self,
        process: Process,
        on_exit: Callable[[str], object],
        fork_server: ForkServer | None = None,
        limiter: Limiter | None = None,
        on_start: Callable[[], object] = lambda: None,
    ) -> None:
        """on_exit: called with what happened each time the process ends by itself, or cannot be started. on_start: when it is there."""
        self.process = process
        self.restarts = 0
        self.started_at = 0.0  # on time.monotonic's clock
        self.last_exit = ""  # how it ended last, if it ever did
        self._on_exit = on_exit
        self._on_start = on_start
        self._fork_server = fork_server
        self._limiter = limiter or Limiter()
        self._confinement: Confinement | None = None
        self._reason = ""  # why we have killed it
        self._child: asyncio.subprocess.Process | Forked | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._log_keeper: asyncio.Task[None] | None = None

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
        self._confinement = self._limiter.confine(self.process.env.get(MARK, self.process.container), self.process.limits)
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep())
        self._log_keeper = asyncio.create_task(_keep_short(self.process.log))

    async def restart(self, reason: str = "") -> None:
        """End the process; the keeper starts it again. `reason` is then said to be how it ended."""
        self._kill(reason)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL to whatever is left of all that it started after `grace_s`."""
        keepers = [task for task in (self._keeper, self._log_keeper) if task]
        for task in keepers:
            task.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)  # one that is just starting the process has still to take it back
        if self._child:
            self._signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._child.wait(), grace_s)
            except TimeoutError:
                pass
            self._signal(signal.SIGKILL)
            await self._child.wait()
        await self._end_rest()
        if self._confinement:
            self._limiter.release(self._confinement)
            self._confinement = None

    def tail(self, lines: int) -> list[str]:
        """The last lines that the process wrote."""
        return tail(self.process.log, lines)

    async def _keep(self) -> None:
        pause_s = 0.0
        while True:
            began = time.monotonic()
            ended = "could not be started"
            if self._child:
                ended = _ending(await self._child.wait())
                self._signal(signal.SIGKILL)  # what it left behind would hold its port
                self._child = None  # from now on its number may be somebody else's
            if self._confinement:
                self._limiter.unwatch(self._confinement)
                self._reason = self._reason or self._confinement.out_of_memory() or ""
            self.last_exit, self._reason = self._reason or ended, ""
            self._on_exit(self.last_exit)
            await self._end_rest()
            if time.monotonic() - began > STEADY_S:
                pause_s = 0.0
            await asyncio.sleep(pause_s)
            pause_s = min(RESTART_LIMIT_S, pause_s * 2 or RESTART_S)
            self.restarts += 1
            await self._spawn()

    async def _end_rest(self) -> None:
        """Of what it started, that which has a session of its own, as a daemon has; in a cluster it would end with the container too."""
        if mark := self.process.env.get(MARK):
            await asyncio.to_thread(end_marked, mark)

    async def _spawn(self) -> None:
        self._child = None
        with self.process.log.open("ab") as log:
            if self._fork_server:
                self._child = await self._fork_server.fork(self.process, log, self._enter)
            try:
                self._child = self._child or await asyncio.create_subprocess_exec(
                    *self.process.argv,
                    env=self.process.env,
                    cwd=self.process.cwd,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=self._prepare,
                )
            except OSError as error:
                log.write(f"cannot start {' '.join(self.process.argv)}: {error}\n".encode())
        if self._child:
            self.started_at = time.monotonic()
            if self._confinement:
                self._limiter.watch(self._confinement, self._child.pid, self._kill)
            self._on_start()

    def _prepare(self) -> None:
        """Runs in the child before the command. If this platform is killed, the pod is told to end."""
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        try:
            self._enter(0)
        except OSError as error:
            os.write(2, f"cannot be kept to its resources.limits: {error}\n".encode())

    def _enter(self, pid: int) -> None:
        if self._confinement:
            self._confinement.enter(pid)

    def _kill(self, reason: str) -> None:
        if self.running:
            self._reason = reason
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        """To the whole group: a server's workers must not outlive it."""
        if self._child:
            try:
                os.killpg(self._child.pid, number)
            except ProcessLookupError:
                pass  # all of it is gone


def _ending(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


async def _keep_short(log: Path) -> None:
    """Put a log aside when it is long. Its writers go on where it was, so it is copied and then emptied."""
    while True:
        await asyncio.sleep(LOG_LOOK_S)
        try:
            if log.stat().st_size > LOG_BYTES:
                await asyncio.to_thread(shutil.copyfile, log, log.with_name(f"{log.name}.1"))
                os.truncate(log, 0)
        except OSError:
            pass  # a full disk, or somebody has removed it; to be tried again


def tail(log: Path, lines: int) -> list[str]:
    """The last lines of a file; none if it is not there."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []
