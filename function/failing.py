"""A start that has failed: the reason in one line, for callers and for whoever runs the function; and what the pod's sidecar says of one.

The log has all of it; who calls is told no more than this line.
"""

import http.client
import json
import re
import threading
import time
from collections.abc import Callable
from urllib.parse import quote

from function.errors import bounded
from function.process import explain
from weights_cache.environment import SettingsError, masked
from weights_cache.errors import WeightsError
from weights_cache.settings import WeightsSettings

MOST_REASON = 300  # characters
PATIENCE_S = 30.0  # for which the sidecar may say that the weights cannot be had; it goes on trying, and stores have bad moments
ASK_EVERY_S = 1.0
ASK_S = 1.0  # for each step of an answer
MOST_ANSWER = 1 << 20

_UNPRINTABLE = re.compile(r"[^\S ]+|[^\x20-\U0010ffff]|[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_WAITING = ("failed", "waiting", "listing")  # phases of the sidecar in which nothing comes


def reason_of(agent: str, error: BaseException) -> str:
    """Why an agent could not be brought up, whatever its error does when it is written."""
    text = _text(error)
    if isinstance(error, SettingsError | WeightsError):
        return _line(text)
    kind = type(error).__name__
    said = explain(error) or next((line for line in text.splitlines() if line.strip()), "")
    return _line(f"the agent {agent} could not be brought up: {kind}{f': {said}' if said else ''}")


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
    return bounded(_UNPRINTABLE.sub(" ", masked(text)).strip(), MOST_REASON)


class SidecarWatch:
    """Asks the pod's sidecar what is wrong, for as long as a function waits for its weights, in a thread of its own."""

    def __init__(self, settings: WeightsSettings, is_waiting: Callable[[], bool], note: Callable[[str | None, float], object]) -> None:
        """is_waiting: asked before each look; the first no ends it. note: what is wrong, if anything is, and for how many seconds now."""
        self._uri, self._port = settings.uri, settings.port
        self._is_waiting = is_waiting
        self._note = note
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
            self._note(problem, now - since if since is not None else 0.0)

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
