"""The queue source beside a bare boto3 loop, in turns, against the same SQS server (moto, in a process of its own).

Throughput: what reaches the end when the sink answers at once, beside a loop that receives ten and deletes ten, with as many threads as the
source has pollers. Both from the server's first receive to its last delete, so that no start is counted. Memory: the source's over a long
queue. Saturation: the most messages in flight, by the server's own count, while the sink refuses more than it can take.

    .venv/bin/python bench/queue_source.py [--rounds 5] [--json FILE]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

import asyncio  # noqa: E402
import contextlib  # noqa: E402
import http.client  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from typing import Any  # noqa: E402

from bench.common import free_ports, machine, main, spread  # noqa: E402

TARGET_RATIO, TARGET_GROWTH = 0.9, 0.05
MESSAGES, DEPTH = 3000, 100
CONCURRENCY = 40
POLLERS = 2  # of the source, with this concurrency
LONG = 50_000
SATURATED, TAKES, CONCURRENCIES = 1500, 4, (1, 8, 25)
QUEUE = "work"


# The sink: a server that costs as little as Python allows


class SinkProtocol(asyncio.Protocol):
    """Answers 204 to whatever comes; 503 while `takes` others are worked on for `seconds`."""

    busy = 0

    def __init__(self, takes: int, seconds: float) -> None:
        self._takes, self._seconds = takes, seconds
        self._got = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._got += data
        head = self._got.find(b"\r\n\r\n")
        if head < 0:
            return
        at = self._got.lower().index(b"content-length:") + 15
        if len(self._got) < head + 4 + int(self._got[at : self._got.index(b"\r", at)]):
            return
        self._got = b""
        if not self._takes:
            self._transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        elif SinkProtocol.busy >= self._takes:
            self._transport.write(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n")
        else:
            SinkProtocol.busy += 1
            asyncio.get_running_loop().call_later(self._seconds, self._done)

    def _done(self) -> None:
        SinkProtocol.busy -= 1
        self._transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")


async def sink(port: int, takes: int, seconds: float) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: SinkProtocol(takes, seconds), "127.0.0.1", port)
    await server.serve_forever()


def bare(url: str) -> None:
    """What anybody would write first; ends with the queue."""
    import boto3
    from botocore.config import Config

    client = boto3.client("sqs", config=Config(max_pool_connections=POLLERS))

    def loop() -> None:
        while found := client.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=1).get("Messages"):
            client.delete_message_batch(
                QueueUrl=url, Entries=[{"Id": str(n), "ReceiptHandle": message["ReceiptHandle"]} for n, message in enumerate(found)]
            )

    threads = [threading.Thread(target=loop) for _ in range(POLLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# The measurements


class Stage:
    """The SQS server with one queue, and a sink."""

    def __init__(self, takes: int = 0, seconds: float = 0.0) -> None:
        self.port, sink_port = free_ports(2)
        self.sink = f"http://127.0.0.1:{sink_port}/"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "QUEUE_SOURCE_", "K_"))} | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
            "PYTHONPATH": str(ROOT),
        }
        self._children = [
            self.start("-m", "tests.knative.queue_source.sqs_server", str(self.port)),
            self.start(__file__, "--sink", str(sink_port), str(takes), str(seconds)),
        ]
        self.url = f"http://127.0.0.1:{self.port}/123456789012/{QUEUE}"

    def start(self, *arguments: str, **settings: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=self.env | settings, stderr=subprocess.DEVNULL)

    def __enter__(self) -> "Stage":
        import boto3

        end = time.monotonic() + 30
        while True:
            try:
                self._ask("GET", "/_stats")
                break
            except OSError:
                assert time.monotonic() < end, "the SQS server does not start"
                time.sleep(0.05)
        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        boto3.client("sqs", endpoint_url=self.env["AWS_ENDPOINT_URL"], **keys).create_queue(QueueName=QUEUE)  # type: ignore[call-overload]
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()
            child.wait()

    def _ask(self, method: str, path: str, document: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, json.dumps(document) if document else None)
            return json.loads(connection.getresponse().read())

    def fill(self, count: int, *, watch: bool = False) -> None:
        self._ask("POST", "/_control", {"fill": {"queue": QUEUE, "count": count, "depth": DEPTH}, "watch": QUEUE if watch else ""})

    def stats(self) -> Any:
        return self._ask("GET", "/_stats")

    def wait(self, look_s: float = 0.1) -> Any:
        """Until the queue is empty."""
        while (found := self.stats())["left"] or found["unfilled"]:
            time.sleep(look_s)
        return found

    @contextlib.contextmanager
    def source(self, concurrency: int) -> Iterator["subprocess.Popen[bytes]"]:
        settings = {
            "QUEUE_SOURCE_URL": self.url,
            "K_SINK": self.sink,
            "QUEUE_SOURCE_CONCURRENCY": str(concurrency),
            "QUEUE_SOURCE_WAIT_S": "1",
        }
        process = self.start("-m", "knative.queue_source", **settings)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def anonymous(pid: int) -> int:
    """The bytes that a process has for itself."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon"))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def throughput(stage: Stage) -> dict[str, float]:
    """One turn of each."""
    rates = {}
    stage.fill(MESSAGES)
    loop = stage.start(__file__, "--bare", stage.url)
    rates["bare"] = MESSAGES / stage.wait()["seconds"]
    loop.wait()
    with stage.source(CONCURRENCY) as process:
        time.sleep(1.5)  # it is started, and asks
        began = cpu_s(process.pid)
        stage.fill(MESSAGES)
        found = stage.wait()
        rates["source"] = MESSAGES / found["seconds"]
        rates["cpu_ms"] = (cpu_s(process.pid) - began) / MESSAGES * 1e3
        rates["per_delete"] = MESSAGES / found["calls"]["DeleteMessageBatch"]
        rates["per_receive"] = MESSAGES / found["calls"]["ReceiveMessage"]
    return rates


def memory(stage: Stage) -> list[tuple[int, int]]:
    """(messages done, bytes) along a long queue."""
    stage.fill(LONG)
    points: list[tuple[int, int]] = []
    with stage.source(CONCURRENCY) as process:
        while (found := stage.stats())["left"] or found["unfilled"]:
            done = LONG - found["unfilled"] - found["left"]
            if not points or done - points[-1][0] >= 2500:
                points.append((done, anonymous(process.pid)))
            time.sleep(0.2)
        points.append((LONG, anonymous(process.pid)))
    return points


def saturation(concurrency: int) -> dict[str, Any]:
    with Stage(TAKES, 0.01) as stage, stage.source(concurrency):
        stage.fill(SATURATED, watch=True)
        found = stage.wait()
        return {"most_in_flight": found["most_in_flight"], "repeated": len(found["repeated"])}


def measure(rounds: int) -> dict[str, Any]:
    with Stage() as stage:
        throughput(stage)  # warms everything up
        rates = [throughput(stage) for _ in range(rounds)]
        points = memory(stage)
    return {"rates": rates, "memory": points, "saturation": {concurrency: saturation(concurrency) for concurrency in CONCURRENCIES}}


def table(found: dict[str, Any]) -> str:
    rates = found["rates"]
    ratio = [rate["source"] / rate["bare"] for rate in rates]
    points = found["memory"]
    settled = [size for done, size in points if done >= LONG // 5]
    growth = settled[-1] / settled[0] - 1
    sizes = ", ".join(f"{size / 1e6:.1f} after {done:,}" for done, size in points[:: max(1, len(points) // 6)])
    lines = [
        "# From a queue to a sink",
        "",
        "    .venv/bin/python bench/queue_source.py",
        "",
        f"{machine()}; SQS server, source and sink share them. Median (lowest–highest) of {len(rates)} rounds, in turns.",
        "",
        "## Throughput",
        "",
        f"The sink answers 204 at once. {MESSAGES} messages a turn, concurrency {CONCURRENCY}; the bare loop receives ten and deletes ten",
        f"with boto3 in {POLLERS} threads, as many as the source's pollers. The server, moto under one lock, is what bounds both. Wanted:",
        f"at least {TARGET_RATIO} of the bare loop. {'Held' if statistics.median(ratio) >= TARGET_RATIO else 'Not held'}.",
        "",
        "| | |",
        "| --- | ---: |",
        f"| bare loop, messages/s | {spread([rate['bare'] for rate in rates], '.0f')} |",
        f"| queue source, messages/s | {spread([rate['source'] for rate in rates], '.0f')} |",
        f"| ratio | {spread(ratio, '.2f')} |",
        f"| the source's processor time, ms a message | {spread([rate['cpu_ms'] for rate in rates], '.2f')} |",
        f"| messages of one delete | {spread([rate['per_delete'] for rate in rates], '.1f')} |",
        f"| messages of one receive | {spread([rate['per_receive'] for rate in rates], '.1f')} |",
        "",
        f"## Memory over {LONG:,} messages",
        "",
        f"The source's own (RssAnon), MB: {sizes}, {points[-1][1] / 1e6:.1f} at the end. From a fifth of the way on it grows by",
        f"{growth * 100:+.1f} %. Wanted: at most {TARGET_GROWTH:.0%}. {'Held' if growth <= TARGET_GROWTH else 'Not held'}.",
        "",
        "## A saturated sink",
        "",
        f"It takes {TAKES} at a time, for 10 ms, and refuses the rest with 503. Messages in flight by the server's own count, of",
        f"{SATURATED}; none may be more than QUEUE_SOURCE_CONCURRENCY, and none should be received twice.",
        "",
        "| concurrency | most in flight | received more than once |",
        "| ---: | ---: | ---: |",
    ]
    for concurrency, seen in found["saturation"].items():
        lines.append(f"| {concurrency} | {seen['most_in_flight']} | {seen['repeated']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--sink"]:
        asyncio.run(sink(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
    elif sys.argv[1:2] == ["--bare"]:
        bare(sys.argv[2])
    else:
        main(__doc__, measure, table)
