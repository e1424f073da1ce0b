"""`Weights`: what a model function sees of its weights, from the first byte on the node to the last tensor.

It finds its snapshot through `refs/`, maps the files while a sidecar may still be filling them, and hands out each tensor as soon
as its bytes are there. It imports neither boto3 nor, until the first tensor is asked for, torch.
"""

import mmap
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weights_cache.blob import Blob, ChunkMap
from weights_cache.cache import NodeCache
from weights_cache.errors import WeightsError
from weights_cache.safetensors_header import TensorInfo, read_header
from weights_cache.settings import WeightsSettings
from weights_cache.uri import WeightsUri

if TYPE_CHECKING:
    from torch import Tensor

POLL_S = 0.005


@dataclass(frozen=True)
class Restored:
    """How far the weights are: bytes of the snapshot that are on the node, and where they came from."""

    bytes: int
    total_bytes: int
    source: str  # "cache" if the snapshot was complete when we came, else "store"
    seconds: float | None  # until the last byte was there; None while it is not


class _File:
    """One file of the snapshot, mapped copy-on-write while it may still be filled."""

    def __init__(self, path: str, blob: Blob) -> None:
        self.path = path
        self._blob = blob
        fd = self._open()
        try:
            self._stat = os.fstat(fd)
            self.size = self._stat.st_size
            # An empty file cannot be mapped.
            self.mapping: mmap.mmap | None = mmap.mmap(fd, self.size, access=mmap.ACCESS_COPY) if self.size else None
        finally:
            os.close(fd)
        self._chunks: ChunkMap | None = None
        self._complete = False

    def _open(self) -> int:
        for path in (self._blob.path, self._blob.part, self._blob.path):  # again: it may be published between the first two
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
        raise self._vanished()

    def _vanished(self) -> WeightsError:
        return WeightsError(f"{self.path} has vanished from the cache ({self._blob.path}); the sidecar must fetch it anew")

    def has(self, start: int, stop: int) -> bool:
        """Whether those bytes are there. Raises WeightsError if the part was thrown away, and another one published in its place."""
        if not self._complete:
            self._chunks = self._chunks or ChunkMap.open(self._blob, self._stat)
            self._complete = bool(self._chunks and self._chunks.has_range(0, self.size)) or self._is_published()
        return self._complete or (self._chunks is not None and self._chunks.has_range(start, stop))

    def _is_published(self) -> bool:
        try:
            published = self._blob.path.stat()
        except FileNotFoundError:
            return False
        if not os.path.samestat(published, self._stat):
            raise self._vanished()
        return True

    def bytes_there(self) -> int:
        """How many of its bytes are there."""
        if self.has(0, self.size):
            return self.size
        return self._chunks.bytes_there() if self._chunks else 0

    def read(self, start: int, stop: int) -> bytes:
        return self.mapping[start:stop] if self.mapping else b""


class Weights(Mapping[str, "Tensor"]):
    """The tensors of a model by name, in file order, each available as soon as its bytes are.

    Looking a tensor up waits for it; so does asking for the names, which are in the files' headers. CPU tensors are views of a
    copy-on-write mapping (see `restore.view`). Without a WEIGHTS_URI it is empty. Safe to use from several threads.
    """

    def __init__(self, settings: WeightsSettings) -> None:
        """Opens nothing and waits for nothing. Raises SettingsError for a malformed URI."""
        self._uri = settings.uri
        if self._uri:
            WeightsUri.parse(self._uri)
        self._cache = NodeCache(settings.cache_dir)
        self._began = time.monotonic()
        self._lock = threading.RLock()  # guards the fields below: they are filled once, by whoever needs them first
        self._snapshot: str | None = None
        self._files: dict[str, _File] = {}
        self._source = "cache"
        self._seconds: float | None = None
        self._index: dict[str, tuple[_File, TensorInfo]] | None = None

    def restored(self) -> Restored:
        """How far the weights are; never waits."""
        with self._lock:
            there = sum(file.bytes_there() for file in self._files.values()) if self._attach() else 0
            total = sum(file.size for file in self._files.values())
            if self._seconds is None and self._snapshot and there == total:
                self._seconds = time.monotonic() - self._began
            return Restored(there, total, self._source, self._seconds)

    def is_empty(self) -> bool:
        """Whether there are no weights to wait for."""
        return not self._uri

    def path(self, name: str) -> Path:
        """Where a file of the snapshot is, such as `tokenizer.json`, once it is complete.

        Raises WeightsError if the snapshot has no such file.
        """
        self._wait_attached(f"file {name!r}")
        if name not in self._files:
            raise WeightsError(f"{self._uri} has no file {name!r}; it has {', '.join(self._files) or 'none'}")
        assert self._snapshot is not None
        link = self._cache.snapshot_path(self._snapshot) / name
        while not link.exists():
            self._pause(f"file {name!r}")
        return link

    def to(self, device: str) -> Iterator[tuple[str, "Tensor"]]:
        """Every tensor on `device` (cpu, cuda:0), in file order, as its bytes land."""
        for name in self:
            tensor = self[name]
            yield name, tensor if device == "cpu" else tensor.to(device)

    def __getitem__(self, name: str) -> "Tensor":
        from weights_cache import restore

        file, tensor = self._tensors()[name]
        self._wait(file, tensor.start, tensor.stop)
        assert file.mapping is not None
        return restore.view(file.mapping, tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors())

    def __len__(self) -> int:
        return len(self._tensors())

    def _tensors(self) -> Mapping[str, tuple[_File, TensorInfo]]:
        """Every tensor's place, from the headers of all safetensors files in path order; waits for those headers alone."""
        if self._index is None and self._uri:
            self._wait_attached("the weights")
            index: dict[str, tuple[_File, TensorInfo]] = {}
            for file in self._files.values():
                if not file.path.endswith(".safetensors"):
                    continue
                for tensor in self._header(file):
                    if tensor.name in index:
                        raise WeightsError(f"tensor {tensor.name!r} is in both {index[tensor.name][0].path} and {file.path}")
                    index[tensor.name] = file, tensor
            self._index = index
        return self._index or {}

    def _header(self, file: _File) -> list[TensorInfo]:
        def read(start: int, stop: int) -> bytes:
            self._wait(file, start, stop)
            return file.read(start, stop)

        return read_header(read, file.size, file.path)

    def _wait(self, file: _File, start: int, stop: int) -> None:
        while not file.has(start, stop):
            self._pause(file.path)

    def _wait_attached(self, what: str) -> None:
        if not self._uri:
            raise WeightsError(f"{what} cannot be had: WEIGHTS_URI is not set")
        while not self._attach():
            time.sleep(POLL_S)

    def _pause(self, what: str) -> None:
        """Between two looks at bytes that are not there. Raises WeightsError if the sidecar has moved on to other objects."""
        time.sleep(POLL_S)
        ref = self._cache.ref(self._uri or "")
        if ref and ref.snapshot != self._snapshot:
            raise WeightsError(f"{self._uri} changed while {what} was being read: it is now snapshot {ref.snapshot}, was {self._snapshot}")

    def _attach(self) -> bool:
        """Map the files of the snapshot that our URI stands for; False while no sidecar has pinned one."""
        with self._lock:
            if self._snapshot or not self._uri:
                return bool(self._snapshot)
            self._cache.check_format()
            ref = self._cache.ref(self._uri)
            blobs = self._cache.snapshot_blobs(ref.snapshot) if ref else {}
            if not ref or not all(blob.is_complete() for blob in blobs.values()) or not blobs:
                self._source = "store"
                # Half a snapshot that nobody fills is what an earlier pod left behind; our sidecar may be about to choose another.
                if not ref or not any(blob.is_being_filled() for blob in blobs.values()):
                    return False
            self._files = {path: _File(path, blob) for path, blob in blobs.items()}
            self._snapshot = ref.snapshot
            return True
