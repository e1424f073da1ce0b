"""What agents give, in plain types: whatever it is, every protocol can write it, or it is refused in words that say what and where."""

import array
import collections
import contextlib
import dataclasses
import enum
import json
import math
import subprocess
import sys
import types
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import orjson
import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from function.values import Unwritable, dumps, plain

KEPT = settings(derandomize=True, deadline=None)


class Colour(enum.Enum):
    RED = "red"
    BOTH = (1, 2)


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: float
    y: float


@dataclasses.dataclass
class Box:
    at: Point
    label: str
    mask: Any = None


class Parsed(pydantic.BaseModel):
    name: str
    when: datetime
    inner: "Parsed | None" = None


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "another"


class Whole(int):
    def __int__(self) -> int:
        return 7


class Real(float):
    def __float__(self) -> float:
        return 7.0


class Raw(bytes):
    def __bytes__(self) -> bytes:
        return b"another"


class Grid(np.ndarray[Any, Any]):
    pass


class LikeArray:
    """As jax's and others' are."""

    def tolist(self) -> list[int]:
        return [1, 2]


class OfNumpy(LikeArray):
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.arange(3, dtype=np.int32)


class OnDevice(LikeArray):
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("implicit conversion is not allowed")


def written(value: Any) -> Any:
    """What a caller reads of it."""
    return orjson.loads(dumps(plain(value)))


def strided() -> Any:
    return np.arange(12.0).reshape(3, 4)[::2, ::-2]


VALUES: list[tuple[str, Any, Any]] = [
    # Python's own
    ("a tuple", (1, ("a", None)), [1, ["a", None]]),
    ("a named tuple", Point(1.5, 2), [1.5, 2]),
    ("a range", range(3), [0, 1, 2]),
    ("a deque", collections.deque([1, (2,)]), [1, [2]]),
    ("views of a dict", [{"a": 1}.keys(), {"a": 1}.values(), {"a": 1}.items()], [["a"], [1], [["a", 1]]]),
    ("a set, sorted", {"pear", "apple", "fig"}, ["apple", "fig", "pear"]),
    ("a frozenset of frozensets", frozenset({frozenset({3, 1}), frozenset({2})}), [[1, 3], [2]]),
    ("a set of this and that", {1, "a", None}, ["a", 1, None]),
    ("a UserDict", collections.UserDict({"a": (1,)}), {"a": [1]}),
    ("an OrderedDict", collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    ("a read-only mapping", types.MappingProxyType({"a": {1}}), {"a": [1]}),
    ("a Counter", collections.Counter("aab"), {"a": 2, "b": 1}),
    ("a UserList", collections.UserList([(1,)]), [[1]]),
    ("a UserString", collections.UserString("a"), "a"),
    ("a dataclass", Box(Point(0, 1), "cat"), {"at": [0, 1], "label": "cat", "mask": None}),
    ("a dataclass with an array", [Box(Point(0, 1), "cat", np.ones((1, 2)))], [{"at": [0, 1], "label": "cat", "mask": [[1.0, 1.0]]}]),
    (
        "a model of pydantic's",
        Parsed(name="a", when=datetime(2030, 1, 2), inner=Parsed(name="b", when=datetime(2030, 1, 2, tzinfo=UTC))),
        {
            "name": "a",
            "when": "2030-01-02T00:00:00",
            "inner": {"name": "b", "when": "2030-01-02T00:00:00+00:00", "inner": None},
        },
    ),
    ("an Enum", [Colour.RED, Colour.BOTH, Level.LOW], ["red", [1, 2], 1]),
    ("times", [datetime(2030, 1, 2, 3, tzinfo=UTC), date(2030, 1, 2), time(3, 4)], ["2030-01-02T03:00:00+00:00", "2030-01-02", "03:04:00"]),
    ("a length of time", timedelta(minutes=1, milliseconds=500), 60.5),
    ("a UUID", uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    ("a path", Path("/a/b"), "/a/b"),
    ("Decimals", [Decimal(3), Decimal("3.00"), Decimal("1E+3"), Decimal("NaN"), Decimal("sNaN")], [3, 3.0, 1000.0, None, None]),
    ("fractions", [Fraction(6, 3), Fraction(1, 4)], [2, 0.25]),
    ("bytes", [b"\xff\xfe", bytearray(b"a"), memoryview(b"abc")[::2]], [{"b64": "//4="}, {"b64": "YQ=="}, {"b64": "YWM="}]),
    ("an array of the standard library", array.array("d", [0.5, 1]), [0.5, 1.0]),
    ("subclasses", [Text("a"), Whole(3), Real(0.5), Raw(b"a")], ["a", 3, 0.5, {"b64": "YQ=="}]),
    ("no numbers", [math.nan, math.inf, -math.inf], [None, None, None]),
    ("the integers that JSON's readers hold", [-(2**63), 2**64 - 1], [-(2**63), 2**64 - 1]),
    # Keys
    ("keys that json writes", {1: "a", 0.5: "b", False: "c", None: "d"}, {"1": "a", "0.5": "b", "false": "c", "null": "d"}),
    ("keys that are no numbers", {math.nan: 1, math.inf: 2}, {"NaN": 1, "Infinity": 2}),
    ("numpy's keys", {np.int64(3): "a", np.str_("b"): "c", np.float32(0.5): "d"}, {"3": "a", "b": "c", "0.5": "d"}),
    ("keys of an Enum", {Colour.RED: 1, Level.LOW: 2}, {"red": 1, "1": 2}),
    ("other keys", {date(2030, 1, 2): 3, Text("a"): 4, "ü": 5}, {"2030-01-02": 3, "a": 4, "ü": 5}),
    # numpy's
    ("a scalar", [np.float64(0.5), np.float32(0.5), np.int16(7), np.uint64(2**64 - 1), np.bool_(True)], [0.5, 0.5, 7, 2**64 - 1, True]),
    ("other scalars", [np.str_("a"), np.bytes_(b"a"), np.longdouble(0.5)], ["a", {"b64": "YQ=="}, 0.5]),
    ("an array without dimensions", np.array(3.5), 3.5),
    ("an object without dimensions", np.array({"a": (1,)}, object), {"a": [1]}),
    ("a transposed array", np.arange(6.0).reshape(2, 3).T, [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]),
    ("a strided array", strided(), [[3.0, 1.0], [11.0, 9.0]]),
    ("a big-endian array", np.array([1, 2], ">i4"), [1, 2]),
    ("an array off its place", np.frombuffer(b"\0" + np.ones(2).tobytes(), np.float64, offset=1), [1.0, 1.0]),
    ("a matrix", np.arange(2).reshape(1, 2).view(np.matrix), [[0, 1]]),
    ("an array of a subclass", np.ones((1, 2), np.float32).view(Grid), [[1.0, 1.0]]),
    ("a masked array", np.ma.masked_array([1.5, 2.5], mask=[True, False]), [None, 2.5]),
    ("a masked array without a mask", np.ma.masked_array([[1, 2]]), [[1, 2]]),
    ("what is masked", np.ma.masked, None),
    ("texts", np.array([["cat"]]), [["cat"]]),
    ("raw texts", np.array([b"cat"]), [{"b64": "Y2F0"}]),
    ("objects", np.array([(1,), None], object), [[1], None]),
    ("records", np.array([(1, 0.5)], "i4,f4"), [[1, 0.5]]),
    ("a record", np.array([(1, 0.5)], "i4,f4")[0], [1, 0.5]),
    ("dates", np.array([["2030-01-02", "NaT"]], "M8[D]"), [["2030-01-02", None]]),
    ("moments", np.datetime64("2030-01-02T03:04:05.000000007"), "2030-01-02T03:04:05.000000007"),
    ("lengths of time", np.array([[1500, "NaT"]], "m8[ms]"), [[1.5, None]]),
    ("long doubles", np.array([0.5, np.inf], np.longdouble), [0.5, None]),
    ("ml_dtypes' arrays", [np.array([1.5], ml_dtypes.bfloat16), np.array([-3], ml_dtypes.int4)], [[1.5], [-3]]),
    ("ml_dtypes' scalars", ml_dtypes.bfloat16(1.5), 1.5),
    ("empty arrays", [np.ones((0,)), np.ones((2, 0)), np.empty((0, 2), "U1")], [[], [[], []], []]),
    # torch's
    ("a tensor", torch.tensor([1.0]), [1.0]),
    ("a tensor without dimensions", torch.tensor(3), 3),
    ("a tensor that remembers how it was made", torch.ones(2, requires_grad=True) * 2, [2.0, 2.0]),
    ("a parameter", torch.nn.Parameter(torch.ones(1)), [1.0]),
    ("a transposed tensor", torch.arange(4).reshape(2, 2).T, [[0, 2], [1, 3]]),
    ("bfloat16", torch.tensor([1.5, 2.5], dtype=torch.bfloat16), [1.5, 2.5]),
    ("bfloat16 without dimensions", torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
    ("float8", torch.tensor([1.5]).to(torch.float8_e4m3fn), [1.5]),
    ("float16", torch.tensor([1.5], dtype=torch.float16), [1.5]),
    ("truth", torch.tensor([True]), [True]),
    ("a sparse tensor", torch.eye(2).to_sparse(), [[1.0, 0.0], [0.0, 1.0]]),
    ("a conjugate's imaginary part", torch.tensor([1 + 2j]).conj().imag, [-2.0]),
    ("a size", torch.ones(2, 3).shape, [2, 3]),
    # Others' arrays
    ("what has tolist", LikeArray(), [1, 2]),
    ("what numpy can read", OfNumpy(), [0, 1, 2]),
    ("what numpy may not read", OnDevice(), [1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("value", "wanted"), [pytest.param(value, wanted, id=name) for name, value, wanted in VALUES])
def test_whatever_pythons_users_return_is_written_as_they_mean_it(value: Any, wanted: Any) -> None:
    found = written(value)
    assert repr(found) == repr(wanted)
    assert repr(written([{"in": value}])) == repr([{"in": wanted}])
    assert all_plain(plain(value))


def all_plain(value: Any) -> bool:
    kind = type(value)
    if kind is np.ndarray:
        flags, dtype = value.flags, value.dtype
        return bool(value.ndim and flags.c_contiguous and flags.aligned and dtype.isnative and dtype.kind in "biuf" and dtype.itemsize <= 8)
    if kind is list:
        return all(map(all_plain, value))
    if kind is dict:
        return all(type(key) is str and all_plain(item) for key, item in value.items())
    return kind in (type(None), bool, int, float, str, bytes)


UNCHANGED: list[Any] = [
    None,
    True,
    3,
    "ü",
    b"\xff",
    [],
    {},
    [0.5] * 384,
    [1, 2.5, None, "ü", b"a", True],
    [[[1, 2], [3, 4]], [[5, 6], [7, 8]]],
    [[], []],
    [[[0] * 500] * 300],  # more than is looked at at once
    [{"a": [1, {"b": None}]}, {"ü": "ü"}],
    np.ones((2, 3), np.float32),
    np.frombuffer(b"abcd", np.uint8),  # read-only
    [np.ones(2), {"a": np.ones(1)}],
]


@pytest.mark.parametrize("value", UNCHANGED, ids=lambda value: repr(value)[:30])
def test_what_is_plain_stays_the_same_object(value: Any) -> None:
    assert plain(value) is value


def cycle(kind: str) -> Any:
    made: Any = {} if kind == "dict" else [] if kind != "objects" else np.array([None, None], object)
    match kind:
        case "dict":
            made["self"] = made
        case "pair":
            made += [made, made]
        case "crowd":
            made += [made] * 1000
        case "mixed":
            made += [1, made]
        case "objects":
            made[0] = made
        case _:
            made.append(made)
    return made


def nested(levels: int, of: Any = 0, wrap: Any = lambda inner: [inner]) -> Any:
    for _ in range(levels):
        of = wrap(of)
    return of


class Opaque:
    pass


def numbers() -> Iterator[int]:
    yield 1


HALF = "is a string with a lone surrogate, which is no Unicode text"
WIDE = "is an integer beyond 64 bits, which JSON's readers cannot hold"
TWO_PARTS = "which JSON cannot hold; give real and imaginary parts"
CYCLES = ("list", "dict", "pair", "crowd", "mixed", "objects")
REFUSED: list[tuple[str, Any, str]] = [
    ("an object", Opaque(), f"output is of type {__name__}.Opaque, which JSON cannot hold"),
    ("an object inside", [{"a": [1, Opaque()]}], f'output[0]["a"][1] is of type {__name__}.Opaque, which JSON cannot hold'),
    ("a function", len, "output is of type builtin_function_or_method, which JSON cannot hold"),
    ("a class", [dict], "output[0] is of type type, which JSON cannot hold"),
    ("a generator", [numbers()], "output[0] is of type generator, which can be read only once and may have no end; give a list"),
    ("an iterator", iter([1]), "output is of type list_iterator, which can be read only once and may have no end; give a list"),
    ("a large integer", [1, 2**64], f"output[1] {WIDE}"),
    ("a large negative integer", [0.5, -(2**63) - 1], f"output[1] {WIDE}"),
    ("a large integer beside nan", [math.nan, 2**64], f"output[1] {WIDE}"),
    ("a large integer in a dict", {"a": 2**64}, f'output["a"] {WIDE}'),
    ("a large Decimal", Decimal(2**64), f"output {WIDE}"),
    ("half a character", ["a", "\ud83d"], f"output[1] {HALF}"),
    ("two halves", ["\ud83d", "\ude00"], f"output[0] {HALF}"),
    ("half a character in a key", {"\ud83d": 1}, f"output has a key that {HALF}"),
    ("half a character in numpy's text", np.array(["\ud83d"]), f"output[0] {HALF}"),
    ("a complex number", [1j], "output[0] is of type complex, which JSON cannot hold"),
    ("complex numbers", np.ones(2, complex), f"output is an array of complex128, {TWO_PARTS}"),
    ("a complex number of numpy's", np.complex64(1), f"output is an array of complex64, {TWO_PARTS}"),
    ("torch's complex numbers", torch.ones(2, dtype=torch.cfloat), f"output is an array of complex64, {TWO_PARTS}"),
    ("a tensor without values", torch.ones(2, device="meta"), "output is a tensor on the device meta, which has no values"),
    ("months", np.array([1], "m8[M]"), "output is an array of timedelta64[M], which is no certain number of seconds"),
    ("keys that become the same", {1: 1, "1": 2}, 'output has two keys that both become "1"'),
    ("a tuple as key", {(1, 2): 3}, "output has a key of type tuple, which no text stands for"),
    ("bytes as key", {b"a": 3}, "output has a key of type bytes, which no text stands for"),
    ("a field of a dataclass", Box(Point(0, 1), "a", Opaque()), f'output["mask"] is of type {__name__}.Opaque, which JSON cannot hold'),
    *((f"a cycle ({kind})", cycle(kind), "is nested more than 200 levels deep, or holds itself") for kind in CYCLES),
    ("too many levels", nested(201), "is nested more than 200 levels deep"),
    ("too many dimensions", nested(199, np.ones((1, 1))), "is nested more than 200 levels deep"),
    ("too many levels of objects", nested(201, wrap=lambda inner: Box(Point(0, 0), "", inner)), "is nested more than 200 levels deep"),
    ("too many levels of arrays", nested(201, wrap=lambda inner: np.array([inner, None], object)), "is nested more than 200 levels deep"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), [pytest.param(value, message, id=name) for name, value, message in REFUSED])
def test_what_cannot_be_written_is_refused_and_the_text_says_where_and_what(value: Any, message: str) -> None:
    with pytest.raises(Unwritable) as found:
        plain(value)
    text = str(found.value)
    assert text == message or (message in text and ("nested" in message))
    assert len(text) < 200


def test_the_text_is_short_whatever_the_keys_are() -> None:
    value: Any = type("O" * 500, (), {})()
    for _ in range(150):
        value = {"k" * 300: [value]}
    with pytest.raises(Unwritable) as found:
        plain(value)
    assert len(str(found.value)) < 200


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_what_an_agents_own_values_raise_is_passed_on(kind: type[BaseException]) -> None:
    class Strange:
        def tolist(self) -> Any:
            raise kind("mine")

    with pytest.raises(kind, match="mine"):
        plain([Strange()])


def test_a_value_that_turns_into_itself_is_refused_like_one_that_holds_itself() -> None:
    class Strange:
        def tolist(self) -> Any:
            return self

        model_dump = tolist

    with pytest.raises(Unwritable, match="holds itself"):
        plain(Strange())


WRAPS = [
    pytest.param(lambda inner: [inner], id="lists"),
    pytest.param(lambda inner: {"a": inner}, id="dicts"),
    pytest.param(lambda inner: [0, {"a": inner}], id="lists of dicts"),
    pytest.param(lambda inner: (inner,), id="tuples"),
    pytest.param(lambda inner: collections.UserList([inner]), id="sequences"),
]


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_is_as_deep_as_allowed_can_be_written_with_fifty_levels_around_it(wrap: Any) -> None:
    deepest: Any = b"a"
    for levels in range(1, 202):
        value = nested(levels, b"a", wrap)
        try:
            deepest = plain(value)
        except Unwritable:
            break
    assert levels in (101, 201)  # two levels a wrap, or one
    assert dumps(nested(50, deepest)).endswith(b"]" * 50)


def test_arrays_count_their_dimensions() -> None:
    value = plain(nested(136, np.ones((1,) * 64)))
    assert json.loads(dumps(nested(50, value)))


def test_a_set_is_written_in_the_same_order_by_each_process() -> None:
    code = "from function.values import *; print(dumps(plain([{'a', 'b', 'c'}, {1, 'a', None, 0.5}, {('b', 1), ('a', 2)}])).decode())"
    found = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, text=True, capture_output=True, check=True).stdout
        for seed in ("1", "2", "3", "4")
    }
    assert found == {'[["a","b","c"],["a",0.5,1,null],[["a",2],["b",1]]]\n'}


def test_neither_numpy_nor_torch_is_imported() -> None:
    code = "import sys; from function.values import *; plain({'a': ({1}, b'')}); print({'numpy', 'torch'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout == "set()\n"


def test_without_numpy_torchs_tensors_are_written_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def numpy(self: Any, *, force: bool) -> Any:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    assert plain([torch.ones(1, 2), torch.tensor(2)]) == [[[1.0, 1.0]], 2]


# Anything


def pairs(scalars: st.SearchStrategy[tuple[Any, Any]]) -> st.SearchStrategy[tuple[Any, Any]]:
    """Values with what a caller is to read of them."""

    def around(inner: st.SearchStrategy[tuple[Any, Any]]) -> st.SearchStrategy[tuple[Any, Any]]:
        several = st.lists(inner, max_size=4)
        kinds = st.sampled_from([list, tuple, collections.deque, collections.UserList])
        lists = st.builds(lambda kind, found: (kind(value for value, _ in found), [wanted for _, wanted in found]), kinds, several)
        mappings = st.sampled_from([dict, collections.OrderedDict, collections.UserDict])
        keyed = st.dictionaries(st.text(max_size=4), inner, max_size=4)
        dicts = st.builds(
            lambda kind, found: (
                kind({key: value for key, (value, _) in found.items()}),
                {key: wanted for key, (_, wanted) in found.items()},
            ),
            mappings,
            keyed,
        )
        return (
            lists | dicts | st.builds(lambda found: (Box(Point(0, 0), "", found[0]), {"at": [0, 0], "label": "", "mask": found[1]}), inner)
        )

    return st.recursive(scalars, around, max_leaves=12)


def array_pair(found: Any) -> tuple[Any, Any]:
    return found, [[None if isinstance(item, float) and not math.isfinite(item) else item for item in row] for row in found.tolist()]


DTYPES = st_numpy.boolean_dtypes() | st_numpy.integer_dtypes(endianness="?") | st_numpy.floating_dtypes(endianness="?", sizes=(64,))
ARRAYS = st_numpy.arrays(DTYPES, st_numpy.array_shapes(min_dims=2, max_dims=2, max_side=4))
TURNED = st.sampled_from([lambda found: found, lambda found: found.T, lambda found: found[::-1, ::2], np.asfortranarray])
SAME = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = (
    SAME.map(lambda value: (value, value))
    | st.sampled_from([math.nan, math.inf]).map(lambda value: (value, None))
    | st.integers(-(2**63), 2**63 - 1).map(lambda value: (np.int64(value), value))
    | st.builds(lambda turn, found: array_pair(turn(found)), TURNED, ARRAYS)
)


@KEPT
@given(pairs(SCALARS))
def test_anything_made_of_these_is_read_as_it_was_meant(pair: tuple[Any, Any]) -> None:
    value, wanted = pair
    made = plain(value)
    assert all_plain(made)
    assert orjson.loads(dumps(made)) == wanted
    assert plain(made) is made


JUNK = st.recursive(
    st.none()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=()), max_size=4)
    | st.binary(max_size=4)
    | st.decimals()
    | st.fractions()
    | st.datetimes()
    | st.timedeltas()
    | st.uuids()
    | st.sampled_from([len, Opaque, Opaque(), numbers, iter(()), Colour.RED, np.ma.masked, ..., NotImplemented, sys, 10**400])
    | st_numpy.from_dtype(np.dtype("M8[s]"))
    | st_numpy.arrays(st_numpy.scalar_dtypes(), st_numpy.array_shapes(min_dims=0, max_side=2))
    | st_numpy.arrays(st_numpy.array_dtypes() | st_numpy.nested_dtypes(), st_numpy.array_shapes(max_side=2)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.none() | st.integers() | st.floats() | st.text(max_size=2) | st.tuples() | st.binary(max_size=1), inner, max_size=3
        )
        | st.tuples(inner, inner)
        | st.builds(Box, st.builds(Point, inner, inner), st.text(), inner)
    ),
    max_leaves=12,
)


@settings(KEPT, max_examples=200)
@given(JUNK)
def test_whatever_it_is_it_can_be_written_or_is_refused(value: Any) -> None:
    with contextlib.suppress(Unwritable):
        made = plain(value)
        assert all_plain(made)
        assert orjson.loads(dumps(nested(50, made)))
