"""The threads of one owner: none outlives it, and it is told of each that ends by an exception.

Every thread of this package is begun here.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Threads:
    """Begins threads and keeps them until they have ended."""

    def __init__(self, failed: Callable[[str, BaseException], object]) -> None:
        """failed: told the name of a thread that ended by an exception, and the exception; in that thread."""
        self._failed: Callable[[str, BaseException], object] | None = failed
        self._lock = threading.Lock()  # guards _threads
        self._threads: list[threading.Thread] = []

    def start(self, name: str, work: Callable[..., object], *arguments: Any) -> None:
        """Have something done in a thread of its own. name: what is done, in words. Raises RuntimeError if there can be no more threads."""
        failed = self._failed
        if failed is None:
            raise RuntimeError(f"{name} would be begun after the end")

        def run() -> None:
            try:
                work(*arguments)
            except BaseException as error:  # noqa: BLE001  the owner's to tell of
                failed(name, error)

        # Daemons, because a call that nothing interrupts (to a store that stalls) must not keep a process that was told to end.
        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._lock:
            self._threads = [one for one in self._threads if one.is_alive()]
            thread.start()
            self._threads.append(thread)

    def join(self, seconds: float | None = None) -> bool:
        """Wait for all of them, but for the one that calls; returns whether all have ended. Without a time it is for good.

        An interruption of the wait, such as Ctrl-C, is raised when it is over: what they work on is still theirs until then.
        """
        end = None if seconds is None else time.monotonic() + seconds
        interruption: BaseException | None = None
        with self._lock:
            threads = [one for one in self._threads if one is not threading.current_thread()]
        for thread in threads:
            while thread.is_alive() and (end is None or time.monotonic() < end):
                try:
                    thread.join(None if end is None else max(0.0, end - time.monotonic()))
                except BaseException as error:  # noqa: BLE001  raised below
                    interruption = error
        if seconds is None:
            self._failed = None  # else it and its owner would keep each other
        if interruption:
            raise interruption
        return not any(thread.is_alive() for thread in threads)


def in_order(name: str) -> ThreadPoolExecutor:
    """A thread that does what it is given, one after the other, for whoever gives it to learn of the end; `shutdown` joins it."""
    return ThreadPoolExecutor(1, thread_name_prefix=name)
