"""Tensors as views of mapped files."""

import gc
import json
import mmap
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save, save_file

from tests.weights_cache.conftest import noise
from weights_cache import restore
from weights_cache.errors import WeightsError
from weights_cache.mapping import MappedFile
from weights_cache.safetensors_header import DTYPE_BITS, TensorInfo, read_header

BEYOND_TORCH = {"F6_E2M3", "F6_E3M2"}


def mapped(path: Path) -> memoryview:
    """As the reader maps a file."""
    with path.open("rb") as file:
        return MappedFile(file.fileno(), path.stat().st_size).view


def views(path: Path) -> dict[str, torch.Tensor]:
    mapping = mapped(path)
    header = read_header(lambda start, stop: bytes(mapping[start:stop]), len(mapping), path.name)
    return {tensor.name: restore.view(mapping, tensor) for tensor in header}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("name", [name for name in DTYPE_BITS if name not in BEYOND_TORCH])
def test_a_tensor_of_any_dtype_that_torch_holds_has_the_bytes_of_its_file(tmp_path: Path, name: str) -> None:
    data = bytes(byte & 1 for byte in noise(48)) if name == "BOOL" else noise(48)
    (tmp_path / "file").write_bytes(data)
    shape = (2, 3, 64 // DTYPE_BITS[name])
    tensor = restore.view(mapped(tmp_path / "file"), TensorInfo("a", name, shape, 0, 48))
    assert tensor.shape == ((2, 3, 8) if name == "F4" else shape)  # torch counts pairs of such numbers
    assert raw(tensor) == data


def test_numbers_of_half_a_byte_come_in_pairs(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "a": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]},
            "b": {"dtype": "F4", "shape": [2, 0], "data_offsets": [3, 3]},
            "c": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]},
        }
    ).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + b"\x21\x43\x65\x07")
    found = views(tmp_path / "file")
    assert {name: (tuple(tensor.shape), raw(tensor)) for name, tensor in found.items()} == {
        "a": ((3, 1), b"\x21\x43\x65"),
        "b": ((2, 0), b""),
        "c": ((1,), b"\x07"),
    }
    assert (found["a"].dtype, found["b"].dtype) == (torch.float4_e2m1fn_x2, torch.float4_e2m1fn_x2)


@pytest.mark.parametrize("shape", [(2, 3), (4, 1), ()], ids=str)
def test_half_a_pair_is_an_error_that_names_tensor_and_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (tmp_path / "file").write_bytes(noise(48))
    with pytest.raises(WeightsError, match=re.escape(f"tensor 'layer.0' has dtype F4 and shape {list(shape)}; torch holds an even last")):
        restore.view(mapped(tmp_path / "file"), TensorInfo("layer.0", "F4", shape, 0, 3))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.uint16,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.uint32,
        torch.float32,
        torch.int64,
        torch.uint64,
        torch.float64,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    ],
    ids=str,
)
def test_a_tensor_is_what_the_library_makes_of_it(tmp_path: Path, dtype: torch.dtype) -> None:
    data = save({"a": (torch.rand(3, 5) * 2).to(dtype)})
    (tmp_path / "file").write_bytes(data)
    ours, theirs = views(tmp_path / "file")["a"], load(data)["a"]
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert raw(ours) == raw(theirs)


@pytest.mark.parametrize("name", sorted(BEYOND_TORCH))
def test_a_dtype_that_torch_has_no_type_for_is_an_error_that_names_tensor_and_dtype(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(noise(48))
    with pytest.raises(WeightsError, match=f"tensor 'layer.0' has dtype {name}, which torch has no type for"):
        restore.view(mapped(tmp_path / "file"), TensorInfo("layer.0", name, (8,), 0, 48))


def test_a_scalar_has_no_dimensions(tmp_path: Path) -> None:
    save_file({"a": torch.tensor(2.5)}, tmp_path / "file")
    found = views(tmp_path / "file")["a"]
    assert found.shape == ()
    assert found.item() == 2.5


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0, 2)], ids=str)
def test_a_tensor_without_elements_keeps_its_shape_and_dtype(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_file({"a": torch.empty(shape, dtype=torch.float16), "b": torch.ones(2)}, tmp_path / "file")
    found = views(tmp_path / "file")["a"]
    assert (found.shape, found.dtype) == (shape, torch.float16)


def test_a_tensor_at_an_odd_byte_has_its_values(tmp_path: Path) -> None:
    values = torch.arange(1000, dtype=torch.float64)
    (tmp_path / "file").write_bytes(b"\1\2\3" + raw(values))
    found = restore.view(mapped(tmp_path / "file"), TensorInfo("a", "F64", (10, 100), 3, 8003))
    assert torch.equal(found, values.reshape(10, 100))
    assert found.data_ptr() % found.element_size() == 0


def test_an_aligned_tensor_is_a_view_and_not_a_copy(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, tmp_path / "file")
    found = views(tmp_path / "file")
    assert found["b"].data_ptr() - found["a"].data_ptr() == 4000


def test_a_tensor_outlives_whoever_mapped_its_file(tmp_path: Path) -> None:
    values = torch.rand(100_000)
    save_file({"a": values}, tmp_path / "file")
    found = views(tmp_path / "file")["a"]
    (tmp_path / "file").unlink()
    gc.collect()
    assert torch.equal(found, values)


def test_writing_in_place_reaches_neither_the_file_nor_other_mappings(tmp_path: Path) -> None:
    values = torch.rand(100_000)
    save_file({"a": values}, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    mine, other = views(tmp_path / "file")["a"], views(tmp_path / "file")["a"]
    mine += 1
    assert torch.equal(mine, values + 1)
    assert torch.equal(other, values)
    assert (tmp_path / "file").read_bytes() == before


def private_bytes(path: Path) -> int:
    """How much memory this process holds for itself alone of what it maps of a file."""
    smaps = Path("/proc/self/smaps").read_text()
    entries = re.findall(rf"{re.escape(str(path))}\n(.*?)VmFlags", smaps, re.DOTALL)
    return 1024 * sum(int(number) for entry in entries for number in re.findall(r"Anonymous: +(\d+) kB", entry))


def test_reading_copies_no_page_and_writing_in_place_copies_only_the_page_written_to(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1 << 20)}, tmp_path / "file")
    found = views(tmp_path / "file")["a"]
    assert found.sum() == 1 << 20
    assert private_bytes(tmp_path / "file") == 0
    found[5] = 7
    assert private_bytes(tmp_path / "file") == mmap.PAGESIZE
