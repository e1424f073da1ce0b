"""What the sidecar, and the reader inside the function, are told by their environment."""

from dataclasses import dataclass
from pathlib import Path

from weights_cache.environment import setting


@dataclass(frozen=True)
class WeightsSettings:
    """The `WEIGHTS_` variables; a pod sets the same values for both of its containers."""

    uri: str | None = setting("WEIGHTS_URI", None, text="`s3://bucket/prefix` of the model; `#<snapshot>` at its end pins one version")
    cache_dir: Path = setting("WEIGHTS_CACHE_DIR", Path("/var/cache/relight"), text="the cache directory that both containers share")
    host: str = setting("WEIGHTS_HOST", "0.0.0.0", text="the address the sidecar listens on")  # noqa: S104  a pod's own network
    port: int = setting("WEIGHTS_PORT", 8090, minimum=1, maximum=65535, text="the sidecar's port: health, metrics, progress")
    revalidate: str = setting(
        "WEIGHTS_REVALIDATE",
        "after",
        choices=("after", "before"),
        text="`after`: start at once on complete weights, the store is asked meanwhile; `before`: ask first",
    )
    cache_bytes: int | None = setting(
        "WEIGHTS_CACHE_BYTES",
        None,
        minimum=0,
        text="the most bytes the cache may hold; what was used least lately goes",
    )
    resident: bool = setting(
        "WEIGHTS_RESIDENT",
        False,
        text="for a function on a GPU: leave the weights there for the next one, which attaches them; the model must not write to them",
    )
    resident_bytes: int = setting(
        "WEIGHTS_RESIDENT_BYTES", 0, minimum=0, text="for the agent: the most bytes of each GPU that weights may stay in; 0: none stay"
    )
    connections: int = setting("WEIGHTS_CONNECTIONS", 16, minimum=1, maximum=64, text="the most ranges fetched at the same time")
    part_bytes: int = setting(
        "WEIGHTS_PART_BYTES", 16 << 20, minimum=1 << 20, maximum=1 << 30, text="bytes of one range request (rounded up to whole MiB)"
    )
    prefetch: str | None = setting("WEIGHTS_PREFETCH", None, text="for the agent: `name=s3://bucket/prefix …`, brought before anybody asks")
    node: str | None = setting("WEIGHTS_NODE", None, text="for the agent: the node that gets the label `weights.relight/name` then")
    bytes_per_second: int = setting("WEIGHTS_BYTES_PER_SECOND", 0, minimum=0, text="the most that is fetched per second; 0 is no bound")
