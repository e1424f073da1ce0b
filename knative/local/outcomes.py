"""How requests end: by the status that their callers were answered with, and by who made the answer."""

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any, Literal

# Who made an answer: the function's pod, or the platform in its place.
Source = Literal["pod", "activator"]
POD: Source = "pod"
ACTIVATOR: Source = "activator"

GONE = 499  # as nginx has it: the caller went away before there was an answer
SPAN_S = 60  # what "lately" is, in whole seconds
FAILING = 0.05  # of the last minute's answers; a Service with more errors than that is not well
REVISIONS = 64  # of so many it is known what their callers got; the one that came first gives way

# There from the start, as a counter that appears with its first error has not increased for those who watch its rate.
_USUAL: tuple[tuple[int, Source], ...] = ((200, POD), (500, POD), (502, ACTIVATOR), (503, ACTIVATOR), (504, ACTIVATOR))
_OTHER = 0  # whatever is no status of HTTP


def is_error(code: int) -> bool:
    """Whether a status says that the Service failed its caller, as opposed to a caller who asked for something wrong or went away."""
    return code >= 500 or code == _OTHER


def name(code: int) -> str:
    """The status as a label: at most 501 of them, whatever pods answer."""
    return str(code) if code else "other"


class Outcomes:
    """The tally of one Service. Everything here runs in one event loop; `now` is on its clock, or any other that only goes forward."""

    def __init__(self) -> None:
        self.answers = 0  # without those that nobody waited for any more
        self.errors = 0
        self._last_error: tuple[int, Source, str, float] | None = None
        self.counts: Counter[tuple[int, Source]] = Counter(dict.fromkeys(_USUAL, 0))
        self._revisions: dict[str, Counter[tuple[int, Source]]] = {}
        self._seconds: deque[tuple[int, list[int], Counter[tuple[int, Source]]]] = deque(maxlen=SPAN_S + 1)
        self._second = -1

    def add(self, now: float, code: int, source: Source, revision: str = "") -> None:
        """One request more that is over."""
        if not 100 <= code <= 599:
            code = _OTHER
        counts = self._revisions.get(revision)
        if counts is None:
            counts = self._meet(revision)
        counts[code, source] += 1
        self.counts[code, source] += 1
        if code == GONE:
            return
        self.answers += 1
        if (second := int(now)) != self._second:
            self._second = second
            self._seconds.append((second, [0], Counter()))
        _, answers, errors = self._seconds[-1]
        answers[0] += 1
        if code >= 500 or code == _OTHER:
            self.errors += 1
            errors[code, source] += 1
            self._last_error = code, source, revision, time.time()

    def _meet(self, revision: str) -> Counter[tuple[int, Source]]:
        if len(self._revisions) >= REVISIONS:
            del self._revisions[next(iter(self._revisions))]
        return self._revisions.setdefault(revision, Counter(dict.fromkeys(_USUAL, 0)))

    def of(self, revision: str) -> Mapping[tuple[int, Source], int]:
        """What the callers of one revision got; nothing if it is not known any more."""
        return self._revisions.get(revision, {})

    def by_code(self) -> Counter[int]:
        """How many answers there were with each status."""
        found: Counter[int] = Counter()
        for (code, _), count in self.counts.items():
            found[code] += count
        return found

    def lately(self, now: float) -> tuple[int, Counter[tuple[int, Source]]]:
        """Answers of the last minute, and those of them that are errors, by status and by who made them."""
        since, answers, errors = int(now) - SPAN_S, 0, Counter[tuple[int, Source]]()
        for second, count, found in self._seconds:
            if second > since:
                answers += count[0]
                errors.update(found)
        return answers, errors

    def status(self, now: float) -> dict[str, Any]:
        """What it adds to a Service's entry in `/api/status`."""
        answers, errors = self.lately(now)
        lately = errors.total()
        return {
            "answers": {name(code): count for code, count in sorted(self.by_code().items()) if count},
            "errors": {
                "total": self.errors,
                "codes": _listed(self.counts, errors_only=True),
                "last": self._describe_last(),
                "last_minute": {
                    "answers": answers,
                    "errors": lately,
                    "rate": round(lately / answers, 4) if answers else None,
                    "codes": _listed(errors),
                },
                "failing": lately > FAILING * answers,
                "revisions": {revision: failed for revision, counts in self._revisions.items() if (failed := _errors(counts))},
            },
        }

    def _describe_last(self) -> dict[str, Any] | None:
        if not self._last_error:
            return None
        code, source, revision, at = self._last_error
        return {"code": name(code), "source": source, "revision": revision, "time": round(at, 3)}


def _errors(counts: Mapping[tuple[int, Source], int]) -> int:
    return sum(count for (code, _), count in counts.items() if is_error(code))


def _listed(counts: Mapping[tuple[int, Source], int], *, errors_only: bool = False) -> list[dict[str, Any]]:
    """The most frequent first."""
    found = sorted((-count, code, source) for (code, source), count in counts.items() if count and (is_error(code) or not errors_only))
    return [{"code": name(code), "source": source, "count": -count} for count, code, source in found]
