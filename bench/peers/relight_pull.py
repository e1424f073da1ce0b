"""Ours: what `relight pull` does, into a fresh node cache."""

import sys
from pathlib import Path

from bench.peers.timed import measure
from weights_cache.cache import NodeCache
from weights_cache.fetch import Puller
from weights_cache.settings import WeightsSettings
from weights_cache.store import Store
from weights_cache.uri import WeightsUri


def main(uri: str, name: str, destination: Path) -> None:
    settings = WeightsSettings()
    source = WeightsUri.parse(uri)
    cache = NodeCache(destination)
    puller = Puller(Store(source), cache, settings, uri=uri)

    def fetch() -> Path:
        cache.create()
        return (cache.snapshot_path(puller.run()) / name).resolve()

    measure(fetch)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
