"""What torch makes of a tensor in a file: its type, and a view of a mapping."""

import torch

from weights_cache.errors import WeightsError
from weights_cache.excerpt import quoted
from weights_cache.safetensors_header import TensorInfo

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NEWER_DTYPES = {  # since torch 2.7 and 2.8
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",  # two values an element, so the last dimension is half as long
}
_DTYPES |= {kind: getattr(torch, name) for kind, name in _NEWER_DTYPES.items() if hasattr(torch, name)}


# What `dtype=` leaves alone: numbers that mean something only beside their scales, or that are no approximations.
_SMALLEST_CAST_BYTES = 2


def torch_type(tensor: TensorInfo) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype and shape that torch has for a tensor of a file. Raises WeightsError for a dtype that torch cannot hold."""
    name, kind, shape, _, _ = tensor
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise WeightsError(f"tensor {quoted(name)} has dtype {kind}, which torch has no type for")
    if kind == "F4":
        if not shape or shape[-1] % 2:
            raise WeightsError(
                f"tensor {quoted(name)} has dtype F4 and shape {quoted(list(shape))}; torch holds an even last dimension only"
            )
        shape = (*shape[:-1], shape[-1] // 2)
    return dtype, shape


def cast_type(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor gets when `wanted` is asked for: floating-point numbers of 16 bits and more are cast, others stay."""
    is_cast = wanted is not None and dtype.is_floating_point and dtype.itemsize >= _SMALLEST_CAST_BYTES
    return wanted if is_cast and wanted is not None else dtype


def check_cast(wanted: torch.dtype | None) -> None:
    """Raises WeightsError unless weights can be cast to it."""
    if wanted is not None and not (wanted.is_floating_point and wanted.itemsize >= _SMALLEST_CAST_BYTES):
        raise WeightsError(f"weights cannot be cast to {wanted}; dtype must be one of float16, bfloat16, float32 and float64, or None")


def view(mapping: memoryview, tensor: TensorInfo) -> torch.Tensor:
    """The tensor as a view of a copy-on-write mapping of its file: nothing is read or copied until a page is touched.

    Writing to it in place copies that page for this process and never reaches the file. The mapping lives as long as the tensor.
    Raises WeightsError for a dtype that torch cannot hold.
    """
    dtype, shape = torch_type(tensor)
    start, stop = tensor.start, tensor.stop
    if start == stop:
        return torch.empty(shape, dtype=dtype)
    flat = elements(mapping, dtype, start, stop)
    return flat if len(shape) == 1 else flat.view(shape)


def elements(mapping: memoryview, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
    """The numbers in those bytes of a file, at least one: a view of it where they are aligned."""
    if start % dtype.itemsize:  # an odd-sized neighbour before it: unaligned reads are undefined, so these are copied
        return torch.frombuffer(bytearray(mapping[start:stop]), dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=(stop - start) // dtype.itemsize, offset=start)
