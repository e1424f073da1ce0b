"""What the node caches hold, by their published layout and by what the sidecars that are up say of themselves.

It knows of a cache what any other reader may: `FORMAT`, `refs/`, and `snapshots/` as a directory of links to the complete files.
"""

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from knative.local.pod import Pod

ASK = aiohttp.ClientTimeout(total=1)
PORT = "WEIGHTS_PORT"


def cached(volumes: Path) -> list[dict[str, Any]]:
    """Each URI that a cache below `volumes` has a snapshot for, with the bytes that are there; it reads directories, so not in the loop."""
    found = []
    for mark in sorted(volumes.glob("*/*/FORMAT")):
        cache = mark.parent
        for ref in sorted(cache.glob("refs/*")):
            try:
                about = json.loads(ref.read_text())
                uri, snapshot = str(about["uri"]), str(about["snapshot"])
                files = list((cache / "snapshots" / Path(snapshot).name).rglob("*"))
                links = [file for file in files if file.is_symlink()]
                there = [file.stat().st_size for file in links if file.exists()]  # a link to a file that is not complete leads nowhere
            except (OSError, ValueError, KeyError, TypeError):
                continue  # evicted meanwhile, or of another layout
            found.append(
                {
                    "volume": str(cache.relative_to(volumes)),
                    "uri": uri,
                    "snapshot": snapshot,
                    "bytes": sum(there),
                    "files": len(links),
                    "complete": bool(links) and len(there) == len(links),
                    "checked_at": about.get("checked"),
                }
            )
    return found


async def sidecars(pods: Iterable[Pod], session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    """What each sidecar that is up says: its pod, its `/v1/snapshots`, and its counters by name."""
    asked = [(pod, process.env[PORT]) for pod in pods if pod.phase != "draining" for process in pod.plan.processes if PORT in process.env]
    answers = await asyncio.gather(*(_ask(pod, port, session) for pod, port in asked))
    return [answer for answer in answers if answer]


async def _ask(pod: Pod, port: str, session: aiohttp.ClientSession) -> dict[str, Any] | None:
    address = f"http://127.0.0.1:{port}"
    try:
        async with session.get(f"{address}/v1/snapshots", timeout=ASK) as reply:
            snapshots = (await reply.json())["snapshots"]
        async with session.get(f"{address}/metrics", timeout=ASK) as reply:
            families = list(text_string_to_metric_families(await reply.text()))
        counters = {
            _name(sample.name, sample.labels): sample.value for family in families if family.type == "counter" for sample in family.samples
        }
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError):
        return None  # not up yet, or something else
    return {"pod": pod.name, "snapshots": snapshots, "counters": counters}


def _name(name: str, labels: dict[str, str]) -> str:
    return name + ("{" + ",".join(f"{key}={value}" for key, value in labels.items()) + "}" if labels else "")
