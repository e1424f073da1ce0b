"""Settings as Kubernetes carries them: names and texts, read one by one with their bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from knative.autoscaler.errors import SpecError

MAX_INT32 = 2**31 - 1
NS_PER_S = 1_000_000_000
_MAX_INT64 = 2**63 - 1  # of nanoseconds: what a duration of Go can hold

# What Go's strconv and time packages accept, less the spellings nobody writes in a manifest (hexadecimal floats, inf, nan).
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DURATION_PART = re.compile(r"([0-9]*)(?:\.([0-9]*))?(ns|us|µs|μs|ms|s|m|h)")
_UNIT_NS = {"ns": 1, "us": 1_000, "µs": 1_000, "μs": 1_000, "ms": 1_000_000, "s": NS_PER_S, "m": 60 * NS_PER_S, "h": 3600 * NS_PER_S}
_FLAGS = {text: value for value, texts in ((True, "1 t T true TRUE True"), (False, "0 f F false FALSE False")) for text in texts.split()}

Value = TypeVar("Value", int, float)


def parse_duration_ns(text: str) -> int:
    """Nanoseconds of a duration as Go writes it: "6s", "1m30s", "1.5h", "-2ms", "0".

    Raises ValueError if `text` is anything else, or longer than 292 years. Digits below a nanosecond are cut off, as in Go.
    """
    sign = -1 if text.startswith("-") else 1
    rest = text[1:] if text[:1] in ("+", "-") else text
    if rest == "0":
        return 0
    total, at = 0, 0
    while part := _DURATION_PART.match(rest, at):
        whole, fraction, unit = part[1], part[2] or "", part[3]
        if not whole and not fraction:
            break
        total += int(whole or 0) * _UNIT_NS[unit] + int(fraction or 0) * _UNIT_NS[unit] // 10 ** len(fraction)
        at = part.end()
    if at == 0 or at < len(rest) or total > _MAX_INT64:
        raise ValueError(f"not a duration: {text!r}")
    return sign * total


def format_duration(ns: int) -> str:
    """The shortest of "90s", "2m" or "1h" that says `ns` exactly; for messages."""
    for unit in ("h", "m"):
        if ns and ns % _UNIT_NS[unit] == 0:
            return f"{ns // _UNIT_NS[unit]}{unit}"
    return f"{ns / NS_PER_S:g}s"


class Entries:
    """Texts by canonical name; each read converts one text and checks it, or gives the default where the name is absent.

    Every read raises SpecError when the text is malformed or out of bounds; its message has the name as it was written.
    """

    def __init__(self, written: Mapping[str, tuple[str, object]]) -> None:
        # canonical name -> (name as its author wrote it, value found there)
        self._written = written

    def __contains__(self, name: str) -> bool:
        return name in self._written

    def error(self, name: str, problem: str) -> SpecError:
        """An error about `name`, for checks that take more than one entry; the entry must be there."""
        return SpecError(*self._written[name], problem)

    def text(self, name: str, default: str, allowed: tuple[str, ...], other_spellings: Mapping[str, str] | None = None) -> str:
        """One of the `allowed` words, or another spelling of one."""
        if name not in self._written:
            return default
        text = self._text(name)
        text = (other_spellings or {}).get(text, text)
        if text not in allowed:
            raise self.error(name, f"must be {' or '.join(allowed)}")
        return text

    def any_text(self, name: str, default: str) -> str:
        """Any word but none at all."""
        if name not in self._written:
            return default
        if not (text := self._text(name)):
            raise self.error(name, "must not be empty")
        return text

    def flag(self, name: str, default: bool) -> bool:
        """A truth value in one of Go's spellings."""
        if name not in self._written:
            return default
        try:
            return _FLAGS[self._text(name)]
        except KeyError:
            raise self.error(name, "must be true or false") from None

    def whole(self, name: str, default: int, low: int = 0) -> int:
        """A whole number of at least `low` that fits 32 bits, as Knative keeps them."""
        return self._read(name, default, _to_whole, f"must be a whole number from {low} to {MAX_INT32}", lambda n: low <= n <= MAX_INT32)

    def number(
        self, name: str, default: float, *, low: float | None = None, above: float | None = None, high: float | None = None
    ) -> float:
        """A finite number with low <= number <= high and number > above, as far as these are given."""
        allowed = f"must be a number{_range_text(low, above, high, lambda n: f'{n:g}')}"
        return self._read(name, default, parse_number, allowed, lambda n: _in_range(n, low, above, high))

    def burst_capacity(self, name: str, default: float) -> float:
        """A target burst capacity: a number, where of the negative ones only -1 has a meaning (unlimited)."""
        return self._read(name, default, parse_number, "must be at least 0, or -1 for unlimited", lambda n: n >= 0 or n == -1)

    def duration_ns(
        self, name: str, default: int, *, low: int = 0, above: int | None = None, high: int | None = None, whole_seconds: bool = False
    ) -> int:
        """Nanoseconds with low <= duration <= high and duration > above, as far as these are given."""
        allowed = f"must be a duration{_range_text(low, above, high, format_duration)}{', in whole seconds' if whole_seconds else ''}"

        def fits(ns: int) -> bool:
            return _in_range(ns, low, above, high) and not (whole_seconds and ns % NS_PER_S)

        return self._read(name, default, parse_duration_ns, allowed, fits)

    def _read(self, name: str, default: Value, convert: Callable[[str], Value], allowed: str, fits: Callable[[Value], bool]) -> Value:
        if name not in self._written:
            return default
        try:
            value = convert(self._text(name))
        except ValueError:
            raise self.error(name, allowed) from None
        if not fits(value):
            raise self.error(name, allowed)
        return value

    def _text(self, name: str) -> str:
        value = self._written[name][1]
        if not isinstance(value, str):
            raise self.error(name, "must be a string: put it in quotes")
        return value


def _to_whole(text: str) -> int:
    if not _WHOLE.fullmatch(text) or len(text) > 20:  # longer ones are out of every bound, and slow to convert
        raise ValueError(text)
    return int(text)


def parse_number(text: str) -> float:
    """A finite decimal number. Raises ValueError if `text` is anything else."""
    if not _NUMBER.fullmatch(text) or not math.isfinite(number := float(text)):
        raise ValueError(f"not a finite number: {text!r}")
    return number


def _in_range(value: Value, low: Value | None, above: Value | None, high: Value | None) -> bool:
    return (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)


def _range_text(low: Value | None, above: Value | None, high: Value | None, show: Callable[[Value], str]) -> str:
    """The range in words, to go after the kind of value; where `above` is given, `low` says nothing more."""
    if above is not None:
        return f" above {show(above)}" + (f" and at most {show(high)}" if high is not None else "")
    if low is not None:
        return f" from {show(low)} to {show(high)}" if high is not None else f" of at least {show(low)}"
    return ""


def unknown_name(name: str, written: str, value: object, kind: str, known: Mapping[str, str]) -> SpecError:
    """An error for a `name` that nothing reads, `written` so, with the nearest of the `known` spellings (spelling -> canonical name)."""
    import difflib  # only ever needed to explain a mistake

    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {known[close[0]]}?" if close else f"known are {', '.join(sorted(set(known.values())))}"
    return SpecError(written, value, f"there is no such {kind}; {hint}")
