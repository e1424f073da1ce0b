"""Read a safetensors header and refuse one that does not describe its file.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length n, n bytes of JSON, then the tensors' bytes
without gaps. The JSON maps each name to {dtype, shape, data_offsets: [begin, end)} counted from the end of the header.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from weights_cache.errors import HeaderError

MAX_HEADER_BYTES = 100_000_000  # the format's own cap
LENGTH_BYTES = 8

_LIMIT = 1 << 63  # JSON's numbers have none, those of a file and of torch do

DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `start` and `stop` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(read: Callable[[int, int], bytes], size: int, file: str) -> list[TensorInfo]:
    """The tensors of a safetensors file in file order.

    read(start, stop): those bytes of the file; called for the header only, after its length was checked. size: the file's, in bytes.
    Raises HeaderError, naming `file` and what is wrong, unless offsets, shapes and sizes agree with each other and with the file.
    """
    if size < LENGTH_BYTES:
        raise HeaderError(f"{file}: {size} bytes are too few for a safetensors file")
    length = int.from_bytes(read(0, LENGTH_BYTES), "little")
    if length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise HeaderError(f"{file}: header of {length} bytes, but the file has {size} and {MAX_HEADER_BYTES} are allowed")
    try:
        header = json.loads(read(LENGTH_BYTES, LENGTH_BYTES + length), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{file}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise HeaderError(f"{file}: the header is not a JSON object")
    base = LENGTH_BYTES + length
    tensors = [_tensor(name, entry, base, file) for name, entry in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    at = base
    for tensor in tensors:
        if tensor.start != at:
            raise HeaderError(
                f"{file}: tensor {tensor.name!r} begins at byte {tensor.start}, expected {at}: tensors overlap or leave a gap"
            )
        at = tensor.stop
    if at != size:
        raise HeaderError(f"{file}: the tensors end at byte {at}, the file at {size}")
    return tensors


def _tensor(name: str, entry: Any, base: int, file: str) -> TensorInfo:
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise HeaderError(f"{where} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise HeaderError(f"{where} has dtype {dtype!r}; known are {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape) or math.prod(max(n, 1) for n in shape) >= _LIMIT:
        raise HeaderError(f"{where} has shape {shape!r}; it must be a list of whole numbers, with a product below 2^63")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise HeaderError(f"{where} has data_offsets {offsets!r}; they must be two whole numbers below 2^63")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise HeaderError(f"{where}: {dtype} {shape} takes {bits / 8:g} bytes, its offsets {offsets} span {offsets[1] - offsets[0]}")
    return TensorInfo(name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LIMIT


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found
