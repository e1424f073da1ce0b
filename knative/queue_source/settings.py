"""What the queue source is told by its environment."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from weights_cache import environment
from weights_cache.environment import SettingsError, setting, told

_NAME = re.compile(r"[a-z0-9]+")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class QueueSourceSettings:
    """The `QUEUE_SOURCE_` variables, and what Knative tells a ContainerSource."""

    url: str = setting(
        "QUEUE_SOURCE_URL",
        text="the queue: an SQS queue's URL, or `amqp(s)://host/vhost/queue`, with user and password before the host",
    )
    sink: str = setting("K_SINK", text="the URL that events are posted to; Knative sets it")
    overrides: str = setting("K_CE_OVERRIDES", "", text='`{"extensions": {…}}` for every event; Knative sets it')
    ca_certs: str = setting("K_CA_CERTS", "", text="the sink's own certificate authorities, in PEM; Knative sets it")
    visibility_s: int = setting(
        "QUEUE_SOURCE_VISIBILITY_S", 30, minimum=3, maximum=43200, text="seconds that a message stays ours without a heartbeat"
    )
    concurrency: int = setting("QUEUE_SOURCE_CONCURRENCY", 10, minimum=1, maximum=1000, text="messages that are held at a time, at most")
    results_url: str | None = setting("QUEUE_SOURCE_RESULTS_URL", None, text="the queue that reply events are sent to")
    timeout_s: float = setting(
        "QUEUE_SOURCE_TIMEOUT_S", 600.0, minimum=0.1, maximum=43200, text="seconds for one post to the sink, its cold start counted in"
    )
    type: str = setting("QUEUE_SOURCE_TYPE", "dev.relight.queue.message", text="the events' type")
    unwrap: str = setting(
        "QUEUE_SOURCE_UNWRAP",
        "none",
        choices=("none", "s3", "sns", "sns,s3"),
        text="what messages are wrapped in: `sns` envelopes, `s3` event notifications, `sns,s3` both; `none`",
    )
    claim_buckets: str = setting(
        "QUEUE_SOURCE_CLAIM_BUCKETS", "", text="buckets, with commas, that `s3://` references are resolved from; none if empty"
    )
    claim_max_bytes: int = setting(
        "QUEUE_SOURCE_CLAIM_MAX_BYTES", 16 << 20, minimum=1, text="the largest object that is fetched for a message"
    )
    backoff_s: float = setting(
        "QUEUE_SOURCE_BACKOFF_S", 1.0, minimum=0, maximum=43200, text="seconds until a failed message comes back, doubled each time"
    )
    backoff_max_s: float = setting("QUEUE_SOURCE_BACKOFF_MAX_S", 300.0, minimum=0, maximum=43200, text="and at most so many")
    wait_s: int = setting("QUEUE_SOURCE_WAIT_S", 10, minimum=0, maximum=20, text="seconds of one long poll; a stop waits for its end")
    drain_s: float = setting(
        "QUEUE_SOURCE_DRAIN_S", 20.0, minimum=0, maximum=3600, text="seconds that running posts have after SIGTERM; the rest is given back"
    )
    host: str = setting("QUEUE_SOURCE_HOST", "0.0.0.0", text="the address it listens on")  # noqa: S104  a pod's own network
    port: int = setting(
        "QUEUE_SOURCE_PORT", 0, minimum=0, maximum=65535, text="the port of `/healthz`, `/readyz` and `/metrics`; 0 is none"
    )

    @property
    def buckets(self) -> frozenset[str]:
        """The buckets of claim checks."""
        return frozenset(filter(None, (name.strip() for name in self.claim_buckets.split(","))))

    @property
    def extensions(self) -> Mapping[str, str]:
        """What K_CE_OVERRIDES adds to each event. Raises SettingsError."""
        if not self.overrides:
            return {}
        try:
            found = json.loads(self.overrides).get("extensions") or {}
            extensions = {name: str(value) for name, value in found.items()}
        except (AttributeError, ValueError):
            raise SettingsError(f'K_CE_OVERRIDES={told(self.overrides)}: must be {{"extensions": {{"name": "value"}}}}') from None
        if bad := [name for name in extensions if not _NAME.fullmatch(name)]:
            raise SettingsError(
                f"K_CE_OVERRIDES={told(self.overrides)}: {told(bad[0])} is no extension's name: lower-case letters and digits only"
            )
        return extensions


def from_environment(environ: Mapping[str, str]) -> QueueSourceSettings:
    """The settings of the process. Raises SettingsError."""
    settings = environment.read(QueueSourceSettings, environ, prefix="QUEUE_SOURCE_")
    _check_url("K_SINK", settings.sink, ("http", "https"))
    _check_url("QUEUE_SOURCE_URL", settings.url, ("http", "https", "amqp", "amqps"))
    if settings.results_url:
        _check_url("QUEUE_SOURCE_RESULTS_URL", settings.results_url, ("http", "https", "amqp", "amqps"))
        if settings.results_url == settings.url:
            raise SettingsError("QUEUE_SOURCE_RESULTS_URL is QUEUE_SOURCE_URL: each result would be taken for a new message, for ever")
    if bad := sorted(name for name in settings.buckets if not _BUCKET.fullmatch(name)):
        raise SettingsError(f"QUEUE_SOURCE_CLAIM_BUCKETS={told(settings.claim_buckets)}: {told(bad[0])} is no bucket's name")
    if settings.backoff_max_s < settings.backoff_s:
        raise SettingsError(
            f"QUEUE_SOURCE_BACKOFF_MAX_S={settings.backoff_max_s:g}: must be at least QUEUE_SOURCE_BACKOFF_S ({settings.backoff_s:g})"
        )
    _ = settings.extensions
    return settings


def address(url: str) -> str:
    """Where a URL leads to, for the log: without its user, and without its query, which may be a key by another name."""
    scheme, _, rest = url.partition("://")
    where, query, _ = rest.rpartition("@")[2].partition("?")
    return f"{scheme}://{where}{'?…' if query else ''}"


def _told_url(url: str) -> str:
    """As an error repeats it; a password may have signs in it that end the host's part of a URL."""
    head, at, tail = url.rpartition("@")
    return told(f"{head.partition('://')[0]}://***@{tail}" if at and "://" in head else f"***@{tail}" if at else url)


def _check_url(name: str, url: str, schemes: tuple[str, ...]) -> None:
    """Raises SettingsError."""
    try:
        parts = urlsplit(url)
        fine = (
            url.isascii()
            and url.isprintable()
            and " " not in url
            and parts.scheme in schemes
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        fine = False
    if not fine or (name != "K_SINK" and len(parts.path) < 2):
        ways = " or ".join(f"{scheme}://" for scheme in schemes)
        wanted = f"a URL that begins with {ways}, with a host" + ("" if name == "K_SINK" else " and a queue's name")
        raise SettingsError(f"{name}={_told_url(url)}: must be {wanted}")
