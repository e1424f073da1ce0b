"""A container as a process group: started again when it ends, and ended with everything that it started."""

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from knative.local import process as process_module
from knative.local.launch import Process
from knative.local.process import ContainerProcess, Ending, tail
from knative.local.procfs import MARK

T = TypeVar("T")


def container(log: Path, *argv: str, on_exit: Callable[[Ending], object] = lambda _: None, cwd: Path | None = None) -> ContainerProcess:
    """One container with this command; its output goes to a folder that is not there yet."""
    process = Process("function", True, argv, dict(os.environ), cwd, (), log, None, None)
    return ContainerProcess(process, on_exit)


def shell(log: Path, script: str, on_exit: Callable[[Ending], object] = lambda _: None) -> ContainerProcess:
    return container(log, "sh", "-c", script, on_exit=on_exit)


GOODBYE = """
import signal, sys, time

def end(*_):
    time.sleep(0.2)
    print("goodbye", flush=True)
    sys.exit()

signal.signal(signal.SIGTERM, end)
print("here", flush=True)
signal.pause()
"""


WHICH_SIGNAL = """
import ctypes, signal

PR_GET_PDEATHSIG = 2
number = ctypes.c_int()
ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(number))
print(number.value, flush=True)
signal.pause()
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "hello-1" / "function.log"


async def until(what: str, probe: Callable[[], T], seconds: float = 60) -> T:
    """The first true value of `probe`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := probe():
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(f"{what}: not within {seconds:g} s")


def lines(log: Path) -> list[str]:
    return tail(log, 100)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def running(pids: Sequence[str]) -> list[str]:
    return [pid for pid in pids if alive(int(pid))]


def test_both_outputs_go_to_the_log_and_there_is_no_input(log: Path) -> None:
    async def main() -> None:
        function = shell(log, "echo out; echo err >&2; cat; echo end of input; exec sleep 60")
        await function.start()
        await until("three lines", lambda: lines(log) == ["out", "err", "end of input"])
        assert function.running
        await function.stop(5)

    asyncio.run(main())


def test_it_has_the_environment_and_the_directory_that_it_was_planned_with(log: Path, tmp_path: Path) -> None:
    async def main() -> None:
        planned = Process(
            "function", True, ("/bin/sh", "-c", "/usr/bin/env; pwd; exec sleep 60"), {"ONLY": "this"}, tmp_path, (), log, None, None
        )
        function = ContainerProcess(planned, lambda _: None)
        await function.start()
        said = await until("all of it", lambda: lines(log) if str(tmp_path) in lines(log) else [])
        assert "ONLY=this" in said
        assert not any(line.startswith("HOME=") for line in said)
        await function.stop(5)

    asyncio.run(main())


def test_one_that_ends_is_told_of_and_started_again_after_pauses_that_double(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "RESTART_S", 0.1)
    exits = []

    async def main() -> None:
        function = shell(log, "date +%s.%N; exit 3", on_exit=lambda _: exits.append(time.time()))
        await function.start()
        await until("four starts", lambda: len(lines(log)) == 4)
        assert function.restarts == 3
        await function.stop(5)

    asyncio.run(main())
    starts = [float(line) for line in lines(log)]
    pauses = [start - ended for ended, start in zip(exits, starts[1:], strict=False)]
    assert pauses[0] < 10  # the first one is at once, and not after the kubelet's 10 s
    assert pauses[1] > 0.09
    assert pauses[2] > 0.19


def test_after_a_long_life_a_crash_counts_as_the_first_one_again(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "RESTART_S", 3600.0)
    monkeypatch.setattr(process_module, "STEADY_S", -1.0)

    async def main() -> None:
        function = shell(log, "echo here; exit 3")
        await function.start()
        await until("four starts, each as if it were the first one", lambda: len(lines(log)) >= 4)
        await function.stop(5)

    asyncio.run(main())


def test_one_that_was_well_is_started_again_soon_however_often_it_ends(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "RESTART_S", 3600.0)
    monkeypatch.setattr(process_module, "SHORT_RESTART_S", 0.01)

    async def main() -> None:
        function = shell(log, "echo here; exec sleep 600")
        await function.start()
        for count in range(1, 4):
            await until("its start", lambda count=count: len(lines(log)) == count)  # type: ignore[misc]
            function.is_well()
            await function.restart("is not well any more")
        await until("a fourth start", lambda: len(lines(log)) == 4)
        await function.stop(5)

    asyncio.run(main())


def test_one_that_is_well_for_moments_only_has_short_pauses(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "SHORT_RESTART_S", 0.2)
    ended, began = [], []

    async def main() -> None:
        function = shell(log, "exit 3", on_exit=lambda _: ended.append(time.monotonic()))

        def begin() -> None:
            began.append(time.monotonic())
            function.is_well()

        function._on_start = begin
        await function.start()
        await until("a fourth start", lambda: len(began) >= 4)
        await function.stop(5)

    asyncio.run(main())
    pauses = [start - end for end, start in zip(ended, began[1:], strict=False)]
    assert min(pauses[1:3]) >= 0.2


def test_logs_may_be_tidied_away_while_it_runs(log: Path) -> None:
    async def main() -> None:
        function = shell(log, "echo here; exec sleep 600")
        await function.start()
        await until("its start", lambda: lines(log))
        shutil.rmtree(log.parent)
        await function.restart("is not well any more")
        await until("its next start", lambda: lines(log))
        await function.stop(5)

    asyncio.run(main())


def test_one_that_is_killed_from_outside_is_started_again_soon_however_often(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "RESTART_S", 3600.0)
    monkeypatch.setattr(process_module, "SHORT_RESTART_S", 0.01)
    endings: list[Ending] = []

    async def main() -> None:
        function = shell(log, "echo $$; exec sleep 600", on_exit=endings.append)
        await function.start()
        for count in range(1, 5):
            await until("its start", lambda count=count: len(lines(log)) == count)  # type: ignore[misc]
            os.kill(int(lines(log)[-1]), signal.SIGKILL)
        await until("a fifth start", lambda: len(lines(log)) == 5)
        await function.stop(5)

    asyncio.run(main())
    assert [(ending.text, ending.is_own) for ending in endings] == [("was ended by SIGKILL", False)] * 4


def test_one_that_the_kernel_killed_for_its_memory_has_ended_by_itself(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = iter([3, 4, 4])
    monkeypatch.setattr(process_module, "_oom_kills", lambda: next(kills))
    endings: list[Ending] = []

    async def main() -> None:
        function = shell(log, "echo $$; exec sleep 600", on_exit=endings.append)
        await function.start()
        await until("its start", lambda: lines(log))
        os.kill(int(lines(log)[-1]), signal.SIGKILL)
        await until("its end", lambda: endings)
        await function.stop(5)

    asyncio.run(main())
    assert endings == [Ending("was ended by SIGKILL, and this machine was out of memory")]


def test_a_mistake_of_ours_in_keeping_it_is_told(log: Path) -> None:
    told: list[tuple[str, str]] = []

    def fail(_: Ending) -> None:
        raise ValueError("odd")

    async def main() -> None:
        planned = Process("function", True, ("true",), dict(os.environ), None, (), log, None, None)
        function = ContainerProcess(planned, fail, on_failure=lambda what, error: told.append((what, str(error))))
        await function.start()
        await until("the mistake", lambda: told)
        await function.stop(5)

    asyncio.run(main())
    assert told == [("keeping the container function", "odd")]


@pytest.mark.parametrize("command", ["no-such-command", "/etc/hostname"], ids=["not found", "not a program"])
def test_a_command_that_cannot_be_started_says_so_in_the_log_and_is_tried_again(
    log: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "RESTART_S", 0.01)

    async def main() -> None:
        function = container(log, command, "--fast")
        await function.start()
        assert not function.running
        await until("another try", lambda: len(lines(log)) >= 2)
        await function.stop(5)

    asyncio.run(main())
    assert lines(log)[0].startswith(f"cannot start {command}: ")
    assert "--fast" not in log.read_text()  # among arguments there may be a secret


def test_a_working_directory_that_is_not_there_is_named(log: Path) -> None:
    async def main() -> None:
        function = container(log, "true", cwd=Path("/no/such/place"))
        await function.start()
        await function.stop(5)

    asyncio.run(main())
    assert "/no/such/place" in lines(log)[0]


def test_a_command_that_was_not_there_runs_once_it_is(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "RESTART_S", 0.01)

    async def main() -> None:
        function = container(log, str(tmp_path / "late"))
        await function.start()
        (tmp_path / "new").write_text("#!/bin/sh\necho here at last\nexec sleep 60\n")
        (tmp_path / "new").chmod(0o755)
        (tmp_path / "new").rename(tmp_path / "late")
        await until("the command", lambda: lines(log)[-1] == "here at last")
        await function.stop(5)

    asyncio.run(main())


def test_what_it_started_ends_with_it(log: Path) -> None:
    async def main() -> None:
        function = shell(log, "sleep 60 & echo $!; (trap '' TERM; sleep 60) & echo $!; echo $$; wait")
        await function.start()
        pids = await until("three of them", lambda: lines(log) if len(lines(log)) == 3 else [])
        assert running(pids) == pids
        await function.stop(5)
        await until("all gone", lambda: not running(pids))

    asyncio.run(main())


def test_what_it_left_behind_when_it_crashed_ends_too(log: Path) -> None:
    async def main() -> None:
        function = shell(log, "sleep 60 & echo $!; exit 3")
        await function.start()
        pid, *_ = await until("its child", lambda: lines(log))
        await until("gone", lambda: not alive(int(pid)))
        await function.stop(5)

    asyncio.run(main())


def test_one_that_listens_to_sigterm_ends_in_its_own_time(log: Path) -> None:
    async def main() -> None:
        function = container(log, sys.executable, "-c", GOODBYE)
        await function.start()
        await until("its start", lambda: lines(log))
        await function.stop(60)
        assert lines(log) == ["here", "goodbye"]
        assert not function.running

    asyncio.run(main())


def test_one_that_does_not_listen_to_sigterm_is_killed_after_its_grace(log: Path) -> None:
    async def main() -> None:
        function = shell(log, "trap '' TERM; echo $$; while :; do sleep 0.01; done")
        await function.start()
        (pid,) = await until("its start", lambda: lines(log))
        began = time.monotonic()
        await function.stop(0.3)
        assert time.monotonic() - began >= 0.3
        assert not alive(int(pid))

    asyncio.run(main())


def test_one_that_is_stopped_does_not_come_back(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "RESTART_S", 0.01)
    exits = []

    async def main() -> None:
        function = shell(log, "echo here; exec sleep 60", on_exit=lambda _: exits.append(True))
        await function.start()
        await until("its start", lambda: lines(log))
        await function.stop(5)
        await asyncio.sleep(0.1)

    asyncio.run(main())
    assert lines(log) == ["here"]
    assert exits == []


def test_stopping_one_that_is_between_two_starts_signals_nobody(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The number of the process that has ended may be somebody else's by now.
    exits: list[bool] = []
    signalled: list[tuple[int, int]] = []

    async def main() -> None:
        function = shell(log, "exit 3", on_exit=lambda _: exits.append(True))
        await function.start()
        await until("its second end, after which there is a pause", lambda: len(exits) == 2)
        monkeypatch.setattr(os, "killpg", lambda *call: signalled.append(call))
        await function.stop(5)

    asyncio.run(main())
    assert signalled == []


def test_stopping_one_that_is_just_being_started_waits_until_that_is_taken_back(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken_back: list[bool] = []

    async def main() -> None:
        starting = asyncio.Event()

        async def start(*_: object, **__: object) -> None:
            starting.set()
            try:
                await asyncio.sleep(600)
            finally:
                await asyncio.sleep(0.05)  # as asyncio ends what nobody will have
                taken_back.append(True)

        function = shell(log, "exit 3")
        await function.start()
        monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
        await starting.wait()
        await function.stop(5)
        assert taken_back

    asyncio.run(main())


def test_a_log_that_is_long_is_put_aside_and_goes_on(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "LOG_LOOK_S", 0.01)
    monkeypatch.setattr(process_module, "LOG_BYTES", 10_000)

    async def main() -> None:
        function = shell(log, "n=0; while :; do n=$((n + 1)); echo line $n of a log that goes on and on; sleep 0.0005; done")
        await function.start()
        aside = log.with_name("function.log.1")
        await until("the second time", lambda: aside.exists() and "line 1 of" not in aside.read_text() and log.stat().st_size)
        assert log.stat().st_size < 100_000
        assert not log.read_bytes().startswith(b"\0")  # it is written on from its new beginning
        assert lines(log)[-1].startswith("line ")
        await function.stop(0)

    asyncio.run(main())


def test_what_it_started_in_a_session_of_its_own_ends_with_it(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "RESTART_S", 0.01)
    mark = f"{log.parent}/"
    env = {**os.environ, MARK: mark}

    async def main() -> None:
        argv = ("sh", "-c", "(setsid sh -c 'trap \"\" TERM; echo $$; while :; do sleep 0.1; done' &); exec sleep 600")
        function = ContainerProcess(Process("function", True, argv, env, None, (), log, None, None), lambda _: None)
        await function.start()
        (first,) = await until("its daemon", lambda: lines(log))
        await function.restart()
        _, second = await until("its second daemon", lambda: lines(log) if len(lines(log)) == 2 else [])
        assert running([first, second]) == [second]
        await function.stop(5)
        assert running([first, second]) == []

    asyncio.run(main())


def test_the_reason_that_it_was_killed_for_is_how_it_ended(log: Path) -> None:
    endings: list[Ending] = []

    async def main() -> None:
        function = shell(log, "echo here; exec sleep 600", on_exit=endings.append)
        await function.start()
        await until("its start", lambda: lines(log))
        await function.restart("is not well")
        await until("its end", lambda: endings)
        assert function.last_exit == "is not well"
        await function.stop(0)

    asyncio.run(main())
    assert endings == [Ending("is not well")]


def test_a_restart_kills_it_and_starts_it_again(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "RESTART_S", 0.01)

    async def main() -> None:
        function = shell(log, "trap '' TERM; echo $$; while :; do sleep 0.01; done")
        await function.start()
        (first,) = await until("its start", lambda: lines(log))
        await function.restart()
        _, second = await until("its second start", lambda: lines(log) if len(lines(log)) == 2 else [])
        assert running([first, second]) == [second]
        await function.stop(0)

    asyncio.run(main())


def test_an_interrupt_at_the_terminal_is_not_for_it(log: Path) -> None:
    async def main() -> None:
        function = container(
            log, sys.executable, "-c", "import os, signal; print(os.getpid(), os.getpgid(0), os.getsid(0), flush=True); signal.pause()"
        )
        await function.start()
        (numbers,) = await until("its numbers", lambda: lines(log)[:1])
        pid, group, session = map(int, numbers.split())
        assert pid == group == session
        assert session != os.getsid(0)
        await function.stop(5)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(None, [], id="no log"),
        pytest.param(b"", [], id="empty"),
        pytest.param(b"a\nb\nc\nd\n", ["c", "d"], id="the last two of four"),
        pytest.param(b"a", ["a"], id="no line break yet"),
        pytest.param(b"\xff\xfe bytes\n", ["\ufffd\ufffd bytes"], id="not text"),
        pytest.param(b"x" * 100_000 + b"\nlast\n", ["x" * (16_384 - 6), "last"], id="a line of 100 kB is cut"),
    ],
)
def test_the_last_lines_of_a_log_are_shown(log: Path, content: bytes | None, expected: list[str]) -> None:
    log.parent.mkdir(parents=True)
    if content is not None:
        log.write_bytes(content)
    assert tail(log, 2) == expected


def test_the_signal_that_a_dying_platform_leaves_behind_is_sigterm(log: Path) -> None:
    async def main() -> None:
        function = container(log, sys.executable, "-c", WHICH_SIGNAL)
        await function.start()
        assert await until("its answer", lambda: lines(log)[:1]) == [str(signal.SIGTERM.value)]
        await function.stop(5)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("command", "told"),
    [
        pytest.param(("sh", "-c", "exit 3"), "ended with status 3", id="ended"),
        pytest.param(("sh", "-c", "exit 137"), "ended with status 137 (SIGKILL)", id="a child killed"),
        pytest.param(("sh", "-c", "exit 255"), "ended with status 255", id="no signal"),
        pytest.param(("sh", "-c", "kill -KILL $$"), "was ended by SIGKILL", id="killed"),
        pytest.param(("/no/such/command",), "could not be started: No such file or directory", id="never there"),
    ],
)
def test_how_a_process_ended_is_told(log: Path, command: tuple[str, ...], told: str) -> None:
    endings: list[Ending] = []

    async def main() -> None:
        function = container(log, *command, on_exit=endings.append)
        await function.start()
        await until("the end", lambda: endings)
        await function.stop(5)

    asyncio.run(main())
    assert endings[0].text == told


def test_a_log_that_grows_fast_is_kept_short_with_what_is_last_in_it(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "LOG_LOOK_S", 0.01)
    monkeypatch.setattr(process_module, "LOG_BYTES", 100_000)

    async def main() -> None:
        function = shell(log, "head -c 1000000 /dev/zero; echo; echo the last; exec sleep 600")
        await function.start()
        aside = log.with_name(f"{log.name}.1")
        await until("put aside", lambda: aside.exists() and b"the last" in aside.read_bytes() + log.read_bytes())
        assert aside.stat().st_size <= 100_000
        await function.stop(5)

    asyncio.run(main())
