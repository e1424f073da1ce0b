"""An agent without a model or torch: answers with what it was given. For trying a platform out, and for its tests."""

from collections.abc import Sequence
from typing import Any

from function.agent import Weights


class Echo:
    """Gives each input back."""

    def load(self, weights: Weights, device: str) -> None:
        """Nothing to load."""

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The inputs, unchanged."""
        return inputs
