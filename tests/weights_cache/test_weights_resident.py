"""The resident tier: what a function leaves in a device's memory with the node's agent, and the next one attaches."""

import contextlib
import functools
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.support import ROOT, fill_cache, wait_until
from tests.weights_cache.conftest import Sidecar
from tests.weights_cache.devices import DEVICES, SMALL, needs_gpu
from tests.weights_cache.mounts import on_read_only
from tests.weights_cache.node import URI, Node
from weights_cache import resident
from weights_cache.cache import NodeCache
from weights_cache.errors import WeightsError
from weights_cache.reader import Weights
from weights_cache.resident import MAX_MESSAGE_BYTES, SOCKET, Residents
from weights_cache.restore.device import HostDevice, _HostShared, open_device
from weights_cache.restore.pipeline import Ring
from weights_cache.settings import WeightsSettings

MIB = 1 << 20
MODEL = {f"t{n}": torch.randn(512, 512, generator=torch.Generator().manual_seed(n)) for n in range(4)}  # of one MiB each
FILE = save(MODEL)

Start = Callable[..., Sidecar]
Open = Callable[..., Weights]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    found: str = request.param[0]
    return found


@pytest.fixture(autouse=True)
def _small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ring, "open", classmethod(lambda cls, name: cls(open_device(name), **SMALL)))


@pytest.fixture
def function(cache: NodeCache) -> Open:
    """function(resident=True): the weights as a new function sees them."""
    fill_cache(cache.root, URI, {"model.safetensors": FILE})
    return lambda **settings: Weights(WeightsSettings(uri=URI, cache_dir=cache.root, **{"resident": True, **settings}))


def same(found: dict[str, Tensor], expected: dict[str, Tensor] = MODEL) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name].cpu(), expected[name]) for name in expected)


def events(residents: Residents) -> dict[str, int]:
    return {name: count for name, count in residents.counts.items() if count}


def is_idle(residents: Residents) -> bool:
    return all(row["leases"] == 0 for row in residents.rows())


# One function after the other


def test_what_a_function_restored_is_attached_by_the_next_one(residents: Residents, function: Open, device: str) -> None:
    first = function()
    assert same(dict(first.to(device)))
    assert first.restored().source == "cache"
    (row,) = residents.rows()
    assert (row["uri"], row["bytes"], row["leases"]) == (URI, 4 * MIB, 1)
    del first
    wait_until("the lease's end", lambda: is_idle(residents))
    second = function()
    assert same(dict(second.to(device)))
    assert second.restored().source == "resident"
    assert events(residents) == {"missed": 1, "kept": 1, "attached": 1}


def test_both_may_run_at_the_same_time(residents: Residents, function: Open, device: str) -> None:
    weights = [function() for _ in range(3)]
    found = [dict(one.to(device)) for one in weights]
    assert all(map(same, found))
    assert [one.restored().source for one in weights] == ["cache", "resident", "resident"]
    assert [row["leases"] for row in residents.rows()] == [3]


def test_nothing_is_copied_to_attach(residents: Residents, function: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    dict(function().to("host"))

    def none(*_: object) -> None:
        raise AssertionError("a copy")

    monkeypatch.setattr(HostDevice, "copy", none)
    assert same(dict(function().to("host")))


def test_weights_are_attached_before_the_node_has_them_again(cache: NodeCache, node: Node, residents: Residents, device: str) -> None:
    settings = WeightsSettings(uri=URI, cache_dir=cache.root, resident=True)
    node.pin({"model.safetensors": FILE})
    node.finish()
    first = Weights(settings)
    dict(first.to(device))
    (blob,) = cache.snapshot_blobs(node.snapshot).values()
    node.leave()
    for path in (blob.path, blob.record):
        path.unlink()
    node.pin({"model.safetensors": FILE})
    node.land("model.safetensors", 0)  # its header, and no tensor
    second = Weights(settings)
    assert same(dict(second.to(device)))
    assert (second.restored().source, second.restored().bytes) == ("resident", MIB)


def test_a_module_is_built_around_what_stayed(cache: NodeCache, residents: Residents, device: str) -> None:
    layer = torch.nn.Linear(300, 7)
    fill_cache(cache.root, URI, {"model.safetensors": save(dict(layer.state_dict()))})
    settings = WeightsSettings(uri=URI, cache_dir=cache.root, resident=True)
    for source in ("cache", "resident"):
        weights = Weights(settings)
        made = weights.module(lambda: torch.nn.Linear(300, 7), device)
        assert same(dict(made.state_dict()), dict(layer.state_dict()))
        assert weights.restored().source == source


# What is the same, and what is not


def test_another_version_of_the_same_file_is_restored(cache: NodeCache, node: Node, residents: Residents) -> None:
    settings = WeightsSettings(uri=URI, cache_dir=cache.root, resident=True)
    newer = {name: tensor + 1 for name, tensor in MODEL.items()}
    for version, model in (("1", MODEL), ("2", newer)):
        node.pin({"model.safetensors": save(model)}, version=version)
        node.finish()
        weights = Weights(settings)
        assert same(dict(weights.to("host")), model)
        assert weights.restored().source == "cache"


def test_another_dtype_another_device_and_other_tensors_are_restored(residents: Residents, function: Open) -> None:
    dict(function().to("host"))
    for dtype in (torch.float16, torch.bfloat16):  # of the same size
        assert same(dict(function().to("host", dtype=dtype)), {name: tensor.to(dtype) for name, tensor in MODEL.items()})
    assert same(dict(function().to("host:1")))
    assert same(dict(function().to({"": "host", "t3": "cpu"})))
    assert (residents.counts["attached"], residents.counts["kept"]) == (0, 5)


def test_with_a_device_map_each_device_keeps_its_part(residents: Residents, function: Open) -> None:
    places = {"": "host", "t1": "host:1", "t2": "cpu"}
    dict(function().to(places))
    assert sorted((row["device"], row["bytes"]) for row in residents.rows()) == [("host", 2 * MIB), ("host:1", MIB)]
    again = function()
    assert same(dict(again.to(places)))
    assert again.restored().source == "resident"


def test_a_shard_that_stayed_is_attached_and_the_others_are_restored(cache: NodeCache, residents: Residents, device: str) -> None:
    shards = {f"{name}.safetensors": save({name: tensor}) for name, tensor in MODEL.items()}
    fill_cache(cache.root, URI, shards)
    settings = WeightsSettings(uri=URI, cache_dir=cache.root, resident=True)
    first = Weights(settings)
    dict(first.to(device))
    del first
    wait_until("the leases' end", lambda: is_idle(residents))
    assert residents.make_room(residents.rows()[0]["device"], 2 * MIB) == 2 * MIB
    second = Weights(settings)
    assert same(dict(second.to(device)))
    assert (second.restored().source, residents.counts["attached"], residents.counts["kept"]) == ("cache", 2, 6)


def test_a_function_that_does_not_want_it_leaves_nothing_and_attaches_nothing(residents: Residents, function: Open, device: str) -> None:
    dict(function().to(device))
    apart = function(resident=False)
    assert same(dict(apart.to(device)))
    assert (apart.restored().source, events(residents)) == ("cache", {"missed": 1, "kept": 1})


def test_a_write_in_place_reaches_no_other_function(residents: Residents, function: Open) -> None:
    first, second = dict(function().to("host")), dict(function().to("host"))
    first["t0"].zero_()
    second["t1"].zero_()
    third = dict(function().to("host"))
    assert same(third)
    assert torch.equal(second["t0"], MODEL["t0"])
    assert torch.equal(first["t1"], MODEL["t1"])


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_write_in_place_fails_and_reaches_nobody(residents: Residents, function: Open, cache: NodeCache) -> None:
    kept = dict(function().to("cuda:0"))
    code = """
import pathlib, sys, torch
from weights_cache.reader import Weights
from weights_cache.settings import WeightsSettings
found = dict(Weights(WeightsSettings(uri=sys.argv[1], cache_dir=pathlib.Path(sys.argv[2]), resident=True)).to("cuda:0"))
found["t0"].zero_()
torch.cuda.synchronize()
"""
    command = [sys.executable, "-c", code, URI, str(cache.root)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode
    assert "CUDA error" in found.stderr
    assert same(kept)


# Limits, leases, room


def test_what_was_used_least_lately_goes_when_the_limit_is_reached(cache: NodeCache, residents: Residents) -> None:
    def restore(name: str) -> str:
        fill_cache(cache.root, f"s3://bucket/{name}", {f"{name}.safetensors": save({name: torch.zeros(6 << 20)})})  # 24 MiB
        weights = Weights(WeightsSettings(uri=f"s3://bucket/{name}", cache_dir=cache.root, resident=True))
        dict(weights.to("host"))
        source = weights.restored().source
        del weights
        wait_until("the lease's end", lambda: is_idle(residents))
        return source

    assert [restore(name) for name in ("a", "b", "a", "c", "a", "b")] == ["cache", "cache", "resident", "cache", "resident", "cache"]
    assert residents.counts["evicted"] == 2  # b for c, c for b
    assert sorted(row["uri"] for row in residents.rows()) == ["s3://bucket/a", "s3://bucket/b"]


def test_what_is_in_use_stays_and_what_does_not_fit_beside_it_is_not_kept(cache: NodeCache, residents: Residents) -> None:
    held = []
    for name in ("a", "b", "c"):
        fill_cache(cache.root, f"s3://bucket/{name}", {f"{name}.safetensors": save({name: torch.zeros(6 << 20)})})
        weights = Weights(WeightsSettings(uri=f"s3://bucket/{name}", cache_dir=cache.root, resident=True))
        assert list(dict(weights.to("host"))) == [name]
        held.append(weights)
    assert (events(residents)["kept"], events(residents)["refused"]) == (2, 1)


class Tight(HostDevice):
    """Has room for 10 MiB, of which what the tier keeps takes its part."""

    residents: Residents

    def free_bytes(self) -> int:
        return 10 * MIB - sum(int(row["bytes"]) for row in self.residents.rows())


@pytest.mark.parametrize("wants", [True, False], ids=["resident", "not resident"])
def test_what_nobody_uses_goes_when_a_function_needs_the_memory(
    cache: NodeCache, residents: Residents, monkeypatch: pytest.MonkeyPatch, wants: bool
) -> None:
    Tight.residents = residents
    monkeypatch.setattr(Ring, "open", classmethod(lambda cls, name: cls(Tight(), **SMALL)))
    for name, size in (("old", 2), ("new", 3), ("large", 8)):
        fill_cache(cache.root, f"s3://bucket/{name}", {"model.safetensors": save({name: torch.zeros(size << 18)})})
        weights = Weights(WeightsSettings(uri=f"s3://bucket/{name}", cache_dir=cache.root, resident=wants or name != "large"))
        if name == "large":
            held = Weights(WeightsSettings(uri="s3://bucket/new", cache_dir=cache.root, resident=True))
            dict(held.to("host"))  # so that it is in use
            with pytest.raises(WeightsError, match=re.escape("need 8,388,608 bytes, 7,340,032 are free")):
                dict(weights.to("host"))
            assert [row["uri"] for row in residents.rows()] == ["s3://bucket/new"]
            del held
            wait_until("the lease's end", lambda: is_idle(residents))
        assert list(dict(weights.to("host"))) == [name]
        del weights
        wait_until("the lease's end", lambda: is_idle(residents))
    assert [row["uri"] for row in residents.rows()] == ["s3://bucket/large"] * wants


def test_shards_that_stayed_are_not_counted_as_room_that_is_needed(
    cache: NodeCache, residents: Residents, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tight.residents = residents
    monkeypatch.setattr(Ring, "open", classmethod(lambda cls, name: cls(Tight(), **SMALL)))
    shards = {f"{name}.safetensors": save({name: torch.zeros(3 << 18)}) for name in ("a", "b", "c")}  # 9 MiB
    fill_cache(cache.root, URI, shards)
    settings = WeightsSettings(uri=URI, cache_dir=cache.root, resident=True)
    for source in ("cache", "resident"):
        weights = Weights(settings)
        assert list(dict(weights.to("host"))) == ["a", "b", "c"]
        assert weights.restored().source == source


def test_an_agent_may_ask_for_room_for_what_it_needs_beside_the_weights(residents: Residents, function: Open, device: str) -> None:
    weights = function()
    dict(weights.to(device))
    assert weights.make_room(device, MIB) == 0  # it is in use
    del weights
    wait_until("the lease's end", lambda: is_idle(residents))
    assert function(resident=False).make_room(device, MIB) == 4 * MIB
    assert residents.rows() == []


def test_without_a_tier_there_is_no_room_to_be_made(function: Open) -> None:
    assert function().make_room("host", MIB) == 0


@pytest.mark.gpu
@needs_gpu
def test_a_gpus_memory_is_free_again_when_nobody_has_it_any_more(residents: Residents, function: Open) -> None:
    before = torch.cuda.mem_get_info()[0]
    weights = function()
    tensors = dict(weights.to("cuda:0"))
    del tensors, weights
    wait_until("the lease's end", lambda: is_idle(residents))
    assert before - torch.cuda.mem_get_info()[0] >= 4 * MIB
    residents.make_room(residents.rows()[0]["device"], 1)
    wait_until("the memory", lambda: before - torch.cuda.mem_get_info()[0] < 4 * MIB)


# What goes wrong


@pytest.mark.parametrize("how", ["given up", "damaged"])
def test_a_restore_that_does_not_end_leaves_nothing(node: Node, cache: NodeCache, residents: Residents, device: str, how: str) -> None:
    weights = Weights(WeightsSettings(uri=URI, cache_dir=cache.root, resident=True))
    node.pin({"model.safetensors": FILE})
    node.land("model.safetensors", 0, 1)
    tensors = weights.to(device)
    assert next(tensors)[0] == "t0"
    if how == "given up":
        tensors.close()  # type: ignore[attr-defined]
    else:
        node.reject("model.safetensors")
        with pytest.raises(WeightsError, match="is damaged in the store"):
            dict(tensors)
    assert residents.rows() == []


def test_memory_that_cannot_be_attached_is_dropped_and_restored(
    residents: Residents, function: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dict(function().to("host"))

    def fails(*_: object) -> Tensor:
        raise WeightsError("the device has been reset")

    with monkeypatch.context() as patch:
        patch.setattr(HostDevice, "adopt", fails)
        assert same(dict(function().to("host")))
    assert "what stayed on host cannot be attached: the device has been reset" in caplog.text
    assert (residents.counts["kept"], len(residents.rows())) == (2, 1)  # the new one
    again = function()
    dict(again.to("host"))
    assert again.restored().source == "resident"


def test_memory_that_is_shorter_than_it_was_said_to_be_is_dropped_and_restored(
    residents: Residents, function: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_HostShared, "descriptor", lambda self: os.memfd_create("relight-short"))
        patch.setattr(resident, "_held_bytes", lambda descriptor, device, said: said)  # an agent that believes what it is told
        dict(function().to("host"))
    assert same(dict(function().to("host")))
    assert "what stayed on host cannot be attached: there are 0 bytes where 4194304 are wanted" in caplog.text


def test_memory_that_gives_no_descriptor_is_not_left_and_serves_all_the_same(
    residents: Residents, function: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise WeightsError("not supported")

    monkeypatch.setattr(_HostShared, "seal", fails)
    assert same(dict(function().to("host")))
    assert "weights that stay on host can be written to by this function: not supported" in caplog.text
    assert residents.counts["kept"] == 1
    monkeypatch.setattr(_HostShared, "descriptor", fails)
    assert same(dict(function().to("host:1")))
    assert "weights cannot stay on host:1: not supported" in caplog.text
    assert residents.counts["kept"] == 1


def test_where_no_agent_answers_a_function_restores_and_says_so(function: Open, cache: NodeCache, caplog: pytest.LogCaptureFixture) -> None:
    weights = function()
    assert same(dict(weights.to("host")))
    assert f"weights cannot stay on a device, for no agent answers in {cache.root / SOCKET}" in caplog.text


@contextlib.contextmanager
def answering(cache: NodeCache, answer: bytes | None) -> Iterator[None]:
    """An agent that says always the same, or nothing at all and stays."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(cache.root / SOCKET))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                while connection.recv(MAX_MESSAGE_BYTES):
                    if answer is not None:
                        connection.send(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    ("answer", "said"),
    [(None, "timed out"), (b"", "it has gone"), (b'{"error": "enough"}', "enough"), (b"[", "Expecting value")],
    ids=["silent", "gone", "an error", "junk"],
)
def test_an_agent_that_does_not_answer_as_it_should_costs_a_warning(
    cache: NodeCache, function: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, said: str
) -> None:
    if answer is None:
        monkeypatch.setattr("weights_cache.restore.tier.ANSWER_S", 0.2)
    with answering(cache, answer):
        assert same(dict(function().to("host")))
    assert f"the resident tier does not answer: {said}" in caplog.text


# The agent itself, and functions that are processes


@pytest.fixture
def agent(sidecar: Start) -> Start:
    return functools.partial(sidecar, "", "--agent", WEIGHTS_RESIDENT_BYTES=str(64 * MIB))


RESTORE = """
import hashlib, os, pathlib, signal, sys
from weights_cache.reader import Weights
from weights_cache.settings import WeightsSettings
uri, cache, device, end = sys.argv[1:]
weights = Weights(WeightsSettings(uri=uri, cache_dir=pathlib.Path(cache), resident=True))
digest = hashlib.sha256()
for _, tensor in weights.to(device):
    digest.update(tensor.cpu().numpy().tobytes())
print(weights.restored().source, digest.hexdigest(), flush=True)
if end == "wait":
    sys.stdin.readline()
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""
DIGEST = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in MODEL.values())).hexdigest()


def start(cache: NodeCache, device: str, end: str, **options: Any) -> "subprocess.Popen[str]":
    """A function's process that restores, says how, and ends in one of several ways."""
    command = [sys.executable, "-c", RESTORE, URI, str(cache.root), device, end]
    command = options.get("within", lambda command: command)(command)
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(cache: NodeCache, device: str, end: str = "exit", **options: Any) -> str:
    with start(cache, device, end, **options) as process:
        out, err = process.communicate(timeout=60)
    assert out, err
    source, digest = out.split()
    assert digest == DIGEST
    return source


def leases(agent: Sidecar) -> list[Any]:
    return [row["leases"] for row in agent.get("/v1/residents").json()["residents"]]


def test_weights_outlive_the_process_however_it_ends(cache: NodeCache, function: Open, agent: Start, device: str) -> None:
    found = agent()
    assert run(cache, device, "kill") == "cache"
    wait_until("the lease's end", lambda: leases(found) == [0])
    assert [run(cache, device, end) for end in ("kill", "exit", "exit")] == ["resident"] * 3
    metrics = found.metrics()
    assert metrics['weights_resident_events_total{event="attached"}'] == 3
    assert [value for name, value in metrics.items() if name.startswith("weights_resident_bytes{")] == [4 * MIB]


def test_a_pod_that_can_only_read_the_cache_attaches_too(cache: NodeCache, function: Open, agent: Start) -> None:
    agent()
    within = functools.partial(on_read_only, cache.root)
    assert [run(cache, "host", within=within) for _ in range(2)] == ["cache", "resident"]


def test_the_agents_end_takes_nothing_from_a_function_that_runs(cache: NodeCache, function: Open, agent: Start, device: str) -> None:
    found = agent()
    with start(cache, device, "wait") as process:
        assert process.stdout is not None
        assert process.stdout.readline().split()[0] == "cache"
        attached = function()
        tensors = dict(attached.to(device))
        assert attached.restored().source == "resident"
        found.server.kill()
        assert same(tensors)
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    again = agent()  # in the place of the socket that the killed one left
    assert leases(again) == []
    assert [run(cache, device) for _ in range(2)] == ["cache", "resident"]


def test_an_agent_that_hangs_costs_a_function_seconds_and_no_more(cache: NodeCache, function: Open, agent: Start) -> None:
    found = agent()
    found.server.signal(signal.SIGSTOP)
    try:
        assert run(cache, "host") == "cache"
    finally:
        found.server.signal(signal.SIGCONT)


def test_an_agent_keeps_nothing_unless_it_is_told_how_much(cache: NodeCache, function: Open, sidecar: Start) -> None:
    found = sidecar("", "--agent")
    assert not (cache.root / SOCKET).exists()
    assert [run(cache, "host") for _ in range(2)] == ["cache", "cache"]
    assert found.get("/v1/residents").json() == {"residents": []}


def test_at_its_end_the_agent_lets_everything_go(cache: NodeCache, function: Open, agent: Start) -> None:
    found = agent()
    run(cache, "host")
    found.server.signal(signal.SIGTERM)
    assert found.server.wait() == 0
    assert not (cache.root / SOCKET).exists()
