"""The embedded object store and queues: who is answered, what is served, and what holds whatever some clients do."""

import asyncio
import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.request import urlopen

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from knative.local import embedded_server
from tests.support import Server, clean_environment, free_port, request, running, wait_until

KEYS = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
EVIL = {"Origin": "http://evil.example"}
PROGRAM = [sys.executable, "-m", "knative.local.embedded_server"]


def is_there(port: int) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return request(port, "GET", "/").status == 200
    return False


@contextlib.contextmanager
def served(folder: Path, prefix: tuple[str, ...] = ()) -> Iterator[Server]:
    port = free_port()
    with running([*prefix, *PROGRAM, str(port)], folder / "log", clean_environment(), port) as server:
        wait_until("the embedded server", lambda: is_there(port))
        yield server


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("embedded")) as server:
        s3 = client(server, "s3")
        s3.create_bucket(Bucket="models", ACL="public-read-write")
        s3.put_object(Bucket="models", Key="a", Body=b"secret", ACL="public-read-write")
        yield server


def client(server: Server, service: str, host: str = "127.0.0.1", **config: Any) -> Any:
    made: Any = boto3.client  # any service
    return made(service, endpoint_url=f"http://{host}:{server.port}", config=Config(retries={"total_max_attempts": 1}, **config), **KEYS)


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        pytest.param("POST", "/moto-api/reset", {}, id="the emulator's own routes, whoever asks"),
        pytest.param("POST", "/moto-api/reset", EVIL | {"Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}, id="a form"),
        pytest.param("GET", "/moto-api/data.json", EVIL, id="a script of another site"),
        pytest.param("GET", "/moto-api", {}, id="its page"),
        pytest.param("POST", "//moto-api/reset", {}, id="behind another slash"),
        pytest.param("POST", "/MOTO-API/reset", {}, id="in capitals"),
        pytest.param("GET", "/models/a", EVIL, id="an object"),
        pytest.param("PUT", "/models/b", EVIL, id="an object that would be written"),
        pytest.param("DELETE", "/models/a", {"Sec-Fetch-Site": "cross-site"}, id="one that would be deleted"),
        pytest.param("GET", "/models/a", {"Sec-Fetch-Site": "same-site"}, id="what the browser says is another page"),
        pytest.param("GET", "/models/a", {"Origin": "null"}, id="a page in a sandbox"),
        pytest.param("OPTIONS", "/models/a", EVIL | {"Access-Control-Request-Method": "PUT"}, id="the question before"),
        pytest.param("GET", "/models/a", {"Host": "evil.example"}, id="a name that was made to lead here"),
        pytest.param("GET", "/a", {"Host": "models.s3.amazonaws.com"}, id="Amazon's name"),
        pytest.param("GET", "/a", {"Host": "localhost.evil.example"}, id="a name that begins as ours"),
        pytest.param("GET", "/-/contents", EVIL, id="what the platform looks at"),
        pytest.param(
            "GET", "/?Action=GetCallerIdentity", {"Authorization": "AWS4-HMAC-SHA256 Credential=x/1/us-east-1/sts/aws4_request"}, id="sts"
        ),
        pytest.param("POST", "/", {"X-Amz-Target": "DynamoDB_20120810.ListTables"}, id="a database"),
    ],
)
def test_who_is_refused_gets_403_with_the_reason_and_nothing_happens(
    store: Server, method: str, path: str, headers: dict[str, str]
) -> None:
    reply = request(store.port, method, path, b"" if method in ("POST", "PUT") else None, headers)
    assert reply.status == 403
    assert not [name for name in reply.headers if name.lower().startswith("access-control")]
    assert b"secret" not in reply.body
    assert method == "HEAD" or b"essage" in reply.body
    listed = client(store, "s3").list_objects_v2(Bucket="models")["Contents"]
    assert [one["Key"] for one in listed] == ["a"]


@pytest.mark.parametrize("origin", ["http://127.0.0.1:PORT", "http://localhost:PORT"])
def test_a_page_that_the_store_itself_serves_may_ask_it(store: Server, origin: str) -> None:
    origin = origin.replace("PORT", str(store.port))
    reply = request(store.port, "GET", "/models/a", headers={"Origin": origin, "Host": origin.removeprefix("http://")})
    assert (reply.status, reply.body) == (200, b"secret")


def test_clients_find_what_they_found_before(store: Server) -> None:
    s3, sqs = client(store, "s3"), client(store, "sqs")
    key = "a/ü b%2F+c.txt"
    s3.create_bucket(Bucket="other")
    s3.put_object(Bucket="other", Key=key, Body=b"hello", Metadata={"my_key": "1", "your-key": "2"})
    found = s3.get_object(Bucket="other", Key=key, Range="bytes=1-2")
    assert (found["Body"].read(), found["Metadata"]) == (b"el", {"my_key": "1", "your-key": "2"})
    assert s3.head_object(Bucket="other", Key=key)["ContentLength"] == 5
    with urlopen(s3.generate_presigned_url("get_object", Params={"Bucket": "other", "Key": key})) as reply:  # noqa: S310
        assert reply.read() == b"hello"
    assert request(store.port, "GET", "/a", headers={"Host": f"models.localhost:{store.port}"}).body == b"secret"
    with pytest.raises(ClientError, match="NoSuchKey"):
        s3.get_object(Bucket="other", Key="nowhere")
    url = sqs.create_queue(QueueName="work")["QueueUrl"]
    assert url == f"http://127.0.0.1:{store.port}/000000000000/work"
    sqs.send_message(QueueUrl=url, MessageBody="a")
    assert [one["Body"] for one in sqs.receive_message(QueueUrl=url)["Messages"]] == ["a"]
    assert "Messages" not in sqs.receive_message(QueueUrl=url, WaitTimeSeconds=1)
    with pytest.raises(ClientError, match="no name of this machine"):
        elsewhere(store).list_queues()


def elsewhere(store: Server) -> Any:
    """A client that calls the store by another site's name."""
    sqs = client(store, "sqs")
    sqs.meta.events.register("before-send", lambda request, **_: request.headers.__setitem__("Host", "evil.example"))
    return sqs


def test_a_body_that_is_too_large_is_refused_before_it_comes(store: Server) -> None:
    with socket.create_connection(("127.0.0.1", store.port), timeout=60) as caller:
        caller.sendall(b"PUT /models/b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999\r\n\r\n")
        assert caller.recv(4096).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", store.port), timeout=60) as caller:
        caller.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nX-Amz-Target: AmazonSQS.SendMessage\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):  # it is not read to its end
            for _ in range(16):
                caller.sendall(b"100000\r\n" + b"x" * (1 << 20) + b"\r\n")
        assert caller.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_turns_bad_is_its_senders_mistake(store: Server) -> None:
    with socket.create_connection(("127.0.0.1", store.port), timeout=60) as caller:
        caller.sendall(b"PUT /models/bad HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert caller.recv(4096).startswith(b"HTTP/1.1 100 ")
        caller.sendall(b"1\r\nx\r\nno chunk")
        assert caller.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_a_body_is_asked_for_when_its_sender_waits_for_that(store: Server) -> None:
    with socket.create_connection(("127.0.0.1", store.port), timeout=60) as caller:
        caller.sendall(b"PUT /models/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\nExpect: 100-continue\r\n\r\n")
        assert caller.recv(4096).startswith(b"HTTP/1.1 100 ")
        caller.sendall(b"secret")
        assert caller.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("descriptors", [128, 1024])
def test_callers_are_answered_beside_thousands_of_silent_connections(tmp_path: Path, descriptors: int) -> None:
    with served(tmp_path, ("bash", "-c", f'ulimit -n {descriptors}; exec "$@"', "x")) as server, contextlib.ExitStack() as silent:
        for number in range(descriptors + 400):
            connection = silent.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            with contextlib.suppress(OSError):  # it has given way already
                connection.sendall(b"GET /hea" if number % 5 == 0 else b"")
        assert [request(server.port, "GET", "/").status for _ in range(20)] == [200] * 20
        assert len(server.said().splitlines()) <= 1


def test_long_polls_keep_nobody_from_the_store(store: Server) -> None:
    url = client(store, "sqs").create_queue(QueueName="empty")["QueueUrl"]
    asked = json.dumps({"QueueUrl": url, "WaitTimeSeconds": 20}).encode()
    head = f"POST / HTTP/1.1\r\nHost: localhost\r\nX-Amz-Target: AmazonSQS.ReceiveMessage\r\nContent-Length: {len(asked)}\r\n\r\n".encode()
    with contextlib.ExitStack() as polling:
        polls = [polling.enter_context(socket.create_connection(("127.0.0.1", store.port), timeout=60)) for _ in range(257)]
        for poll in polls[:256]:
            poll.sendall(head + asked)
        wait_until("a poll too many", lambda: _refused(store, head + asked))
        assert request(store.port, "GET", "/models/a").body == b"secret"
        client(store, "sqs").send_message(QueueUrl=url, MessageBody="late")
        assert len(client(store, "sqs").list_queues()["QueueUrls"]) >= 1


def _refused(store: Server, sent: bytes) -> bool:
    with socket.create_connection(("127.0.0.1", store.port), timeout=60) as caller:
        caller.settimeout(1)
        caller.sendall(sent)
        with contextlib.suppress(TimeoutError):
            return caller.recv(4096).startswith(b"HTTP/1.1 503 ")
        return False


def test_it_ends_while_somebody_waits_for_messages(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        url = client(server, "sqs").create_queue(QueueName="work")["QueueUrl"]
        asked = json.dumps({"QueueUrl": url, "WaitTimeSeconds": 20})
        poll = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        poll.request("POST", "/", asked, {"X-Amz-Target": "AmazonSQS.ReceiveMessage"})
        server.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(15)  # less than the poll takes
        poll.close()
        assert server.process.returncode == 0


def test_what_was_deleted_is_forgotten(tmp_path: Path) -> None:
    """moto keeps each message in a list of all that there ever were, and the receipts of all that were deleted."""
    code = (
        "from knative.local.embedded_server import _keep_nothing; _keep_nothing()\n"
        "from moto.sqs.models import Message, Queue\n"
        "queue = Queue('work', 'us-east-1', '0')\n"
        "for number in range(10_500): queue.deleted_messages.update([str(number)])\n"
        "[Message(str(number), 'x') for number in range(100)]\n"
        "gone = queue.deleted_messages; print(len(gone), len(gone._order), '0' in gone, len(Message.instances_tracked))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]).stdout
    assert said.split() == ["10000", "10000", "False", "0"]


SQS = {"Authorization": "AWS4-HMAC-SHA256 Credential=x/20170220/us-east-1/sqs/aws4_request"}


def test_a_poller_that_has_left_takes_no_message_with_it(store: Server) -> None:
    sqs = client(store, "sqs")
    url = sqs.create_queue(QueueName="left", Attributes={"VisibilityTimeout": "3600"})["QueueUrl"]
    asked = json.dumps({"QueueUrl": url, "WaitTimeSeconds": 20})
    for _ in range(3):
        poll = http.client.HTTPConnection("127.0.0.1", store.port, timeout=60)
        poll.request("POST", "/", asked, SQS | {"X-Amz-Target": "AmazonSQS.ReceiveMessage"})
        time.sleep(0.2)  # it waits for a message by now
        poll.close()
        sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])  # which is asked after it has left
    time.sleep(0.2)
    sqs.send_message(QueueUrl=url, MessageBody="a")
    assert [one["Body"] for one in sqs.receive_message(QueueUrl=url, WaitTimeSeconds=20)["Messages"]] == ["a"]


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("Nope", b"{}"),
        ("SendMessage", b"{"),
        ("SendMessage", b"[]"),
        ("SendMessage", b"\xff"),
        ("SendMessage", b"[" * 100_000),
        ("SendMessage", b'{"QueueUrl": "http://localhost/000000000000/right"}'),
        ("ReceiveMessage", b'{"QueueUrl": "http://localhost/000000000000/right", "WaitTimeSeconds": "abc"}'),
        ("ReceiveMessage", b'{"QueueUrl": 7}'),
    ],
)
def test_a_request_that_makes_no_sense_is_its_senders_mistake(store: Server, name: str, body: bytes) -> None:
    client(store, "sqs").create_queue(QueueName="right")
    reply = request(store.port, "POST", "/", body, SQS | {"X-Amz-Target": f"AmazonSQS.{name}"})
    assert reply.status == 400
    assert reply.json()["__type"]


class Incoming:
    """A request whose body comes when it is told to."""

    headers: dict[str, str] = {}  # noqa: RUF012
    transport = None
    content_length = None

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.content = self

    async def iter_any(self) -> AsyncIterator[bytes]:
        while piece := await self.pieces.get():
            yield piece


def test_bodies_beyond_the_bound_wait_and_the_oldest_goes_on() -> None:
    async def main() -> None:
        bodies = embedded_server.Bodies(room=100)
        requests = [Incoming() for _ in range(3)]
        done: list[int] = []
        go = asyncio.Event()

        async def read(number: int) -> None:
            async with bodies.read(cast(Any, requests[number]), 1000) as body:
                done.append(len(body))
                await go.wait()

        tasks = [asyncio.create_task(read(number)) for number in range(3)]
        await asyncio.sleep(0)
        for incoming, size in zip(requests, (10, 60, 60), strict=True):  # the first one is slow, and keeps nobody from sending
            incoming.pieces.put_nowait(bytes(size))
            await asyncio.sleep(0.01)
        for incoming in requests[1:]:
            incoming.pieces.put_nowait(None)
        await asyncio.sleep(0.01)
        assert (done, bodies._taken) == ([60], 70)
        requests[0].pieces.put_nowait(bytes(500))  # the oldest one has its turn, however large it is
        requests[0].pieces.put_nowait(None)
        await asyncio.sleep(0.01)
        assert (done, bodies._taken) == ([60, 510], 570)
        go.set()
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)
        assert (done, bodies._taken, bodies._sizes) == ([60, 510, 60], 0, {})

    asyncio.run(main())


def test_a_body_that_does_not_come_in_time_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_server, "BODY_S", 0.01)

    async def main() -> None:
        bodies, incoming = embedded_server.Bodies(), Incoming()
        incoming.pieces.put_nowait(b"a")
        with pytest.raises(embedded_server.Refused, match="in time") as raised:
            async with bodies.read(cast(Any, incoming), 10):
                pass
        assert (raised.value.status, bodies._taken) == (408, 0)

    asyncio.run(main())
