"""How a Service goes from one revision to the next: with pods that have no processes."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from knative.local import troubles as troubles_module
from knative.local.errors import ManifestError
from knative.local.launch import Process
from knative.local.manifest import Service, read_manifests
from knative.local.process import ContainerProcess
from knative.local.revision import Revision
from knative.local.rollout import KEPT
from knative.local.router import Router
from knative.local.service import LiveService
from knative.local.trouble import Trouble
from tests.knative.local.fakes import Events, FakePod
from tests.knative.local.running import manifests, service

OLD, NEW, NEWEST = "hello-00001", "hello-00002", "hello-00003"


def version(
    number: int,
    *traffic: Mapping[str, Any],
    scale: Mapping[str, str] | None = None,
    name: str = "",
    deadline: str = "60s",
    annotations: Mapping[str, str] | None = None,
    spec: Mapping[str, Any] | None = None,
) -> Service:
    """The Service with a template that is another for each number."""
    scale = {"initial-scale": "1", **(scale or {})}
    document = service("hello", scale=scale, spec=spec, env={"VERSION": str(number)}, progress_deadline=deadline)
    document["spec"]["traffic"] = list(traffic)
    document["metadata"]["annotations"] = dict(annotations or {})
    if name:
        document["spec"]["template"]["metadata"]["name"] = name
    return read_manifests([("hello.yaml", manifests(document))]).services[0]


async def settle() -> None:
    """Let everything that can go on go on."""
    for _ in range(10):
        await asyncio.sleep(0)


def pods(live: LiveService, revision: str) -> list[FakePod]:
    found = list(live.revisions[revision].pods)
    assert all(isinstance(pod, FakePod) for pod in found)
    return found  # type: ignore[return-value]


def become_ready(live: LiveService, revision: str) -> None:
    for pod in pods(live, revision):
        if pod.phase == "starting":
            pod.become("ready")


@contextlib.asynccontextmanager
async def running(first: Service) -> Any:
    """A Service whose first revision is ready."""
    events = Events()
    live = LiveService(first, FakePod, events)
    live.start()
    await settle()
    become_ready(live, live.status("", "")["revision"])
    events.told.clear()
    try:
        yield live, events
    finally:
        for name in live.revisions:
            for pod in pods(live, name):
                pod.gone.set()
        await live.stop()


def change(live: LiveService, to: Service) -> None:
    live.rollout.check(to)
    live.rollout.apply(to)


def shares(live: LiveService) -> dict[str, int]:
    return {name: percent for name, percent in live.shares.items() if percent}


async def hold(revision: Revision, leave: asyncio.Event) -> None:
    async with revision.request() as load:
        load.count()
        async with revision.slot():
            await leave.wait()


def test_traffic_moves_when_the_new_revision_is_ready_and_the_old_one_serves_what_it_has() -> None:
    async def main() -> None:
        async with running(version(1)) as (live, events):
            leave = asyncio.Event()
            caller = asyncio.create_task(hold(live.choose(), leave))
            await settle()
            change(live, version(2))
            await settle()
            assert (shares(live), len(pods(live, NEW))) == ({OLD: 100}, 1)
            assert live.status("", "")["rollout"] == {"revision": NEW, "state": "starting", "trouble": None}
            become_ready(live, NEW)
            await settle()
            assert shares(live) == {NEW: 100}
            (old,) = pods(live, OLD)
            assert (old.phase, old.in_flight) == ("draining", 1)
            leave.set()
            await caller
            old.gone.set()
            await settle()
            assert (pods(live, OLD), live.requests_total, live.state) == ([], 1, "ready")
            assert events.told == ["starting, 0 waiting", "ready", f"traffic: 100 % {NEW}", "at zero"]

    asyncio.run(main())


def test_a_request_that_waits_when_the_traffic_moves_waits_for_the_new_revision() -> None:
    async def main() -> None:
        async with running(version(1, scale={"initial-scale": "0"})) as (live, _):
            leave = asyncio.Event()
            callers = [asyncio.create_task(hold(live.choose(), leave)) for _ in range(3)]
            await settle()
            assert [pod.phase for pod in pods(live, OLD)] == ["starting"]
            change(live, version(2, spec={"containerConcurrency": 1}))
            await settle()
            become_ready(live, NEW)
            await settle()
            (pod,) = pods(live, NEW)
            assert ([pod.phase for pod in pods(live, OLD)], pod.in_flight, len(live.revisions[NEW].waiting)) == (["draining"], 1, 2)
            callers[-1].cancel()
            await settle()
            assert live.queued == 1
            leave.set()
            await asyncio.gather(*callers[:2])
            assert (pod.in_flight, live.queued, live.requests_total) == (0, 0, 3)

    asyncio.run(main())


def test_a_request_that_waits_for_a_revision_that_cannot_start_is_served_by_the_one_that_mends_it() -> None:
    async def main() -> None:
        async with running(version(1, scale={"initial-scale": "0"})) as (live, _):
            leave = asyncio.Event()
            leave.set()
            caller = asyncio.create_task(hold(live.choose(), leave))
            await settle()
            change(live, version(2, scale={"initial-scale": "0"}))  # nobody is served: it gets the traffic at once
            await settle()
            become_ready(live, NEW)
            await asyncio.wait_for(caller, 60)

    asyncio.run(main())


def test_a_new_revision_that_is_not_ready_in_time_leaves_the_traffic_where_it_is_and_says_why() -> None:
    async def main() -> None:
        async with running(version(1)) as (live, events):
            change(live, version(2, deadline="0s"))
            await settle()
            pods(live, NEW)[0].troubles._ended = Trouble("its container function ended with status 3: no model")
            assert "no model" in live.status("", "")["rollout"]["trouble"]
            while "failed" not in events.told:
                await asyncio.sleep(0.01)
            assert (shares(live), live.state) == ({OLD: 100}, "ready")
            assert live.status("", "")["failure"].startswith(f"{NEW} failed; traffic stays on {OLD}. {NEW}-")
            assert "not ready within 0 s" in live.status("", "")["failure"]
            assert events.told[-1] == f"{NEW} failed; traffic stays on {OLD}"
            await settle()
            assert {pod.phase for pod in pods(live, NEW)} == {"draining"}
            change(live, version(2, deadline="0s"))  # as it is: tried again
            await settle()
            assert live.status("", "")["rollout"]["state"] == "starting"
            change(live, version(3))
            await settle()
            become_ready(live, NEWEST)
            assert (shares(live), live.status("", "")["failure"]) == ({NEWEST: 100}, None)

    asyncio.run(main())


def test_a_revision_is_not_ready_before_all_of_its_first_pods_are() -> None:
    async def main() -> None:
        async with running(version(1)) as (live, _):
            change(live, version(2, scale={"initial-scale": "3"}))
            await settle()
            for expected in (OLD, OLD, NEW):
                next(pod for pod in pods(live, NEW) if pod.phase == "starting").become("ready")
                assert shares(live) == {expected: 100}

    asyncio.run(main())


def test_where_nobody_is_served_a_revision_that_starts_at_zero_gets_the_traffic_at_once() -> None:
    async def main() -> None:
        async with running(version(1, scale={"initial-scale": "0"})) as (live, _):
            change(live, version(2, scale={"initial-scale": "0"}))
            assert (shares(live), list(live.pods), live.state) == ({NEW: 100}, [], "zero")

    asyncio.run(main())


def test_where_somebody_is_served_a_revision_that_starts_at_zero_shows_first_that_it_can_and_is_kept_for_a_window() -> None:
    async def main() -> None:
        async with running(version(1)) as (live, _):
            change(live, version(2, scale={"initial-scale": "0"}))
            await settle()
            assert (shares(live), len(pods(live, NEW))) == ({OLD: 100}, 1)
            revision = live.revisions[NEW]
            revision.scaling.scaler.sample(revision.meter._changed_at + 1, has_pods=True)
            revision.scaling.apply(revision.scaling.scaler.decide(revision.meter._changed_at + 2, revision.pods.ready))  # nobody has called
            become_ready(live, NEW)
            await settle()
            assert (shares(live), [pod.phase for pod in pods(live, NEW)]) == ({NEW: 100}, ["ready"])

    asyncio.run(main())


@pytest.mark.parametrize("same", ["labels", "traffic", "example"])
def test_what_is_not_in_the_template_is_taken_without_a_new_revision(same: str) -> None:
    async def main() -> None:
        async with running(version(1)) as (live, events):
            target = {"revisionName": OLD, "percent": 100} if same == "traffic" else {"percent": 100}
            annotations = {"relight/example": "[]"} if same == "example" else {"team": "ml"}
            change(live, version(1, target, annotations=annotations))
            await settle()
            assert (list(live.revisions), events.told, len(list(live.pods))) == ([OLD], [], 1)
            assert live.status("", "")["example"] == ("[]" if same == "example" else '{"instances": ["hello"]}')

    asyncio.run(main())


def test_what_a_secret_or_the_cluster_says_is_taken_without_a_new_revision_for_what_starts_from_now_on() -> None:
    async def main() -> None:
        async with running(version(1)) as (live, _):
            text = manifests(service("hello", scale={"initial-scale": "1"}, env={"VERSION": "1"}))
            text += "---\n" + yaml.safe_dump({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"A": "b"}})
            text = text.replace("allow-zero-initial-scale", "max-scale: '7'\n  allow-zero-initial-scale")
            change(live, read_manifests([("hello.yaml", text)]).services[0])
            (revision,) = live.revisions.values()
            assert revision.service.manifests.secrets == {("default", "key"): {"A": "b"}}
            assert revision.scaling.scaler.spec.max_scale == 7
            assert [pod.phase for pod in pods(live, OLD)] == ["ready"]

    asyncio.run(main())


def test_a_new_revision_that_is_stuck_leaves_the_traffic_where_it_is_and_its_reason_outlives_its_pods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(troubles_module, "STUCK_S", 0.0)

    async def main() -> None:
        async with running(version(1)) as (live, events):
            change(live, version(2))
            await settle()
            (pod,) = pods(live, NEW)
            sidecar = ContainerProcess(Process("cache", False, ("true",), {}, None, (), Path("/no/log"), None, None), lambda _: None)
            pod.troubles.complained(sidecar, "no objects below s3://models/flowerz/")
            pod.troubled()
            pod.gone.set()
            await settle()
            assert (shares(live), pods(live, NEW)) == ({OLD: 100}, [])
            status = live.status("", "")
            assert status["rollout"]["state"] == "failed"
            for said in (status["failure"], status["rollout"]["trouble"]):
                assert "no objects below s3://models/flowerz/" in said
            assert f"{NEW} failed; traffic stays on {OLD}" in events.told

    asyncio.run(main())


def test_going_back_before_the_new_revision_is_ready_lets_it_go() -> None:
    async def main() -> None:
        async with running(version(1)) as (live, _):
            change(live, version(2))
            await settle()
            change(live, version(1))
            await settle()
            assert (shares(live), live.status("", "")["rollout"]) == ({OLD: 100}, None)
            assert [pod.phase for pod in live.pods] == ["ready", "draining"]

    asyncio.run(main())


def test_of_two_changes_in_a_row_the_last_one_gets_the_traffic() -> None:
    async def main() -> None:
        async with running(version(1)) as (live, _):
            change(live, version(2))
            await settle()
            change(live, version(3))
            await settle()
            become_ready(live, NEW)
            assert shares(live) == {OLD: 100}
            become_ready(live, NEWEST)
            assert shares(live) == {NEWEST: 100}

    asyncio.run(main())


def test_a_split_keeps_both_and_traffic_can_go_back_to_an_old_revision_by_name() -> None:
    async def main() -> None:
        async with running(version(1)) as (live, _):
            half = {"revisionName": OLD, "percent": 50}
            change(live, version(2, half, {"percent": 50}))
            await settle()
            become_ready(live, NEW)
            await settle()
            assert shares(live) == {OLD: 50, NEW: 50}
            assert [pod.phase for pod in live.pods] == ["ready", "ready"]
            change(live, version(2))
            assert shares(live) == {NEW: 100}
            change(live, version(2, {"revisionName": OLD, "percent": 100}, {"tag": "next"}))
            assert (shares(live), live.choose("next").name) == ({OLD: 100}, NEW)
            await settle()
            assert [pod.phase for pod in pods(live, NEW)] == ["ready"]  # its tag can be called

    asyncio.run(main())


def test_traffic_that_is_pinned_stays_and_the_new_revision_goes_to_zero_once_it_has_been_ready() -> None:
    async def main() -> None:
        async with running(version(1)) as (live, _):
            change(live, version(2, {"revisionName": OLD, "percent": 100}))
            await settle()
            become_ready(live, NEW)
            await settle()
            assert (shares(live), [pod.phase for pod in pods(live, NEW)]) == ({OLD: 100}, ["draining"])

    asyncio.run(main())


def test_traffic_may_name_the_revision_that_comes_with_it_and_waits_for_it() -> None:
    async def main() -> None:
        async with running(version(1)) as (live, _):
            change(live, version(2, {"revisionName": "hello-v2", "percent": 100}, name="hello-v2"))
            await settle()
            assert shares(live) == {OLD: 100}
            become_ready(live, "hello-v2")
            assert shares(live) == {"hello-v2": 100}

    asyncio.run(main())


def test_a_revision_that_is_not_known_is_told_with_those_that_are_and_changes_nothing() -> None:
    async def main() -> None:
        async with running(version(1)) as (live, _):
            with pytest.raises(ManifestError) as told:
                live.rollout.check(version(2, {"revisionName": "hello-00009", "percent": 100}))
            assert str(told.value) == (
                "hello.yaml: document 1 (Service hello): spec.traffic[0].revisionName: "
                f"found 'hello-00009'; the revisions of this run are {OLD}, {NEW}"
            )
            assert (shares(live), list(live.revisions)) == ({OLD: 100}, [OLD])

    asyncio.run(main())


def test_at_the_start_only_the_first_revision_is_known() -> None:
    with pytest.raises(ManifestError, match=rf"found '{NEW}'; the revisions of this run are {OLD}$"):
        LiveService(version(1, {"revisionName": NEW, "percent": 100}), FakePod, Events())


def test_a_named_revision_cannot_change_and_comes_back_by_its_name() -> None:
    async def main() -> None:
        async with running(version(1, name="hello-a")) as (live, _):
            with pytest.raises(
                ManifestError, match=r"spec\.template\.metadata\.name: found 'hello-a', the name of a revision with another"
            ):
                live.rollout.check(version(2, name="hello-a"))
            change(live, version(2, name="hello-b"))
            await settle()
            become_ready(live, "hello-b")
            change(live, version(1, name="hello-a"))
            assert (shares(live), list(live.revisions)) == ({"hello-a": 100}, ["hello-a", "hello-b"])

    asyncio.run(main())


def test_recreate_lets_the_old_pods_go_before_the_new_ones_start() -> None:
    async def main() -> None:
        async with running(version(1)) as (live, events):
            change(live, version(2, annotations={"relight/rollout": "recreate"}))
            leave = asyncio.Event()
            caller = asyncio.create_task(hold(live.choose(), leave))
            await asyncio.sleep(0.2)
            assert ([pod.phase for pod in pods(live, OLD)], pods(live, NEW), live.queued) == (["draining"], [], 1)
            assert live.status("", "")["rollout"]["state"] == "waiting"
            pods(live, OLD)[0].gone.set()
            while not pods(live, NEW):
                await asyncio.sleep(0.01)
            await settle()  # it has been asked for; now it starts
            become_ready(live, NEW)
            await settle()
            assert (shares(live), live.queued) == ({NEW: 100}, 0)
            assert events.told[0] == f"{NEW} starts when {OLD} is gone (relight/rollout: recreate)"
            leave.set()
            await caller

    asyncio.run(main())


def test_when_a_recreated_revision_fails_the_traffic_goes_back() -> None:
    async def main() -> None:
        async with running(version(1)) as (live, events):
            change(live, version(2, deadline="0s", annotations={"relight/rollout": "recreate"}))
            await settle()
            pods(live, OLD)[0].gone.set()
            while "failed" not in events.told:
                await asyncio.sleep(0.01)
            assert shares(live) == {OLD: 100}

    asyncio.run(main())


def test_old_revisions_are_forgotten_but_the_last_ones_and_their_requests_stay_counted() -> None:
    async def main() -> None:
        async with running(version(1, scale={"initial-scale": "0"})) as (live, _):
            for number in range(2, KEPT + 6):
                async with live.choose().request() as load:
                    load.count()
                change(live, version(number, scale={"initial-scale": "0"}))
                await settle()
            names = [f"hello-{number:05d}" for number in range(5, KEPT + 6)]
            assert list(live.revisions) == names
            assert live.requests_total == KEPT + 4

    asyncio.run(main())


def test_a_service_that_leaves_serves_who_is_there_and_is_gone_then() -> None:
    async def main() -> None:
        async with running(version(1, scale={"min-scale": "2", "initial-scale": "2"})) as (live, _):
            leave = asyncio.Event()
            caller = asyncio.create_task(hold(live.choose(), leave))
            await settle()
            live.leave()
            going = asyncio.create_task(live.gone())
            await settle()
            for pod in pods(live, OLD):
                pod.gone.set()
            assert not going.done()
            leave.set()
            await caller
            await asyncio.wait_for(going, 60)
            assert list(live.pods) == []

    asyncio.run(main())


def test_a_pod_that_is_let_go_for_two_reasons_at_once_goes_once() -> None:
    async def main() -> None:
        async with running(version(1, scale={"initial-scale": "2"})) as (live, events):
            revision = live.choose()
            live.leave()
            revision.scaling.scale_to(0)
            for pod in pods(live, OLD):
                pod.gone.set()
            await settle()
            assert events.told == ["at zero"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("host", "header", "by_header", "expected"),
    [
        ("hello.default.localhost:8080", None, False, OLD),
        ("next-hello.default.localhost", None, False, NEW),
        ("NEXT-Hello.default.LOCALHOST:80", None, False, NEW),
        ("other-hello.default.localhost", None, False, OLD),
        ("next-hello.other.localhost", None, False, OLD),
        ("hello.default.localhost", "next", False, OLD),
        ("hello.default.localhost", "next", True, NEW),
        ("hello.default.localhost", "other", True, OLD),
    ],
)
def test_a_tag_has_a_host_of_its_own_and_where_that_is_allowed_a_header(
    host: str, header: str | None, by_header: bool, expected: str
) -> None:
    async def main() -> None:
        async with running(version(1)) as (live, _):
            change(live, version(2, {"revisionName": OLD, "percent": 100}, {"tag": "next"}))
            await settle()
            become_ready(live, NEW)
            router = Router()
            services: Sequence[LiveService] = [live]
            router.update(services, live, by_header=by_header)
            assert router.find(host, {"Knative-Serving-Tag": header} if header else {}).name == expected
            assert live.status("default.localhost:1/", "")["revisions"][1]["tags"] == {"next": "http://next-hello.default.localhost:1/"}

    asyncio.run(main())
