"""`resources.limits` of containers, as well as the kernel lets us keep them.

Memory: a cgroup's `memory.max` where we own a cgroup of version 2 that the controllers are delegated to (as under `systemd-run --user
--scope -p Delegate=yes`). Elsewhere what a container uses is looked at twice a second, and the container is killed once it is more than its
limit. RLIMIT_AS would be no limit of memory: it counts addresses, and a function that maps 16 GB of weights, or torch that reserves room,
has many times more of those than memory.

CPU: whole cores, the least taken ones, by affinity, so that libraries see as many as they may use and start that many threads; and with a
cgroup its exact share of them (`cpu.max`).
"""

import asyncio
import contextlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from knative.local import procfs
from knative.local.again import Again
from knative.local.quantity import show_bytes

LOOK_S = 0.5
PERIOD_US = 100_000  # of a CPU quota, as Kubernetes has it
_LEAF = "relight"  # where we ourselves go: a cgroup that has controllers for others holds no processes


@dataclass(frozen=True)
class Limits:
    """The most that a container may take; None is no limit. `gpus`: whole devices that it has for itself."""

    cpus: float | None = None
    memory_bytes: int | None = None
    gpus: int = 0


NO_LIMITS = Limits()


class Confinement:
    """One container's share of the machine, through all its restarts."""

    def __init__(self, limits: Limits, cpus: frozenset[int], group: Path | None) -> None:
        """cpus: the cores it may use, none for all. group: its cgroup."""
        self.limits = limits
        self.cpus = cpus
        self.group = group
        self._kills = 0  # by the kernel, that have been told of

    def enter(self, pid: int) -> None:
        """Bring a process in, 0 for the present one. What it has allocated before is not counted. Raises OSError."""
        if self.group:
            (self.group / "cgroup.procs").write_text(str(pid))
        if self.cpus:
            os.sched_setaffinity(pid, self.cpus)

    def out_of_memory(self) -> str | None:
        """What happened, if the kernel has killed it for its memory since this was asked last."""
        if not self.group or not self.limits.memory_bytes:
            return None
        try:
            kills = int(dict(line.split() for line in (self.group / "memory.events").read_text().splitlines()).get("oom_kill", 0))
            if kills == self._kills:
                return None
            self._kills = kills
            peak = self.group / "memory.peak"  # since Linux 5.19
            return killed(int(peak.read_text()) if peak.exists() else self.limits.memory_bytes, self.limits.memory_bytes)
        except (OSError, ValueError):
            return None


def killed(used: int, limit: int) -> str:
    """What is said of a container that used too much memory, both in bytes."""
    return f"OOMKilled: used {show_bytes(used)} of {show_bytes(limit)} of memory"


class Limiter:
    """Gives containers their shares of this machine."""

    def __init__(
        self, group: Path | None = None, cpus: Iterable[int] | None = None, tell: Callable[[str], object] = lambda text: None
    ) -> None:
        """group: a cgroup below which we may make others (see `delegated`). cpus: the cores there are, else those that we may use.

        tell: that memory cannot be looked at, so that nobody is held to a limit of it.
        """
        self._group = group
        controllers = (group / "cgroup.subtree_control").read_text().split() if group else []
        self._has_memory, self._has_cpu = "memory" in controllers, "cpu" in controllers
        self._load = Counter(dict.fromkeys(os.sched_getaffinity(0) if cpus is None else cpus, 0))
        self._watched: dict[Confinement, tuple[int, Callable[[str], object]]] = {}
        self._looking = Again("the look at the memory of containers", self._look, LOOK_S, tell)

    def describe(self) -> dict[str, str]:
        """The mechanisms in force; an entry of `/api/status`."""
        problem = {"problem": self._looking.problem} if self._looking.problem else {}
        return {"memory": "cgroup" if self._has_memory else "watched", "cpu": "cgroup" if self._has_cpu else "cores"} | problem

    def explain(self) -> str:
        """The same for people."""
        memory = "memory by cgroup" if self._has_memory else f"memory is looked at every {LOOK_S:g} s"
        return f"{memory}, cpu {'by quota and ' if self._has_cpu else ''}in whole cores (affinity)"

    def confine(self, name: str, limits: Limits) -> Confinement:
        """A share for a container of this name."""
        cpus: frozenset[int] = frozenset()
        if limits.cpus and (count := max(1, math.ceil(limits.cpus))) < len(self._load):
            cpus = frozenset(sorted(self._load, key=lambda cpu: (self._load[cpu], cpu))[:count])
        group = None
        if self._group and (limits.cpus or limits.memory_bytes):
            with contextlib.suppress(OSError):  # then it is watched instead
                group = self._make_group(name, limits)
        self._load.update(cpus)
        return Confinement(limits, cpus, group)

    def watch(self, confinement: Confinement, root: int, over: Callable[[str], object]) -> None:
        """Look after the memory of the session that `root` leads, if nobody else does; `over` is told once when it is too much."""
        if confinement.limits.memory_bytes and not (confinement.group and self._has_memory):
            self._watched[confinement] = (root, over)
            self._looking.start()

    def unwatch(self, confinement: Confinement) -> None:
        """Its process has ended."""
        self._watched.pop(confinement, None)

    async def stop(self) -> None:
        """Look after nobody any more."""
        await self._looking.stop()

    def release(self, confinement: Confinement) -> None:
        """The container is gone for good."""
        self.unwatch(confinement)
        self._load.subtract(confinement.cpus)
        if confinement.group:
            with contextlib.suppress(OSError):  # somebody of another user is still in it
                confinement.group.rmdir()

    def _make_group(self, name: str, limits: Limits) -> Path:
        assert self._group
        group = self._group / re.sub("[^-.a-z0-9]", "_", name)
        group.mkdir(exist_ok=True)
        if self._has_memory and limits.memory_bytes:
            (group / "memory.max").write_text(str(limits.memory_bytes))
            (group / "memory.oom.group").write_text("1")  # all of it or nothing: half a server is of no use
            if (swap := group / "memory.swap.max").exists():
                swap.write_text("0")
        if self._has_cpu and limits.cpus:
            (group / "cpu.max").write_text(f"{max(1000, round(limits.cpus * PERIOD_US))} {PERIOD_US}")
        return group

    async def _look(self) -> None:
        watched = dict(self._watched)
        if not watched:
            return
        asked = {one: (root, one.limits.memory_bytes or 0) for one, (root, _) in watched.items()}
        used = await asyncio.to_thread(_measure, asked)
        for one, (root, over) in watched.items():
            limit = one.limits.memory_bytes or 0
            if used[one] > limit and self._watched.get(one, (0,))[0] == root:
                self.unwatch(one)
                over(killed(used[one], limit))


def _measure(watched: dict[Confinement, tuple[int, int]]) -> dict[Confinement, int]:
    """By (session leader, limit): bytes of memory. It reads a file of each process, so not in the loop."""
    all_of_them = procfs.kin()
    return {one: procfs.own_bytes(procfs.members(root, all_of_them), limit) for one, (root, limit) in watched.items()}


def delegated(processes: Path = Path("/proc/self"), pid: int | None = None) -> Path | None:
    """A cgroup (version 2) in which we alone are and whose memory or CPU controller we may hand on, made ready for that; None without one.

    We ourselves move to a cgroup below it. One with others in it, such as a shell's, is left as it is.
    """
    try:
        own = next(line[3:] for line in (processes / "cgroup").read_text().splitlines() if line.startswith("0::"))
        mount = next(line.split()[4] for line in (processes / "mountinfo").read_text().splitlines() if " - cgroup2 " in line)
        group = Path(mount) / own.strip("/")
        offered = {"memory", "cpu"} & set((group / "cgroup.controllers").read_text().split())
        if not offered or (group / "cgroup.procs").read_text().split() != [str(pid or os.getpid())]:
            return None
        leaf = group / _LEAF
        leaf.mkdir(exist_ok=True)
        (leaf / "cgroup.procs").write_text("0")
        try:
            (group / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(offered)))
        except OSError:
            (group / "cgroup.procs").write_text("0")
            leaf.rmdir()
            return None
    except (OSError, StopIteration):
        return None
    return group
