"""What keeps one WEIGHTS_URI present: a pull into the cache, or, where the cache can only be read, the node's agent asked for one.

Hosts give pods a read-only view of their directories, so in such a pod the sidecar cannot fill the cache: it talks to the agent, the
same program on the node, through a unix socket in the cache directory.
"""

import contextlib
import http.client
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from weights_cache.cache import Lease, NodeCache
from weights_cache.errors import CacheError, StoreError, StoreUnavailable, WeightsError
from weights_cache.excerpt import described
from weights_cache.settings import WeightsSettings
from weights_cache.uri import WeightsUri

if TYPE_CHECKING:
    from weights_cache.access import Access
    from weights_cache.fetch import Puller

SOCKET = "agent.sock"
ASK_S = 0.1  # how often the agent is asked how far it is
LONGEST_BUSY_S = 30.0  # until an agent that has no place for us is asked again
MAX_ANSWER_BYTES = 4 << 20

Settle = Callable[[], None]  # makes what was brought survive a power cut; takes as long as the disk does

log = logging.getLogger("relight.weights")


@dataclass(frozen=True)
class Pulled:
    """What one pull did, for the metrics. Bytes by where they came from; seconds since it began."""

    store_bytes: int = 0
    neighbour_bytes: int = 0
    cached_bytes: int = 0
    waited_s: float = 0.0
    evicted: int = 0
    damaged: int = 0
    seconds: float = 0.0
    failed: bool = False
    stale: bool = False  # the store was away, and the cache was used without it


class Keeper(Protocol):
    """Brings one URI's weights into the cache, once for each `pull`."""

    uri: str
    ready: bool  # a complete snapshot is there that a function may start on

    def begin(self) -> None:
        """A pull is about to start: `row` is to be about that one from now on."""

    def pull(self) -> Settle:
        """Bring what the store has now. Raises WeightsError; afterwards `row` tells, and the weights are leased."""

    def state(self) -> tuple[str, str | None]:
        """The phase, and what is wrong, from what is known: without looking."""

    def cancel(self) -> None:
        """Make `pull` end soon, in another thread."""

    def close(self) -> None:
        """Let go of the weights."""

    def row(self) -> dict[str, Any]:
        """Where it is, as an entry of `/v1/snapshots`."""


class Filler:
    """A keeper that fills the cache itself."""

    def __init__(
        self, settings: WeightsSettings, uri: str, report: Callable[[Pulled], object], access: "Access | None" = None, pulls: int = 0
    ) -> None:
        """report: is told what each pull did. pulls: that were begun by earlier keepers of this URI."""
        self.uri = uri
        self.ready = False
        self._pulls = pulls  # begun
        self._access = access
        self._settings = settings
        self._source = WeightsUri.parse(uri)
        self._cache = NodeCache(settings.cache_dir)
        self._report = report
        self._puller: Puller | None = None
        self._is_cancelled = False
        self._phase = "waiting"
        self._error: str | None = None
        self._began = time.monotonic()
        self._seconds: float | None = None

    def begin(self) -> None:
        """A pull is about to start: `row` is to be about that one from now on."""
        self._pulls += 1
        self._phase, self._began, self._seconds = "waiting", time.monotonic(), None
        if self._puller:
            self._puller.progress.checked = False

    def pull(self) -> Settle:
        """Bring what the store has now, or if it is out of reach take what the cache has. Raises WeightsError."""
        # Imported here: a sidecar answers its probes before all this has been read in.
        from weights_cache.fetch import Puller
        from weights_cache.store import Store

        puller, is_stale = None, False
        self._phase = "listing"
        try:
            self._cache.create()
            puller = Puller(Store(self._source, self._access), self._cache, self._settings, uri=self.uri)
            before, self._puller = self._puller, puller
            if self._is_cancelled:
                puller.cancel()
            try:
                is_stale = self._pull(puller)
            finally:
                if before:
                    before.close()  # only now, so that nobody evicts in between what is being used
        except Exception as error:
            self._phase, self._error = "failed", described(error)
            self._report(replace(self._pulled(puller), failed=True))
            raise
        self._report(replace(self._pulled(puller), stale=is_stale))
        return partial(self._settle, puller)

    def _pull(self, puller: "Puller") -> bool:
        """Whether the store was away, and the cache was used without it."""
        ref = self._cache.ref(self.uri)
        is_stale = False
        if self._settings.revalidate == "after" and ref and puller.use_cached(ref.snapshot):
            self.ready = True  # whatever the store says now is for those who come later
        self._phase = "fetching"
        try:
            puller.run()
        except StoreUnavailable as error:
            if not (ref and puller.use_cached(ref.snapshot)):
                raise
            puller.progress.checked = is_stale = True
            self._error = str(error)
            log.warning("%s; the complete snapshot in the cache is used", error)
        else:
            self._error = None
        progress = puller.progress
        self._seconds = time.monotonic() - self._began
        self._phase, self.ready = "complete", True
        log.info(
            "%s is complete: snapshot %s, %.1f MB, %.1f MB downloaded, %.2f s",
            self.uri,
            progress.snapshot,
            progress.total_bytes / 1e6,
            progress.downloaded_bytes / 1e6,
            self._seconds,
        )
        return is_stale

    def _pulled(self, puller: "Puller | None") -> Pulled:
        """What was done so far."""
        if not puller:
            return Pulled()
        progress = puller.progress
        return Pulled(
            progress.downloaded_bytes,
            max(0, progress.bytes_there() - progress.cached_bytes - progress.downloaded_bytes),
            progress.cached_bytes,
            progress.waited_s,
            progress.evicted,
            progress.damaged,
            time.monotonic() - self._began,
        )

    def _settle(self, puller: "Puller") -> None:
        try:
            puller.settle()  # if it fails, what is not there after a power cut is fetched again
        except OSError as error:
            log.warning("%s is not on the disk yet: %s", self.uri, error)

    def cancel(self) -> None:
        """Make `pull` end soon, in another thread, also one that begins later."""
        self._is_cancelled = True
        if self._puller:
            self._puller.cancel()

    def close(self) -> None:
        """Let go of the weights."""
        if self._puller:
            self._puller.close()

    def state(self) -> tuple[str, str | None]:
        """The phase, and what is wrong."""
        return self._phase, self._error

    def row(self) -> dict[str, Any]:
        """Where it is, as an entry of `/v1/snapshots`."""
        seconds = self._seconds if self._seconds is not None else time.monotonic() - self._began
        row: dict[str, Any] = {
            "uri": self.uri,
            "phase": self._phase,
            "error": self._error,
            "seconds": round(seconds, 3),
            "pulls": self._pulls,
            "checked": False,
            "snapshot": None,
        }
        if self._puller:
            progress = self._puller.progress
            row |= {
                "checked": progress.checked,
                "snapshot": progress.snapshot or None,
                "source": progress.source,
                "bytes": progress.bytes_there() if progress.snapshot else 0,
                "total_bytes": progress.total_bytes,
                "cached_bytes": progress.cached_bytes,
                "downloaded_bytes": progress.downloaded_bytes,
                "bytes_per_second": round(progress.downloaded_bytes / seconds) if seconds else 0,
            }
        return row


class Delegate:
    """A keeper that asks the node's agent, and itself only holds the lease."""

    def __init__(self, settings: WeightsSettings, uri: str, report: Callable[[Pulled], object]) -> None:
        """report: is told what each pull did."""
        self.uri = uri
        self.ready = False
        self._cache = NodeCache(settings.cache_dir)
        self._revalidate = settings.revalidate
        self._report = report
        self._lease: Lease | None = None
        self._stopped = threading.Event()
        self._row: dict[str, Any] = {"uri": uri, "phase": "listing", "error": None, "checked": False, "snapshot": None}

    def begin(self) -> None:
        """A pull is about to start; the agent says how it goes."""

    def pull(self) -> Settle:
        """Have the agent bring what the store has now; if there is none, take what the cache has. Raises WeightsError."""
        ref = self._cache.ref(self.uri)
        if self._revalidate == "after" and ref:
            self.ready = self._take(ref.snapshot)
        began = time.monotonic()
        pulled = Pulled(failed=True)
        try:
            row = self._await_agent()
            if row["phase"] == "failed":
                raise StoreError(row["error"] or "the node's agent does not say why it failed")
            if not self._take(row["snapshot"]):
                raise CacheError(f"snapshot {row['snapshot']} was evicted as soon as it was complete; is WEIGHTS_CACHE_BYTES too small?")
            self.ready = True
            cached, seconds = row.get("cached_bytes", 0), time.monotonic() - began  # not said by an agent of an earlier version
            pulled = Pulled(neighbour_bytes=row["total_bytes"] - cached, cached_bytes=cached, seconds=seconds, stale=bool(row["error"]))
        except WeightsError as error:
            self._row = self._row | {"phase": "complete" if self.ready else "failed", "error": str(error), "checked": self.ready}
            raise
        finally:
            self._report(pulled)
        return lambda: None  # the agent does that

    def _await_agent(self) -> dict[str, Any]:
        """Ask for a pull; the agent's row at its end. Raises WeightsError."""
        pulls = self._order()
        while (row := self._look())["pulls"] < pulls or row["phase"] not in ("complete", "failed"):
            if row["pulls"] < pulls:  # it is another agent, which started since, or it has forgotten what was done for long
                pulls = self._order()
            else:
                self._row = row
            self._pause(ASK_S)
        self._row = row
        return row

    def _order(self) -> int:
        """Ask for a pull until the agent has a place for it; which one it is of this URI's."""
        while True:
            try:
                return int(self._ask("POST", {"uri": self.uri})["pulls"])
            except _Busy as error:
                self._row = self._row | {"phase": "waiting", "error": str(error)}
                self._pause(error.after_s)

    def _look(self) -> dict[str, Any]:
        """How far it is."""
        return self._ask("GET")

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise StoreError("the pull was stopped")

    def _take(self, snapshot: str) -> bool:
        lease = self._cache.lease(snapshot)
        if not lease or not self._cache.is_complete(snapshot):
            return False
        self.close()
        self._lease = lease
        return True

    def _ask(self, method: str, order: dict[str, Any] | None = None) -> dict[str, Any]:
        """Our row in the agent's answer. Raises StoreError; _Busy if it is to be asked again later."""
        connection = _UnixConnection(self._cache.root / SOCKET)
        try:
            with contextlib.closing(connection):
                body = json.dumps(order) if order else None
                connection.request(method, f"/v1/snapshots?uri={quote(self.uri, safe='')}", body, {"Content-Type": "application/json"})
                reply = connection.getresponse()
                found = json.loads(reply.read(MAX_ANSWER_BYTES))
                if reply.status == 503:
                    raise _Busy(f"the node's agent: {found['error']['message']}", reply.getheader("Retry-After", ""))
                if reply.status != 200:
                    raise StoreError(f"the node's agent refused {self.uri}: {found['error']['message']}")
                # -1: it knows nothing of it. (One of an earlier version tells of all that it keeps.)
                row = next((row for row in found["snapshots"] if row["uri"] == self.uri), self._row | {"pulls": -1})
                return {"cached_bytes": 0, "total_bytes": 0, "error": None, **row}
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreUnavailable(
                f"{self._cache.root} can only be read here, and the node's agent does not answer in {SOCKET}: {error}; "
                "run `python -m weights_cache serve --agent` with this directory on the node"
            ) from error

    def cancel(self) -> None:
        """Make `pull` end soon, in another thread."""
        self._stopped.set()

    def close(self) -> None:
        """Let go of the weights."""
        if self._lease:
            self._lease.close()

    def state(self) -> tuple[str, str | None]:
        """The phase, and what is wrong."""
        row = self._row
        return row["phase"], row["error"]

    def row(self) -> dict[str, Any]:
        """What the agent says."""
        return self._row


def can_only_read(settings: WeightsSettings) -> bool:
    """Whether the cache is somebody else's to fill."""
    root = settings.cache_dir
    return root.is_dir() and not os.access(root, os.W_OK)


class _Busy(StoreUnavailable):
    """The agent has no place for us; ask again, `after_s` seconds later."""

    def __init__(self, message: str, retry_after: str) -> None:
        super().__init__(message)
        self.after_s = min(LONGEST_BUSY_S, float(retry_after)) if retry_after.isdecimal() and len(retry_after) < 9 else 1.0


class _UnixConnection(http.client.HTTPConnection):
    """HTTP through a socket in the file system."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
