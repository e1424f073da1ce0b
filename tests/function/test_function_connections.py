"""Which connection gives way when there are too many: one that is at rest before one that is not, and never one that is worked on."""

import random
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from function.connections import YOUNG_S, Connection, Connections, State

LIMIT = 20

Add = Callable[..., Connection]


class Clock:
    """Moved by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def connections(clock: Clock) -> Iterator[Connections]:
    with select.epoll() as epoll:
        found = Connections(epoll, LIMIT, clock)
        yield found
        for conn in found:
            found.drop(conn)


@pytest.fixture
def add(connections: Connections) -> Iterator[Add]:
    with ExitStack() as stack:

        def one(state: State, sent: bytes = b"") -> Connection:
            ours, theirs = socket.socketpair()
            stack.enter_context(theirs)
            theirs.sendall(sent)
            ours.setblocking(False)
            conn = Connection(ours, "client", "server", lambda conn: None)
            connections.add(conn)
            connections.await_data(conn)
            if state is not State.IDLE:
                connections.enter(conn, state, 10)
            return conn

        yield one


def test_who_is_missed_least_gives_way_first_and_the_oldest_of_them(connections: Connections, add: Add, clock: Clock) -> None:
    order = (State.ENDING, State.IDLE, State.RECEIVING, State.SENDING)
    made = {state: [add(state) for _ in range(4)] for state in (State.WORKING, *reversed(order))}
    clock.now += 10
    for conn in [conn for state in order for conn in made[state]]:
        assert connections.evict()
        assert not conn.is_open
        assert conn.raw.fileno() == -1
    assert not connections.evict()
    assert all(conn.is_open for conn in made[State.WORKING])


def test_who_has_just_come_or_was_just_answered_stays_for_longer_than_a_request_that_takes_long(
    connections: Connections, add: Add, clock: Clock
) -> None:
    sending, slow = add(State.SENDING), add(State.RECEIVING)
    clock.now += 10
    newcomer, quick = add(State.IDLE), add(State.RECEIVING)
    for gone in (slow, newcomer, quick, sending):
        assert gone.is_open
        connections.evict()
        assert not gone.is_open


def test_one_that_was_at_rest_for_longer_gives_way_before_one_that_was_just_answered(
    connections: Connections, add: Add, clock: Clock
) -> None:
    first, second = add(State.IDLE), add(State.IDLE)
    connections.enter(first, State.WORKING)
    connections.enter(first, State.IDLE, 75)
    connections.evict()
    assert (first.is_open, second.is_open) == (True, False)


def test_one_whose_next_request_is_there_already_is_at_rest_no_longer(connections: Connections, add: Add, clock: Clock) -> None:
    asking, at_rest, receiving = add(State.IDLE, b"POST"), add(State.IDLE), add(State.RECEIVING)
    clock.now += 10
    connections.evict()
    connections.evict()
    assert [conn.is_open for conn in (asking, at_rest, receiving)] == [True, False, False]


@pytest.mark.parametrize("seed", range(20))
def test_a_newcomer_stays_while_one_is_at_rest_and_who_is_worked_on_always_does(
    connections: Connections, add: Add, clock: Clock, seed: int
) -> None:
    chance = random.Random(seed)
    for _ in range(300):
        before = list(connections)
        busy = [conn for conn in before if conn.state is State.WORKING]
        clock.now += chance.random() * YOUNG_S / 2
        rested = clock.now - YOUNG_S
        at_rest = [conn for conn in before if conn.state is State.ENDING or (conn.state is State.IDLE and conn.since < rested)]
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
