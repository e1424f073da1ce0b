"""The object store and the queues that come with the platform."""

import asyncio
import os
import signal
from pathlib import Path
from urllib.request import urlopen

from knative.local.embedded import EmbeddedServer, Seed
from knative.local.queues import EMBEDDED, Depth, Queue
from tests.support import free_port

TOLD = [("object store", ""), ("queues", ": work"), ("queues", ": more")]


async def told(said: list[str], text: str) -> None:
    async with asyncio.timeout(60):
        while not any(text in line for line in said):
            await asyncio.sleep(0.02)


def test_a_server_that_dies_is_started_again_with_its_seeds_and_its_queues(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text("{}")
    said: list[str] = []

    async def main() -> None:
        store = EmbeddedServer(free_port(), tmp_path / "log", said.append)
        try:
            await store.start()
            await store.serve_objects([Seed(tmp_path / "small", "s3://models/small")])
            await store.serve_queues(["work"])
            await store.serve_queues(["work", "more"])
            work = Queue(store.queue_url("work"), EMBEDDED)
            await asyncio.to_thread(work.send, ["lost"], {}, "")
            assert said == [f"{what} at {store.address}, in memory{of}" for what, of in TOLD]
            assert store._process._child
            os.kill(store._process._child.pid, signal.SIGKILL)
            await told(said, "the embedded server was ended by SIGKILL; starting it again")
            await told(said, "object store is back, with what --seed names (1), and 2 queues without their messages")
            listed = await asyncio.to_thread(lambda: urlopen(f"{store.address}/models?list-type=2").read())  # noqa: S310
            assert b"small/config.json" in listed
            assert await asyncio.to_thread(work.depth) == Depth(0, 0, 0)
        finally:
            await store.stop()

    asyncio.run(main())
