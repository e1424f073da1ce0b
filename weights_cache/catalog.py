"""Which tensors the files below a folder have, and where."""

import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from weights_cache.errors import WeightsError
from weights_cache.excerpt import listed, plain, quoted
from weights_cache.safetensors_header import MAX_HEADER_BYTES, TensorInfo, read_header
from weights_cache.snapshot import Snapshot, SnapshotFile

# Of a sharded checkpoint: which file has which tensor. The names that transformers and diffusers give it.
INDEX = "model.safetensors.index.json"
INDEXES = (INDEX, "diffusion_pytorch_model.safetensors.index.json")


class Catalog:
    """The tensors below a folder of a snapshot. What is asked for is waited for, and no more than that."""

    def __init__(self, snapshot: Snapshot, folder: str, chosen: Collection[str] | None = None) -> None:
        """folder: "", or a path that ends in "/". chosen: the files below it that tensors are taken from; None: see `Weights`."""
        self._snapshot = snapshot
        self._folder = folder
        self._chosen = chosen
        self._lock = threading.Lock()  # guards the fields below: they are filled once, by whoever needs them first
        self._files: dict[str, SnapshotFile] | None = None  # that tensors come from, by path from the folder
        self._index = ""  # its path, if there is one
        self._map: Mapping[str, str] | None = None  # file by tensor name, from the index
        self._named: dict[str, set[str]] = {}  # the same by file
        self._headers: dict[str, dict[str, TensorInfo]] = {}  # by file, in file order
        self._places: dict[str, tuple[SnapshotFile, TensorInfo]] = {}  # by name, of the headers that have been read

    def files(self) -> Sequence[SnapshotFile]:
        """The files that tensors come from, in path order. Raises WeightsError."""
        return list(self._known_files().values())

    def __iter__(self) -> Iterator[str]:
        """The names, in file order."""
        for file in self.files():
            yield from self.header(file)

    def header(self, file: SnapshotFile, pause: Callable[[], None] | None = None) -> Mapping[str, TensorInfo]:
        """The tensors of one file; waits for its header alone, by `pause` if there is one.

        Raises WeightsError if they are not what the index or the others say.
        """
        if file.path not in self._headers:

            def read(start: int, stop: int) -> bytes:
                self._snapshot.wait(file, start, stop, pause)
                return file.read(start, stop)

            found = {tensor.name: tensor for tensor in read_header(read, file.size, file.path)}
            with self._lock:
                if self._map is not None:
                    named = self._named[file.path]
                    if lacking := sorted(named - set(found)):
                        raise WeightsError(
                            f"{self._index} says that tensor {quoted(lacking[0])} is in {plain(file.path)}, which does not have it"
                        )
                    found = {name: tensor for name, tensor in found.items() if name in named}
                for name in found:
                    if (place := self._places.get(name)) and place[0] is not file:
                        raise _is_in_both(name, place[0].path, file.path)
                self._places |= {name: (file, tensor) for name, tensor in found.items()}
                self._headers[file.path] = found
        return self._headers[file.path]

    def find(self, name: object) -> tuple[SnapshotFile, TensorInfo]:
        """A tensor's place; waits for the headers that are needed to tell. Raises KeyError if there is no such tensor."""
        files = self._known_files()
        if name not in self._places:
            if self._map is not None:
                files = {"": files[self._map[name]]}  # type: ignore[index]
            for file in files.values():
                if name in self.header(file):
                    break
        return self._places[name]  # type: ignore[index]

    def _known_files(self) -> Mapping[str, SnapshotFile]:
        if self._files is None and self._snapshot.uri:
            there = self._snapshot.below(self._folder, "the weights")
            names = [path for path in there if path.endswith(".safetensors")]
            if self._chosen is not None:
                if lacking := sorted(set(self._chosen) - there.keys()):
                    raise WeightsError(f"{self._snapshot.uri} has no file {quoted(self._folder + lacking[0])}; it has {listed(there)}")
                names = [path for path in names if path in self._chosen]
            elif index := next((there[name] for name in INDEXES if name in there), None):
                self._index = plain(index.path)
                if index.size > MAX_HEADER_BYTES:
                    raise WeightsError(f"{self._index} has {index.size:,} bytes, {MAX_HEADER_BYTES:,} are allowed")
                self._snapshot.wait(index, 0, index.size)
                found = _read_index(index.read(0, index.size), self._index)
                names = sorted(set(found.values()))
                if lacking := [name for name in names if name not in there]:
                    raise WeightsError(f"{self._index} names file {quoted(lacking[0])}, which is not there")
                named: dict[str, set[str]] = {there[name].path: set() for name in names}
                for tensor, path in found.items():
                    named[there[path].path].add(tensor)
                self._named, self._map = named, found
            self._files = {name: there[name] for name in names}
        return self._files or {}


def _read_index(data: bytes, path: str) -> dict[str, str]:
    """File by tensor name. Raises WeightsError if the bytes are not such an index."""
    try:
        found = json.loads(data)["weight_map"]
        if all(isinstance(name, str) and isinstance(file, str) for name, file in found.items()):
            return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise WeightsError(f"{path} has no weight_map from tensor names to files")


def _is_in_both(name: str, one: str, other: str) -> WeightsError:
    folders = sorted({path.rpartition("/")[0] for path in (one, other)} - {""})
    how = f"; weights.folder({quoted(folders[0])}) has those of one folder" if one.rpartition("/")[0] != other.rpartition("/")[0] else ""
    return WeightsError(f"tensor {quoted(name)} is in both {plain(one)} and {plain(other)}{how}")
