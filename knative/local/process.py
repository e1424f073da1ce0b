"""One container as a process group: started, started again when it dies, ended with everything it started."""

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from knative.local.fork_server import ForkServer
from knative.local.launch import Process
from knative.local.limits import Confinement, Limiter
from knative.local.procfs import MARK, end_marked
from knative.local.tasks import Tasks
from knative.local.warm_process import Forked

# As the kubelet has them: the first restart is at once, the next after 10 s, doubling. But one that was well since it started, or that was
# killed from outside, has short pauses only: callers are held for it, and it can start.
RESTART_S, RESTART_LIMIT_S = 10.0, 300.0
SHORT_RESTART_S = 1.0
STEADY_S = 600.0  # after so long alive, a crash counts as the first one again
# A log that has become so long is put aside, in the place of the one that was put aside before (the kubelet's default size).
LOG_BYTES = 10 << 20
LOG_LOOK_S = 0.5

_prctl = ctypes.CDLL(None).prctl
_PR_SET_PDEATHSIG = 1
_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT}


@dataclass(frozen=True)
class Ending:
    """How a process ended, or why it could not be started. `is_own`: nobody from outside has killed it."""

    text: str
    is_own: bool = True

    def __str__(self) -> str:
        return self.text


class ContainerProcess:
    """Keeps one process of a pod running from `start` to `stop`."""

    def __init__(
        self,
        process: Process,
        on_exit: Callable[[Ending], object],
        fork_server: ForkServer | None = None,
        limiter: Limiter | None = None,
        on_start: Callable[[], object] = lambda: None,
        on_failure: Callable[[str, Exception], object] = lambda what, error: None,
    ) -> None:
        """on_exit: called with what happened each time the process ends by itself, or cannot be started. on_start: when it is there.

        on_failure: told of a mistake of ours in keeping it, which is not kept any more then.
        """
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
        self._cannot = ""  # why it could not be started
        self._was_well = False  # since it started last
        self._oom_kills = 0  # of the machine, when it started last
        self._log_at = 0  # bytes of the log, likewise
        self._child: asyncio.subprocess.Process | Forked | None = None
        self._tasks = Tasks(on_failure)

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
        self._confinement = self._limiter.confine(self.process.env.get(MARK, self.process.container), self.process.limits)
        await self._spawn()
        name = self.process.container
        self._tasks.start(self._keep(), f"keeping the container {name}")
        self._tasks.start(_keep_short(self.process.log), f"keeping the log of {name} short")

    def is_well(self) -> None:
        """It works: if it ends now, that is not a failed start."""
        self._was_well = True

    async def restart(self, reason: str = "") -> None:
        """End the process; the keeper starts it again. `reason` is then said to be how it ended."""
        self._kill(reason)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM to the process alone, as the kubelet sends it; after `grace_s` SIGKILL to whatever is left of all that it started."""
        await self._tasks.stop()  # one that is just starting the process has still to take it back
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGTERM)
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
        """The last lines that the process wrote, since it started last."""
        return tail(self.process.log, lines, self._log_at)

    async def _keep(self) -> None:
        pause_s = 0.0
        while True:
            began = time.monotonic()
            ending = await self._end()
            self.last_exit = ending.text
            self._on_exit(ending)
            await self._end_rest()
            is_steady, was_well = time.monotonic() - began > STEADY_S, self._was_well
            if is_steady or was_well:
                pause_s = 0.0 if is_steady else min(pause_s, SHORT_RESTART_S)
            await asyncio.sleep(pause_s)
            is_failed_start = ending.is_own and not was_well
            pause_s = min(RESTART_LIMIT_S, max(RESTART_S, pause_s * 2)) if is_failed_start else max(pause_s, SHORT_RESTART_S)
            self.restarts += 1
            await self._spawn()

    async def _end(self) -> Ending:
        """Wait for the end of the process, and say how it came."""
        ending = Ending(f"could not be started: {self._cannot}")
        if self._child:
            ending = _ending(await self._child.wait())
            self._signal(signal.SIGKILL)  # what it left behind would hold its port
            self._child = None  # from now on its number may be somebody else's
        if self._confinement:
            self._limiter.unwatch(self._confinement)
            self._reason = self._reason or self._confinement.out_of_memory() or ""
        if not ending.is_own and not self._reason and _oom_kills() > self._oom_kills:
            self._reason = f"{ending.text}, and this machine was out of memory"
        ending = Ending(self._reason) if self._reason else ending
        self._reason = ""
        return ending

    async def _end_rest(self) -> None:
        """Of what it started, that which has a session of its own, as a daemon has; in a cluster it would end with the container too."""
        if mark := self.process.env.get(MARK):
            await asyncio.to_thread(end_marked, mark)

    async def _spawn(self) -> None:
        self._child, self._was_well = None, False
        self._oom_kills = _oom_kills()
        try:
            self.process.log.parent.mkdir(parents=True, exist_ok=True)  # somebody may tidy up while we run
            with self.process.log.open("ab") as log:
                self._log_at = log.tell()
                self._child = await self._begin(log)
        except OSError as error:
            self._cannot = error.strerror or type(error).__name__  # the log says what; a Secret's value may be in its name
            return
        self.started_at = time.monotonic()
        if self._confinement:
            self._limiter.watch(self._confinement, self._child.pid, self._kill)
        self._on_start()

    async def _begin(self, log: IO[bytes]) -> asyncio.subprocess.Process | Forked:
        """The process. Raises OSError."""
        process = self._fork_server.listening(self.process) if self._fork_server else self.process
        if self._fork_server and (forked := await self._fork_server.fork(process, log, self._enter)):
            return forked
        try:
            return await asyncio.create_subprocess_exec(
                *process.argv,
                env=process.env,
                cwd=process.cwd,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=self._prepare,
            )
        except OSError as error:
            # Not its arguments: a Secret's value may be among them.
            log.write(f"cannot start {self.process.argv[0]}: {error}\n".encode())
            raise

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


def _ending(status: int) -> Ending:
    """From an exit status, negative for a signal. Shells, and our function's server, tell of a child's signal as 128 and its number."""
    number = -status if status < 0 else status - 128
    try:
        by = signal.Signals(number)
    except ValueError:
        return Ending(f"ended with status {status}")
    text = f"was ended by {by.name}" if status < 0 else f"ended with status {status} ({by.name})"
    return Ending(text, is_own=by not in _FROM_OUTSIDE)


def _oom_kills() -> int:
    """How often the kernel has killed something on this machine to get memory back."""
    try:
        return int(next(line.split()[1] for line in Path("/proc/vmstat").read_text().splitlines() if line.startswith("oom_kill ")))
    except (OSError, StopIteration):
        return 0


async def _keep_short(log: Path) -> None:
    """Put a log aside when it is long: what is last in it. Its writers go on where it was, so it is copied and then emptied."""
    while True:
        await asyncio.sleep(LOG_LOOK_S)
        try:
            if log.stat().st_size > LOG_BYTES:
                await asyncio.to_thread(_put_aside, log)
        except OSError:
            pass  # a full disk, or somebody has removed it; to be tried again


def _put_aside(log: Path) -> None:
    with log.open("rb") as source, log.with_name(f"{log.name}.1").open("wb") as kept:
        source.seek(max(0, source.seek(0, os.SEEK_END) - LOG_BYTES))
        left = LOG_BYTES
        while left and (piece := source.read(min(left, 1 << 20))):
            left -= len(piece)
            kept.write(piece)
    os.truncate(log, 0)


def tail(log: Path, lines: int, since: int = 0) -> list[str]:
    """The last lines of a file; none if it is not there. since: a byte before which none counts, unless the file was put aside."""
    try:
        with log.open("rb") as file:
            size = log.stat().st_size
            file.seek(max(0, size - 16_384, since if since <= size else 0))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []
