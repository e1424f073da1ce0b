"""Attention of sequences of very different lengths in one pass: the library's own, called for those of like length, so that a short one
does not pay for the columns of a long one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "relight"
SPARE = 256  # columns, over all sequences of a group, that are not worth a call of their own in each layer

Group = tuple[int, int, int]  # of slots from … to …, and how many columns they have


def install(model: Any) -> None:
    """Have a model use it, if it would use the library's SDPA; others see all columns, masked."""
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def uninstall(model: Any) -> None:
    """As it was."""
    if getattr(model.config, "_attn_implementation", None) == NAME:
        model.set_attn_implementation("sdpa")


def grouped(mask: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mask, with a note of which slots are of like length; models hand it on as it is, and where one does not, the note is lost alone.

    mask: [slots, 1, tokens, columns]; lengths: columns that each slot has.
    """
    groups: list[Group] = []
    for slot, length in enumerate(lengths):
        first, _, columns = groups[-1] if groups else (0, 0, 0)
        longer = max(columns, length)
        if groups and longer * (slot + 1 - first) - columns * (slot - first) - length <= SPARE:
            groups[-1] = (first, slot + 1, longer)
        else:
            groups.append((slot, slot + 1, length))
    if len(groups) > 1:
        mask.relight_groups = groups  # type: ignore[attr-defined]
    return mask


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any) -> tuple[Tensor, None]:
    """See `sdpa_attention_forward`."""
    groups: list[Group] | None = getattr(attention_mask, "relight_groups", None)
    if groups is None or attention_mask is None or more.get("position_bias") is not None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
        return whole
    parts = [
        sdpa_attention_forward(
            module, query[a:b], key[a:b, :, :columns], value[a:b, :, :columns], attention_mask[a:b, ..., :columns], **more
        )[0]
        for a, b, columns in groups
    ]
    return torch.cat(parts), None
