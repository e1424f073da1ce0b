"""Where the tensors of a file come to lie in a device's memory, and in which blocks they are copied there.

All tensors of a file share one allocation. Each begins at a multiple of ALIGNMENT there, whatever byte of the file it begins at, so that
none has to be copied again for the sake of a kernel that wants it aligned. The allocation is filled in blocks, each of which is put
together in a staging buffer and goes to the device in one piece, however many tensors it has.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weights_cache.restore.tensors import cast_type, torch_type
from weights_cache.safetensors_header import TensorInfo

ALIGNMENT = 256  # bytes, what cudaMalloc promises at least; vectorised kernels want 16, cuBLAS likes 256


class Placed(NamedTuple):
    """A tensor's place: bytes [at, at + size) of the allocation."""

    info: TensorInfo
    file_dtype: torch.dtype
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int
    size: int

    def of(self, memory: Tensor) -> Tensor:
        """The tensor as a view of the allocation, uint8."""
        if not self.size:
            return torch.empty(self.shape, dtype=self.dtype, device=memory.device)
        return memory[self.at : self.at + self.size].view(self.dtype).view(self.shape)


class Part(NamedTuple):
    """Bytes [start, stop) of the file go to byte `at` of the allocation, cast from the first dtype to the second unless they are equal."""

    start: int
    stop: int
    at: int
    size: int
    file_dtype: torch.dtype
    dtype: torch.dtype


def lay_out(tensors: Sequence[TensorInfo], dtype: torch.dtype | None) -> tuple[list[Placed], int]:
    """The tensors' places in their order, and how many bytes all take. dtype: to cast to. Raises WeightsError."""
    placed, end = [], 0
    for info in tensors:
        file_dtype, shape = torch_type(info)
        chosen = cast_type(file_dtype, dtype)
        at = -(-end // ALIGNMENT) * ALIGNMENT
        size = (info.stop - info.start) // file_dtype.itemsize * chosen.itemsize
        placed.append(Placed(info, file_dtype, chosen, shape, at, size))
        end = at + size if size else end
    return placed, end


def cut(placed: Sequence[Placed], size: int, block_bytes: int) -> list[list[Part]]:
    """For each block of the allocation, what goes into it.

    block_bytes: a multiple of ALIGNMENT, so that no number is cut in two. Where tensors lie in the file as they do here they are one part.
    """
    blocks: list[list[Part]] = [[] for _ in range(0, size, block_bytes)]
    for tensor in placed:
        at, end = tensor.at, tensor.at + tensor.size
        while at < end:
            block = at // block_bytes
            stop = min(end, (block + 1) * block_bytes)
            _add(blocks[block], _part(tensor, at, stop))
            at = stop
    return blocks


def _part(tensor: Placed, at: int, stop: int) -> Part:
    """Bytes [at, stop) of the allocation, which are of this tensor."""
    wide, narrow = tensor.file_dtype.itemsize, tensor.dtype.itemsize
    start, end = ((edge - tensor.at) // narrow * wide + tensor.info.start for edge in (at, stop))
    return Part(start, end, at, stop - at, tensor.file_dtype, tensor.dtype)


def _add(parts: list[Part], part: Part) -> None:
    last = parts[-1] if parts else None
    is_copy = part.file_dtype == part.dtype and last is not None and last.file_dtype == last.dtype
    if last is not None and is_copy and last.stop == part.start and last.at + last.size == part.at:
        parts[-1] = last._replace(stop=part.stop, size=last.size + part.size)
    else:
        parts.append(part)
