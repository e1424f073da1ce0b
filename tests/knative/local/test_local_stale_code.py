"""A revision whose agent's code has changed: it gets no other pod, and another revision takes over."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from knative.local.code import Code
from knative.local.errors import RevisionFailed
from knative.local.manifest import Service
from knative.local.trouble import Trouble
from tests.knative.local.test_local_service import (
    NEW,
    NEWEST,
    OLD,
    become_ready,
    change,
    hold,
    pods,
    running,
    settle,
    shares,
    version,
)


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    """The module of an agent."""
    file = tmp_path / "agent.py"
    file.write_text("first = 1")
    return file


def coded(agent: Path, *traffic: Any, **options: Any) -> Service:
    return replace(version(1, *traffic, **options), code=Code.read("agent:A", [agent.parent]))


def test_where_one_more_pod_is_wanted_a_new_revision_takes_over(agent: Path) -> None:
    async def main() -> None:
        async with running(coded(agent)) as (live, events):
            agent.write_text("second = 2")
            for _ in range(3):
                live.revisions[OLD].scaling.scale_to(2)
            await settle()
            assert (len(pods(live, OLD)), len(pods(live, NEW)), list(live.revisions)) == (1, 1, [OLD, NEW])
            assert shares(live) == {OLD: 100}
            become_ready(live, NEW)
            await settle()
            assert shares(live) == {NEW: 100}
            assert events.told[0] == f"agent.py changed since {OLD} was made: {NEW} takes over"

    asyncio.run(main())


def test_a_pod_that_becomes_ready_with_other_code_gets_no_request(agent: Path) -> None:
    async def main() -> None:
        async with running(coded(agent, scale={"initial-scale": "0"})) as (live, _):
            leave = asyncio.Event()
            caller = asyncio.create_task(hold(live.choose(), leave))
            await settle()
            agent.write_text("second = 2")
            become_ready(live, OLD)
            await settle()
            assert [(pod.phase, pod.in_flight) for pod in pods(live, OLD)] == [("draining", 0)]
            assert not caller.done()
            become_ready(live, NEW)
            await settle()
            assert [pod.in_flight for pod in pods(live, NEW)] == [1]
            leave.set()
            await caller

    asyncio.run(main())


def test_what_changes_after_a_pod_is_ready_leaves_it_in_peace(agent: Path) -> None:
    async def main() -> None:
        async with running(coded(agent)) as (live, _):
            agent.write_text("second = 2")
            (pod,) = pods(live, OLD)
            pod.become("starting")  # its probe failed
            pod.become("ready")
            await settle()
            assert (pod.phase, list(live.revisions)) == ("ready", [OLD])

    asyncio.run(main())


def test_code_that_is_what_it_was_again_needs_no_other_revision(agent: Path) -> None:
    async def main() -> None:
        async with running(coded(agent)) as (live, _):
            agent.write_text("second = 2")
            live.revisions[OLD].scaling.scale_to(2)
            await settle()
            agent.write_text("first = 1")
            live.revisions[NEW].scaling.scale_to(2)
            await settle()
            assert live.status("", "")["rollout"] is None
            live.revisions[OLD].scaling.scale_to(2)
            assert len(pods(live, OLD)) == 2
            assert len(live.revisions) == 2

    asyncio.run(main())


def test_a_revision_that_traffic_names_cannot_start_without_its_code_and_says_so(agent: Path) -> None:
    async def main() -> None:
        named = coded(agent, {"revisionName": OLD, "percent": 100}, scale={"initial-scale": "0"})
        async with running(named) as (live, _):
            agent.write_text("second = 2")
            caller = asyncio.create_task(hold(live.choose(), asyncio.Event()))
            await settle()
            live.revisions[OLD].scaling.beat(decides=True)
            await settle()
            with pytest.raises(RevisionFailed, match=f"{OLD} cannot start: agent.py changed since, and there is one version"):
                await asyncio.wait_for(caller, 5)

    asyncio.run(main())


def test_at_zero_callers_are_told_why_the_new_code_has_failed(agent: Path) -> None:
    async def main() -> None:
        async with running(coded(agent, scale={"initial-scale": "0"})) as (live, _):
            change(live, coded(agent, scale={"initial-scale": "1"}))  # one that is to have a pod, and fails
            agent.write_text("second = 2")
            live.revisions[OLD].scaling.scale_to(1)
            await settle()
            live.rollout.latest.failures.start_failed(Trouble("it is broken"))
            caller = asyncio.create_task(hold(live.choose(), asyncio.Event()))
            with pytest.raises(RevisionFailed, match="it is broken"):
                await asyncio.wait_for(caller, 5)
            assert live.rollout.stale.notice(coded(agent, scale={"initial-scale": "1"})) is False  # it is what failed
            agent.write_text("third = 3")
            assert live.rollout.stale.notice(coded(agent, scale={"initial-scale": "1"})) is True

    asyncio.run(main())


def test_a_name_of_the_template_stays_with_the_first_code_that_had_it(agent: Path) -> None:
    async def main() -> None:
        async with running(coded(agent, name="hello-mine")) as (live, _):
            agent.write_text("second = 2")
            change(live, coded(agent, name="hello-mine"))
            assert list(live.revisions) == ["hello-mine", NEW]

    asyncio.run(main())


def test_where_new_code_fails_one_pod_with_the_old_code_is_kept_until_it_is_mended(agent: Path) -> None:
    async def main() -> None:
        async with running(coded(agent)) as (live, events):
            old = live.revisions[OLD]
            agent.write_text("broken = 2")
            change(live, coded(agent))
            live.revisions[NEW].failures.start_failed(Trouble("it is broken"))
            (said,) = (text for text in events.told if "traffic stays" in text)
            assert said.startswith(f"{NEW} failed; traffic stays on {OLD}, of which one pod is kept until agent.py is mended: ")
            old.scaling.scale_to(0)  # as when nobody has called for a while
            assert ([pod.phase for pod in pods(live, OLD)], old.scaling.desired) == (["ready"], 1)
            agent.write_text("third = 3")
            change(live, coded(agent))
            await settle()
            old.scaling.scale_to(0)
            assert [pod.phase for pod in pods(live, OLD)] == ["ready"]
            become_ready(live, NEWEST)
            await settle()
            assert ([pod.phase for pod in pods(live, OLD)], shares(live)) == (["draining"], {NEWEST: 100})

    asyncio.run(main())


def test_where_new_code_fails_and_the_old_code_has_no_pod_the_reason_is_told_and_callers_are_held_once_it_is_mended(agent: Path) -> None:
    async def main() -> None:
        async with running(coded(agent)) as (live, events):
            (pod,) = pods(live, OLD)
            live.revisions[OLD].scaling.scale_to(0)
            pod.gone.set()
            await settle()
            agent.write_text("broken = 2")
            change(live, coded(agent))
            live.revisions[NEW].failures.start_failed(Trouble("it is broken"))
            assert (
                f"{NEW} failed, and {OLD} cannot start either, as its code is gone: callers get errors until agent.py is mended"
                in events.told
            )
            with pytest.raises(RevisionFailed, match="it is broken"):
                await asyncio.wait_for(hold(live.choose(), asyncio.Event()), 5)
            for pod in pods(live, NEW):
                pod.gone.set()
                live.revisions[NEW].supervisor.give_up(pod)
            await settle()
            agent.write_text("mended = 3")  # which nobody has noticed yet
            leave = asyncio.Event()
            leave.set()
            caller = asyncio.create_task(hold(live.choose(), leave))
            await settle()
            live.revisions[NEW].scaling.beat(decides=True)
            await settle()
            become_ready(live, NEWEST)
            await asyncio.wait_for(caller, 5)

    asyncio.run(main())


def test_who_calls_while_a_mended_manifest_is_tried_is_held(agent: Path) -> None:
    async def main() -> None:
        async with running(coded(agent, scale={"initial-scale": "0"})) as (live, _):
            live.rollout.latest.failures.start_failed(Trouble("the setting is wrong"))
            with pytest.raises(RevisionFailed, match="the setting is wrong"):
                await asyncio.wait_for(hold(live.choose(), asyncio.Event()), 5)
            change(live, coded(agent, scale={"initial-scale": "1"}))
            leave = asyncio.Event()
            leave.set()
            caller = asyncio.create_task(hold(live.choose(), leave))
            await settle()
            become_ready(live, NEW)
            await asyncio.wait_for(caller, 5)

    asyncio.run(main())


def test_recreate_keeps_no_pod_with_the_old_code_and_tells_callers_why_the_new_code_has_failed(agent: Path) -> None:
    async def main() -> None:
        recreate = {"annotations": {"relight/rollout": "recreate"}}
        async with running(coded(agent, **recreate)) as (live, _):
            (pod,) = pods(live, OLD)
            agent.write_text("broken = 2")
            change(live, coded(agent, **recreate))
            await settle()
            assert pod.phase == "draining"
            pod.gone.set()
            async with asyncio.timeout(5):
                while not pods(live, NEW):
                    await asyncio.sleep(0.01)
            live.revisions[NEW].failures.start_failed(Trouble("it is broken"))
            with pytest.raises(RevisionFailed, match="it is broken"):
                await asyncio.wait_for(hold(live.choose(), asyncio.Event()), 5)

    asyncio.run(main())


def test_a_revision_that_gets_no_traffic_keeps_no_pod(agent: Path) -> None:
    async def main() -> None:
        named = {"revisionName": OLD, "percent": 100}
        async with running(coded(agent)) as (live, _):
            change(live, replace(version(2, named), code=live.service.code))
            await settle()
            become_ready(live, NEW)
            await settle()
            agent.write_text("third = 3")
            change(live, replace(version(2, named), code=Code.read("agent:A", [agent.parent])))
            await settle()
            assert [pod.phase for pod in pods(live, NEW)] == ["draining"]

    asyncio.run(main())
