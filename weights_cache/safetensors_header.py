"""Read a safetensors header and refuse one that does not describe its file.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length n, n bytes of JSON, then the tensors' bytes
without gaps. The JSON maps each name to {dtype, shape, data_offsets: [begin, end)} counted from the end of the header.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from weights_cache.errors import HeaderError
from weights_cache.excerpt import plain, quoted

MAX_HEADER_BYTES = 100_000_000  # the format's own cap
MAX_DIMENSIONS = 64  # of what torch computes with
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


class TensorInfo(NamedTuple):
    """One tensor of a file: `start` and `stop` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(read: Callable[[int, int], bytes], size: int, file: str) -> list[TensorInfo]:
    """The tensors of a safetensors file in file order.

    read(start, stop): those bytes of the file; called for the header only, after its length was checked. size: the file's, in bytes.
    Takes time and memory by the length of the header, and by nothing that it says. Raises HeaderError, naming `file` and what is wrong,
    unless offsets, shapes and sizes agree with each other and with the file.
    """
    file = plain(file)
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
                f"{file}: tensor {quoted(tensor.name)} begins at byte {tensor.start}, expected {at}: tensors overlap or leave a gap"
            )
        at = tensor.stop
    if at != size:
        raise HeaderError(f"{file}: the tensors end at byte {at}, the file at {size}")
    return tensors


def _tensor(name: str, entry: Any, base: int, file: str) -> TensorInfo:
    def wrong(what: str) -> HeaderError:  # the text is made only for those that are wrong: a model may have ten thousand that are right
        return HeaderError(f"{file}: tensor {quoted(name)}{what}")

    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError):
        raise wrong(" lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise wrong(f" has dtype {quoted(dtype)}; known are {', '.join(DTYPE_BITS)}")
    if not _is_counts(shape, MAX_DIMENSIONS) or math.prod([n or 1 for n in shape]) >= _LIMIT:
        raise wrong(f" has shape {quoted(shape)}; it must be a list of whole numbers, {MAX_DIMENSIONS} at most, with a product below 2^63")
    if not _is_counts(offsets, 2) or len(offsets) != 2:
        raise wrong(f" has data_offsets {quoted(offsets)}; they must be two whole numbers below 2^63")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise wrong(f": {dtype} {quoted(shape)} takes {bits / 8:g} bytes, its offsets {offsets} span {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), base + begin, base + end)


def _is_counts(values: Any, most: int) -> bool:
    """Whether it is a list of numbers of bytes or elements, and not of more than so many."""
    if not isinstance(values, list) or len(values) > most:
        return False
    for value in values:  # noqa: SIM110  a generator would take as long as all the rest
        if type(value) is not int or not 0 <= value < _LIMIT:
            return False
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found
