"""From a file in the node's cache to tensors in a GPU's memory: `Weights.to` beside the bus itself and the usual loaders, in turn.

Then the same out of the resident tier, where an earlier process has left it, to the end of the first kernel that reads it. Every run is
a fresh process that has imported what it needs, made its context and (ours) its staging buffers, as a function has while its weights are
fetched. It is timed from there until every tensor is on the device, synchronised. Without a GPU the same code runs with ordinary memory
as the device (`host`), on smaller sizes, beside a plain memcpy; its figures say nothing about a GPU. The peers' virtual environments are
made on the first run.

    .venv/bin/python bench/gpu_restore.py [--rounds 5] [--sizes 1G,8G,16G] [--directory /dev/shm] [--json FILE] [--markdown FILE]
        [--copiers N] [--slot-mib N] [--staging pinned|registered]    (of ours, to try others than the defaults)
"""

import argparse
import ctypes
import gc
import json
import math
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

from bench.common import Background, Failed, free_ports, machine, make_venv, reason, spread  # noqa: E402  found through the line above
from bench.node_cache import FILE, MIB, URI, cached_model  # noqa: E402
from weights_cache.resident import SOCKET  # noqa: E402

TENSOR_BYTES = 16 * MIB
WINDOW_BYTES = 256 * MIB
FETCH_BYTES_PER_S = 2e9
VENVS = Path(tempfile.gettempdir()) / "relight-bench"
OURS = "relight"
BARE = "bare"  # the bus, or a memcpy
DIRECT = "direct"  # what Weights.to might do, with a GPU: no staging, the copy engine reads the file's own pages
PEERS = {
    "safetensors load_file": (),
    "fastsafetensors": ("fastsafetensors==0.5.0",),
    "runai-model-streamer": ("runai-model-streamer==0.17.0", "humanize==4.17.0"),
}


def main() -> None:
    if sys.argv[1:2] == ["--way"]:
        _way(sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))
        return
    import torch

    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="1G,8G,16G" if has_gpu else "270M,1G")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where the cache lies [/dev/shm]")  # noqa: S108  memory
    parser.add_argument("--copiers", type=int, default=0)
    parser.add_argument("--slot-mib", type=int, default=0)
    parser.add_argument("--staging", choices=["pinned", "registered"], default="pinned")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    ours = {"copiers": options.copiers, "slot_mib": options.slot_mib, "registered": options.staging == "registered"}
    found: dict[str, Any] = {
        "machine": machine(),
        "gpu": torch.cuda.get_device_name(0) if has_gpu else None,
        "torch": torch.__version__,
        "rounds": options.rounds,
        "copying": {} if has_gpu else _run(_python(OURS), "copying", options.directory, {}),
        "sizes": {},
    }
    for size in options.sizes.split(","):
        found["sizes"][size] = _measure(size, options.directory, options.rounds, {"device": "cuda:0" if has_gpu else "host", **ours})
    text = "\n".join(_tables(found))
    print(text)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text + "\n")


# In the process that runs the others


def _python(way: str) -> str:
    return str(make_venv(VENVS / way, PEERS[way], sees_project=True, with_dependencies=False)) if PEERS.get(way) else sys.executable


def _command(python: str, way: str, folder: Path, options: dict[str, Any]) -> "subprocess.Popen[str]":
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [python, __file__, "--way", way, str(folder), json.dumps(options)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


def _run(python: str, way: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    process = _command(python, way, folder, options)
    out, err = process.communicate()
    if process.returncode:
        raise Failed(reason(err))
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def _measure(size: str, directory: Path, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    total = int(size[:-1]) * {"M": 10**6, "G": 10**9}[size[-1]]
    ways = (BARE, OURS, *([] if options["device"] == "host" else [DIRECT]), *PEERS)
    found: dict[str, Any] = {"seconds": {way: [] for way in ways}, "failed": {}}
    with cached_model(directory, total, dtype="BF16", tensor_bytes=TENSOR_BYTES) as model:
        model.fill(math.inf)
        folder, found["bytes"] = model.folder, model.bytes
        for turn in range(rounds + 1):
            for way in found["seconds"]:
                if way in found["failed"]:
                    continue
                try:
                    result = _run(_python(way), way, folder, options)
                except Failed as error:
                    found["failed"][way] = str(error)
                    continue
                if turn:  # the first round warms the page cache
                    found["seconds"][way].append(result["seconds"])
        found["prepare_s"] = _run(sys.executable, OURS, folder, options)["prepare_s"]
        found["memory"] = _run(sys.executable, OURS, folder, {**options, "watch_memory": True})["memory"]
        found["resident"] = _resident(folder, model.bytes, rounds, options)
    found["behind_a_fetch"] = [_behind_a_fetch(directory, total, options) for _ in range(min(3, rounds))]
    return found


def _resident(folder: Path, size: int, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """What leaving the weights on the device takes, and attaching them; the agent is a real one."""
    settings = {"CACHE_DIR": str(folder / "cache"), "RESIDENT_BYTES": str(2 * size), "HOST": "127.0.0.1", "PORT": str(free_ports(1)[0])}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHTS_")}
    environ |= {f"WEIGHTS_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "weights_cache", "serve", "--agent"]
    agent = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.DEVNULL)
    try:
        while not (folder / "cache" / SOCKET).exists():
            if agent.poll() is not None:
                raise SystemExit("the agent did not start")
            time.sleep(0.01)
        runs = [_run(sys.executable, OURS, folder, {**options, "resident": True}) for _ in range(rounds + 1)]
    finally:
        agent.kill()
        agent.wait()
    if [run["source"] for run in runs] != ["cache", *["resident"] * rounds]:
        raise SystemExit(f"restored from {', '.join(run['source'] for run in runs)}")
    return {"leave_s": runs[0]["seconds"], "attach_s": [run["seconds"] for run in runs[1:]]}


def _behind_a_fetch(directory: Path, total: int, options: dict[str, Any]) -> dict[str, float]:
    """How long a fetch takes, and how much later than it a restore ends that runs beside it."""
    with cached_model(directory, total, dtype="BF16", tensor_bytes=TENSOR_BYTES) as model:
        process = _command(sys.executable, OURS, model.folder, {**options, "says_ready": True})
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.stdin.write("go\n")
        process.stdin.flush()
        began = time.monotonic()
        model.fill(FETCH_BYTES_PER_S)
        ended = time.monotonic()
        out, err = process.communicate()
        if process.returncode:
            raise SystemExit(f"behind a fetch: {reason(err)}")
        return {"fetch_s": ended - began, "later_s": json.loads(out.splitlines()[-1])["ended_at"] - ended}


def _tables(found: dict[str, Any]) -> list[str]:
    is_gpu = found["gpu"] is not None
    lines = [
        f"{found['gpu'] or 'No GPU: the host path, with ordinary memory as the device'}. {found['machine']}, torch {found['torch']}, "
        f"{found['rounds']} rounds, medians (least to most).",
        "",
    ]
    bare = "pinned host-to-device copy" if is_gpu else "memcpy into fresh memory, one thread"
    for size, one in found["sizes"].items():
        lines += [f"### {size}", "", f"| way | ms | GB/s | beside the {'bus' if is_gpu else 'memcpy'} |", "| --- | ---: | ---: | ---: |"]
        base = statistics.median(one["seconds"][BARE])
        for way, seconds in one["seconds"].items():
            name = {BARE: bare, OURS: "relight `Weights.to`", DIRECT: "(direct copy from the registered file)"}.get(way, way)
            if way in one["failed"]:
                lines.append(f"| {name} | – | – | {one['failed'][way]} |")
                continue
            median = statistics.median(seconds)
            times = spread([1e3 * value for value in seconds], ".0f")
            lines.append(f"| {name} | {times} | {one['bytes'] / median / 1e9:.1f} | {base / median:.2f} × |")
        memory, behind = one["memory"], one["behind_a_fetch"]
        later = [run["later_s"] / run["fetch_s"] for run in behind]
        device = f"device memory {memory['device'] / one['bytes']:.3f} × the weights, " if memory["device"] is not None else ""
        what = "host memory beyond the mapped file" + ("" if is_gpu else " and the tensors")
        fetch_s = spread([run["fetch_s"] for run in behind], ".2f")
        later_ms = spread([1e3 * run["later_s"] for run in behind], ".0f")
        lines += [
            "",
            f"- Context and staging buffers, made before: {one['prepare_s'] * 1e3:.0f} ms.",
            f"- Most memory: {device}{what} {memory['host'] / 1e6:.0f} MB.",
            f"- From the resident tier: {spread([1e3 * value for value in one['resident']['attach_s']], '.1f')} ms to the end of the first "
            f"kernel that reads it; restoring and leaving it there took {one['resident']['leave_s'] * 1e3:.0f} ms.",
            f"- Behind a fetch of {fetch_s} s it ends {later_ms} ms later ({statistics.median(later):.1%}).",
            "",
        ]
    if found["copying"]:
        lines += ["### Ways to copy 16 MiB at a time", "", "| way | 1 thread, GB/s | 2 threads, GB/s | another thread waits at most |"]
        lines += ["| --- | ---: | ---: | ---: |"]
        lines += [f"| {way} | {one:.1f} | {two:.1f} | {gap * 1e3:.1f} ms |" for way, (one, two, gap) in found["copying"].items()]
        lines.append("")
    return lines


# In the processes that are measured


def _way(way: str, folder: Path, options: dict[str, Any]) -> None:
    """One run; prints JSON."""
    import torch

    if way == "copying":
        print(json.dumps(_copying()))
        return
    device = options["device"]
    is_gpu = device != "host"
    result: dict[str, Any] = {}
    if is_gpu:
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
    memory = _Memory() if options.get("watch_memory") else None
    load = _loader(way, folder, options, result)
    if is_resident := options.get("resident", False):
        _read(torch.ones(1 << 10, dtype=torch.bfloat16, device=device if is_gpu else "cpu"))  # the kernel itself is loaded once
    if options.get("says_ready"):
        print("ready", flush=True)
        sys.stdin.readline()
    gc.disable()
    free = torch.cuda.mem_get_info()[0] if is_gpu else 0
    began = time.perf_counter()
    if memory:
        with memory:
            kept = load()
    else:
        kept = load()
    if is_resident:
        _read(next(reversed(kept.values())))
    if is_gpu:
        torch.cuda.synchronize()
    result |= {"seconds": time.perf_counter() - began, "ended_at": time.monotonic()}
    if memory:
        ours = 0 if is_gpu else sum(tensor.nbytes for tensor in kept.values())
        result["memory"] = {"host": memory.most - memory.least - ours, "device": free - torch.cuda.mem_get_info()[0] if is_gpu else None}
    print(json.dumps(result))
    del kept


def _read(tensor: "Tensor") -> float:
    """A kernel, and its answer."""
    return float(tensor[: 1 << 10].max())


class _Memory(Background):
    """Watches what this process has for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.least = self.most = self._now()  # before there are staging buffers

    @staticmethod
    def _now() -> int:
        text = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:"))

    def work(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, self._now())
        self.most = max(self.most, self._now())


def _loader(way: str, folder: Path, options: dict[str, Any], result: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    device = options["device"]
    torch_device = "cpu" if device == "host" else device
    if way == OURS:
        return _ours(folder, options, result)
    (blob,) = (folder / "cache" / "blobs").iterdir()
    return {
        BARE: _memcpy if device == "host" else _bus,
        DIRECT: _direct,
        "safetensors load_file": _safetensors,
        "fastsafetensors": _fastsafetensors,
        "runai-model-streamer": _runai,
    }[way](blob, torch_device)


def _ours(folder: Path, options: dict[str, Any], result: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    from weights_cache.reader import Weights
    from weights_cache.restore.device import open_device
    from weights_cache.restore.pipeline import SLOT_BYTES, Ring
    from weights_cache.settings import WeightsSettings

    def opened(name: str) -> Ring:
        if options["registered"] and name != "host":
            from weights_cache.restore.cuda import CudaDevice

            device: Any = CudaDevice(name, 0, registered=True)
        else:
            device = open_device(name)
        return Ring(device, copiers=options["copiers"], slot_bytes=options["slot_mib"] * MIB or SLOT_BYTES)

    Ring.open = opened  # type: ignore[method-assign, assignment]
    weights = Weights(WeightsSettings(uri=URI, cache_dir=folder / "cache", resident=options.get("resident", False)))
    began = time.perf_counter()
    weights.prepare(options["device"])  # as a function does while its weights are fetched
    result["prepare_s"] = time.perf_counter() - began

    def load() -> dict[str, Any]:
        found = dict(weights.to(options["device"]))
        result["source"] = weights.restored().source
        return found

    return load


def _bus(blob: Path, device: str) -> Callable[[], dict[str, Any]]:
    """As many bytes as the file has, from one pinned buffer."""
    import torch

    source = torch.zeros(256 * MIB, dtype=torch.uint8, pin_memory=True)
    size = blob.stat().st_size
    target = torch.empty(size, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()

    def load() -> dict[str, Any]:
        for start in range(0, size, len(source)):
            piece = target[start : start + len(source)]
            piece.copy_(source[: len(piece)], non_blocking=True)
        return {"all": target}

    return load


def _direct(blob: Path, device: str) -> Callable[[], dict[str, Any]]:
    """The file's pages are registered with the driver, a window after the other, while those before are on their way."""
    import torch

    with blob.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have it writable
        source = torch.frombuffer(view, dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    read_only = 8  # cudaHostRegisterReadOnly: else private pages would be made, and a file opened to be read refused

    def load() -> dict[str, Any]:
        target = torch.empty(len(source), dtype=torch.uint8, device=device)
        for start in range(0, len(source), WINDOW_BYTES):
            piece = source[start : start + WINDOW_BYTES]
            if error := int(runtime.cudaHostRegister(piece.data_ptr(), len(piece), read_only)):
                raise SystemExit(f"cudaHostRegister says {error}")
            target[start : start + len(piece)].copy_(piece, non_blocking=True)
        torch.cuda.synchronize()
        for start in range(0, len(source), WINDOW_BYTES):
            runtime.cudaHostUnregister(source[start:].data_ptr())
        return {"all": target}

    return load


def _memcpy(blob: Path, device: str) -> Callable[[], dict[str, Any]]:
    import torch

    from weights_cache.mapping import MappedFile

    with blob.open("rb") as file:
        view = MappedFile(file.fileno(), blob.stat().st_size).view

    def load() -> dict[str, Any]:
        target = torch.empty(len(view), dtype=torch.uint8)
        ctypes.memmove(target.data_ptr(), torch.frombuffer(view, dtype=torch.uint8).data_ptr(), len(view))
        return {"all": target}

    return load


def _safetensors(blob: Path, device: str) -> Callable[[], dict[str, Any]]:
    from safetensors.torch import load_file

    if device == "cpu":  # where it maps the file
        return lambda: {name: tensor.clone() for name, tensor in load_file(blob).items()}
    return lambda: load_file(blob, device=device)


def _fastsafetensors(blob: Path, device: str) -> Callable[[], dict[str, Any]]:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup  # type: ignore[import-not-found]

    link = blob.parent.parent.parent / FILE  # it goes by the name
    link.unlink(missing_ok=True)
    link.symlink_to(blob)

    def load() -> dict[str, Any]:
        loader = SafeTensorsFileLoader(SingleGroup(), device=device, nogds=True)
        loader.add_filenames({0: [str(link)]})
        buffer = loader.copy_files_to_device()
        return {name: buffer.get_tensor(name) for name in loader.get_keys()} | {"owner": (loader, buffer)}

    return load


def _runai(blob: Path, device: str) -> Callable[[], dict[str, Any]]:
    from runai_model_streamer import SafetensorsStreamer  # type: ignore[import-not-found]

    link = blob.parent.parent.parent / FILE
    link.unlink(missing_ok=True)
    link.symlink_to(blob)

    def load() -> dict[str, Any]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(str(link))
            return {name: tensor.to(device, copy=True) for name, tensor in streamer.get_tensors()}

    return load


def _copying() -> dict[str, tuple[float, float, float]]:
    """Of ways to copy from a mapping to a buffer: GB/s with one thread and with two, and for how long they kept a third from running."""
    import numpy as np
    import torch

    size, rounds, pieces = 16 * MIB, 16, 8
    memory = mmap.mmap(-1, pieces * size)
    memory[:] = b"\1" * len(memory)
    source = torch.frombuffer(memory, dtype=torch.uint8)
    view, array = memoryview(memory), source.numpy()
    ways: dict[str, Callable[[Any, int], object]] = {
        "memoryview assignment": lambda target, at: target["view"].__setitem__(slice(None), view[at : at + size]),
        "torch `copy_`": lambda target, at: target["tensor"].copy_(source[at : at + size]),
        "numpy `copyto`": lambda target, at: np.copyto(target["array"], array[at : at + size]),
        "ctypes `memmove`": lambda target, at: ctypes.memmove(target["tensor"].data_ptr(), source.data_ptr() + at, size),
    }

    def measure(copy: Callable[[Any, int], object], threads: int) -> tuple[float, float]:
        def work(number: int) -> None:
            tensor = torch.ones(size, dtype=torch.uint8)
            target: dict[str, Any] = {"tensor": tensor, "array": tensor.numpy(), "view": memoryview(tensor.numpy().data)}
            begin.wait()
            for turn in range(rounds):
                copy(target, (turn + number) % pieces * size)

        begin = threading.Barrier(threads + 1)
        running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for thread in running:
            thread.start()
        begin.wait()
        began = last = time.perf_counter()
        longest = 0.0
        while any(thread.is_alive() for thread in running):
            time.sleep(0.0001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        return threads * rounds * size / (last - began) / 1e9, longest

    found = {}
    for way, copy in ways.items():
        runs = [(measure(copy, 1), measure(copy, 2)) for _ in range(5)]
        one, two = (statistics.median(run[at][0] for run in runs) for at in (0, 1))
        found[way] = (one, two, statistics.median(run[0][1] for run in runs))
    return found


if __name__ == "__main__":
    main()
