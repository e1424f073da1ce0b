"""Amazon SQS, or whatever speaks its protocol."""

import base64
import hashlib
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from knative.queue_source.errors import QueueSourceError, QueueUnavailable, ResultRefused
from knative.queue_source.queue import Message, Outcome

if TYPE_CHECKING:
    from mypy_boto3_sqs.client import SQSClient

log = logging.getLogger("relight.queue")

MOST = 10  # messages of one call
LONGEST_HOLD_S = 43200.0  # from a receive, says SQS
_MARGIN_S = 5.0  # of that, for the way there
_CALL_S = 10.0  # one call that is no long poll
_SYSTEM = ("ApproximateReceiveCount", "SentTimestamp", "MessageGroupId", "SequenceNumber", "AWSTraceHeader")
_NO_QUEUE = ("AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist", "InvalidAddress", "404")
_DENIED = ("AccessDenied", "AccessDeniedException", "AuthorizationError")
# SQS speaks of a message that is no longer ours in several ways.
_GONE = ("ReceiptHandleIsInvalid", "MessageNotInflight", "InvalidParameterValue", "AWS.SimpleQueueService.MessageNotInflight")
_TOO_LARGE = ("InvalidMessageContents", "InvalidParameterValue", "BatchRequestTooLong", "MessageTooLong")
_REGION = re.compile(r"(?:^|\.)(?:sqs|queue)\.([a-z]{2}(?:-[a-z]+)+-\d)\.|^([a-z]{2}(?:-[a-z]+)+-\d)\.queue\.")
_TRACE = re.compile(r"(?:^|;)\s*(Root|Parent|Sampled)=([^;]+)")


def client(url: str, *, connections: int, read_timeout_s: float, attempts: int = 2) -> "SQSClient":
    """A client for a queue: at its URL's own host and region, unless the AWS variables name others."""
    host = urlsplit(url).hostname or ""
    region = _REGION.search(host)
    config = Config(
        connect_timeout=5,
        read_timeout=read_timeout_s,
        max_pool_connections=connections,
        tcp_keepalive=True,
        retries={"mode": "standard", "total_max_attempts": attempts},
    )
    session = boto3.session.Session()
    told = session.region_name
    found: SQSClient = session.client("sqs", config=config, region_name=(region and (region[1] or region[2])) or told or "us-east-1")
    if host.endswith((".amazonaws.com", ".amazonaws.com.cn")) or not found.meta.endpoint_url.endswith(
        (".amazonaws.com", ".amazonaws.com.cn")
    ):
        return found
    parts = urlsplit(url)  # a queue that is not Amazon's, and nobody says where its service is
    return session.client("sqs", config=config, region_name=told or "us-east-1", endpoint_url=f"{parts.scheme}://{parts.netloc}")


def arn_of(url: str, region: str, partition: str) -> str:
    """What the ARN of a queue must be, for whoever may not ask."""
    account, name = (["", *urlsplit(url).path.strip("/").split("/")])[-2:]
    return f"arn:{partition}:sqs:{region}:{account}:{name}"


def traceparent(header: str) -> str | None:
    """The trace context that an X-Ray header holds, as W3C has it."""
    found = dict(_TRACE.findall(header))
    root = re.fullmatch(r"1-([0-9a-f]{8})-([0-9a-f]{24})", found.get("Root", ""))
    parent = re.fullmatch(r"[0-9a-f]{16}", found.get("Parent", ""))
    if not root or not parent:
        return None
    return f"00-{root[1]}{root[2]}-{parent[0]}-{'01' if found.get('Sampled') == '1' else '00'}"


class SqsQueue:
    """A queue that messages are received from."""

    longest_hold_s = LONGEST_HOLD_S - _MARGIN_S

    def __init__(self, url: str, *, visibility_s: int, wait_s: int, pollers: int) -> None:
        self.source = ""
        self.dead_letters: bool | None = None
        self._url = url
        self._visibility_s = visibility_s
        # A FIFO queue gives several messages of one group at once, and a group's first one that fails would cost those behind it
        # a receive each time, and them their place in the queue at last. One at a time, they stay where they are.
        self._most = 1 if url.endswith(".fifo") else MOST
        self._receiving = client(url, connections=pollers, read_timeout_s=wait_s + _CALL_S)
        # Tried again by the source, and sooner: boto3 would sleep for half a second with messages that are done and not deleted.
        self._calls = client(url, connections=8, read_timeout_s=max(2.0, min(_CALL_S, visibility_s / 3)), attempts=1)

    def open(self) -> None:
        """Find out its ARN and what it does with messages that fail. Raises QueueSourceError if it is not there."""
        region, partition = self._calls.meta.region_name, self._calls.meta.partition
        self.source = arn_of(self._url, region, partition)
        try:
            reply = self._calls.get_queue_attributes(QueueUrl=self._url, AttributeNames=["QueueArn", "RedrivePolicy"])
        except ClientError as error:
            code = _code(error)
            if code in _NO_QUEUE:
                raise QueueSourceError(f"QUEUE_SOURCE_URL={self._url!r}: there is no such queue ({code})") from error
            if code not in _DENIED:
                raise QueueUnavailable(f"{self._url}: {error}") from error
            log.warning("%s may not be asked for its attributes (sqs:GetQueueAttributes); taken as %s", self._url, self.source)
            return
        except (BotoCoreError, OSError) as error:
            raise QueueUnavailable(f"{self._url}: {error}") from error
        attributes: Mapping[Any, str] = reply.get("Attributes") or {}
        self.source = attributes.get("QueueArn", self.source)
        self.dead_letters = bool(attributes.get("RedrivePolicy"))

    def receive(self, limit: int, wait_s: int) -> list[Message]:
        """At most `limit` and ten, none after `wait_s` seconds."""
        arguments: dict[str, Any] = {"ReceiveRequestAttemptId": str(uuid.uuid4())} if self._most == 1 else {}
        reply = self._call(
            lambda: self._receiving.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=min(limit, self._most),
                VisibilityTimeout=self._visibility_s,
                WaitTimeSeconds=wait_s,
                MessageSystemAttributeNames=_SYSTEM,  # type: ignore[arg-type]
                MessageAttributeNames=["All"],
                **arguments,
            )
        )
        return [_message(found) for found in reply.get("Messages") or ()]

    def extend(self, messages: Sequence[Message]) -> Outcome:
        """Another visibility time, or what is left of the longest that SQS allows."""
        now = time.monotonic()
        return self.release([(message, min(self._visibility_s, self.longest_hold_s - (now - message.received))) for message in messages])

    def release(self, messages: Sequence[tuple[Message, float]]) -> Outcome:
        """Visible again after so many seconds, in whole ones."""
        entries: list[Any] = [
            {"Id": str(n), "ReceiptHandle": message.handle, "VisibilityTimeout": max(0, min(math.ceil(delay_s), int(LONGEST_HOLD_S)))}
            for n, (message, delay_s) in enumerate(messages)
        ]
        reply = self._call(lambda: self._calls.change_message_visibility_batch(QueueUrl=self._url, Entries=entries))
        return _outcome(reply, [message for message, _ in messages])

    def delete(self, messages: Sequence[Message]) -> Outcome:
        """At most ten at a time."""
        entries: list[Any] = [{"Id": str(n), "ReceiptHandle": message.handle} for n, message in enumerate(messages)]
        return _outcome(self._call(lambda: self._calls.delete_message_batch(QueueUrl=self._url, Entries=entries)), messages)

    def close(self) -> None:
        """Close the connections."""
        self._receiving.close()
        self._calls.close()

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (ClientError, BotoCoreError, OSError) as error:
            raise QueueUnavailable(f"{self._url}: {error}") from error


class SqsResults:
    """A queue that results are sent to."""

    def __init__(self, url: str, *, connections: int) -> None:
        self._url = url
        self._fifo = url.endswith(".fifo")
        self._client = client(url, connections=connections, read_timeout_s=_CALL_S)

    def open(self) -> None:
        """Nothing is asked: who may send need not be allowed to look."""

    def send(self, result: bytes, request: Message, key: str) -> None:
        """Into the request's group, and once within the five minutes for which SQS remembers, if it is a FIFO queue."""
        arguments: dict[str, Any] = {}
        if self._fifo:
            arguments = {"MessageGroupId": request.group or request.id, "MessageDeduplicationId": hashlib.sha256(key.encode()).hexdigest()}
        attributes = {name: request.attributes[name] for name in ("traceparent", "tracestate") if request.attributes.get(name)}
        if attributes:
            arguments["MessageAttributes"] = {name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()}
        try:
            self._client.send_message(QueueUrl=self._url, MessageBody=result.decode(), **arguments)
        except ClientError as error:
            if _code(error) in _TOO_LARGE:
                raise ResultRefused(f"the results queue does not take a result of {len(result)} bytes: {error}") from error
            raise QueueUnavailable(f"{self._url}: {error}") from error
        except (BotoCoreError, OSError) as error:
            raise QueueUnavailable(f"{self._url}: {error}") from error

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _message(found: Mapping[str, Any]) -> Message:
    system = found.get("Attributes", {})
    attributes: dict[str, str] = {}
    for name, said in found.get("MessageAttributes", {}).items():
        binary = said.get("BinaryValue")
        attributes[name] = base64.b64encode(binary).decode() if binary is not None else said.get("StringValue", "")
    if "AWSTraceHeader" in system and "traceparent" not in attributes and (trace := traceparent(system["AWSTraceHeader"])):
        attributes["traceparent"] = trace
    sent = system.get("SentTimestamp")
    return Message(
        key=found["MessageId"],
        id=found["MessageId"],
        body=found["Body"].encode(),
        receives=int(system.get("ApproximateReceiveCount", 1)),
        handle=found["ReceiptHandle"],
        attributes=attributes,
        sent=int(sent) / 1000 if sent else None,
        group=system.get("MessageGroupId"),
        sequence=system.get("SequenceNumber"),
    )


def _outcome(reply: Mapping[str, Any], messages: Sequence[Message]) -> Outcome:
    failed = reply.get("Failed") or ()
    if not failed:
        return Outcome()
    lost = [entry for entry in failed if entry.get("Code") in _GONE]
    return Outcome(
        again=[messages[int(entry["Id"])] for entry in failed if entry not in lost], gone=[messages[int(entry["Id"])] for entry in lost]
    )


def _code(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")
