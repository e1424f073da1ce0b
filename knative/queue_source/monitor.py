"""The port of the queue source: `/healthz`, `/readyz`, `/metrics`."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from knative.queue_source.errors import QueueSourceError


class Monitor:
    """A small HTTP server in threads of its own, which end with the process."""

    def __init__(
        self, host: str, port: int, *, is_healthy: Callable[[], bool], is_ready: Callable[[], bool], metrics: Callable[[], bytes]
    ) -> None:
        """Listens. Raises QueueSourceError if it cannot."""
        routes: dict[str, Callable[[], tuple[int, bytes]]] = {
            "/healthz": lambda: (200, b"ok\n") if is_healthy() else (503, b"a thread has failed\n"),
            "/readyz": lambda: (200, b"ready\n") if is_ready() else (503, b"the queue does not answer\n"),
            "/metrics": lambda: (200, metrics()),
        }

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60

            def do_GET(self) -> None:
                route = routes.get(self.path.partition("?")[0])
                status, body = route() if route else (404, b"there are /healthz, /readyz and /metrics\n")
                self.send_response(status)
                kind = "text/plain; version=0.0.4; charset=utf-8" if self.path.startswith("/metrics") else "text/plain; charset=utf-8"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass  # probes ask every few seconds

        try:
            server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise QueueSourceError(f"QUEUE_SOURCE_PORT={port}: cannot listen at {host}: {error.strerror}") from error
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, name="monitor", daemon=True).start()
