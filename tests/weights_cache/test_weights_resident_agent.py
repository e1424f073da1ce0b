"""What the node's agent keeps of the resident tier, and what it says to functions: limits, leases, descriptors, messages."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support import wait_until
from weights_cache.cache import NodeCache
from weights_cache.resident import MAX_MESSAGE_BYTES, SOCKET, Residents

MIB = 1 << 20


@pytest.fixture
def talk(cache: NodeCache, residents: Residents) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10)
        connection.connect(str(cache.root / SOCKET))
        yield connection


def open_descriptors() -> int:
    links = list(Path("/proc/self/fd").iterdir())
    return sum("relight-test" in str(link.readlink()) for link in links if link.is_symlink())  # one was of the list itself


GOOD = {"do": "keep", "key": "k", "device": "d", "bytes": 1, "uri": "u"}


@pytest.mark.parametrize(
    "message",
    [
        b"junk",
        b"[]",
        b"{}",
        b'{"do": "attach", "key": "k"}',
        b'{"do": "fly", "device": "d"}',
        b'{"do": "make_room", "device": "d", "bytes": "all"}',
        b'{"do": "make_room", "device": "d", "bytes": -1}',
        b'{"do": "make_room", "device": ["d"], "bytes": 1}',
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
    given = [os.memfd_create("relight-test") for _ in range(count)]
    socket.send_fds(talk, [json.dumps(message).encode()], given)
    for descriptor in given:
        os.close(descriptor)
    talk.recv(MAX_MESSAGE_BYTES)
    talk.close()
    wait_until("its end", lambda: open_descriptors() == 0)
    assert residents.rows() == []


class TierMachine(RuleBasedStateMachine):
    """Any sequence of what functions do: the limit holds on each device, what is leased stays, and no descriptor is lost."""

    LIMIT = 10

    def __init__(self) -> None:
        super().__init__()
        self.residents = Residents(self.LIMIT)
        self.holders: dict[int, dict[tuple[str, str], int]] = {}  # what each has a lease on, and its bytes

    keys, devices, names = st.sampled_from("abcd"), st.sampled_from("xy"), st.integers(0, 3)

    @rule(key=keys, device=devices, size=st.integers(1, 12), name=names)
    def keep(self, key: str, device: str, size: int, name: int) -> None:
        given = os.memfd_create("relight-test")
        is_kept = self.residents.keep(key, device, size, "u", given, name)
        os.close(given)
        if is_kept:
            self.holders.setdefault(name, {})[device, key] = size

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
        assert min(size, idle) <= self.residents.make_room(device, size) <= idle

    @rule(key=keys, device=devices)
    def drop(self, key: str, device: str) -> None:
        self.residents.drop(key, device)
        for held in self.holders.values():
            held.pop((device, key), None)

    @invariant()
    def holds(self) -> None:
        rows = self.residents.rows()
        for device in "xy":
            assert sum(row["bytes"] for row in rows if row["device"] == device) <= self.LIMIT
        leased = {place: size for held in self.holders.values() for place, size in held.items()}
        assert sum(row["bytes"] for row in rows if row["leases"]) == sum(leased.values())
        assert open_descriptors() == len(rows)

    def teardown(self) -> None:
        self.residents.close()
        assert open_descriptors() == 0


TierMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_whatever_functions_do_the_limit_holds_and_leases_are_kept = TierMachine.TestCase
