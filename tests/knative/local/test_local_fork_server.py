"""Functions from the fork server: what a fresh process would be, whoever dies, hangs or changes."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from knative.local import fork_server as fork_server_module
from knative.local.fork_server import ForkServer
from knative.local.inheritance import inherited
from knative.local.launch import Process
from knative.local.limits import Limits
from knative.local.process import tail
from knative.local.warm_process import Forked
from tests.knative.local.forking import Stage, ask, children, lean_site, play, until
from tests.knative.local.running import platform_running, service
from tests.support import ROOT, request, wait_until

# An agent that tells what process it is in, and one that cannot be imported.
TELLING = """
import ctypes, os, resource, signal, sys, threading

print("imported", flush=True)

class Agent:
    def load(self, weights, device):
        pass

    def predict(self, inputs):
        files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        umask = os.umask(0)
        os.umask(umask)
        return [{
            "env": {name: ascii(value) for name, value in os.environ.items()},
            "getenv": ctypes.CDLL(None).getenv(b"FUNCTION_AGENT") != 0,
            "cwd": os.getcwd(),
            "argv": sys.argv,
            "path": sys.path,
            "program": sys.modules["__main__"].__file__,
            "command": open(f"/proc/{os.getppid()}/cmdline").read().rstrip("\\0").split("\\0")[1:],
            "files": sorted(file for file in files if not any(kind in file for kind in ("pipe:", "socket:", "/fd/", "/wgunicorn-"))),
            "pipes": sum("pipe:" in file or "socket:" in file for file in files),
            "limits": open("/proc/self/limits").read(),
            "umask": umask,
            "nice": os.nice(0),
            "cpus": sorted(os.sched_getaffinity(0)),
            "oom": open("/proc/self/oom_score_adj").read(),
            "signals": [str(signal.getsignal(number)) for number in (signal.SIGPIPE, signal.SIGHUP, signal.SIGCHLD, signal.SIGXFSZ)],
            "leads": os.getsid(0) == os.getpgid(0) == os.getppid(),
            "output": [sys.stdout.encoding, sys.stdout.line_buffering, sys.stderr.encoding],
            "threads": sorted(thread.name for thread in threading.enumerate() if "Pool" not in thread.name),  # those come as requests do
        }] * len(inputs)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the Python path, with agents, and without the libraries that take long to import."""
    folder = lean_site(tmp_path, monkeypatch)
    (folder / "telling.py").write_text(TELLING)
    (folder / "broken.py").write_text("import no_such_library\n")
    return folder


def test_a_forked_function_is_what_a_fresh_one_would_be(site: Path, tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        told = []
        for fresh in (True, False):
            process = replace(stage.process(TZ="Asia/Tokyo", ODD="a\udcff=\n"), cwd=site)
            async with stage.running(process, fresh=fresh) as container:
                assert container.is_forked is not fresh
                told.append(await ask(process))
            assert tail(process.log, 100)[0] == "imported"
            process.log.unlink()
        for document in told:
            document["env"].pop("PORT")
        assert told[1] == told[0]
        assert told[0]["leads"]
        assert told[0]["command"] == ["-m", "function"]

    play(tmp_path, scene)


def test_a_forked_function_ends_and_comes_back_as_any_other(site: Path, tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        process = stage.process()
        async with stage.running(process) as container:
            await ask(process)
            await container.restart()
            await until("its end", lambda: stage.endings)
            await until("another", lambda: container.running)
            assert container.is_forked
            await ask(process)
        assert stage.endings == ["was ended by SIGKILL"]
        assert not container.running

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("settings", "ending", "reason"),
    [
        pytest.param({"FUNCTION_AGENT": "broken:Agent"}, "ended with status 3", "No module named 'no_such_library'", id="a broken agent"),
        pytest.param({"FUNCTION_MAX_BATCH": "none"}, "ended with status 2", "FUNCTION_MAX_BATCH", id="a wrong setting"),
    ],
)
def test_the_exit_status_and_the_last_words_are_a_fresh_processs(
    site: Path, tmp_path: Path, settings: Mapping[str, str], ending: str, reason: str
) -> None:
    async def scene(stage: Stage) -> None:
        process = replace(stage.process(), env={**stage.process().env, **settings})
        async with stage.running(process) as container:
            assert container.is_forked
            await until("its end", lambda: stage.endings)
        assert stage.endings[0] == ending
        assert reason in tail(process.log, 1)[0]

    play(tmp_path, scene)


def test_the_fork_server_keeps_nothing_of_what_it_forked_and_no_process_is_left_unreaped(site: Path, tmp_path: Path) -> None:
    others = children()

    async def scene(stage: Stage) -> None:
        files = Path(f"/proc/{await stage.warm()}/fd")
        async with stage.running(stage.process(name="first")):  # from here on it has everything that it forks with
            pass
        before = sorted(str(file.readlink()) for file in files.iterdir())
        processes = [stage.process(name=f"function-{number}") for number in range(3)]
        async with contextlib.AsyncExitStack() as stack:
            containers = await asyncio.gather(*(stack.enter_async_context(stage.running(process)) for process in processes))
            assert all(container.is_forked for container in containers)
            await stage.spare()
            assert sorted(str(file.readlink()) for file in files.iterdir()) == before
            assert not Path(f"/proc/{stage.server.pid}/task/{stage.server.pid}/children").read_text()
            assert len(children() - others) == 5
        assert children() - others == {str(stage.server.pid), str(await stage.spare())}

    play(tmp_path, scene)
    assert children() == others


def test_a_process_is_kept_ready_for_the_next_function_and_does_without_the_fork_server(site: Path, tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        server, spare = await stage.warm(), await stage.spare()
        os.kill(server, signal.SIGSTOP)
        await asyncio.sleep(1)
        process, asked_at = stage.process(), time.monotonic()
        async with stage.running(process) as container:
            assert container._child
            assert container._child.pid == spare
            await ask(process)
            ready = await asyncio.to_thread(request, int(process.env["PORT"]), "GET", "/readyz")
            assert ready.json()["stages"]["ready"] <= time.monotonic() - asked_at  # and not since it was forked
            os.kill(server, signal.SIGCONT)
            assert await stage.spare() != spare

    play(tmp_path, scene)


def test_a_spare_process_that_has_died_is_no_loss(site: Path, tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        os.kill(await stage.spare(), signal.SIGKILL)
        async with stage.running(stage.process()) as container:
            assert container.is_forked

    play(tmp_path, scene)


def test_a_function_outlives_the_fork_server_and_another_one_takes_its_place(site: Path, tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        process = stage.process()
        async with stage.running(process):
            await ask(process)
            first = await stage.warm()
            stage.is_busy = True  # so that the next one waits until it was seen that there is none
            os.kill(first, signal.SIGKILL)
            await until("its end", lambda: stage.server.pid != first)
            async with stage.running(stage.process(name="meanwhile")) as meanwhile:
                assert (meanwhile.running, meanwhile.is_forked) == (True, False)
            stage.is_busy = False
            await stage.warm(but=first)
            async with stage.running(stage.process(name="after")) as after:
                assert after.is_forked
            await ask(process)
        assert stage.endings == []
        assert stage.said == ["the fork server has ended (-9); functions start as fresh processes until another one is warm"]

    play(tmp_path, scene)


def test_a_fork_server_that_hangs_is_replaced_and_the_function_is_a_fresh_process(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(stage: Stage) -> None:
        first, spare = await stage.warm(), await stage.spare()
        os.kill(first, signal.SIGSTOP)
        os.kill(spare, signal.SIGKILL)
        monkeypatch.setattr(fork_server_module, "ANSWER_S", 0.2)
        process = stage.process()
        async with stage.running(process) as container:
            assert (container.running, container.is_forked) == (True, False)
            monkeypatch.undo()
            await stage.warm(but=first)
        assert "did not answer" in stage.said[0]

    play(tmp_path, scene)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_forked_function_has_the_limits_of_a_fresh_one(site: Path, tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        for fresh in (False, True):
            process = replace(stage.process(), limits=Limits(cpus=1.0, memory_bytes=10 << 20))
            async with stage.running(process, fresh=fresh) as container:
                assert container.is_forked is not fresh
                assert container._child
                assert len(os.sched_getaffinity(container._child.pid)) == 1
                await until("its end", lambda: any("OOMKilled" in ending for ending in stage.endings))
            stage.endings.clear()

    play(tmp_path, scene)


def test_a_fork_that_nobody_waits_for_any_more_ends(site: Path, tmp_path: Path) -> None:
    others = children()

    async def scene(stage: Stage) -> None:
        server, spare = await stage.warm(), await stage.spare()
        process = stage.process()
        os.kill(server, signal.SIGSTOP)
        os.kill(spare, signal.SIGKILL)
        await until("its end", lambda: str(spare) not in children())
        with process.log.open("ab") as log:
            forking = asyncio.create_task(stage.server.fork(process, log))
            await asyncio.sleep(0.05)
            forking.cancel()
            await asyncio.gather(forking, return_exceptions=True)
        os.kill(server, signal.SIGCONT)
        # What it forks after that is in order behind what was given up.
        async with stage.running(stage.process(name="next")) as following:
            assert following.is_forked
            expected = {str(server), str(following._child.pid), str(await stage.spare())}  # type: ignore[union-attr]
            await until("the end of the one that was given up", lambda: children() - others == expected)
        assert process.log.read_text() == ""

    play(tmp_path, scene)


def test_one_that_cannot_be_warmed_up_is_told_once_and_functions_are_fresh_processes(site: Path, tmp_path: Path) -> None:
    (site / "flask.py").write_text("raise RuntimeError('out of order')\n")

    async def main() -> None:
        stage = Stage(tmp_path)
        stage.server.start()
        await until("two tries", lambda: stage.server.starts >= 2)
        assert stage.server.pid is None
        process = stage.process()
        with process.log.open("ab") as log:
            assert await stage.server.fork(process, log) is None
        await stage.server.stop()
        (said,) = stage.said
        assert said.startswith(f"the fork server could not be warmed up, see {tmp_path}/fork-server.log")

    asyncio.run(main())
    assert "RuntimeError: out of order" in (tmp_path / "fork-server.log").read_text()


def test_it_waits_while_somebody_else_starts(site: Path, tmp_path: Path) -> None:
    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    async def main() -> None:
        stage = Stage(tmp_path)
        stage.is_busy = True
        stage.server.start()
        await asyncio.sleep(0.1)
        assert stage.server.starts == 0
        stage.is_busy = False
        pids = children()
        await until("its process", lambda: children() - pids)
        stage.is_busy = True
        (child,) = children() - pids
        await until("it stopped", lambda: state(int(child)) == "T" or stage.server.pid)
        stage.is_busy = False
        await stage.warm()
        assert stage.server.starts == 1
        await stage.server.stop()

    asyncio.run(main())


def test_code_that_has_changed_is_not_forked(site: Path, tmp_path: Path) -> None:
    (site / "function").symlink_to(ROOT / "function")
    (site / "weights_cache").mkdir()
    for file in (ROOT / "weights_cache").glob("*.py"):
        (site / "weights_cache" / file.name).write_bytes(file.read_bytes())

    async def scene(stage: Stage) -> None:
        first = await stage.warm()
        await stage.spare()
        (site / "weights_cache" / "errors.py").touch()
        async with stage.running(stage.process()) as container:
            assert (container.running, container.is_forked) == (True, False)
            assert "fork server: refused: our code has changed, so this is a fresh process" in container.tail(100)
        await stage.warm(but=first)

    play(tmp_path, scene)
    assert "our code has changed" in (tmp_path / "fork-server.log").read_text()


@pytest.mark.parametrize(
    ("entry", "is_forked"), [("data.py", True), ("json.py", False), ("flask/__init__.py", False), ("json", True), ("json/x.txt", True)]
)
def test_a_working_directory_with_modules_of_its_own_gets_a_fresh_process(site: Path, tmp_path: Path, entry: str, is_forked: bool) -> None:
    folder = tmp_path / "work"
    (folder / entry).parent.mkdir(parents=True)
    (folder / entry).touch()

    async def scene(stage: Stage) -> None:
        process = replace(stage.process(), cwd=folder)
        with process.log.open("ab") as log:
            forked = await stage.server.fork(process, log)
        assert bool(forked) is is_forked
        if forked:
            os.killpg(forked.pid, signal.SIGKILL)
            await forked.wait()
        else:
            assert f"fork server: refused: {folder} has" in process.log.read_text()

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("argv", "env", "expected"),
    [
        pytest.param(("python", "-m", "function"), {}, True, id="a function"),
        pytest.param((sys.executable, "-m", "function"), {}, True, id="named by its path"),
        pytest.param(("python", "-m", "function"), {"PYTHONPATH": "{same}", "FUNCTION_DEVICE": "cuda:0"}, True, id="with what we have too"),
        pytest.param(("python", "-m", "function"), {"CUDA_VISIBLE_DEVICES": "1"}, True, id="read later"),
        pytest.param(("python", "-m", "function"), {"OMP_NUM_THREADS": "1"}, True, id="the thread that the fork server has"),
        pytest.param(("python", "-m", "function"), {"OMP_NUM_THREADS": "2"}, False, id="threads"),
        pytest.param(("python", "-m", "function"), {"MKL_NUM_THREADS": "2"}, False, id="threads of MKL"),
        pytest.param(("python", "-m", "function"), {"PYTHONPATH": "/elsewhere"}, False, id="another path"),
        pytest.param(("python", "-m", "function"), {"PYTHONMALLOC": "malloc"}, False, id="another allocator"),
        pytest.param(("python", "-m", "function"), {"LD_PRELOAD": "libjemalloc.so"}, False, id="a library before all others"),
        pytest.param(("python", "-m", "function"), {"LC_ALL": "C"}, False, id="another locale"),
        pytest.param(("python", "-m", "function"), {"PATH": "/usr/bin:/bin"}, False, id="another python"),
        pytest.param(("python", "-m", "function", "--fast"), {}, False, id="with an argument"),
        pytest.param(("python", "-u", "-m", "function"), {}, False, id="with an option"),
        pytest.param(("./python", "-m", "function"), {}, False, id="of the working directory"),
        pytest.param(("python", "-m", "weights_cache", "serve"), {}, False, id="another program"),
        pytest.param(("no-such-python", "-m", "function"), {}, False, id="not there"),
    ],
)
def test_what_can_be_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], env: Mapping[str, str], expected: bool
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/some/where")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LC_ALL", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    env = inherited() | {name: value.replace("{same}", "/some/where") for name, value in env.items()}
    process = Process("function", True, argv, env, None, (), tmp_path / "log", None, None)
    assert ForkServer(tmp_path / "fork-server.log").can_be(process) is expected


FUNCTION = {
    "command": ["python", "-m", "function"],
    "readinessProbe": {"httpGet": {"path": "/readyz"}},
    "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
}


def functions(*names: str) -> list[dict[str, Any]]:
    env = {"FUNCTION_AGENT": "function.agents.echo:Echo", "FUNCTION_HOST": "127.0.0.1"}
    found = [service(name, container=FUNCTION, env=env) for name in names]
    for document in found:
        document["spec"]["template"]["spec"]["volumes"] = [{"name": "scratch", "emptyDir": {}}]
        document["spec"]["template"]["spec"]["containers"][0]["env"] = [{"name": key, "value": value} for key, value in env.items()]
    return found


def processes(state: Path) -> dict[str, str]:
    """Command by process id of all that write into the platform's directory: its pods and its fork server do."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(state / "logs") in str((folder / "fd/1").readlink()):
                found[folder.name] = (folder / "cmdline").read_text()
    return found


def test_a_platform_forks_its_functions_and_leaves_none_behind_when_it_is_killed(site: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with platform_running(state, functions("one")) as platform:
        wait_until("a warm fork server", lambda: platform.status()["fork_server"]["warm"])
        assert platform.call("one", "/", "POST", {"instances": ["x"]}).json() == {"predictions": ["x"]}
        (pod,) = platform.pods("one")
        assert pod["forked"]
        assert pod["stages"]["spawn"] <= pod["stages"]["ready"]
        assert pod["stages"]["listen"] <= pod["stages"]["import"] <= pod["stages"]["ready"]
        wait_until("gunicorn's two, the fork server and its spare process", lambda: len(processes(state)) == 4)
        platform.server.signal(signal.SIGKILL)
        platform.server.wait()
        wait_until("all gone", lambda: not processes(state))
    with platform_running(state, functions("one"), "--no-fork-server") as platform:
        assert platform.status()["fork_server"] is None
        assert platform.call("one", "/", "POST", {"instances": ["x"]}).status == 200
        assert not platform.pods("one")[0]["forked"]
        assert not [command for command in processes(state).values() if "fork_server" in command]


def test_a_process_is_ours_however_soon_the_one_in_between_is_gone(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = socket.send_fds

    def and_have_the_processor_taken_away(*arguments: Any) -> int:
        sent = send(*arguments)
        time.sleep(0.3)
        return sent

    async def scene(stage: Stage) -> None:
        async with stage.running(stage.process()) as container:
            assert (container.running, container.is_forked) == (True, True)

    monkeypatch.setattr(socket, "send_fds", and_have_the_processor_taken_away)
    play(tmp_path, scene)


def test_the_end_of_a_process_that_was_never_ours_is_seen_too(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    async def scene() -> None:
        between = await asyncio.create_subprocess_exec("sh", "-c", f"cat {gate} >/dev/null & echo $!", stdout=asyncio.subprocess.PIPE)
        told, _ = await between.communicate()
        forked = Forked(int(told))
        gate.write_bytes(b"")  # now it may end
        async with asyncio.timeout(60):
            assert await forked.wait() == 1

    asyncio.run(scene())


def test_a_mistake_of_its_keeper_is_told_once_and_another_one_is_warmed(site: Path, tmp_path: Path) -> None:
    async def main() -> None:
        stage = Stage(tmp_path)
        tries = 0

        def is_busy() -> bool:
            nonlocal tries
            tries += 1
            if tries < 4:
                raise ValueError("no pods")
            return False

        stage.server._is_busy = is_busy
        stage.server.start()
        try:
            await stage.warm()
        finally:
            await stage.server.stop()
        told = "the fork server is not kept: the fork server's keeper failed: ValueError: no pods; functions start as fresh processes"
        assert [line.startswith(told) for line in stage.said] == [True]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
