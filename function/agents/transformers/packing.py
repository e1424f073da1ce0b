"""Texts of several lengths in one row, one after the other, so that a processor computes no padding.

A mask keeps each text to itself, and each has positions of its own. What the encoder makes of them is spread again, a row for each text,
before a head sees it. Not every model can: `Forward` tries it, and does without where the numbers are others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 512  # of one row: attention costs the square of it


class Packing:
    """The way of one model's inputs through its encoder, the model below the head."""

    def __init__(self, model: Any, first_position: int) -> None:
        """first_position: the number of a text's first position."""
        self._first = first_position
        self._lengths: Sequence[int] | None = None  # of the texts that are on their way
        below = getattr(model, model.base_model_prefix, model)
        below.register_forward_hook(self._spread)

    def packed(self, inputs: dict[str, list[list[int]]]) -> dict[str, Tensor]:
        """What the model is given for texts. inputs: of each, by name."""
        lengths = self._lengths = [len(text) for text in inputs["input_ids"]]
        found = {
            name: torch.tensor([[one for text in texts for one in text]]) for name, texts in inputs.items() if name != "attention_mask"
        }
        text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        found["attention_mask"] = (text[:, None] == text)[None, None]
        found["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None] + self._first
        return found

    def end(self) -> None:
        """The texts have come through, or will not."""
        self._lengths = None

    def _spread(self, module: Any, _: Any, output: Any) -> Any:
        if self._lengths is None:
            return None
        hidden = output["last_hidden_state"]
        grid = hidden.new_zeros(len(self._lengths), max(self._lengths), hidden.shape[-1])
        at = 0
        for row, length in enumerate(self._lengths):
            grid[row, :length] = hidden[0, at : at + length]
            at += length
        output["last_hidden_state"] = grid
        if output.get("pooler_output") is not None:
            output["pooler_output"] = module.pooler(grid)
        return output
