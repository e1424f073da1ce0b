"""The agent that every contender serves, brought up as Relight brings it up, without Relight's own weights cache."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from function.agent import InferenceAgent, load_agent

if TYPE_CHECKING:
    from torch import Tensor


class FileWeights:
    """A stand-in for `Weights`: a directory with model.safetensors, read by the safetensors library."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, name: str) -> Path:
        return self._directory / name

    def to(self, device: str) -> Iterator[tuple[str, "Tensor"]]:
        from safetensors.torch import load_file

        yield from load_file(self._directory / "model.safetensors", device).items()


def bring_up() -> InferenceAgent:
    """The agent that BENCH_AGENT names, loaded from the directory BENCH_WEIGHTS and warm. OMP_NUM_THREADS limits torch's threads."""
    agent = load_agent(os.environ["BENCH_AGENT"])
    weights: Any = FileWeights(Path(os.environ["BENCH_WEIGHTS"]))
    agent.load(weights, "cpu")
    if warm_up := getattr(agent, "warm_up", None):
        warm_up()
    return agent
