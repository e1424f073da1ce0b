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
        self._threads: dict[threading.Thread, threading.Event] = {}  # set when it has ended

    def start(self, name: str, work: Callable[..., object], *arguments: Any) -> None:
        """Have something done in a thread of its own. name: what is done, in words. Raises RuntimeError if there can be no more threads."""
        failed = self._failed
        if failed is None:
            raise RuntimeError(f"{name} would be begun after the end")

        ended = threading.Event()

        def run() -> None:
            try:
                work(*arguments)
            except BaseException as error:  # noqa: BLE001  the owner's to tell of
                failed(name, error)
            finally:
                ended.set()

        # Daemons, because a call that nothing interrupts (to a store that stalls) must not keep a process that was told to end.
        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._lock:
            self._threads = {one: end for one, end in self._threads.items() if one.is_alive()}
            thread.start()
            self._threads[thread] = ended

    def join(self, seconds: float | None = None) -> bool:
        """Wait for all of them, but for the one that calls; returns whether all have ended. Without a time it is for good.

        An interruption of the wait, such as Ctrl-C, is raised when it is over: what they work on is still theirs until then.
        """
        late_at = None if seconds is None else time.monotonic() + seconds
        interruption: BaseException | None = None
        with self._lock:
            threads = {one: end for one, end in self._threads.items() if one is not threading.current_thread()}
        # Not by Thread.join: before Python 3.13, one that is interrupted takes the thread for ended.
        for thread, ended in threads.items():
            while not ended.is_set() and (late_at is None or time.monotonic() < late_at):
                try:
                    ended.wait(None if late_at is None else max(0.0, late_at - time.monotonic()))
                except BaseException as error:  # noqa: BLE001  raised below
                    interruption = error
            if ended.is_set():
                thread.join()  # it has nothing left to do
        if seconds is None:
            self._failed = None  # else it and its owner would keep each other
        if interruption:
            raise interruption
        return all(ended.is_set() for ended in threads.values())


def in_order(name: str) -> ThreadPoolExecutor:
    """A thread that does what it is given, one after the other, for whoever gives it to learn of the end; `shutdown` joins it."""
    return ThreadPoolExecutor(1, thread_name_prefix=name)
