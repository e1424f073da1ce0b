"""From mapped files to tensors, on a CPU (`tensors`) or through staging buffers into a device's memory (`pipeline`).

The only modules here that know torch; the sidecar never imports them.
"""

from weights_cache.restore.tensors import view

__all__ = ["view"]
