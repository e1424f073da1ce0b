"""Object storage: the S3 calls we need, with errors that say which endpoint, bucket, key and identity they are about."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_cache.cache import FileRef
from weights_cache.errors import ObjectChanged, StoreError, StoreUnavailable
from weights_cache.uri import WeightsUri

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_BUSY = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests"}
_READ_BYTES = 1 << 20
_UPLOAD_PART_BYTES = 16 << 20  # also decides the ETag of a larger object, so it stays what it is


class Store:
    """One prefix of a bucket. Credentials, region and endpoint come from the usual AWS variables and files."""

    def __init__(self, uri: WeightsUri, *, connections: int = 4) -> None:
        # Imported here: a sidecar answers its probes before this has been read in.
        import boto3
        import botocore.config
        import botocore.exceptions

        self.uri = uri
        self._exceptions = botocore.exceptions
        with self._errors("connect"):
            self._s3: S3Client = boto3.session.Session().client(
                "s3",
                config=botocore.config.Config(
                    max_pool_connections=connections,
                    retries={"mode": "standard", "max_attempts": 4},
                    connect_timeout=10,
                    read_timeout=60,
                    # Checksums only where an operation demands them: several S3 servers refuse the chunked uploads they bring along.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )

    @property
    def namespace(self) -> str:
        """What the ETags of this prefix are compared within."""
        return f"{self.uri.bucket}/{self.uri.prefix}"

    def list(self) -> list[FileRef]:
        """Every object below the prefix, in path order. Raises StoreError if there is none."""
        files = []
        with self._errors("list"):
            for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.uri.bucket, Prefix=self.uri.prefix + "/"):
                for item in page.get("Contents", []):
                    path = item["Key"][len(self.uri.prefix) + 1 :]
                    if path and not path.endswith("/"):  # what consoles leave behind for a "folder"
                        files.append(FileRef(path, item["Size"], item["ETag"]))
        if not files:
            raise StoreError(
                f"no objects below s3://{self.uri.bucket}/{self.uri.prefix}/ at {self._s3.meta.endpoint_url}; is the prefix right?"
            )
        return sorted(files, key=lambda file: file.path)

    def read(self, file: FileRef, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) of one version of an object, in pieces of 1 MiB (the last may be shorter).

        Raises ObjectChanged if the object is no longer that version, StoreUnavailable if the reply was cut short.
        """
        key = f"{self.uri.prefix}/{file.path}"
        with self._errors("read", key):
            reply = self._s3.get_object(Bucket=self.uri.bucket, Key=key, Range=f"bytes={start}-{stop - 1}", IfMatch=file.etag)
            with reply["Body"] as body:
                expected = f"bytes {start}-{stop - 1}/{file.size}"
                if reply["ETag"] != file.etag:
                    raise ObjectChanged(
                        f"s3://{self.uri.bucket}/{key} changed while being read: version {reply['ETag']}, listed {file.etag}"
                    )
                if reply.get("ContentRange") != expected:
                    raise StoreError(f"s3://{self.uri.bucket}/{key}: asked for {expected!r}, the store sent {reply.get('ContentRange')!r}")
                at = start
                while at < stop:
                    piece = body.read(min(_READ_BYTES, stop - at))
                    if len(piece) < min(_READ_BYTES, stop - at):
                        raise StoreUnavailable(
                            f"s3://{self.uri.bucket}/{key}: the reply ended after {at + len(piece) - start} of {stop - start} bytes"
                        )
                    at += len(piece)
                    yield piece

    def upload(self, source: Path, path: str, progress: Callable[[int], object]) -> None:
        """Put a local file at `path` below the prefix; `progress` is called with the number of bytes just sent."""
        from boto3.s3.transfer import TransferConfig

        key = f"{self.uri.prefix}/{path}"
        config = TransferConfig(multipart_threshold=_UPLOAD_PART_BYTES, multipart_chunksize=_UPLOAD_PART_BYTES, max_concurrency=4)
        with self._errors("write", key):
            self._s3.upload_file(str(source), self.uri.bucket, key, Config=config, Callback=progress)

    def ensure_bucket(self) -> None:
        """Create the bucket unless it is there."""
        with self._errors("create the bucket"):
            try:
                self._s3.head_bucket(Bucket=self.uri.bucket)
            except self._exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                    raise
                self._s3.create_bucket(Bucket=self.uri.bucket)

    @contextmanager
    def _errors(self, what: str, key: str | None = None) -> Iterator[None]:
        """Turn what botocore raises into our errors."""
        place = f"s3://{self.uri.bucket}/{key or self.uri.prefix}"
        endpoint = self._s3.meta.endpoint_url if hasattr(self, "_s3") else "the endpoint"
        known = self._exceptions
        try:
            yield
        except known.ClientError as error:
            raise _refused(error, what, place, endpoint, self._identity()) from error
        except known.NoCredentialsError as error:
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod a role"
            raise StoreError(f"cannot {what} {place} at {endpoint}: no credentials; {remedy}") from error
        except (known.HTTPClientError, known.ConnectionError, known.IncompleteReadError, OSError) as error:
            raise StoreUnavailable(f"cannot {what} {place} at {endpoint}: {error}") from error
        except (known.BotoCoreError, ValueError) as error:  # ValueError: the endpoint is no URL
            raise StoreError(f"cannot {what} {place} at {endpoint}: {' '.join(str(error).split())}") from error
        except Exception as error:
            # upload_file wraps the refusal, and reads of a body leak urllib3's errors; both belong to this call alone.
            if isinstance(cause := error.__context__, known.ClientError):
                raise _refused(cause, what, place, endpoint, self._identity()) from error
            if type(error).__module__.startswith(("urllib3", "http.", "boto3", "s3transfer")):
                raise StoreUnavailable(f"cannot {what} {place} at {endpoint}: {error}") from error
            raise

    def _identity(self) -> str:
        credentials = self._s3._request_signer._credentials  # type: ignore[attr-defined]  # noqa: SLF001  boto3 has no public way
        return f"access key {credentials.access_key}" if credentials else "no credentials"


def _refused(error: Any, what: str, place: str, endpoint: str, identity: str) -> StoreError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in ("PreconditionFailed", "412") or status == 412:
        return ObjectChanged(f"{place} changed while being read")
    if code in ("NoSuchKey", "404") and what == "read":
        return ObjectChanged(f"{place} changed while being read: it is gone")
    if code == "NoSuchBucket":
        return StoreError(f"cannot {what} {place} at {endpoint}: there is no such bucket")
    if status in (401, 403):
        return StoreError(f"cannot {what} {place} at {endpoint}: refused for {identity} ({code})")
    if status >= 500 or status == 429 or code in _BUSY:
        return StoreUnavailable(f"cannot {what} {place} at {endpoint}: the store answered {status} {code}")
    return StoreError(f"cannot {what} {place} at {endpoint}: the store answered {status} {code}: {error}")
