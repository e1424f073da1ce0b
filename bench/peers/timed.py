"""What every runner has in common: it says READY, waits for a line, fetches, and says what that took."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path


def _cpu_seconds() -> float:
    """Of this process with all its threads, and of the children it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _to_disk(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def measure(fetch: Callable[[], Path | None], check: Callable[[], bool] | None = None) -> None:
    """Time one call of `fetch`, which returns the file it made, or None: `check` then says afterwards whether its memory is right."""
    print("READY", flush=True)
    sys.stdin.readline()
    cpu, began = _cpu_seconds(), time.perf_counter()
    path = fetch()
    seconds, cpu = time.perf_counter() - began, _cpu_seconds() - cpu
    if path:
        _to_disk(path)
    durable = time.perf_counter() - began
    result = {"seconds": seconds, "cpu_seconds": cpu, "durable_seconds": durable, "path": path and str(path)}
    # Here the watch over the memory ends.
    print("DONE", flush=True)
    sys.stdin.readline()
    if check:
        result["right"] = check()
    print("RESULT " + json.dumps(result), flush=True)
