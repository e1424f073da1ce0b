"""Agents without a model or torch: they answer with what they were given. For trying a platform out, and for its tests."""

import time
from collections.abc import Sequence
from typing import Any

from function.agent import BadInput, Weights


class Echo:
    """Gives each input back."""

    def load(self, weights: Weights, device: str) -> None:
        """Nothing to load."""

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The inputs, unchanged."""
        return inputs


class Delay:
    """Gives each input, a number of seconds, back after that time: a model that takes as long as its caller likes."""

    def load(self, weights: Weights, device: str) -> None:
        """Nothing to load."""

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The inputs, after the longest of them. Raises BadInput for what is no number from 0 to an hour."""
        for seconds in inputs:
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= 3600:
                raise BadInput(f"each input must be a number of seconds from 0 to 3600, not {seconds!r:.100}")
        time.sleep(max(inputs))
        return inputs
