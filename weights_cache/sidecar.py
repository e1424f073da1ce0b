"""The sidecar: keeps one WEIGHTS_URI present in the node's cache, and tells how far it is. The agent: the same for all pods of a node.

The sidecar answers its probes before boto3 is imported, starts the pull at once, tries again for as long as it lives, and never has to
be there for a function that already serves. The agent pulls what it is asked for through a unix socket in the cache directory, for
sidecars that can only read it (see `keeper`).
"""

import contextlib
import json
import logging
import os
import random
import signal
import socket
import socketserver
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from weights_cache import prefetch, resident
from weights_cache.cache import NodeCache
from weights_cache.environment import SettingsError
from weights_cache.errors import WeightsError
from weights_cache.keeper import SOCKET, Keeper, Pulled, Settle, make_keeper
from weights_cache.settings import WeightsSettings
from weights_cache.uri import WeightsUri

log = logging.getLogger("relight.weights")

MAX_REQUEST_BYTES = 64 * 1024
TELL_S = 5.0


class Sidecar:
    """The state behind the HTTP routes: a keeper for each URI that was asked for."""

    def __init__(self, settings: WeightsSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()  # guards what follows
        self._keepers: dict[str, Keeper] = {}
        self._pulling: set[str] = set()  # each by one thread
        self._stop = threading.Event()
        self._prefetched = prefetch.parse(settings.prefetch)
        self._kept = {*self._prefetched.values(), *filter(None, [settings.uri])}  # whoever asks for them, and whoever does not
        for uri in self._kept:
            self._keeper(uri)
        self._metrics: Any = None
        self.residents = resident.Residents(settings.resident_bytes)

    def keep_present(self, uri: str) -> None:
        """Pull until it succeeds, with growing pauses between the tries."""
        with self._lock:
            self._pulling.add(uri)  # whoever asks for the same is served by this
        for pause_s in backoff(1, 30):
            settle = self._pull(uri, pause_s)
            if settle or self._stop.wait(pause_s):
                break
        self._finish(uri, settle)

    def bring_ahead(self) -> None:
        """Bring what WEIGHTS_PREFETCH names, one after the other, and label the node with what is there."""
        labels = prefetch.NodeLabels(self._settings.node) if self._settings.node else None
        self._label(labels, dict.fromkeys(self._prefetched))
        for name, uri in self._prefetched.items():
            self.keep_present(uri)
            if self._stop.is_set():
                return
            with self._lock:
                snapshot = self._keepers[uri].row()["snapshot"]
            self._label(labels, {name: snapshot})

    def _label(self, labels: prefetch.NodeLabels | None, snapshots: Mapping[str, str | None]) -> None:
        """Until it works: without the label a Service would look for its weights elsewhere for good."""
        for pause_s in backoff(1, 60):
            if not labels or not snapshots or labels.set(snapshots) or self._stop.wait(pause_s):
                return

    def tell(self) -> None:
        """A line in the log every few seconds while weights come, for whoever has nothing but the log to look at."""
        while not self._stop.wait(TELL_S):
            for row in self.rows():
                if row["phase"] == "fetching" and row.get("total_bytes"):
                    log.info("%s: %.1f of %.1f MB", row["uri"], row["bytes"] / 1e6, row["total_bytes"] / 1e6)

    def ask(self, uri: str) -> None:
        """See that what the store has now is, or is going to be, in the cache; what it takes happens in another thread."""
        WeightsUri.parse(uri)
        with self._lock:
            if uri in self._pulling:
                return
            self._pulling.add(uri)
            self._keeper(uri).begin()  # before the answer, which is to be about this pull
        threading.Thread(target=self._pull_for_others, args=(uri,), name="pull", daemon=True).start()

    def _pull_for_others(self, uri: str) -> None:
        self._finish(uri, self._pull(uri))
        with self._lock:
            if uri not in self._pulling and uri not in self._kept:
                self._keepers[uri].close()  # whoever asked has a lease of its own

    def _pull(self, uri: str, pause_s: float = 0.0) -> Settle | None:
        """One try; returns what is left to do, or None if it has to be repeated."""
        with self._lock:
            keeper = self._keeper(uri)
            if pause_s:
                keeper.begin()
        try:
            settle = keeper.pull()
        except WeightsError as error:
            log.error("%s%s", error, f"; next try in {pause_s:.0f} s" if pause_s else "")
            return None
        except Exception:
            log.exception("the pull of %s failed unexpectedly", uri)
            return None
        return settle if keeper.row()["error"] is None else None  # else it is the cache's, and the store is asked again later

    def _finish(self, uri: str, settle: Settle | None) -> None:
        with self._lock:
            self._pulling.discard(uri)  # first: an order that comes while the disk is slow is about what the store has by then
        if settle:
            settle()

    def _keeper(self, uri: str) -> Keeper:
        if uri not in self._keepers:
            self._keepers[uri] = make_keeper(self._settings, uri, self._count)
        return self._keepers[uri]

    def stop(self) -> None:
        """End every pull soon, and let the weights go."""
        self._stop.set()
        for keeper in self.keepers():
            keeper.cancel()

    def close(self) -> None:
        """Let the weights go; no pull is running any more."""
        for keeper in self.keepers():
            keeper.close()
        self.residents.close()

    def keepers(self) -> list[Keeper]:
        """All of them, in the order they were asked for."""
        with self._lock:
            return list(self._keepers.values())

    def ready(self) -> bool:
        """Whether the weights of WEIGHTS_URI are there; what else was asked for is the business of those who did."""
        return all(keeper.ready for keeper in self.keepers() if keeper.uri == self._settings.uri)

    def row(self) -> dict[str, Any]:
        """How far the weights of WEIGHTS_URI are."""
        rows = [keeper.row() for keeper in self.keepers() if keeper.uri == self._settings.uri]
        return rows[0] if rows else {"phase": "idle", "error": None}

    def rows(self) -> list[dict[str, Any]]:
        """How far everything is."""
        return [keeper.row() for keeper in self.keepers()]

    def _count(self, pulled: Pulled) -> None:
        self.metrics().count(pulled)

    def metrics(self) -> Any:
        """What has been counted."""
        from weights_cache.metrics import Metrics

        with self._lock:
            self._metrics = self._metrics or Metrics(self.keepers, self.residents)
        return self._metrics


def backoff(first_s: float, limit_s: float) -> Iterator[float]:
    """Seconds to wait before each next try: doubling from `first_s` to `limit_s`, spread by a quarter so that pods do not march in step."""
    wait_s = first_s
    while True:
        yield wait_s * random.uniform(0.75, 1.25)
        wait_s = min(limit_s, wait_s * 2)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    sidecar: Sidecar
    takes_orders = False  # only who can open the socket in the cache directory may have something fetched

    def do_GET(self) -> None:
        route = self.path.split("?")[0]
        if route == "/healthz":
            self._answer(200, {"status": "ok"})
        elif route == "/readyz":
            row = self.sidecar.row()
            self._answer(200 if self.sidecar.ready() else 503, {"phase": row["phase"], "error": row["error"]})
        elif route == "/v1/snapshots":
            self._answer(200, {"snapshots": self.sidecar.rows()})
        elif route == "/v1/residents":
            self._answer(200, {"residents": self.sidecar.residents.rows()})
        elif route == "/metrics":
            self._send(200, "text/plain; version=0.0.4; charset=utf-8", self.sidecar.metrics().text())
        else:
            self._refuse(404, "not_found", f"no route {route}; there are /healthz, /readyz, /v1/snapshots, /v1/residents, /metrics")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_REQUEST_BYTES:
            self.close_connection = True
            self._refuse(
                413 if length.isdigit() else 411, "bad_request", f"a body of at most {MAX_REQUEST_BYTES} bytes is needed, with its length"
            )
            return
        body = self.rfile.read(int(length))
        if not self.takes_orders or self.path != "/v1/snapshots":
            self._refuse(405, "method_not_allowed", f"{self.path} takes no POST here; pulls are asked for through {SOCKET}")
            return
        try:
            uri = json.loads(body)["uri"]
            self.sidecar.ask(uri)
        except (SettingsError, ValueError, KeyError, TypeError, RecursionError) as error:
            self._refuse(400, "bad_request", f'the body must be {{"uri": "s3://bucket/prefix"}}: {error}')
            return
        self._answer(200, {"snapshots": self.sidecar.rows()})

    def _refuse(self, status: int, kind: str, message: str) -> None:
        self._answer(status, {"error": {"type": kind, "message": message}})

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(document).encode())

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        """Probes come every second; a line for each would bury what matters."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True


class _UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextlib.contextmanager
def _listening_at(
    path: Path, handler: type[socketserver.BaseRequestHandler], kind: type[socketserver.UnixStreamServer] = _UnixServer
) -> Iterator[None]:
    """Serve through a unix socket. Raises WeightsError if another agent does already."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, kind.socket_type)) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)  # of one that was killed
        else:
            raise WeightsError(f"another agent is answering at {path}")
    try:
        server = kind(str(path), handler)
    except OSError as error:
        raise WeightsError(f"cannot listen at {path}: {error}; such a path may have 107 bytes") from error
    path.chmod(0o666)  # any user of a pod that mounts the directory may ask
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    serving.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        path.unlink(missing_ok=True)


def serve(settings: WeightsSettings, *, agent: bool = False) -> int:
    """Run the sidecar, or the agent, until SIGTERM or SIGINT; returns the exit status.

    Raises SettingsError, CacheError or OSError before it starts.
    """
    if not settings.uri and not agent:
        raise WeightsError("WEIGHTS_URI is not set: the sidecar needs to know which weights to keep present")
    if settings.uri:
        WeightsUri.parse(settings.uri)
    sidecar = Sidecar(settings)
    handler = type("Handler", (_Handler,), {"sidecar": sidecar})
    with contextlib.ExitStack() as listening:
        server = listening.enter_context(_Server((settings.host, settings.port), handler))
        if agent:
            NodeCache(settings.cache_dir).create()
            listening.enter_context(_listening_at(settings.cache_dir / SOCKET, type("Handler", (handler,), {"takes_orders": True})))
        if agent and settings.resident_bytes:
            answers = type("Handler", (resident.Handler,), {"residents": sidecar.residents})
            listening.enter_context(_listening_at(settings.cache_dir / resident.SOCKET, answers, resident.Server))

        def on_signal(number: int, frame: object) -> None:
            # shutdown() waits for the loop that this handler interrupts, so it needs a thread of its own.
            threading.Thread(target=server.shutdown, daemon=True).start()

        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)
        log.info(
            "keeping %s in %s; listening on %s:%d", settings.uri or "what is asked for", settings.cache_dir, settings.host, settings.port
        )
        pulling = threading.Thread(target=sidecar.keep_present, args=(settings.uri,), name="pull", daemon=True)
        if settings.uri:
            pulling.start()
        threading.Thread(target=sidecar.tell, name="tell", daemon=True).start()
        if agent:
            threading.Thread(target=sidecar.bring_ahead, name="prefetch", daemon=True).start()
        server.serve_forever(poll_interval=0.1)
    sidecar.stop()
    if settings.uri:
        pulling.join(2)
    if settings.uri and pulling.is_alive():
        # It is in the middle of a call to a store that stalls. Nothing interrupts that, and the interpreter would wait for it;
        # what is in the cache by now stays there for the next sidecar.
        os._exit(0)
    sidecar.close()
    return 0
