"""What is being sent: all of it, in order, whoever writes and however slowly it is read; and who has hung up."""

import random
import select
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from function.outbox import AHEAD_BYTES, CONTINUE, Outbox
from tests.support import wait_until


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A server's end, which does not block, and a client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        server, _ = listener.accept()
        with server:
            server.setblocking(False)
            yield server, client


class Loop(threading.Thread):
    """Sends what is unsent, as the server's loop does."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.wanted = threading.Event()
        self.outbox = Outbox(sock, self.wanted.set)

    def run(self) -> None:
        while self.wanted.wait(20):
            self.wanted.clear()
            while not self.outbox.flush():
                select.select([], [self.sock], [], 1)


def read(client: socket.socket, count: int, at_most: int = 65536) -> bytes:
    data = b""
    while len(data) < count and (piece := client.recv(at_most)):
        data += piece
    return data


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def test_an_answer_in_one_piece_is_handed_over_whole_and_its_writer_is_free(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    told: list[int] = []
    outbox = Outbox(server, lambda: told.append(1))
    data = random.Random(1).randbytes(20_000_000)
    outbox.sendall(data)
    assert told == [1]
    assert 0 < outbox.size < len(data)
    reader = threading.Thread(target=lambda: told.append(read(client, len(data)) == data))
    reader.start()
    while not outbox.flush():
        select.select([], [server], [], 1)
    reader.join()
    assert told == [1, True]


@pytest.mark.parametrize("seed", range(4))
def test_all_comes_in_order_whoever_sends_it(pair: tuple[socket.socket, socket.socket], seed: int) -> None:
    server, client = pair
    chance = random.Random(seed)
    pieces = [chance.randbytes(chance.choice((1, 100, 10_000, 200_000))) for _ in range(300)]
    loop = Loop(server)
    loop.start()

    def write() -> None:
        for piece in pieces:
            loop.outbox.sendall(piece)

    writer = threading.Thread(target=write)
    writer.start()
    assert read(client, sum(map(len, pieces)), 30_000) == b"".join(pieces)
    writer.join()


def test_the_writer_of_a_stream_waits_for_its_reader_and_is_told_when_it_is_given_up(pair: tuple[socket.socket, socket.socket]) -> None:
    outbox = Outbox(pair[0], lambda: None)
    ended: list[str] = []

    def write() -> None:
        try:
            while True:
                outbox.sendall(bytes(30_000))
        except BrokenPipeError:
            ended.append("told")

    writer = threading.Thread(target=write)
    writer.start()
    wait_until("it waits", lambda: outbox.size > AHEAD_BYTES)
    assert outbox.size < 2 * AHEAD_BYTES
    outbox.give_up()
    writer.join(20)
    assert (ended, outbox.size) == (["told"], 0)


def test_once_it_is_given_up_nobody_uses_the_socket(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    outbox = Outbox(server, lambda: None)
    outbox.give_up()
    with pytest.raises(BrokenPipeError):
        outbox.sendall(b"somebody else's")
    assert outbox.is_gone()
    assert select.select([client], [], [], 0)[0] == []


def test_a_client_that_is_done_with_sending_is_there_and_one_that_has_hung_up_is_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    outbox = Outbox(server, lambda: None)
    outbox.interim = CONTINUE
    assert not outbox.is_gone()
    client.shutdown(socket.SHUT_WR)
    assert not outbox.is_gone()
    assert not outbox.is_gone()
    outbox.sendall(b"the answer")
    assert read(client, len(CONTINUE) + 10) == CONTINUE + b"the answer"  # it is asked once
    client.close()
    outbox.sendall(b"more")
    wait_until("gone", outbox.is_gone)


def test_one_that_has_hung_up_is_found_out_by_an_interim_answer(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    outbox = Outbox(server, lambda: None)
    outbox.interim = CONTINUE
    client.close()
    wait_until("gone", outbox.is_gone)


def test_nothing_is_sent_to_ask_within_an_answer(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    outbox = Outbox(server, lambda: None)
    outbox.interim = CONTINUE
    outbox.sendall(b"HTTP/1.1 200 OK\r\n")
    client.shutdown(socket.SHUT_WR)
    assert not outbox.is_gone()
    outbox.sendall(b"rest")
    assert read(client, 21) == b"HTTP/1.1 200 OK\r\nrest"


def test_one_that_resets_is_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    outbox = Outbox(server, lambda: None)
    reset(client)
    wait_until("gone", outbox.is_gone)
    with pytest.raises(BrokenPipeError):
        outbox.sendall(b"a")
    assert outbox.is_broken
