"""gunicorn, configured for one model: one worker process that owns the device, threads for the requests.

The port is open, and `/readyz` answers, before the worker imports torch; the model is built in the worker, after the fork, because a
CUDA context does not survive one.
"""

import faulthandler
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from gunicorn.app.base import BaseApplication
from prometheus_client import start_http_server

from function import children, process, tracing, warm_imports
from function.app import create
from function.cors import Cors
from function.ending import Ending
from function.failing import Patience, ends_with_reason
from function.keys import Keys
from function.log import STDERR, install
from function.master import ENDING_SIGNALS, HAS_EXPLAINED, WAS_TOLD, Master
from function.metrics import Metrics
from function.model import Model
from function.settings import FunctionSettings, from_environment
from function.worker import FunctionWorker
from weights_cache.environment import SettingsError
from weights_cache.reader import Weights
from weights_cache.settings import WeightsSettings

WRONG_SETTING = 2  # the exit status, which says that another start would end in the same way
# When this process was asked for, on `time.monotonic`'s clock; None if that is when the kernel started it. See fork_server.
asked_at: float | None = None


class FunctionServer(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """One function under gunicorn."""

    def __init__(self, settings: FunctionSettings, weights: WeightsSettings, *, started_at: float, plain: children.Handlers) -> None:
        """plain: what a fresh Python does on each signal."""
        self._settings = settings
        self._weights = weights
        self._started_at = started_at
        self._plain = plain
        self._model: Model | None = None
        self._ending: Ending | None = None  # the worker's
        super().__init__()

    def run(self) -> None:
        """Serve until told to end; then SystemExit."""
        children.adopt_orphans()
        try:
            Master(self).run()
        except SystemExit as told:
            if self._ending:
                self._ending.leave(told.code if isinstance(told.code, int) else 1)
            raise

    def load_config(self) -> None:
        """Called by gunicorn."""
        settings = self._settings
        config = {
            "bind": f"{settings.host}:{settings.port}",
            "workers": 1,
            "worker_class": FunctionWorker,
            "threads": settings.http_threads,
            "worker_connections": settings.http_threads + 1000,
            "limit_request_line": 8190,  # bytes, gunicorn's most
            "limit_request_field_size": 32 * 1024,  # bytes of a header; common proxies let 16 kB through
            "timeout": 0,  # a busy worker is the platform's to judge, by its probes
            "graceful_timeout": math.ceil(settings.drain_s),
            "keepalive": 75,  # longer than any proxy in front, so that it is the proxy that closes an idle connection
            "worker_tmp_dir": "/dev/shm" if Path("/dev/shm").is_dir() else None,  # noqa: S108  a read-only root has no other place
            "control_socket_disable": True,
            "secure_scheme_headers": {},  # whether callers used https is nothing to us, whatever proxies before us say of it
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
        """Called by gunicorn in the worker, before it runs."""
        model = self._model
        assert model
        settings = self._settings
        ports = {listener.getsockname()[1] for listener in worker.sockets} | {settings.metrics_port}
        reason = ""  # what the log is to end with

        def close(timeout_s: float) -> bool:
            if patience:
                patience.stop()
            return model.close(timeout_s)

        def on_failure(error: BaseException) -> None:
            nonlocal reason
            if model.failing.tells or not ends_with_reason(error):  # lines of those who were told have come after it
                reason = model.failing.last_line
            ending.fail(WRONG_SETTING if isinstance(error, SettingsError) else Master.WORKER_BOOT_ERROR, error)

        patience = None
        if model.failing.tells:
            patience = Patience(model.failing.problem, model.is_waiting, lambda error: model.failing.fail(error, on_failure))

        ending = self._ending = Ending(
            close, drain_s=settings.drain_s, ports=ports, on_failure=lambda: _explained(worker, reason), flush=STDERR.flush
        )

        def on_term(number: int, frame: object) -> None:
            ending.told()
            os.pwrite(worker.tmp.fileno(), WAS_TOLD.encode(), 0)
            model.drain()
            worker.handle_exit(number, frame)

        worker.leave = ending.leave
        signal.signal(signal.SIGTERM, on_term)
        for number in (number for number, handler in self._plain.items() if handler is signal.SIG_IGN):
            signal.signal(number, signal.SIG_IGN)  # as `nohup` has it; gunicorn has set it back
        ending.arm()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
        if not faulthandler.is_enabled():
            faulthandler.enable(all_threads=False)  # so that the log has the Python stack of a crash in native code
        children.make_plain(self._plain, lambda: [*_descriptors(worker), *worker.descriptors()], ports)
        self._equip(worker, model)
        model.start(on_failure=on_failure)
        if patience:
            patience.start()

    def _equip(self, worker: FunctionWorker, model: Model) -> None:
        """Give the worker what it asks."""
        if self._settings.metrics_port:
            start_http_server(self._settings.metrics_port, self._settings.host, self._metrics.registry)
        worker.fast_path = self._fast_path
        worker.admit = model.admit
        worker.max_body_bytes = self._settings.max_body_bytes
        if self._tracing:
            self._tracing.start()
            worker.last_words = self._tracing.flush


def _explained(worker: FunctionWorker, reason: str) -> None:
    """Let the master know that the log says already why the worker ends; and in one line what it is to end with, if not with that."""
    os.pwrite(worker.tmp.fileno(), f"{HAS_EXPLAINED}{reason}".encode(), 0)


def _descriptors(worker: FunctionWorker) -> list[int]:
    """What gunicorn has opened in the worker, besides sockets."""
    queue = worker.method_queue
    return [worker.tmp.fileno(), worker.poller.fileno(), *worker.PIPE, queue._read_fd, queue._write_fd]  # noqa: SLF001


def main() -> None:
    """Serve until SIGTERM. Exits 2 with one line on stderr when a setting is wrong, 3 when the agent cannot be brought up."""
    plain = {**children.handlers(), signal.SIGTERM: signal.SIG_DFL}  # see function/__main__.py
    process.prepare()
    warm_imports.expect()
    install()
    try:
        settings, weights = from_environment()
        Weights(weights)  # says now what is wrong with WEIGHTS_URI
        if settings.api_keys_file:
            Keys(settings.api_keys_file)
        Cors(settings.cors_origins)
        if settings.oidc_audience:
            from function.oidc import Senders

            Senders(settings)
    except SettingsError as error:
        sys.exit(_complain(str(error)))
    FunctionServer(settings, weights, started_at=asked_at or _process_started_at(), plain=plain).run()


def _complain(message: str) -> int:
    sys.stderr.write(f"function: {message}\n")
    return WRONG_SETTING


def _process_started_at() -> float:
    """When the kernel started this process, on `time.monotonic`'s clock (to 10 ms); what Python itself took is part of a cold start."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age_s
