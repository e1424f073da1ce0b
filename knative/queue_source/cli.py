"""`relight queue-source`."""

import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

import click

from knative.queue_source.errors import QueueSourceError
from knative.queue_source.settings import QueueSourceSettings, from_environment, shown
from weights_cache.environment import SettingsError

if TYPE_CHECKING:
    from knative.queue_source.claim import Claims
    from knative.queue_source.queue import Queue, Results

log = logging.getLogger("relight.queue")
_SIGNALS = {signal.SIGTERM, signal.SIGINT}


@click.command(name="queue-source")
def command() -> None:
    """Post a queue's messages to K_SINK as CloudEvents, configured by the QUEUE_SOURCE_ variables."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    logging.getLogger("pika").setLevel(logging.ERROR)
    try:
        status = run(from_environment(os.environ), _signals())
    except (SettingsError, QueueSourceError) as error:
        raise click.ClickException(str(error)) from error
    sys.stderr.flush()
    os._exit(status)  # a call to a service that stalls would keep the interpreter waiting


def run(settings: QueueSourceSettings, told_to_stop: threading.Event) -> int:
    """The exit status. Raises QueueSourceError for what starting again does not mend."""
    from knative.queue_source.monitor import Monitor
    from knative.queue_source.sink import Sink
    from knative.queue_source.source import Source, open_until

    messages, results = _queue(settings), _results(settings)
    source = Source(settings, messages, Sink(settings.sink, ca_certs=settings.ca_certs), claims=_claims(settings), results=results)
    if settings.port:
        Monitor(
            settings.host,
            settings.port,
            is_healthy=lambda: not source.failed,
            is_ready=lambda: source.is_ready,
            metrics=source.metrics.text,
        )
    if not open_until(messages.open, shown(settings.url), told_to_stop.wait):
        return 0
    if results and not open_until(results.open, shown(settings.results_url or ""), told_to_stop.wait):
        return 0
    if messages.dead_letters is False:
        log.warning(
            "%s has no redrive policy: a message that can never succeed is delivered again and again, at last every %.0f s, until it is "
            "too old for the queue; give it a dead-letter queue",
            shown(settings.url),
            settings.backoff_max_s,
        )
    source.start()
    log.info("posting messages of %s to %s, %d at a time", messages.source, settings.sink, settings.concurrency)
    while not told_to_stop.wait(1.0):
        if source.failed:
            return 1
    log.info("stopping")
    source.stop()
    log.info("stopped")
    return 0


def _signals() -> threading.Event:
    """Set once a signal says that it is time to stop.

    Signals are blocked here and in all threads to come but for one that waits for them, so that no handler runs in the middle of anything.
    It waits without a time limit: `sigtimedwait` takes a process that was suspended (SIGSTOP, a debugger) for one that was told something.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    told = threading.Event()

    def wait() -> None:
        signal.sigwait(_SIGNALS)
        told.set()

    threading.Thread(target=wait, name="signals", daemon=True).start()
    return told


def _queue(settings: QueueSourceSettings) -> "Queue":
    if _is_rabbitmq(settings.url):
        from knative.queue_source.rabbitmq import RabbitQueue

        return RabbitQueue(settings.url, prefetch=settings.concurrency)
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
