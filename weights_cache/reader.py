"""`Weights`: what a model function sees of its weights, from the first byte on the node to the last tensor.

Its files are a `Snapshot`, found and mapped while a sidecar may still be filling them; which tensors they have is a `Catalog`. Each is
handed out as soon as its bytes are there. Neither boto3 is imported nor, until the first tensor is asked for, torch.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from weights_cache.catalog import INDEX, Catalog
from weights_cache.devices import Devices
from weights_cache.errors import WeightsError
from weights_cache.excerpt import listed, quoted
from weights_cache.safetensors_header import TensorInfo
from weights_cache.settings import WeightsSettings
from weights_cache.snapshot import Restored, Snapshot, SnapshotFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    ModuleT = TypeVar("ModuleT", bound=nn.Module)

__all__ = ["INDEX", "Restored", "Weights"]


class Weights(Mapping[str, "Tensor"]):
    """The tensors of a model by name, in file order, each available as soon as its bytes are.

    Looking a tensor up waits for it; asking for the names waits for the headers of the files they are in, one after the other. Where
    there is a `model.safetensors.index.json` the tensors are those it names, otherwise those of all safetensors files. CPU tensors are
    views of a copy-on-write mapping (see `restore.view`), those of a GPU are copied there (`to`). Without a WEIGHTS_URI it is empty. Safe
    to use from several threads.
    """

    def __init__(self, settings: WeightsSettings) -> None:
        """Opens nothing and waits for nothing. Raises SettingsError for a malformed URI."""
        self._snapshot = Snapshot(settings)
        self._folder = ""  # or a path that ends in "/"; the rest is the same for all folders but for the catalog
        self._catalog = Catalog(self._snapshot, "")
        self._devices = Devices(settings, self._snapshot)

    def watch(self) -> None:
        """Have `restored` kept up to date from now on, by a thread that ends when all is there.

        What the cache has already is seen before this returns, unless the sidecar is to be asked first (WEIGHTS_REVALIDATE=before), which
        may take long. Raises nothing: what is wrong with the weights is told to who asks for them.
        """
        self._snapshot.watch()

    def close(self) -> None:
        """End what `watch` began; what was handed out stays."""
        self._snapshot.close()

    def restored(self) -> Restored:
        """How far the weights are, as last seen: at once, and without looking.

        They are looked at while somebody waits for them, and by `watch`. All of them, also of a `folder`.
        """
        return self._snapshot.restored

    def is_empty(self) -> bool:
        """Whether there are no weights to wait for."""
        return not self._snapshot.uri

    def folder(self, name: str) -> "Weights":
        """The weights below a folder, such as `unet` of a pipeline: names of files and tensors are those that they have there.

        Waits for nothing; a folder that is not there is an error when something of it is asked for. Raises WeightsError for what can be
        no folder.
        """
        parts = name.rstrip("/").split("/")
        if {"", ".", ".."} & set(parts):
            raise WeightsError(f"{quoted(name)} is no folder below the weights; its name must be such as 'unet' or 'models/unet'")
        below = f"{self._folder}{'/'.join(parts)}/"
        found = copy.copy(self)
        found._folder, found._catalog = below, Catalog(self._snapshot, below)  # noqa: SLF001  one of us
        return found

    def only(self, *files: str) -> "Weights":
        """The same with the tensors of these files alone, where others hold them again (in another precision) or hold another model's."""
        found = copy.copy(self)
        found._catalog = Catalog(self._snapshot, self._folder, files)  # noqa: SLF001  one of us
        return found

    def files(self) -> list[str]:
        """The names of all files, in order, as soon as they are known; waits for none of their bytes."""
        return [] if self.is_empty() else list(self._snapshot.below(self._folder, "the names of the files"))

    def path(self, name: str) -> Path:
        """Where a file is, such as `tokenizer.json`, once it is complete; for all of them see `directory`.

        Raises WeightsError if there is no such file.
        """
        files = self._snapshot.below(self._folder, f"file {quoted(name)}")
        if name not in files:
            where = f"{self._snapshot.uri} has no file {quoted(self._folder + name)}; it has {listed(files)}"
            raise WeightsError(f"{where}; weights.directory() is the folder with all of them" if name in ("", ".") else where)
        return self._snapshot.link(files[name])

    def directory(self) -> Path:
        """The folder with all the files, once every one of them is complete, for libraries that want one.

        `AutoModel.from_pretrained(weights.directory())` works at the first cold start. The files are to be read only.
        """
        for file in self._snapshot.below(self._folder, "the folder").values():
            self._snapshot.link(file)
        return self._snapshot.directory() / self._folder

    def prepare(self, device: str) -> None:
        """Do what takes long about a device before there are bytes to restore: its context, torch's import, its staging buffers.

        Its next `to` then has them. Raises WeightsError if there is no such device; nothing is to be done for `cpu`.
        """
        self._devices.prepare(device)

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

        return self._devices.restore(self._catalog, Placement(device), dtype)

    def make_room(self, device: str, size: int) -> int:
        """Have weights that no function uses evicted from a device, `size` bytes of them or all there are; returns how many it were.

        For what a model needs there beside its weights, such as a KV cache; `to` does it by itself. Raises WeightsError if there is no
        such device.
        """
        return self._devices.make_room(device, size)

    def module(
        self,
        build: "Callable[[], ModuleT]",
        device: "str | torch.device | Mapping[str, str]",
        *,
        dtype: "torch.dtype | None" = None,
        rename: "Callable[[str], str | None]" = lambda name: name,
    ) -> "ModuleT":
        """The torch module that `build` makes, around these weights: its parameters are the tensors that `to` gives, and need no gradient.

        While it is built, parameters are placeholders on torch's `meta` device, so that nothing is allocated or initialised that would only
        be overwritten. Parameters that it ties together need to be in the files once. Buffers that are not in the files are what the
        constructor makes of them, and are moved to where the device map has their module.

        rename: from the name that a tensor has in the files, by which the device map goes, to its name in the module; None leaves it out.

        Raises WeightsError that names what is missing, unexpected or of another shape, or a buffer that is made of a parameter's values.
        """
        from weights_cache.restore.device import torch_device
        from weights_cache.restore.module import assemble
        from weights_cache.restore.placement import Placement

        place = Placement(device)
        return assemble(build, self.to(device, dtype=dtype), lambda name: torch_device(place(name)), rename)

    def _views(self) -> "Iterator[tuple[str, Tensor]]":
        for file in self._catalog.files():
            for name, info in self._catalog.header(file).items():
                yield name, self._tensor(file, info)
        self._snapshot.count()

    def __getitem__(self, name: str) -> "Tensor":
        return self._tensor(*self._catalog.find(name))

    def __contains__(self, name: object) -> bool:
        try:
            self._catalog.find(name)
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalog)

    def __len__(self) -> int:
        return sum(len(self._catalog.header(file)) for file in self._catalog.files())

    def _tensor(self, file: SnapshotFile, info: TensorInfo) -> "Tensor":
        from weights_cache.restore import view

        self._snapshot.wait(file, info.start, info.stop)
        assert file.view is not None  # it has a header at least
        return view(file.view, info)
