"""Weights in the embedded object store that others have taken the place of: a revision that was made with them can still start.

For as long as such a revision is in use there is a copy of them in a place of its own.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from knative.local.errors import PlatformError
from knative.local.queues import EMBEDDED, REGION
from knative.local.seeds import Seed, Seeds

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

BUCKET = "relight-earlier"  # in which the copies are


class EarlierWeights:
    """The copies; pods of a revision learn from `seeds` which is theirs."""

    def __init__(self, address: str, seeds: Seeds, in_use: Callable[[], set[str]]) -> None:
        """address: of the embedded store. in_use: the stamps of the weights that pods may yet start with."""
        self._address = address
        self._seeds = seeds
        self._in_use = in_use
        self._kept: dict[tuple[Seed, str], str] = {}  # by seed and stamp, which snapshot it is

    async def keep(self, seed: Seed, stamp: str, snapshot: str) -> None:
        """Copy what the store has of the seed, which is about to be replaced, if anybody needs it. Raises PlatformError."""
        if (seed, stamp) in self._kept:
            return
        self._seeds.pin(seed, stamp, snapshot)
        if stamp in self._in_use():
            await asyncio.to_thread(self._copy, seed, stamp)
            self._kept[seed, stamp] = snapshot
            self._seeds.pin(seed, stamp, f"s3://{BUCKET}/{_prefix(seed, stamp)}")

    async def drop(self) -> None:
        """Delete those that nobody needs any more. Raises PlatformError."""
        in_use = self._in_use()
        for (seed, stamp), snapshot in list(self._kept.items()):
            if stamp not in in_use:
                self._seeds.pin(seed, stamp, snapshot)
                del self._kept[seed, stamp]
                await asyncio.to_thread(self._delete, seed, stamp)

    def _copy(self, seed: Seed, stamp: str) -> None:
        bucket, _, prefix = seed.place.partition("/")
        with self._store(f"the weights at {seed.uri} could not be kept for the revision that has them") as store:
            store.create_bucket(Bucket=BUCKET)
            for key in _keys(store, bucket, prefix):
                copy = _prefix(seed, stamp) + key.removeprefix(prefix)
                store.copy_object(Bucket=BUCKET, Key=copy, CopySource={"Bucket": bucket, "Key": key})

    def _delete(self, seed: Seed, stamp: str) -> None:
        with self._store(f"earlier weights of {seed.uri} could not be deleted") as store:
            for key in _keys(store, BUCKET, _prefix(seed, stamp)):
                store.delete_object(Bucket=BUCKET, Key=key)

    @contextmanager
    def _store(self, failed: str) -> Iterator["S3Client"]:
        """failed: what is said if the store does not do what it is asked."""
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            session = boto3.session.Session(EMBEDDED["AWS_ACCESS_KEY_ID"], EMBEDDED["AWS_SECRET_ACCESS_KEY"], region_name=REGION)
            config = Config(proxies={}, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
            yield session.client("s3", endpoint_url=self._address, config=config)
        except (BotoCoreError, ClientError) as error:
            raise PlatformError(f"{failed}: {error}") from error


def _keys(store: "S3Client", bucket: str, prefix: str) -> Iterator[str]:
    for page in store.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for found in page.get("Contents", []):
            yield found["Key"]


def _prefix(seed: Seed, stamp: str) -> str:
    return f"{stamp[:16]}/{seed.place}"
