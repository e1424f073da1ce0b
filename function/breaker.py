"""The circuit breaker: after so many time-outs in a row callers are told at once, until a trial call comes back.

Libraries for this wrap the call that fails. Here the caller's wait and the model's work are in different threads, a call counts only when
the server's own deadline ended it, and a trial may end undecided (its caller left); so this is the bare state machine
(Nygard, Release It!, 2007): closed → open → half-open → closed or open.
"""

import threading
import time
from collections.abc import Callable

from function.errors import Unavailable


class Breaker:
    """One model's; called from any thread."""

    def __init__(self, threshold: int, reset_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """threshold: time-outs in a row that trip it; reset_s: how long it stays open before a call is tried."""
        self.trips = 0
        self._threshold = threshold
        self._reset_s = reset_s
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows, and `trips`
        self._timeouts = 0  # in a row
        self._opened_at: float | None = None
        self._is_trying = False

    @property
    def state(self) -> str:
        """closed, open or half-open."""
        if self._opened_at is None:
            return "closed"
        return "open" if self._clock() < self._opened_at + self._reset_s else "half-open"

    def check(self) -> None:
        """Raises Unavailable if a call that came now would be refused."""
        with self._lock:
            self._check()

    def admit(self) -> bool:
        """Let a call through, and say whether it is the trial, the first one when half-open. Raises Unavailable.

        Each call that was admitted is to be `ended`.
        """
        with self._lock:
            self._check()
            self._is_trying = self._opened_at is not None
            return self._is_trying

    def _check(self) -> None:
        state = self.state
        if self._opened_at is not None and (state == "open" or self._is_trying):
            left_s = self._opened_at + self._reset_s - self._clock() if state == "open" else 1.0
            raise Unavailable(
                f"the last {self._threshold} calls of the model timed out; it is tried again from time to time (FUNCTION_BREAKER_RESET_S)",
                retry_after_s=left_s,
            )

    def ended(self, *, is_trial: bool, in_time: bool | None) -> None:
        """How an admitted call ended: the model answered (with whatever), it timed out, or (None) its caller gave up before."""
        with self._lock:
            self._is_trying = self._is_trying and not is_trial
            if in_time:
                self._timeouts, self._opened_at = 0, None
            elif in_time is False:
                self._timeouts += 1
                if is_trial or (self._opened_at is None and self._timeouts >= self._threshold):
                    self._opened_at = self._clock()
                    self.trips += 1
