"""Queues by the API of SQS, beside the embedded server."""

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import pytest

from knative.local.queues import CONTENTS, EMBEDDED, MAX_RECEIVES, Depth, Queue, QueueError, is_queue_url
from tests.support import clean_environment, free_port, running, wait_until

# The threads of the server take turns as often as can be, so that what can come between will.
RUSHED = "import sys; sys.setswitchinterval(1e-6); from knative.local.embedded_server import main; main()"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = tmp_path_factory.mktemp("queues") / "log"
    with running([sys.executable, "-c", RUSHED, str(port)], log, clean_environment(), port):
        found = f"http://127.0.0.1:{port}"
        wait_until("the server", lambda: ages(found) is not None)
        yield found


def ages(address: str) -> dict[str, float]:
    with urlopen(address + CONTENTS) as reply:  # noqa: S310
        found: dict[str, float | None] = json.load(reply)["queues"]
        return {name: at for name, at in found.items() if at is not None}


def made(address: str, name: str, wait_s: int = 0) -> Queue:
    queue = Queue(f"{address}/000000000000/{name}", EMBEDDED, wait_s)
    queue.create()
    return queue


def test_what_is_sent_comes_out_once_and_is_counted_meanwhile(address: str) -> None:
    queue, before = made(address, "work"), time.time()
    queue.send([f"message {number}" for number in range(25)], {"tenant": "a"}, "")
    assert queue.depth() == Depth(25, 0, 0)
    assert before - 1 < ages(address)["work"] < time.time() + 1
    out = queue.receive(3)
    first = next(out)
    assert first.attributes == {"tenant": "a"}
    assert queue.depth() == Depth(22, 3, 0)
    bodies = [first.body, *(message.body for message in out), *(message.body for message in queue.receive(1000))]
    assert sorted(bodies) == sorted(f"message {number}" for number in range(25))
    assert queue.depth() == Depth(0, 0, 0)
    assert "work" not in ages(address)


def test_a_fifo_queue_keeps_the_order_within_a_group(address: str) -> None:
    queue = made(address, "ordered.fifo")
    queue.send(["1", "2"], {}, "a")
    queue.send(["1"], {}, "a")
    assert [message.body for message in queue.receive(10)] == ["1", "2", "1"]
    assert queue.depth().dead == 0


def test_what_is_received_too_often_lies_in_the_dead_letter_queue(address: str) -> None:
    queue = made(address, "poison")
    queue.send(["poison"], {}, "")
    client = queue._client
    for _ in range(MAX_RECEIVES):
        (message,) = client.receive_message(QueueUrl=queue.url)["Messages"]
        client.change_message_visibility(QueueUrl=queue.url, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=0)
    assert list(queue.receive(1)) == []
    assert queue.depth() == Depth(0, 0, 1)
    assert [message.body for message in Queue(f"{queue.url}-dlq", EMBEDDED).receive(1)] == ["poison"]


def test_with_many_who_send_and_receive_at_once_nothing_is_lost_or_given_twice(address: str) -> None:
    queue, backlog, count = made(address, "busy"), 500, 25
    queue.send(["backlog"] * backlog, {}, "")  # the longer the queue, the longer a message is on its way in or out

    def send(sender: int) -> None:
        for number in range(count):
            queue.send([f"{sender}-{number}"], {}, "")

    def receive() -> list[str]:
        return [message.id for message in queue.receive(50)]

    with ThreadPoolExecutor(8) as threads:
        sending, receiving = [threads.submit(send, sender) for sender in range(4)], [threads.submit(receive) for _ in range(4)]
        out = [key for some in receiving for key in some.result()]
        for one in sending:
            one.result()
    assert len(set(out)) == len(out) == 200
    assert queue.depth() == Depth(backlog + 4 * count - 200, 0, 0)


def test_a_queue_that_is_not_there_says_so_in_one_line(address: str) -> None:
    with pytest.raises(QueueError, match=r"^queue nowhere: The specified queue does not exist"):
        Queue(f"{address}/000000000000/nowhere", EMBEDDED).depth()
    with pytest.raises(QueueError, match=r"^queue a: Could not connect"):
        Queue(f"http://127.0.0.1:{free_port()}/000000000000/a", EMBEDDED).depth()
    with pytest.raises(QueueError, match=r"profile.*nobody"):
        Queue("https://sqs.eu-west-1.amazonaws.com/000000000000/a", {"AWS_PROFILE": "nobody"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://sqs.eu-west-1.amazonaws.com/123456789012/work", True),
        ("http://127.0.0.1:4566/000000000000/work.fifo", True),
        ("work", False),
        ("amqp://guest:guest@localhost/work", False),
        ("https://example.com/work", False),
    ],
)
def test_a_queues_address_is_told_from_a_name(text: str, expected: bool) -> None:
    assert is_queue_url(text) is expected
