"""A start that has failed: the reason in one line, for the log and for callers; and what the pod's sidecar says of one.

What the agent itself raised is in the log, and not for callers, as with any request; they are told its class.
"""

import http.client
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from urllib.parse import quote

from function.errors import Unavailable, bounded
from function.process import explain
from weights_cache.environment import SettingsError, hiding
from weights_cache.errors import WeightsError
from weights_cache.settings import WeightsSettings

RESTART_S = 10.0  # until a function that could not start is started again, or longer
MOMENT_S = 0.1  # in which a probe can see why, even if callers are told nothing
MOST_REASON = 300  # characters
PATIENCE_S = 30.0  # for which the sidecar may say that the weights cannot be had; it goes on trying, and stores have bad moments
ASK_EVERY_S = 1.0
ASK_S = 1.0  # for each step of an answer
MOST_ANSWER = 1 << 20

log = logging.getLogger("relight.function")

_UNPRINTABLE = re.compile(r"[^\S ]+|[^\x20-\U0010ffff]|[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_WAITING = ("failed", "waiting", "listing")  # phases of the sidecar in which nothing comes


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

    def __init__(self, agent: str, tell_s: float, enter: Callable[[], object]) -> None:
        """tell_s: for how long callers are told before the function ends; enter: called once it is clear that it will."""
        self.tells = tell_s > 0
        self.last_line = ""  # of the log: why
        self._agent = agent
        self._tell_s = tell_s
        self._enter = enter
        self._lock = threading.Lock()  # guards _failure: the model's thread may fail while the start is given up
        self._failure: str | None = None
        self._problem: str | None = None  # what the sidecar says, which may pass
        self._is_over = threading.Event()

    @property
    def reason(self) -> str | None:
        """Why, in one line and for anybody, as far as that is known."""
        return self._failure or self._problem

    def check(self) -> None:
        """Raises Unavailable for a caller of one that will not start."""
        if self._failure:
            raise Unavailable(f"the function cannot start: {self._failure}", retry_after_s=RESTART_S)

    def note(self, problem: str | None) -> None:
        """What the sidecar says of the weights now."""
        self._problem = problem

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


class SidecarWatch:
    """Asks the pod's sidecar what is wrong, for as long as a function waits for its weights, in a thread of its own."""

    def __init__(
        self,
        settings: WeightsSettings,
        is_waiting: Callable[[], bool],
        note: Callable[[str | None], object],
        give_up: Callable[[WeightsError], object] | None = None,
    ) -> None:
        """is_waiting: asked before each look; the first no ends it. note: what is wrong, if anything is.

        give_up: called when that has lasted for PATIENCE_S; without it, it may last.
        """
        self._uri, self._port = settings.uri, settings.port
        self._is_waiting = is_waiting
        self._note = note
        self._give_up = give_up
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sidecar", daemon=True)

    def start(self) -> None:
        """Begin; nothing is to be done without weights."""
        if self._uri:
            self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(2 * ASK_S)

    def _run(self) -> None:
        since: float | None = None
        while not self._stop.wait(ASK_EVERY_S) and self._is_waiting():
            problem = self._ask()
            now = time.monotonic()
            since = (now if since is None else since) if problem else None
            self._note(problem)
            if problem and since is not None and now - since >= PATIENCE_S and self._give_up:
                log.error("%s; for %.0f s now, so the start is given up", problem, now - since)
                self._give_up(WeightsError(problem))
                return

    def _ask(self) -> str | None:
        """What the sidecar says of our weights; None if that is nothing bad, or it says nothing, or is another one's."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ASK_S)
        try:
            connection.request("GET", f"/v1/snapshots?uri={quote(self._uri or '', safe='')}")
            document = json.loads(connection.getresponse().read(MOST_ANSWER))
            found = next(row for row in document["snapshots"] if row["uri"] == self._uri)
            return _line(str(found["error"])) if found["error"] and found["phase"] in _WAITING else None
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError, StopIteration):
            return None
        finally:
            connection.close()
