"""What is told of things that come again and again: the first at once, the rest as a number."""

import re
from collections import Counter, OrderedDict
from dataclasses import dataclass

from knative.local.outcomes import POD, SPAN_S, Outcomes, Source, is_error, name

# What the platform's own errors say of a Service.
_MEANINGS = {"502": "the pod died with the request", "503": "no pod could be started or had room", "504": "it took too long"}
KEPT = 256  # events that are remembered as told
_CHANGING = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{6,}\b|\d+", re.IGNORECASE)  # numbers, and names made of them


class ErrorSeries:
    """The errors of one Service in words: when the first comes, once a minute how many it were, and when there are no more."""

    def __init__(self, outcomes: Outcomes) -> None:
        self._outcomes = outcomes
        self._told_at: float | None = None  # while there are errors
        self._answers = 0  # when last told
        self._errors: Counter[tuple[int, Source]] = Counter()  # likewise
        self._before = 0  # errors before the series

    def look(self, now: float) -> str | None:
        """What there is to tell now; to be asked each second or so."""
        is_more = self._outcomes.errors > self._errors.total()
        if self._told_at is None:
            if not is_more:
                return None
            self._before = self._errors.total()
            new, _ = self._take(now)
            return f"callers get errors: {in_words(new)}"
        if now - self._told_at < SPAN_S:
            return None
        if is_more:
            new, answers = self._take(now)
            return f"callers still get errors: {in_words(new)}; {new.total()} of the last minute's {answers} answers"
        self._told_at = None
        return f"callers get no errors any more, {self._errors.total() - self._before} in all"

    def _take(self, now: float) -> tuple[Counter[tuple[int, Source]], int]:
        """The errors and the answers since it was last told of any."""
        errors = Counter({key: count for key, count in self._outcomes.counts.items() if is_error(key[0])})
        new, answers = errors - self._errors, self._outcomes.answers - self._answers
        self._told_at, self._answers, self._errors = now, self._outcomes.answers, errors
        return new, answers


def in_words(errors: Counter[tuple[int, Source]]) -> str:
    """Which errors there were, and who made them."""
    return ", ".join(f"{count} × {origin(name(code), source)}" for (code, source), count in errors.most_common(4))


def origin(code: str, source: str) -> str:
    """A status with who made the answer; where that was the platform, with what it stands for: the fault is not the platform's."""
    if source == POD:
        return f"{code} from the function"
    return f"{code} ({_MEANINGS[code]})" if code in _MEANINGS else f"{code} from the platform"


@dataclass
class _Told:
    at: float
    again: int = 0


class Repeats:
    """Decides which of many events are told: the first of its kind at once, others of the same kind once a minute, with their number."""

    def __init__(self) -> None:
        self._told: OrderedDict[tuple[str, str], _Told] = OrderedDict()

    def add(self, now: float, subject: str, text: str) -> str | None:
        """One more event: what is to be told of it. Texts that differ in numbers alone are the same."""
        key = subject, _CHANGING.sub("#", text)
        if (told := self._told.get(key)) and now - told.at < SPAN_S:
            told.again += 1
            return None
        again = told.again if told else 0
        self._told[key] = _Told(now)
        self._told.move_to_end(key)
        if len(self._told) > KEPT:
            self._told.popitem(last=False)
        if not told or not again:
            return text
        first, *rest = text.split("\n", 1)
        return "\n".join([f"{first} ({again + 1} times within {now - told.at:.0f} s)", *rest])

    def forget(self, subject: str) -> None:
        """Whatever comes next of this subject is news."""
        for key in [key for key in self._told if key[0] == subject]:
            del self._told[key]
