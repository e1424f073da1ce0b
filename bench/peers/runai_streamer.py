"""Run:ai Model Streamer: from the object to tensors in this process's memory, which is what it is made for; it writes no file."""

import json
import sys
from pathlib import Path

import torch
from runai_model_streamer import SafetensorsStreamer  # type: ignore[import-not-found]

from bench.peers.timed import measure


def main(uri: str, name: str, source: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    with SafetensorsStreamer() as streamer:

        def fetch() -> None:
            streamer.stream_file(f"{uri}/{name}")
            tensors.update(streamer.get_tensors())

        measure(fetch, lambda: is_same(tensors, source))


def is_same(tensors: dict[str, torch.Tensor], source: Path) -> bool:
    """Whether the tensors are, byte for byte, those of the safetensors file `source`."""
    with source.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for tensor, entry in header.items():
            start, stop = entry["data_offsets"]
            if file.read(stop - start) != tensors[tensor].numpy().tobytes():  # the header lists them in the file's order
                return False
    return len(tensors) == len(header)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[4]))
