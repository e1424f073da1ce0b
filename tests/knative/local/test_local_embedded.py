"""The object store that comes with the platform."""

import asyncio
import os
import signal
from pathlib import Path
from urllib.request import urlopen

from knative.local.embedded import ObjectStore, Seed
from tests.support import free_port


async def told(said: list[str], text: str) -> None:
    async with asyncio.timeout(60):
        while not any(text in line for line in said):
            await asyncio.sleep(0.02)


def test_a_store_that_dies_is_started_again_with_what_it_was_filled_with(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text("{}")
    said: list[str] = []

    async def main() -> None:
        store = ObjectStore(free_port(), tmp_path / "log", [Seed(tmp_path / "small", "s3://models/small")], said.append)
        await store.start()
        try:
            assert said == [f"object store at {store.address}, in memory"]
            assert store._process._child
            os.kill(store._process._child.pid, signal.SIGKILL)
            await told(said, "object store was ended by SIGKILL; starting it again")
            await told(said, "object store is back, with what --seed names (1)")
            listed = await asyncio.to_thread(lambda: urlopen(f"{store.address}/models?list-type=2").read())  # noqa: S310
            assert b"small/config.json" in listed
        finally:
            await store.stop()

    asyncio.run(main())
