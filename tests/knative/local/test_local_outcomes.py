"""The tally of how requests end: what is counted, what is lately, and that it stays small."""

import asyncio
import re
from collections.abc import Iterator

import aiohttp
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from knative.local.activator import Activator
from knative.local.launch import PodPlan
from knative.local.outcomes import GONE, REVISIONS, Outcomes
from knative.local.ports import Ports
from knative.local.router import Router
from knative.local.service import LiveService
from tests.knative.local.fakes import Events, FakePod, fake, parsed
from tests.knative.local.running import Platform, platform_running, service
from tests.support import ROOT, request, wait_until

GONE_IS_OUT = re.compile(r'!="499"|=~"5\.\.\|other"')


def test_answers_are_counted_by_status_and_by_who_made_them() -> None:
    outcomes = Outcomes()
    for code, source in ((200, "pod"), (200, "pod"), (404, "pod"), (503, "pod"), (503, "activator"), (GONE, "activator")):
        outcomes.add(10.0, code, source, "hello-00001")  # type: ignore[arg-type]
    told = outcomes.status(10.5)
    assert told["answers"] == {"200": 2, "404": 1, "499": 1, "503": 2}
    errors = told["errors"]
    assert errors["total"] == 2
    assert {(one["code"], one["source"], one["count"]) for one in errors["codes"]} == {("503", "activator", 1), ("503", "pod", 1)}
    assert (errors["last"]["code"], errors["last"]["source"], errors["last"]["revision"]) == ("503", "activator", "hello-00001")
    assert (errors["last_minute"]["answers"], errors["last_minute"]["errors"], errors["last_minute"]["rate"]) == (
        5,
        2,
        0.4,
    )  # who went away got none
    assert errors["revisions"] == {"hello-00001": 2}


def test_callers_who_go_away_make_no_share_of_errors_smaller() -> None:
    outcomes = Outcomes()
    for code, source in ((500, "pod"), *[(200, "pod")] * 9, *[(GONE, "activator")] * 90):
        outcomes.add(1.0, code, source)  # type: ignore[arg-type]
    errors = outcomes.status(1.0)["errors"]
    assert (errors["last_minute"]["rate"], errors["failing"]) == (0.1, True)
    assert outcomes.status(1.0)["answers"]["499"] == 90


def test_what_is_older_than_a_minute_counts_for_the_total_alone() -> None:
    outcomes = Outcomes()
    outcomes.add(100.9, 500, "pod")
    outcomes.add(130.0, 200, "pod")
    assert outcomes.status(160.0)["errors"]["last_minute"]["errors"] == 0
    assert outcomes.status(159.9)["errors"]["last_minute"]["rate"] == 0.5
    later = outcomes.status(1000.0)["errors"]
    assert (later["total"], later["last_minute"]) == (1, {"answers": 0, "errors": 0, "rate": None, "codes": []})


@pytest.mark.parametrize("code", [0, 42, 99, 600, 999, 10**9, -1])
def test_a_status_that_is_none_is_an_error_of_one_name(code: int) -> None:
    outcomes = Outcomes()
    outcomes.add(1.0, code, "pod")
    assert outcomes.status(1.0)["answers"] == {"other": 1}
    assert outcomes.status(1.0)["errors"]["total"] == 1


def test_the_tally_stays_small_whatever_pods_answer_and_however_many_revisions_come() -> None:
    outcomes = Outcomes()
    for number in range(5000):
        outcomes.add(number / 7, number, ("pod", "activator")[number % 2], f"hello-{number // 10:05d}")
    assert len(outcomes.counts) <= 2 * 501
    assert not outcomes.of("hello-00000")
    assert sum(outcomes.of(f"hello-{number:05d}") != {} for number in range(500)) == REVISIONS
    assert len(outcomes._seconds) <= 61
    assert outcomes.counts.total() == 5000  # the Service's own sums lose nothing
    assert outcomes.answers == 4999  # of which one is a caller who went away


def test_errors_of_the_pod_of_the_platform_and_callers_who_went_away_are_told_apart() -> None:
    """Through the activator: the pod's 200, 404 and 500, an answer that is cut in the middle, a caller who leaves, a full queue."""

    async def scenario() -> None:
        hold = asyncio.Event()

        async def at_pod(request: web.BaseRequest) -> web.StreamResponse:
            if request.path == "/wait":
                hold.set()
                await asyncio.Event().wait()
            if request.path == "/half":
                answer = web.StreamResponse(headers={"Content-Length": "100"})
                await answer.prepare(request)
                await answer.write(b"only this")
                assert request.transport
                request.transport.abort()
                return answer
            if request.path == "/gone":
                assert request.transport
                request.transport.abort()
            return web.Response(status=int(request.path.removeprefix("/")) if request.path[1:].isdigit() else 200)

        live = LiveService(parsed(scale={"initial-scale": "1"}), FakePod, Events())
        router = Router()
        router.update([live], live, by_header=False)
        live.start()
        handlers = at_pod, Activator(router, Ports(lambda _: None)).handle
        runners = [web.ServerRunner(web.Server(handle, handler_cancellation=True), shutdown_timeout=0) for handle in handlers]
        for runner in runners:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        (pod_port, own_port) = (runner.addresses[0][1] for runner in runners)
        (pod,) = live.pods
        pod.plan = PodPlan(pod_port, ())
        await asyncio.sleep(0)
        fake(pod).become("ready")
        counts = live.record.outcomes.counts
        async with aiohttp.ClientSession() as client:
            for path, status in (("200", 200), ("404", 404), ("500", 500), ("gone", 502)):
                async with client.get(f"http://127.0.0.1:{own_port}/{path}") as reply:
                    assert reply.status == status
            with pytest.raises(aiohttp.ClientError):
                async with client.get(f"http://127.0.0.1:{own_port}/half") as reply:
                    await reply.read()
            leaving = asyncio.create_task(client.get(f"http://127.0.0.1:{own_port}/wait"))
            await hold.wait()
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            while not counts[GONE, "activator"]:
                await asyncio.sleep(0.01)
            live.close()
            async with client.get(f"http://127.0.0.1:{own_port}/") as reply:
                assert reply.status == 503
        assert {key: count for key, count in counts.items() if count} == {
            (200, "pod"): 1,
            (404, "pod"): 1,
            (500, "pod"): 1,
            (502, "activator"): 2,  # one that had the beginning of its answer
            (GONE, "activator"): 1,
            (503, "activator"): 1,
        }
        assert live.requests_total == counts.total() == live.record.outcomes.answers + counts[GONE, "activator"]
        await pod.connections.close()
        for runner in reversed(runners):
            await runner.cleanup()
        await live.stop()

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with platform_running(tmp_path_factory.mktemp("outcomes"), [service("echo"), service("idle")]) as running:
        yield running


def series(platform: Platform, name: str) -> dict[tuple[str, str], float]:
    text = request(platform.admin_port, "GET", "/metrics").body.decode()
    return {
        (sample.labels["code"], sample.labels["source"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "relight_requests_total" and sample.labels["service"] == name
    }


def test_the_documented_queries_ask_for_what_there_is_and_leave_out_who_went_away(platform: Platform) -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    there = set(re.findall(r"^(relight_\w+)\{", request(platform.admin_port, "GET", "/metrics").body.decode(), re.MULTILINE))
    queries = "".join(re.findall(r"```\n(.*?)```", page, re.DOTALL))
    assert {"relight_requests_total", "relight_failed_starts_total"} <= set(re.findall(r"relight_\w+", queries)) <= there
    sums = re.findall(r"relight_requests_total(?:\{code(.*?)\})?\[", queries)
    assert sums
    assert all(GONE_IS_OUT.fullmatch(labels) for labels in sums)


def test_a_metric_of_starts_that_failed_is_there_before_the_first(platform: Platform) -> None:
    text = request(platform.admin_port, "GET", "/metrics").body.decode()
    assert 'relight_failed_starts_total{namespace="default",service="idle"} 0.0' in text.splitlines()


def test_errors_are_seen_in_metrics_in_status_and_on_the_terminal(platform: Platform) -> None:
    assert series(platform, "echo")["500", "pod"] == 0
    for code in (500, 500, 200, 418):
        platform.call("echo", f"/status/{code}")
    wait_until("the tally", lambda: series(platform, "echo").get(("418", "pod")))
    found = series(platform, "echo")
    assert (found["500", "pod"], found["200", "pod"], found["503", "activator"]) == (2, 1, 0)
    assert sum(found.values()) == platform.service("echo")["requests_total"]
    errors = platform.service("echo")["errors"]
    assert (errors["total"], errors["last_minute"]["answers"], errors["last_minute"]["rate"]) == (2, 4, 0.5)
    head, row = (line.split() for line in platform.relight("status").stdout.splitlines()[:2])
    assert (row[head.index("ERRORS")], "echo: 2 of the last minute's 4 answers" in platform.relight("status").stdout) == ("2", True)
    told = re.compile("echo callers get errors: [12] × 500 from the function")
    wait_until("a line on the terminal", lambda: told.search(platform.server.said()))
    wait_until("both in the history", lambda: sum(sample["errors"] for sample in history(platform, "echo")) == 2)


def history(platform: Platform, name: str) -> list[dict[str, float]]:
    found: list[dict[str, float]] = request(platform.admin_port, "GET", "/api/history").json()["services"][f"default/{name}"]
    return found
