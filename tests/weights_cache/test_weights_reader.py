"""What a function sees of its weights while a sidecar brings them, and after."""

import contextlib
import json
import mmap
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save

from tests.support import ROOT, fill_cache, free_port, wait_until
from tests.weights_cache.node import URI, Node, later, still_waits
from weights_cache import chunks, room, snapshot
from weights_cache.cache import NodeCache, Ref
from weights_cache.chunks import CHUNK_BYTES
from weights_cache.environment import SettingsError
from weights_cache.errors import CacheError, HeaderError, WeightsError
from weights_cache.reader import INDEX, Restored, Weights
from weights_cache.settings import WeightsSettings

MIB = 1 << 20


def tensors(seed: int, *names: str) -> dict[str, torch.Tensor]:
    """Each of one MiB: behind the header, the n-th is in the chunks n and n + 1."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(512, 512, generator=generator) for name in names}


MODEL = tensors(1, "t0", "t1", "t2", "t3")
FILE = save(MODEL)
FILES = {"config.json": b'{"hidden": 512}', "model.safetensors": FILE}
TOTAL = sum(map(len, FILES.values()))
LAST = (len(FILE) - 1) // CHUNK_BYTES


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
    node.cache.set_ref(Ref(URI, "f" * 32))
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


def test_whether_there_is_a_tensor_is_known_before_its_bytes_are_there(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.land("model.safetensors", 0)
    assert "t3" in weights
    assert "t4" not in weights


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


def seen(weights: Weights, expected: Restored) -> bool:
    return bool(wait_until(f"{expected}", lambda: weights.restored() == expected))


def watching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "weights"]


def all_seen(weights: Weights) -> Restored:
    return wait_until("all bytes", lambda: weights.restored().seconds is not None and weights.restored())


def test_progress_is_told_in_bytes_and_ends_with_the_time_it_took(node: Node, weights: Weights) -> None:
    weights.watch()
    assert weights.restored() == Restored(0, 0, "store", None)
    node.pin(FILES)
    assert seen(weights, Restored(0, TOTAL, "store", None))
    node.land("model.safetensors", 0, LAST)
    assert seen(weights, Restored(MIB + len(FILE) - LAST * MIB, TOTAL, "store", None))
    node.finish()
    end = all_seen(weights)
    assert (end.bytes, end.total_bytes, end.source) == (TOTAL, TOTAL, "store")
    assert weights.restored() == end


def test_weights_that_were_complete_when_it_came_are_from_the_cache(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.finish()
    before = threading.active_count()
    weights.watch()
    found = weights.restored()  # at once: who waits for nothing needs no thread
    assert (found.bytes, found.total_bytes, found.source) == (TOTAL, TOTAL, "cache")
    assert found.seconds is not None
    assert threading.active_count() == before


def test_who_waits_for_bytes_sees_how_far_they_are_without_a_watch(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    asked = later(lambda: list(weights.to("cpu")))
    assert seen(weights, Restored(0, TOTAL, "store", None))
    node.land("model.safetensors", 0)
    assert seen(weights, Restored(MIB, TOTAL, "store", None))
    node.finish()
    asked.result(10)
    assert weights.restored().seconds is not None  # at once


def test_the_time_is_that_of_the_last_byte_and_not_of_who_asks_for_it(node: Node, weights: Weights) -> None:
    began = time.monotonic()
    weights.watch()
    node.pin(FILES)
    asked = later(lambda: dict(weights))
    assert still_waits(asked)
    node.finish()
    landed_s = time.monotonic() - began
    asked.result(10)
    time.sleep(1)
    assert weights.restored().seconds == pytest.approx(landed_s, abs=0.5)


def test_asking_how_far_they_are_looks_at_nothing(node: Node, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pin(FILES)
    weights.watch()
    weights.folder("unet").watch()  # a second time, which is none
    wait_until("one thread, and those of earlier tests gone", lambda: len(watching()) == 1)
    before = weights.restored()
    with weights._snapshot._lock, monkeypatch.context() as patch:  # as while somebody looks
        for name in ("stat", "open", "readlink", "fstat"):
            patch.setattr(os, name, None)
        assert later(weights.restored).result(60) == before
        assert later(weights.folder("unet").restored).result(60) == before
        assert not later(weights.is_empty).result(60)


@pytest.mark.parametrize("wrong", ["layout", "damage"])
def test_what_is_wrong_is_told_to_who_waits_and_not_to_who_watches(node: Node, weights: Weights, wrong: str) -> None:
    if wrong == "layout":
        (node.cache.root / "FORMAT").write_text("2\n")
    node.pin(FILES)
    weights.watch()
    node.land("model.safetensors", 0, 1)
    if wrong == "damage":
        assert seen(weights, Restored(2 * MIB, TOTAL, "store", None))
        node.reject("model.safetensors")
        time.sleep(0.15)
        node.finish("config.json")
    before = weights.restored()
    for _ in range(2):
        with pytest.raises(WeightsError, match="layout '2'" if wrong == "layout" else "damaged in the store"):
            weights["t3"]
    assert weights.restored() == before
    assert watching()


def test_a_watch_keeps_nobody_from_letting_go(node: Node) -> None:
    node.pin(FILES)
    weights = [Weights(WeightsSettings(uri=URI, cache_dir=node.cache.root))]
    weights[0].watch()
    assert weights[0].restored().total_bytes == TOTAL
    node.leave()
    assert evict(node.cache, node.snapshot) is None
    weights.clear()
    wait_until("eviction", lambda: evict(node.cache, node.snapshot) is not None)
    wait_until("the thread's end", lambda: not watching())


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
@pytest.mark.parametrize("what", [pytest.param("*.part*", id="with its state"), pytest.param("*.part", id="alone")])
def test_a_part_that_was_thrown_away_and_fetched_anew_is_an_error_and_never_zeros(
    node: Node, weights: Weights, before: Callable[[Node], None], what: str
) -> None:
    node.pin(FILES)
    before(node)
    weights.watch()
    assert weights.restored().total_bytes == TOTAL  # it has mapped the parts
    node.leave()
    for path in (node.cache.root / "blobs").glob(what):
        path.unlink()
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


def test_the_complete_one_is_read_while_a_newer_one_is_being_filled(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.finish()
    node.pin({"model.safetensors": save(tensors(2, *MODEL))}, version="2")
    assert torch.equal(weights["t0"], MODEL["t0"])
    assert weights.restored().source == "cache"


def test_the_newer_one_is_read_as_it_lands_where_the_one_before_it_is_gone(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.cache.set_ref(Ref(URI, "f" * 32, 0.0, node.snapshot))
    node.land("model.safetensors", 0, 1)
    assert torch.equal(weights["t0"], MODEL["t0"])
    asked = later(lambda: weights["t3"])
    assert still_waits(asked)
    node.finish()
    assert torch.equal(asked.result(10), MODEL["t3"])


# When the machine restarts


@pytest.fixture
def restart(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """restart(): from now on this is another start of the machine."""
    return lambda: monkeypatch.setattr(chunks, "_boot_id", lambda: "6b8f7c1e-0000-4000-8000-000000000001")


def test_weights_of_an_earlier_boot_are_read_once_somebody_has_looked_at_them(
    node: Node, weights: Weights, restart: Callable[[], None]
) -> None:
    node.pin(FILES)
    node.finish()
    restart()
    asked = later(lambda: weights["t3"])
    assert still_waits(asked)
    node.pin(FILES)
    node.finish()
    assert torch.equal(asked.result(10), MODEL["t3"])


def test_weights_that_were_settled_are_read_at_once(node: Node, weights: Weights, restart: Callable[[], None]) -> None:
    node.pin(FILES)
    node.finish()
    for blob in node.cache.snapshot_blobs(node.snapshot).values():
        blob.settle()
    restart()
    assert torch.equal(weights["t3"], MODEL["t3"])
    assert weights.restored().source == "cache"


# Sharded checkpoints

LONG_NAME = "long " * 10_000
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PARAMETERS = {name: torch.full((2, 2), float(number)) for number, name in enumerate("cdab")}
SHARDS = {ONE: save({name: PARAMETERS[name] for name in "cd"}), TWO: save({name: PARAMETERS[name] for name in "ab"})}
WEIGHT_MAP = {"b": TWO, "a": TWO, "d": ONE, "c": ONE}


def index(weight_map: Any = WEIGHT_MAP) -> bytes:
    return json.dumps({"metadata": {"total_size": 64}, "weight_map": weight_map}).encode()


def test_the_tensors_of_all_shards_come_in_file_order(node: Node, weights: Weights) -> None:
    node.pin({**SHARDS, INDEX: index()})
    node.finish()
    assert list(weights) == ["c", "d", "a", "b"]
    assert len(weights) == 4
    assert all(torch.equal(weights[name], PARAMETERS[name]) for name in PARAMETERS)


def test_only_the_files_that_the_index_names_are_used(node: Node, weights: Weights) -> None:
    whole = {name: tensor + 10 for name, tensor in PARAMETERS.items()}
    node.pin({**SHARDS, INDEX: index(), "model.safetensors": save(whole), "consolidated.safetensors": b"no tensors"})
    node.finish()
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {name: tensor.tolist() for name, tensor in PARAMETERS.items()}


def test_a_tensor_that_the_index_does_not_name_is_none(node: Node, weights: Weights) -> None:
    node.pin({**SHARDS, INDEX: index({name: file for name, file in WEIGHT_MAP.items() if name != "a"})})
    node.finish()
    assert list(weights) == ["c", "d", "b"]
    assert "a" not in weights


def test_the_tensors_of_a_shard_are_there_before_the_header_of_the_next_one(node: Node, weights: Weights) -> None:
    node.pin({**SHARDS, INDEX: index()})
    asked = later(lambda: list(weights))
    node.finish(INDEX)
    node.finish(ONE)
    assert torch.equal(weights["c"], PARAMETERS["c"])
    names = iter(weights)
    assert [next(names), next(names)] == ["c", "d"]
    assert "e" not in weights
    assert still_waits(asked)
    node.finish(TWO)
    assert asked.result(10) == [*"cdab"]


def test_a_later_shard_need_not_wait_for_the_header_of_an_earlier_one(node: Node, weights: Weights) -> None:
    node.pin({**SHARDS, INDEX: index()})
    node.finish(INDEX, TWO)
    assert torch.equal(weights["a"], PARAMETERS["a"])


def test_without_an_index_a_file_need_not_wait_for_the_header_of_the_next_one(node: Node, weights: Weights) -> None:
    node.pin(SHARDS)
    node.finish(ONE)
    assert "c" in weights
    assert torch.equal(weights["c"], PARAMETERS["c"])
    asked = later(lambda: "e" in weights)
    assert still_waits(asked)
    node.finish(TWO)
    assert asked.result(10) is False


def test_no_file_is_used_before_the_index_is_there(node: Node, weights: Weights) -> None:
    node.pin({**SHARDS, INDEX: index()})
    node.finish(ONE, TWO)
    asked = later(lambda: weights["a"])
    assert still_waits(asked)
    node.finish(INDEX)
    assert torch.equal(asked.result(10), PARAMETERS["a"])


def test_an_index_that_names_a_tensor_which_its_file_lacks_is_an_error_that_names_both(node: Node, weights: Weights) -> None:
    node.pin({**SHARDS, INDEX: index(WEIGHT_MAP | {"a": ONE})})
    node.finish()
    with pytest.raises(WeightsError, match=f"{INDEX} says that tensor 'a' is in {ONE}, which does not have it"):
        list(weights)


@pytest.mark.parametrize("missing", ["model-00003-of-00002.safetensors", f"../{ONE}", f"./{ONE}", ""])
def test_an_index_that_names_a_file_which_is_not_there_is_an_error_that_names_it(node: Node, weights: Weights, missing: str) -> None:
    node.pin({**SHARDS, INDEX: index(WEIGHT_MAP | {"e": missing})})
    node.finish()
    with pytest.raises(WeightsError, match=f"{INDEX} names file {missing!r}, which is not there"):
        list(weights)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"{}", id="no map"),
        pytest.param(index(None), id="null"),
        pytest.param(index([]), id="a list for a map"),
        pytest.param(index({"a": 5}), id="a number for a file"),
        pytest.param(index({"a": [ONE]}), id="a list for a file"),
        pytest.param(b'{"weight_map": ' + b"[" * 100_000, id="nested without end"),
    ],
)
def test_an_index_that_is_none_is_an_error_that_names_it(node: Node, weights: Weights, data: bytes) -> None:
    node.pin({**SHARDS, INDEX: data})
    node.finish()
    with pytest.raises(WeightsError, match=f"{INDEX} has no weight_map from tensor names to files"):
        list(weights)


# Files of many, and all of them


def test_a_file_that_is_not_there_among_many_is_an_error_of_some_hundred_signs(node: Node, weights: Weights) -> None:
    node.pin({f"{'long' * 20}-{number}.bin": b"" for number in range(100)} | {"a\nb": b""})
    with pytest.raises(WeightsError, match=r"has no file 'vocab\.txt'; it has 'a\\nb', long.* and \d+ more$") as caught:
        weights.path("vocab.txt")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name", [".", ""])
def test_a_path_that_is_the_folder_itself_is_an_error_that_says_how_to_have_it(node: Node, weights: Weights, name: str) -> None:
    node.pin(FILES)
    with pytest.raises(WeightsError, match=r"it has config\.json, .*; weights\.directory\(\) is the folder with all of them"):
        weights.path(name)


def test_the_folder_is_had_once_every_file_is_complete(node: Node, weights: Weights) -> None:
    node.pin({**SHARDS, INDEX: index(), "tokenizer/vocab.txt": b"a\n"})
    asked = later(weights.directory)
    node.finish(INDEX, ONE)
    node.land(TWO, 0)  # all its bytes; but it may still be rejected
    assert still_waits(asked)
    node.finish(TWO)
    assert still_waits(asked)
    node.finish("tokenizer/vocab.txt")
    folder = asked.result(10)
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {**SHARDS, INDEX: index(), "tokenizer/vocab.txt": b"a\n"}
    assert load_file(folder / TWO)["a"].equal(PARAMETERS["a"])
    assert weights.restored().seconds is not None


def test_the_folder_of_files_that_are_damaged_is_an_error(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.finish("config.json")
    node.land("model.safetensors", 0)
    asked = later(weights.directory)
    assert still_waits(asked)
    node.reject("model.safetensors")
    with pytest.raises(WeightsError, match="is damaged in the store"):
        asked.result(10)


def test_without_a_uri_there_is_no_folder(tmp_path: Path) -> None:
    weights = Weights(WeightsSettings(cache_dir=tmp_path))
    with pytest.raises(WeightsError, match="the folder cannot be had: WEIGHTS_URI is not set"):
        weights.directory()
    assert dict(weights.folder("unet")) == {}


# Folders of a pipeline

PIPELINE = {
    "model_index.json": b"{}",
    "unet/config.json": b'{"unet": 1}',
    "unet/diffusion_pytorch_model.safetensors.index.json": index({"conv.weight": f"diffusion-{ONE}", "conv.bias": f"diffusion-{TWO}"}),
    f"unet/diffusion-{ONE}": save({"conv.weight": torch.ones(2, 2), "extra": torch.ones(1)}),
    f"unet/diffusion-{TWO}": save({"conv.bias": torch.ones(2)}),
    "vae/config.json": b'{"vae": 1}',
    "vae/decoder/model.safetensors": save({"conv.weight": torch.zeros(2, 2), "conv.bias": torch.zeros(2)}),
    "vae2/model.safetensors": save({"conv.weight": torch.full((2, 2), 2.0)}),
}


def test_each_folder_has_the_tensors_and_files_below_it(node: Node, weights: Weights) -> None:
    node.pin(PIPELINE)
    node.finish()
    unet, vae = weights.folder("unet"), weights.folder("vae/")
    assert list(unet) == ["conv.weight", "conv.bias"]
    assert (len(unet), "extra" in unet) == (2, False)
    assert {name: tensor.sum().item() for name, tensor in unet.to("host")} == {"conv.weight": 4, "conv.bias": 2}
    assert {name: tensor.sum().item() for name, tensor in vae.items()} == {"conv.weight": 0, "conv.bias": 0}
    assert list(weights.folder("vae/decoder")) == list(vae.folder("decoder")) == ["conv.bias", "conv.weight"]
    assert vae.path("config.json").read_bytes() == b'{"vae": 1}'
    assert vae.path("decoder/model.safetensors") == vae.directory() / "decoder/model.safetensors"
    assert vae.directory() == weights.directory() / "vae"
    made = unet.module(lambda: torch.nn.ModuleDict({"conv": torch.nn.Linear(2, 2)}), "cpu")
    assert {name: tensor.sum().item() for name, tensor in made.named_parameters()} == {"conv.weight": 4, "conv.bias": 2}
    assert unet.restored() == weights.restored()


def test_a_folder_waits_for_its_own_files_alone(node: Node, weights: Weights) -> None:
    node.pin(PIPELINE)
    asked = later(weights.folder("vae").directory)
    node.finish("vae/config.json", "vae2/model.safetensors")
    assert still_waits(asked)
    node.finish("vae/decoder/model.safetensors")
    assert asked.result(10).name == "vae"
    assert torch.equal(weights.folder("vae2")["conv.weight"], torch.full((2, 2), 2.0))


def test_one_name_in_two_folders_is_an_error_that_says_how_to_have_either(node: Node, weights: Weights) -> None:
    node.pin(PIPELINE)
    node.finish()
    with pytest.raises(
        WeightsError, match=rf"'conv.bias' is in both unet/diffusion-{TWO} and vae/decoder/.*; weights\.folder\('unet'\) has those"
    ):
        dict(weights)


def test_a_folder_that_is_not_there_is_an_error_that_says_what_is(node: Node, weights: Weights) -> None:
    node.pin(PIPELINE)
    nothing = weights.folder("va")
    for ask in (nothing.directory, lambda: list(nothing), lambda: nothing.path("config.json")):
        with pytest.raises(WeightsError, match=r"has no folder 'va'; it has model_index\.json, unet/config\.json, "):
            ask()
    with pytest.raises(WeightsError, match=r"has no file 'vae/x'; it has config\.json, decoder/model\.safetensors"):
        weights.folder("vae").path("x")


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "/", "a//b", "a/.."])
def test_what_can_be_no_folder_is_an_error(weights: Weights, name: str) -> None:
    with pytest.raises(WeightsError, match="is no folder below the weights"):
        weights.folder(name)


def test_the_lease_is_held_for_as_long_as_one_of_the_folders(node: Node) -> None:
    node.pin(PIPELINE)
    node.finish()
    node.leave()
    weights = [Weights(WeightsSettings(uri=URI, cache_dir=node.cache.root))]
    weights.append(weights[0].folder("vae"))
    assert "conv.bias" in weights[1]
    del weights[0]
    assert evict(node.cache, node.snapshot) is None
    weights.clear()
    assert evict(node.cache, node.snapshot) is not None


def test_what_an_index_says_is_told_in_some_hundred_signs(node: Node, weights: Weights) -> None:
    for number, wrong in enumerate([{LONG_NAME: ONE}, {"c": LONG_NAME}, {LONG_NAME: LONG_NAME}]):
        node.pin({**SHARDS, INDEX: index(wrong)}, version=str(number))
        node.finish()
        with pytest.raises(WeightsError) as caught:
            list(Weights(WeightsSettings(uri=URI, cache_dir=node.cache.root)))
        assert len(str(caught.value)) < 400


def test_finding_tensors_takes_time_by_their_number_and_not_by_that_of_the_files(cache: NodeCache, weights: Weights) -> None:
    def seconds(files: int, tensors: int) -> float:
        names = [f"m-{number:05}.safetensors" for number in range(files)]
        content = {name: save({f"{name}.{at}": torch.ones(1) for at in range(tensors)}) for name in names}
        map_ = {f"{name}.{at}": name for name in names for at in range(tensors)}
        fill_cache(cache.root, f"{URI}/{files}", {**content, INDEX: index(map_)})
        found = Weights(WeightsSettings(uri=f"{URI}/{files}", cache_dir=cache.root))
        len(found)
        began = time.process_time()
        for name in map_:
            assert name in found
        return time.process_time() - began

    assert seconds(400, 10) < 5 * seconds(4, 1000) + 0.02


# In use


def evict(cache: NodeCache, snapshot: str) -> int | None:
    with cache.making_room():
        return room.evict(cache, snapshot)


def test_what_is_read_is_not_evicted_before_it_is_let_go_and_tensors_outlive_it(node: Node) -> None:
    node.pin(FILES)
    node.finish()
    node.leave()
    weights = Weights(WeightsSettings(uri=URI, cache_dir=node.cache.root))
    tensor = weights["t0"]
    assert evict(node.cache, node.snapshot) is None
    del weights
    assert evict(node.cache, node.snapshot) is not None
    assert torch.equal(tensor, MODEL["t0"])


def test_what_is_not_complete_is_not_evicted_either_while_somebody_waits_for_it(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.land("model.safetensors", 0)
    assert "t0" in weights
    node.leave()
    assert evict(node.cache, node.snapshot) is None


# When it is damaged in the store


def test_a_file_that_turns_out_to_be_damaged_in_the_store_fails_those_who_wait_for_it(node: Node, weights: Weights) -> None:
    node.pin(FILES)
    node.land("model.safetensors", 0, 1)
    assert torch.equal(weights["t0"], MODEL["t0"])
    asked = later(lambda: weights["t3"])
    assert still_waits(asked)
    node.reject("model.safetensors")
    with pytest.raises(WeightsError, match=r"^model\.safetensors is damaged in the store, .* upload it again$"):
        asked.result(10)


@pytest.mark.parametrize("leaves", [pytest.param(True, id="nobody fills the rest"), pytest.param(False, id="the rest is being filled")])
def test_those_who_come_between_that_and_the_next_upload_wait_for_it(node: Node, weights: Weights, leaves: bool) -> None:
    node.pin(FILES)
    node.reject("model.safetensors")
    if leaves:
        node.leave()
    asked = later(lambda: weights["t0"])
    assert still_waits(asked)
    node.leave()
    node.pin(FILES, version="2")
    node.finish()
    assert torch.equal(asked.result(10), MODEL["t0"])


# Asking first


class Sidecar:
    """Answers what it is told to; `asked` are the paths that were asked for."""

    def __init__(self, port: int = 0) -> None:
        self.reply: tuple[int, bytes] = (200, b'{"snapshots": []}')
        self.asked: list[str] = []
        sidecar = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                sidecar.asked.append(self.path)
                status, body = sidecar.reply
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> "Sidecar":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def say(self, **row: Any) -> None:
        self.reply = 200, json.dumps({"snapshots": [{"uri": "s3://bucket/other", "snapshot": "f" * 32, "checked": True}, row]}).encode()


@pytest.fixture
def sidecar() -> Iterator[Sidecar]:
    with Sidecar() as sidecar:
        yield sidecar


@pytest.fixture
def careful(cache: NodeCache, sidecar: Sidecar) -> Iterator[Weights]:
    settings = WeightsSettings(uri=URI, cache_dir=cache.root, revalidate="before", port=sidecar.port)
    with contextlib.closing(Weights(settings)) as weights:
        yield weights


def test_who_asks_first_reads_what_the_sidecar_found_in_the_store_and_not_what_is_there(
    node: Node, sidecar: Sidecar, careful: Weights
) -> None:
    node.pin(FILES)
    node.finish()
    older, newer = node.snapshot, tensors(2, *MODEL)
    node.pin({"model.safetensors": save(newer)}, version="2")
    sidecar.say(uri=URI, snapshot=older, checked=False)
    asked = later(lambda: careful["t0"])
    assert still_waits(asked)
    sidecar.say(uri=URI, snapshot=node.snapshot, checked=True)
    node.land("model.safetensors", 0, 1)
    assert torch.equal(asked.result(10), newer["t0"])
    assert set(sidecar.asked) == {"/v1/snapshots"}


def test_who_asks_first_starts_at_once_when_what_is_there_is_what_the_store_has(node: Node, sidecar: Sidecar, careful: Weights) -> None:
    node.pin(FILES)
    node.finish()
    sidecar.say(uri=URI, snapshot=node.snapshot, checked=True)
    assert torch.equal(careful["t0"], MODEL["t0"])
    assert careful.restored().source == "cache"
    assert len(sidecar.asked) == 1


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param((200, b'{"snapshots": []}'), id="nothing"),
        pytest.param((200, b'{"snapshots": [{"uri": "s3://bucket/model"}]}'), id="half a row"),
        pytest.param((200, b'{"snapshots": [{"uri": "s3://bucket/model", "checked": true, "snapshot": null}]}'), id="no snapshot"),
        pytest.param((200, b'{"snapshots": null}'), id="null"),
        pytest.param((200, b"[]"), id="a list"),
        pytest.param((200, b"<html>"), id="no JSON"),
        pytest.param((200, b"\xff"), id="no text"),
        pytest.param((503, b'{"error": {"type": "not_ready", "message": "not yet"}}'), id="an error"),
        pytest.param((9000, b""), id="no status"),
    ],
)
def test_who_asks_first_waits_for_as_long_as_there_is_no_answer(
    node: Node, sidecar: Sidecar, careful: Weights, reply: tuple[int, bytes]
) -> None:
    node.pin(FILES)
    node.finish()
    sidecar.reply = reply
    asked = later(lambda: careful["t0"])
    wait_until("a few questions", lambda: len(sidecar.asked) > 2)
    assert not asked.done()
    assert careful.restored() == Restored(0, 0, "store", None)
    sidecar.say(uri=URI, snapshot=node.snapshot, checked=True)
    assert torch.equal(asked.result(10), MODEL["t0"])


class Uncertain:
    """A sidecar that does what it is told to with each connection; `asked` is how many there were."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self.serve = serve
        self.asked = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=50)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.asked += 1
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.recv(1000)
            self.serve(connection)

    def __enter__(self) -> "Uncertain":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
HALF = b'{"snapshots": [{"uri": "s3://bucket/model", "checked": true, "snap'


def silence(connection: socket.socket) -> None:
    connection.recv(1)  # until the other side has had enough


def drip(connection: socket.socket) -> None:
    for at in range(len(HEAD)):
        connection.sendall(HEAD[at : at + 1])
        time.sleep(0.05)


def half(connection: socket.socket) -> None:
    connection.sendall(HEAD + HALF)


def half_and_silence(connection: socket.socket) -> None:
    half(connection)
    silence(connection)


def flood(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"HTTP/1.1 200 OK\r\n" * 10_000)


@pytest.mark.parametrize("serve", [silence, drip, half, half_and_silence, flood, socket.socket.close])
def test_a_sidecar_that_does_not_answer_in_time_is_asked_again_and_no_probe_waits_for_it(
    node: Node, monkeypatch: pytest.MonkeyPatch, serve: Callable[[socket.socket], None]
) -> None:
    monkeypatch.setattr(snapshot, "ASK_S", 0.2)
    node.pin(FILES)
    node.finish()
    settings = WeightsSettings(uri=URI, cache_dir=node.cache.root, revalidate="before")
    with Uncertain(serve) as sidecar, contextlib.closing(Weights(replace(settings, port=sidecar.port))) as weights:
        weights.watch()
        asked = later(lambda: weights["t0"])
        took = []
        while sidecar.asked < 4:
            began = time.perf_counter()
            assert weights.restored() == Restored(0, 0, "store", None)
            took.append(time.perf_counter() - began)
            time.sleep(0.01)
        assert sorted(took)[len(took) * 9 // 10] < 0.05
        assert still_waits(asked)
        body = json.dumps({"snapshots": [{"uri": URI, "checked": True, "snapshot": node.snapshot}]}).encode()
        sidecar.serve = lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + body)
        assert torch.equal(asked.result(10), MODEL["t0"])


def test_what_the_sidecar_calls_a_snapshot_stays_in_the_cache(node: Node, sidecar: Sidecar, careful: Weights, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "x")
    sidecar.say(uri=URI, snapshot="../" * 3 + str(tmp_path)[1:], checked=True)
    asked = later(lambda: careful["t0"])
    wait_until("a few questions", lambda: len(sidecar.asked) > 2)
    assert still_waits(asked)
    node.pin(FILES)
    node.finish()
    sidecar.say(uri=URI, snapshot=node.snapshot, checked=True)
    assert torch.equal(asked.result(10), MODEL["t0"])


def test_who_asks_first_waits_for_the_sidecar_itself(node: Node) -> None:
    node.pin(FILES)
    node.finish()
    port = free_port()
    asked = later(lambda: Weights(WeightsSettings(uri=URI, cache_dir=node.cache.root, revalidate="before", port=port))["t0"])
    assert still_waits(asked)
    with Sidecar(port) as sidecar:
        sidecar.say(uri=URI, snapshot=node.snapshot, checked=True)
        assert torch.equal(asked.result(10), MODEL["t0"])


def test_who_does_not_ask_first_does_not_ask_at_all(node: Node, sidecar: Sidecar) -> None:
    node.pin(FILES)
    node.finish()
    assert "t0" in Weights(WeightsSettings(uri=URI, cache_dir=node.cache.root, port=sidecar.port))
    assert sidecar.asked == []


# Memory

READ_THEN_WRITE = """
import pathlib, sys
from weights_cache.reader import Weights
from weights_cache.settings import WeightsSettings
tensors = dict(Weights(WeightsSettings(uri=sys.argv[1], cache_dir=pathlib.Path(sys.argv[2]))))
print(sum(tensor.double().sum().item() for tensor in tensors.values()), flush=True)
sys.stdin.readline()
tensors["t1"][0, 0] = 7
print(tensors["t1"][0, 0].item(), flush=True)
sys.stdin.readline()
"""


def memory(pid: int, path: Path) -> dict[str, int]:
    """What a process holds in memory of a file it has mapped, in bytes, by the kernel's names for its kinds."""
    smaps = Path(f"/proc/{pid}/smaps").read_text()
    entries = re.findall(rf"{re.escape(str(path))}\n(.*?)VmFlags", smaps, re.DOTALL)
    assert entries
    kinds = ("Rss", "Pss", "Anonymous")
    return {kind: 1024 * sum(int(re.findall(rf"^{kind}: +(\d+) kB", entry, re.MULTILINE)[0]) for entry in entries) for kind in kinds}


def test_two_processes_share_every_page_until_one_of_them_writes_to_it_for_itself_alone(cache: NodeCache) -> None:
    snapshot = fill_cache(cache.root, URI, FILES)
    path = cache.snapshot_blobs(snapshot)["model.safetensors"].path
    ours = dict(Weights(WeightsSettings(uri=URI, cache_dir=cache.root)))
    command = [sys.executable, "-c", READ_THEN_WRITE, URI, str(cache.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        theirs = float(other.stdout.readline())
        assert sum(tensor.double().sum().item() for tensor in ours.values()) == theirs
        both = memory(os.getpid(), path), memory(other.pid, path)
        assert all(len(FILE) <= one["Rss"] <= len(FILE) + mmap.PAGESIZE for one in both)
        assert sum(one["Pss"] for one in both) < 1.1 * len(FILE)
        assert sum(one["Anonymous"] for one in both) == 0
        other.stdin.write("write\n")
        other.stdin.flush()
        assert float(other.stdout.readline()) == 7
        assert memory(other.pid, path)["Anonymous"] == mmap.PAGESIZE
        assert memory(os.getpid(), path)["Anonymous"] == 0
    assert torch.equal(ours["t1"], MODEL["t1"])
    assert path.read_bytes() == FILE


# What is wrong


def test_what_the_sidecar_says_is_wrong_is_known_without_asking_and_forgotten_when_it_is_over(
    cache: NodeCache, node: Node, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "HEAR_S", 0.01)
    weights = Weights(WeightsSettings(uri=URI, cache_dir=cache.root, port=sidecar.port))
    error = "no objects below s3://bucket/model/;\nis the prefix right?" + "x" * 5000
    sidecar.say(uri=URI, snapshot=None, checked=False, phase="waiting", error=error)
    weights.watch()
    told = wait_until("the reason", lambda: weights.restored().error)
    assert told.startswith("the sidecar says: no objects below s3://bucket/model/; is the prefix right?")
    assert len(told) <= 2000
    sidecar.say(uri=URI, snapshot=None, checked=False, error=None)
    wait_until("that it is over", lambda: weights.restored().error is None)
    sidecar.say(uri=URI, snapshot=None, checked=False, phase="failed", error="again")
    wait_until("the next one", lambda: weights.restored().error)
    sidecar.say(uri=URI, snapshot=None, checked=False, phase="fetching", error="again")
    wait_until("that they come all the same", lambda: weights.restored().error is None)
    node.pin(FILES)
    node.finish()
    wait_until("the weights", lambda: weights.restored().seconds is not None)
    assert weights.restored().error is None
    weights.close()


def test_what_is_wrong_with_the_cache_is_known_too(cache: NodeCache) -> None:
    weights = Weights(WeightsSettings(uri=URI, cache_dir=cache.root, port=free_port()))
    (cache.root / "FORMAT").write_text("99")
    weights.watch()
    assert "has layout '99'" in wait_until("the reason", lambda: weights.restored().error)
    (cache.root / "FORMAT").write_text("1")
    wait_until("that it is over", lambda: weights.restored().error is None)
    weights.close()


def test_a_sidecar_that_says_nothing_sensible_is_not_repeated(cache: NodeCache, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "HEAR_S", 0.01)
    weights = Weights(WeightsSettings(uri=URI, cache_dir=cache.root, port=sidecar.port))
    weights.watch()
    for body in (b"junk", b"[]", b'{"snapshots": 7}', b'{"snapshots": [7]}', b"[" * 9999):
        sidecar.reply = 200, body
        before = len(sidecar.asked)
        wait_until("that it was asked", lambda before=before: len(sidecar.asked) > before + 1)  # type: ignore[misc]
        assert weights.restored().error is None
    weights.close()


def test_after_close_nobody_watches_any_more(cache: NodeCache) -> None:
    weights = Weights(WeightsSettings(uri=URI, cache_dir=cache.root, port=free_port()))
    weights.watch()
    (thread,) = [one for one in threading.enumerate() if one.name == "weights"]
    weights.close()
    assert not thread.is_alive()


def test_the_tensors_of_some_files_alone_are_had_while_the_others_are_still_missing(node: Node, weights: Weights) -> None:
    node.pin(PIPELINE)
    node.finish("vae2/model.safetensors")
    assert weights.files() == sorted(PIPELINE)
    assert weights.folder("vae").files() == ["config.json", "decoder/model.safetensors"]
    assert {name: tensor.sum().item() for name, tensor in weights.only("vae2/model.safetensors").items()} == {"conv.weight": 8}
    with pytest.raises(WeightsError, match="has no file 'nonesuch'"):
        list(weights.only("nonesuch"))


def test_without_a_uri_there_are_no_files(tmp_path: Path) -> None:
    assert Weights(WeightsSettings(cache_dir=tmp_path)).files() == []
