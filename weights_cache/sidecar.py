"""The sidecar: keeps one WEIGHTS_URI present in the node's cache, and tells how far it is.

It answers its probes before boto3 is imported, starts the pull at once, tries again for as long as it lives, and never has to be
there for a function that already serves.
"""

import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from weights_cache.cache import NodeCache
from weights_cache.errors import StoreUnavailable, WeightsError
from weights_cache.fetch import Puller
from weights_cache.settings import WeightsSettings
from weights_cache.store import Store
from weights_cache.uri import WeightsUri

log = logging.getLogger("relight.weights")


class Sidecar:
    """The state behind the sidecar's HTTP routes; `keep_present` runs in a thread of its own until `stop`."""

    def __init__(self, settings: WeightsSettings, uri: WeightsUri) -> None:
        self.settings = settings
        self.cache = NodeCache(settings.cache_dir)
        self.ready = False
        self._uri = uri
        self._phase = "listing"
        self._error: str | None = None
        self._puller: Puller | None = None
        self._began = time.monotonic()
        self._seconds: float | None = None
        self._stop = threading.Event()

    def keep_present(self) -> None:
        """Pull until it succeeds, with growing pauses between the tries."""
        for pause_s in backoff(1, 30):
            try:
                self._pull()
            except WeightsError as error:
                self._phase, self._error = "failed", str(error)
                if self._use_cached(error):
                    self._phase, self.ready = "complete", True
                    log.warning("%s; the complete snapshot in the cache is used", error)
                else:
                    log.error("%s; next try in %.0f s", error, pause_s)
            except Exception as error:
                self._phase, self._error = "failed", repr(error)
                log.exception("the pull failed unexpectedly")
            else:
                return
            if self._stop.wait(pause_s):
                return

    def stop(self) -> None:
        """End `keep_present` soon."""
        self._stop.set()
        if self._puller:
            self._puller.cancel()

    def _pull(self) -> None:
        self.cache.create()
        settings, text = self.settings, str(self.settings.uri)
        store = Store(self._uri, connections=settings.connections)
        self._puller = Puller(store, self.cache, uri=text, connections=settings.connections, part_bytes=settings.part_bytes)
        self._phase = "fetching"
        self._puller.run()
        self._seconds = time.monotonic() - self._began
        self._phase, self._error, self.ready = "complete", None, True
        progress = self._puller.progress
        log.info(
            "%s is complete: snapshot %s, %.1f MB, %.1f MB downloaded, %.2f s",
            text,
            progress.snapshot,
            progress.total_bytes / 1e6,
            progress.downloaded_bytes / 1e6,
            self._seconds,
        )

    def _use_cached(self, error: WeightsError) -> bool:
        """Whether the store is only out of reach, and the cache complete without it."""
        ref = self.cache.ref(str(self.settings.uri))
        if not (isinstance(error, StoreUnavailable) and self._puller and ref and self.cache.is_complete(ref.snapshot)):
            return False
        self._puller.use_cached(ref.snapshot)
        return True

    def snapshots(self) -> dict[str, Any]:
        """The document of `/v1/snapshots`."""
        seconds = self._seconds if self._seconds is not None else time.monotonic() - self._began
        row: dict[str, Any] = {"uri": self.settings.uri, "phase": self._phase, "seconds": round(seconds, 3), "error": self._error}
        if self._puller:
            progress = self._puller.progress
            there = progress.bytes_there() if progress.snapshot else 0
            row |= {
                "snapshot": progress.snapshot or None,
                "source": progress.source,
                "bytes": there,
                "total_bytes": progress.total_bytes,
                "downloaded_bytes": progress.downloaded_bytes,
                "bytes_per_second": round(progress.downloaded_bytes / seconds) if seconds else 0,
            }
        return {"snapshots": [row]}

    def metrics(self) -> str:
        """The same numbers as Prometheus text."""
        row = self.snapshots()["snapshots"][0]
        return (
            "# HELP weights_cache_ready Whether the snapshot is complete in the cache.\n# TYPE weights_cache_ready gauge\n"
            f"weights_cache_ready {int(self.ready)}\n"
            "# HELP weights_cache_bytes Bytes of the snapshot that are in the cache.\n# TYPE weights_cache_bytes gauge\n"
            f"weights_cache_bytes {row.get('bytes', 0)}\n"
            "# HELP weights_cache_downloaded_bytes_total Bytes that this sidecar fetched from the store.\n"
            "# TYPE weights_cache_downloaded_bytes_total counter\n"
            f"weights_cache_downloaded_bytes_total {row.get('downloaded_bytes', 0)}\n"
        )


def backoff(first_s: float, limit_s: float) -> Iterator[float]:
    """Seconds to wait before each next try: doubling from `first_s` to `limit_s`, spread by a quarter so that pods do not march in step."""
    wait_s = first_s
    while True:
        yield wait_s * random.uniform(0.75, 1.25)
        wait_s = min(limit_s, wait_s * 2)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    sidecar: Sidecar

    def do_GET(self) -> None:
        route = self.path.split("?")[0]
        if route == "/healthz":
            self._answer(200, {"status": "ok"})
        elif route == "/readyz":
            row = self.sidecar.snapshots()["snapshots"][0]
            self._answer(200 if self.sidecar.ready else 503, {"phase": row["phase"], "error": row["error"]})
        elif route == "/v1/snapshots":
            self._answer(200, self.sidecar.snapshots())
        elif route == "/metrics":
            self._send(200, "text/plain; version=0.0.4; charset=utf-8", self.sidecar.metrics().encode())
        else:
            self._answer(
                404, {"error": {"type": "not_found", "message": f"no route {route}; there are /healthz, /readyz, /v1/snapshots, /metrics"}}
            )

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


def serve(settings: WeightsSettings) -> int:
    """Run the sidecar until SIGTERM or SIGINT; returns the exit status. Raises SettingsError or OSError before it starts."""
    if not settings.uri:
        raise WeightsError("WEIGHTS_URI is not set: the sidecar needs to know which weights to keep present")
    sidecar = Sidecar(settings, WeightsUri.parse(settings.uri))
    handler = type("Handler", (_Handler,), {"sidecar": sidecar})
    server = _Server((settings.host, settings.port), handler)
    pulling = threading.Thread(target=sidecar.keep_present, name="pull", daemon=True)

    def on_signal(number: int, frame: object) -> None:
        # shutdown() waits for the loop that this handler interrupts, so it needs a thread of its own.
        threading.Thread(target=server.shutdown, daemon=True).start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    log.info("keeping %s in %s; listening on %s:%d", settings.uri, settings.cache_dir, settings.host, settings.port)
    pulling.start()
    server.serve_forever(poll_interval=0.1)
    sidecar.stop()
    server.server_close()
    pulling.join(2)
    if pulling.is_alive():
        # It is in the middle of a read from a store that stalls. Nothing interrupts that, and the interpreter would wait for it;
        # what is in the cache by now stays there for the next sidecar.
        os._exit(0)
    return 0
