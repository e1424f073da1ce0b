"""What the node's agent keeps of the resident tier, and what it says to functions: limits, leases, descriptors, messages."""

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support import wait_until
from weights_cache.cache import NodeCache
from weights_cache.resident import MAX_MESSAGE_BYTES, PIECE_BYTES, SOCKET, Residents

MIB = 1 << 20


@pytest.fixture
def talk(cache: NodeCache, residents: Residents) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10)
        connection.connect(str(cache.root / SOCKET))
        yield connection


def open_descriptors() -> int:
    links = list(Path("/proc/self/fd").iterdir())
    names = [str(link.readlink()) for link in links if link.is_symlink()]  # one was of the list itself
    return sum("relight-test" in name or name == "/dev/full" for name in names)


GOOD = {"do": "keep", "key": "k", "device": "host", "bytes": 1, "uri": "u"}


def memory(size: int) -> int:
    """A descriptor of so many bytes of the host's memory, as a function leaves them."""
    found = os.memfd_create("relight-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(found, size)
    fcntl.fcntl(found, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return found


def gpu_memory(size: int) -> int:
    """The like of a GPU's, of which only its driver knows the size: a descriptor of a device."""
    return os.open("/dev/full", os.O_RDONLY | os.O_CLOEXEC)


@pytest.mark.parametrize(
    "message",
    [
        b"junk",
        b"[]",
        b"{}",
        b'{"do": "attach", "key": "k"}',
        b'{"do": "fly", "device": "host"}',
        b'{"do": "make_room", "device": "host", "bytes": "all"}',
        b'{"do": "make_room", "device": "host", "bytes": -1}',
        b'{"do": "make_room", "device": ["d"], "bytes": 1}',
        b'{"do": "make_room", "device": "d", "bytes": 1}',
        b'{"do": "attach", "device": "GPU-a", "key": ""}',
        b'{"do": "attach", "device": "GPU-a\\n", "key": "k"}',
        b'{"do": "make_room", "device": "host", "bytes": 99999999999999999999}',
        json.dumps(GOOD).encode(),  # without a descriptor
        b"[" * 60_000,
        b" " * (MAX_MESSAGE_BYTES + 1),
    ],
    ids=lambda message: message[:40].decode(),
)
def test_a_message_that_nobody_understands_is_answered_and_ends_the_connection(talk: socket.socket, message: bytes) -> None:
    talk.send(message)
    assert b'{"error": "no such message' in talk.recv(MAX_MESSAGE_BYTES)
    assert talk.recv(1) == b""


@pytest.mark.parametrize(
    ("message", "count"),
    [
        pytest.param({**GOOD, "bytes": 0}, 1, id="no bytes"),
        pytest.param({**GOOD, "key": None}, 1, id="no key"),
        pytest.param({**GOOD, "do": "attach"}, 1, id="a descriptor that nobody asked for"),
        pytest.param(GOOD, 3, id="too many descriptors"),
        pytest.param({**GOOD, "bytes": 65 * MIB}, 1, id="too large"),
    ],
)
def test_descriptors_that_are_not_kept_are_closed(talk: socket.socket, residents: Residents, message: dict[str, Any], count: int) -> None:
    given = [memory(65 * MIB if message["bytes"] == 65 * MIB else 1) for _ in range(count)]
    socket.send_fds(talk, [json.dumps(message).encode()], given)
    for descriptor in given:
        os.close(descriptor)
    talk.recv(MAX_MESSAGE_BYTES)
    talk.close()
    wait_until("its end", lambda: open_descriptors() == 0)
    assert residents.rows() == []


@pytest.mark.parametrize(
    ("device", "make", "told"),
    [
        pytest.param("host", lambda: os.memfd_create("relight-test"), "sealed", id="memory that may grow"),
        pytest.param("host", lambda: memory(2 * MIB), "2097152 bytes, 1 were said", id="more memory than is said"),
        pytest.param("host", lambda: os.open("/dev/full", os.O_RDONLY), "sealed", id="a device in the place of memory"),
        pytest.param("host", lambda: os.open("/etc/hosts", os.O_RDONLY), "sealed", id="a file on a disk"),
        pytest.param("GPU-1", lambda: memory(1), "not of a device", id="the host's memory for a GPU's"),
        pytest.param("GPU-1", lambda: socket.socket().detach(), "not of a device", id="a socket"),
        pytest.param("GPU-1", lambda: os.open("/", os.O_RDONLY), "not of a device", id="a folder"),
    ],
)
def test_a_descriptor_of_anything_else_is_not_kept(
    talk: socket.socket, residents: Residents, device: str, make: Callable[[], int], told: str
) -> None:
    given = make()
    socket.send_fds(talk, [json.dumps({**GOOD, "device": device}).encode()], [given])
    os.close(given)
    assert told in talk.recv(MAX_MESSAGE_BYTES).decode()
    assert residents.rows() == []


def test_a_gpus_memory_counts_for_what_a_gpu_gives_at_least() -> None:
    residents = Residents(3 * PIECE_BYTES)
    given = gpu_memory(1)
    assert [residents.keep(key, "GPU-1", 1, "u", given, "holder") for key in "abcd"] == [True, True, True, False]
    (attached, said) = residents.attach("a", "GPU-1", "other") or (-1, 0)
    assert said == 1  # what the next function asks for
    os.close(attached)
    os.close(given)
    residents.close()


def test_the_devices_of_the_host_share_its_memory() -> None:
    residents = Residents(3 * MIB)
    given = memory(2 * MIB)
    assert residents.keep("a", "host", 2 * MIB, "u", given, "holder")
    assert not residents.keep("a", "host:1", 2 * MIB, "u", given, "holder")
    residents.release("holder")
    assert residents.keep("a", "host:1", 2 * MIB, "u", given, "holder")
    assert [row["device"] for row in residents.rows()] == ["host:1"]
    os.close(given)
    residents.close()


def test_pieces_are_bounded_whatever_their_size_and_devices() -> None:
    residents = Residents(64 * MIB, pieces=3)
    given = memory(1)
    kept = [residents.keep(str(number), "host", 1, "u", given, "holder") for number in range(5)]
    assert kept == [True, True, True, False, False]
    residents.release("holder")
    assert residents.keep("x", "host", 1, "u", given, "holder")
    assert open_descriptors() == 4  # and `given`
    os.close(given)
    residents.close()
    assert open_descriptors() == 0


class TierMachine(RuleBasedStateMachine):
    """Any sequence of what functions do: the limit holds on each device, what is leased stays, and no descriptor is lost."""

    LIMIT = 10 * PIECE_BYTES
    PIECES = 5

    def __init__(self) -> None:
        super().__init__()
        self.residents = Residents(self.LIMIT, self.PIECES)
        self.holders: dict[int, dict[tuple[str, str], int]] = {}  # what each has a lease on, and its bytes

    keys, devices, names = st.sampled_from("abcd"), st.sampled_from(["host", "GPU-1"]), st.integers(0, 3)

    @rule(key=keys, device=devices, size=st.integers(1, 12), name=names)
    def keep(self, key: str, device: str, size: int, name: int) -> None:
        given = memory(size * PIECE_BYTES) if device == "host" else gpu_memory(size)
        is_kept = self.residents.keep(key, device, size * PIECE_BYTES, "u", given, name)
        os.close(given)
        if is_kept:
            self.holders.setdefault(name, {})[device, key] = size * PIECE_BYTES

    @rule(key=keys, device=devices, name=names)
    def attach(self, key: str, device: str, name: int) -> None:
        found = self.residents.attach(key, device, name)
        assert found or not any((device, key) in held for held in self.holders.values())
        if found:
            os.close(found[0])
            self.holders.setdefault(name, {})[device, key] = found[1]

    @rule(name=names)
    def release(self, name: int) -> None:
        self.residents.release(name)
        self.holders.pop(name, None)

    @rule(device=devices, size=st.integers(1, 20))
    def make_room(self, device: str, size: int) -> None:
        idle = sum(row["bytes"] for row in self.residents.rows() if row["device"] == device and not row["leases"])
        assert min(size * PIECE_BYTES, idle) <= self.residents.make_room(device, size * PIECE_BYTES) <= idle

    @rule(key=keys, device=devices)
    def drop(self, key: str, device: str) -> None:
        self.residents.drop(key, device)
        for held in self.holders.values():
            held.pop((device, key), None)

    @invariant()
    def holds(self) -> None:
        rows = self.residents.rows()
        assert len(rows) <= self.PIECES
        for device in ("host", "GPU-1"):
            assert sum(row["bytes"] for row in rows if row["device"] == device) <= self.LIMIT
        leased = {place: size for held in self.holders.values() for place, size in held.items()}
        assert sum(row["bytes"] for row in rows if row["leases"]) == sum(leased.values())
        assert open_descriptors() == len(rows)

    def teardown(self) -> None:
        self.residents.close()
        assert open_descriptors() == 0


TierMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_whatever_functions_do_the_limit_holds_and_leases_are_kept = TierMachine.TestCase


def test_a_function_that_reads_no_answer_is_let_go_of(talk: socket.socket, residents: Residents) -> None:
    talk.setblocking(False)
    message = json.dumps({"do": "attach", "device": "host", "key": "k"}).encode()

    def is_over() -> bool:
        try:
            talk.send(message)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            return True
        return False

    wait_until("its end", is_over)
    assert residents.counts["missed"] > 1
