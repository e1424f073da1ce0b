"""The gunicorn worker: gunicorn's parser and threads, in a loop of our own.

Where gunicorn's gthread falls short for a model function:

- All connections belong to the loop (see `http_loop`): it reads requests whole, bodies too, and sends what clients are slow to take, so
  that a slow client holds no thread.
- Ordinary predictions and probes take no thread at all: the loop reads them and answers (see `fast_path`), the model's thread computes.
- Probes are answered by the loop however odd they are, metrics by threads of their own: at once, however many callers wait for the model.
- What would be refused anyway is refused from the loop, before its body is looked at (see `refusals`).
- Told to end, it goes on listening, so that callers get a 503 rather than a connection that nobody answers; bodies that are on their way
  may still come; it leaves as soon as the last running request is answered.
"""

import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

from function.connections import Connection
from function.fast_path import FastPath
from function.http_loop import HttpLoop
from function.priority import Priority
from function.request_handler import Answerers, RequestHandler

TICK_S = 1.0
HELD_BODIES = 8  # bodies of the largest size that may be on their way
SPARE_FILES = 64  # descriptors that are left to the agent and the rest of us, where the limit is low


class FunctionWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """One process, one model. What follows is set before it runs."""

    fast_path: FastPath
    max_body_bytes: int
    admit: Callable[[Priority], None] = staticmethod(lambda priority: None)  # raises what a call that came now would be refused with
    last_words: Callable[[], object] | None = None  # what is to be done after the last answer, within the grace time
    leave: Callable[[int], object] = staticmethod(os._exit)  # end the process: threads may be in calls that never return

    def run(self) -> None:
        """Serve until told to end, then until the last running request is answered."""
        self._begin()
        ticked = 0.0
        while self.alive or not self._is_over():
            self._loop.turn(self._patience_s())
            now = time.monotonic()
            if now >= self.fast_path.wake_at:
                self.fast_path.expire(now)
            if self._handler.refusals.waiting:
                self._handler.refusals.tell(now)
            if now - ticked >= TICK_S:
                ticked = now
                self.notify()
                if not self.is_parent_alive():
                    break
                self._loop.tick(now)
        self._handler.end()
        self.leave(0)

    def handle_exit(self, sig: int, frame: object) -> None:
        """SIGTERM: serve what is there, and leave."""
        self.alive = False
        if hasattr(self, "_loop"):  # it runs already
            self._loop.inbox.wake()

    def descriptors(self) -> Iterator[int]:
        """The file descriptors of the server's own, which no child of the agent's is to have."""
        return self._loop.descriptors() if hasattr(self, "_loop") else iter(())  # an agent may be quicker than the loop

    def _begin(self) -> None:
        self._deadline: float | None = None  # of the grace time
        self._is_speaking = False  # its last words
        self._loop = HttpLoop(self.sockets, self._most_connections(), self.cfg.keepalive, HELD_BODIES * self.max_body_bytes)
        answerers = Answerers(self.fast_path, self._run_app, self.tpool, ThreadPoolExecutor(2, "aside"), self.admit)
        self._handler = RequestHandler(self._loop, answerers, self.cfg, most_working=self.cfg.threads, max_body_bytes=self.max_body_bytes)
        self._loop.handle(self._handler)

    def _most_connections(self) -> int:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY:
            return int(self.worker_connections)
        return max(16, min(int(self.worker_connections), limit - len(list(Path("/proc/self/fd").iterdir())) - SPARE_FILES))

    def _patience_s(self) -> float:
        """How long the loop may wait for something to come."""
        if self._handler.refusals.waiting:
            return 0.01
        return min(TICK_S, max(0.0, self.fast_path.wake_at - time.monotonic()))

    def _run_app(self, request: Any, conn: Connection) -> bool:
        return bool(self.handle_request(request, conn))

    # The end

    def _is_over(self) -> bool:
        self._loop.is_ending = True
        now = time.monotonic()
        self._deadline = self._deadline or now + self.cfg.graceful_timeout
        if now >= self._deadline:
            return True
        if self._handler.is_busy():
            return False
        if self.last_words:
            last_words, self.last_words = self.last_words, None
            self._is_speaking = True  # so that whoever asks meanwhile is still told
            self.tpool.submit(self._speak, last_words)
        return not self._is_speaking

    def _speak(self, last_words: Callable[[], object]) -> None:
        """In a thread."""
        try:
            last_words()
        finally:
            self._is_speaking = False
            self._loop.inbox.wake()
