"""What a function sees of its weights while a sidecar brings them, and after."""

import json
import mmap
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from tests.support import ROOT, fill_cache, free_port, wait_until
from tests.weights_cache.node import URI, Node, later, still_waits
from weights_cache import chunks, room
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
def careful(cache: NodeCache, sidecar: Sidecar) -> Weights:
    return Weights(WeightsSettings(uri=URI, cache_dir=cache.root, revalidate="before", port=sidecar.port))


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
