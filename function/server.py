"""gunicorn, configured for one model: one worker process that owns the device, threads for the requests.

The port is open, and `/readyz` answers, before the worker imports torch; the model is built in the worker, after the fork, because a
CUDA context does not survive one.
"""

import logging
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from gunicorn import sock
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from prometheus_client import start_http_server

from function import tracing
from function.app import create
from function.keys import Keys
from function.log import install
from function.metrics import Metrics
from function.model import Model
from function.settings import FunctionSettings, from_environment
from function.worker import FunctionWorker
from weights_cache.environment import SettingsError
from weights_cache.reader import Weights
from weights_cache.settings import WeightsSettings

log = logging.getLogger("relight.function")

# When this process was asked for, on `time.monotonic`'s clock; None if that is when the kernel started it. See fork_server.
asked_at: float | None = None

_HURRY_S = 2.0  # for a worker to leave that is told to a second time
_AFTERTHOUGHTS = ("Shutting down: Master", "Reason: Worker failed to boot.")


class _Master(Arbiter):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's own, but for its end: it looks for the worker's ten times a second, and waits once more after that."""

    LISTENERS: list[Any]

    def stop(self, graceful: bool = True) -> None:
        """End the worker, and wait for that for the grace time at most. Called by gunicorn."""
        sock.close_sockets(self.LISTENERS, unlink=False)
        self.LISTENERS = []
        self.kill_workers(signal.SIGTERM if graceful else signal.SIGQUIT)
        ends = time.monotonic() + self.cfg.graceful_timeout
        while self.WORKERS and (left_s := ends - time.monotonic()) > 0:
            if not {signal.SIGINT, signal.SIGQUIT}.isdisjoint(self.wait_for_signals(left_s)):  # SIGCHLD is one, too
                self.kill_workers(signal.SIGQUIT)
                ends = min(ends, time.monotonic() + _HURRY_S)
            self.reap_workers()
        self.kill_workers(signal.SIGKILL)
        self.reap_workers()


class FunctionServer(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """One function under gunicorn."""

    def __init__(self, settings: FunctionSettings, weights: WeightsSettings, *, started_at: float) -> None:
        self._settings = settings
        self._weights = weights
        self._started_at = started_at
        self._model: Model | None = None
        super().__init__()

    def run(self) -> None:
        """Serve until told to end; then SystemExit."""
        _Master(self).run()

    def load_config(self) -> None:
        """Called by gunicorn."""
        settings = self._settings
        config = {
            "bind": f"{settings.host}:{settings.port}",
            "workers": 1,
            "worker_class": FunctionWorker,
            "threads": settings.http_threads,
            "worker_connections": settings.http_threads + 1000,
            "timeout": 0,  # a busy worker is the platform's to judge, by its probes
            "graceful_timeout": math.ceil(settings.drain_s),
            "keepalive": 75,  # longer than any proxy in front, so that it is the proxy that closes an idle connection
            "worker_tmp_dir": "/dev/shm" if Path("/dev/shm").is_dir() else None,  # noqa: S108  a read-only root has no other place
            "control_socket_disable": True,
            "errorlog": None,  # its records are written by the handler that `install` gives it
            "loglevel": "warning",
            "post_worker_init": self._start_model,
        }
        for name, value in config.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """The WSGI app; called by gunicorn in the worker, after the fork."""
        self._model = Model(self._settings, Weights(self._weights), started_at=self._started_at)
        self._metrics = Metrics(self._model, self._settings.model_name)
        self._tracing = tracing.from_environment(self._settings.model_name)
        trace = self._tracing.finished if self._tracing else None
        app, self._fast_path = create(self._settings, self._model, self._metrics, trace)
        return app

    def _start_model(self, worker: FunctionWorker) -> None:
        model = self._model
        assert model

        def on_term(number: int, frame: object) -> None:
            model.drain()
            worker.handle_exit(number, frame)

        if self._settings.metrics_port:
            start_http_server(self._settings.metrics_port, self._settings.host, self._metrics.registry)
        worker.fast_path = self._fast_path
        worker.refusal = model.refusal
        if self._tracing:
            self._tracing.start()
            worker.last_words = self._tracing.flush
        signal.signal(signal.SIGTERM, on_term)
        # gunicorn ends, instead of trying again for ever, when a worker leaves with this status; the platform then sees the failure.
        model.start(on_failure=lambda: os._exit(Arbiter.WORKER_BOOT_ERROR))


def main() -> None:
    """Serve until SIGTERM. Exits 2 with one line on stderr when a setting is wrong, 3 when the agent cannot be brought up."""
    install()
    try:
        settings, weights = from_environment()
        Weights(weights)  # says now what is wrong with WEIGHTS_URI
        if settings.api_keys_file:
            Keys(settings.api_keys_file)
        if settings.oidc_audience:
            from function.oidc import Senders

            Senders(settings)
    except SettingsError as error:
        sys.exit(_complain(str(error)))
    logging.getLogger("gunicorn.error").addFilter(_is_news)
    FunctionServer(settings, weights, started_at=asked_at or _process_started_at()).run()


def _is_news(record: logging.LogRecord) -> bool:
    """False for what gunicorn adds when an agent cannot be brought up: the log is to end with the reason, which people are shown first."""
    said = record.getMessage()
    return not said.endswith(f"exited with code {Arbiter.WORKER_BOOT_ERROR}.") and said not in _AFTERTHOUGHTS


def _complain(message: str) -> int:
    sys.stderr.write(f"function: {message}\n")
    return 2


def _process_started_at() -> float:
    """When the kernel started this process, on `time.monotonic`'s clock (to 10 ms); what Python itself took is part of a cold start."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age_s
