"""Tensors of the Open Inference Protocol: as JSON, as bytes, and as the rows that an agent takes and gives.

A tensor's first dimension counts rows; a row is what is left: an element, or nested lists, or an array where the agent asks for that.
Bytes are as the binary tensor data extension has them: little-endian (as the machines are that this runs on), row-major, without padding;
a BYTES element is its length in four bytes and then itself.

A tensor may have millions of elements. They are looked at in pieces, as the probes are answered by the same interpreter, which a single
call into C would keep to itself.
"""

import math
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import orjson

from function.agent import TensorSpec
from function.errors import BadInput
from function.values import dumps

_EXACT = 2**53  # up to which FP64 keeps integers
MAX_DIMENSIONS = 32  # nested lists much deeper than this cannot be written as JSON again
_PIECE = 2**15  # elements; the interpreter takes 1 or 2 ms for so many


@dataclass(frozen=True)
class _Fixed:
    """A datatype whose elements all have the same size."""

    code: str  # struct's
    types: frozenset[type]  # of an element in JSON
    low: float
    high: float


def _whole(code: str, *, is_signed: bool) -> _Fixed:
    bits = 8 * struct.calcsize("<" + code)
    return _Fixed(code, frozenset({int}), -(1 << bits - 1) if is_signed else 0, (1 << bits - is_signed) - 1)


def _real(code: str, high: float) -> _Fixed:
    return _Fixed(code, frozenset({int, float}), -high, high)


_FIXED = {
    "BOOL": _Fixed("?", frozenset({bool}), False, True),
    **{f"INT{8 << n}": _whole(code, is_signed=True) for n, code in enumerate("bhiq")},
    **{f"UINT{8 << n}": _whole(code, is_signed=False) for n, code in enumerate("BHIQ")},
    "FP16": _real("e", 65504.0),
    "FP32": _real("f", struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]),
    "FP64": _real("d", math.nextafter(math.inf, 0)),
}
DATATYPES = (*_FIXED, "BYTES")
_BRAIN = "BF16"  # a caller may send it in binary; the agent is handed the same numbers as FP32
_OF_DTYPE = {  # numpy's names
    "bool": "BOOL",
    **{name.lower(): name for name in _FIXED if "INT" in name},
    **{f"float{name[2:]}": name for name in _FIXED if name.startswith("FP")},
}
_DTYPES = {name: dtype for dtype, name in _OF_DTYPE.items()} | {_BRAIN: "float32"}


@dataclass(frozen=True)
class Tensor:
    """`elements`: row-major; a list of bool, int or float, and for BYTES of str, or of bytes where they are not UTF-8.

    Those of numbers may also be bytes as the protocol has them (a memoryview; FP32 for BF16), or one of numpy's arrays, of one dimension.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: Any

    def rows(self, *, as_arrays: bool = False) -> list[Any]:
        """What the agent is handed: elements or nested lists of them; with as_arrays numpy's scalars and read-only arrays of numbers."""
        if as_arrays and self.datatype != "BYTES":
            return list(self._array())
        if isinstance(self.elements, memoryview):
            return _unpacked(self.elements, _code(self.datatype), self.shape)
        return _nested(self.elements, self.shape)

    def _array(self) -> Any:
        import numpy  # the agent that asks for it has it

        dtype = numpy.dtype(_DTYPES[self.datatype])
        if isinstance(self.elements, memoryview):
            found = numpy.frombuffer(self.elements, dtype)
            found = found if found.flags.aligned else found.copy()  # what computes with it would copy it each time
        else:
            found = numpy.concatenate([numpy.array(piece, dtype) for piece in _pieces(self.elements)])
        found.flags.writeable = False
        return found.reshape(self.shape)

    def document(self) -> dict[str, Any]:
        """Its description, to which its data or the size of its bytes is added."""
        return {"name": self.name, "datatype": self.datatype, "shape": self.shape}

    def data(self) -> Any:
        """The elements as `dumps` writes them. Raises BadInput, as the caller asked for JSON, if some are no text."""
        if self.datatype != "BYTES":
            return _in_json(self.elements)
        try:
            return [element if isinstance(element, str) else element.decode() for element in self.elements]
        except UnicodeDecodeError:
            raise BadInput(f'output "{self.name}" is not text, which JSON cannot hold; ask for it with "binary_data": true') from None

    def to_bytes(self) -> bytes | memoryview:
        """The elements in binary; those of an array where they lie."""
        if isinstance(self.elements, memoryview):
            return self.elements
        if _is_array(type(self.elements)):
            return memoryview(self.elements.view("uint8"))
        if self.datatype != "BYTES":
            code = _code(self.datatype)
            return b"".join(struct.pack(f"<{len(piece)}{code}", *piece) for piece in _pieces(self.elements))
        encoded = (element.encode() if isinstance(element, str) else element for element in self.elements)
        return b"".join(len(element).to_bytes(4, "little") + element for element in encoded)


def _code(datatype: str) -> str:
    return "f" if datatype == _BRAIN else _FIXED[datatype].code


def _pieces(elements: Any) -> Iterator[Any]:
    """Its elements, some at a time."""
    return (elements[at : at + _PIECE] for at in range(0, len(elements), _PIECE))


def _types(elements: Any) -> set[type]:
    found: set[type] = set()
    for piece in _pieces(elements):
        found.update(map(type, piece))
    return found


def _joined(lists: Sequence[list[Any]]) -> list[Any]:
    """The items of lists of one length."""
    found: list[Any] = []
    step = max(1, _PIECE // max(1, len(lists[0])))
    for at in range(0, len(lists), step):
        found += chain.from_iterable(lists[at : at + step])
    return found


def _nested(items: list[Any], shape: Sequence[int]) -> list[Any]:
    for size in reversed(shape[1:]):
        items = [items] if size == len(items) else [items[at : at + size] for at in range(0, len(items), size)]
    return items


def _unpacked(data: memoryview, code: str, shape: Sequence[int]) -> list[Any]:
    """The same of bytes, of which nothing else is made on the way."""
    row_size = math.prod(shape[1:])
    row_bytes = len(data) // shape[0]
    if row_size > _PIECE:
        return [_unpacked(data[at : at + row_bytes], code, shape[1:]) for at in range(0, len(data), row_bytes)]
    found: list[Any] = []
    step = _PIECE // row_size * row_bytes
    for at in range(0, len(data), step):
        part = data[at : at + step]
        found += _lists(part, code, (len(part) // row_bytes, *shape[1:]))
    return found


def _lists(data: memoryview, code: str, shape: Sequence[int]) -> list[Any]:
    if code == "e":  # which no memoryview reads before Python 3.12
        data, code = memoryview(array("f", struct.unpack(f"<{len(data) // 2}e", data))).cast("B"), "f"
    view: Any = data
    found: list[Any] = view.cast(code, shape).tolist()
    return found


def _in_json(elements: Any) -> Any:
    if len(elements) <= _PIECE:
        return elements
    return orjson.Fragment(b"[" + b",".join(dumps(piece)[1:-1] for piece in _pieces(elements)) + b"]")


# What a caller sends


def read(entries: Any, binary: bytes | memoryview | None) -> list[Tensor]:
    """The tensors in a request's "inputs". binary: what follows the JSON, None if the request does not say where that ends; it is kept.

    Raises BadInput.
    """
    if not isinstance(entries, list) or not entries:
        raise BadInput('the body must be {"inputs": [...]} with one tensor at least; "inputs" is missing, empty or not a list')
    tensors: list[Tensor] = []
    at = 0
    for index, entry in enumerate(entries):
        tensor, size = _read_one(f"inputs[{index}]", entry, None if binary is None else memoryview(binary)[at:])
        at += size
        tensors.append(tensor)
    if binary is not None and at != len(binary):
        raise BadInput(f'{len(binary)} bytes follow the JSON, but "binary_data_size" of all inputs comes to {at}')
    once([tensor.name for tensor in tensors], "inputs")
    return tensors


def _read_one(where: str, entry: Any, binary: memoryview | None) -> tuple[Tensor, int]:
    """A tensor, and how many of the bytes were its own."""
    if not isinstance(entry, dict):
        raise BadInput(f"{where} must be an object with name, shape, datatype and data")
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    if not isinstance(name, str) or not name:
        raise BadInput(f'{where}: "name" is missing or not a string')
    where = f'{where} ("{name[:100]}")'
    if not isinstance(datatype, str) or datatype not in (*DATATYPES, _BRAIN):
        raise BadInput(f'{where}: "datatype" must be one of {", ".join(DATATYPES)}, and in binary {_BRAIN}')
    if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_DIMENSIONS or any(type(size) is not int or size < 1 for size in shape):
        raise BadInput(f'{where}: "shape" must be a list of 1 to {MAX_DIMENSIONS} whole numbers above 0, of which the first counts rows')
    size = parameters(entry, where).get("binary_data_size")
    if ("data" in entry) == (size is not None):
        raise BadInput(f'{where}: give either "data" or the parameter "binary_data_size"')
    if size is None:
        if datatype == _BRAIN:
            raise BadInput(f'{where}: {_BRAIN} is taken in binary only; send "binary_data_size" in place of "data"')
        return Tensor(name, datatype, tuple(shape), _from_json(where, entry["data"], datatype, shape)), 0
    if type(size) is not int or size < 0:
        raise BadInput(f'{where}: "binary_data_size" must be a number of bytes')
    if binary is None:
        raise BadInput(f'{where}: with "binary_data_size" the header Inference-Header-Content-Length must say where the JSON ends')
    if size > len(binary):
        raise BadInput(f'{where}: "binary_data_size" is {size}, but only {len(binary)} bytes are left in the body')
    return Tensor(name, datatype, tuple(shape), _from_bytes(where, binary[:size], datatype, shape)), size


def parameters(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """An object's "parameters", which may be missing. Raises BadInput, also for what would need memory shared with the caller."""
    found = entry.get("parameters", {})
    if not isinstance(found, dict):
        raise BadInput(f'{where}: "parameters" must be an object')
    if "shared_memory_region" in found:
        raise BadInput(f"{where}: shared memory is not supported; send the data in the request")
    return found


def once(names: Sequence[str], where: str) -> None:
    """Raises BadInput unless all names differ."""
    if len(set(names)) < len(names):
        raise BadInput(f"{where}: each name may be there only once")


def _from_json(where: str, data: Any, datatype: str, shape: Sequence[int]) -> list[Any]:
    """The elements: flat, or nested as the shape says."""
    if not isinstance(data, list):
        raise BadInput(f'{where}: "data" must be a list')
    elements = data
    if data and isinstance(data[0], list):
        for size in shape[1:]:
            if any(type(part) is not list or len(part) != size for part in elements):
                raise BadInput(f'{where}: "data" is nested, but not as shape {list(shape)} says')
            elements = _joined(elements)
    if len(elements) != math.prod(shape):
        raise BadInput(f'{where}: shape {list(shape)} is {math.prod(shape)} elements, "data" has {len(elements)}')
    try:
        return _checked(elements, datatype)
    except ValueError as error:
        raise BadInput(f"{where}: {error}") from None


def _checked(elements: list[Any], datatype: str) -> list[Any]:
    """The elements, if all are of the datatype; whole numbers become real where it is real. Raises ValueError."""
    fixed = _FIXED.get(datatype)
    types = fixed.types if fixed else frozenset({str})
    found: set[type] = set()
    for piece in _pieces(elements):
        found.update(map(type, piece))
        if not found <= types:
            odd = next(element for element in piece if type(element) not in types)
            raise ValueError(f"an element is {_shown(odd)}, which is no {datatype}")
        if fixed and not (fixed.low <= min(piece) and max(piece) <= fixed.high):
            finite = list(filter(math.isfinite, piece))  # an agent's may be infinite, or no numbers
            _check_range(min(finite, default=0), max(finite, default=0), datatype)
    return [float(element) for element in elements] if float in types and found != {float} else elements


def _check_range(low: float, high: float, datatype: str) -> None:
    fixed = _FIXED[datatype]
    for extreme in (low, high):
        if not fixed.low <= extreme <= fixed.high:
            raise ValueError(f"{extreme} is out of range for {datatype}")


def _shown(element: Any) -> str:
    if isinstance(element, list | dict):
        return "a list" if isinstance(element, list) else "an object"
    return "null" if element is None else repr(element)[:60]


def _from_bytes(where: str, data: memoryview, datatype: str, shape: Sequence[int]) -> Any:
    """The elements: of numbers the bytes themselves."""
    count = math.prod(shape)
    if datatype == "BYTES":
        return _texts(where, data, count)
    wanted = count * (2 if datatype == _BRAIN else struct.calcsize("<" + _FIXED[datatype].code))
    if len(data) != wanted:
        raise BadInput(f'{where}: shape {list(shape)} of {datatype} is {wanted} bytes, "binary_data_size" is {len(data)}')
    if datatype == "BOOL" and any(bytes(piece).translate(None, b"\0\1") for piece in _pieces(data)):
        raise BadInput(f"{where}: a BOOL is a byte of 0 or 1")
    return _widened(data) if datatype == _BRAIN else data


def _widened(data: memoryview) -> memoryview:
    """BF16 as FP32, whose upper half it is."""
    wide = bytearray(2 * len(data))
    for at in range(0, len(data), 2 * _PIECE):
        part = data[at : at + 2 * _PIECE]
        start, end = 2 * at, 2 * (at + len(part))
        wide[start + 2 : end : 4], wide[start + 3 : end : 4] = bytes(part[0::2]), bytes(part[1::2])
    return memoryview(wide)


def _texts(where: str, data: memoryview, count: int) -> list[str | bytes]:
    found: list[str | bytes] = []
    at = 0
    while at < len(data) and len(found) <= count:
        start = at + 4
        end = start + int.from_bytes(data[at:start], "little")
        if max(start, end) > len(data):
            raise BadInput(f"{where}: element {len(found)} of the BYTES data is cut short")
        found.append(_text(bytes(data[start:end])))
        at = end
    if len(found) != count:
        raise BadInput(f"{where}: the shape is {count} elements, the BYTES data has {len(found) if len(found) < count else 'more'}")
    return found


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def fit(tensors: Sequence[Tensor], specs: Sequence[TensorSpec]) -> None:
    """Raises BadInput unless these are the tensors that an agent declares."""
    by_name = {tensor.name: tensor for tensor in tensors}
    if by_name.keys() != {spec.name for spec in specs}:
        raise BadInput(f"the inputs must be {_names(specs)}, not {_names(tensors)}")
    for spec in specs:
        tensor = by_name[spec.name]
        if tensor.datatype != spec.datatype or not _is_like(tensor.shape, spec.shape):
            raise BadInput(
                f'input "{spec.name}" must be {spec.datatype} of shape {list(spec.shape)}, not {tensor.datatype} of {list(tensor.shape)}'
            )


def _names(named: Sequence[TensorSpec | Tensor]) -> str:
    return ", ".join(f'"{one.name[:100]}"' for one in named)


def _is_like(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, size) for size, want in zip(shape, wanted, strict=True))


def rows(tensors: Sequence[Tensor], *, as_arrays: bool = False) -> list[Any]:
    """The agent's inputs: a tensor's rows or, of several tensors, one {name: row} for all their first rows, one for the second, and so on.

    as_arrays: see Tensor.rows. Raises BadInput if the tensors differ in their first dimension.
    """
    if len(tensors) == 1:
        return tensors[0].rows(as_arrays=as_arrays)
    if len({tensor.shape[0] for tensor in tensors}) > 1:
        raise BadInput("all inputs must have the same first dimension, which counts rows")
    names = [tensor.name for tensor in tensors]
    return [dict(zip(names, row, strict=True)) for row in zip(*(tensor.rows(as_arrays=as_arrays) for tensor in tensors), strict=True)]


# What the agent gives, in plain values


def from_outputs(outputs: Sequence[Any], spec: TensorSpec) -> Tensor:
    """One row an output, as an agent declares it. Raises ValueError if it does not keep to that."""
    shape, elements = _flat(outputs)
    if spec.datatype == "BYTES":
        if not _are_texts(elements) or not _is_like(shape, spec.shape):
            shape, elements = (len(outputs),), _json_texts(outputs)
    elif _is_array(type(elements)):
        elements = _converted(elements, spec.datatype)
    else:
        elements = _checked(elements, spec.datatype)
    if not _is_like(shape, spec.shape):
        raise ValueError(f"the agent declares output {spec.name!r} as {spec.datatype} {list(spec.shape)}, and gave shape {list(shape)}")
    return Tensor(spec.name, spec.datatype, shape, elements)


def inferred(name: str, outputs: Sequence[Any]) -> Tensor:
    """One row an output, in the datatype that suits them.

    Strings are BYTES; arrays of one shape and dtype keep it; other numbers and even lists of them are FP64, INT64 (UINT64) or BOOL; the
    rest is JSON text.
    """
    shape, elements = _flat(outputs)
    if _is_array(type(elements)):
        return Tensor(name, _OF_DTYPE[elements.dtype.name], shape, elements)
    types = _types(elements)
    datatype = _datatype(elements, types)
    if datatype == "BYTES" and not _are_texts(elements):
        shape, elements = (len(outputs),), _json_texts(outputs)
    elif datatype == "FP64" and types != {float}:
        elements = [float(element) for element in elements]
    return Tensor(name, datatype, shape, elements)


def _datatype(elements: list[Any], types: set[type]) -> str:
    if types == {bool}:
        return "BOOL"
    if types == {int}:
        low, high = min(map(min, _pieces(elements))), max(map(max, _pieces(elements)))
        return next((name for name in ("INT64", "UINT64") if _FIXED[name].low <= low and high <= _FIXED[name].high), "BYTES")
    is_real = bool(types) and types <= {int, float} and (types == {float} or all(map(_is_exact, elements)))
    return "FP64" if is_real else "BYTES"  # JSON's text keeps integers that are too large for it


def _is_exact(element: float) -> bool:
    return isinstance(element, float) or -_EXACT <= element <= _EXACT


def _are_texts(elements: Any) -> bool:
    return type(elements) is list and bool(elements) and _types(elements) <= {str, bytes}


def _flat(outputs: Sequence[Any]) -> tuple[tuple[int, ...], Any]:
    """Shape and elements, as deep as all lists of a level have one length; these are an array if all below are arrays that are alike."""
    shape, items = [len(outputs)], list(outputs)
    while True:
        types = _types(items)
        if types == {list} and len(set(map(len, items))) == 1:
            shape.append(len(items[0]))
            items = _joined(items)
        elif not any(map(_is_array, types)):
            return tuple(shape), items
        elif len(types) == 1 and len({(item.dtype, item.shape) for item in items}) == 1:
            return (*shape, *items[0].shape), _concatenated(items)
        else:
            items = [item.tolist() if _is_array(type(item)) else item for item in items]


def _is_array(kind: type) -> bool:
    """Whether a type of plain values is numpy's."""
    return hasattr(kind, "tolist")


def _concatenated(arrays: list[Any]) -> Any:
    """The elements of all, in one dimension; without a copy if there is one array."""
    import numpy  # whose arrays they are

    flat = [array.reshape(-1) for array in arrays]
    return flat[0] if len(flat) == 1 else numpy.concatenate(flat)


def _converted(elements: Any, datatype: str) -> Any:
    """An array in a declared datatype, as `_checked` has it of lists: whole numbers may become real, nothing else. Raises ValueError."""
    import numpy

    kind = elements.dtype.kind
    if kind not in ("b" if datatype == "BOOL" else "iuf" if datatype.startswith("FP") else "iu"):
        raise ValueError(f"the elements are {elements.dtype}, which is no {datatype}")
    if kind != "b":
        low, high = (find(where=numpy.isfinite(elements), initial=0).item() for find in (elements.min, elements.max))
        _check_range(low, high, datatype)
    return elements.astype(_DTYPES[datatype], copy=False)


def _json_texts(outputs: Iterable[Any]) -> list[str]:
    return [dumps(output).decode() for output in outputs]
