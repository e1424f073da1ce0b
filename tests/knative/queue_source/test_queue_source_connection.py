"""Answers as they come over the wire, and those that are none."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from knative.queue_source.connection import LONGEST_BODY_BYTES, Answer
from knative.queue_source.errors import NoAnswer, SinkAway
from knative.queue_source.event import Event
from knative.queue_source.sink import Call, Sink

EVENT = Event({"id": "1"}, "application/json", b"{}")


class Wire:
    """A server that says what it is told to, once for each request, and then closes unless there is more to say."""

    def __init__(self, *connections: list[bytes]) -> None:
        self.requests: list[bytes] = []
        self.accepted = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.sink = Sink(f"http://127.0.0.1:{self._listener.getsockname()[1]}/path?a=b")
        threading.Thread(target=self._serve, args=(connections,), daemon=True).start()

    def _serve(self, connections: tuple[list[bytes], ...]) -> None:
        for replies in connections:
            with contextlib.suppress(OSError):
                peer, _ = self._listener.accept()
                self.accepted += 1
                with peer:
                    for reply in replies:
                        got = b""
                        while not got.endswith(b"{}"):
                            piece = peer.recv(65536)
                            if not piece:
                                return
                            got += piece
                        self.requests.append(got)
                        for at in range(0, len(reply), max(1, len(reply) // 7)):  # in pieces
                            peer.sendall(reply[at : at + max(1, len(reply) // 7)])

    def close(self) -> None:
        self.sink.close()
        self._listener.close()


@contextlib.contextmanager
def wire(*connections: list[bytes]) -> Iterator[Wire]:
    made = Wire(*connections)
    try:
        yield made
    finally:
        made.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        pytest.param(OK, Answer(200, {"content-length": "2"}, b"ok"), id="a length"),
        pytest.param(b"HTTP/1.1 204 No Content\r\nA: 1\r\na: 2\r\n\r\n", Answer(204, {"a": "1, 2"}, b""), id="nothing, and a header twice"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nTrailer: t\r\n\r\n",
            Answer(200, {"transfer-encoding": "chunked"}, b"abc0123456789"),
            id="chunks",
        ),
        pytest.param(b"HTTP/1.0 200 OK\r\n\r\nto the end", Answer(200, {}, b"to the end"), id="up to the end"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + OK, Answer(200, {"content-length": "2"}, b"ok"), id="after an interim one"),
    ],
)
def test_an_answer(reply: bytes, answer: Answer) -> None:
    with wire([reply]) as server:
        assert server.sink.post(EVENT, Call()) == answer
        (request,) = server.requests
    assert request.startswith(b"POST /path?a=b HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nce-id: 1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}" in request


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(b"SSH-2.0-OpenSSH\r\n\r\n", id="no HTTP"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", id="cut off"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", id="no length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", id="no chunk"),
        pytest.param(f"HTTP/1.1 200 OK\r\nContent-Length: {LONGEST_BODY_BYTES + 1}\r\n\r\n".encode(), id="endless"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000, id="an endless head"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_what_is_no_answer(reply: bytes) -> None:
    with wire([reply]) as server, pytest.raises(NoAnswer):
        server.sink.post(EVENT, Call())


def test_a_connection_is_kept_and_one_that_ended_meanwhile_is_replaced() -> None:
    with wire([OK, OK], [OK]) as server:
        for _ in range(3):
            assert server.sink.post(EVENT, Call()).status == 200
        assert server.accepted == 2


def test_what_was_answered_in_part_is_not_posted_again() -> None:
    with wire([OK, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok"], [OK]) as server:
        server.sink.post(EVENT, Call())
        with pytest.raises(NoAnswer):
            server.sink.post(EVENT, Call())
        assert len(server.requests) == 2


def test_a_post_can_be_cut_short_before_it_begins_and_while_it_waits() -> None:
    call = Call()
    call.cut()
    with wire([OK]) as server, pytest.raises(NoAnswer, match="cut short"):
        server.sink.post(EVENT, call)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sink, waiting = Sink(f"http://127.0.0.1:{listener.getsockname()[1]}/"), Call()

        def cut_when_asked() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(65536)
                waiting.cut()
                peer.recv(65536)

        threading.Thread(target=cut_when_asked, daemon=True).start()
        with pytest.raises(NoAnswer):
            sink.post(EVENT, waiting)


def test_a_sink_that_is_not_there_is_away() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        for host in (f"127.0.0.1:{nobody.getsockname()[1]}", "nowhere.invalid"):
            with pytest.raises(SinkAway):
                Sink(f"http://{host}/").post(EVENT, Call())
