"""The fork server: a warmed process that becomes a function's in milliseconds. Here: when to use it, and when to have another one.

It is started in the background once nothing else starts, and while it is not there, or not well, functions start as fresh processes. A
spare process is kept forked: to copy the page tables of one that has imported torch is a tenth of a start.

What functions import is learned from them (see imports.py). When there is something new, another process is warmed up that has that too,
while the first one goes on; then it takes its place.
"""

import asyncio
import dataclasses
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from knative.local.imports import AGENT, Imports
from knative.local.inheritance import inherited
from knative.local.launch import Process
from knative.local.procfs import MARK
from knative.local.tasks import Tasks, describe
from knative.local.warm_process import YIELD_S, Forked, Refused, WarmProcess
from weights_cache.environment import is_secret

PROGRAM = ("-m", "function")
ANSWER_S = 2.0  # for a fork, then it is not well
RESTART_S, RESTART_LIMIT_S = 1.0, 300.0  # after it ended, doubling
MOST_BYTES = 1 << 30  # of its own memory, or a quarter of the machine's, if that is less

# Read when the interpreter, the C library or torch starts, and never again. (Which CUDA devices are visible is read later.)
_READ_AT_START = re.compile(
    r"^(PYTHON|LD_|GLIBC_|MALLOC_|LC_|LANG|HOME$|OMP_|KMP_|GOMP_|MKL_|DNNL_|ONEDNN_|OPENBLAS_|BLIS_|NPY_|NUMPY_"
    r"|TORCH|PYTORCH_|ATEN_|CUDA_(?!VISIBLE_DEVICES$))"
)
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # OpenMP's threads would not live through a fork


class ForkServer:
    """Keeps one fork server running from `start` to `stop`, and asks it for processes."""

    def __init__(
        self,
        log: Path,
        is_busy: Callable[[], bool] = lambda: False,
        say: Callable[[str], object] = lambda text: None,
        mark: str = "",
        inherits: Iterable[str] = (),
        imports: Imports | None = None,
    ) -> None:
        """is_busy: whether something starts that must not be disturbed: it waits meanwhile. say: told when it is not well.

        mark: see `procfs.MARK`; what is forked has that of the fork server, until it starts programs of its own.
        inherits: see `inheritance.inherited`. imports: what functions import; without it, what all may need is held.
        """
        self.starts = 0
        self._log = log
        self._is_busy = is_busy
        self._say = say
        known = {name: value for name, value in inherited(inherits).items() if not is_secret(name)}
        self._env = known | _ONE_THREAD | {MARK: f"{mark}fork-server/"}
        self._imports = imports
        self._current: WarmProcess | None = None  # the one that is asked
        self._changed = asyncio.Event()  # set when there is something else to be imported
        self._tasks = Tasks(self._failed)
        self._told = ""  # what is not well, so that it is said once
        self._suspect = ""  # the library that it was at when it ended before it was warm

    @property
    def pid(self) -> int | None:
        """Its process, if it is there and warm."""
        return self._current.pid if self._current and self._current.is_warm else None

    def status(self) -> dict[str, Any]:
        """Its entry in `/api/status`. modules: the libraries that it holds, those that took longest first; bytes: its own memory."""
        found = self._current if self.pid is not None else None
        return {
            "warm": found is not None,
            "starts": self.starts,
            "modules": list(found.libraries) if found else [],
            "bytes": found.own_bytes if found else 0,
            "left_out": self._imports.left_out if self._imports else {},
        }

    def start(self) -> None:
        """Begin to warm one up, in the background."""
        if self._imports:
            self._tasks.start(self._learn(self._imports), "learning what functions import")
        self._tasks.start(self._keep(), "keeping a fork server")

    async def stop(self) -> None:
        """End it. What it has forked is not its own, and stays."""
        await self._tasks.stop()

    def can_be(self, process: Process) -> bool:
        """Whether a fork would be the same as a fresh process, as far as can be told before."""
        program, *arguments = process.argv
        return tuple(arguments) == PROGRAM and _is_our_python(program, process.env) and self._agrees(process.env)

    def _agrees(self, env: Mapping[str, str]) -> bool:
        return _ONE_THREAD | _read_at_start(env) == _read_at_start(self._env)

    def want(self, processes: Sequence[Process]) -> None:
        """Have what these will import: the functions of the manifests, each as two of its pods would start it."""
        if self._imports and self._imports.want([process.env for process in processes if self.can_be(process)]):
            self._changed.set()

    def listening(self, process: Process) -> Process:
        """The same process, told to tell what it imports if that may be held here."""
        if not self._imports or not self.can_be(process) or not process.env.get(AGENT):
            return process
        return dataclasses.replace(process, env={**process.env, **self._imports.variable(process.env[AGENT])})

    async def fork(self, process: Process, log: IO[bytes], enter: Callable[[int], object] = lambda pid: None) -> Forked | None:
        """The container as a process, or None if it has to be a fresh one.

        enter: called with its process id before anything of it runs, to be brought into its limits; may raise OSError.
        """
        current = self._current
        if not current or not current.is_warm or not self.can_be(process):
            return None
        try:
            async with asyncio.timeout(ANSWER_S):
                return await current.fork(process, log, enter)
        except TimeoutError:
            self._give_up(current, f"did not answer within {ANSWER_S:g} s")
        except Refused as refused:
            log.write(f"fork server: {refused}, so this is a fresh process\n".encode())
        except (EOFError, OSError):
            pass  # it has ended, which is seen elsewhere
        return None

    def _give_up(self, process: WarmProcess | None, reason: str) -> None:
        """It is not well: the next one is warmed up in its place."""
        if process:
            process.kill()
        if reason != self._told:
            then = "the one before goes on" if self.pid else "functions start as fresh processes until another one is warm"
            self._say(f"the fork server {reason}; {then}")
        self._told = reason

    async def _learn(self, imports: Imports) -> None:
        while True:
            await imports.listen()
            self._changed.set()

    async def _keep(self) -> None:
        pause_s = RESTART_S
        while True:
            process = WarmProcess(self._env, self._log, self._is_busy, self._tasks)
            running = self._tasks.start(self._run_when_quiet(process), "the fork server's keeper")
            await process.settled.wait()
            if process.was_warm:
                pause_s = RESTART_S
                await self._hand_over(process)
                if await self._is_outdated(process, running):
                    continue  # with one that has what is new, while this one goes on
            elif self._imports and self._do_without(process, self._imports):
                continue
            await asyncio.sleep(pause_s)
            pause_s = min(RESTART_LIMIT_S, pause_s * 2)

    async def _is_outdated(self, process: WarmProcess, running: asyncio.Task[None]) -> bool:
        """Wait until there is something that it does not have, or it is over; whether it is the former."""
        changed = self._tasks.start(self._changed.wait(), "waiting for something to import")
        try:
            while not running.done():
                await asyncio.wait({running, changed}, return_when=asyncio.FIRST_COMPLETED)
                if changed.done() and not running.done():
                    if self._order() != process.order:
                        return True
                    self._changed.clear()
                    changed = self._tasks.start(self._changed.wait(), "waiting for something to import")
            return False
        finally:
            changed.cancel()

    def _order(self) -> dict[str, Any]:
        return self._imports.order(_most_bytes()) if self._imports else {}

    async def _hand_over(self, process: WarmProcess) -> None:
        """This one is asked from now on."""
        before, self._current, self._told = self._current, process, ""
        if before:
            before.retire()
        if self._imports:
            await self._imports.held(process.libraries)

    def _do_without(self, process: WarmProcess, imports: Imports) -> bool:
        """Note the library that has kept it from being warm, if it was one; whether another process is worth while at once."""
        suspect, self._suspect = self._suspect, "" if process.without else process.importing
        found = process.without or {"library": process.importing, "reason": "ends or hangs the process that imports it", "stamp": 0}
        library, reason = found["library"], found["reason"]
        if not process.without and library != suspect:
            return False  # somebody may have killed it just then
        is_told = imports.left_out.get(library) == reason
        if not library or not imports.leave_out(library, reason, found["stamp"]):
            return False
        if not is_told:
            self._say(f"{library} is imported by each function itself, which only makes its start longer: it {reason}")
        return True

    def _failed(self, what: str, error: Exception) -> None:
        """A mistake of ours: the next one is tried as after any other end."""
        self._give_up(self._current, f"is not kept: {describe(what, error)}")

    async def _run_when_quiet(self, process: WarmProcess) -> None:
        """One process, from its start to its end."""
        try:
            while self._is_busy():
                await asyncio.sleep(YIELD_S)
            self.starts += 1
            self._changed.clear()
            if self._imports:
                self._imports.look()  # who has just become ready
            process.order = self._order()
            status = await process.run()
        except OSError as error:
            self._give_up(process, f"cannot be started ({error.strerror})")
        else:
            if process.was_warm and not process.is_dismissed:
                self._give_up(process, f"has ended ({status})")
            elif not process.was_warm and not (self._imports and process.without):
                self._give_up(process, f"could not be warmed up, see {self._log}")
        finally:
            process.settled.set()


def _most_bytes() -> int:
    return min(MOST_BYTES, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)


def _is_our_python(program: str, env: Mapping[str, str]) -> bool:
    """Whether a command is the interpreter that we run in, of the same virtual environment."""
    if os.sep in program and not Path(program).is_absolute():
        return False
    found = shutil.which(program, path=env.get("PATH", os.defpath))
    ours = Path(sys.executable)
    return found is not None and Path(found).samefile(ours) and Path(found).parent.samefile(ours.parent)


def _read_at_start(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if _READ_AT_START.match(name)}
