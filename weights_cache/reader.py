"""`Weights`: what a model function sees of its weights, from the first byte on the node to the last tensor.

It finds its snapshot through `refs/`, takes a lease on it, maps the files while a sidecar may still be filling them, and hands out
each tensor as soon as its bytes are there. It imports neither boto3 nor, until the first tensor is asked for, torch.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from weights_cache import gpu_context
from weights_cache.blob import Blob, are_complete
from weights_cache.cache import Lease, NodeCache
from weights_cache.chunks import ChunkMap
from weights_cache.errors import WeightsError
from weights_cache.mapping import MappedFile
from weights_cache.safetensors_header import TensorInfo, read_header
from weights_cache.settings import WeightsSettings
from weights_cache.uri import WeightsUri

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from weights_cache.restore.pipeline import Ring
    from weights_cache.restore.placement import Placement
    from weights_cache.restore.tier import Tier

    ModuleT = TypeVar("ModuleT", bound=nn.Module)

POLL_S = 0.005
INDEX = "model.safetensors.index.json"  # of a sharded checkpoint: which file has which tensor


@dataclass(frozen=True)
class Restored:
    """How far the weights are: bytes of the snapshot that are on the node, and where they came from."""

    bytes: int
    total_bytes: int
    source: str  # "cache" if the snapshot was complete when we came, else "store"; "resident" if all of it was on the device
    seconds: float | None  # until the last byte was there; None while it is not


class _File:
    """One file of the snapshot, mapped copy-on-write while it may still be filled."""

    def __init__(self, path: str, blob: Blob) -> None:
        self.path = path
        self.version = blob.path.name  # named by what is in it
        self._blob = blob
        fd = self._open()
        try:
            self._stat = os.fstat(fd)
            self._complete = blob.vouches_for(self._stat)
            self.size = self._stat.st_size
            # An empty file cannot be mapped.
            self.view = MappedFile(fd, self.size).view if self.size else None
        finally:
            os.close(fd)
        self._chunks: ChunkMap | None = None

    def _open(self) -> int:
        for path in (self._blob.path, self._blob.part, self._blob.path):  # again: it may be published between the first two
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
        raise FileNotFoundError(self._blob.path)

    def _vanished(self) -> WeightsError:
        return WeightsError(f"{self.path} has vanished from the cache ({self._blob.path}); the sidecar must fetch it anew")

    def has(self, start: int, stop: int) -> bool:
        """Whether those bytes are there.

        Raises WeightsError if they turned out to be damaged, or if the part was thrown away and another one published in its place.
        """
        if not self._complete:
            self._chunks = self._chunks or self._blob.chunks(self._stat)
            if self._chunks and self._chunks.is_wrong():
                raise WeightsError(
                    f"{self.path} is damaged in the store, which was found out after some of it had been read; upload it again"
                )
            self._complete = self._is_published()  # not before: until then all of it may still be rejected
        return self._complete or (self._chunks is not None and self._chunks.has_range(start, stop))

    def _is_published(self) -> bool:
        try:
            published = self._blob.path.stat()
        except FileNotFoundError:
            return False
        if not os.path.samestat(published, self._stat):
            raise self._vanished()
        return self._blob.is_complete()

    def bytes_there(self) -> int:
        """How many of its bytes are there."""
        if self.has(0, self.size):
            return self.size
        return self._chunks.bytes_there() if self._chunks else 0

    def read(self, start: int, stop: int) -> bytes:
        return bytes(self.view[start:stop]) if self.view else b""


class Weights(Mapping[str, "Tensor"]):
    """The tensors of a model by name, in file order, each available as soon as its bytes are.

    Looking a tensor up waits for it; asking for the names waits for the headers of the files they are in, one after the other. Where
    there is a `model.safetensors.index.json` the tensors are those it names, otherwise those of all safetensors files. CPU tensors are
    views of a copy-on-write mapping (see `restore.view`), those of a GPU are copied there (`to`). Without a WEIGHTS_URI it is empty. Safe
    to use from several threads.
    """

    def __init__(self, settings: WeightsSettings) -> None:
        """Opens nothing and waits for nothing. Raises SettingsError for a malformed URI."""
        self._uri = settings.uri
        if self._uri:
            WeightsUri.parse(self._uri)
        self._settings = settings
        self._cache = NodeCache(settings.cache_dir)
        self._began = time.monotonic()
        self._lock = threading.RLock()  # guards the fields below: they are filled once, by whoever needs them first
        self._lease: Lease | None = None
        self._files: dict[str, _File] = {}
        self._source = "cache"
        self._seconds: float | None = None
        self._map: Mapping[str, str] | None = None  # file by tensor name, from the index
        self._shards: list[_File] | None = None
        self._headers: dict[str, dict[str, TensorInfo]] = {}  # by file, in file order
        self._preparing = threading.Lock()  # guards the rings, and has whoever needs one wait while it is made
        self._rings: dict[str, Ring] = {}  # by device: prepared, and not in use
        self._tiers: list[Tier] = []  # each a lease on what was attached through it, or left

    def restored(self) -> Restored:
        """How far the weights are; never waits."""
        with self._lock:
            there = sum(file.bytes_there() for file in self._files.values()) if self._attach() else 0
            total = sum(file.size for file in self._files.values())
            if self._seconds is None and self._lease and there == total:
                self._seconds = time.monotonic() - self._began
            return Restored(there, total, self._source, self._seconds)

    def is_empty(self) -> bool:
        """Whether there are no weights to wait for."""
        return not self._uri

    def path(self, name: str) -> Path:
        """Where a file of the snapshot is, such as `tokenizer.json`, once it is complete.

        Raises WeightsError if the snapshot has no such file.
        """
        file = self._file(name, self._uri or "")
        self._wait(file, 0, file.size)
        assert self._lease is not None
        link = self._cache.snapshot_path(self._lease.snapshot) / name
        while not link.exists():
            file.has(0, file.size)  # raises if it is damaged after all
            self._pause(f"file {name!r}")
        return link

    def prepare(self, device: str) -> None:
        """Do what takes long about a device before there are bytes to restore: its context, torch's import, its staging buffers.

        Its next `to` then has them. Raises WeightsError if there is no such device; nothing is to be done for `cpu`.
        """
        if device != "cpu":
            gpu_context.begin(device)
            with self._preparing:
                if device not in self._rings:
                    ring = self._rings[device] = _open_ring(device)
                    if self._settings.resident:
                        ring.device.identity()  # the first time it imports the driver's bindings

    def to(self, device: "str | torch.device | Mapping[str, str]", *, dtype: "torch.dtype | None" = None) -> "Iterator[tuple[str, Tensor]]":
        """Every tensor on `device` in file order, as its bytes land.

        device: `cpu`; `cuda:0`; or a device map, from the beginnings of names to devices: {"": "cuda:0", "model.layers.12": "cuda:1"}; the
        longest that fits counts, and all devices are filled at the same time. `host` is the way of a GPU in ordinary memory.
        dtype: what floating-point tensors of 16 bits and more are cast to on the way.

        On `cpu` a tensor is a view of its file. Elsewhere it is part of one allocation for all of its file's tensors there. The calling
        thread may use it at once on its current stream; once the iterator has ended, all of them are there for everybody. An iterator
        that is given up, or raises, gives back what it has allocated. Raises WeightsError: also, before anything is copied, if a
        device has too little memory, when weights that no function uses have been evicted from it.

        With WEIGHTS_RESIDENT tensors on a device are to be read only: the next function has the same memory.
        """
        if dtype is None and str(device) == "cpu":
            return self._views()
        from weights_cache.restore.placement import Placement

        return self._restore(Placement(device), dtype)

    def make_room(self, device: str, size: int) -> int:
        """Have weights that no function uses evicted from a device, `size` bytes of them or all there are; returns how many it were.

        For what a model needs there beside its weights, such as a KV cache; `to` does it by itself. Raises WeightsError if there is no
        such device.
        """
        from weights_cache.restore.device import open_device

        tier = self._tier()
        return tier.make_room(open_device(device), size) if tier else 0

    def module(
        self, build: "Callable[[], ModuleT]", device: "str | torch.device | Mapping[str, str]", *, dtype: "torch.dtype | None" = None
    ) -> "ModuleT":
        """The torch module that `build` makes, around these weights: its parameters are the tensors that `to` gives, and need no gradient.

        It is built on torch's `meta` device, so that nothing is allocated or initialised that would only be overwritten. Parameters that it
        ties together need to be in the files once. Buffers that are not in the files must be made with a device of their own, and are
        moved. Raises WeightsError that names what is missing, unexpected or of another shape.
        """
        from weights_cache.restore.device import torch_device
        from weights_cache.restore.module import assemble
        from weights_cache.restore.placement import Placement

        place = Placement(device)
        return assemble(build, self.to(device, dtype=dtype), lambda name: torch_device(place(name)))

    def _views(self) -> "Iterator[tuple[str, Tensor]]":
        for file in self._model_files():
            for name, info in self._header(file).items():
                yield name, self._tensor(file, info)

    def _restore(self, placement: "Placement", dtype: "torch.dtype | None") -> "Iterator[tuple[str, Tensor]]":
        from weights_cache.restore.pipeline import Restore

        rings: dict[str, Ring] = {}
        try:
            for name in placement.devices:
                if name != "cpu":
                    with self._preparing:
                        rings[name] = self._rings.pop(name) if name in self._rings else _open_ring(name)
            tier = self._tier() if rings else None
            restore = Restore([self._source_of(file) for file in self._model_files()], placement, rings, dtype, tier)
            yield from restore.tensors()
            if restore.attached_bytes and not restore.copied_bytes:
                self._source = "resident"
        finally:
            for ring in rings.values():
                ring.close()

    def _tier(self) -> "Tier | None":
        """The node's resident tier, connected anew: its agent may have been restarted."""
        from weights_cache.restore.tier import Tier

        if tier := Tier.open(self._settings.cache_dir, self._uri or "", keeps=self._settings.resident):
            self._tiers.append(tier)
        return tier

    def _source_of(self, file: _File) -> "_Source":
        view = memoryview(b"") if file.view is None else file.view
        header = lambda pause: list(self._header(file, pause).values())  # noqa: E731
        return _Source(file.path, file.version, file.size, view, file.has, header, lambda: self._pause(file.path))

    def __getitem__(self, name: str) -> "Tensor":
        return self._tensor(*self._find(name))

    def __contains__(self, name: object) -> bool:
        try:
            self._find(name)
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        for file in self._model_files():
            yield from self._header(file)

    def __len__(self) -> int:
        return sum(len(self._header(file)) for file in self._model_files())

    def _tensor(self, file: _File, info: TensorInfo) -> "Tensor":
        from weights_cache.restore import view

        self._wait(file, info.start, info.stop)
        assert file.view is not None  # it has a header at least
        return view(file.view, info)

    def _find(self, name: object) -> tuple[_File, TensorInfo]:
        """A tensor's place; waits for the headers that are needed to tell. Raises KeyError if there is no such tensor."""
        files = self._model_files()
        if self._map is not None:
            files = [file for file in files if file.path == self._map.get(name)]  # type: ignore[call-overload]
        for file in files:
            if tensor := self._header(file).get(name):  # type: ignore[call-overload]
                return file, tensor
        raise KeyError(name)

    def _model_files(self) -> Sequence[_File]:
        """The files that tensors come from, in path order."""
        if self._shards is None and self._uri:
            self._wait_attached("the weights")
            names = [path for path in self._files if path.endswith(".safetensors")]
            if index := self._files.get(INDEX):
                self._wait(index, 0, index.size)
                self._map = _read_index(index.read(0, index.size))
                names = sorted(set(self._map.values()))
                if lacking := [name for name in names if name not in self._files]:
                    raise WeightsError(f"{INDEX} names file {lacking[0]!r}, which is not there")
            self._shards = [self._file(name, INDEX) for name in names]
        return self._shards or []

    def _header(self, file: _File, pause: Callable[[], None] | None = None) -> Mapping[str, TensorInfo]:
        """The tensors of one file; waits for its header alone, by `pause` if there is one.

        Raises WeightsError if they are not what the index or the others say.
        """
        if file.path not in self._headers:

            def read(start: int, stop: int) -> bytes:
                self._wait(file, start, stop, pause)
                return file.read(start, stop)

            found = {tensor.name: tensor for tensor in read_header(read, file.size, file.path)}
            with self._lock:
                if self._map is not None:
                    named = {name for name, path in self._map.items() if path == file.path}
                    if lacking := sorted(named - set(found)):
                        raise WeightsError(f"{INDEX} says that tensor {lacking[0]!r} is in {file.path}, which does not have it")
                    found = {name: tensor for name, tensor in found.items() if name in named}
                for path, header in self._headers.items():
                    if path != file.path and (twice := sorted(set(header) & set(found))):
                        raise WeightsError(f"tensor {twice[0]!r} is in both {path} and {file.path}")
                self._headers[file.path] = found
        return self._headers[file.path]

    def _file(self, name: str, wanted_by: str) -> _File:
        self._wait_attached(f"file {name!r}")
        if name not in self._files:
            raise WeightsError(f"{wanted_by} has no file {name!r}; it has {', '.join(self._files) or 'none'}")
        return self._files[name]

    def _wait(self, file: _File, start: int, stop: int, pause: Callable[[], None] | None = None) -> None:
        while not file.has(start, stop):
            if pause:
                pause()
            else:
                self._pause(file.path)

    def _wait_attached(self, what: str) -> None:
        if not self._uri:
            raise WeightsError(f"{what} cannot be had: WEIGHTS_URI is not set")
        while not self._attach():
            time.sleep(POLL_S)

    def _pause(self, what: str) -> None:
        """Between two looks at bytes that are not there. Raises WeightsError if the sidecar has moved on to other objects."""
        time.sleep(POLL_S)
        assert self._lease is not None
        ref = self._cache.ref(self._uri or "")
        if ref and self._lease.snapshot not in (ref.snapshot, ref.next):
            now = ref.next or ref.snapshot
            raise WeightsError(f"{self._uri} changed while {what} was being read: it is now snapshot {now}, was {self._lease.snapshot}")

    def _attach(self) -> bool:
        """Take a lease on the snapshot to read, and map its files; False while there is none to be read."""
        with self._lock:
            if self._lease or not self._uri:
                return bool(self._lease)
            self._cache.check_format()
            candidates = self._candidates()
            for snapshot in candidates:
                blobs = self._cache.snapshot_blobs(snapshot)
                if are_complete(blobs) and self._open(snapshot, blobs):
                    return True
            self._source = "store"
            # Half a snapshot that nobody fills is what an earlier pod left behind; our sidecar may be about to choose another.
            for snapshot in candidates:
                blobs = self._cache.snapshot_blobs(snapshot)
                if any(blob.is_being_filled() for blob in blobs.values()) and self._open(snapshot, blobs):
                    return True
            return False

    def _candidates(self) -> list[str]:
        """The snapshots that our URI stands for, the better one first."""
        if self._settings.revalidate == "before":
            asked = _ask_sidecar(self._settings.port, self._uri or "")
            return [asked] if asked else []
        ref = self._cache.ref(self._uri or "")
        return [snapshot for snapshot in (ref.snapshot, ref.next) if snapshot] if ref else []

    def _open(self, snapshot: str, blobs: Mapping[str, Blob]) -> bool:
        lease = self._cache.lease(snapshot)
        if not lease:
            return False  # evicted since we looked
        try:
            self._files = {path: _File(path, blob) for path, blob in blobs.items()}
        except FileNotFoundError:
            return False  # a part was thrown away; another one will come
        self._lease = lease
        return True


@dataclass
class _Source:
    """A file as a restore sees it."""

    path: str
    version: str
    size: int
    view: memoryview
    has: Callable[[int, int], bool]
    header: Callable[[Callable[[], None]], Sequence[TensorInfo]]
    pause: Callable[[], None]


def _open_ring(device: str) -> "Ring":
    from weights_cache.restore.pipeline import Ring

    return Ring.open(device)


def _read_index(data: bytes) -> dict[str, str]:
    """File by tensor name. Raises WeightsError if the bytes are not such an index."""
    try:
        found = json.loads(data)["weight_map"]
        if all(isinstance(name, str) and isinstance(file, str) for name, file in found.items()):
            return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise WeightsError(f"{INDEX} has no weight_map from tensor names to files")


def _ask_sidecar(port: int, uri: str) -> str | None:
    """The snapshot that our pod's sidecar has settled on, now that it has asked the store; None while it has not."""
    import http.client  # for this alone

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError, TypeError), contextlib.closing(connection):
        connection.request("GET", "/v1/snapshots")
        for row in json.loads(connection.getresponse().read())["snapshots"]:
            if row["uri"] == uri and row["checked"]:
                return str(row["snapshot"])
    return None
