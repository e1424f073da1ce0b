"""Heartbeats: what is held stays ours, and a post that takes too long is cut short."""

import logging
import threading
import time
from collections.abc import Sequence

from knative.queue_source.errors import QueueUnavailable
from knative.queue_source.holding import Held, Holding, Lease
from knative.queue_source.metrics import Metrics
from knative.queue_source.queue import Queue

log = logging.getLogger("relight.queue")

MOST = 10  # messages of one call


class Keeper:
    """Looks at what is held, again and again, until it is stopped."""

    def __init__(self, holding: Holding, messages: Queue, metrics: Metrics, visibility_s: float) -> None:
        self._holding = holding
        self._queue = messages
        self._metrics = metrics
        self._visibility_s = visibility_s
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Keep nothing any more."""
        self._stopping.set()

    def run(self) -> None:
        """Extend what is held, and cut posts whose time is up."""
        while not self._stopping.wait(min(self._visibility_s / 12, 1.0)):
            now = time.monotonic()
            due: list[Held] = []
            for held in self._holding.all():
                if (call := held.call) and now >= held.cut_at:
                    call.cut()
                if held.renew_at <= now and held.lease in (Lease.KEPT, Lease.DELETING):
                    due.append(held)
            for at in range(0, len(due), MOST):
                self._extend(due[at : at + MOST])

    def _extend(self, batch: Sequence[Held]) -> None:
        for held in batch:
            held.extending = True
        asked = {held.message: held for held in batch if held.lease is not Lease.RELEASING}
        began = time.monotonic()
        try:
            over = [message for message in asked if began - message.received >= self._queue.longest_hold_s]
            if over:
                self._queue.release([(message, 0.0) for message in over])
            for message in over:
                self._lose(asked.pop(message), "it was held for as long as the queue allows")
            if asked:
                outcome = self._queue.extend(list(asked))
                for message in outcome.gone:
                    self._lose(asked.pop(message), "its visibility has run out")
                for message in outcome.again:
                    del asked[message]
                for held in asked.values():
                    held.extended(began, self._visibility_s)
        except QueueUnavailable as error:
            self._metrics.queue_errors.inc()
            log.warning("heartbeat of %d messages: %s", len(asked), error)
        finally:
            for held in batch:
                held.extending = False

    def _lose(self, held: Held, why: str) -> None:
        held.renew_at = float("inf")
        if held.lease is Lease.KEPT:
            self._metrics.lost.inc()
            log.warning("%s: %s; it will be delivered again", held.message.id, why)
            self._holding.lose(held)
