"""Tensors of the Open Inference Protocol: as JSON, as bytes, and as the rows that an agent takes and gives.

A tensor's first dimension counts rows; a row is what is left: an element, or nested lists. Bytes are as the binary tensor data extension
has them: little-endian, row-major, without padding; a BYTES element is its length in four bytes and then itself.
"""

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import orjson

from function.agent import TensorSpec
from function.errors import BadInput

MAX_DIMENSIONS = 32  # nested lists much deeper than this cannot be written as JSON again


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
_OF_DTYPE = {  # numpy's and torch's names
    "bool": "BOOL",
    **{name.lower(): name for name in _FIXED if "INT" in name},
    **{f"float{name[2:]}": name for name in _FIXED if name.startswith("FP")},
}


@dataclass(frozen=True)
class Tensor:
    """`elements`: row-major; bool, int or float, and for BYTES str, or bytes where they are not UTF-8."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: list[Any]

    def rows(self) -> list[Any]:
        """What the agent is handed: elements, or nested lists of them."""
        items = self.elements
        for size in reversed(self.shape[1:]):
            items = [items[at : at + size] for at in range(0, len(items), size)]
        return items

    def document(self) -> dict[str, Any]:
        """Its description, to which its data or the size of its bytes is added."""
        return {"name": self.name, "datatype": self.datatype, "shape": self.shape}

    def data(self) -> list[Any]:
        """The elements as JSON can hold them. Raises BadInput, as the caller asked for JSON, if some are no text."""
        if self.datatype != "BYTES":
            return self.elements
        try:
            return [element if isinstance(element, str) else element.decode() for element in self.elements]
        except UnicodeDecodeError:
            raise BadInput(f'output "{self.name}" is not text, which JSON cannot hold; ask for it with "binary_data": true') from None

    def to_bytes(self) -> bytes:
        """The elements in binary."""
        if self.datatype != "BYTES":
            return struct.pack(f"<{len(self.elements)}{_FIXED[self.datatype].code}", *self.elements)
        encoded = (element.encode() if isinstance(element, str) else element for element in self.elements)
        return b"".join(len(element).to_bytes(4, "little") + element for element in encoded)


# What a caller sends


def read(entries: Any, binary: bytes | None) -> list[Tensor]:
    """The tensors in a request's "inputs". binary: what follows the JSON, None if the request does not say where that ends.

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
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise BadInput(f'{where}: "datatype" must be one of {", ".join(DATATYPES)}')
    if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_DIMENSIONS or any(type(size) is not int or size < 1 for size in shape):
        raise BadInput(f'{where}: "shape" must be a list of 1 to {MAX_DIMENSIONS} whole numbers above 0, of which the first counts rows')
    size = parameters(entry, where).get("binary_data_size")
    if ("data" in entry) == (size is not None):
        raise BadInput(f'{where}: give either "data" or the parameter "binary_data_size"')
    if size is None:
        return Tensor(name, datatype, tuple(shape), _from_json(where, entry["data"], datatype, shape)), 0
    if type(size) is not int or size < 0:
        raise BadInput(f'{where}: "binary_data_size" must be a number of bytes')
    if binary is None:
        raise BadInput(f'{where}: with "binary_data_size" the header Inference-Header-Content-Length must say where the JSON ends')
    if size > len(binary):
        raise BadInput(f'{where}: "binary_data_size" is {size}, but only {len(binary)} bytes are left in the body')
    return Tensor(name, datatype, tuple(shape), _from_bytes(where, bytes(binary[:size]), datatype, shape)), size


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
            elements = list(chain.from_iterable(elements))
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
    if not types.issuperset(map(type, elements)):
        odd = next(element for element in elements if type(element) not in types)
        raise ValueError(f"an element is {_shown(odd)}, which is no {datatype}")
    if fixed is None:
        return elements
    for extreme in (min(elements), max(elements)):
        if (
            not fixed.low <= extreme <= fixed.high and extreme == extreme and abs(extreme) != math.inf
        ):  # an agent's may be infinite, or none
            raise ValueError(f"{extreme} is out of range for {datatype}")
    return [float(element) for element in elements] if float in types else elements


def _shown(element: Any) -> str:
    if isinstance(element, list | dict):
        return "a list" if isinstance(element, list) else "an object"
    return repr(element)[:60]


def _from_bytes(where: str, data: bytes, datatype: str, shape: Sequence[int]) -> list[Any]:
    count = math.prod(shape)
    if datatype == "BYTES":
        return _texts(where, data, count)
    code = _FIXED[datatype].code
    wanted = count * struct.calcsize("<" + code)
    if len(data) != wanted:
        raise BadInput(f'{where}: shape {list(shape)} of {datatype} is {wanted} bytes, "binary_data_size" is {len(data)}')
    if datatype == "BOOL" and data.translate(None, b"\0\1"):
        raise BadInput(f"{where}: a BOOL is a byte of 0 or 1")
    return list(struct.unpack(f"<{count}{code}", data))


def _texts(where: str, data: bytes, count: int) -> list[str | bytes]:
    found: list[str | bytes] = []
    at = 0
    while at < len(data) and len(found) <= count:
        start = at + 4
        end = start + int.from_bytes(data[at:start], "little")
        if max(start, end) > len(data):
            raise BadInput(f"{where}: element {len(found)} of the BYTES data is cut short")
        found.append(_text(data[start:end]))
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


def rows(tensors: Sequence[Tensor]) -> list[Any]:
    """The agent's inputs: a tensor's rows or, of several tensors, one {name: row} for all their first rows, one for the second, and so on.

    Raises BadInput if the tensors differ in their first dimension.
    """
    if len(tensors) == 1:
        return tensors[0].rows()
    if len({tensor.shape[0] for tensor in tensors}) > 1:
        raise BadInput("all inputs must have the same first dimension, which counts rows")
    return [
        dict(zip([tensor.name for tensor in tensors], row, strict=True)) for row in zip(*(tensor.rows() for tensor in tensors), strict=True)
    ]


# What the agent gives


def from_outputs(outputs: Sequence[Any], spec: TensorSpec) -> Tensor:
    """One row an output, as an agent declares it. Raises ValueError if it does not keep to that."""
    shape, elements, types = _flat(outputs)
    if spec.datatype == "BYTES":
        if not _are_texts(types) or not _is_like(shape, spec.shape):
            shape, elements = (len(outputs),), [_json_text(output) for output in outputs]
    elif spec.datatype in _FIXED:
        elements = _checked(elements, spec.datatype)
    if spec.datatype not in DATATYPES or not _is_like(shape, spec.shape):
        raise ValueError(f"the agent declares output {spec.name!r} as {spec.datatype} {list(spec.shape)}, and gave shape {list(shape)}")
    return Tensor(spec.name, spec.datatype, shape, elements)


def inferred(name: str, outputs: Sequence[Any]) -> Tensor:
    """One row an output, in the datatype that suits them.

    Strings are BYTES; numbers and even lists of them keep an array's datatype or are FP64, INT64 (UINT64) or BOOL; the rest is JSON text.
    """
    shape, elements, types = _flat(outputs)
    datatype = _datatype(outputs, elements, types)
    if datatype == "BYTES" and not _are_texts(types):
        shape, elements = (len(outputs),), [_json_text(output) for output in outputs]
    elif datatype.startswith("FP") and types != {float}:
        elements = [float(element) for element in elements]
    return Tensor(name, datatype, shape, elements)


def _datatype(outputs: Sequence[Any], elements: Sequence[Any], types: set[type]) -> str:
    dtypes = {str(getattr(output, "dtype", None)).rpartition(".")[2] for output in outputs}
    if types <= {bool, int, float} and len(dtypes) == 1 and (known := _OF_DTYPE.get(dtypes.pop())):
        return known
    if types == {bool}:
        return "BOOL"
    if types == {int}:
        low, high = min(elements), max(elements)
        return next((name for name in ("INT64", "UINT64") if _FIXED[name].low <= low and high <= _FIXED[name].high), "BYTES")
    return "FP64" if types and types <= {int, float} else "BYTES"


def _are_texts(types: set[type]) -> bool:
    return bool(types) and types <= {str, bytes}


def _flat(outputs: Sequence[Any]) -> tuple[tuple[int, ...], list[Any], set[type]]:
    """Shape, elements and their types, as deep as all lists of a level have one length; arrays count as lists."""
    shape = [len(outputs)]
    items, types = _plain(list(outputs))
    while types and types <= {list, tuple} and len(set(map(len, items))) == 1:
        shape.append(len(items[0]))
        items, types = _plain(list(chain.from_iterable(items)))
    return tuple(shape), items, types


def _json_text(output: Any) -> str:
    """JSON. Bytes, which it cannot hold, are {"b64": text} as in the V1 protocol. Raises TypeError for what it cannot hold besides."""
    return orjson.dumps(output, default=_base64, option=orjson.OPT_SERIALIZE_NUMPY).decode()


def _base64(value: Any) -> dict[str, str]:
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    raise TypeError(f"the agent's output is not JSON: it holds a {type(value).__name__}")


def _plain(items: list[Any]) -> tuple[list[Any], set[type]]:
    """The same without numpy's and torch's types, and what types are left."""
    types = set(map(type, items))
    if any(hasattr(kind, "tolist") for kind in types):
        items = [item.tolist() if hasattr(item, "tolist") else item for item in items]
        types = set(map(type, items))
    return items, types
