"""Which device each tensor goes to."""

from collections.abc import Mapping

from weights_cache.errors import WeightsError
from weights_cache.excerpt import listed, quoted


class Placement:
    """The device of a tensor by its name.

    Made of a device, or of a device map: from a module's name ("model.layers.12") to the device of all that is in it. The longest name that
    fits counts, "" fits everything, and "layers.1" does not fit "layers.12".
    """

    def __init__(self, devices: object) -> None:
        """devices: a device, as a string or as torch has it, or a mapping from names to such. Raises WeightsError."""
        pairs = devices.items() if isinstance(devices, Mapping) else [("", devices)]
        self._map = {str(name): str(device) for name, device in pairs}
        if not self._map:
            raise WeightsError('the device map is empty; {"": "cuda:0"} puts everything on one device')
        self.devices = tuple(dict.fromkeys(self._map.values()))

    def __call__(self, name: str) -> str:
        """The device of the tensor `name`. Raises WeightsError if the map has none for it."""
        prefix = name
        while True:
            if device := self._map.get(prefix):
                return device
            if not prefix:
                raise WeightsError(f"the device map has no device for tensor {quoted(name)}; it has {listed(self._map)} (and no '')")
            prefix = prefix.rpartition(".")[0]

    def sole(self) -> str | None:
        """The device that everything goes to, if it is a single one."""
        return self.devices[0] if len(self.devices) == 1 and "" in self._map else None
