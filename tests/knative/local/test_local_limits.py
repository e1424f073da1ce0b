"""Containers and their resources.limits."""

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from knative.local import limits as limits_module
from knative.local import procfs
from knative.local.launch import Process
from knative.local.limits import Limiter, Limits, delegated
from knative.local.process import ContainerProcess
from tests.knative.local.running import platform_running, service
from tests.support import wait_until

MIB = 1 << 20
# Takes memory and writes to all of it, in a process of its own.
GREEDY = f"import os, time; os.fork() and time.sleep(600); kept = bytearray(os.urandom(1)) * (150 * {MIB}); time.sleep(600)"
# Maps as much, which the kernel can take back.
MAPPING = f"""
import mmap, time
with open("weights", "wb") as file:
    for _ in range(150):
        file.write(b"w" * {MIB})
with open("weights", "rb") as file:
    kept = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(kept[::4096])
print("mapped", flush=True)
time.sleep(600)
"""


def container(folder: Path, limiter: Limiter, program: str, limits: Limits, told: list[str]) -> ContainerProcess:
    argv = (sys.executable, "-c", program)
    process = Process("function", True, argv, dict(os.environ), folder, (), folder / "log", None, None, limits=limits)
    return ContainerProcess(process, lambda ending: told.append(str(ending)), limiter=limiter)


async def until(what: str, seen: list[str], seconds: float = 30) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not seen:
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{what}: not within {seconds:g} s") from None


def test_one_that_takes_more_memory_than_its_limit_is_killed_and_it_is_said_how_much(tmp_path: Path) -> None:
    told: list[str] = []

    async def main() -> None:
        greedy = container(tmp_path, Limiter(), GREEDY, Limits(memory_bytes=100 * MIB), told)
        await greedy.start()
        await until("its end", told)
        await greedy.stop(0)

    asyncio.run(main())
    match = re.fullmatch(r"OOMKilled: used ([0-9.]+)Mi of 100Mi of memory", told[0])
    assert match, told
    assert float(match[1]) > 100


def test_weights_that_are_mapped_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "LOOK_S", 0.01)
    told: list[str] = []

    async def main() -> None:
        mapping = container(tmp_path, Limiter(), MAPPING, Limits(memory_bytes=100 * MIB), told)
        await mapping.start()
        async with asyncio.timeout(30):
            while "mapped" not in mapping.tail(1):
                await asyncio.sleep(0.02)
        assert mapping._child
        family = procfs.members(mapping._child.pid, procfs.kin())
        assert procfs.own_bytes(family, 0) < 100 * MIB
        await asyncio.sleep(0.1)  # several looks
        assert mapping.running
        await mapping.stop(0)

    asyncio.run(main())
    assert told == []


def test_memory_that_two_processes_share_counts_once(tmp_path: Path) -> None:
    told: list[str] = []
    program = f"import os, time; kept = bytearray(b'x') * (60 * {MIB}); os.fork(); print('two', flush=True); time.sleep(600)"

    async def main() -> None:
        sharing = container(tmp_path, Limiter(), program, Limits(memory_bytes=100 * MIB), told)
        await sharing.start()
        async with asyncio.timeout(30):
            while sharing.tail(2) != ["two", "two"]:
                await asyncio.sleep(0.02)
        assert sharing._child
        family = procfs.members(sharing._child.pid, procfs.kin())
        assert len(family) == 2
        assert procfs.own_bytes(family, 1000 * MIB) > 120 * MIB  # the quick figure
        assert 60 * MIB < procfs.own_bytes(family, 100 * MIB) < 90 * MIB
        await sharing.stop(0)

    asyncio.run(main())


def test_cores_are_spread_over_containers_and_come_back() -> None:
    limiter = Limiter(cpus=range(4))
    shares = [limiter.confine(name, Limits(cpus=1)) for name in "abcd"]
    assert [sorted(share.cpus) for share in shares] == [[0], [1], [2], [3]]
    limiter.release(shares[2])
    assert sorted(limiter.confine("e", Limits(cpus=0.5)).cpus) == [2]
    assert len(limiter.confine("f", Limits(cpus=1.5)).cpus) == 2
    assert limiter.confine("g", Limits(cpus=4)).cpus == frozenset()  # all of them
    assert limiter.confine("h", Limits()).cpus == frozenset()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_process_has_the_cores_that_it_may_use(tmp_path: Path) -> None:
    program = "import os, time; print(len(os.sched_getaffinity(0)), flush=True); time.sleep(600)"

    async def main() -> None:
        single = container(tmp_path, Limiter(), program, Limits(cpus=0.5), [])
        await single.start()
        async with asyncio.timeout(30):
            while not single.tail(1):
                await asyncio.sleep(0.02)
        assert single.tail(1) == ["1"]
        await single.stop(0)

    asyncio.run(main())


def cgroup(folder: Path, controllers: str = "cpu memory pids", members: str = "42\n") -> tuple[Path, Path]:
    """What the kernel shows a process 42 of its cgroup: (its /proc directory, the cgroup)."""
    processes, group = folder / "proc", folder / "cgroup" / "user" / "relight.scope"
    processes.mkdir()
    group.mkdir(parents=True)
    (processes / "cgroup").write_text("0::/user/relight.scope\n")
    (processes / "mountinfo").write_text(f"30 23 0:26 / {folder}/cgroup rw,nosuid - cgroup2 cgroup2 rw\n")
    (group / "cgroup.controllers").write_text(controllers)
    (group / "cgroup.procs").write_text(members)
    return processes, group


def test_a_cgroup_of_our_own_is_made_ready_for_others_below_it(tmp_path: Path) -> None:
    processes, group = cgroup(tmp_path)
    assert delegated(processes, 42) == group
    assert (group / "relight" / "cgroup.procs").read_text() == "0"
    assert (group / "cgroup.subtree_control").read_text() == "+cpu +memory"


@pytest.mark.parametrize(
    ("controllers", "members"),
    [pytest.param("pids", "42\n", id="no controllers"), pytest.param("cpu memory", "42\n43\n", id="others in it"), ("cpu memory", "")],
)
def test_any_other_cgroup_is_left_as_it_is(tmp_path: Path, controllers: str, members: str) -> None:
    processes, group = cgroup(tmp_path, controllers, members)
    assert delegated(processes, 42) is None
    assert not (group / "relight").exists()


def test_limits_are_written_where_a_cgroup_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    limiter = Limiter(tmp_path, cpus=range(4))
    assert limiter.describe() == {"memory": "cgroup", "cpu": "cgroup"}
    share = limiter.confine("ns/hello-1/function/", Limits(cpus=1.5, memory_bytes=512 * MIB))
    group = tmp_path / "ns_hello-1_function_"
    assert share.group == group
    assert (group / "memory.max").read_text() == str(512 * MIB)
    assert (group / "memory.oom.group").read_text() == "1"
    assert (group / "cpu.max").read_text() == "150000 100000"
    assert len(share.cpus) == 2
    assert share.out_of_memory() is None
    (group / "memory.events").write_text("low 0\nmax 7\noom 1\noom_kill 1\n")
    (group / "memory.peak").write_text(str(512 * MIB))
    assert share.out_of_memory() == "OOMKilled: used 512Mi of 512Mi of memory"
    assert share.out_of_memory() is None  # it is told once


def test_a_pod_that_takes_too_much_memory_is_told_in_the_terminal_and_the_status_and_started_again(tmp_path: Path) -> None:
    greedy = {
        "name": "greedy",
        "command": ["python", "-c", GREEDY],
        "resources": {"limits": {"memory": "100Mi"}},
    }
    with platform_running(tmp_path, [service("hello", greedy, scale={"min-scale": "1"})]) as platform:
        found = platform.wait_for("hello", "a restart", lambda found: found["pods"] and found["pods"][0]["restarts"]["greedy"], 60)
        assert found["pods"][0]["exits"]["greedy"].startswith("OOMKilled: used ")
        wait_until("the terminal", lambda: "greedy OOMKilled: used " in platform.server.said())
        said = platform.server.said()
        assert "of 100Mi of memory" in said
        assert "resources.limits: memory is looked at every 0.5 s, cpu in whole cores" in said or "memory by cgroup" in said
        assert platform.status()["limits"].keys() == {"memory", "cpu"}


def test_memory_that_cannot_be_looked_at_is_told_and_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "LOOK_S", 0.001)
    told: list[str] = []
    over: list[str] = []
    broken = [True]

    def measure(watched: dict[limits_module.Confinement, tuple[int, int]]) -> dict[limits_module.Confinement, int]:
        if broken[0]:
            raise ValueError("this is no /proc")
        return dict.fromkeys(watched, 2 * MIB)

    monkeypatch.setattr(limits_module, "_measure", measure)

    async def main() -> None:
        limiter = Limiter(tell=told.append)
        assert "problem" not in limiter.describe()
        limiter.watch(limiter.confine("a", Limits(memory_bytes=MIB)), 1, over.append)
        await until("the problem", told)
        assert limiter.describe()["problem"] == told[0]
        broken[0] = False
        await until("its kill", over)
        async with asyncio.timeout(60):
            while "problem" in limiter.describe():
                await asyncio.sleep(0.001)
        await limiter.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert told[0] == "the look at the memory of containers failed: ValueError: this is no /proc"
    assert over == [limits_module.killed(2 * MIB, MIB)]
