"""What an agent gives, as values that every protocol writes alike.

agent → `plain` (in the model's thread, before anybody else touches the value) → the protocol's document → `dumps`. Plain are None, bool,
int of 64 bits, float, str, bytes, list, dict with str keys, and arrays that can be written as they lie in memory: exactly `numpy.ndarray`,
of one dimension at least, C-contiguous, aligned, in native byte order, of bool, integers or floats of at most 8 bytes. All else becomes
that, or is Unwritable. Neither numpy nor torch is imported: whoever gives their values has done so.
"""

import base64
import dataclasses
import json
import math
import operator
import sys
from collections import UserString
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView, Sequence, Set
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from itertools import chain
from pathlib import PurePath
from typing import Any
from uuid import UUID

import orjson

MAX_DEPTH = 200  # levels of lists, objects and an array's dimensions; an answer adds some, and 254 are the most that orjson writes
_LEAST, _MOST = -(2**63), 2**64 - 1  # integers that orjson writes
_AT_ONCE = 2**16  # items of lists that are looked at together
_LEVELS = 8  # of lists that are; a list that holds itself a few times would grow without end
_SETTLED = frozenset({type(None), bool, float, bytes})  # plain, whatever they are
_SCALARS = _SETTLED | {int, str}


class Unwritable(ValueError):
    """A value that no protocol can write; its text says which one and why, in less than 200 characters."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self._steps: list[str] = []  # from the value outwards

    def inside(self, step: str) -> None:
        """Note what the value was found in: an index or a key, in brackets."""
        self._steps.append(step if len(step) <= 40 else f"{step[:37]}…{step[-2:]}")

    def __str__(self) -> str:
        where = "output" + "".join(reversed(self._steps))
        return f"{where if len(where) <= 90 else f'{where[:50]}…{where[-39:]}'} {self.reason[:108]}"


_TOO_DEEP = f"is nested more than {MAX_DEPTH} levels deep, or holds itself"


def plain(value: Any) -> Any:
    """The value in plain types: the same object where nothing was to change.

    Raises Unwritable, and whatever the value's own methods raise.
    """
    try:
        return _plain(value, 0)
    except RecursionError:  # levels that need more than a call or two each
        raise Unwritable(_TOO_DEEP) from None


def dumps(document: Any) -> bytes:
    """JSON of plain values and what a protocol wraps around them, up to 50 levels of it.

    Bytes are {"b64": text}, as the V1 protocol has them; floats that are no number, or infinite, are null.
    """
    return orjson.dumps(document, default=_base64, option=orjson.OPT_SERIALIZE_NUMPY)


def _base64(value: Any) -> dict[str, str]:
    if type(value) is bytes:
        return {"b64": base64.b64encode(value).decode()}
    raise TypeError(f"a {type(value).__name__} is not plain")


def _plain(value: Any, depth: int) -> Any:
    """depth: how many levels it is in."""
    kind = type(value)
    if kind in _SETTLED:
        return value
    convert = _CONVERSIONS.get(kind)
    return convert(value, depth) if convert else _foreign(value, kind, depth)


# Python's own


def _int(value: int, _: int) -> int:
    if not _LEAST <= value <= _MOST:
        raise Unwritable("is an integer beyond 64 bits, which JSON's readers cannot hold")
    return value


def _str(value: str, _: int) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Unwritable("is a string with a lone surrogate, which is no Unicode text") from None
    return value


def _list(items: list[Any], depth: int) -> list[Any]:
    found = _is_plain(items, _LEVELS) if depth + _LEVELS <= MAX_DEPTH else None
    return items if found else _each(items, depth, _plain if found is False else _one_by_one)


def _one_by_one(value: Any, depth: int) -> Any:
    """As `_plain`, for what is in lists that are too deep to be looked at together: it would be tried again on each level."""
    return _each(value, depth, _one_by_one) if type(value) is list else _plain(value, depth)


def _is_plain(items: list[Any], levels: int) -> bool | None:
    """Whether these are plain scalars, or lists of them that are all of one depth; at the speed of C.

    None if that takes more levels to tell.
    """
    while levels > 0:
        kinds = set(map(type, items))
        if kinds != {list}:
            return kinds <= _SCALARS and _are_writable(items, kinds)
        if len(items) == 1:
            (items,) = items
        elif sum(map(len, items)) > _AT_ONCE:
            half = len(items) // 2
            return _is_plain(items[:half], levels) and _is_plain(items[half:], levels)  # the first one that is not True
        else:
            items = list(chain.from_iterable(items))
        levels -= 1
    return None


def _are_writable(items: Iterable[Any], kinds: set[type]) -> bool:
    """Whether scalars are plain. kinds: their types."""
    if int in kinds:
        numbers = items if kinds == {int} else [item for item in items if type(item) is int]
        if not _LEAST <= min(numbers) <= max(numbers) <= _MOST:
            return False
    if str in kinds:
        texts = items if kinds == {str} else [item for item in items if type(item) is str]
        if not all(map(str.isascii, texts)):
            try:
                "".join(texts).encode()
            except UnicodeEncodeError:
                return False
    return True


def _each(items: Iterable[Any], depth: int, convert: Callable[[Any, int], Any] = _plain) -> list[Any]:
    """A list of them, the same one if nothing changed."""
    if depth >= MAX_DEPTH:
        raise Unwritable(_TOO_DEEP)
    made: list[Any] = []
    try:
        for item in items:
            made.append(convert(item, depth + 1))  # noqa: PERF401  how many were made says where it went wrong
    except Unwritable as error:
        error.inside(f"[{len(made)}]")
        raise
    return items if type(items) is list and all(map(operator.is_, made, items)) else made


def _sorted(items: Iterable[Any], depth: int) -> list[Any]:
    """Of a set, whose order is another one in each process."""
    made = _each(items, depth)
    try:
        return sorted(made)
    except (TypeError, ValueError):  # not all of one kind; arrays
        return sorted(made, key=dumps)


def _dict(value: dict[Any, Any], depth: int) -> dict[str, Any]:
    if depth >= MAX_DEPTH:
        raise Unwritable(_TOO_DEEP)
    for key, item in value.items():  # most have a few scalars
        kind = type(item)
        is_plain = kind in _SETTLED or (kind is str and item.isascii()) or (kind is int and _LEAST <= item <= _MOST)
        if not is_plain or type(key) is not str or not key.isascii():
            break
    else:
        return value
    made = _pairs(value.items(), depth)
    return value if all(map(operator.is_, made, value)) and all(map(operator.is_, made.values(), value.values())) else made


def _pairs(pairs: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
    if depth >= MAX_DEPTH:
        raise Unwritable(_TOO_DEEP)
    made: dict[str, Any] = {}
    for key, item in pairs:
        name = key if type(key) is str and key.isascii() else _name(key)
        if name in made:
            raise Unwritable(f'has two keys that both become "{name[:40]}"')
        try:
            made[name] = _plain(item, depth + 1)
        except Unwritable as error:
            error.inside(f'["{name}"]')
            raise
    return made


def _name(key: Any) -> str:
    """A key as the standard library's json writes it."""
    try:
        made = _plain(key, 0)
    except Unwritable as error:
        raise Unwritable(f"has a key that {error.reason}") from None
    if type(made) is str:
        return made
    if type(made) not in (bool, int, float, type(None)):
        raise Unwritable(f"has a key of type {_title(type(key))}, which no text stands for")
    return json.dumps(made)


_CONVERSIONS: dict[type, Callable[[Any, int], Any]] = {
    int: _int,
    str: _str,
    list: _list,
    dict: _dict,
    tuple: lambda value, depth: _list(list(value), depth),
    set: _sorted,
    frozenset: _sorted,
}


# Everything else


def _foreign(value: Any, kind: type, depth: int) -> Any:
    """The same of any other type; what it is turned into is looked at in its turn, a level further in, so that this ends."""
    if (numpy := _loaded("numpy", "ndarray")) and isinstance(value, numpy.ndarray | numpy.generic):
        return _of_numpy(value, depth, numpy)
    if (torch := _loaded("torch", "Tensor")) and isinstance(value, torch.Tensor):
        return _of_torch(value, depth, torch)
    for kinds, simpler in _SIMPLER:
        if isinstance(value, kinds):
            return _plain(simpler(value), depth + 1)
    if isinstance(value, Mapping):
        return _pairs(value.items(), depth)
    if dataclasses.is_dataclass(kind):
        return _pairs(((field.name, getattr(value, field.name)) for field in dataclasses.fields(kind)), depth)
    if hasattr(kind, "model_dump"):  # pydantic's
        return _plain(value.model_dump(), depth + 1)
    if hasattr(kind, "tolist"):
        return _of_array(value, kind, depth)
    if isinstance(value, set | frozenset):
        return _sorted(value, depth)
    if isinstance(value, Sequence | Set | MappingView):
        items: Any = value
        return _list(list(items), depth)
    raise Unwritable(_refusal(value, kind))


def _loaded(module: str, name: str) -> Any:
    """A module, if it is imported, so far at least that it has this name; None if not."""
    found = sys.modules.get(module)
    return found if hasattr(found, name) else None


def _decimal(value: Decimal) -> int | float:
    """An int only if it is written as one: 1.0 and 1E+3 are real."""
    if value.is_snan():
        return math.nan
    return int(value) if value.as_tuple().exponent == 0 else float(value)


# Asked in this order, as some are of several: a str may be an Enum.
_SIMPLER: tuple[tuple[type | tuple[type, ...], Callable[[Any], Any]], ...] = (
    (Enum, lambda value: value.value),
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    ((bytes, bytearray, memoryview), lambda value: memoryview(value).tobytes()),
    (timedelta, timedelta.total_seconds),
    ((date, time), lambda value: value.isoformat()),
    ((UUID, PurePath, UserString), str),
    (Decimal, _decimal),
    (Fraction, lambda value: value.numerator if value.denominator == 1 else float(value)),
)


def _title(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"[:60].removeprefix("builtins.")


def _refusal(value: Any, kind: type) -> str:
    if isinstance(value, Iterator):
        return f"is of type {_title(kind)}, which can be read only once and may have no end; give a list"
    return f"is of type {_title(kind)}, which JSON cannot hold"


# Arrays


def _of_numpy(value: Any, depth: int, numpy: Any) -> Any:
    if (masked := _loaded("numpy.ma", "MaskedArray")) and isinstance(value, masked.MaskedArray) and masked.is_masked(value):
        return _plain(value.tolist(), depth)  # None for what is masked
    value = numpy.asarray(value)  # a scalar's, a subclass's
    if value.ndim:
        return _of_ndarray(value, depth, numpy)
    if _is_writable(value.dtype):
        return value.item()
    made = _of_ndarray(value.reshape(1), depth, numpy)
    return made[0].item() if type(made) is numpy.ndarray else made[0]


def _of_ndarray(value: Any, depth: int, numpy: Any) -> Any:
    if depth + value.ndim > MAX_DEPTH:
        raise Unwritable(_TOO_DEEP)
    dtype = value.dtype
    if _is_writable(dtype):
        is_as_wanted = value.flags.c_contiguous and value.flags.aligned and dtype.isnative
        return value if is_as_wanted else numpy.array(value, dtype.newbyteorder("="), order="C")
    return _plain(_other(value, dtype, numpy), depth)


def _is_writable(dtype: Any) -> bool:
    return dtype.kind in "biuf" and dtype.itemsize <= 8


def _other(value: Any, dtype: Any, numpy: Any) -> Any:
    """An array of what neither JSON nor numpy's own buffers have for it: another array, or lists."""
    match dtype.kind:
        case "f":  # longdouble
            with numpy.errstate(over="ignore"):
                return value.astype(numpy.float64, order="C")
        case "c":
            raise Unwritable(f"is an array of {dtype}, which JSON cannot hold; give real and imaginary parts")
        case "M":
            return numpy.where(numpy.isnat(value), None, numpy.datetime_as_string(value)).tolist()
        case "m":
            if numpy.datetime_data(dtype)[0] in ("Y", "M", "generic"):
                raise Unwritable(f"is an array of {dtype}, which is no certain number of seconds")
            return value / numpy.timedelta64(1, "s")
        case "V" if not issubclass(dtype.type, numpy.void):  # ml_dtypes: bfloat16, float8, int4
            return value.astype(numpy.int64 if numpy.can_cast(dtype, numpy.int64) else numpy.float32, order="C")
    return value.tolist()


def _of_torch(value: Any, depth: int, torch: Any) -> Any:
    if value.is_nested:
        return _each(value.unbind(), depth)
    if value.is_meta:
        raise Unwritable("is a tensor on the device meta, which has no values")
    value = value.detach()
    if value.layout is not torch.strided:
        value = value.to_dense()
    if value.is_quantized:
        value = value.dequantize()
    if value.is_floating_point() and value.dtype not in (torch.float16, torch.float32, torch.float64):
        value = value.float()  # bfloat16 and float8, which numpy has none of
    try:
        made = value.numpy(force=True)
    except RuntimeError:  # numpy is not installed; or something else, which comes again
        made = value.tolist()
    return _plain(made, depth)


def _of_array(value: Any, kind: type, depth: int) -> Any:
    """Of anything that is like an array: by way of numpy, which may not have to copy it, or as lists."""
    if hasattr(kind, "__array__") and (numpy := _loaded("numpy", "asarray")):
        try:
            return _of_numpy(numpy.asarray(value), depth, numpy)
        except TypeError:  # cupy's, which wants to be asked for a copy
            pass
    return _plain(value.tolist(), depth + 1)
