"""`relight queue-source`."""

import contextlib
import logging
import os
import resource
import signal
import sys
import threading
from typing import TYPE_CHECKING

import click

from knative.queue_source.errors import QueueSourceError
from knative.queue_source.log import configure, line
from knative.queue_source.settings import QueueSourceSettings, address, from_environment
from knative.queue_source.threads import Threads
from weights_cache.environment import SettingsError

if TYPE_CHECKING:
    from knative.queue_source.claim import Claims
    from knative.queue_source.queue import Queue, Results

log = logging.getLogger("relight.queue")
JOIN_S = 2.0  # for threads that have nothing more to do
_SIGNALS = {signal.SIGTERM, signal.SIGINT}


@click.command(name="queue-source")
def command() -> None:
    """Post a queue's messages to K_SINK as CloudEvents, configured by the QUEUE_SOURCE_ variables."""
    configure()
    _raise_descriptor_limit()
    threads = Threads()
    signals = Signals(threads)
    try:
        status = run(from_environment(os.environ), signals.told, threads)
    except (SettingsError, QueueSourceError) as error:
        raise click.ClickException(line(str(error))) from error
    finally:
        signals.close()
    if left := threads.join(JOIN_S):
        log.warning("not waited for, as a service keeps them: %s", ", ".join(left))
    sys.stderr.flush()
    os._exit(status)  # a call to a service that stalls would keep the interpreter waiting


def run(settings: QueueSourceSettings, told_to_stop: threading.Event, threads: Threads) -> int:
    """The exit status. Raises QueueSourceError for what starting again does not mend."""
    from knative.queue_source.monitor import Monitor
    from knative.queue_source.sink import Sink
    from knative.queue_source.source import Source, open_until

    messages, results = _queue(settings, threads), _results(settings)
    sink = Sink(settings.sink, ca_certs=settings.ca_certs, wants_answers=results is not None)
    source = Source(settings, messages, sink, claims=_claims(settings), results=results, threads=threads)
    with contextlib.ExitStack() as started:
        if settings.port:
            monitor = Monitor(
                settings.host,
                settings.port,
                threads,
                failure=lambda: threads.failure,
                is_ready=lambda: source.is_ready,
                metrics=source.metrics.text,
            )
            started.callback(monitor.close)
        if not open_until(messages.open, address(settings.url), told_to_stop, threads):
            return 0
        if results and not open_until(results.open, address(settings.results_url or ""), told_to_stop, threads):
            return 0
        if messages.dead_letters is False:
            log.warning(
                "%s has no redrive policy: a message that can never succeed is delivered again and again, at last every %.0f s, until "
                "it is too old for the queue; give it a dead-letter queue",
                address(settings.url),
                settings.backoff_max_s,
            )
        source.start()
        log.info("posting messages of %s to %s, %d at a time", messages.source, address(settings.sink), settings.concurrency)
        while not told_to_stop.wait(1.0):
            if threads.failure:
                log.error("ends, as a thread has failed: %s", threads.failure)
                return 1
        log.info("stopping")
        source.stop()
    log.info("stopped")
    return 0


class Signals:
    """Waits for SIGTERM and SIGINT in a thread of its own, until one comes or it is closed.

    They are blocked here and in all threads to come but for that one, so that no handler runs in the middle of anything. It waits without a
    time limit: `sigtimedwait` takes a process that was suspended (SIGSTOP, a debugger) for one that was told something.
    """

    def __init__(self, threads: Threads) -> None:
        self.told = threading.Event()  # that it is time to stop
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self._thread = threads.start("signals", self._wait)

    def close(self) -> None:
        """Wait for none any more."""
        if self._thread.is_alive() and self._thread.ident:
            signal.pthread_kill(self._thread.ident, signal.SIGTERM)  # for that thread alone
            self._thread.join()

    def _wait(self) -> None:
        signal.sigwait(_SIGNALS)
        self.told.set()


def _raise_descriptor_limit() -> None:
    """A connection for each message that is held, where the machine allows for so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _queue(settings: QueueSourceSettings, threads: Threads) -> "Queue":
    if _is_rabbitmq(settings.url):
        from knative.queue_source.rabbitmq import RabbitQueue

        return RabbitQueue(settings.url, prefetch=settings.concurrency, threads=threads)
    from knative.queue_source.source import pollers
    from knative.queue_source.sqs import SqsQueue

    return SqsQueue(settings.url, visibility_s=settings.visibility_s, wait_s=settings.wait_s, pollers=pollers(settings.concurrency))


def _results(settings: QueueSourceSettings) -> "Results | None":
    if not settings.results_url:
        return None
    if _is_rabbitmq(settings.results_url):
        from knative.queue_source.rabbitmq import RabbitResults

        return RabbitResults(settings.results_url)
    from knative.queue_source.sqs import SqsResults

    return SqsResults(settings.results_url, connections=min(settings.concurrency, 32))


def _claims(settings: QueueSourceSettings) -> "Claims | None":
    if not settings.buckets:
        return None
    import boto3
    from botocore.config import Config

    from knative.queue_source.claim import Claims

    config = Config(connect_timeout=5, read_timeout=30, max_pool_connections=min(settings.concurrency, 32))
    return Claims(boto3.client("s3", config=config), settings.buckets, settings.claim_max_bytes)


def _is_rabbitmq(url: str) -> bool:
    return url.startswith(("amqp://", "amqps://"))
