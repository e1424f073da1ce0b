"""What the tests of the queue source share: an SQS server, a sink that does as it is told, and the source as a process."""

import contextlib
import http.server
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3

from knative.queue_source.source import Source
from tests.support import Server, clean_environment, free_port, request, running, wait_until

KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class Post:
    """What the sink was sent."""

    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["ce-id"]

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    """What the sink says."""

    status: int = 204
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Sink:
    """An HTTP server in threads; `answer` decides."""

    def __init__(self, answer: Callable[[Post], Reply] = lambda _: Reply(), port: int = 0) -> None:
        self.answer = answer
        self.posts: list[Post] = []
        self._lock = threading.Lock()
        self.busy = self.most_busy = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                post = Post({name.lower(): value for name, value in self.headers.items()}, body)
                with outer._lock:
                    outer.posts.append(post)
                    outer.busy += 1
                    outer.most_busy = max(outer.busy, outer.most_busy)
                try:
                    reply = outer.answer(post)
                finally:
                    with outer._lock:
                        outer.busy -= 1
                with contextlib.suppress(OSError):
                    self.send_response(reply.status)
                    for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(reply.body)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def of(self, number: Any) -> list[Post]:
        """The posts of the message `{"n": number}`."""
        return [post for post in list(self.posts) if post.json()["n"] == number]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Sqs:
    """The SQS server as a process, and a client of it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.address = f"http://127.0.0.1:{port}"
        self.client: Any = boto3.client(
            "sqs", endpoint_url=self.address, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
        )
        self.env = KEYS | {"AWS_ENDPOINT_URL": self.address}

    def queue(self, name: str, *, receives: int = 0, **attributes: str) -> str:
        """The URL of a new queue; with `receives`, the queue `NAME-dead` gets what was received so often."""
        fifo = {"FifoQueue": "true", "ContentBasedDeduplication": "false"} if name.endswith(".fifo") else {}
        if receives:
            stem, dot, end = name.partition(".")
            dead = self.queue(f"{stem}-dead{dot}{end}")
            arn = self.client.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
            attributes["RedrivePolicy"] = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": str(receives)})
        url: str = self.client.create_queue(QueueName=name, Attributes={**fifo, **attributes})["QueueUrl"]
        return url

    def send(self, url: str, *numbers: Any, **more: Any) -> list[str]:
        """Send `{"n": number}` for each; the ids."""
        return [self.client.send_message(QueueUrl=url, MessageBody=json.dumps({"n": n}), **more)["MessageId"] for n in numbers]

    def left(self, url: str) -> int:
        """Messages in a queue, visible or not."""
        found = self.client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        return sum(int(found[name]) for name in ("ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"))

    def wait_empty(self, url: str, seconds: float = 60.0) -> None:
        wait_until("an empty queue", lambda: self.left(url) == 0, seconds)

    def take(self, url: str, count: int = 1, seconds: float = 60.0) -> list[Any]:
        """So many messages from a queue."""
        found: list[Any] = []

        def look() -> bool:
            found.extend(
                self.client.receive_message(QueueUrl=url, MaxNumberOfMessages=10, MessageAttributeNames=["All"]).get("Messages", [])
            )
            return len(found) >= count

        wait_until(f"{count} messages", look, seconds)
        return found

    def control(self, **asked: Any) -> None:
        request(self.port, "POST", "/_control", asked)

    def stats(self) -> Any:
        return request(self.port, "GET", "/_stats").json()


@contextlib.contextmanager
def sqs_running(folder: Path) -> Iterator[Sqs]:
    port = free_port()
    command = [sys.executable, "-m", "tests.knative.queue_source.sqs_server", str(port)]
    with running(command, folder / "sqs.log", clean_environment(), port):
        wait_until("the SQS server", lambda: request(port, "GET", "/_stats").status == 200)
        yield Sqs(port)


def settings(url: str, sink: str, **more: str) -> dict[str, str]:
    """The source's environment, quick about everything."""
    return {
        "QUEUE_SOURCE_URL": url,
        "K_SINK": sink,
        "QUEUE_SOURCE_WAIT_S": "1",
        "QUEUE_SOURCE_VISIBILITY_S": "6",
        "QUEUE_SOURCE_BACKOFF_S": "0",
        "QUEUE_SOURCE_BACKOFF_MAX_S": "0",
    } | more


@contextlib.contextmanager
def source_running(folder: Path, env: dict[str, str], *, port: int = 0) -> Iterator[Server]:
    """`python -m knative.queue_source`."""
    if port:
        env = env | {"QUEUE_SOURCE_PORT": str(port), "QUEUE_SOURCE_HOST": "127.0.0.1"}
    command = [sys.executable, "-m", "knative.queue_source"]
    with running(command, folder / f"source-{free_port()}.log", clean_environment(**env), port) as server:
        yield server


@contextlib.contextmanager
def at_work(source: Source) -> Iterator[Source]:
    """A source in this process, from its start to its stop."""
    source.start()
    try:
        yield source
    finally:
        source.stop()
        assert (source.threads.join(30), source.threads.failure) == ([], "")
