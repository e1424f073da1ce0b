"""What a sink's answer means for the message: pure decisions, which Knative's own rules for retries are the model of."""

import random
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from enum import Enum, auto

LONGEST_RETRY_AFTER_S = 600.0  # a sink that asks for more is asked again by then
LONGEST_PAUSE_S = 10.0  # between two looks whether a sink that said nothing is back


class Verdict(Enum):
    """What becomes of a message."""

    DONE = auto()  # deleted
    BUSY = auto()  # kept, and tried again; nothing else is pulled
    FAILED = auto()  # given back, with growing delays
    POISON = auto()  # given back, for the redrive policy


def of_status(status: int) -> Verdict:
    """The verdict of an answer's status. Retryable are those that Knative Eventing retries; a redirection is a mistake of the sink's."""
    if 200 <= status < 300:
        return Verdict.DONE
    if status in (429, 503):
        return Verdict.BUSY
    if status in (404, 408, 409) or not 400 <= status < 500:
        return Verdict.FAILED
    return Verdict.POISON


def retry_after_s(value: str | None, date: str | None, now: float) -> float | None:
    """The seconds that a Retry-After header asks for; None if there is none that makes sense.

    A date is compared with the answer's own Date, so that no clock of ours matters, or else with `now` (seconds since the epoch).
    """
    if not value:
        return None
    if value.strip().isdecimal():
        seconds = float(value)
    else:
        try:
            seconds = parsedate_to_datetime(value).timestamp()
        except (ValueError, OverflowError):
            return None
        try:
            seconds -= parsedate_to_datetime(date or "").timestamp()
        except (ValueError, OverflowError):
            seconds -= now
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)


def pause_s(tries: int, asked_s: float | None, chance: Callable[[float, float], float] = random.uniform) -> float:
    """Seconds until a busy sink is asked again, after so many tries (1 is the first).

    A little more than it asked for, so that not all come at once; without a word from it from 0.1 s on, doubling.
    """
    if asked_s is not None:
        return max(asked_s, 0.1) * chance(1.0, 1.2)
    return min(0.1 * 2.0 ** min(tries - 1, 20), LONGEST_PAUSE_S) * chance(0.8, 1.2)


def backoff_s(receives: int, first_s: float, most_s: float, chance: Callable[[float, float], float] = random.uniform) -> float:
    """Seconds until a failed message comes back: doubled with each receive, and half of it by chance."""
    return min(first_s * 2.0 ** min(receives - 1, 32), most_s) * chance(0.5, 1.0)
