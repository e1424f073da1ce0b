"""Queue sources that run: each a pod that is always there, and what it tells of its work."""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from knative.local.launch import QUEUE_URL
from knative.local.manifest import QueueSource
from knative.local.plain import line
from knative.local.pod import Pod
from knative.local.queues import is_queue_url, queue_name
from knative.local.tasks import Tasks, describe
from knative.local.trouble import Trouble
from weights_cache.environment import masked

ASK = aiohttp.ClientTimeout(total=2)
# What the program counts, and what it is called here: a message that is given back is retried too, by way of the queue.
_COUNTERS = {
    "queue_source_done_total": "done",
    "queue_source_retried_total": "retried",
    "queue_source_given_back_total": "retried",
}
_OLDEST_HELD = "queue_source_oldest_held_seconds"


class LiveSource:
    """One queue source."""

    def __init__(self, source: QueueSource, make_pod: Callable[[str], Pod]) -> None:
        """make_pod: given the pod's name."""
        self.source = source
        self.pod = make_pod(f"{source.name}-source-{uuid.uuid4().hex[:6]}")
        self.counts = dict.fromkeys(_COUNTERS.values(), 0)  # since the start, over all its processes
        self.oldest_held_s: float | None = None  # for how long it has held the message that it has held for longest
        self.env: Mapping[str, str] = next((process.env for process in self.pod.plan.processes if QUEUE_URL in process.env), {})
        self._last = dict(self.counts)  # of the present process
        self._unready = ""  # what it says when it is asked whether it is ready, if it is not
        self._tasks = Tasks(lambda what, error: self.pod.fail(Trouble(describe(what, error))))
        self._starting: asyncio.Task[None] | None = None

    @property
    def queue_url(self) -> str | None:
        """The address of its queue, where that can be asked how it is."""
        url = self.env.get(QUEUE_URL, "")
        return url if is_queue_url(url) else None

    @property
    def problem(self) -> str | None:
        """Why it does not run, where that is not how its program ended, which `exits` says."""
        trouble = self.pod.trouble
        if trouble and not self.pod.status()["exits"]:
            return trouble.reason
        return f"{self._unready}; `relight logs {self.source.name}` says why" if self._unready and not trouble else None

    def start(self) -> None:
        """Begin; a program that does not start is started again."""
        self._starting = self._tasks.start(self.pod.start(), f"starting the queue source {self.source.name}")

    async def stop(self) -> None:
        """Let it finish or give back what it holds, and end it."""
        await self.pod.drain(0)
        if self._starting:
            await asyncio.wait({self._starting})
        await self._tasks.stop()

    async def count(self, session: aiohttp.ClientSession) -> None:
        """Ask the program what it has done."""
        if not self.pod.plan.port:
            return
        try:
            async with session.get(f"http://127.0.0.1:{self.pod.plan.port}/metrics", timeout=ASK) as reply:
                families = list(text_string_to_metric_families(await reply.text()))
            async with session.get(f"http://127.0.0.1:{self.pod.plan.port}/readyz", timeout=ASK) as reply:
                self._unready = line((await reply.text()).strip(), 200) if reply.status == HTTPStatus.SERVICE_UNAVAILABLE else ""
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return  # it is just starting, or another program
        found = dict.fromkeys(self.counts, 0)
        for sample in (sample for family in families for sample in family.samples):
            if sample.name in _COUNTERS:
                found[_COUNTERS[sample.name]] += int(sample.value)
            elif sample.name == _OLDEST_HELD:
                self.oldest_held_s = sample.value or None
        for name, value in found.items():
            # A process that was started again counts from zero.
            self.counts[name] += value - self._last[name] if value >= self._last[name] else value
        self._last = found

    def status(self) -> dict[str, Any]:
        """Its own part of its entry in `/api/status`."""
        service, path = self.source.sink
        url = masked(self.env.get(QUEUE_URL, ""))
        pod = self.pod.status()
        trouble: dict[str, Any] = {name: pod[name] for name in ("reason", "log") if name in pod}
        return {
            "name": self.source.name,
            "namespace": self.source.namespace,
            "queue": queue_name(url) if url else None,
            "queue_url": url if self.queue_url else None,
            "sink": service[1] + path if service else masked(path),
            "phase": "failed" if self.pod.trouble else "starting" if self._unready else pod["phase"],
            **self.counts,
            "pod": pod["name"],
            "started_at": pod["started_at"],
            "restarts": pod["restarts"],
            "exits": pod["exits"],
            **trouble,
        }
