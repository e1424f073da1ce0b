"""What the platform knows of its queues, whatever these answer."""

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web

from knative.local import queue_watch
from knative.local.launch import PodPlan, Process
from knative.local.manifest import QueueSource
from knative.local.queue_watch import QueueWatch
from knative.local.queues import EMBEDDED, Depth, Queue, QueueError
from knative.local.source import LiveSource
from knative.local.trouble import Trouble


class Sqs:
    """Says what it is told to."""

    def __init__(self) -> None:
        self.answer: Any = {}
        self.hold = threading.Event()
        self.hold.set()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                outer.hold.wait(60)
                status, document = outer.answer if isinstance(outer.answer, tuple) else (200, outer.answer)
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://user:hunter2@127.0.0.1:{self.server.server_port}/000000000000/work"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()


@pytest.fixture
def sqs() -> Iterator[Sqs]:
    made = Sqs()
    yield made
    made.hold.set()
    made.server.shutdown()
    made.thread.join()
    made.server.server_close()


class Source:
    """A queue source that runs, as far as the watch looks at it."""

    oldest_held_s = problem = None

    def __init__(self, url: str) -> None:
        self.queue_url, self.env = url, EMBEDDED
        self.fails = False

    async def count(self, session: aiohttp.ClientSession) -> None:
        if self.fails:
            raise ZeroDivisionError

    def status(self) -> dict[str, Any]:
        return {"name": "work"}


def attributes(**more: str) -> dict[str, Any]:
    names = ("", "Delayed", "NotVisible")
    return {"Attributes": {f"ApproximateNumberOfMessages{name}": "1" for name in names} | more}


@pytest.mark.parametrize(
    "policy",
    ["{}", "[]", "no JSON", "3", '{"deadLetterTargetArn": 4}', '{"deadLetterTargetArn": "arn"}', '{"deadLetterTargetArn": ["a:b"]}'],
)
def test_a_redrive_policy_that_makes_no_sense_is_none(sqs: Sqs, policy: str) -> None:
    sqs.answer = attributes(RedrivePolicy=policy)
    assert Queue(sqs.url, EMBEDDED).depth() == Depth(2, 1, None)


def test_what_a_queue_says_is_one_line_of_bounded_length_without_credentials(sqs: Sqs) -> None:
    sqs.answer = attributes(ApproximateNumberOfMessages="many\n2026-01-01 everything is fine")
    with pytest.raises(QueueError, match=r"many\\n2026-01-01 everything is fine, 1, 1 are no numbers of messages"):
        Queue(sqs.url, EMBEDDED).depth()
    said = "\x1b[2J" + "x" * 100_000 + "\nsee http://user:hunter2@host/"
    sqs.answer = (400, {"__type": "Bad", "message": said})
    with pytest.raises(QueueError) as raised:
        Queue(sqs.url, EMBEDDED).depth()
    text = str(raised.value)
    assert text.isprintable()
    assert len(text) < 600
    assert "hunter2" not in text


def test_one_that_fails_is_told_once_and_the_others_are_known(sqs: Sqs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_watch, "LOOK_S", 0.001)
    monkeypatch.setattr("knative.local.again.LONGEST_PAUSE_S", 0.005)
    sqs.answer = attributes()
    told: list[str] = []

    async def main() -> None:
        source = Source(sqs.url)
        source.fails = True
        sources = [cast(LiveSource, source)]
        async with aiohttp.ClientSession() as session, asyncio.timeout(60):
            watch = QueueWatch(lambda: sources, session, told.append)
            watch.start()
            while watch.status()[0][0]["depth"] is None or not told:
                await asyncio.sleep(0.01)
            source.fails = False
            while len(told) < 2:
                await asyncio.sleep(0.01)
            assert "hunter2" not in json.dumps(watch.status())
            sources.clear()
            while watch._found:
                await asyncio.sleep(0.01)
            await watch.stop()

    asyncio.run(main())
    assert told == ["the look at the queues failed: ZeroDivisionError", "the look at the queues works again"]


def test_no_thread_outlives_it_though_a_queue_says_nothing(sqs: Sqs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_watch, "ANSWER_S", 0.2)
    sqs.hold.clear()

    async def main() -> None:
        sources = [cast(LiveSource, Source(sqs.url))]
        async with aiohttp.ClientSession() as session, asyncio.timeout(60):
            watch = QueueWatch(lambda: sources, session, print)
            watch.start()
            while not watch._threads._threads:
                await asyncio.sleep(0.01)
            asked = list(watch._threads._threads)
            await watch.stop()
            assert not [thread for thread in asked if thread.is_alive()]

    asyncio.run(main())


class Pod:
    """Cannot be started."""

    def __init__(self, plan: PodPlan) -> None:
        self.plan = plan
        self.trouble: Trouble | None = None
        self.is_drained = False

    async def start(self) -> None:
        raise NotADirectoryError(20, "Not a directory", "volumes/c")

    async def drain(self, patience_s: float) -> None:
        self.is_drained = True

    def fail(self, trouble: Trouble) -> None:
        self.trouble = trouble

    def status(self) -> dict[str, Any]:
        return {"name": "pod", "phase": "starting", "started_at": 0.0, "restarts": {}, "exits": {}}


def test_a_source_that_cannot_be_started_says_why_and_stops_as_any_other() -> None:
    url = "https://user:hunter2@127.0.0.1/000000000000/work"
    process = Process("source", True, (), {"QUEUE_SOURCE_URL": url}, None, (), Path("log"), None, None)
    pod = Pod(PodPlan(0, (process,)))
    declared: Any = SimpleNamespace(name="events", namespace="default", sink=(None, "http://user:hunter2@sink/"))

    async def main() -> None:
        live = LiveSource(declared, lambda _: cast(Any, pod))
        async with aiohttp.ClientSession() as session, asyncio.timeout(60):
            watch = QueueWatch(lambda: [live], session, print)
            live.start()
            while not live.problem:
                await asyncio.sleep(0.001)
            (status,), (queue,) = watch.status()
            assert (status["phase"], status["problem"]) == ("failed", "starting the queue source events failed: volumes/c: Not a directory")
            assert "hunter2" not in json.dumps([status, queue])
            assert (status["queue"], queue["url"]) == ("work", "https://***@127.0.0.1/000000000000/work")
            await live.stop()
            assert pod.is_drained
            await watch.stop()

    asyncio.run(main())


def test_a_source_whose_queue_does_not_answer_is_not_ready_and_says_so() -> None:
    status = {"/metrics": (200, ""), "/readyz": (503, "the queue does not answer\n")}

    async def answer(request: web.BaseRequest) -> web.Response:
        code, text = status[request.path]
        return web.Response(status=code, text=text)

    async def main() -> None:
        runner = web.ServerRunner(web.Server(answer))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        document = {"name": "work-1", "phase": "ready", "started_at": 0.0, "restarts": {}, "exits": {}}
        plan = SimpleNamespace(port=runner.addresses[0][1], processes=())
        pod = SimpleNamespace(plan=plan, trouble=None, status=lambda: document)
        declared = SimpleNamespace(name="work", namespace="default", sink=(None, "http://sink/"))
        live = LiveSource(cast(QueueSource, declared), lambda name: cast(Any, pod))
        async with aiohttp.ClientSession() as session:
            await live.count(session)
            assert (live.problem, live.status()["phase"]) == ("the queue does not answer; `relight logs work` says why", "starting")
            status["/readyz"] = 200, "ready\n"
            await live.count(session)
            assert (live.problem, live.status()["phase"]) == (None, "ready")
        await runner.cleanup()

    asyncio.run(main())
