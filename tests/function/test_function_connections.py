"""Which connection gives way when there are too many: one that is at rest before one that is not, and never one that is worked on."""

import random
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from function.connections import Connection, Connections, State

LIMIT = 20

Add = Callable[[State], Connection]


@pytest.fixture
def connections() -> Iterator[Connections]:
    with select.epoll() as epoll:
        found = Connections(epoll, LIMIT)
        yield found
        for conn in found:
            found.drop(conn)


@pytest.fixture
def add(connections: Connections) -> Iterator[Add]:
    with ExitStack() as stack:

        def one(state: State) -> Connection:
            ours, theirs = socket.socketpair()
            stack.enter_context(theirs)
            ours.setblocking(False)
            conn = Connection(ours, "client", "server", lambda conn: None)
            connections.add(conn)
            connections.await_data(conn)
            if state is not State.IDLE:
                connections.enter(conn, state, 10)
            return conn

        yield one


def test_who_is_missed_least_gives_way_first_and_the_oldest_of_them(connections: Connections, add: Add) -> None:
    made = {state: [add(state) for _ in range(4)] for state in (State.WORKING, State.SENDING, State.RECEIVING, State.IDLE, State.ENDING)}
    expected = [conn for state in sorted(set(State) - {State.WORKING}) for conn in made[state]]
    for conn in expected:
        assert connections.evict()
        assert not conn.is_open
        assert conn.raw.fileno() == -1
    assert not connections.evict()
    assert all(conn.is_open for conn in made[State.WORKING])


def test_one_that_was_at_rest_for_longer_gives_way_before_one_that_was_just_answered(connections: Connections, add: Add) -> None:
    first, second = add(State.IDLE), add(State.IDLE)
    connections.enter(first, State.WORKING)
    connections.enter(first, State.IDLE, 75)
    connections.evict()
    assert (first.is_open, second.is_open) == (True, False)


@pytest.mark.parametrize("seed", range(20))
def test_a_newcomer_stays_while_one_is_at_rest_and_who_is_worked_on_always_does(connections: Connections, add: Add, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(300):
        before = list(connections)
        busy = [conn for conn in before if conn.state is State.WORKING]
        at_rest = [conn for conn in before if conn.state in (State.ENDING, State.IDLE)]
        newcomer = add(State.IDLE)
        assert newcomer.is_open
        assert all(conn.is_open for conn in busy)
        gone = [conn for conn in before if not conn.is_open]
        if at_rest and gone:
            assert gone == [conn for conn in at_rest if not conn.is_open]
        assert len(list(connections)) <= max(LIMIT, len(busy) + 1)
        connections.enter(newcomer, chance.choice(list(State)), 10)
        if chance.random() < 0.3 and busy:
            connections.enter(chance.choice(busy), State.IDLE, 10)
