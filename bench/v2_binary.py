"""A large tensor in binary (the Open Inference Protocol) to an agent with `arrays = True`, beside what numpy needs for the same bytes.

    .venv/bin/python bench/v2_binary.py [--mib 13,50] [--rounds 15]

Beside it stands a bare socket server without HTTP: it receives the same bytes into one buffer, has numpy sum them, and sends the sum, or
the doubled array, back. tritonclient is another client of ours. All are called in turn. Memory is the peak of the server's resident memory
above what it was before, as a multiple of what is sent and answered. `/healthz` is asked every 10 ms while calls come without a pause.
"""

import argparse
import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

import numpy as np  # noqa: E402  which imports that

from bench.common import Background, free_ports, machine, spread  # noqa: E402  found through the line above
from tests.support import clean_environment  # noqa: E402

PROBE_S = 0.01
Array = Any  # numpy's, of float32


class Sum:
    """An agent that numpy is all of."""

    arrays = True

    def load(self, weights: Any, device: str) -> None:
        pass

    def predict(self, inputs: Sequence[Any]) -> list[float]:
        return [float(row.sum()) for row in inputs]


class Same(Sum):
    """One whose answer is as large."""

    def predict(self, inputs: Sequence[Any]) -> Any:
        return [row * 2 for row in inputs]


def bare(port: int) -> None:
    """What there is without us. A request: 8 bytes of the length, one that says what is wanted back, and the tensor."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            caller, _ = listener.accept()
            with caller:
                while head := caller.recv(9, socket.MSG_WAITALL):
                    body = memoryview(bytearray(int.from_bytes(head[:8], "little")))
                    at = 0
                    while at < len(body):
                        at += caller.recv_into(body[at:])
                    array: Array = np.frombuffer(body, np.float32)
                    caller.sendall(memoryview(array * 2).cast("B") if head[8] else np.float64(array.sum()).tobytes())


@contextlib.contextmanager
def server(command: Sequence[str], port: int, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=clean_environment(**environment), stdout=log, stderr=log, start_new_session=True
        )
        try:
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.02)
            yield process
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def function(agent: str, port: int, largest: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = {"FUNCTION_AGENT": f"bench.v2_binary:{agent}", "FUNCTION_HOST": "127.0.0.1", "PORT": str(port)}
    with server(["-m", "function"], port, **environment, FUNCTION_MAX_BODY_BYTES=str(largest + 4096)) as process:
        while ask(port, "GET", "/readyz")[0] != 200:
            time.sleep(0.02)
        yield process


def ask(port: int, method: str, path: str) -> tuple[int, bytes]:
    caller = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(caller):
        caller.request(method, path)
        found = caller.getresponse()
        return found.status, found.read()


def to_function(port: int, tensor: Array, *, wants_array: bool) -> Callable[[], None]:
    """A call by http.client, on one connection."""
    described = {"name": "input", "datatype": "FP32", "shape": tensor.shape, "parameters": {"binary_data_size": tensor.nbytes}}
    head = json.dumps({"inputs": [described], "parameters": {"binary_data_output": wants_array}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Length": str(len(head) + tensor.nbytes)}
    caller = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def call() -> None:
        caller.putrequest("POST", "/v2/models/model/infer")
        for name, text in headers.items():
            caller.putheader(name, text)
        caller.endheaders()
        caller.send(head)
        caller.send(memoryview(tensor).cast("B"))
        found = caller.getresponse()
        length = int(found.headers.get("Inference-Header-Content-Length", 0))
        body = bytearray(int(found.headers["Content-Length"]))
        found.readinto(body)
        if found.status != 200 or (wants_array and np.frombuffer(memoryview(body)[length:], np.float32)[1] != 2 * tensor.flat[1]):
            raise SystemExit(f"{found.status}: {bytes(body[:300])!r}")

    return call


def to_bare(port: int, tensor: Array, *, wants_array: bool) -> Callable[[], None]:
    caller = socket.create_connection(("127.0.0.1", port))

    def call() -> None:
        caller.sendall(tensor.nbytes.to_bytes(8, "little") + bytes([wants_array]))
        caller.sendall(memoryview(tensor).cast("B"))
        answer = memoryview(bytearray(tensor.nbytes if wants_array else 8))
        at = 0
        while at < len(answer):
            at += caller.recv_into(answer[at:])

    return call


def by_tritonclient(port: int, tensor: Array, *, wants_array: bool) -> Callable[[], None]:
    import tritonclient.http as client

    caller = client.InferenceServerClient(f"127.0.0.1:{port}", connection_timeout=120, network_timeout=120)
    given = client.InferInput("input", tensor.shape, "FP32")
    given.set_data_from_numpy(tensor)
    wanted = [client.InferRequestedOutput("output", binary_data=wants_array)]

    def call() -> None:
        found = caller.infer("model", [given], outputs=wanted).as_numpy("output")
        assert found.size == (tensor.size if wants_array else 1)

    return call


def timed(calls: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Milliseconds of each, after one round that does not count; all in turn."""
    found: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, took in zip(calls, found, strict=True):
            began = time.perf_counter()
            call()
            took += [1000 * (time.perf_counter() - began)] * bool(number)
    return found


def worker_of(pid: int) -> int:
    """The process that answers: the server's child."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


def peak_growth(pid: int, calls: Callable[[], Any]) -> int:
    """Bytes."""

    def kibibytes(name: str) -> int:
        return int(Path(f"/proc/{pid}/status").read_text().partition(f"{name}:")[2].split()[0])

    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is from now on
    before = kibibytes("VmRSS")
    calls()
    return 1024 * (kibibytes("VmHWM") - before)


class Probes(Background):
    """Asks `/healthz`; `seconds` are those that each took."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self.seconds: list[float] = []

    def work(self) -> None:
        caller = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        while not self.over.is_set():
            began = time.perf_counter()
            caller.request("GET", "/healthz")
            assert caller.getresponse().read()
            self.seconds.append(time.perf_counter() - began)
            time.sleep(PROBE_S)


def measure(mib: int, rounds: int) -> Iterator[str]:
    """Rows of the table."""
    tensor = np.ones((1, 1024 * 256 * mib), np.float32)
    for agent, wants_array in (("Sum", False), ("Same", True)):
        ports = free_ports(2)
        with function(agent, ports[0], tensor.nbytes) as ours, server(["bench/v2_binary.py", "--bare", str(ports[1])], ports[1]):
            call = to_function(ports[0], tensor, wants_array=wants_array)
            call()
            growth = peak_growth(worker_of(ours.pid), partial(timed, [call], 3))
            others = [make(port, tensor, wants_array=wants_array) for make, port in ((to_bare, ports[1]), (by_tritonclient, ports[0]))]
            took, bare_took, triton_took = timed([call, *others], rounds)
            with Probes(ports[0]) as probes:
                timed([call], rounds)
        probes_ms = [1000 * seconds for seconds in probes.seconds]
        cells = [
            f"{mib} MiB",
            "the array, in binary" if wants_array else "a number",
            spread(bare_took, ".1f"),
            spread(took, ".1f"),
            f"{statistics.median(took) / statistics.median(bare_took):.1f}",
            spread(triton_took, ".1f"),
            f"{growth / tensor.nbytes / (1 + wants_array):.1f}",
            f"{statistics.median(probes_ms):.1f}, at most {max(probes_ms):.1f}",
        ]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", default="13,50")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare(arguments.bare)
    print(f"{machine()}, numpy {np.__version__}; {arguments.rounds} rounds, medians (least to most), milliseconds.\n")
    heads = ["tensor", "answer", "numpy behind a socket", "relight", "times numpy's", "by tritonclient", "memory ÷ payload", "`/healthz`"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for mib in map(int, arguments.mib.split(",")):
        for row in measure(mib, arguments.rounds):
            print(row, flush=True)


if __name__ == "__main__":
    main()
