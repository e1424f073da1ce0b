"""The loop that the sidecar's connections belong to: what is answered however slow, many or odd the clients are."""

import contextlib
import errno
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import Reply, request, wait_until
from weights_cache import http_peer, loop
from weights_cache.http_peer import MAX_BODY_BYTES, MAX_HEAD_BYTES, Answer, HttpPeer, Request, document
from weights_cache.loop import Loop

MOST = 8
LARGE = 32 << 20


class Site:
    """A loop with one door, in a thread; it answers with what it was asked, but for `/later`, which waits for `answer`, and `/large`."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self.sock.getsockname()[1]
        self.later: list[Callable[[Answer], object]] = []
        self.loop.listen(self.sock, lambda sock: HttpPeer(sock, self._respond), MOST)
        self.thread = threading.Thread(target=self.loop.run)

    def _respond(self, asked: Request, reply: Callable[[Answer], object]) -> None:
        if asked.target == "/later":
            self.later.append(reply)
        elif asked.target == "/fail":
            raise ZeroDivisionError
        elif asked.target == "/large":
            reply(Answer(200, b"x" * LARGE, "text/plain"))
        else:
            reply(document(200, {"method": asked.method, "target": asked.target, "body": asked.body.decode()}))

    @property
    def peers(self) -> int:
        return len(self.loop._doors[0].peers)

    def connect(self) -> socket.socket:
        found = socket.create_connection(("127.0.0.1", self.port))
        found.settimeout(30)
        return found

    def get(self, path: str = "/") -> Reply:
        return request(self.port, "GET", path)


@pytest.fixture
def site() -> Iterator[Site]:
    found = Site()
    found.thread.start()
    yield found
    found.loop.stop()
    found.thread.join()
    found.loop.close()


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that are over soon."""
    for name in ("REQUEST_S", "IDLE_S", "ANSWER_S", "LINGER_S"):
        monkeypatch.setattr(http_peer, name, 0.2)


def everything(sock: socket.socket) -> bytes:
    """All that comes until the end, also a hard one."""
    came = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(1 << 20):
            came += piece
    return came


def statuses(came: bytes) -> list[int]:
    return [int(line.split()[1]) for line in came.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


# Requests


def test_a_request_is_answered_and_its_connection_used_again(site: Site) -> None:
    with site.connect() as sock:
        for number in range(3):
            sock.sendall(b"GET /%d?a=b HTTP/1.1\r\nHost: x\r\n\r\n" % number)
            answer = json.loads(sock.recv(4096).partition(b"\r\n\r\n")[2])
            assert answer == {"method": "GET", "target": f"/{number}?a=b", "body": ""}


def test_requests_that_come_in_one_piece_are_answered_in_their_order(site: Site) -> None:
    with site.connect() as sock:
        sock.sendall(b"POST /a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET /b HTTP/1.1\r\n\r\nGET /c HTTP/1.1\r\nConnection: close\r\n\r\n")
        bodies = [json.loads(b"{" + part.partition(b"}")[0] + b"}") for part in everything(sock).split(b"\r\n\r\n{")[1:]]
    assert [(one["target"], one["body"]) for one in bodies] == [("/a", "abc"), ("/b", ""), ("/c", "")]


@pytest.mark.parametrize("step", [1, 2, 7])
def test_a_request_in_many_pieces_is_the_same_request(site: Site, step: int) -> None:
    data = b"POST /a HTTP/1.1\r\nHost: x\r\ncontent-length:  5 \r\nConnection: close\r\n\r\nabcde"
    with site.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(data), step):
            sock.sendall(data[at : at + step])
        assert json.loads(everything(sock).partition(b"\r\n\r\n")[2])["body"] == "abcde"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"hello\r\n\r\n", 400, id="no HTTP"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400, id="TLS"),
        pytest.param(b"GET / HTTP/2.0\r\n\r\n", 400, id="another version"),
        pytest.param(b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400, id="no header"),
        pytest.param(b"GET / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n", 400, id="a folded header"),
        pytest.param(b"GET / HTTP/1.1\r\nContent-Length : 1\r\n\r\n", 400, id="a space before the colon"),
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, id="two lengths"),
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", 411, id="a signed length"),
        pytest.param("POST / HTTP/1.1\r\nContent-Length: ²\r\n\r\n".encode(), 411, id="a digit that is none"),
        pytest.param(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411, id="chunks"),
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1), 413, id="a body that is too long"),
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 413, id="a length of very many digits"),
        pytest.param(b"GET / HTTP/1.1\r\nA: " + b"b" * MAX_HEAD_BYTES, 431, id="a head that is too long"),
    ],
)
def test_what_is_no_request_is_refused_and_ends_the_connection(site: Site, data: bytes, status: int) -> None:
    with site.connect() as sock:
        sock.sendall(data)
        came = everything(sock)
    assert statuses(came) == [status]
    assert b"Connection: close" in came
    assert site.get().status == 200


def test_a_refusal_arrives_although_much_is_sent_behind_it(site: Site) -> None:
    with site.connect() as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(b"POST / HTTP/1.1\r\nContent-Length: 700000\r\n\r\n" + b"x" * 700_000)
        assert statuses(everything(sock)) == [413]


def test_who_asks_whether_the_body_is_wanted_is_told(site: Site) -> None:
    with site.connect() as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"ab")
        assert statuses(everything(sock)) == [200]


def test_a_client_that_is_done_with_sending_gets_its_answer(site: Site) -> None:
    with site.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        assert statuses(everything(sock)) == [200]


def test_a_client_of_http_1_0_has_its_connection_closed(site: Site) -> None:
    with site.connect() as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert statuses(everything(sock)) == [200]


def test_a_mistake_of_ours_ends_one_connection_and_is_said_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        with site.connect() as sock:
            sock.sendall(b"GET /fail HTTP/1.1\r\n\r\n")
            assert everything(sock) == b""
    assert site.get().status == 200
    assert caplog.text.count("a connection failed unexpectedly") == 1


# Slow clients


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize(
    "data",
    [b"GET /hea", b"GET / HTTP/1.1\r\nHost: x", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc"],
    ids=["half a line", "half a head", "half a body"],
)
def test_half_a_request_is_408_when_its_time_is_over(site: Site, data: bytes) -> None:
    with site.connect() as sock:
        sock.sendall(data)
        came = everything(sock)
    assert statuses(came) == [408]
    wait_until("its end", lambda: site.peers == 0)


@pytest.mark.usefixtures("_hasty")
def test_a_byte_now_and_then_buys_no_time(site: Site) -> None:
    with site.connect() as sock:
        sock.settimeout(0.02)
        came = b""
        while not came:  # for ever, if each byte did
            with contextlib.suppress(TimeoutError):
                sock.sendall(b"G")
                came = sock.recv(100)
        assert statuses(came) == [408]


@pytest.mark.usefixtures("_hasty")
def test_a_client_that_has_gone_just_when_its_time_is_up_harms_nobody(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, gone = HttpPeer._answer, []

    def lose(peer: HttpPeer, what: Answer, *, is_last: bool) -> None:
        if what.status == 408:
            gone.append(peer)
            raise OSError(107, "Transport endpoint is not connected")
        answer(peer, what, is_last=is_last)

    monkeypatch.setattr(HttpPeer, "_answer", lose)
    with site.connect() as sock:
        sock.sendall(b"GET /hea")
        wait_until("its time is up", lambda: gone and site.peers == 0)
    assert site.get().status == 200


@pytest.mark.usefixtures("_hasty")
def test_silent_connections_end_without_a_word(site: Site) -> None:
    with site.connect() as fresh, site.connect() as used:
        used.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert statuses(everything(used)) == [200]
        assert everything(fresh) == b""


@pytest.mark.usefixtures("_hasty")
def test_a_client_that_does_not_read_is_let_go_of(site: Site) -> None:
    with site.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(b"GET /large HTTP/1.1\r\n\r\n")
        wait_until("that it has come", lambda: site.peers == 1)
        wait_until("its end", lambda: site.peers == 0)


def test_a_slow_answer_holds_nobody_else_up(site: Site) -> None:
    with site.connect() as slow:
        slow.sendall(b"GET /later HTTP/1.1\r\n\r\n")
        (reply,) = wait_until("the question", lambda: site.later)
        assert site.get().status == 200
        reply(document(200, {}))
        reply(document(500, {}))  # the first one counts
        slow.shutdown(socket.SHUT_WR)
        assert statuses(everything(slow)) == [200]


def test_an_answer_for_somebody_who_has_gone_is_thrown_away(site: Site) -> None:
    with site.connect() as slow:
        slow.sendall(b"GET /later HTTP/1.1\r\n\r\n")
        (reply,) = wait_until("the question", lambda: site.later)
    reply(document(200, {"text": "x" * 100_000}))
    wait_until("its end", lambda: site.get().status == 200 and site.peers <= 1)


# Many clients


@pytest.mark.parametrize("half", [b"", b"GET /hea"], ids=["silent", "half a request"])
def test_those_that_are_idle_give_way_the_oldest_first_and_that_is_said_once(
    site: Site, caplog: pytest.LogCaptureFixture, half: bytes
) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(site.connect()) for _ in range(MOST)]
        for sock in idle:
            sock.sendall(half)
        wait_until("all of them", lambda: site.peers == MOST)
        wait_until("what they sent", lambda: all(bool(peer._came) == bool(half) for peer in site.loop._doors[0].peers))  # type: ignore[attr-defined]
        assert site.get().status == 200
        (gone,) = wait_until("the one that gave way", lambda: select.select(idle, [], [], 0)[0])
        assert half or gone is idle[0]  # of the others it depends on when their bytes came
        for sock in set(idle) - {gone}:  # they are still there
            sock.sendall((b"GET /hea" if not half else b"") + b"lth HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert statuses(everything(sock)) == [200]
        idle += [stack.enter_context(site.connect()) for _ in range(100)]
        assert site.get().status == 200
    assert caplog.text.count(f"{MOST} connections at once: those that have been idle for longest give way") == 1


def test_one_that_is_being_answered_does_not_give_way(site: Site) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(site.connect()) for _ in range(MOST)]
        for sock in slow:
            sock.sendall(b"GET /later HTTP/1.1\r\nConnection: close\r\n\r\n")
        wait_until("the questions", lambda: len(site.later) == MOST)
        with site.connect() as late:
            assert everything(late) == b""  # there is no place
        for reply in site.later:
            reply(document(200, {}))
        assert [statuses(everything(sock)) for sock in slow] == [[200]] * MOST


def test_without_a_descriptor_one_gives_way_and_where_none_can_the_door_rests(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "REST_S", 0.01)
    door, failures = site.loop._doors[0], [0]

    class Exhausted:
        """The listening socket of a process that has no descriptor left, for some time."""

        def __init__(self, sock: socket.socket) -> None:
            self._sock = sock

        def accept(self) -> tuple[socket.socket, object]:
            if failures[0]:
                failures[0] -= 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return self._sock.accept()

        def __getattr__(self, name: str) -> object:
            return getattr(self._sock, name)

    door.sock = Exhausted(door.sock)  # type: ignore[assignment]
    with site.connect() as idle:
        wait_until("it", lambda: site.peers == 1)
        failures[0] = 1
        assert site.get().status == 200
        assert everything(idle) == b""
    failures[0] = 20  # and nobody to give way
    assert site.get().status == 200
    assert failures[0] == 0
    assert caplog.text.count("Too many open files") == 2


def test_a_loop_that_does_nothing_waits(site: Site) -> None:
    """A door that rests, or a time that is over, must not keep the processor busy."""
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.2


def test_closed_it_has_no_descriptor_left() -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    found = Site()
    found.thread.start()
    with found.connect(), found.connect():
        wait_until("both", lambda: found.peers == 2)
        found.loop.stop()
        found.thread.join()
        found.loop.close()
    found.loop.stop()  # too late, and no error
    found.loop.call(lambda: None)
    assert count() == before
