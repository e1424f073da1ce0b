"""Object storage: the S3 calls we need, with errors that say which endpoint, bucket, key and identity they are about.

boto3 finds endpoint, region and credentials, lists, signs, and moves what is small. The bytes of weights are read by `transfer`, over
connections of its own, from addresses that are signed here.
"""

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weights_cache.access import Access
from weights_cache.cache import FileRef
from weights_cache.errors import ObjectChanged, StoreError, StoreUnavailable
from weights_cache.uri import WeightsUri

_BUSY = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests"}
_UPLOAD_PART_BYTES = 16 << 20  # also decides the ETag of a larger object, so it stays what it is
_SIGNED_FOR_S = 3600
_SIGN_AGAIN_S = 900
_ADDRESSES = 256  # that are known at a time: more files than are read at the same time
_OLD_CREDENTIALS = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired", "TokenRefreshRequired"}
MAX_FILES = 100_000  # below a prefix: more are no model, and each takes memory


class Store:
    """One prefix of a bucket."""

    def __init__(self, uri: WeightsUri, access: Access | None = None) -> None:
        """access: the process's; without one it has its own. Raises StoreError."""
        # Imported here: a sidecar answers its probes before this has been read in.
        import botocore.exceptions

        self.uri = uri
        self._exceptions = botocore.exceptions
        self._addresses: dict[str, tuple[float, str]] = {}
        self._access = access or Access()
        with self._errors("connect"):
            self._s3 = self._access.client()

    @property
    def namespace(self) -> str:
        """What the ETags of this prefix are compared within."""
        return f"{self.uri.bucket}/{self.uri.prefix}"

    def place(self, file: FileRef) -> str:
        """The object, for people to read."""
        return f"s3://{self.uri.bucket}/{self._key(file)}"

    def _key(self, file: FileRef) -> str:
        return f"{self.uri.prefix}/{file.path}"

    def list(self) -> list[FileRef]:
        """Every object below the prefix, in path order. Raises StoreError if there is none."""
        files: dict[str, FileRef] = {}
        with self._errors("list"):
            for page in self._pages():
                for item in page.get("Contents", []):
                    prefix, path = item["Key"][: len(self.uri.prefix) + 1], item["Key"][len(self.uri.prefix) + 1 :]
                    if prefix != self.uri.prefix + "/":
                        raise StoreError(f"asked for what is below {self.uri}/, {self._s3.meta.endpoint_url} lists {item['Key']!r}")
                    if path and not path.endswith("/"):  # what consoles leave behind for a "folder"
                        # A store without ETags tells its versions apart by their time; no request can be pinned to that.
                        files[path] = FileRef(path, item["Size"], item.get("ETag") or f"modified {item.get('LastModified')}")
                if len(files) > MAX_FILES:
                    raise StoreError(
                        f"more than {MAX_FILES:,} objects below s3://{self.uri.bucket}/{self.uri.prefix}/; is the prefix right?"
                    )
        if not files:
            raise StoreError(
                f"no objects below s3://{self.uri.bucket}/{self.uri.prefix}/ at {self._s3.meta.endpoint_url}; is the prefix right?"
            )
        return sorted(files.values(), key=lambda file: file.path)

    def _pages(self) -> Iterator[Any]:
        """The answers to a listing. boto3's paginator first looks through all services' files, longer than the list takes."""
        token: dict[str, Any] = {}
        while True:
            page = self._s3.list_objects_v2(Bucket=self.uri.bucket, Prefix=self.uri.prefix + "/", **token)
            yield page
            if not page.get("IsTruncated"):
                return
            following = page.get("NextContinuationToken")
            if not following or following == token.get("ContinuationToken"):
                raise StoreError(f"{self._s3.meta.endpoint_url} says that {self.uri}/ has more objects, and does not say how to go on")
            token = {"ContinuationToken": following}

    def read(self, file: FileRef) -> bytes:
        """A small object as a whole, in the version that was listed. Raises ObjectChanged if it is another one by now."""
        with self._errors("read", self._key(file)):
            reply = self._s3.get_object(Bucket=self.uri.bucket, Key=self._key(file), **_pinned(file))
            with reply["Body"] as body:
                data: bytes = body.read(file.size + 1)
                if len(data) > file.size:
                    raise ObjectChanged(f"{self.place(file)} changed while being read: it is longer than was listed")
                if len(data) < file.size:
                    raise StoreUnavailable(f"{self.place(file)}: the reply ended {file.size - len(data)} bytes early")
                return data

    @contextmanager
    def stream(self, file: FileRef) -> Iterator["Stream"]:
        """An object as a whole, read as it comes; for the time of the `with` the errors are ours."""
        with self._errors("read", self._key(file)):
            reply = self._s3.get_object(Bucket=self.uri.bucket, Key=self._key(file), **_pinned(file))
            with reply["Body"] as body:
                yield Stream(reply.get("ETag", ""), body)

    def checksums(self, file: FileRef) -> dict[str, str]:
        """The checksums that the store has of the whole object, base64 by the names of S3's headers (`ChecksumCRC64NVME`, …)."""
        with self._errors("read", self._key(file)):
            reply = self._s3.head_object(Bucket=self.uri.bucket, Key=self._key(file), ChecksumMode="ENABLED", **_pinned(file))
        if reply.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
            return {}
        return {name: str(value) for name, value in reply.items() if name.startswith("Checksum") and name != "ChecksumType"}

    def address(self, file: FileRef, *, afresh: bool = False) -> str:
        """A URL that the object can be read from for a while, without credentials. It is as secret as they are."""
        signed_at, address = self._addresses.get(file.path, (0.0, ""))
        if afresh or not address or time.monotonic() > signed_at + _SIGN_AGAIN_S:
            with self._errors("read", self._key(file)):
                address = self._s3.generate_presigned_url(
                    "get_object", Params={"Bucket": self.uri.bucket, "Key": self._key(file)}, ExpiresIn=_SIGNED_FOR_S
                )
            while len(self._addresses) >= _ADDRESSES:
                self._addresses.pop(next(iter(self._addresses)), None)
            self._addresses[file.path] = time.monotonic(), address
        return address

    def tls(self) -> ssl.SSLContext:
        """How a connection to an https address is checked."""
        return self._access.tls()

    def refusal(self, file: FileRef, status: int, code: str) -> StoreError:
        """The error for a reading of the object that was answered with an HTTP status and perhaps an S3 error code."""
        if status in (401, 403) or code in _OLD_CREDENTIALS:
            self._renew()
        return _refused(status, code, "", "read", self.place(file), self._s3.meta.endpoint_url, self._identity())

    def upload(self, source: Path, path: str, progress: Callable[[int], object]) -> None:
        """Put a local file at `path` below the prefix; `progress` is called with the number of bytes just sent."""
        from boto3.s3.transfer import ProgressCallbackInvoker, TransferConfig, create_transfer_manager

        key = f"{self.uri.prefix}/{path}"
        config = TransferConfig(
            multipart_threshold=_UPLOAD_PART_BYTES,
            multipart_chunksize=_UPLOAD_PART_BYTES,
            max_concurrency=4,
            preferred_transfer_client="classic",  # the other one does not do endpoints of one's own
        )
        # What `upload_file` is made of: that would put a refusal into an error of its own, which at times forgets what it was made from.
        with self._errors("write", key), create_transfer_manager(self._s3, config) as manager:
            manager.upload(str(source), self.uri.bucket, key, subscribers=[ProgressCallbackInvoker(progress)]).result()

    def write(self, path: str, data: bytes) -> None:
        """Put a small object at `path` below the prefix."""
        with self._errors("write", f"{self.uri.prefix}/{path}"):
            self._s3.put_object(Bucket=self.uri.bucket, Key=f"{self.uri.prefix}/{path}", Body=data)

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

        def refused(error: Any) -> StoreError:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if status in (401, 403) or code in _OLD_CREDENTIALS:
                self._renew()
            return _refused(status, code, f": {error}", what, place, endpoint, self._identity())

        try:
            yield
        except known.ClientError as error:
            raise refused(error) from error
        except known.NoCredentialsError as error:
            self._renew()
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE of ~/.aws, or give the pod a role"
            raise StoreError(f"cannot {what} {place} at {endpoint}: no credentials; {remedy}") from error
        except (known.HTTPClientError, known.ConnectionError, known.IncompleteReadError, OSError) as error:
            raise StoreUnavailable(f"cannot {what} {place} at {endpoint}: {error}") from error
        except (known.BotoCoreError, ValueError) as error:  # ValueError: the endpoint is no URL
            self._renew()
            raise StoreError(f"cannot {what} {place} at {endpoint}: {' '.join(str(error).split())}") from error
        except Exception as error:
            # Reads of a body leak urllib3's errors; they belong to this call alone.
            if type(error).__module__.startswith(("urllib3", "http.", "boto3", "s3transfer")):
                raise StoreUnavailable(f"cannot {what} {place} at {endpoint}: {error}") from error
            raise

    def _renew(self) -> None:
        """Have the next pull look for credentials anew."""
        if hasattr(self, "_s3"):
            self._access.renew(self._s3)

    def _identity(self) -> str:
        credentials = self._s3._request_signer._credentials  # type: ignore[attr-defined]  # noqa: SLF001  boto3 has no public way
        return f"access key {credentials.access_key}" if credentials else "no credentials"


class Stream:
    """The body of a reply. etag: of the version it is of, empty if the store does not say."""

    def __init__(self, etag: str, body: Any) -> None:
        self.etag = etag
        self._body = body

    def readinto(self, buffer: memoryview) -> None:
        """Fill the whole buffer. Raises OSError if the body ends before."""
        have = 0
        while have < len(buffer):
            piece = self._body.read(len(buffer) - have)
            if not piece:
                raise ConnectionResetError(f"the reply ended {len(buffer) - have} bytes early")
            buffer[have : have + len(piece)] = piece
            have += len(piece)

    def is_over(self) -> bool:
        """Whether nothing comes any more."""
        return not self._body.read(1)


def is_pinnable(file: FileRef) -> bool:
    """Whether a request can be made for just this version: its ETag is a strong one."""
    return not file.etag.startswith(("W/", "modified "))


def _pinned(file: FileRef) -> dict[str, Any]:
    return {"IfMatch": file.etag} if is_pinnable(file) else {}


def _refused(status: int, code: str, detail: str, what: str, place: str, endpoint: str, identity: str) -> StoreError:
    if code in ("PreconditionFailed", "412") or status == 412:
        return ObjectChanged(f"{place} changed while being read")
    if code == "NoSuchBucket":
        return StoreError(f"cannot {what} {place} at {endpoint}: there is no such bucket")
    if status == 404 and what == "read":
        return ObjectChanged(f"{place} changed while being read: it is gone")
    if status == 416:
        return ObjectChanged(f"{place} changed while being read: it is shorter than was listed")
    if status in (401, 403):
        return StoreError(f"cannot {what} {place} at {endpoint}: refused for {identity} ({code or status})")
    if status >= 500 or status in (408, 429) or code in _BUSY:
        return StoreUnavailable(f"cannot {what} {place} at {endpoint}: the store answered {status} {code}")
    if 300 <= status < 400:
        return StoreError(f"cannot {what} {place} at {endpoint}: the store answers {status}, it is elsewhere; is AWS_REGION the bucket's?")
    return StoreError(f"cannot {what} {place} at {endpoint}: the store answered {status} {code}{detail}")
