"""From a file in the node's cache to tensors that were touched: `Weights` beside a bare mapping and the usual loaders, in turn.

Every run is a fresh process that imports what it needs first and is timed from there until one byte of each page of each tensor has been
read. Python's garbage collector is off meanwhile, as it is in a function that loads its model: otherwise it is chance which of the ways
makes the object at which it looks through torch's. The last table is what several replicas of one model take together.

    .venv/bin/python bench/load.py [--rounds 7] [--sizes 270M,2G] [--directory DIR ...] [--replicas 4] [--markdown FILE]
"""

import argparse
import gc
import math
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

from bench.node_cache import MIB, URI, cached_model  # noqa: E402  found through the line above

TENSOR_BYTES = 8 * MIB
WAYS = ("bare mmap", "relight Weights", "safetensors load_file", "safetensors load_file, copied out", "torch.load(mmap=True)")


def main() -> None:
    if sys.argv[1:2] == ["--way"]:
        _way(sys.argv[2], Path(sys.argv[3]))
        return
    if sys.argv[1:2] == ["--replica"]:
        _replica(sys.argv[2] == "with", Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", default="270M,2G")
    parser.add_argument("--directory", action="append", default=[], metavar="NAME=DIR", help="where the cache lies [tmpfs=/dev/shm]")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    lines = [f"{os.cpu_count()} cores, Linux {os.uname().release}, Python {sys.version.split()[0]}, {options.rounds} rounds", ""]
    for place in options.directory or ["tmpfs=/dev/shm"]:
        name, _, directory = place.partition("=")
        for size in options.sizes.split(","):
            with _cached(Path(directory), _bytes(size)) as cache:
                lines += _load_table(f"{size} in {name}", cache, options.rounds)
                if size == options.sizes.split(",")[-1]:
                    lines += _replica_table(f"{size} in {name}", cache, options.replicas)
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


def _bytes(text: str) -> int:
    return int(text[:-1]) * {"M": 10**6, "G": 10**9}[text[-1]]


@contextmanager
def _cached(directory: Path, size: int) -> Iterator[Path]:
    """A node cache with one complete snapshot, of tensors of 8 MiB, and a pickle of the same for torch.load."""
    import torch

    with cached_model(directory, size, dtype="F32", tensor_bytes=TENSOR_BYTES) as model:
        model.fill(math.inf)
        torch.save({name: torch.zeros(TENSOR_BYTES // 4) for name in model.names}, model.folder / "model.pt")
        yield model.folder


def _run(*arguments: str) -> "subprocess.Popen[str]":
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)


def _load_table(what: str, folder: Path, rounds: int) -> list[str]:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds + 1):
        for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
            process = _run("--way", way, str(folder))
            out, _ = process.communicate()
            if process.returncode:
                raise SystemExit(f"{way} failed")
            if turn:  # the first round warms the page cache
                seconds[way].append(float(out))
    bare = seconds[WAYS[0]]
    lines = [
        f"### {what}",
        "",
        "| way | ms, median (min to max) | beside the bare mapping, median of the rounds |",
        "| --- | ---: | ---: |",
    ]
    for way, found in seconds.items():
        ratio = statistics.median(one / base for one, base in zip(found, bare, strict=True))
        lines.append(f"| {way} | {statistics.median(found) * 1e3:.1f} ({min(found) * 1e3:.1f} to {max(found) * 1e3:.1f}) | {ratio:.2f} × |")
    return [*lines, ""]


def _replica_table(what: str, folder: Path, replicas: int) -> list[str]:
    def measure(kind: str) -> int:
        running = [_run("--replica", kind, str(folder)) for _ in range(replicas)]
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        total = sum(_pss(process.pid) for process in running)
        for process in running:
            process.communicate("\n")
        return total

    weights = (folder / "cache").joinpath("blobs")
    size = sum(path.stat().st_size for path in weights.iterdir())
    without, with_ = measure("without"), measure("with")
    return [
        f"### {replicas} replicas, {what}",
        "",
        "| sum of PSS | MB |",
        "| --- | ---: |",
        f"| the processes without weights | {without / 1e6:,.0f} |",
        f"| the processes with all weights touched | {with_ / 1e6:,.0f} |",
        f"| the weights | {size / 1e6:,.0f} |",
        f"| with ÷ (weights + without) | {with_ / (size + without):.3f} |",
        "",
    ]


def _pss(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def _way(way: str, folder: Path) -> None:
    """One timed run; prints the seconds."""
    load = _loaders(folder)[way]
    gc.disable()
    began = time.perf_counter()
    kept = load()
    print(time.perf_counter() - began)
    del kept


def _loaders(folder: Path) -> dict[str, Callable[[], object]]:
    import torch
    from safetensors.torch import load_file

    from weights_cache import restore  # noqa: F401  imported by all, so that none is timed importing
    from weights_cache.reader import Weights
    from weights_cache.settings import WeightsSettings

    settings = WeightsSettings(uri=URI, cache_dir=folder / "cache")
    (blob,) = (folder / "cache" / "blobs").iterdir()

    def touch(tensor: torch.Tensor) -> None:
        tensor.view(torch.uint8)[::4096].sum()

    def bare() -> object:
        with blob.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for at in range(0, len(mapping), TENSOR_BYTES):  # in as many touches as the others need
            touch(torch.frombuffer(mapping, dtype=torch.uint8, count=min(TENSOR_BYTES, len(mapping) - at), offset=at))
        return mapping

    def ours() -> object:
        weights = Weights(settings)
        found = dict(weights.to("cpu"))
        for tensor in found.values():
            touch(tensor)
        return found

    def library() -> object:
        found = load_file(blob)
        for tensor in found.values():
            touch(tensor)
        return found

    def copied() -> object:
        return {name: tensor.clone() for name, tensor in load_file(blob).items()}

    def pickle() -> object:
        found = torch.load(folder / "model.pt", mmap=True, weights_only=True)
        for tensor in found.values():
            touch(tensor)
        return found

    return dict(zip(WAYS, (bare, ours, library, copied, pickle), strict=True))


def _replica(with_weights: bool, folder: Path) -> None:
    """A process that holds the weights, touched, until it is told to go."""
    load = _loaders(folder)[WAYS[1]]
    kept = load() if with_weights else None
    print("ready", flush=True)
    sys.stdin.readline()
    del kept


if __name__ == "__main__":
    main()
