"""A start that has failed: the reason in one line, for the log and for callers; and weights that do not come.

What the agent itself raised is in the log, and not for callers, as with any request; they are told its class.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Callable

from function.errors import Unavailable, bounded
from function.process import explain
from weights_cache.environment import SettingsError, hiding
from weights_cache.errors import WeightsError

RESTART_S = 10.0  # until a function that could not start is started again, or longer
MOMENT_S = 0.1  # in which a probe can see why, even if callers are told nothing
MOST_REASON = 300  # characters
PATIENCE_S = 30.0  # for which something may keep the weights from coming; the sidecar goes on trying, and stores have bad moments
LOOK_S = 1.0

log = logging.getLogger("relight.function")

_UNPRINTABLE = re.compile(r"[^\S ]+|[^\x20-\U0010ffff]|[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def reason_of(agent: str, error: BaseException) -> str:
    """Why an agent could not be brought up, for the log, whatever its error does when it is written."""
    text = _text(error)
    if says_enough(error):
        return _line(text)
    said = explain(error) or next((line for line in text.splitlines() if line.strip()), "")
    return _line(f"the agent {agent} could not be brought up: {type(error).__name__}{f': {said}' if said else ''}")


def told_of(agent: str, error: BaseException) -> str:
    """The same for callers."""
    if says_enough(error):
        return _line(_text(error))
    said = explain(error) or "the function's log says why"
    return _line(f"the agent {agent} could not be brought up: {type(error).__name__}; {said}")


def says_enough(error: BaseException) -> bool:
    """Whether an error is for people, and needs no traceback."""
    return isinstance(error, SettingsError | WeightsError)


def ends_with_reason(error: BaseException) -> bool:
    """Whether the last line of an error's traceback, or what is said besides, is the reason; else that is to be said once more."""
    return says_enough(error) or bool(explain(error)) or not ("\n" in _text(error).strip() or getattr(error, "__notes__", None))


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # noqa: BLE001  foreign code
        return ""


def _line(text: str) -> str:
    return bounded(_UNPRINTABLE.sub(" ", hiding(os.environ)(text)).strip(), MOST_REASON)


class Failing:
    """Why one function cannot start, and how its callers learn of it."""

    def __init__(self, agent: str, tell_s: float, enter: Callable[[], object], problem: Callable[[], str | None] = lambda: None) -> None:
        """tell_s: for how long callers are told before the function ends; enter: called once it is clear that it will.

        problem: what keeps the weights from coming, which may pass.
        """
        self.tells = tell_s > 0
        self.last_line = ""  # of the log: why
        self._agent = agent
        self._tell_s = tell_s
        self._enter = enter
        self._lock = threading.Lock()  # guards _failure: the model's thread may fail while the start is given up
        self._failure: str | None = None
        self.problem = problem
        self._is_over = threading.Event()

    @property
    def reason(self) -> str | None:
        """Why, in one line and for anybody, as far as that is known."""
        return self._failure or ((problem := self.problem()) and _line(problem)) or None

    def check(self) -> None:
        """Raises Unavailable for a caller of one that will not start."""
        if self._failure:
            raise Unavailable(f"the function cannot start: {self._failure}", retry_after_s=RESTART_S)

    def fail(self, error: BaseException, then: Callable[[BaseException], object]) -> None:
        """It will not start. `then` is called, here, once callers have been told for long enough, unless it is ending anyway."""
        with self._lock:
            if self._failure:
                return
            self._failure = told_of(self._agent, error)
            self.last_line = reason_of(self._agent, error)
        self._enter()
        if not self._is_over.wait(max(self._tell_s, MOMENT_S)):
            then(error)

    def stop(self) -> None:
        """It is ending: nobody is to be told any more."""
        self._is_over.set()


class Patience:
    """Gives a function up whose weights do not come, in a thread of its own."""

    def __init__(
        self, problem: Callable[[], str | None], is_waiting: Callable[[], bool], give_up: Callable[[WeightsError], object]
    ) -> None:
        """problem: what keeps the weights from coming. is_waiting: asked before each look; the first no ends it.

        give_up: called when there has been a problem for PATIENCE_S.
        """
        self._problem = problem
        self._is_waiting = is_waiting
        self._give_up = give_up
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="patience", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        since: float | None = None
        while not self._stop.wait(LOOK_S) and self._is_waiting():
            problem = self._problem()
            now = time.monotonic()
            since = (now if since is None else since) if problem else None
            if problem and since is not None and now - since >= PATIENCE_S:
                log.error("%s; for %.0f s now, so the start is given up", problem, now - since)
                self._give_up(WeightsError(problem))
                return
