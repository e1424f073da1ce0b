"""The way to object storage: one client for a process, which costs 15 MB, whatever is asked of it."""

import contextlib
import gc
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

RENEW_S = 10.0  # a younger client is not made anew


class Access:
    """A client of the object store, made when it is first needed. Safe to use from several threads.

    Endpoint, region and credentials come from the usual AWS variables and files. A client knows the credentials that there were when it was
    made (those of a role it renews by itself): when the store has refused them, the next one is made of what there is then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows; held while a client is made
        self._client: S3Client | None = None
        self._made_at = 0.0
        self._loader: Any = None  # what botocore has read in of its files
        self._authorities: Any = None
        self._tls: ssl.SSLContext | None = None

    def client(self) -> "S3Client":
        """The client. Raises what botocore raises if there can be none."""
        with self._lock:
            if self._client is None:
                self._client = self._make()
                self._made_at = time.monotonic()
            return self._client

    def renew(self, refused: "S3Client") -> None:
        """The store has refused this client: unless that is known already, or it is young, the next one to ask gets another."""
        with self._lock:
            if refused is self._client and time.monotonic() > self._made_at + RENEW_S:
                self._client = self._tls = None
                gc.collect()  # clients hold on to themselves

    def tls(self) -> ssl.SSLContext:
        """How a connection to an https address is checked."""
        with self._lock:
            if self._tls is None:
                self._tls = ssl.create_default_context(cafile=self._authorities())
            return self._tls

    def prepare(self) -> None:
        """Have the client at hand. What is wrong is told to who asks for something."""
        with contextlib.suppress(Exception):
            self.client()

    def _make(self) -> "S3Client":
        # Imported here: a sidecar answers its probes before this has been read in.
        import boto3
        import botocore.config
        import botocore.httpsession
        import botocore.session

        found = botocore.session.get_session()
        if self._loader:
            found.register_component("data_loader", self._loader)
        self._loader = found.get_component("data_loader")
        session = boto3.session.Session(botocore_session=found)
        # Where botocore itself looks for the authorities to trust: AWS_CA_BUNDLE, ca_bundle, its own.
        self._authorities = lambda: found.get_config_variable("ca_bundle") or botocore.httpsession.get_cert_path(True)
        return session.client(
            "s3",
            config=botocore.config.Config(
                signature_version="s3v4",  # also for the addresses we sign, where botocore would still choose the older one
                retries={"mode": "standard", "max_attempts": 4},
                connect_timeout=10,
                read_timeout=60,
                # Checksums only where an operation demands them: several S3 servers refuse the chunked uploads they bring along.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
