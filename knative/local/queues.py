"""Queues over the API of SQS, embedded or real: what is in them, messages into them and out of them. All of it waits: not for the loop."""

import functools
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from knative.local.errors import PlatformError
from knative.local.plain import line
from weights_cache.environment import masked

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

BATCH = 10  # messages in a request, which is SQS's own bound
MAX_RECEIVES = 5  # of a message of an embedded queue, before it goes to the dead-letter queue
DEAD = "-dlq"  # what the name of that ends in
FIFO = ".fifo"
ACCOUNT, REGION = "000000000000", "us-east-1"  # of the embedded queues
CONTENTS = "/-/contents"  # of the embedded server: what the platform looks at, and SQS and S3 tell nobody; no bucket has such a name
ANSWER_S = 10.0  # for a queue to answer
LONGEST_POLL_S = 20  # of SQS
LONGEST_ERROR = 500  # characters
# What the embedded server takes; it asks for no more than a name.
EMBEDDED = {"AWS_ACCESS_KEY_ID": "relight", "AWS_SECRET_ACCESS_KEY": "relight-local", "AWS_REGION": REGION}


_IDENTITY = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE")


class QueueError(PlatformError):
    """A queue does not answer, or says no. What it says is somebody else's text: one line of it, without credentials."""

    def __init__(self, message: str) -> None:
        super().__init__(line(masked(message), LONGEST_ERROR))


@dataclass(frozen=True)
class Depth:
    """How many messages a queue has. `dead`: those in its dead-letter queue, None if it has none, or one that we may not see."""

    waiting: int
    in_flight: int
    dead: int | None


@dataclass(frozen=True)
class Message:
    """A message as it came out."""

    id: str
    body: str
    attributes: Mapping[str, str]


def is_queue_url(text: str) -> bool:
    """Whether it is the address of a queue, as SQS has them."""
    return bool(re.fullmatch(r"https?://[^/]+/[0-9]{12}/[-\w]{1,80}(\.fifo)?", text))


def queue_name(url: str) -> str:
    """The last part of a queue's address."""
    return url.rpartition("/")[2]


def dead_letters(name: str) -> str:
    """The name of an embedded queue's dead-letter queue."""
    return name.removesuffix(FIFO) + DEAD + (FIFO if name.endswith(FIFO) else "")


class Queue:
    """One queue, with somebody's credentials."""

    def __init__(self, url: str, env: Mapping[str, str], wait_s: int = 0, answer_s: float = ANSWER_S) -> None:
        """env: the AWS variables that count, those of a container; what it lacks is looked for where boto3 looks.

        wait_s: how long `receive` waits for messages, up to 20 s. answer_s: how long all else waits for an answer. Nothing is sent yet.
        """
        self.url = url
        self.name = queue_name(url)
        self._wait_s = wait_s
        parts = urlsplit(url)
        self._server = f"{parts.scheme}://{parts.netloc}"
        # As in sqs.eu-west-1.amazonaws.com.
        region = (
            next(iter(re.findall(r"^sqs\.([-a-z0-9]+)\.", parts.netloc)), None) or env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
        )
        self._client = _client(self._server, region or REGION, answer_s, wait_s, *(env.get(f"AWS_{name}") for name in _IDENTITY))

    def depth(self) -> Depth:
        """What is in it now. Raises QueueError."""
        waiting, in_flight, policy = self._counts(self.url)
        return Depth(waiting, in_flight, self._dead_depth(policy))

    def _counts(self, url: str) -> tuple[int, int, str]:
        """Messages that wait, those in flight, and the redrive policy."""
        names: Any = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesDelayed", "ApproximateNumberOfMessagesNotVisible"]
        names.append("RedrivePolicy")
        found = self._do(self._client.get_queue_attributes, QueueUrl=url, AttributeNames=names).get("Attributes", {})
        counts = [found.get(name, "0") for name in names[:3]]  # not every server that speaks SQS has all
        if not all(count.isdecimal() for count in counts):
            raise QueueError(f"queue {self.name}: {', '.join(counts)} are no numbers of messages")
        waiting, delayed, in_flight = map(int, counts)
        return waiting + delayed, in_flight, found.get("RedrivePolicy", "{}")

    def _dead_depth(self, policy: str) -> int | None:
        try:
            account, name = json.loads(policy)["deadLetterTargetArn"].split(":")[-2:]
            waiting, in_flight, _ = self._counts(f"{self._server}/{account}/{name}")
        except (QueueError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or none that we can ask
            return None
        return waiting + in_flight

    def send(self, bodies: Sequence[str], attributes: Mapping[str, str], group: str) -> None:
        """Put messages in. group: the message group, in a FIFO queue. Raises QueueError, also if some of them were refused."""
        given = {name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()}
        for start in range(0, len(bodies), BATCH):
            entries: Any = [
                {"Id": str(number), "MessageBody": body, "MessageAttributes": given}
                | ({"MessageGroupId": group, "MessageDeduplicationId": str(uuid.uuid4())} if self.name.endswith(FIFO) else {})
                for number, body in enumerate(bodies[start : start + BATCH])
            ]
            reply = self._do(self._client.send_message_batch, QueueUrl=self.url, Entries=entries)
            if failed := reply.get("Failed"):
                sent = start + len(entries) - len(failed)
                why = failed[0].get("Message") or failed[0]["Code"]
                raise QueueError(f"queue {self.name} took {sent} of {len(bodies)} messages; of the next it said: {why}")

    def receive(self, limit: int) -> Iterator[Message]:
        """Take messages out, at most `limit`, until none comes within the wait; each is deleted when the next is asked for.

        Raises QueueError.
        """
        while limit > 0:
            asked: Any = {"MaxNumberOfMessages": min(BATCH, limit), "WaitTimeSeconds": self._wait_s, "MessageAttributeNames": ["All"]}
            found = self._do(self._client.receive_message, QueueUrl=self.url, **asked).get("Messages", [])
            if not found:
                return
            for message in found:
                given = {name: str(value.get("StringValue", "")) for name, value in message.get("MessageAttributes", {}).items()}
                yield Message(message["MessageId"], message["Body"], given)
                self._do(self._client.delete_message, QueueUrl=self.url, ReceiptHandle=message["ReceiptHandle"])
            limit -= len(found)

    def create(self) -> None:
        """Make the queue, and a dead-letter queue beside it that takes what was received too often. Raises QueueError."""
        attributes = {"FifoQueue": "true"} if self.name.endswith(FIFO) else {}
        if not self.name.removesuffix(FIFO).endswith(DEAD):
            made = self._do(self._client.create_queue, QueueName=dead_letters(self.name), Attributes=attributes)["QueueUrl"]
            arn = self._do(self._client.get_queue_attributes, QueueUrl=made, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
            attributes["RedrivePolicy"] = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": MAX_RECEIVES})
        self._do(self._client.create_queue, QueueName=self.name, Attributes=attributes)

    def _do(self, call: Callable[..., Any], **arguments: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return call(**arguments)
        except ClientError as error:
            told = error.response["Error"]
            raise QueueError(f"queue {self.name}: {told.get('Message') or told.get('Code') or error}") from error
        except BotoCoreError as error:
            raise QueueError(f"queue {self.name}: {error}") from error


@functools.lru_cache(maxsize=64)
def _client(
    server: str, region: str, answer_s: float, wait_s: int, key: str | None, secret: str | None, token: str | None, profile: str | None
) -> "SQSClient":
    """A client may be used by several threads, and is not made cheaply. Raises QueueError for a profile that is none."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    try:
        session = boto3.session.Session(key, secret, token, region, profile_name=profile)
        own = urlsplit(server).hostname in ("127.0.0.1", "localhost")  # which no proxy is asked for
        config = Config(
            connect_timeout=answer_s, read_timeout=answer_s + wait_s, retries={"total_max_attempts": 1}, proxies={} if own else None
        )
        return session.client("sqs", endpoint_url=server, config=config)
    except BotoCoreError as error:
        raise QueueError(str(error)) from error
