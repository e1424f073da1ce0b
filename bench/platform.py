"""What the local platform adds and saves.

A start from zero with the fork server beside one as a fresh process, in turns, weights in the node's cache: two platforms side by side,
one of them with `--no-fork-server`, the same client, the same machine. First byte of the answer at the caller.

    .venv/bin/python bench/platform.py [--rounds 5] [--json FILE]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # and not this folder, where we would be found in place of Python's own `platform`

import http.client  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from typing import Any  # noqa: E402

from bench.cold_start import SENTENCE, Platform, call  # noqa: E402
from bench.common import machine, main, spread  # noqa: E402

TARGET_S, TARGET_RATIO = 0.3, 0.15
SETTLE_S = 0.5  # after the last pod is gone


def first_byte(platform: Platform) -> float:
    """Seconds from the connection of a caller to the first byte of the answer; from zero, or not."""
    connection = http.client.HTTPConnection(platform.url.removeprefix("http://"), timeout=120)
    began = time.perf_counter()
    connection.request("POST", "/", json.dumps(SENTENCE), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    seconds = time.perf_counter() - began
    assert reply.status == 200, reply.read()
    connection.close()
    return seconds


def cold(platform: Platform, *, forked: bool) -> dict[str, Any]:
    """One start from zero."""
    platform.wait_for_zero()
    time.sleep(SETTLE_S)
    seconds = first_byte(platform)
    (pod,) = platform.service()["pods"]
    assert pod["forked"] is forked, pod
    assert pod["weights"]["source"] == "cache", pod
    return {"first_byte_s": seconds, "stages": pod["stages"]}


def warm_up(platform: Platform) -> None:
    """Fill the cache, and wait for the fork server."""
    platform.wait_for_zero()
    platform.encode()
    end = time.monotonic() + 120
    while (server := call(f"{platform.admin}/api/status")["fork_server"]) and not server["warm"]:
        if time.monotonic() > end:
            raise SystemExit("the fork server was not warm within 120 s")
        time.sleep(0.1)


def measure(rounds: int) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {"fork server": [], "fresh process": []}
    with tempfile.TemporaryDirectory(prefix="relight-bench-") as folder, ExitStack() as running:
        platforms = {}
        for name, options in (("fork server", []), ("fresh process", ["--no-fork-server"])):
            state = Path(folder) / name.replace(" ", "-")
            state.mkdir()
            platforms[name] = Platform(state, *options)
            running.callback(platforms[name].stop)
            warm_up(platforms[name])
        for number in range(rounds):
            for name, platform in platforms.items():
                # The other one has no pod meanwhile, and nothing else starts.
                for other in platforms.values():
                    other.wait_for_zero()
                found[name].append(cold(platform, forked=name == "fork server"))
            forked, fresh = (found[name][-1]["first_byte_s"] for name in found)
            print(f"round {number + 1}: forked {forked:.3f} s, fresh {fresh:.3f} s, ratio {forked / fresh:.3f}", file=sys.stderr)
    return found


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    rounds = len(found["fork server"])
    values = {name: [start["first_byte_s"] for start in starts] for name, starts in found.items()}
    ratios = [forked / fresh for forked, fresh in zip(values["fork server"], values["fresh process"], strict=True)]
    stages = sorted(found["fork server"][0]["stages"], key=lambda name: found["fork server"][0]["stages"][name])
    lines = [
        f"| seconds from zero, median (min–max) of {rounds} rounds | fork server | fresh process |",
        "| --- | ---: | ---: |",
        "| **first byte at the caller** | " + " | ".join(spread(values[name], ".3f") for name in found) + " |",
        *(
            f"| {stage} ended after | "
            + " | ".join(spread([start["stages"][stage] for start in found[name]], ".3f") for name in found)
            + " |"
            for stage in stages
        ),
        "",
        f"Ratio of the first bytes, in turn: {spread(ratios, '.3f')}. Wanted: ≤ {TARGET_S} s and ≤ {TARGET_RATIO}; "
        + ("holds." if statistics.median(values["fork server"]) <= TARGET_S and statistics.median(ratios) <= TARGET_RATIO else "MISSED."),
        f"{machine()}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(__doc__, measure, table)
