"""A node cache with one model in it, made as a pull makes it: what the benchmarks that read weights begin with."""

import json
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weights_cache import room
from weights_cache.blob import BlobWriter
from weights_cache.cache import FileRef, NodeCache, Ref
from weights_cache.digest import chunk_digest

URI = "s3://bench/model"
FILE = "model.safetensors"
MIB = 1 << 20
_BITS = {"F32": 32, "BF16": 16}


@dataclass(frozen=True)
class Model:
    """One safetensors file in a cache. `fill` brings it, at so many bytes per second; whoever maps it before waits for its bytes."""

    folder: Path  # the cache is in `folder`/cache
    names: list[str]
    bytes: int
    fill: Callable[[float], None]


@contextmanager
def cached_model(directory: Path, size: int, *, dtype: str, tensor_bytes: int) -> Iterator[Model]:
    """A snapshot of about `size` bytes in a new cache below `directory`; all of its tensors are alike. It is still to be filled."""
    count = max(1, size // tensor_bytes)
    header = {
        f"t{n:05}": {
            "dtype": dtype,
            "shape": [tensor_bytes * 8 // _BITS[dtype]],
            "data_offsets": [n * tensor_bytes, (n + 1) * tensor_bytes],
        }
        for n in range(count)
    }
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    head = struct.pack("<Q", len(text)) + text
    total = len(head) + count * tensor_bytes
    data = os.urandom(MIB)
    with tempfile.TemporaryDirectory(dir=directory, prefix="bench-cache-") as folder:
        cache = NodeCache(Path(folder) / "cache")
        cache.create()
        refs = [FileRef(FILE, total, '"1"')]
        lease, _ = room.reserve(cache, "bench/model", refs, limit=None, uri=URI)
        cache.set_ref(Ref(URI, lease.snapshot, time.time()))
        writer = BlobWriter.try_acquire(cache.file_blob("bench/model", refs[0]), total)
        assert writer is not None

        def fill(bytes_per_s: float) -> None:
            began = time.monotonic()
            for at in range(0, total, MIB):
                if (early := at / bytes_per_s - (time.monotonic() - began)) > 0:
                    time.sleep(early)
                piece = (head[at : at + MIB] + data)[: min(MIB, total - at)]
                memory = writer.memory(at, at + len(piece))  # as a pull fills it: on a tmpfs with large pages
                if memory is None:
                    writer.write(piece, at)
                else:
                    memory[:] = piece
                writer.chunks.set(at // MIB, chunk_digest(piece))
            writer.publish()

        try:
            yield Model(Path(folder), list(header), total, fill)
        finally:
            lease.close()
