"""Who gets which pod, who waits, and who is refused: a revision with pods that have no processes."""

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from knative.autoscaler.choice import READY, STARTING, rooms, victims
from knative.local import scale_loop as scale_loop_module
from knative.local import troubles as troubles_module
from knative.local.breaker import TIME_OUTS
from knative.local.errors import Overloaded, PlatformError, RevisionFailed, Stopping
from knative.local.failures import RETRY_S
from knative.local.launch import Process
from knative.local.pod import Phase, Pod
from knative.local.process import ContainerProcess
from knative.local.revision import Revision
from knative.local.trouble import Trouble
from knative.local.waiting import QUEUE_LIMIT
from tests.knative.local.fakes import Events, FakePod, fake, fake_revision, parsed


def pods_of(*loads: int, phase: Phase = "ready") -> list[Pod]:
    """Pods with so many requests in flight, the oldest first."""
    revision, _ = fake_revision()
    pods: list[Pod] = []
    for age, load in enumerate(loads):
        pod = FakePod(revision, f"pod-{age}")
        pod.phase, pod.in_flight, pod.number, pod.state = phase, load, age, READY if phase == "ready" else STARTING
        pods.append(pod)
    return pods


def names(pods: Sequence[Pod]) -> list[str]:
    return [pod.name for pod in pods]


def taken(loads: Sequence[int], container_concurrency: int, count: int) -> list[str]:
    """The pods that so many requests go to, one after the other, none of which ends."""
    choice = rooms(container_concurrency, random.Random())
    for pod in pods_of(*loads):
        choice.add(pod)
    found: list[str] = []
    while len(found) < count and (chosen := choice.take()):
        chosen.in_flight += 1
        found.append(chosen.name)
    return found


@pytest.mark.parametrize(
    ("loads", "container_concurrency", "count", "expected"),
    [
        pytest.param((), 0, 1, [], id="no pods"),
        pytest.param((), 5, 1, [], id="no pods with a limit"),
        pytest.param((1000,), 0, 1, ["pod-0"], id="one without a limit always has room"),
        pytest.param((5, 1), 0, 1, ["pod-1"], id="of two without a limit the less busy"),
        pytest.param((0, 0), 1, 2, ["pod-0", "pod-1"], id="one at a time: the first with room"),
        pytest.param((1, 2, 0), 3, 4, ["pod-0", "pod-0", "pod-1", "pod-2"], id="three at a time: the first with room"),
        pytest.param((1, 1), 1, 1, [], id="all full"),
        pytest.param((0, 0, 0), 4, 5, ["pod-0", "pod-1", "pod-2", "pod-0", "pod-1"], id="above three each in its turn"),
        pytest.param((4, 0, 3), 4, 2, ["pod-1", "pod-2"], id="above three one that is full is passed over"),
        pytest.param((4, 4, 4), 4, 1, [], id="above three all full"),
    ],
)
def test_a_request_goes_to_the_pod_that_knatives_activator_would_pick(
    loads: tuple[int, ...], container_concurrency: int, count: int, expected: list[str]
) -> None:
    assert taken(loads, container_concurrency, count) == expected


def test_without_a_limit_the_busiest_of_many_is_never_picked() -> None:
    assert "pod-1" not in {taken((1, 9, 1, 2), 0, 1)[0] for _ in range(200)}


@pytest.mark.parametrize(
    ("ready", "starting", "count", "expected"),
    [
        pytest.param((0, 0), (), 0, [], id="none is to go"),
        pytest.param((0, 0), (), -1, [], id="more are wanted"),
        pytest.param((0, 0), (0,), 1, ["starting-0"], id="one that is not ready yet first"),
        pytest.param((2, 0, 1), (), 1, ["ready-1"], id="then the least busy"),
        pytest.param((1, 0, 0), (), 2, ["ready-2", "ready-1"], id="and of those the youngest"),
        pytest.param((3, 1), (0, 0), 3, ["starting-1", "starting-0", "ready-1"], id="in that order"),
        pytest.param((1,), (0,), 9, ["starting-0", "ready-0"], id="never more than there are"),
    ],
)
def test_the_pods_to_go_are_those_that_are_missed_least(
    ready: tuple[int, ...], starting: tuple[int, ...], count: int, expected: list[str]
) -> None:
    here, coming = pods_of(*ready), pods_of(*starting, phase="starting")
    for pods, prefix in ((here, "ready"), (coming, "starting")):
        for number, pod in enumerate(pods):
            pod.name = f"{prefix}-{number}"
    assert names(victims([*here, *coming], count)) == expected


def complain(pod: Pod, container: ContainerProcess, error: str) -> None:
    """What Health does with a readiness document."""
    if pod.troubles.complained(container, error):
        fake(pod).troubled()


class Caller:
    """A request that keeps its pod until it is told to leave."""

    def __init__(self, revision: Revision) -> None:
        self.pod: Pod | None = None
        self._leave = asyncio.Event()
        self.task = asyncio.create_task(self._call(revision))

    async def _call(self, revision: Revision) -> None:
        async with revision.request() as load:
            load.count()
            await self._stay(revision)

    async def _stay(self, revision: Revision) -> None:
        async with revision.slot() as pod:
            self.pod = pod
            await self._leave.wait()

    async def leave(self) -> None:
        self._leave.set()
        await self.task

    async def go_away(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


async def settle() -> None:
    """Let everything that can go on go on."""
    for _ in range(10):
        await asyncio.sleep(0)


def queued(revision: Revision) -> int:
    waiting: int = revision.status()["queued"]
    return waiting


def test_the_first_request_at_zero_starts_a_pod_at_once_and_gets_it() -> None:
    async def main() -> None:
        revision, events = fake_revision()
        caller = Caller(revision)
        await settle()
        assert (queued(revision), events.told) == (1, ["starting, 1 waiting"])
        (pod,) = revision.pods
        fake(pod).become("ready")
        await settle()
        assert caller.pod is pod
        assert (queued(revision), pod.in_flight) == (0, 1)
        await caller.leave()
        assert pod.in_flight == 0

    asyncio.run(main())


def test_those_who_wait_are_served_in_the_order_in_which_they_came() -> None:
    async def main() -> None:
        revision, _ = fake_revision(1)
        callers = [Caller(revision) for _ in range(3)]
        await settle()
        fake(revision.pods[0]).become("ready")
        for number, caller in enumerate(callers):
            await settle()
            assert [other.pod is not None for other in callers] == [True] * (number + 1) + [False] * (2 - number)
            await caller.leave()

    asyncio.run(main())


def test_one_that_comes_later_does_not_overtake_those_who_wait() -> None:
    async def main() -> None:
        revision, _ = fake_revision(1)
        first, second = Caller(revision), Caller(revision)
        await settle()
        fake(revision.pods[0]).become("ready")
        await settle()
        await first.leave()
        late = Caller(revision)
        await settle()
        assert second.pod is not None
        assert late.pod is None
        await second.leave()
        await late.leave()

    asyncio.run(main())


def test_a_caller_that_goes_away_while_it_waits_is_forgotten() -> None:
    async def main() -> None:
        revision, _ = fake_revision(1)
        gone, patient = Caller(revision), Caller(revision)
        await settle()
        await gone.go_away()
        assert (queued(revision), revision.meter.current) == (1, 1)
        fake(revision.pods[0]).become("ready")
        await settle()
        assert patient.pod is not None
        await patient.leave()

    asyncio.run(main())


def test_a_caller_that_goes_away_just_as_it_gets_a_place_passes_it_on() -> None:
    async def main() -> None:
        revision, _ = fake_revision(1)
        gone, patient = Caller(revision), Caller(revision)
        await settle()
        fake(revision.pods[0]).become("ready")
        await gone.go_away()  # it has not run since
        assert gone.pod is None
        await settle()
        assert patient.pod is not None
        assert patient.pod.in_flight == 1
        await patient.leave()

    asyncio.run(main())


def test_a_pod_never_has_more_requests_than_its_container_concurrency() -> None:
    async def main() -> None:
        revision, _ = fake_revision(2)
        callers = [Caller(revision) for _ in range(5)]
        await settle()
        (pod,) = revision.pods
        fake(pod).become("ready")
        await settle()
        assert (pod.in_flight, queued(revision)) == (2, 3)
        for caller in callers:
            await caller.leave()
            await settle()
            assert pod.in_flight <= 2
        assert (pod.in_flight, queued(revision)) == (0, 0)

    asyncio.run(main())


def test_the_queue_is_bounded_and_who_comes_after_is_told_when_to_come_again() -> None:
    async def main() -> None:
        revision, _ = fake_revision()
        callers = [Caller(revision) for _ in range(QUEUE_LIMIT)]
        await settle()
        with pytest.raises(Overloaded, match="10000 requests are waiting for hello already") as refused:
            await Caller(revision).task
        assert refused.value.retry_after_s == 1
        await revision.stop()
        await asyncio.gather(*(caller.task for caller in callers), return_exceptions=True)

    asyncio.run(main())


def test_a_platform_that_stops_tells_those_who_wait_and_those_who_come() -> None:
    async def main() -> None:
        revision, _ = fake_revision()
        waiting = Caller(revision)
        await settle()
        await revision.stop()
        for caller in (waiting, Caller(revision)):
            with pytest.raises(Stopping):
                await caller.task
        assert len(revision.pods) == 0

    asyncio.run(main())


def test_a_pod_that_is_on_its_way_out_gets_no_more_requests() -> None:
    async def main() -> None:
        revision, _ = fake_revision(scale={"initial-scale": "2"})
        revision.start()
        await settle()
        leaving, staying = (fake(pod) for pod in revision.pods)
        leaving.become("ready")
        staying.become("ready")
        leaving.become("draining")
        callers = [Caller(revision) for _ in range(8)]
        await settle()
        assert {caller.pod for caller in callers} == {staying}
        await asyncio.gather(*(caller.leave() for caller in callers))
        await revision.stop()

    asyncio.run(main())


def test_a_request_that_finds_only_a_pod_on_its_way_out_starts_another_at_once() -> None:
    async def main() -> None:
        revision, _ = fake_revision(scale={"initial-scale": "1"})
        revision.start()
        await settle()
        last = fake(revision.pods[0])
        last.become("ready")
        last.become("draining")
        caller = Caller(revision)
        await settle()
        assert [pod.phase for pod in revision.pods] == ["draining", "starting"]
        fake(revision.pods[1]).become("ready")
        await settle()
        assert caller.pod is revision.pods[1]
        await caller.leave()
        await revision.stop()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("scale", "expected"),
    [({}, 0), ({"initial-scale": "2"}, 2), ({"min-scale": "3"}, 3), ({"initial-scale": "1", "min-scale": "2"}, 2)],
    ids=["at zero", "initial-scale", "min-scale", "the larger of both"],
)
def test_a_revision_begins_with_as_many_pods_as_it_is_to_have(scale: dict[str, str], expected: int) -> None:
    async def main() -> None:
        revision, _ = fake_revision(scale=scale)
        revision.start()
        await settle()
        assert len(revision.pods) == expected
        await revision.stop()

    asyncio.run(main())


def test_when_no_pod_is_ready_by_the_deadline_those_who_wait_and_those_who_come_soon_after_are_told() -> None:
    async def main() -> None:
        revision, events = fake_revision(progress_deadline="0s")
        revision.start()
        waiting = Caller(revision)
        with pytest.raises(RevisionFailed, match=r"not ready within 0 s \(progress-deadline\)") as told:
            await waiting.task
        assert 0 < (told.value.retry_after_s or 0) <= RETRY_S
        with pytest.raises(RevisionFailed) as told_at_once:
            await Caller(revision).task
        assert str(told_at_once.value) == str(told.value) == revision.status()["failure"]
        assert events.told == ["starting, 1 waiting", "failed"]
        fake(revision.pods[0]).gone.set()
        await settle()
        assert len(revision.pods) == 0
        await revision.stop()

    asyncio.run(main())


def test_a_pod_that_cannot_start_beside_a_ready_one_costs_nobody_an_answer() -> None:
    async def main() -> None:
        revision, events = fake_revision(1, scale={"initial-scale": "2"}, progress_deadline="0s")
        revision.start()
        await settle()
        fake(revision.pods[0]).become("ready")
        busy, waiting = Caller(revision), Caller(revision)
        while "failed" not in events.told:
            await asyncio.sleep(0.01)
        late = Caller(revision)
        for caller in (busy, waiting, late):
            await settle()
            assert caller.pod is revision.pods[0]
            await caller.leave()
        await revision.stop()

    asyncio.run(main())


def test_a_failure_is_over_once_a_pod_is_ready() -> None:
    async def main() -> None:
        revision, events = fake_revision(scale={"initial-scale": "2"}, progress_deadline="0s")
        revision.start()
        await settle()
        first = fake(revision.pods[0])
        first.become("ready")
        while "failed" not in events.told:  # the other one
            await asyncio.sleep(0.01)
        assert revision.status()["failure"]
        first.become("starting")
        first.become("ready")
        assert revision.status()["failure"] is None
        await revision.stop()

    asyncio.run(main())


def test_a_pod_that_hangs_is_replaced_at_once_and_gets_no_more_requests() -> None:
    async def main() -> None:
        revision, events = fake_revision(scale={"initial-scale": "2"})
        revision.start()
        await settle()
        hanging, healthy = (fake(pod) for pod in revision.pods)
        hanging.become("ready")
        healthy.become("ready")
        for _ in range(TIME_OUTS):
            assert hanging.phase == "ready"
            revision.timed_out(hanging, 300, 300)
        callers = [Caller(revision) for _ in range(8)]
        await settle()
        assert {caller.pod for caller in callers} == {healthy}
        assert [pod.phase for pod in revision.pods] == ["draining", "ready", "starting"]
        assert events.told.count("hung") == revision.record.hung_total == 1
        revision.timed_out(hanging, 300, 300)  # one that it still had
        assert len(revision.pods) == 3
        await asyncio.gather(*(caller.leave() for caller in callers))
        await revision.stop()

    asyncio.run(main())


def test_pods_that_hang_one_after_the_other_without_an_answer_are_replaced_after_pauses() -> None:
    async def main() -> None:
        revision, _ = fake_revision(scale={"initial-scale": "1"})
        revision.start()
        await settle()
        for _ in range(2):
            hanging = fake(revision.pods[-1])
            hanging.become("ready")
            for _ in range(TIME_OUTS):
                revision.timed_out(hanging, 300, 300)
            await settle()
        assert [pod.phase for pod in revision.pods] == ["draining", "draining"]
        with pytest.raises(RevisionFailed, match="answers nobody: 3 requests in a row timed out") as told:
            await Caller(revision).task
        assert 0 < (told.value.retry_after_s or 0) <= RETRY_S
        await revision.stop()

    asyncio.run(main())


def test_a_pod_that_has_answered_is_replaced_at_once_however_many_have_hung() -> None:
    async def main() -> None:
        revision, _ = fake_revision(scale={"initial-scale": "1"})
        revision.start()
        await settle()
        for _ in range(4):
            hanging = fake(revision.pods[-1])
            hanging.become("ready")
            hanging.breaker.answered()
            for _ in range(TIME_OUTS):
                revision.timed_out(hanging, 300, 300)
            await settle()
            assert revision.pods[-1].phase == "starting"
        await revision.stop()

    asyncio.run(main())


def test_a_start_that_has_failed_is_told_to_those_who_wait_and_those_who_come_soon_after() -> None:
    async def main() -> None:
        revision, events = fake_revision()
        waiting = Caller(revision)
        await settle()
        fake(revision.pods[0]).fail(Trouble("no model", "function", ("Traceback",)))
        with pytest.raises(RevisionFailed, match=f"^{revision.pods[0].name}: no model$") as told:
            await waiting.task
        assert told.value.whole.endswith("no model\nthe last lines of function:\n  Traceback")
        with pytest.raises(RevisionFailed, match="no model"):
            await Caller(revision).task
        status = revision.status()
        assert (status["state"], status["failure_log"]) == ("failed", {"container": "function", "lines": ["Traceback"]})
        assert (len(revision.pods), events.told) == (1, ["starting, 1 waiting", "failed"])  # the one that goes, and no other yet
        await revision.stop()

    asyncio.run(main())


def test_a_pod_that_cannot_be_started_has_failed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(_: FakePod) -> None:
        raise PlatformError("/volumes/default/c is not a directory")

    monkeypatch.setattr(FakePod, "start", start)

    async def main() -> None:
        revision, _ = fake_revision()
        with pytest.raises(RevisionFailed, match="/volumes/default/c is not a directory"):
            await Caller(revision).task
        await revision.stop()

    asyncio.run(main())


def test_pods_that_are_stuck_go_on_trying_and_callers_are_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(troubles_module, "STUCK_S", 0.0)

    async def main() -> None:
        revision, events = fake_revision()
        waiting = Caller(revision)
        await settle()
        (pod,) = revision.pods
        sidecar = ContainerProcess(Process("cache", False, ("true",), {}, None, (), Path("/no/log"), None, None), lambda _: None)
        for _ in range(3):
            complain(pod, sidecar, "no objects")
            complain(pod, sidecar, "no objects at all")
        for caller in (waiting, Caller(revision)):
            with pytest.raises(RevisionFailed, match="its container cache says: no objects"):
                await caller.task
        assert revision.state == "failed"
        assert list(revision.pods) == [pod]
        assert events.told.count("failed") == 1
        complain(pod, sidecar, "")
        patient = Caller(revision)
        await settle()
        assert (revision.state, queued(revision)) == ("starting", 1)
        complain(pod, sidecar, "no objects, still")
        with pytest.raises(RevisionFailed):
            await patient.task
        fake(pod).gone.set()
        revision.scaling.scale_to(0)
        await settle()
        assert (len(revision.pods), revision.state) == (0, "failed"), "why is forgotten with the pods"
        revision.scaling.scaler.sample(time.monotonic(), has_pods=False)  # the second of the poke is over
        patient = Caller(revision)
        await settle()
        assert (revision.state, queued(revision)) == ("starting", 1)
        fake(revision.pods[0]).become("ready")
        await settle()
        await patient.leave()
        assert revision.status()["state"] == "ready"
        await revision.stop()

    asyncio.run(main())


def test_one_pod_that_is_stuck_beside_one_that_starts_costs_nobody_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(troubles_module, "STUCK_S", 0.0)

    async def main() -> None:
        revision, _ = fake_revision(scale={"initial-scale": "2"})
        revision.start()
        await settle()
        waiting = Caller(revision)
        sidecar = ContainerProcess(Process("cache", False, ("true",), {}, None, (), Path("/no/log"), None, None), lambda _: None)
        complain(revision.pods[0], sidecar, "no objects")
        await settle()
        assert queued(revision) == 1
        fake(revision.pods[1]).become("ready")
        await settle()
        assert waiting.pod is revision.pods[1]
        await waiting.leave()
        await revision.stop()

    asyncio.run(main())


def test_an_exception_in_the_beat_is_a_state_with_a_reason_and_the_beat_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_loop_module, "SAMPLE_S", 0.001)

    async def main() -> None:
        revision, events = fake_revision()
        beats = []

        def beat(*, decides: bool) -> None:
            beats.append(decides)
            if len(beats) == 1:
                raise ValueError("odd")

        monkeypatch.setattr(revision.scaling, "beat", beat)
        revision.start()
        while len(beats) < 3:
            await asyncio.sleep(0.001)
        assert revision.status()["failure"] == "the autoscaler's beat failed: ValueError: odd"
        assert events.told == ["failed"]
        with pytest.raises(RevisionFailed, match="odd"):
            await Caller(revision).task
        await revision.stop()

    asyncio.run(main())


def test_who_comes_to_zero_again_pokes_again_and_what_was_poked_is_counted_once() -> None:
    async def main() -> None:
        revision, _ = fake_revision()
        scaler = revision.scaling.scaler
        first = Caller(revision)
        await settle()
        fake(revision.pods[0]).become("ready")
        await settle()
        scaler.sample(time.monotonic(), has_pods=True)  # the second of the poke is over
        await first.leave()
        fake(revision.pods[0]).gone.set()
        revision.scaling.scale_to(0)
        await settle()
        assert len(revision.pods) == 0
        second = Caller(revision)
        await settle()
        assert len(revision.pods) == 1, "the second request at zero has to wait for the beat"
        await second.go_away()
        await revision.stop()

    asyncio.run(main())


def test_a_revision_that_is_stopped_ends_its_pods_also_those_that_were_going_and_leaves_no_task_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patience: list[float] = []
    drain = FakePod.drain

    async def drained(pod: FakePod, patience_s: float) -> None:
        patience.append(patience_s)
        await drain(pod, patience_s)

    monkeypatch.setattr(FakePod, "drain", drained)

    async def main() -> None:
        revision, _ = fake_revision(scale={"initial-scale": "2"})
        revision.start()
        await settle()
        revision.scaling.scale_to(0)
        await settle()
        assert patience == [300, 300]
        await revision.stop()
        assert patience == [300, 300, 0, 0]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_pod_that_cannot_even_be_made_is_told_to_who_waits() -> None:
    def make(*_: object) -> Pod:
        raise OSError(24, "Too many open files")

    async def main() -> None:
        revision = Revision(parsed(), make, Events())
        with pytest.raises(RevisionFailed, match=r"^another pod failed: Too many open files$"):
            await Caller(revision).task
        assert revision.record.failed_starts == 1
        await revision.stop()

    asyncio.run(main())


def test_of_a_start_that_takes_long_it_is_said_once_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_loop_module, "SLOW_S", -1.0)

    async def main() -> None:
        revision, events = fake_revision(scale={"initial-scale": "1"})
        revision.start()
        await settle()
        for _ in range(3):
            revision.scaling.beat(decides=False)
        assert events.told == ["starting, 0 waiting", f"{revision.pods[0].name}: its containers wrote nothing"]
        await revision.stop()

    asyncio.run(main())


def test_beats_that_were_missed_are_not_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 1000.0}
    beats: list[tuple[float, bool]] = []

    async def sleep(seconds: float) -> None:
        clock["now"] += seconds
        if len(beats) == 2:
            clock["now"] += 12.0  # the whole platform was stopped
        if len(beats) == 6:
            raise asyncio.CancelledError

    async def main() -> None:
        revision, _ = fake_revision()
        monkeypatch.setattr(revision.scaling, "beat", lambda *, decides: beats.append((clock["now"] - 1000, decides)))
        monkeypatch.setattr(scale_loop_module, "time", SimpleNamespace(monotonic=lambda: clock["now"]))
        monkeypatch.setattr(scale_loop_module, "asyncio", SimpleNamespace(sleep=sleep))
        with contextlib.suppress(asyncio.CancelledError):
            await revision.scaling.run()

    asyncio.run(main())
    assert beats == [(1, False), (2, True), (15, False), (16, True), (17, False), (18, True)]
