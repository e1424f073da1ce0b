"""HTTP clients in a closed loop, in one process and as cheap as Python is: each asks again on its connection as soon as it is answered.

    python bench/load_http.py PORT PATH BODIES --concurrency 8 --seconds 4 [--warm-up 1] [--on-refusal again|wait]

BODIES is a file with one JSON body a line, which are sent in turn. What it found is one JSON document on stdout: answers with status 200
per second, their latency, how often each status came and how many connections broke. It counts from the first answer after the warm-up
to the first one that comes `--seconds` later, so that a server which answers in batches is measured over whole ones.
"""

import argparse
import heapq
import json
import math
import random
import resource
import select
import socket
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECEIVE_BYTES = 1 << 18
PATIENCE_S = 5.0  # for an answer to begin or to end with
REFUSED = (429, 503)


class Client:
    """One connection with at most one request on its way."""

    __slots__ = ("body_at", "first_at", "got", "length", "sent_at", "sock")

    def __init__(self) -> None:
        self.sock: socket.socket
        self.got = b""
        self.body_at = 0  # where the reply's body begins; 0 while its head is not there
        self.length = 0  # of the whole reply; 0 for a chunked one
        self.sent_at = 0.0
        self.first_at = 0.0  # when the first byte of the reply's body was there


class Load:
    """What was asked, by whom, and what came of it."""

    def __init__(self, port: int, requests: Sequence[bytes], *, waits_when_refused: bool) -> None:
        self._port = port
        self._requests = requests
        self._waits = waits_when_refused
        self._random = random.Random(1)
        self._epoll = select.epoll()
        self._clients: dict[int, Client] = {}  # by their socket's number
        self._later: list[tuple[float, int, Client]] = []  # those that pause: until when, a number for order, who
        self._asked = 0
        self._answers = 0  # with status 200, the warm-up's too
        self._restart()

    def _restart(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.broken = 0
        self.seconds: list[float] = []  # of those with status 200
        self.first_seconds: list[float] = []

    def run(self, concurrency: int, warm_up_s: float, seconds: float) -> dict[str, Any]:
        """Ask for so long; what came after the warm-up."""
        for _ in range(concurrency):
            self._connect(Client())
        self._ask_until(time.perf_counter() + warm_up_s)
        self._restart()
        self._ask_until(time.perf_counter() + PATIENCE_S, answers=1)
        self._restart()
        cpu, began = _cpu_seconds(), time.perf_counter()
        self._ask_until(began + seconds)
        counted = len(self.seconds)
        self._ask_until(time.perf_counter() + PATIENCE_S, answers=counted + 1)
        del self.seconds[counted:], self.first_seconds[counted:]
        took = time.perf_counter() - began
        return {
            "seconds": took,
            "per_second": counted / took,
            "p50_ms": _percentile(self.seconds, 0.5) * 1e3,
            "p99_ms": _percentile(self.seconds, 0.99) * 1e3,
            "first_byte_p50_ms": _percentile(self.first_seconds, 0.5) * 1e3,
            "first_byte_p99_ms": _percentile(self.first_seconds, 0.99) * 1e3,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "broken": self.broken,
            "all_answers": self._answers,
            "client_cpu_share": (_cpu_seconds() - cpu) / took,
        }

    def _ask_until(self, end: float, answers: float = math.inf) -> None:
        """Until then, or until there are so many answers with status 200."""
        while (now := time.perf_counter()) < end and len(self.seconds) < answers:
            while self._later and self._later[0][0] <= now:
                client = heapq.heappop(self._later)[2]
                self._ask(client) if client.sock.fileno() >= 0 else self._connect(client)
            until = min(end, self._later[0][0]) if self._later else end
            for number, _ in self._epoll.poll(max(0.0, until - now)):
                self._receive(self._clients[number])

    def _connect(self, client: Client) -> None:
        client.sock = socket.socket()
        try:
            client.sock.settimeout(5)
            client.sock.connect(("127.0.0.1", self._port))
        except OSError:
            client.sock.close()
            self.broken += 1
            self._pause(client, 0.1)
            return
        client.sock.setblocking(False)
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._clients[client.sock.fileno()] = client
        self._epoll.register(client.sock, select.EPOLLIN)
        self._ask(client)

    def _ask(self, client: Client) -> None:
        client.got, client.body_at, client.first_at = b"", 0, 0.0
        request = self._requests[self._asked % len(self._requests)]
        self._asked += 1
        client.sent_at = time.perf_counter()
        try:
            client.sock.send(request)  # it fits into the empty buffer
        except OSError:
            self._break(client)

    def _pause(self, client: Client, seconds: float) -> None:
        self._asked += 1
        heapq.heappush(self._later, (time.perf_counter() + seconds, self._asked, client))

    def _break(self, client: Client) -> None:
        self.broken += 1
        self._hang_up(client)
        self._pause(client, 0.01)

    def _hang_up(self, client: Client) -> None:
        del self._clients[client.sock.fileno()]
        client.sock.close()  # which the epoll notices

    def _receive(self, client: Client) -> None:
        try:
            data = client.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._break(client)
            return
        client.got = client.got + data if client.got else data
        if not client.body_at:
            client.body_at, client.length = _sizes(client.got)
        if not client.first_at and len(client.got) > client.body_at > 0:
            client.first_at = time.perf_counter()
        if client.body_at and (client.length == len(client.got) or (not client.length and client.got.endswith(b"\r\n0\r\n\r\n"))):
            self._answered(client)

    def _answered(self, client: Client) -> None:
        status = int(client.got[9:12])
        self.statuses[status] += 1
        if status == 200:
            self._answers += 1
            self.seconds.append(time.perf_counter() - client.sent_at)
            self.first_seconds.append(client.first_at - client.sent_at)
        head = client.got[: client.got.find(b"\r\n\r\n") + 2].lower()
        if b"\r\nconnection: close\r\n" in head:
            self._hang_up(client)
        if status in REFUSED and self._waits:
            told = head.partition(b"\r\nretry-after: ")[2].partition(b"\r\n")[0]
            self._pause(client, int(told or 1) * self._random.uniform(1, 2))
        elif client.sock.fileno() >= 0:
            self._ask(client)
        else:
            self._connect(client)


def _sizes(got: bytes) -> tuple[int, int]:
    """Of a reply's head, 0 while it is not all there, and of the whole reply, 0 if it comes in chunks."""
    end = got.find(b"\r\n\r\n")
    if end < 0:
        return 0, 0
    head = got[: end + 2].lower()
    at = head.find(b"\r\ncontent-length:")
    if at < 0:
        return end + 4, 0
    return end + 4, end + 4 + int(head[at + 17 : head.index(b"\r\n", at + 17)])


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def request_bytes(path: str, body: bytes) -> bytes:
    """A POST of JSON as it goes over the wire."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("bodies", type=Path)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--warm-up", type=float, default=1.0, help="seconds that are not counted")
    parser.add_argument("--on-refusal", choices=("again", "wait"), default="again", help="after 429 or 503: at once, or after Retry-After")
    arguments = parser.parse_args()
    requests = [request_bytes(arguments.path, line) for line in arguments.bodies.read_bytes().splitlines()]
    load = Load(arguments.port, requests, waits_when_refused=arguments.on_refusal == "wait")
    print(json.dumps(load.run(arguments.concurrency, arguments.warm_up, arguments.seconds)))


if __name__ == "__main__":
    main()
