"""The pulls of one process: how many run at a time, how many wait, and when what was asked for is forgotten."""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from weights_cache.errors import WeightsError
from weights_cache.keeper import Keeper, Settle
from weights_cache.threads import Threads
from weights_cache.uri import WeightsUri

log = logging.getLogger("relight.weights")

AT_ONCE = 4  # pulls that others have asked for; each has connections, threads and buffers of its own
WAITING = 64  # asks, beside those
RETRY_AFTER_S = 5
ENDED = 64  # ends that are remembered, for who asked to read
ENDED_S = 60.0


class Busy(WeightsError):
    """There is no place for another pull; `retry_after_s` says when to ask again."""

    retry_after_s = RETRY_AFTER_S


@dataclass
class _Entry:
    """A URI that is kept, or that somebody has asked for."""

    keeper: Keeper
    number: int  # in the order they were asked for
    is_kept: bool = False
    is_wanted: bool = False  # a pull of it waits, or runs
    users: int = 0  # pulls that have not come to their end, with what comes after them


@dataclass
class _End:
    """How the last pull of a URI ended that nobody keeps."""

    at: float
    number: int
    row: dict[str, Any]


class Pulls:
    """A keeper for each URI that is kept, for as long as the process lives, and for each that was asked for, until its pull has ended.

    Safe to use from several threads.
    """

    def __init__(self, make: Callable[[str, int], Keeper], kept: Iterable[str], failed: Callable[[str, BaseException], object]) -> None:
        """make: a keeper, by URI and the number of pulls that were begun for it before. failed: as of Threads."""
        self._make = make
        self._threads = Threads(failed)
        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards what follows; held for moments
        self._entries = {uri: _Entry(make(uri, 0), number, is_kept=True) for number, uri in enumerate(kept)}
        self._count = len(self._entries)
        self._waiting: deque[_Entry] = deque()
        self._workers = 0
        self._ends: dict[str, _End] = {}  # in their order

    def keep_present(self, uri: str) -> None:
        """Pull one of those that are kept until it succeeds, with growing pauses between the tries."""
        with self._lock:
            entry = self._entries[uri]
            entry.is_wanted = True  # whoever asks for the same is served by this
            entry.users += 1
        settle = None
        for pause_s in backoff(1, 30):
            with self._lock:
                entry.keeper.begin()
            settle = self._pull(entry.keeper, pause_s)
            if settle or self._stop.wait(pause_s):
                break
        self._finish(entry, settle)

    def ask(self, uri: str) -> None:
        """See that what the store has now is, or is going to be, in the cache; what it takes happens in another thread.

        Raises SettingsError for what is no URI, and Busy.
        """
        WeightsUri.parse(uri)
        with self._lock:
            entry = self._entries.get(uri)
            if entry and entry.is_wanted:
                return
            if len(self._waiting) >= WAITING or self._stop.is_set():
                raise Busy(f"{self._workers} pulls run and {len(self._waiting)} wait; ask again in {RETRY_AFTER_S} s")
            if self._workers < AT_ONCE:
                self._begin_worker()
            if not entry:
                before = self._ends.pop(uri, None)
                self._count += 1
                entry = _Entry(self._make(uri, before.row["pulls"] if before else 0), before.number if before else self._count)
                self._entries[uri] = entry
            entry.is_wanted = True
            entry.users += 1
            entry.keeper.begin()  # before the answer, which is to be about this pull
            self._waiting.append(entry)

    def _begin_worker(self) -> None:
        try:
            self._threads.start("pull", self._work)
        except RuntimeError as error:
            if not self._workers:
                raise Busy(f"no thread can be had for a pull: {error}") from error
        else:
            self._workers += 1

    def _work(self) -> None:
        """Pull what waits, one after the other, until nothing does."""
        while True:
            with self._lock:
                if not self._waiting or self._stop.is_set():
                    self._workers -= 1
                    return
                entry = self._waiting.popleft()
            self._finish(entry, self._pull(entry.keeper))

    def _pull(self, keeper: Keeper, pause_s: float = 0.0) -> Settle | None:
        """One try; returns what is left to do, or None if it has to be repeated."""
        try:
            settle = keeper.pull()
        except WeightsError as error:
            if not self._stop.is_set():
                log.error("%s%s", error, f"; next try in {pause_s:.0f} s" if pause_s else "")
            return None
        except Exception:
            log.exception("the pull of %s failed unexpectedly", keeper.uri)
            return None
        return settle if keeper.state()[1] is None else None  # else it is the cache's, and the store is asked again later

    def _finish(self, entry: _Entry, settle: Settle | None) -> None:
        with self._lock:
            entry.is_wanted = False  # first: an order that comes while the disk is slow is about what the store has by then
        if settle:
            settle()
        row = entry.keeper.row()
        with self._lock:
            entry.users -= 1
            if entry.users or entry.is_kept:
                return
            del self._entries[entry.keeper.uri]
            self._ends[entry.keeper.uri] = _End(time.monotonic(), entry.number, row)
            while len(self._ends) > ENDED:
                del self._ends[next(iter(self._ends))]
        entry.keeper.close()  # whoever asked has a lease of its own

    def stop(self, seconds: float) -> bool:
        """End every pull; returns whether all have ended within the time."""
        self._stop.set()
        for keeper in self.keepers():
            keeper.cancel()
        return self._threads.join(seconds)

    def close(self) -> None:
        """Let the weights go; no pull is running any more."""
        for keeper in self.keepers():
            keeper.close()

    def keepers(self) -> list[Keeper]:
        """All that there are, in the order they were asked for."""
        with self._lock:
            return [entry.keeper for entry in self._entries.values()]

    def keeper(self, uri: str) -> Keeper:
        """That of a URI that is kept."""
        with self._lock:
            return self._entries[uri].keeper

    def rows(self, uri: str | None = None) -> list[dict[str, Any]]:
        """How far each is, or that one, in the order they were asked for; of those that have ended, how, for a while."""
        with self._lock:
            oldest = time.monotonic() - ENDED_S
            self._ends = {name: end for name, end in self._ends.items() if end.at > oldest}
            ended = [(end.number, end.row) for name, end in self._ends.items() if uri in (None, name)]
            entries = [entry for name, entry in self._entries.items() if uri in (None, name)]
        rows = ended + [(entry.number, entry.keeper.row()) for entry in entries]
        return [row for _, row in sorted(rows, key=lambda one: one[0])]


def backoff(first_s: float, limit_s: float) -> Iterator[float]:
    """Seconds to wait before each next try: doubling from `first_s` to `limit_s`, spread by a quarter so that pods do not march in step."""
    wait_s = first_s
    while True:
        yield wait_s * random.uniform(0.75, 1.25)
        wait_s = min(limit_s, wait_s * 2)
