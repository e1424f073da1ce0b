"""The object store and the queues that come with the platform."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import boto3
import pytest

from knative.local.embedded import EmbeddedServer
from knative.local.errors import PlatformError
from knative.local.queues import EMBEDDED, Depth, Queue
from knative.local.seeds import Seed
from tests.support import free_port

KEYS: Any = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
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
        store = EmbeddedServer(free_port(), tmp_path / "log", said.append, f"{tmp_path}/")
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
            await told(
                said, "the embedded server was started again, and has again s3://models/small of --seed and 2 queues, without messages"
            )
            listed = await asyncio.to_thread(lambda: urlopen(f"{store.address}/models?list-type=2").read())  # noqa: S310
            assert b"small/config.json" in listed
            assert await asyncio.to_thread(work.depth) == Depth(0, 0, 0)
        finally:
            await store.stop()

    asyncio.run(main())


def test_a_server_that_was_emptied_is_filled_again(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text("{}")
    said: list[str] = []

    async def main() -> None:
        store = EmbeddedServer(free_port(), tmp_path / "log", said.append, f"{tmp_path}/")
        try:
            await store.start()
            await store.serve_objects([Seed(tmp_path / "small", "s3://models/small"), Seed(tmp_path / "small", "s3://other/small")])
            await store.serve_queues(["work", "kept"])
            work = Queue(store.queue_url("work"), EMBEDDED)
            before = len(said)
            await asyncio.to_thread(empty, store)
            await told(said, "the embedded server had lost what it held, and has again s3://models/small of --seed and 1 queue, without")
            assert await asyncio.to_thread(work.depth) == Depth(0, 0, 0)
            listed = await asyncio.to_thread(lambda: urlopen(f"{store.address}/models?list-type=2").read())  # noqa: S310
            assert b"small/config.json" in listed
            await asyncio.sleep(0)
            assert len(said) == before + 1
        finally:
            await store.stop()

    asyncio.run(main())


def empty(store: EmbeddedServer) -> None:
    """As somebody with another client of S3 and SQS does it."""
    empty_bucket(store)
    sqs = boto3.client("sqs", endpoint_url=store.address, **KEYS)
    sqs.delete_queue(QueueUrl=store.queue_url("work"))


def test_what_cannot_be_filled_again_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knative.local.again.LONGEST_PAUSE_S", 0.02)
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    said: list[str] = []

    async def main() -> None:
        monkeypatch.setattr("knative.local.embedded.LOOK_S", 0.01)
        store = EmbeddedServer(free_port(), tmp_path / "log", said.append, f"{tmp_path}/")
        tries: list[int] = []
        fill = store.fill

        async def refill(seed: Seed) -> None:
            tries.append(1)
            if len(tries) < 5:
                raise PlatformError("no such directory")
            await fill(seed)

        try:
            await store.start()
            await store.serve_objects([Seed(folder, "s3://models/small")])
            monkeypatch.setattr(store, "fill", refill)
            await asyncio.to_thread(empty_bucket, store)
            while len(tries) < 5:  # on a busy machine the store may be said to work again for another reason before
                await asyncio.sleep(0.01)
            await told(said, "works again")
            assert sum("no such directory" in line for line in said) == 1
        finally:
            await store.stop()

    asyncio.run(main())


def empty_bucket(store: EmbeddedServer) -> None:
    s3 = boto3.client("s3", endpoint_url=store.address, **KEYS)
    for found in s3.list_objects_v2(Bucket="models")["Contents"]:
        s3.delete_object(Bucket="models", Key=found["Key"])
