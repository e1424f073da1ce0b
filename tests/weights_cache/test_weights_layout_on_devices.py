"""Where tensors come to lie on a device, and which device each goes to: decisions without a device."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weights_cache.errors import WeightsError
from weights_cache.restore.layout import ALIGNMENT, cut, lay_out
from weights_cache.restore.placement import Placement
from weights_cache.safetensors_header import DTYPE_BITS, TensorInfo

KINDS = ("BOOL", "U8", "F8_E4M3", "F16", "BF16", "F32", "I64", "F64", "C64")


@st.composite
def files(draw: st.DrawFn) -> list[TensorInfo]:
    """A file's tensors, one behind the other from any byte on."""
    at = draw(st.integers(8, 300))
    found = []
    for number, (kind, elements) in enumerate(draw(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 400)), max_size=12))):
        size = elements * DTYPE_BITS[kind] // 8
        found.append(TensorInfo(f"t{number}", kind, (elements,), at, at + size))
        at += size
    return found


@given(files(), st.sampled_from([None, torch.bfloat16, torch.float32, torch.float64]), st.sampled_from([256, 512, 4096]))
def test_every_byte_of_every_tensor_goes_to_its_place_once(tensors: list[TensorInfo], dtype: torch.dtype | None, block: int) -> None:
    placed, size = lay_out(tensors, dtype)
    for tensor, following in itertools.pairwise(placed):
        assert following.at >= tensor.at + tensor.size
    assert all(tensor.at % ALIGNMENT == 0 for tensor in placed)
    assert size <= sum(tensor.size + ALIGNMENT for tensor in placed)
    came_from: dict[int, int] = {}  # by byte of the allocation, the byte of the file, of tensors that are only copied
    filled: set[int] = set()
    for number, parts in enumerate(cut(placed, size, block)):
        for part in parts:
            assert number * block <= part.at <= part.at + part.size <= (number + 1) * block
            assert not filled & set(range(part.at, part.at + part.size))
            filled |= set(range(part.at, part.at + part.size))
            assert part.size // part.dtype.itemsize == (part.stop - part.start) // part.file_dtype.itemsize
            if part.file_dtype == part.dtype:
                came_from |= {part.at + n: part.start + n for n in range(part.size)}
    assert filled == {at for tensor in placed for at in range(tensor.at, tensor.at + tensor.size)}
    for tensor in placed:
        if tensor.dtype == tensor.file_dtype:
            assert all(came_from[tensor.at + n] == tensor.info.start + n for n in range(tensor.size))


def test_tensors_that_lie_together_in_the_file_as_on_the_device_are_copied_together() -> None:
    tensors = [TensorInfo(f"t{n}", "F32", (256,), 8 + n * 1024, 8 + (n + 1) * 1024) for n in range(16)]
    assert [len(parts) for parts in cut(*lay_out(tensors, None), 1 << 20)] == [1]


@pytest.mark.parametrize(
    ("name", "device"),
    [
        pytest.param("model.layers.1.weight", "cuda:1", id="in a module"),
        pytest.param("model.layers.12.weight", "cuda:0", id="a name that only begins like it"),
        pytest.param("model.layers.1", "cuda:1", id="the name itself"),
        pytest.param("model.layers.1.norm.bias", "cpu", id="the longest counts"),
        pytest.param("head", "cuda:0", id="everything else"),
    ],
)
def test_a_device_map_goes_by_whole_names_of_modules(name: str, device: str) -> None:
    place = Placement({"": "cuda:0", "model.layers.1": "cuda:1", "model.layers.1.norm": "cpu"})
    assert place(name) == device


def test_one_device_is_a_map_of_everything() -> None:
    place = Placement(torch.device("cuda", 1))
    assert (place("a.b"), place.devices, place.sole()) == ("cuda:1", ("cuda:1",), "cuda:1")
    assert Placement({"a": "cuda:1"}).sole() is None


def test_a_tensor_that_the_device_map_leaves_out_is_an_error_that_names_it() -> None:
    with pytest.raises(WeightsError, match=re.escape("the device map has no device for tensor 'head.weight'; it has model (and no '')")):
        Placement({"model": "host"})("head.weight")
    with pytest.raises(WeightsError, match="the device map is empty"):
        Placement({})
