"""Weights from object storage through a cache on the node: the sidecar that fills it, the reader that restores from it."""
