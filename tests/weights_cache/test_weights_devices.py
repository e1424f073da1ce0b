"""Restoring into a device's memory: through the same code on `host`, and on a GPU where there is one."""

import contextlib
import gc
import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from tests.support import ROOT, fill_cache, wait_until
from tests.weights_cache.conftest import answering, noise
from tests.weights_cache.devices import DEVICES, SMALL, needs_gpu
from tests.weights_cache.node import URI, Node, later, still_waits
from weights_cache.cache import NodeCache
from weights_cache.errors import WeightsError
from weights_cache.mapping import MappedFile
from weights_cache.reader import INDEX, Weights
from weights_cache.resident import Residents
from weights_cache.restore.device import Event, HostDevice, open_device
from weights_cache.restore.layout import ALIGNMENT
from weights_cache.restore.pipeline import Restore, Ring
from weights_cache.restore.placement import Placement
from weights_cache.safetensors_header import DTYPE_BITS, TensorInfo, read_header
from weights_cache.settings import WeightsSettings

MIB = 1 << 20
MODEL = {f"t{n}": torch.randn(512, 512, generator=torch.Generator().manual_seed(n)) for n in range(4)}  # of one MiB each
FILE = save(MODEL)


@pytest.fixture(params=DEVICES)
def devices(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Two, which may be the same."""
    found: tuple[str, str] = request.param
    return found


@pytest.fixture
def device(devices: tuple[str, str]) -> str:
    return devices[0]


@pytest.fixture(autouse=True)
def _small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small buffers, so that small models go round several times."""
    monkeypatch.setattr(Ring, "open", classmethod(lambda cls, name: cls(open_device(name), **SMALL)))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    wait_until("the threads' end", lambda: not restoring())


def restoring() -> list[str]:
    """Threads of restores."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("restore")]


def checksum(tensor: Tensor) -> str:
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name].cpu(), expected[name]) for name in expected
    )


class InMemory:
    """A file that is all there, or lands when it is told to."""

    def __init__(self, data: bytes, path: str = "model.safetensors") -> None:
        self.path, self.version, self.size = path, hashlib.sha256(data).hexdigest(), len(data)
        self.view = memoryview(bytearray(data))
        self.there = self.size
        self.error: WeightsError | None = None

    def header(self, pause: Callable[[], None]) -> Sequence[TensorInfo]:
        return read_header(lambda start, stop: bytes(self.view[start:stop]), self.size, self.path)

    def has(self, start: int, stop: int) -> bool:
        if self.error:
            raise self.error
        return stop <= self.there

    def pause(self) -> None:
        threading.Event().wait(0.002)


class Watched(HostDevice):
    """Counts what is allocated and still held, has as much room as is said, and may fail."""

    def __init__(self, *, room: int = 1 << 40, fails_at: int = -1) -> None:
        super().__init__("host")
        self.room, self.fails_at = room, fails_at
        self.asked: list[int] = []
        self.copies = 0
        self._held: list[torch.UntypedStorage] = []

    def free_bytes(self) -> int:
        return self.room

    def allocate(self, size: int) -> Tensor:
        if sum(self.asked) + size > 2 * self.room:
            raise MemoryError("the device says no")
        self.asked.append(size)
        return super().allocate(size)

    def copy(self, target: Tensor, source: Tensor) -> Event:
        self.copies += 1
        if self.copies == self.fails_at:
            raise RuntimeError("the device has fallen off the bus")
        return super().copy(target, source)


@contextlib.contextmanager
def restoring_from(
    *sources: InMemory, device: HostDevice | None = None, dtype: torch.dtype | None = None
) -> Iterator[Iterator[tuple[str, Tensor]]]:
    ring = Ring(device or Watched(), **SMALL)
    with contextlib.closing(ring):
        tensors = Restore(list(sources), Placement("host"), {"host": ring}, dtype).tensors()
        with contextlib.closing(tensors):  # type: ignore[type-var]
            yield tensors


# What is restored is what is in the files


@pytest.mark.parametrize("kind", [kind for kind in DTYPE_BITS if kind not in ("F6_E2M3", "F6_E3M2")])
def test_a_tensor_of_any_dtype_has_the_checksum_of_its_file(cache: NodeCache, weights: Weights, device: str, kind: str) -> None:
    data = bytes(byte & 1 for byte in noise(400_000)) if kind == "BOOL" else noise(400_000)
    shape = [2, 400_000 * 4 // DTYPE_BITS[kind]]
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "b": {"dtype": kind, "shape": shape, "data_offsets": [3, 400_003]},
            "c": {"dtype": kind, "shape": [2, 0], "data_offsets": [400_003, 400_003]},
            "d": {"dtype": "F32", "shape": [], "data_offsets": [400_003, 400_007]},
        }
    ).encode()
    fill_cache(cache.root, URI, {"model.safetensors": len(header).to_bytes(8, "little") + header + b"\1\2\3" + data + b"\0\0\0\x40"})
    found = dict(weights.to(device))
    views = dict(weights.to("cpu"))
    assert hashlib.sha256(data).hexdigest() == checksum(found["b"])
    assert [(t.shape, t.dtype) for t in found.values()] == [(t.shape, t.dtype) for t in views.values()]
    assert (found["d"].item(), found["d"].shape) == (2.0, ())
    assert {tensor.device.type for tensor in found.values()} == {device.partition(":")[0].replace("host", "cpu")}


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from([torch.uint8, torch.float16, torch.float64]), st.integers(0, 90_000)), min_size=1, max_size=8),
    st.integers(0, 7),
)
def test_whatever_sizes_and_alignments_tensors_have_they_are_aligned_and_right(sizes: list[tuple[torch.dtype, int]], shift: int) -> None:
    expected = {f"t{n}": torch.arange(count).to(dtype) for n, (dtype, count) in enumerate(sizes)}
    entries, data = {}, b""
    for name, tensor in expected.items():
        kind = {torch.uint8: "U8", torch.float16: "F16", torch.float64: "F64"}[tensor.dtype]
        piece = tensor.numpy().tobytes()
        entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(piece)]}
        data += piece
    header = json.dumps(entries).encode()
    header = header.ljust(-(-len(header) // 8) * 8 + shift)  # so that the tensors begin anywhere
    with restoring_from(InMemory(len(header).to_bytes(8, "little") + header + data)) as tensors:
        found = dict(tensors)
    assert {name: checksum(tensor) for name, tensor in found.items()} == {name: checksum(tensor) for name, tensor in expected.items()}
    places = [tensor.data_ptr() for tensor in found.values() if tensor.numel()]
    assert all((place - places[0]) % ALIGNMENT == 0 and place % 16 == 0 for place in places)


def test_the_tensors_of_a_file_share_one_allocation_of_hardly_more_than_their_size() -> None:
    device = Watched()
    with restoring_from(InMemory(FILE), InMemory(save({"u": torch.ones(9)}), "other"), device=device) as tensors:
        found = dict(tensors)
    assert device.asked == [4 * MIB, 36]
    assert len({found[name].untyped_storage().data_ptr() for name in MODEL}) == 1


def test_shards_are_restored_in_order(cache: NodeCache, weights: Weights, device: str) -> None:
    shards = {"a.safetensors": save({"x": MODEL["t0"], "y": MODEL["t1"]}), "b.safetensors": save({"z": MODEL["t2"]})}
    index = json.dumps({"weight_map": {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}).encode()
    fill_cache(cache.root, URI, {INDEX: index, **shards})
    assert same(dict(weights.to(device)), {"x": MODEL["t0"], "y": MODEL["t1"], "z": MODEL["t2"]})


def test_without_weights_there_is_nothing_to_restore(tmp_path: Path, device: str) -> None:
    assert dict(Weights(WeightsSettings(cache_dir=tmp_path)).to(device)) == {}


def test_restoring_again_gives_other_memory(cache: NodeCache, weights: Weights, device: str) -> None:
    fill_cache(cache.root, URI, {"model.safetensors": FILE})
    weights.prepare(device)
    first, second = weights.to(device), weights.to(device)  # at the same time
    found = [dict(zip(("one", "other"), pair, strict=True)) for pair in zip(first, second, strict=True)]
    assert all(torch.equal(pair["one"][1], pair["other"][1]) for pair in found)
    assert found[0]["one"][1].data_ptr() != found[0]["other"][1].data_ptr()


# Devices and dtypes


def test_a_device_map_spreads_tensors_over_devices(cache: NodeCache, weights: Weights, devices: tuple[str, str]) -> None:
    fill_cache(cache.root, URI, {"model.safetensors": FILE})
    found = dict(weights.to({"": devices[0], "t1": devices[1], "t2": "cpu"}))
    assert same(found, MODEL)
    storages = {name: tensor.untyped_storage().data_ptr() for name, tensor in found.items()}
    assert storages["t0"] == storages["t3"] != storages["t2"]
    assert found["t2"].data_ptr() == weights["t2"].data_ptr()


def test_one_device_need_not_wait_for_another() -> None:
    stuck, other = Watched(), Watched()
    held = threading.Event()
    stuck._stream.submit(held.wait)
    rings = {"host:0": Ring(stuck, **SMALL), "host:1": Ring(other, **SMALL)}
    tensors = Restore([InMemory(FILE)], Placement({"": "host:0", "t3": "host:1"}), rings).tensors()
    first = later(lambda: next(tensors))
    wait_until("the other device's copies", lambda: other.copies == MIB // SMALL["slot_bytes"])
    assert still_waits(first)
    held.set()
    first.result(60)
    assert [name for name, _ in tensors] == ["t1", "t2", "t3"]
    for ring in rings.values():
        ring.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("where", ["device", "cpu"])
def test_floating_point_numbers_are_cast_on_the_way_and_others_are_not(
    cache: NodeCache, weights: Weights, device: str, where: str, dtype: torch.dtype
) -> None:
    given = {
        "double": torch.rand(100_001, dtype=torch.float64),
        "whole": torch.arange(7),
        "single": torch.rand(3, 50_000),
        "half": torch.rand(5).half(),
        "eighth": torch.rand(64).to(torch.float8_e4m3fn),
        "truth": torch.tensor([True, False]),
    }
    fill_cache(cache.root, URI, {"model.safetensors": save(given)})
    found = dict(weights.to(device if where == "device" else "cpu", dtype=dtype))
    assert {name: (tensor.dtype, checksum(tensor)) for name, tensor in found.items()} == {
        name: (expected.dtype, checksum(expected))
        for name, tensor in given.items()
        for expected in [tensor.to(dtype) if name in ("double", "single", "half") else tensor]
    }


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_a_dtype_that_weights_cannot_be_cast_to_is_an_error(cache: NodeCache, weights: Weights, dtype: torch.dtype) -> None:
    fill_cache(cache.root, URI, {"model.safetensors": FILE})
    with pytest.raises(WeightsError, match=f"weights cannot be cast to {dtype}; dtype must be one of float16,"):
        next(weights.to("host", dtype=dtype))


def test_a_device_that_is_none_is_an_error_that_says_what_there_may_be(weights: Weights) -> None:
    for name in ("mps", "cuda:x", "hosts", "0"):
        with pytest.raises(WeightsError, match=f"device '{name}'; it must be cpu, cuda, cuda:<number> or host"):
            next(weights.to(name))


def test_a_gpu_that_is_not_there_is_an_error_that_says_so(weights: Weights) -> None:
    with pytest.raises(
        WeightsError, match=r"device 'cuda:99' cannot be used: (this torch .* (sees no GPU here|is built without CUDA)|torch sees)"
    ):
        weights.prepare("cuda:99")


# While it is being fetched


def test_tensors_are_handed_out_while_what_follows_is_still_missing(node: Node, weights: Weights, device: str) -> None:
    node.pin({"model.safetensors": FILE})
    tensors = weights.to(device)
    first = later(lambda: next(tensors))
    assert still_waits(first)
    node.land("model.safetensors", 0)
    assert still_waits(first)
    node.land("model.safetensors", 1)
    name, tensor = first.result(60)
    assert name == "t0"
    assert torch.equal(tensor.cpu(), MODEL["t0"])
    rest = later(lambda: dict(tensors))
    assert still_waits(rest)
    node.finish()
    assert same({"t0": tensor, **rest.result(60)}, MODEL)


def test_what_lands_in_any_order_is_right_in_the_end(node: Node, weights: Weights, device: str) -> None:
    node.pin({"model.safetensors": FILE})
    found = later(lambda: dict(weights.to(device)))
    for chunk in (0, 3, 1, 4, 2):
        node.land("model.safetensors", chunk)
    assert same(found.result(60), MODEL)  # though it was not published


def test_a_later_shard_is_on_its_way_before_its_header_is_known(node: Node, weights: Weights, device: str) -> None:
    node.pin({"a.safetensors": save({"x": MODEL["t0"]}), "b.safetensors": save({"y": MODEL["t1"]})})
    tensors = weights.to(device)
    first = later(lambda: next(tensors))
    node.finish("a.safetensors")
    assert first.result(60)[0] == "x"
    node.finish("b.safetensors")
    assert [name for name, _ in tensors] == ["y"]


# What goes wrong


@pytest.mark.parametrize("begun", [False, True], ids=["before the header", "after a tensor"])
def test_a_file_found_damaged_in_the_store_fails_the_restore(node: Node, weights: Weights, device: str, begun: bool) -> None:
    node.pin({"model.safetensors": FILE})
    weights.watch()
    assert weights.restored().total_bytes  # it has found its snapshot, and does not wait for the next one
    tensors = weights.to(device)
    if begun:
        node.land("model.safetensors", 0, 1)
        next(tensors)
    rest = later(lambda: dict(tensors))
    assert still_waits(rest)
    node.reject("model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged in the store, which was found out after some of it"):
        rest.result(60)


def test_damage_found_after_everything_was_copied_fails_the_restore() -> None:
    source = InMemory(FILE)
    with restoring_from(source) as tensors:
        for _ in range(4):
            next(tensors)
        source.error = WeightsError("damaged")
        with pytest.raises(WeightsError, match="damaged"):
            next(tensors)


def test_weights_that_are_replaced_meanwhile_fail_the_restore(node: Node, weights: Weights, device: str) -> None:
    node.pin({"model.safetensors": FILE})
    node.land("model.safetensors", 0, 1)
    tensors = weights.to(device)
    assert next(tensors)[0] == "t0"
    rest = later(lambda: dict(tensors))
    assert still_waits(rest)
    node.pin({"model.safetensors": FILE}, version="2")
    with pytest.raises(WeightsError, match=r"changed while model\.safetensors was being read"):
        rest.result(60)


def test_too_little_memory_is_said_before_anything_is_copied_or_allocated() -> None:
    device = Watched(room=5 * MIB)
    with (
        restoring_from(InMemory(FILE, "a"), InMemory(save({"u": torch.ones(MIB)}), "b"), device=device) as tensors,
        pytest.raises(WeightsError, match=re.escape("no room on device host: the weights need 8,388,608 bytes, 5,242,880 are free")),
    ):
        next(tensors)
    assert (device.asked, device.copies) == ([], 0)


def test_files_that_are_still_to_come_are_counted_too() -> None:
    device, coming = Watched(room=5 * MIB), InMemory(save({"u": torch.ones(MIB)}), "b")
    coming.there = 0
    with restoring_from(InMemory(FILE, "a"), coming, device=device) as tensors, pytest.raises(WeightsError, match="no room on device host"):
        next(tensors)
    assert device.asked == []


def test_memory_that_is_taken_meanwhile_is_an_error_too() -> None:
    device = Watched(room=MIB * 4)
    device.asked = [MIB * 8]
    with restoring_from(InMemory(FILE), device=device) as tensors, pytest.raises(WeightsError, match="no room on device host") as found:
        next(tensors)
    assert "the device says no" in str(found.value.__cause__)


@pytest.mark.parametrize("fails_at", [1, 30])
def test_a_copy_that_fails_fails_the_restore_with_what_the_device_said(fails_at: int) -> None:
    with (
        restoring_from(InMemory(FILE), device=Watched(fails_at=fails_at)) as tensors,
        pytest.raises(RuntimeError, match="the device has fallen off the bus"),
    ):
        dict(tensors)


def test_who_waits_for_a_view_is_told_what_went_wrong_on_a_device() -> None:
    class WithoutFirst(InMemory):
        def has(self, start: int, stop: int) -> bool:
            return start > MIB

    ring = Ring(Watched(fails_at=1), **SMALL)
    with contextlib.closing(ring):
        tensors = Restore([WithoutFirst(FILE)], Placement({"": "host", "t0": "cpu"}), {"host": ring}).tensors()
        with pytest.raises(RuntimeError, match="the device has fallen off the bus"):
            next(tensors)


@pytest.mark.parametrize("how", ["closed", "forgotten", "failed"])
def test_a_restore_that_does_not_end_gives_its_memory_back(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = save({f"t{n}": torch.ones(1 << 20) for n in range(16)})
    source = InMemory(data)
    source.there = 40 * MIB
    before = resident_bytes()
    ring = Ring(HostDevice(), **SMALL)
    tensors = Restore([source], Placement("host"), {"host": ring}).tensors()
    gc.disable()  # nothing of it may wait for a collection
    try:
        names = [next(tensors)[0] for _ in range(9)]
        assert names == [f"t{n}" for n in sorted(range(16), key=str)][:9]
        assert resident_bytes() - before > 30 * MIB
        if how == "failed":
            source.error = WeightsError("damaged")
            with pytest.raises(WeightsError, match="damaged") as kept:
                next(tensors)
        elif how == "closed":
            tensors.close()  # type: ignore[attr-defined]
        else:
            del tensors
        assert restoring() == []
        assert resident_bytes() - before < 10 * MIB
        if how == "failed":
            del kept
    finally:
        gc.enable()
    ring.close()


def resident_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def test_an_iterator_that_is_given_up_while_the_fetch_stalls_ends_its_threads(node: Node, weights: Weights, device: str) -> None:
    node.pin({"a.safetensors": FILE, "b.safetensors": save({"y": MODEL["t1"]})})
    node.land("a.safetensors", 0, 1)
    tensors = weights.to(device)
    next(tensors)
    assert restoring()
    tensors.close()  # type: ignore[attr-defined]
    assert restoring() == []


def test_a_tensor_outlives_the_restore_that_was_given_up(cache: NodeCache, weights: Weights, device: str) -> None:
    fill_cache(cache.root, URI, {"model.safetensors": FILE})
    tensors = weights.to(device)
    _, tensor = next(tensors)
    tensors.close()  # type: ignore[attr-defined]
    assert torch.equal(tensor.cpu(), MODEL["t0"])


# Modules


class Net(nn.Module):
    """Ties its output to its embedding, and has a buffer of each kind."""

    def __init__(self, where: str | None = "cpu") -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("angles", torch.arange(4.0, device=where), persistent=False)


def saved(**others: Tensor) -> dict[str, bytes]:
    state = {name: tensor for name, tensor in Net().state_dict().items() if name != "head.weight"}
    return {"model.safetensors": save(state | others)}


def test_a_module_is_built_around_the_weights(cache: NodeCache, weights: Weights, device: str) -> None:
    fill_cache(cache.root, URI, saved())
    made = weights.module(Net, device)
    assert same(dict(sorted(made.state_dict().items())), dict(sorted({**weights, "head.weight": weights["embed.weight"]}.items())))
    assert made.head.weight is made.embed.weight
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert dict(made.named_buffers())["angles"].tolist() == [0, 1, 2, 3]
    assert len({tensor.device for tensor in (*made.parameters(), *made.buffers())}) == 1


def test_on_a_cpu_a_modules_parameters_are_the_views(cache: NodeCache, weights: Weights) -> None:
    fill_cache(cache.root, URI, saved())
    assert weights.module(Net, "cpu").embed.weight.data_ptr() == weights["embed.weight"].data_ptr()


@pytest.mark.parametrize(
    ("others", "build", "message"),
    [
        pytest.param({"x": torch.ones(2)}, Net, "the module lacks 'x'", id="unexpected"),
        pytest.param({}, lambda: nn.ModuleDict({"embed": nn.Embedding(10, 4)}), "the module lacks 'norm.bias', 'norm.num", id="more"),
        pytest.param({}, lambda: nn.Linear(4, 10), "they lack 'bias', 'weight', and the module lacks 'embed", id="another"),
        pytest.param({"embed.weight": torch.ones(9, 4)}, Net, r"size mismatch for embed\.weight", id="another shape"),
        pytest.param({}, lambda: Net("meta"), "buffer 'angles' is not in the weights, .* or on the meta device", id="lost buffer"),
    ],
)
def test_weights_that_do_not_fit_a_module_are_an_error_that_names_what_does_not(
    cache: NodeCache, weights: Weights, others: dict[str, Tensor], build: Callable[[], nn.Module], message: str
) -> None:
    fill_cache(cache.root, URI, saved(**others))
    with pytest.raises(WeightsError, match=message):
        weights.module(build, "host")


# The GPU itself


@pytest.mark.gpu
@needs_gpu
def test_a_tensor_may_be_used_at_once_on_whatever_stream_is_current(cache: NodeCache, weights: Weights) -> None:
    fill_cache(cache.root, URI, {"model.safetensors": FILE})
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        sums = {name: tensor.double().sum() for name, tensor in weights.to("cuda:0")}
    stream.synchronize()
    assert all(torch.isclose(found.cpu(), MODEL[name].double().sum()) for name, found in sums.items())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("registered", [False, True], ids=["pinned", "registered"])
def test_both_kinds_of_staging_buffers_give_the_bytes_of_the_file(tmp_path: Path, registered: bool) -> None:
    from weights_cache.restore.cuda import CudaDevice

    (tmp_path / "file").write_bytes(FILE)
    source = InMemory(FILE)
    with (tmp_path / "file").open("rb") as file:
        source.view = MappedFile(file.fileno(), len(FILE)).view
    ring = Ring(CudaDevice("cuda:0", 0, registered=registered), **SMALL)
    assert all(slot.is_pinned() for slot in ring.slots)
    found = dict(Restore([source], Placement("cuda:0"), {"cuda:0": ring}).tensors())
    ring.close()
    assert same(found, MODEL)


@pytest.mark.gpu
@needs_gpu
def test_more_than_a_gpu_has_is_an_error_before_anything_is_allocated(cache: NodeCache, weights: Weights) -> None:
    fill_cache(cache.root, URI, {"model.safetensors": FILE})
    torch.cuda.empty_cache()  # what other tests left there would be used again
    before = torch.cuda.memory_allocated()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - 300 * MIB, dtype=torch.uint8, device="cuda:0")
    rest = [torch.empty(MIB, dtype=torch.uint8, device="cuda:0") for _ in range(torch.cuda.mem_get_info()[0] // MIB - 2)]
    with pytest.raises(WeightsError, match="no room on device cuda:0: the weights need 4,194,304 bytes"):
        next(weights.to("cuda:0"))
    del hog, rest
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@needs_gpu
def test_memory_that_the_callers_stream_still_writes_to_is_filled_after_that() -> None:
    from weights_cache.restore.cuda import CudaDevice

    device = CudaDevice("cuda:0", 0)
    staged = device.staging(32 * MIB)
    staged.fill_(7)
    device.begin()
    freed = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda:0")
    for _ in range(200):
        freed.fill_(9)
    place = freed.data_ptr()
    del freed  # torch's allocator hands it out again at once
    found = device.allocate(32 * MIB)
    assert found.data_ptr() == place
    device.copy(found, staged).precede()
    assert torch.equal(found.cpu(), staged)
    device.close()


CONTEXT = """
import sys
from weights_cache import gpu_context
gpu_context.begin(sys.argv[1])
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("device", ["cpu", "host", "cuda:99", "cuda:-1", "tpu"])
def test_a_context_that_cannot_be_made_is_left_for_torch_to_tell(device: str) -> None:
    subprocess.run([sys.executable, "-c", CONTEXT, device], cwd=ROOT, timeout=60, check=True)


@pytest.mark.gpu
@needs_gpu
def test_a_context_is_made_before_torch_is_there() -> None:
    code = f"{CONTEXT}\nfrom cuda.bindings import driver\nprint(driver.cuDevicePrimaryCtxGetState(0)[2])"
    found = subprocess.run([sys.executable, "-c", code, "cuda:0"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "1"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees no two GPUs")
@pytest.mark.parametrize("resident", [False, True], ids=["restored", "resident"])
def test_a_gpu_that_is_not_asked_for_gets_no_context(cache: NodeCache, resident: bool) -> None:
    fill_cache(cache.root, URI, {"model.safetensors": FILE})
    code = """
import pathlib, sys
from cuda.bindings import driver
from weights_cache.errors import WeightsError
from weights_cache.reader import Weights
from weights_cache.restore.cuda import CudaDevice
from weights_cache.settings import WeightsSettings
weights = Weights(WeightsSettings(uri=sys.argv[1], cache_dir=pathlib.Path(sys.argv[2]), resident=sys.argv[3] == "True"))
found = {name: tensor.cpu() for name, tensor in weights.to("cuda:1")}
registered = CudaDevice("cuda:1", 1, registered=True)
registered.staging(1 << 20)
registered.close()
print([driver.cuDevicePrimaryCtxGetState(number)[2] for number in range(2)])
"""
    command = [sys.executable, "-c", code, URI, str(cache.root), str(resident)]
    with answering(Residents(64 * MIB), cache.root) if resident else contextlib.nullcontext():
        for _ in range(1 + resident):
            found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
            assert found.stdout.strip() == "[0, 1]"
