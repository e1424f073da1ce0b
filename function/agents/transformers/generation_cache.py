"""Keys and values of many sequences in one room, so that a forward pass of the library takes any of them together.

The room of a layer is [slots, heads, columns, width]: a slot for each sequence, and in it the token at position p in column p. So nothing
is moved when a sequence joins, leaves or is left out for a while, none is padded to another's past, and a pass sees a view of the room:
the slots of its sequences, up to the longest of them. What a shorter one has beyond its length is masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

SLOTS = 4  # at first; doubled when they are taken
COLUMNS = 256


@dataclass
class Pass:
    """What a forward pass takes: for the slots from `first` on, how many tokens each has in its cache, and how many come to it."""

    first: int
    starts: Sequence[int]
    counts: Sequence[int]
    rows: Tensor  # [slots], their numbers in the view
    columns: Tensor  # [slots], where each slot's last token goes

    @property
    def length(self) -> int:
        """Columns that are seen."""
        return max(start + count for start, count in zip(self.starts, self.counts, strict=True))


class Room(Cache):  # type: ignore[misc]  # the library is not seen by the type checker
    """The cache of all sequences, as the library's models use one. `open` a pass, and run the model on it."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=self._layer)
        self.slots = 0
        self.columns = 0
        self.now: Pass | None = None

    def _layer(self) -> "RoomLayer":
        return RoomLayer(self)

    def ensure(self, slots: int, columns: int) -> None:
        """Room for so many sequences and tokens of each; what is in it stays."""
        if slots <= self.slots and columns <= self.columns:
            return
        if slots > self.slots:
            self.slots = max(SLOTS, self.slots * 2, slots)
        if columns > self.columns:
            self.columns = max(COLUMNS, self.columns * 3 // 2, columns)
        for layer in self.layers:
            layer.grow()

    def empty(self) -> None:
        """Give the memory back; nothing is in it."""
        self.slots = self.columns = 0
        for layer in self.layers:
            layer.reset()

    def swap(self, one: int, other: int, length: int, *, is_copy: bool) -> None:
        """Exchange two slots' first columns; with `is_copy` the first goes to the other alone."""
        for layer in self.layers:
            layer.swap(one, other, length, is_copy=is_copy)


class RoomLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values."""

    is_sliding = False

    def __init__(self, room: Room) -> None:
        super().__init__()
        self.keys: Any = None  # tensors, once the first pass has shown of what kind
        self.values: Any = None
        self._room = room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take room for what is like these."""
        self.keys, self.values = self._new(key_states), self._new(value_states)
        self.is_initialized = True

    def _new(self, like: Tensor) -> Tensor:
        """Zeros, not what happens to be there: what is masked is multiplied by zero, which a NaN survives."""
        return torch.zeros(self._room.slots, like.shape[1], self._room.columns, like.shape[3], dtype=like.dtype, device=like.device)

    def grow(self) -> None:
        """To the room's present size."""
        if self.is_initialized:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)

    def _grown(self, old: Tensor) -> Tensor:
        new = self._new(old)
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def reset(self) -> None:
        """Give the memory back."""
        self.keys = self.values = None
        self.is_initialized = False

    def swap(self, one: int, other: int, length: int, *, is_copy: bool) -> None:
        """See Room.swap."""
        for held in (self.keys, self.values):
            if held is not None:
                there = None if is_copy else held[other, :, :length].clone()
                held[other, :, :length] = held[one, :, :length]
                if there is not None:
                    held[one, :, :length] = there

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in the pass's tokens: [slots, heads, tokens, width]; returns all that is seen of its slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        now = self._room.now
        assert now is not None
        return self._take(self.keys, key_states, now), self._take(self.values, value_states, now)

    @staticmethod
    def _take(held: Tensor, new: Tensor, now: Pass) -> Tensor:
        seen = held[now.first : now.first + len(now.starts), :, : now.length]
        tokens = new.shape[2]
        if tokens == 1:
            seen[now.rows, :, now.columns] = new[:, :, 0]
        else:
            for slot, (start, count) in enumerate(zip(now.starts, now.counts, strict=True)):
                seen[slot, :, start : start + count] = new[slot, :, tokens - count :]
        return seen

    def get_seq_length(self) -> int:
        """Columns before this pass; the library asks for it where it is not told positions, which it always is."""
        return self._room.now.length if self._room.now else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of a mask that the library would make; it is always handed one."""
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions
