"""What a function sees of its weights while a sidecar brings them, and after."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load, save

from tests.support import wait_until
from weights_cache.blob import CHUNK_BYTES, BlobWriter
from weights_cache.cache import FileRef, NodeCache
from weights_cache.errors import CacheError, HeaderError, SettingsError, WeightsError
from weights_cache.reader import Restored, Weights
from weights_cache.settings import WeightsSettings

URI = "s3://bucket/model"
MIB = 1 << 20
T = TypeVar("T")


def tensors(seed: int, *names: str) -> dict[str, torch.Tensor]:
    """Each of one MiB: behind the header, the n-th is in the chunks n and n + 1."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(512, 512, generator=generator) for name in names}


MODEL = tensors(1, "t0", "t1", "t2", "t3")
FILE = save(MODEL)
FILES = {"config.json": b'{"hidden": 512}', "model.safetensors": FILE}
TOTAL = sum(map(len, FILES.values()))
LAST = (len(FILE) - 1) // CHUNK_BYTES


class Node:
    """A sidecar moved by hand: it pins files, then their chunks land one by one."""

    def __init__(self, cache: NodeCache) -> None:
        self.cache = cache
        self.snapshot = ""
        self._files: Mapping[str, bytes] = {}
        self._writers: dict[str, BlobWriter] = {}

    def pin(self, files: Mapping[str, bytes], version: str = "1") -> None:
        refs = [FileRef(path, len(data), f'"{version}"') for path, data in files.items()]
        self.snapshot = self.cache.pin(URI, refs, "bucket/model")
        self._files = files
        for path, blob in self.cache.snapshot_blobs(self.snapshot).items():
            # A reader that looks whether the part is being filled holds its lock for a moment.
            while not (writer := BlobWriter.try_acquire(blob, len(files[path]))) and not blob.is_complete():
                time.sleep(0.001)
            if writer:
                self._writers[path] = writer

    def land(self, path: str, *chunks: int) -> None:
        for chunk in chunks:
            at = chunk * CHUNK_BYTES
            self._writers[path].write(self._files[path][at : at + CHUNK_BYTES], at)

    def finish(self, *paths: str) -> None:
        """Everything that is missing of these files, or of all, lands and is published."""
        for path in paths or tuple(self._writers):
            for start, _ in list(self._writers[path].chunks.missing(1)):
                self.land(path, start // CHUNK_BYTES)
            self._writers.pop(path).publish()

    def leave(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


@pytest.fixture
def node(cache: NodeCache) -> Iterator[Node]:
    node = Node(cache)
    yield node
    node.leave()


@pytest.fixture
def weights(cache: NodeCache) -> Weights:
    return Weights(WeightsSettings(uri=URI, cache_dir=cache.root))


def later(call: Callable[[], T]) -> "Future[T]":
    """`call` in a thread of its own, which does not keep a failed test from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  the test's own thread raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def still_waits(future: "Future[T]") -> bool:
    try:
        future.exception(timeout=0.05)
    except TimeoutError:
        return True
    return False


# Without weights, and before there are any


def test_without_a_uri_there_are_no_weights_to_wait_for(tmp_path: Path) -> None:
    weights = Weights(WeightsSettings(cache_dir=tmp_path / "nowhere"))
    assert weights.is_empty()
    assert dict(weights) == {}
    assert list(weights.to("cpu")) == []
    assert weights.restored().total_bytes == 0


def test_without_a_uri_a_file_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"'tokenizer\.json' cannot be had: WEIGHTS_URI is not set"):
        Weights(WeightsSettings(cache_dir=tmp_path)).path("tokenizer.json")


def test_a_malformed_uri_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="must be s3://bucket/prefix"):
        Weights(WeightsSettings(uri="model", cache_dir=tmp_path))


def test_making_it_opens_nothing_and_waits_for_nothing(tmp_path: Path) -> None:
    weights = Weights(WeightsSettings(uri=URI, cache_dir=tmp_path / "cache"))
    assert not weights.is_empty()
    assert weights.restored() == Restored(0, 0, "store", None)
    assert not (tmp_path / "cache").exists()


def test_it_waits_for_a_snapshot_that_is_only_now_being_pinned(node: Node, weights: Weights) -> None:
    asked = later(lambda: weights["t0"])
    assert still_waits(asked)
    node.pin(FILES)
    node.finish()
    assert torch.equal(asked.result(10), MODEL["t0"])


def test_it_waits_for_a_cache_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    asked = later(lambda: list(Weights(WeightsSettings(uri=URI, cache_dir=tmp_path / "cache"))))
    assert still_waits(asked)
    cache = NodeCache(tmp_path / "cache")
    cache.create()
    node = Node(cache)
    node.pin(FILES)
    node.finish()
    assert asked.result(10) == list(MODEL)


def test_a_ref_whose_snapshot_is_gone_is_waited_for_as_if_there_were_none(node: Node, weights: Weights) -> None:
    node.cache.set_ref(URI, "f" * 32)
    asked = later(lambda: weights["t0"])
    assert still_waits(asked)
    node.pin(FILES)
    node.finish()
    assert torch.equal(asked.result(10), MODEL["t0"])


def test_a_cache_of_another_version_is_an_error(node: Node, weights: Weights) -> None:
    (node.cache.root / "FORMAT").write_text("2\n")
    with pytest.raises(CacheError, match="has layout '2'"):
        len(weights)


# Tensors


def test_all_tensors_are_those_that_were_saved(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.finish()
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {name: tensor.tolist() for name, tensor in load(FILE).items()}


def test_tensors_come_in_file_order_and_files_in_path_order(node: Node, weights: Weights) -> None:
    raw = json.dumps({name: {"dtype": "U8", "shape": [1], "data_offsets": [at, at + 1]} for name, at in (("z", 1), ("y", 0))}).encode()
    node.pin({"b.safetensors": FILE, "a/m.safetensors": len(raw).to_bytes(8, "little") + raw + b"\1\2", "c.bin": b"no tensors"})
    node.finish()
    assert list(weights) == ["y", "z", "t0", "t1", "t2", "t3"]
    assert len(weights) == 6


def test_the_names_are_known_as_soon_as_the_headers_are_there(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.land("model.safetensors", 0)
    assert list(weights) == ["t0", "t1", "t2", "t3"]


def test_a_tensor_is_handed_out_while_what_follows_is_still_missing(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.land("model.safetensors", 0, 1)
    assert torch.equal(weights["t0"], MODEL["t0"])
    asked = later(lambda: weights["t1"])
    assert still_waits(asked)
    node.land("model.safetensors", 2)
    assert torch.equal(asked.result(10), MODEL["t1"])


def test_a_tensor_in_the_middle_need_not_wait_for_those_before_it(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.land("model.safetensors", 0, 2, 3)
    assert torch.equal(weights["t2"], MODEL["t2"])


def test_moving_to_a_device_yields_each_tensor_as_it_lands(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.land("model.safetensors", 0)
    moved = weights.to("cpu")
    for at, (name, expected) in enumerate(MODEL.items()):
        node.land("model.safetensors", at + 1)
        found_name, tensor = next(moved)
        assert found_name == name
        assert torch.equal(tensor, expected)
    assert next(moved, None) is None


def test_writing_to_a_tensor_hides_nothing_that_lands_later_beside_it(node: Node, weights: Weights) -> None:
    # The last page of t0 is the first of t1: a private copy of it must hold what belongs to both.
    node.pin(FILES)
    node.land("model.safetensors", 0, 1)
    weights["t0"].zero_()
    node.finish()
    assert torch.equal(weights["t1"], MODEL["t1"])
    assert node.cache.snapshot_blobs(node.snapshot)["model.safetensors"].path.read_bytes() == FILE


def test_a_tensor_that_is_not_in_the_files_is_a_key_error(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.finish()
    assert "t9" not in weights
    with pytest.raises(KeyError, match="t9"):
        weights["t9"]


def test_a_tensor_in_two_files_is_an_error_that_names_both(node: Node, weights: Weights) -> None:
    node.pin({"a.safetensors": FILE, "b.safetensors": FILE})
    node.finish()
    with pytest.raises(WeightsError, match=r"'t0' is in both a\.safetensors and b\.safetensors"):
        list(weights)


def test_a_file_that_is_no_safetensors_file_is_an_error_that_names_it(node: Node, weights: Weights) -> None:
    node.pin({"model.safetensors": b"not tensors at all"})
    node.finish()
    with pytest.raises(HeaderError, match=r"^model\.safetensors: header of"):
        list(weights)


def test_an_empty_safetensors_file_is_an_error_and_not_a_crash(node: Node, weights: Weights) -> None:
    node.pin({"model.safetensors": b""})
    node.finish()
    with pytest.raises(HeaderError, match=r"model\.safetensors: 0 bytes are too few"):
        list(weights)


def test_many_threads_may_read_at_once_while_it_lands(node: Node, weights: Weights) -> None:
    readers = [later(lambda: {name: weights[name] for name in weights}) for _ in range(8)]
    node.pin(FILES)
    for chunk in range(LAST + 1):
        node.land("model.safetensors", chunk)
    node.finish()
    for reader in readers:
        found = reader.result(20)
        assert list(found) == list(MODEL)
        assert all(torch.equal(found[name], MODEL[name]) for name in MODEL)


# Files


def test_a_file_is_had_by_its_name(node: Node, weights: Weights) -> None:
    node.pin({**FILES, "tokenizer/vocab.txt": b"a\nb\n", "empty": b""})
    node.finish()
    assert weights.path("config.json").read_bytes() == FILES["config.json"]
    assert weights.path("tokenizer/vocab.txt").read_bytes() == b"a\nb\n"
    assert weights.path("empty").read_bytes() == b""


def test_a_file_is_waited_for_and_had_before_the_others_are_complete(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    asked = later(lambda: weights.path("config.json"))
    assert still_waits(asked)
    node.finish("config.json")
    assert asked.result(10).read_bytes() == FILES["config.json"]


def test_a_file_that_is_not_in_the_snapshot_is_an_error_that_lists_those_that_are(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    with pytest.raises(WeightsError, match=r"has no file 'vocab\.txt'; it has config\.json, model\.safetensors"):
        weights.path("vocab.txt")


# How far it is


def test_progress_is_told_in_bytes_and_ends_with_the_time_it_took(node: Node, weights: Weights) -> None:
    steps = [weights.restored()]
    node.pin(FILES)
    steps.append(weights.restored())
    node.land("model.safetensors", 0, LAST)
    steps.append(weights.restored())
    node.finish()
    *before, end = [*steps, weights.restored()]
    tail = len(FILE) - LAST * MIB
    assert before == [Restored(0, 0, "store", None), Restored(0, TOTAL, "store", None), Restored(MIB + tail, TOTAL, "store", None)]
    assert (end.bytes, end.total_bytes, end.source) == (TOTAL, TOTAL, "store")
    assert end.seconds is not None
    assert weights.restored() == end


def test_weights_that_were_complete_when_it_came_are_from_the_cache(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.finish()
    found = weights.restored()
    assert (found.bytes, found.total_bytes, found.source) == (TOTAL, TOTAL, "cache")
    assert found.seconds is not None


# When the objects are replaced


def test_an_incomplete_snapshot_that_was_given_up_for_another_is_an_error(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.land("model.safetensors", 0, 1)
    assert torch.equal(weights["t0"], MODEL["t0"])
    asked = later(lambda: weights["t3"])
    assert still_waits(asked)
    given_up = node.snapshot
    node.leave()
    node.pin({"config.json": b"{}", "model.safetensors": FILE}, version="2")
    with pytest.raises(WeightsError, match=f"changed while .* was being read: it is now snapshot {node.snapshot}, was {given_up}"):
        asked.result(10)


def test_a_complete_snapshot_is_read_on_although_there_is_a_newer_one(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.finish()
    assert torch.equal(weights["t0"], MODEL["t0"])
    node.pin({"model.safetensors": save(tensors(2, *MODEL))}, version="2")
    node.finish()
    assert all(torch.equal(weights[name], MODEL[name]) for name in MODEL)
    assert weights.path("config.json").read_bytes() == FILES["config.json"]


def test_who_comes_later_gets_the_newer_one(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.finish()
    newer = tensors(2, *MODEL)
    node.pin({"model.safetensors": save(newer)}, version="2")
    node.finish()
    assert torch.equal(weights["t0"], newer["t0"])


def throw_parts_away(node: Node) -> None:
    """What somebody may do who needs the space, or was told to remove a part that is damaged."""
    node.leave()
    for path in (node.cache.root / "blobs").glob("*.part*"):
        path.unlink()


def begin_nothing(node: Node) -> None:
    for path in (node.cache.root / "blobs").glob("*.state"):
        path.unlink()


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(begin_nothing, id="nobody had begun"),
        pytest.param(lambda node: None, id="nothing had landed"),
        pytest.param(lambda node: node.land("model.safetensors", 0, 1), id="half had landed"),
    ],
)
def test_a_part_that_was_thrown_away_and_fetched_anew_is_an_error_and_never_zeros(
    node: Node, weights: Weights, before: Callable[[Node], None]
) -> None:
    node.pin(FILES)
    before(node)
    assert weights.restored().total_bytes == TOTAL  # it has mapped the parts
    throw_parts_away(node)
    node.pin(FILES)
    asked = later(lambda: weights["t3"])
    node.land("model.safetensors", *range(LAST + 1))
    assert still_waits(asked)
    node.finish()
    with pytest.raises(WeightsError, match=r"model\.safetensors has vanished from the cache"):
        asked.result(10)


def test_a_snapshot_with_a_blob_missing_is_used_once_a_sidecar_has_brought_it_anew(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.finish()
    node.cache.snapshot_blobs(node.snapshot)["model.safetensors"].path.unlink()
    asked = later(lambda: weights["t0"])
    assert still_waits(asked)
    node.pin(FILES)
    node.finish()
    assert torch.equal(asked.result(10), MODEL["t0"])
    assert weights.restored().source == "store"


def test_half_a_snapshot_that_nobody_fills_any_more_does_not_stand_in_the_way_of_the_next(node: Node, weights: Weights) -> None:
    node.pin(FILES, version="old")
    node.leave()
    asked = later(lambda: weights["t0"])
    assert still_waits(asked)
    node.pin(FILES, version="new")
    node.finish()
    assert torch.equal(asked.result(10), MODEL["t0"])


def test_a_sidecar_that_dies_and_comes_back_is_not_noticed(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.land("model.safetensors", 0, 1)
    asked = later(lambda: {name: weights[name] for name in weights})
    wait_until("its first tensor", lambda: weights.restored().bytes)
    node.leave()
    assert still_waits(asked)
    node.pin(FILES)
    node.finish()
    assert all(torch.equal(tensor, MODEL[name]) for name, tensor in asked.result(10).items())
