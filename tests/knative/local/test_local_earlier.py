"""Weights that others have taken the place of in the embedded object store."""

import asyncio
from pathlib import Path
from typing import Any

import boto3
import pytest

from knative.local.earlier import BUCKET, EarlierWeights
from knative.local.embedded import EmbeddedServer
from knative.local.errors import PlatformError
from knative.local.seeds import Seed, Seeds
from tests.support import free_port

KEYS: Any = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}


def test_weights_that_are_replaced_stay_for_whoever_was_made_with_them_and_no_longer(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    (folder / "small").mkdir(parents=True)
    value = folder / "small" / "value.txt"
    value.write_text("1")
    seed = Seed(folder, "s3://models/all")
    seeds, in_use, said = Seeds([seed]), set[str](), list[str]()

    async def main() -> None:
        store = EmbeddedServer(free_port(), tmp_path / "log", said.append, f"{tmp_path}/")
        s3 = boto3.client("s3", endpoint_url=store.address, **KEYS)

        def holds(uri: str) -> bytes:
            bucket, _, prefix = uri.removeprefix("s3://").partition("/")
            return s3.get_object(Bucket=bucket, Key=f"{prefix}/value.txt")["Body"].read()

        try:
            await store.start()
            earlier = EarlierWeights(store.address, seeds, lambda: in_use)
            (snapshot,) = await store.serve_objects([seed])
            first = seed.stamp()
            in_use.add(first)
            await earlier.keep(seed, first, snapshot)
            await earlier.keep(seed, first, snapshot)  # as after a push that failed: what is in the store now is not what it was
            value.write_text("2")
            second = seed.stamp()
            await earlier.keep(seed, second, snapshot)  # which nobody has
            await store.fill(seed)
            told = {stamp: seeds.pinned("s3://models/all/small", stamp) for stamp in (first, second)}
            assert told == {first: f"s3://{BUCKET}/{first[:16]}/models/all/small", second: "s3://models/all/small"}
            assert [await asyncio.to_thread(holds, told[stamp]) for stamp in (first, second)] == [b"1", b"2"]
            assert seeds.pinned("s3://models/all", first) == f"s3://{BUCKET}/{first[:16]}/models/all"
            value.unlink()
            with pytest.raises(PlatformError, match="weights: holds no files; the embedded object store keeps what it has"):
                await store.fill(seed)
            await earlier.drop()
            assert await asyncio.to_thread(holds, told[first]) == b"1"
            in_use.clear()
            await earlier.drop()
            assert "Contents" not in await asyncio.to_thread(s3.list_objects_v2, Bucket=BUCKET)
            assert seeds.pinned("s3://models/all", first) == snapshot
        finally:
            s3.close()
            await store.stop()

    asyncio.run(main())
