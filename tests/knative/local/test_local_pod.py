"""A pod from asked for to gone: its probes, what it tells about itself, and its end."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from knative.local import health as health_module
from knative.local import pod as pod_module
from knative.local import process as process_module
from knative.local import troubles as troubles_module
from knative.local.errors import PlatformError
from knative.local.launch import PodPlan, Probe, Process
from knative.local.pod import Pod, Report
from knative.local.trouble import Trouble
from tests.support import free_port

SLEEP = ("sh", "-c", "echo $$; exec sleep 60")
EVERY_S = 0.02


class UserContainer:
    """What answers at the pod's port: a test says how."""

    def __init__(self) -> None:
        self.port = 0
        self.status = 200
        self.body = b""
        self.headers: dict[str, str] = {}
        self.asked = 0
        self.asked_with: dict[str, str] = {}

    async def answer(self, request: web.BaseRequest) -> web.Response:
        self.asked += 1
        self.asked_with = dict(request.headers)
        return web.Response(status=self.status, body=self.body, headers=self.headers)

    def says(self, document: Any, status: int = 200) -> None:
        self.status, self.body, self.headers = status, json.dumps(document).encode(), {"Content-Type": "application/json"}


class Stage:
    """A user container and the means to make pods of it."""

    def __init__(self, folder: Path, session: aiohttp.ClientSession) -> None:
        self.folder = folder
        self.function = UserContainer()
        self.changes: list[str] = []
        self._session = session

    def probe(self, path: str | None = "/readyz", failures: int = 2) -> Probe:
        return Probe(self.function.port, path, {"X-Probe": "yes"}, period_s=EVERY_S, timeout_s=60, failures=failures, delay_s=0)

    def process(self, name: str = "function", *argv: str, readiness: Probe | None = None, liveness: Probe | None = None) -> Process:
        return Process(
            container=name,
            is_main=name == "function",
            argv=argv or SLEEP,
            env=dict(os.environ),
            cwd=None,
            directories=(self.folder / "pod" / "volumes" / "scratch",),
            log=self.folder / f"{name}.log",
            readiness=readiness,
            liveness=liveness,
        )

    def pod(self, *processes: Process) -> Pod:
        plan = PodPlan(self.function.port, processes or (self.process(readiness=self.probe()),))
        return Pod("hello-1", plan, self.folder / "pod", self._session, lambda pod: self.changes.append(pod.phase))


@contextlib.asynccontextmanager
async def setting(folder: Path) -> AsyncIterator[Stage]:
    async with aiohttp.ClientSession() as session:
        stage = Stage(folder, session)
        runner = web.ServerRunner(web.Server(stage.function.answer))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stage.function.port = runner.addresses[0][1]
        try:
            yield stage
        finally:
            await runner.cleanup()


def play(folder: Path, scene: Callable[[Stage], Awaitable[None]]) -> None:
    async def main() -> None:
        async with setting(folder) as stage:
            await scene(stage)

    asyncio.run(main())


async def until(what: str, probe: Callable[[], object], seconds: float = 60) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not probe():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"{what}: not within {seconds:g} s") from None


async def becomes(pod: Pod, phase: str) -> None:
    await until(f"the pod {phase}", lambda: pod.phase == phase)


async def some_probes(stage: Stage, count: int = 5) -> None:
    asked = stage.function.asked
    await until("some probes more", lambda: stage.function.asked >= asked + count)


def test_a_pod_is_ready_once_its_readiness_probe_is_answered_well(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.function.status = 503
        pod = stage.pod()
        assert pod.phase == "pending"
        await pod.start()
        await some_probes(stage)
        assert (pod.phase, pod.unready_since) == ("starting", pod.asked_at)
        stage.function.status = 200
        await becomes(pod, "ready")
        assert pod.unready_since is None
        assert 0 < pod.stages["spawn"] < pod.stages["ready"]
        assert stage.function.asked_with["X-Probe"] == "yes"
        await pod.drain(0)
        assert stage.changes == ["starting", "ready", "draining"]

    play(tmp_path, scene)


def test_a_pod_without_an_http_probe_is_ready_once_its_port_is_open(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        pod = stage.pod(stage.process(readiness=stage.probe(path=None)))
        await pod.start()
        await becomes(pod, "ready")
        assert stage.function.asked == 0
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_ready_pod_is_taken_out_after_so_many_failures_and_comes_back(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        pod = stage.pod(stage.process(readiness=stage.probe(failures=3)))
        await pod.start()
        await becomes(pod, "ready")
        first_ready_s = pod.stages["ready"]
        asked = stage.function.asked
        stage.function.status = 500
        await becomes(pod, "starting")
        assert stage.function.asked - asked in (3, 4)  # one may have been on its way
        stage.function.status = 200
        await becomes(pod, "ready")
        assert pod.stages["ready"] == first_ready_s
        assert pod.status()["restarts"] == {"function": 0}
        await pod.drain(0)

    play(tmp_path, scene)


def test_the_progress_deadline_counts_again_from_when_a_pod_stopped_being_ready(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        pod = stage.pod()
        await pod.start()
        await becomes(pod, "ready")
        stage.function.status = 500
        await becomes(pod, "starting")
        assert pod.unready_since
        assert pod.unready_since > pod.asked_at + pod.stages["ready"]
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_sidecar_with_a_readiness_probe_has_a_say(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        closed = Probe(1, None, {}, period_s=EVERY_S, timeout_s=1, failures=2, delay_s=0)
        pod = stage.pod(stage.process(readiness=stage.probe()), stage.process("sidecar", readiness=closed))
        await pod.start()
        await some_probes(stage)
        assert pod.phase == "starting"
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_crash_of_the_user_container_is_noticed_before_any_probe(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        readiness = Probe(stage.function.port, "/", {}, period_s=60, timeout_s=1, failures=3, delay_s=0)
        pod = stage.pod(stage.process("function", "sh", "-c", f"until [ -e {tmp_path}/crash ]; do sleep 0.01; done", readiness=readiness))
        await pod.start()
        await becomes(pod, "ready")
        (tmp_path / "crash").touch()
        await becomes(pod, "starting")
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_crash_of_a_sidecar_leaves_the_pod_ready(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        sidecar = stage.process("sidecar", "sh", "-c", f"until [ -e {tmp_path}/crash ]; do sleep 0.01; done; echo crashed")
        pod = stage.pod(stage.process(readiness=stage.probe()), sidecar)
        await pod.start()
        await becomes(pod, "ready")
        (tmp_path / "crash").touch()
        await until("the crash", lambda: "crashed" in (tmp_path / "sidecar.log").read_text())
        await until("its restart", lambda: pod.status()["restarts"] == {"function": 0, "sidecar": 1})
        assert stage.changes == ["starting", "ready"]
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_container_that_fails_its_liveness_probe_is_killed_and_started_again(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        pod = stage.pod(stage.process(readiness=stage.probe(path=None), liveness=stage.probe("/healthz", failures=2)))
        await pod.start()
        await becomes(pod, "ready")
        await some_probes(stage)
        assert pod.status()["restarts"] == {"function": 0}
        stage.function.status = 500
        await until("its restart", lambda: pod.status()["restarts"] == {"function": 1})
        stage.function.status = 200
        await becomes(pod, "ready")
        await until("both have said who they are", lambda: len((tmp_path / "function.log").read_text().split()) == 2)
        first, second = (tmp_path / "function.log").read_text().split()
        assert first != second
        await pod.drain(0)

    play(tmp_path, scene)


def test_until_its_startup_probe_has_succeeded_a_container_is_asked_nothing_else(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        started = tmp_path / "started"
        startup = replace(stage.probe(failures=10_000), command=("test", "-e", str(started)))
        liveness = stage.probe("/healthz", failures=1)
        pod = stage.pod(replace(stage.process(readiness=stage.probe(), liveness=liveness), startup=startup))
        await pod.start()
        await asyncio.sleep(10 * EVERY_S)
        assert (pod.phase, stage.function.asked) == ("starting", 0)
        started.touch()
        await becomes(pod, "ready")
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_container_whose_startup_probe_fails_too_often_is_started_again_and_it_is_said_why(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        exits: list[str] = []
        startup = replace(stage.probe(failures=3), command=("false",))
        pod = stage.pod(replace(stage.process(readiness=stage.probe()), startup=startup))
        pod._on_exit = lambda pod, ended: exits.append(ended)
        await pod.start()
        await until("a restart", lambda: exits)
        assert exits[0].startswith("function did not start: its startup probe failed 3 times, its command ended with status 1")
        assert pod.status()["exits"]["function"] == exits[0].removeprefix("function ").rpartition(":")[0]
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_command_can_say_whether_a_container_is_ready(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        ready, asked = tmp_path / "ready", tmp_path / "asked"
        command = ("sh", "-c", f"echo >> {asked}; test -e {ready} || sleep 60")
        pod = stage.pod(stage.process(readiness=replace(stage.probe(), command=command, timeout_s=0.5)))
        await pod.start()
        # A command that takes too long says no: then it is asked again.
        await until("the next try", lambda: asked.exists() and asked.stat().st_size > 1)
        assert pod.phase == "starting"
        ready.touch()
        await becomes(pod, "ready")
        ready.unlink()
        await becomes(pod, "starting")
        assert stage.function.asked == 0
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_pod_is_ready_after_as_many_good_answers_as_its_probe_says(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        pod = stage.pod(stage.process(readiness=replace(stage.probe(), successes=4)))
        await pod.start()
        await becomes(pod, "ready")
        assert stage.function.asked == 4
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_probe_waits_for_its_initial_delay(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        pod = stage.pod(stage.process(readiness=replace(stage.probe(), delay_s=0.3)))
        await pod.start()
        await becomes(pod, "ready")
        assert pod.stages["ready"] - pod.stages["spawn"] >= 0.29
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_report_in_the_readiness_answer_is_taken_over(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.function.says({"phase": "restoring", "restored_bytes": 3, "total_bytes": 9, "stages": {"import": 0.01}}, status=503)
        pod = stage.pod()
        await pod.start()
        await until("the report", lambda: pod.report.phase)
        assert (pod.report.phase, pod.report.restored_bytes, pod.report.total_bytes) == ("restoring", 3, 9)
        weights = {"source": "cache", "bytes": 9, "seconds": 0.5, "parts": 2}
        stage.function.says({"phase": "ready", "stages": {"import": 0.0, "load": 60.0}, "weights": weights})
        await becomes(pod, "ready")
        status = pod.status()
        assert status["weights"] == weights
        assert status["stages"]["import"] >= 0  # since the pod was asked for, as all of them
        assert status["stages"]["load"] == status["stages"]["ready"]  # nothing it went through can have been later
        await pod.drain(0)

    play(tmp_path, scene)


def test_the_same_report_again_is_no_news(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.function.says({"phase": "importing"}, status=503)
        pod = stage.pod()
        await pod.start()
        await some_probes(stage)
        assert stage.changes == ["starting", "starting"]
        await pod.drain(0)

    play(tmp_path, scene)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="not JSON"),
        pytest.param(b"\xff\xff", id="not text"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"fine"', id="a string"),
        pytest.param(b"[1, 2]", id="a list"),
        pytest.param(b'{"status": "fine"}', id="an object without a phase"),
        pytest.param(b'{"phase": 3}', id="a phase that is a number"),
        pytest.param(b'{"phase": "warm", "restored_bytes": "some"}', id="bytes that are no number"),
        pytest.param(b'{"phase": "warm", "restored_bytes": 1e999}', id="bytes without end"),
        pytest.param(b'{"phase": "warm", "stages": ["import"]}', id="stages as a list"),
        pytest.param(b'{"phase": "warm", "stages": {"import": "soon"}}', id="a stage that is no number"),
        pytest.param(b'{"phase": "warm", "stages": {"import": NaN}}', id="a stage that is not a number"),
        pytest.param(b'{"phase": "warm", "weights": "light"}', id="weights that are a text"),
        pytest.param(b'{"phase": "warm", "weights": {"kg": 3}}', id="weights of another kind"),
        pytest.param(b'{"phase": "warm", "weights": {"source": "store", "bytes": 3, "seconds": NaN}}', id="seconds that are not a number"),
    ],
)
def test_other_json_in_the_readiness_answer_is_not_taken_for_a_report(tmp_path: Path, body: bytes) -> None:
    async def scene(stage: Stage) -> None:
        stage.function.body, stage.function.headers = body, {"Content-Type": "application/json"}
        pod = stage.pod()
        await pod.start()
        await becomes(pod, "ready")
        assert pod.report == Report()
        assert sorted(pod.stages) == ["ready", "spawn"]
        json.dumps(pod.status(), allow_nan=False)
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_pod_that_goes_lets_its_requests_finish_first(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        pod = stage.pod()
        await pod.start()
        await becomes(pod, "ready")
        pod.in_flight = 2
        draining = asyncio.create_task(pod.drain(60))
        await becomes(pod, "draining")
        pod.leave()
        await asyncio.sleep(0)
        assert (tmp_path / "pod").exists()
        assert not draining.done()
        pod.leave()
        await draining
        assert not (tmp_path / "pod").exists()

    play(tmp_path, scene)


def test_a_pod_that_goes_does_not_wait_for_its_requests_for_ever(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        pod = stage.pod()
        await pod.start()
        pod.in_flight = 1
        await asyncio.wait_for(pod.drain(0.05), 60)
        assert not (tmp_path / "pod").exists()

    play(tmp_path, scene)


@pytest.mark.parametrize("turns", range(12))
def test_a_pod_that_is_let_go_while_it_starts_leaves_nothing_behind(tmp_path: Path, turns: int) -> None:
    async def scene(stage: Stage) -> None:
        pod = stage.pod(stage.process(readiness=stage.probe()), stage.process("sidecar"))
        starting = asyncio.create_task(pod.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        await pod.drain(0)
        await asyncio.gather(starting)
        assert pod.phase == "draining"
        left = [line for name in ("function", "sidecar") for line in log_lines(tmp_path / f"{name}.log")]
        assert [pid for pid in left if Path(f"/proc/{pid}").exists()] == []
        assert processes_in(tmp_path) == []
        assert not (tmp_path / "pod").exists()

    play(tmp_path, scene)


def log_lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def processes_in(folder: Path) -> list[str]:
    """Processes that write to a file in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "fd" / "1").readlink().is_relative_to(folder):
                found.append(process.name)
    return found


def test_without_anything_known_the_user_containers_log_is_what_there_is_to_be_seen(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.function.status = 503
        talkative = stage.process("function", "sh", "-c", "for n in 1 2 3; do echo line $n; done; exec sleep 60", readiness=stage.probe())
        silent = stage.process("sidecar", "sleep", "60")
        pod = stage.pod(talkative, silent)
        assert pod.why_not_ready() == Trouble("hello-1: its containers wrote nothing")
        await pod.start()
        await until("three lines, and an answer", lambda: "line 3" in pod.why_not_ready().lines and "503" in pod.why_not_ready().reason)
        found = pod.why_not_ready()
        reason = "hello-1: its container function does not say that it is ready: GET /readyz answered 503"
        assert found == Trouble(reason, "function", ("line 1", "line 2", "line 3"))
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_start_that_ends_twice_in_the_same_way_has_failed_and_says_why(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        pod = stage.pod(stage.process("function", "sh", "-c", "echo no model; exit 3", readiness=stage.probe()))
        stage.function.status = 503
        await pod.start()
        await until("the failure", lambda: pod.troubles.has_failed)
        reason = "its container function ended with status 3, twice as it started"
        assert pod.trouble == Trouble(reason, "function", ("no model",))  # of the last start
        assert (pod.status()["reason"], pod.status()["log"]["lines"]) == (reason, ["no model"])
        assert pod.status()["restarts"] == {"function": 1}
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_function_with_a_setting_that_is_wrong_is_not_started_again_to_see_whether_it_is(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        pod = stage.pod(stage.process("function", "sh", "-c", "echo no such setting; exit 2", "-m", "function", readiness=stage.probe()))
        stage.function.status = 503
        await pod.start()
        await until("the failure", lambda: pod.troubles.has_failed)
        assert pod.trouble == Trouble("its container function ended with status 2", "function", ("no such setting",))  # not: twice
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_start_that_ends_in_another_way_each_time_has_failed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "RESTART_S", 0.01)

    async def scene(stage: Stage) -> None:
        script = f"echo >> {tmp_path}/starts; exit $(wc -l < {tmp_path}/starts)"
        pod = stage.pod(stage.process("function", "sh", "-c", script, readiness=stage.probe()))
        stage.function.status = 503
        await pod.start()
        await until("the failure", lambda: pod.troubles.has_failed)
        assert pod.trouble
        assert pod.trouble.reason == "its container function ended with status 3, again and again as it started"
        await pod.drain(0)

    play(tmp_path, scene)


@pytest.mark.parametrize("signal_name", ["KILL", "TERM"])
def test_a_start_that_is_killed_from_outside_has_failed_after_many_times_only(
    tmp_path: Path, signal_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "SHORT_RESTART_S", 0.01)

    async def scene(stage: Stage) -> None:
        stage.function.status = 503
        pod = stage.pod(stage.process("function", "sh", "-c", f"kill -{signal_name} $$", readiness=stage.probe()))
        await pod.start()
        await until("many ends", lambda: pod.status()["restarts"]["function"] >= 5)
        assert pod.trouble
        assert pod.trouble.reason.startswith(f"its container function was ended by SIG{signal_name}")
        assert not pod.troubles.has_failed or pod.trouble.reason.endswith(", 10 times as it started")  # by then
        await until("too many", lambda: pod.troubles.has_failed)
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_sidecar_that_ends_well_again_and_again_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "RESTART_S", 0.01)

    async def scene(stage: Stage) -> None:
        stage.function.status = 503
        pod = stage.pod(stage.process(readiness=stage.probe()), stage.process("sidecar", "true"))
        await pod.start()
        await until("many ends", lambda: pod.status()["restarts"]["sidecar"] >= 4)
        assert not pod.troubles.has_failed
        stage.function.status = 200
        await becomes(pod, "ready")
        assert pod.trouble is None
        await pod.drain(0)

    play(tmp_path, scene)


def test_what_a_sidecar_says_is_wrong_is_the_pods_trouble_and_after_a_while_it_is_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(troubles_module, "STUCK_S", 0.05)

    async def scene(stage: Stage) -> None:
        stage.function.says({"phase": "restoring", "error": "no objects below s3://models/flowerz/\nis the prefix right?"}, 503)
        sidecar = stage.process("weights-cache", "sh", "-c", "echo no objects; exec sleep 60", readiness=stage.probe())
        pod = stage.pod(stage.process(readiness=stage.probe()), sidecar)
        await pod.start()
        await until("stuck", lambda: pod.troubles.is_stuck and pod.trouble and pod.trouble.lines)
        assert pod.trouble == Trouble(
            "its container weights-cache says: no objects below s3://models/flowerz/\\nis the prefix right?",
            "weights-cache",
            ("no objects",),
        )
        stage.function.says({"phase": "restoring"}, 503)
        await until("no complaint", lambda: pod.trouble is None)
        assert not pod.troubles.is_stuck
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_sidecar_without_a_readiness_probe_is_asked_where_it_tells_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "SIDECAR_LOOK_S", 0.01)

    async def scene(stage: Stage) -> None:
        stage.function.says({"phase": "idle", "error": "no credentials"}, 503)
        sidecar = replace(stage.process("cache", "sleep", "60"), env={**os.environ, "WEIGHTS_PORT": str(stage.function.port)})
        pod = stage.pod(replace(stage.process(), startup=replace(stage.probe(), command=("false",), failures=1000)), sidecar)
        await pod.start()
        await until("the complaint", lambda: pod.trouble)
        assert pod.trouble
        assert pod.trouble.reason == "its container cache says: no credentials"
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_volume_that_cannot_be_made_is_why_a_pod_cannot_be_started(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        place = tmp_path / "c"
        place.touch()
        pod = stage.pod(replace(stage.process(readiness=stage.probe()), directories=(place,)))
        with pytest.raises(PlatformError, match=f"^{place} is not a directory$"):
            await pod.start()
        await pod.drain(0)

    play(tmp_path, scene)


def test_an_exception_in_one_of_its_tasks_is_why_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(*_: object) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(health_module, "ask", ask)

    async def scene(stage: Stage) -> None:
        pod = stage.pod()
        await pod.start()
        await until("the failure", lambda: pod.troubles.has_failed)
        assert pod.trouble == Trouble("the readiness probe of function failed: ValueError: odd")
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_readiness_document_without_an_end_is_not_read(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.function.says({"phase": "importing", "error": "x" * 100_000}, 503)
        pod = stage.pod()
        await pod.start()
        await some_probes(stage)
        assert (pod.report, pod.trouble) == (Report(), None)
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_pod_that_is_let_go_has_time_to_end_and_one_of_a_platform_that_stops_has_little(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        script = (
            "trap 'touch told; until [ -e end ]; do sleep 0.01; done; touch ended; exit' TERM; touch begun; while :; do sleep 0.01; done"
        )
        pod = stage.pod(replace(stage.process("function", "sh", "-c", script, readiness=stage.probe()), cwd=tmp_path))
        pod.plan = replace(pod.plan, grace_s=0.01)
        await pod.start()
        await until("its begin", lambda: (tmp_path / "begun").exists())
        going = asyncio.create_task(pod.drain(30))
        await until("told to end", lambda: (tmp_path / "told").exists())
        await asyncio.sleep(0.2)  # far more than a platform that stops would wait
        (tmp_path / "end").touch()
        await going
        assert (tmp_path / "ended").exists()

    play(tmp_path, scene)


def test_what_is_ready_for_a_moment_and_ends_has_failed_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "SHORT_RESTART_S", 0.01)

    async def scene(stage: Stage) -> None:
        script = f"until [ -e {tmp_path}/end ]; do sleep 0.01; done; rm {tmp_path}/end; exit 3"
        pod = stage.pod(stage.process("function", "sh", "-c", script, readiness=stage.probe()))
        await pod.start()
        for count in range(1, 3):
            await becomes(pod, "ready")
            (tmp_path / "end").touch()
            await until("its end", lambda count=count: pod.status()["restarts"]["function"] == count)  # type: ignore[misc]
        assert pod.troubles.has_failed
        await pod.drain(0)

    play(tmp_path, scene)


@pytest.mark.parametrize("young_s", [0.0, 60.0], ids=["old", "of use"])
def test_what_was_of_use_or_ready_for_long_did_start_however_often_it_ends(
    tmp_path: Path, young_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "SHORT_RESTART_S", 0.01)
    monkeypatch.setattr(troubles_module, "YOUNG_S", young_s)

    async def scene(stage: Stage) -> None:
        script = f"until [ -e {tmp_path}/end ]; do sleep 0.01; done; rm {tmp_path}/end; exit 3"
        pod = stage.pod(stage.process("function", "sh", "-c", script, readiness=stage.probe()))
        await pod.start()
        for count in range(1, 5):
            await becomes(pod, "ready")
            if young_s:
                pod.enter()
                pod.leave()
            (tmp_path / "end").touch()
            await until("its end", lambda count=count: pod.status()["restarts"]["function"] == count)  # type: ignore[misc]
        assert not pod.troubles.has_failed
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_start_that_only_waits_says_after_a_while_what_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_module, "QUIET_S", 3600.0)

    async def scene(stage: Stage) -> None:
        stage.function.status = 404
        pod = stage.pod()
        await pod.start()
        await some_probes(stage)
        assert pod.trouble is None
        monkeypatch.setattr(pod_module, "QUIET_S", 0.0)
        await until("why", lambda: pod.trouble)
        assert pod.trouble
        assert pod.trouble.reason == "its container function does not say that it is ready: GET /readyz answered 404"
        stage.function.says({"phase": "loading"}, 503)
        await until("its phase", lambda: pod.report.phase)
        assert pod.trouble.reason.startswith("its container function has been loading for 0 s")
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_port_that_nobody_opens_is_named(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        closed = free_port()
        pod = stage.pod(stage.process(readiness=replace(stage.probe(), port=closed)))
        await pod.start()
        await until("why", lambda: "nothing listens" in pod.why_not_ready().reason)
        assert pod.why_not_ready().reason.endswith(f"nothing listens on port {closed}")
        await pod.drain(0)

    play(tmp_path, scene)


def test_the_longer_a_start_takes_the_less_often_it_is_probed() -> None:
    assert [health_module._start_pause_s(age_s) for age_s in (0.1, 1, 10, 60, 100, 4000)] == [0.005, 0.025, 0.025, 0.15, 0.25, 1.0]


def test_a_report_with_numbers_beyond_all_bounds_is_none(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.function.status, stage.function.headers = 503, {"Content-Type": "application/json"}
        stage.function.body = b'{"phase": "restoring", "restored_bytes": ' + b"9" * 400 + b"}"
        pod = stage.pod()
        await pod.start()
        await some_probes(stage)
        assert (pod.report, pod.troubles.has_failed) == (Report(), False)
        await pod.drain(0)

    play(tmp_path, scene)


def test_a_sidecar_that_ends_beside_a_pod_that_has_just_become_ready_is_no_failed_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "RESTART_S", 0.01)

    async def scene(stage: Stage) -> None:
        stage.function.status = 503
        script = f"until [ -e {tmp_path}/end ]; do sleep 0.01; done; rm {tmp_path}/end; exit 1"
        pod = stage.pod(stage.process(readiness=stage.probe()), stage.process("sidecar", "sh", "-c", script))
        await pod.start()
        (tmp_path / "end").touch()
        await until("its first end", lambda: pod.status()["restarts"]["sidecar"] == 1)
        stage.function.status = 200
        await becomes(pod, "ready")
        (tmp_path / "end").touch()
        await until("its second end", lambda: pod.status()["restarts"]["sidecar"] == 2)
        assert not pod.troubles.has_failed
        await pod.drain(0)

    play(tmp_path, scene)
