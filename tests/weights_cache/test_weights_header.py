"""The safetensors header: what the library writes is read as it was meant, and a lie is told from the truth before it costs anything."""

import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tests.weights_cache.conftest import noise
from weights_cache.errors import HeaderError
from weights_cache.safetensors_header import DTYPE_BITS, TensorInfo, read_header


def reader(data: bytes, asked: list[tuple[int, int]] | None = None) -> Callable[[int, int], bytes]:
    def read(start: int, stop: int) -> bytes:
        if asked is not None:
            asked.append((start, stop))
        assert 0 <= start <= stop <= len(data)
        return data[start:stop]

    return read


def parse(data: bytes) -> list[TensorInfo]:
    return read_header(reader(data), len(data), "m.safetensors")


def file_of(header: Any, data_bytes: int = 0) -> bytes:
    """A file with this header (JSON, or the very bytes) before `data_bytes` bytes of tensors."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data_bytes)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# The truth


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param({}, id="none"),
        pytest.param({"a": torch.arange(6.0).reshape(2, 3)}, id="one"),
        pytest.param({"b": torch.ones(5, dtype=torch.uint8), "a": torch.arange(3), "c": torch.zeros(2, 2).half()}, id="several dtypes"),
        pytest.param({"scalar": torch.tensor(1.5), "none": torch.empty(0, 7), "x": torch.ones(1)}, id="a scalar and one without elements"),
        pytest.param({"重み.0": torch.ones(2), "with space\n": torch.ones(3)}, id="odd names"),
    ],
)
def test_what_the_library_writes_is_found_where_it_wrote_it(tensors: dict[str, torch.Tensor]) -> None:
    data = save(tensors)
    found = parse(data)
    assert {tensor.name: (tensor.shape, data[tensor.start : tensor.stop]) for tensor in found} == {
        name: (tuple(tensor.shape), bytes(tensor.reshape(-1).view(torch.uint8).tolist())) for name, tensor in tensors.items()
    }


def test_tensors_come_in_file_order_whatever_the_order_of_the_header() -> None:
    data = file_of({"late": entry(offsets=(8, 16)), "early": entry(offsets=(0, 8))}, 16)
    assert [tensor.name for tensor in parse(data)] == ["early", "late"]


def test_offsets_are_counted_from_the_start_of_the_file() -> None:
    data = file_of({"a": entry()}, 8)
    assert parse(data) == [TensorInfo("a", "F32", (2,), len(data) - 8, len(data))]


def test_metadata_is_no_tensor() -> None:
    assert parse(save({"a": torch.ones(1)}, metadata={"format": "pt"}))[0].name == "a"


def test_half_bytes_count_when_they_add_up() -> None:
    assert parse(file_of({"a": entry("F4", [3, 2], [0, 3]), "b": entry("F6_E2M3", [4], [3, 6])}, 6))[1].shape == (4,)


def test_nothing_beyond_the_header_is_read() -> None:
    data = save({"a": torch.ones(1000)})
    asked: list[tuple[int, int]] = []
    read_header(reader(data, asked), len(data), "m")
    assert asked == [(0, 8), (8, len(data) - 4000)]


# Lies

LIES = [
    pytest.param(b"", "0 bytes are too few", id="an empty file"),
    pytest.param(b"\2\0\0\0\0\0\0", "7 bytes are too few", id="not even a length"),
    pytest.param((100).to_bytes(8, "little") + b"{}", "header of 100 bytes, but the file has 10", id="a header longer than the file"),
    pytest.param(b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes", id="a header longer than anything"),
    pytest.param(b"PK\3\4" + bytes(20), "header of", id="a zip file"),
    pytest.param(file_of(b""), "not JSON", id="no header"),
    pytest.param(file_of(b"{"), "not JSON", id="half a header"),
    pytest.param(file_of(b'{"a": \xff\xfe}'), "not JSON", id="bytes that are no text"),
    pytest.param(file_of(b"[" * 200_000), "not JSON", id="nested without end"),
    pytest.param(file_of(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON", id="a number without end"),
    pytest.param(file_of([]), "not a JSON object", id="a list"),
    pytest.param(file_of(None), "not a JSON object", id="null"),
    pytest.param(file_of(b'{"a": 1, "a": 2}'), "twice", id="one name twice"),
    pytest.param(file_of(b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [], "data_offsets": [0, 1]}}', 1), "twice", id="one key twice"),
    pytest.param(file_of({"a": 1}), "tensor 'a' lacks", id="a tensor that is a number"),
    pytest.param(file_of({"a": {"dtype": "F32", "shape": [2]}}, 8), "tensor 'a' lacks", id="no offsets"),
    pytest.param(file_of({"a": entry("F33")}, 8), "dtype 'F33'; known are", id="an unknown dtype"),
    pytest.param(file_of({"a": entry(["F32"])}, 8), "dtype ['F32']", id="a dtype that is a list"),
    pytest.param(file_of({"a": entry(shape=[-2])}, 8), "shape [-2]", id="a negative dimension"),
    pytest.param(file_of({"a": entry(shape=[-2, -1])}, 8), "shape [-2, -1]", id="two that multiply to a positive"),
    pytest.param(file_of({"a": entry(shape=[2.0])}, 8), "shape [2.0]", id="a fractional dimension"),
    pytest.param(file_of({"a": entry("U8", [True], [0, 1])}, 1), "shape [True]", id="a dimension that is true"),
    pytest.param(file_of({"a": entry(shape="2")}, 8), "shape '2'", id="a shape that is text"),
    pytest.param(file_of({"a": entry(shape=[1 << 63, 0], offsets=[0, 0])}), "shape [9223372036854775808, 0]", id="a boundless dimension"),
    pytest.param(file_of({"a": entry(shape=[1 << 62] * 20)}, 8), "a product below 2^63", id="a product that no float can hold"),
    pytest.param(file_of({"a": entry(shape=[1 << 62] * 500)}, 8), "a product below 2^63", id="a product that cannot be printed"),
    pytest.param(file_of({"a": entry(shape=[1 << 62, 4, 0], offsets=[0, 0])}), "a product below 2^63", id="a product that 0 makes small"),
    pytest.param(file_of({"a": entry(offsets=[0, 8, 16])}, 8), "data_offsets [0, 8, 16]", id="three offsets"),
    pytest.param(file_of({"a": entry(offsets=[-8, 0])}, 8), "data_offsets [-8, 0]", id="an offset before the data"),
    pytest.param(file_of({"a": entry(offsets=[8, 0])}, 8), "takes 8 bytes, its offsets [8, 0] span -8", id="offsets the wrong way round"),
    pytest.param(file_of({"a": entry(offsets=["0", "8"])}, 8), "data_offsets ['0', '8']", id="offsets that are text"),
    pytest.param(file_of({"a": entry(shape=[3])}, 8), "takes 12 bytes, its offsets [0, 8] span 8", id="a shape too large for its bytes"),
    pytest.param(file_of({"a": entry("F4", [3], [0, 1])}, 1), "takes 1.5 bytes, its offsets [0, 1] span 1", id="half a byte too many"),
    pytest.param(file_of({"a": entry(shape=[0], offsets=[int("9" * 4300)] * 2)}), "data_offsets", id="an offset that grows past printing"),
    pytest.param(file_of({"a": entry(offsets=[4, 12])}, 12), "overlap or leave a gap", id="a gap at the start"),
    pytest.param(file_of({"a": entry(), "b": entry(offsets=[12, 20])}, 20), "'b' begins at byte", id="a gap between two"),
    pytest.param(file_of({"a": entry(), "b": entry(offsets=[4, 12])}, 12), "'b' begins at byte", id="an overlap"),
    pytest.param(file_of({"a": entry(), "b": entry()}, 8), "overlap or leave a gap", id="the same bytes twice"),
    pytest.param(file_of({"a": entry()}, 7), "the tensors end at byte", id="a file cut short"),
    pytest.param(file_of({"a": entry()}, 9), "the tensors end at byte", id="a byte too many"),
    pytest.param(file_of({}, 1), "the tensors end at byte", id="bytes of no tensor"),
]


@pytest.mark.parametrize(("data", "reason"), LIES)
def test_a_header_that_does_not_describe_its_file_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(HeaderError, match=r"^m\.safetensors: ") as caught:
        parse(data)
    assert reason in str(caught.value)


def test_a_length_beyond_the_formats_cap_is_refused_unread_even_if_the_file_has_it() -> None:
    def read(start: int, stop: int) -> bytes:
        assert (start, stop) == (0, 8)
        return (100_000_001).to_bytes(8, "little")

    with pytest.raises(HeaderError, match="100000000 are allowed"):
        read_header(read, 1 << 40, "m")


# Whatever else may come

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
DIMENSION = st.integers(0, 4) | st.sampled_from([1 << 31, 1 << 62, 1 << 63, -1])
ALMOST_AN_ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BITS, "F33"]) | JSON,
        "shape": st.lists(DIMENSION, max_size=30) | JSON,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | JSON,
    },
)
ALMOST_A_HEADER = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ALMOST_AN_ENTRY | JSON, max_size=4)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A real file with a few bytes changed, most of them in its header, and perhaps its end cut off."""
    data = bytearray(save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int8), "c": torch.empty(0)}))
    for at, byte in draw(st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), max_size=4)):
        data[at % len(data)] = byte
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


@settings(derandomize=True, deadline=None, max_examples=500)
@given(
    st.binary(max_size=64)
    | st.builds(file_of, st.binary(max_size=64), st.integers(0, 40))
    | st.builds(file_of, ALMOST_A_HEADER | JSON, st.integers(0, 40))
    | damaged_files()
)
def test_any_file_is_either_described_to_the_last_byte_or_refused(data: bytes) -> None:
    try:
        tensors = parse(data)
    except HeaderError:
        return
    at = 8 + int.from_bytes(data[:8], "little")
    for tensor in tensors:
        assert tensor.start == at
        at = tensor.stop
    assert at == len(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff\xff\xff\xff\0\0\0\0" + bytes(100), id="a header of 4 GiB"),
        pytest.param((100_000_000).to_bytes(8, "little") + bytes(100), id="the longest header allowed"),
        pytest.param(file_of({"a": entry("U8", [1 << 40], [0, 1 << 40])}), id="a tensor of a terabyte"),
        pytest.param(file_of({"a": entry("U8", [1 << 62, 1 << 62, 0], [0, 0])}), id="dimensions beyond all memory"),
    ],
)
def test_a_lie_about_sizes_costs_no_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        parse(data)
    except HeaderError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 200_000


def seconds(data: bytes) -> float:
    """The processor time to refuse it, the best of three."""
    took = []
    for _ in range(3):
        began = time.thread_time()
        with pytest.raises(HeaderError):
            parse(data)
        took.append(time.thread_time() - began)
    return min(took)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(lambda count: entry(shape=[1 << 62] * count), id="a shape of large numbers"),
        pytest.param(lambda count: entry(shape=[1] * count), id="a shape of ones"),
        pytest.param(lambda count: entry(shape=[0] * count), id="a shape of noughts"),
        pytest.param(lambda count: entry(offsets=[1 << 62] * count), id="offsets"),
        pytest.param(lambda count: entry(dtype=[1 << 62] * count), id="a dtype"),
    ],
)
def test_time_grows_no_faster_than_the_header(numbers: Callable[[int], dict[str, Any]]) -> None:
    few, many = (file_of({"a": numbers(count)}, 8) for count in (10_000, 80_000))
    assert seconds(many) < 25 * seconds(few) + 0.02  # by its square it would be 64 times


LONG = "very long " * 10_000


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(file_of({LONG: 1}), id="a name"),
        pytest.param(file_of({LONG: entry(offsets=(4, 12))}, 12), id="a name with a gap"),
        pytest.param(file_of({"a\n" * 10_000: 1}), id="a name of many lines"),
        pytest.param(file_of({"a": entry(LONG)}, 8), id="a dtype"),
        pytest.param(file_of({"a": entry({LONG: [[[[LONG]]]]})}, 8), id="a dtype that is something else"),
        pytest.param(file_of({"a": entry(shape=LONG)}, 8), id="a shape"),
        pytest.param(file_of({"a": entry(shape=[LONG] * 100)}, 8), id="a shape of texts"),
        pytest.param(file_of({"a": entry(shape=[1 << 62] * 64)}, 8), id="a shape of numbers"),
        pytest.param(file_of({"a": entry(shape=[1] * 63 + [3])}, 8), id="a shape of other bytes"),
        pytest.param(file_of({"a": entry(offsets=[10**4000] * 2)}, 8), id="offsets"),
        pytest.param(file_of({"a": entry(), "b" * 10_000: entry()}, 8), id="an overlap"),
        pytest.param(file_of(b'{"' + b"a" * 10_000 + b'": 1, ' * 2 + b"}"), id="no JSON"),
    ],
)
def test_a_reason_is_of_some_hundred_signs_and_one_line_whatever_the_header_says(data: bytes) -> None:
    for file in ("m.safetensors", "m\n.safetensors", "d" * 1000):
        with pytest.raises(HeaderError) as caught:
            read_header(reader(data), len(data), file)
        assert 20 < len(str(caught.value)) < 500
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(("dimensions", "is_taken"), [(64, True), (65, False)])
def test_a_tensor_has_as_many_dimensions_as_torch_computes_with(dimensions: int, is_taken: bool) -> None:
    data = file_of({"a": entry(shape=[1] * (dimensions - 1) + [2])}, 8)
    if is_taken:
        assert len(parse(data)[0].shape) == dimensions
        return
    with pytest.raises(HeaderError, match="whole numbers, 64 at most"):
        parse(data)


def test_noise_is_refused() -> None:
    with pytest.raises(HeaderError):
        parse(noise(10_000))
