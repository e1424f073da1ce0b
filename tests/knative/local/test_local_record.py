"""What a revision remembers of its pods' starts and of the seconds that passed."""

import asyncio
import json
import time

import pytest
from pydantic import ValidationError

from knative.local.pod import Report, Weights
from knative.local.record import COLD_STARTS
from knative.local.revision import Revision
from knative.local.service import LiveService
from knative.local.trouble import Trouble
from tests.knative.local.fakes import Events, FakePod, fake_revision, parsed


def starts(revision: Revision) -> list[dict[str, object]]:
    found: list[dict[str, object]] = revision.record.status(0)["cold_starts"]
    return found


def test_a_cold_start_is_told_while_it_goes_on_and_kept_as_it_ended() -> None:
    async def scenario() -> None:
        revision, _ = fake_revision()
        caller = asyncio.create_task(revision.slot().__aenter__())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        (pod,) = revision.pods
        assert isinstance(pod, FakePod)
        pod.report = Report(phase="restoring", restored_bytes=5, total_bytes=10, stages={"listen": 0.2})
        (going,) = starts(revision)
        assert (going["outcome"], going["phase"], going["seconds"]) == ("starting", "restoring", None)
        assert (going["restored_bytes"], going["total_bytes"], going["stages"]) == (5, 10, {"listen": 0.2})
        assert (going["waiting"], revision.state) == (1, "starting")
        pod.report = Report(phase="ready", stages={"listen": 0.0}, weights=Weights(source="cache", bytes=10))
        pod.become("ready")
        await caller
        (over,) = starts(revision)
        assert (over["outcome"], over["seconds"]) == ("ready", pod.stages["ready"])
        assert revision.record.status(0)["weights"] == {"cache": 1}
        assert revision.record.cold_start_s.buckets()[-1][1] == 1
        pod.become("starting")
        pod.become("ready")  # of a pod that was ready already: no cold start
        assert starts(revision) == [over]
        assert revision.state == "ready"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "document",
    [
        json.dumps({"phase": "x" * 1000}),
        json.dumps({"stages": {f"s{number}": 1 for number in range(1000)}}),
        json.dumps({"stages": {"x" * 1000: 1}}),
        json.dumps({"weights": {"source": "x" * 1000, "bytes": 1}}),
        '{"weights": {"source": "cache", "bytes": 1, "more": NaN}}',
        '{"weights": {"source": "cache", "bytes": 1, "more": {"much": 1}}}',
        '{"weights": {"source": "cache", "bytes": 1, "seconds": NaN}}',
        '{"stages": {"load": Infinity}}',
    ],
    ids=["a long phase", "many stages", "a long stage", "a long source", "more", "much more", "no number", "too large a number"],
)
def test_a_report_that_nobody_could_show_is_none(document: str) -> None:
    with pytest.raises(ValidationError):
        Report.model_validate_json(document)


@pytest.mark.parametrize("outcome", ["failed", "dropped"])
def test_a_start_that_leads_nowhere_is_kept_with_how_it_ended(outcome: str) -> None:
    async def scenario() -> None:
        revision, _ = fake_revision()
        pod = FakePod(revision, "hello-00001-abc")
        revision.record.starting(pod, 0)
        revision.record.ended(pod, outcome)  # type: ignore[arg-type]
        revision.record.ended(pod, "dropped")  # what comes later changes nothing
        (kept,) = starts(revision)
        assert kept["outcome"] == outcome
        assert revision.record.failed_starts == (outcome == "failed")
        assert revision.record.cold_start_s.buckets()[-1][1] == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("was_ready", [False, True])
def test_a_pod_that_fails_as_it_starts_is_one_failed_start_whether_it_was_ready_before_or_not(*, was_ready: bool) -> None:
    async def scenario() -> None:
        revision, events = fake_revision(scale={"initial-scale": "1"})
        revision.start()
        await asyncio.sleep(0)
        (pod,) = revision.pods
        assert isinstance(pod, FakePod)
        if was_ready:
            pod.become("ready")
            pod.become("starting")
        pod.fail(Trouble("its container function ended with status 1, twice as it started"))
        pod.fail(Trouble("and again"))
        assert (revision.record.failed_starts, events.told.count("failed")) == (1, 1)
        pod.gone.set()
        await revision.stop()

    asyncio.run(scenario())


def test_only_the_latest_cold_starts_are_kept_the_latest_first() -> None:
    async def scenario() -> None:
        revision, _ = fake_revision()
        for number in range(COLD_STARTS + 3):
            revision.record.starting(FakePod(revision, f"pod-{number}"), 0)
        names = [start["pod"] for start in starts(revision)]
        assert names == [f"pod-{number}" for number in range(COLD_STARTS + 2, 2, -1)]

    asyncio.run(scenario())


def test_a_request_is_a_latency_and_each_second_is_a_sample() -> None:
    async def scenario() -> None:
        live = LiveService(parsed(), FakePod, Events())
        revision = live.choose()
        async with revision.request() as load:
            load.count()
            since, arrived = revision.meter._reported_at, revision.meter._changed_at  # some time apart: the clock goes on meanwhile
            revision.scaling.scaler.sample(arrived + 1, has_pods=False)
            live._sample(arrived + 1)
        assert live.record.samples[-1].concurrency == pytest.approx(1 / (arrived + 1 - since), abs=0.001)
        assert live.record.samples[-1].p50 is None
        live._sample(revision.meter._changed_at + 1)
        assert live.record.samples[-1].p50 is not None
        assert [sample["ready"] for sample in live.record.history()] == [0, 0]
        assert live.status("", "")["sample"] == live.record.history()[-1]
        assert live.state == "zero"

    asyncio.run(scenario())


def test_history_begins_with_what_was_before_anything_started_however_quickly_a_pod_comes() -> None:
    async def scenario() -> None:
        live = LiveService(parsed(scale={"initial-scale": "1"}), FakePod, Events())
        live.start()
        (first,) = live.record.history()
        assert (first["ready"], first["desired"], first["concurrency"], first["p50"]) == (0, 0, 0, None)
        await asyncio.sleep(0)
        (pod,) = live.pods
        assert isinstance(pod, FakePod)
        pod.become("ready")  # before a second has passed
        live._sample(time.monotonic())
        assert [sample["ready"] for sample in live.record.history()] == [0, 1]
        pod.gone.set()
        await live.stop()

    asyncio.run(scenario())
