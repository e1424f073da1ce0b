"""What the node caches hold, by their published layout and by what the sidecars that are up say of themselves.

It knows of a cache what any other reader may: `FORMAT`, `refs/`, and `snapshots/` as a directory of links to the complete files.
"""

import asyncio
import json
import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from knative.local.pod import Pod

ASK = aiohttp.ClientTimeout(total=1)
ANSWER_BYTES = 4 << 20  # of a sidecar, whose program may be anybody's
REF_BYTES = 64 << 10
SNAPSHOTS = 200  # of one sidecar
PORT = "WEIGHTS_PORT"
MOST_FILES = 10_000  # of a snapshot, that are looked at


def cached(volumes: Path) -> list[dict[str, Any]]:
    """Each URI that a cache below `volumes` has a snapshot for, with the bytes that are there; it reads directories, so not in the loop."""
    found = []
    for mark in sorted(volumes.glob("*/*/FORMAT")):
        cache = mark.parent
        for ref in sorted(cache.glob("refs/*")):
            try:
                about = _read_ref(ref)
                uri, snapshot = str(about["uri"]), str(about["snapshot"])
                root = cache / "snapshots" / Path(snapshot).name
                # A pod may write there, and lead us anywhere.
                files = [] if root.is_symlink() else list(islice(root.rglob("*"), MOST_FILES))
                links = [file for file in files if file.is_symlink()]
                there = [file.stat().st_size for file in links if file.exists()]  # a link to a file that is not complete leads nowhere
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # evicted meanwhile, or of another layout
            found.append(
                {
                    "volume": str(cache.relative_to(volumes)),
                    "uri": uri,
                    "snapshot": snapshot,
                    "bytes": sum(there),
                    "files": len(links),
                    "complete": bool(links) and len(there) == len(links),
                    "checked_at": checked if isinstance(checked := about.get("checked"), int | float) else None,
                }
            )
    return found


async def sidecars(pods: Iterable[Pod], session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    """What each sidecar that is up says: its pod, its `/v1/snapshots`, and its counters by name."""
    asked = [
        (pod, process.env[PORT])
        for pod in pods
        if pod.phase != "draining"
        for process in pod.plan.processes
        if PORT in process.env and not process.is_main  # the function has it, too: to know where the sidecar is
    ]
    answers = await asyncio.gather(*(_ask(pod, port, session) for pod, port in asked))
    return [answer for answer in answers if answer]


async def _ask(pod: Pod, port: str, session: aiohttp.ClientSession) -> dict[str, Any] | None:
    address = f"http://127.0.0.1:{port}"
    try:
        async with session.get(f"{address}/v1/snapshots", timeout=ASK) as reply:
            told = _parse(await _read(reply))["snapshots"]
        snapshots = [row for row in told[:SNAPSHOTS] if isinstance(row, dict)] if isinstance(told, list) else []
        async with session.get(f"{address}/metrics", timeout=ASK) as reply:
            families = list(text_string_to_metric_families((await _read(reply)).decode()))
        counters = {
            _name(sample.name, sample.labels): sample.value
            for family in families
            if family.type == "counter"
            for sample in family.samples
            if math.isfinite(sample.value)  # others are no JSON
        }
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError, RecursionError):
        return None  # not up yet, or something else
    return {"pod": pod.name, "snapshots": snapshots, "counters": counters}


def _parse(body: bytes) -> Any:
    """JSON without the numbers that are none, which browsers would not read. Raises ValueError or RecursionError."""
    return json.loads(body, parse_constant=lambda _: None, parse_float=lambda text: _finite(float(text)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    """A body. Raises ValueError if it is too large."""
    body = bytearray()
    async for piece in reply.content.iter_any():
        body += piece
        if len(body) > ANSWER_BYTES:
            raise ValueError(f"more than {ANSWER_BYTES} bytes")
    return bytes(body)


def _read_ref(ref: Path) -> Any:
    """What a file of `refs/` says. Raises OSError or ValueError, also for one that is not of a cache: a pod can write there."""
    if not ref.is_file():
        raise ValueError("no file")
    with ref.open("rb") as file:
        return _parse(file.read(REF_BYTES))


def _name(name: str, labels: dict[str, str]) -> str:
    return name + ("{" + ",".join(f"{key}={value}" for key, value in labels.items()) + "}" if labels else "")
