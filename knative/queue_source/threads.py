"""The threads of the program: each has an owner, which learns of its failure and waits for its end."""

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger("relight.queue")

Run = Callable[[], None]


class Threads:
    """Starts threads, and keeps them until they have ended."""

    def __init__(self) -> None:
        self.failure = ""  # of the first one that ended by an exception: nothing goes on without it, and the program is to end
        self._lock = threading.Lock()  # guards what follows, and `failure`
        self._threads: list[threading.Thread] = []

    def start(self, name: str, run: Run) -> threading.Thread:
        """Have something done in a thread of its own."""
        # A daemon, as a call to a service that stalls cannot be interrupted, and must not keep the interpreter.
        thread = threading.Thread(target=self._guard, args=(name, run), name=name, daemon=True)
        with self._lock:
            self._threads = [one for one in self._threads if one.is_alive()]
            thread.start()
            self._threads.append(thread)
        return thread

    def join(self, seconds: float) -> list[str]:
        """Wait for the end of all of them, so long at most; the names of those that have not ended."""
        end = time.monotonic() + seconds
        with self._lock:
            threads = [one for one in self._threads if one is not threading.current_thread()]
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        return sorted({thread.name for thread in threads if thread.is_alive()})

    def _guard(self, name: str, run: Run) -> None:
        try:
            run()
        except BaseException as error:
            log.exception("the thread %r failed; the source ends", name)
            with self._lock:
                self.failure = self.failure or f"{name}: {error!r}"
