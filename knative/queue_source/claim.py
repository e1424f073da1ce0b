"""Claim checks: a message refers to an object that is too large for a queue, and the source fetches it with its own credentials.

A reference is an attribute `dataref` (as CloudEvents calls it), a body that is nothing but `s3://bucket/key`, or what Amazon's extended
client libraries write.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError

from knative.queue_source.errors import ClaimUnavailable, Unacceptable

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_LONGEST = 2048  # bytes of a body that may be a reference
_POINTERS = ("software.amazon.payloadoffloading.PayloadS3Pointer", "com.amazon.sqs.javamessaging.MessageS3Pointer")
_NO_TYPES = ("", "binary/octet-stream", "application/octet-stream")  # what stores say when nobody told them
_FOR_GOOD = ("NoSuchKey", "NoSuchBucket", "InvalidObjectState", "404")


def reference(data: bytes, attributes: Mapping[str, str]) -> str | None:
    """The `s3://` URI that a message is about, if it is one."""
    if attributes.get("dataref", "").startswith("s3://"):
        return attributes["dataref"]
    if len(data) > _LONGEST:
        return None
    text = data.decode(errors="replace").strip()
    if text.startswith("s3://") and not any(sign in text for sign in "\r\n"):
        return text
    if text.startswith("[") and any(name in text for name in _POINTERS):
        try:
            name, pointer = json.loads(text)
            return f"s3://{pointer['s3BucketName']}/{pointer['s3Key']}" if name in _POINTERS else None
        except (ValueError, KeyError, TypeError):
            return None
    return None


class Claims:
    """Fetches objects from the buckets that are allowed."""

    def __init__(self, store: "S3Client", buckets: frozenset[str], max_bytes: int) -> None:
        self._store = store
        self._buckets = buckets
        self.max_bytes = max_bytes

    def fetch(self, uri: str) -> tuple[bytes, str | None]:
        """An object's bytes and media type, if the store knows it.

        Raises Unacceptable for a bucket that is not allowed and an object that is too large or not there, ClaimUnavailable otherwise.
        """
        parts = urlsplit(uri, allow_fragments=False)
        bucket, key = parts.netloc, parts.path.removeprefix("/") + (f"?{parts.query}" if parts.query else "")
        if bucket not in self._buckets or not key:
            raise Unacceptable(f"{uri}: the bucket is not one of QUEUE_SOURCE_CLAIM_BUCKETS ({', '.join(sorted(self._buckets))})")
        try:
            found: Any = self._store.get_object(Bucket=bucket, Key=key)
            with found["Body"] as body:
                size = found.get("ContentLength", 0)
                data = body.read(self.max_bytes + 1) if size <= self.max_bytes else b""
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            raise (Unacceptable if code in _FOR_GOOD else ClaimUnavailable)(f"{uri}: {error}") from error
        except (BotoCoreError, OSError) as error:
            raise ClaimUnavailable(f"{uri}: {error}") from error
        if max(size, len(data)) > self.max_bytes:
            raise Unacceptable(f"{uri}: {size} bytes; at most {self.max_bytes} (QUEUE_SOURCE_CLAIM_MAX_BYTES)")
        if len(data) != size:
            raise ClaimUnavailable(f"{uri}: {len(data)} of {size} bytes came")
        kind = found.get("ContentType", "")
        return data, None if kind in _NO_TYPES else kind
