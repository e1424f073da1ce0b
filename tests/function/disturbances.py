"""Clients that keep a server busy with nothing, and what ordinary callers and probes see meanwhile.

    python -m tests.function.disturbances PORT SHARE KIND…

holds so many of each kind (SHARE of the usual number) until its stdin ends; it says "ready" when all are there. Whoever is turned away
comes again with the next drop.
"""

import contextlib
import http.client
import json
import math
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.function.wire import post
from tests.support import BIN, ROOT

AGENT = """
import os, time

class Agent:
    # Takes 20 ms for a batch, so that it bounds how many are served. "big" is answered with 10 MB; a stream ends if it is "short".
    def load(self, weights, device): pass
    def predict(self, inputs):
        time.sleep(float(os.environ.get("TAKES_S", "0.02")))
        return ["x" * 10_000_000 if item == "big" else item for item in inputs]
    def start(self, input): return iter(["y"] * 3) if input["text_input"] == "short" else iter(lambda: "y" * 20_000, None)
    def step(self, sequences): return [next(sequence, None) for sequence in sequences]
"""
EVERY_S = 5.0  # between two drops of a slow sender
CALLERS = 8
PROBE_S = 0.02
_BIG_V2 = '{"inputs": [{"name": "input", "shape": [1], "datatype": "BYTES", "data": ["big"]}]}'
_HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@dataclass(frozen=True)
class Kind:
    """One way to be slow."""

    count: int
    first: tuple[bytes, ...]  # what is sent at once, by turns
    drops: tuple[bytes, ...] = (b"",)  # what follows every EVERY_S, by turns
    reads: bool = False  # a little of the answer, instead of all that comes


KINDS = {
    "slow senders": Kind(
        300,
        (_HEAD + b"Content-Length: 100000\r\n\r\n[", _HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n[\r\n", b"POST / HTTP/1.1\r\nX: a"),
        (b" ", b"1\r\n \r\n", b"a"),
    ),
    "slow readers": Kind(
        60,
        (post('"big"'), post(_BIG_V2, path="/v2/models/m/infer"), post('{"text_input": "a"}', path="/v2/models/m/generate_stream")),
        reads=True,
    ),
    "idle connections": Kind(2000, (b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n",)),
    "half-open connections": Kind(500, (b"", b"POST / HT")),
}


class Slow:
    """One client."""

    def __init__(self, port: int, kind: Kind, number: int) -> None:
        self._kind = kind
        self._drop = kind.drops[number % len(kind.drops)]
        self._sock = socket.socket()
        if kind.reads:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._sock.settimeout(10)
        self._sock.connect(("127.0.0.1", port))
        self._sock.sendall(kind.first[number % len(kind.first)])
        self._sock.setblocking(False)

    def goes_on(self) -> bool:
        """Send or read a drop; False if the server has turned it away."""
        try:
            self._sock.sendall(self._drop)
            return self._sock.recv(1000 if self._kind.reads else 65536) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        self._sock.close()


def hold(port: int, share: float, kinds: list[Kind]) -> None:
    """Until stdin ends."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    wanted = [(kind, number) for kind in kinds for number in range(int(kind.count * share))]
    held: dict[int, Slow] = {}
    is_new = True
    while True:
        for place, (kind, number) in enumerate(wanted):
            if place in held and not held[place].goes_on():
                held.pop(place).close()
            if place not in held:
                with contextlib.suppress(OSError):
                    held[place] = Slow(port, kind, number)
        if is_new:
            print("ready", flush=True)
            is_new = False
        if select.select([sys.stdin], [], [], EVERY_S)[0]:
            return


@contextmanager
def disturbed(port: int, *names: str, share: float = 1.0) -> Iterator[None]:
    """By these kinds, in a process of their own."""
    command = [str(BIN / "python"), "-m", "tests.function.disturbances", str(port), str(share), *names]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        try:
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.stdin.close()


@dataclass
class Seen:
    """By ordinary callers and probes, in one window."""

    seconds: float
    served: int = 0
    failed: list[str] = field(default_factory=list)
    probes_s: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Predictions a second."""
        return self.served / self.seconds

    @property
    def p99_ms(self) -> float:
        """What 99 of 100 probes took at most."""
        return sorted(self.probes_s)[math.ceil(len(self.probes_s) * 0.99) - 1] * 1000


def look(port: int, seconds: float, path: str = "/healthz", at: int = 0) -> Seen:
    """Call and probe for so long; what is probed is this path, at another port if one is given."""
    seen, ends = Seen(seconds), time.monotonic() + seconds
    threads = [threading.Thread(target=_call, args=(port, ends, seen)) for _ in range(CALLERS)]
    threads.append(threading.Thread(target=_probe, args=(at or port, path, ends, seen)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def _call(port: int, ends: float, seen: Seen) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    while time.monotonic() < ends:
        try:
            connection.request("POST", "/v1/models/m:predict", '{"instances": ["a"]}', {"Content-Type": "application/json"})
            reply = connection.getresponse()
            if reply.status == 200 and json.load(reply) == {"predictions": ["a"]}:
                seen.served += 1
            else:
                seen.failed.append(f"{reply.status}")
        except (OSError, http.client.HTTPException) as error:
            seen.failed.append(repr(error))
            connection.close()
    connection.close()


def _probe(port: int, path: str, ends: float, seen: Seen) -> None:
    """Each over a connection of its own, as a kubelet and `relight status` do."""
    while (began := time.monotonic()) < ends:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", path)
            reply = connection.getresponse()
            reply.read()
            connection.close()
            if reply.status != 200:
                seen.failed.append(f"{path}: {reply.status}")
            seen.probes_s.append(time.monotonic() - began)
        except (OSError, http.client.HTTPException) as error:
            seen.failed.append(f"{path}: {error!r}")
        time.sleep(max(0.0, began + PROBE_S - time.monotonic()))


if __name__ == "__main__":
    hold(int(sys.argv[1]), float(sys.argv[2]), [KINDS[name] for name in sys.argv[3:]])
