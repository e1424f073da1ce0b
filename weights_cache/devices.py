"""`Devices`: how tensors of mapped files get into the memory of devices, and what is kept on the way.

What is here is imported before torch; torch comes with the first tensor that is asked for.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weights_cache import gpu_context
from weights_cache.catalog import Catalog
from weights_cache.safetensors_header import TensorInfo
from weights_cache.settings import WeightsSettings
from weights_cache.snapshot import Snapshot, SnapshotFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from weights_cache.restore.pipeline import Ring
    from weights_cache.restore.placement import Placement
    from weights_cache.restore.tier import Tier


class Devices:
    """The devices that tensors of one snapshot go to: prepared staging buffers, and leases on what is resident there."""

    def __init__(self, settings: WeightsSettings, snapshot: Snapshot) -> None:
        self._settings = settings
        self._snapshot = snapshot
        self._preparing = threading.Lock()  # guards the rings, and has whoever needs one wait while it is made
        self._rings: dict[str, Ring] = {}  # by device: prepared, and not in use
        self._tiers: list[Tier] = []  # each a lease on what was attached through it, or left

    def prepare(self, device: str) -> None:
        """See `Weights.prepare`."""
        if device != "cpu":
            gpu_context.begin(device)
            with self._preparing:
                if device not in self._rings:
                    ring = self._rings[device] = _open_ring(device)
                    if self._settings.resident:
                        ring.device.identity()  # the first time it imports the driver's bindings

    def restore(self, catalog: Catalog, placement: "Placement", dtype: "torch.dtype | None") -> "Iterator[tuple[str, Tensor]]":
        """The tensors of a catalog where they are placed, see `Weights.to`."""
        from weights_cache.restore.pipeline import Restore

        rings: dict[str, Ring] = {}
        try:
            for name in placement.devices:
                if name != "cpu":
                    with self._preparing:
                        rings[name] = self._rings.pop(name) if name in self._rings else _open_ring(name)
            tier = self._tier() if rings else None
            restore = Restore([_source(file, catalog, self._snapshot) for file in catalog.files()], placement, rings, dtype, tier)
            yield from restore.tensors()
            self._snapshot.count()
            self._snapshot.count_resident(restore.attached_bytes, restore.copied_bytes)
        finally:
            for ring in rings.values():
                ring.close()

    def make_room(self, device: str, size: int) -> int:
        """See `Weights.make_room`."""
        from weights_cache.restore.device import open_device

        tier = self._tier()
        return tier.make_room(open_device(device), size) if tier else 0

    def _tier(self) -> "Tier | None":
        """The node's resident tier, connected anew: its agent may have been restarted."""
        from weights_cache.restore.tier import Tier

        if tier := Tier.open(self._settings.cache_dir, self._snapshot.uri, keeps=self._settings.resident):
            self._tiers.append(tier)
        return tier


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


def _source(file: SnapshotFile, catalog: Catalog, snapshot: Snapshot) -> _Source:
    view = memoryview(b"") if file.view is None else file.view
    header = lambda pause: list(catalog.header(file, pause).values())  # noqa: E731
    return _Source(file.path, file.version, file.size, view, file.has, header, lambda: snapshot.pause(file.path))


def _open_ring(device: str) -> "Ring":
    from weights_cache.restore.pipeline import Ring

    return Ring.open(device)
