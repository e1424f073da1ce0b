"""The knobs of a policy, as its user sets them: NAME=VALUE, each read once with its bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from knative.autoscaler.entries import parse_duration_ns
from knative.simulator.errors import PolicyError


class Knobs:
    """Texts by name. Each read gives the value or the default, and raises PolicyError where it is malformed or out of bounds."""

    def __init__(self, policy: str, settings: Mapping[str, str]) -> None:
        self._policy = policy
        self._settings = settings
        self._known: list[str] = []

    def number(self, name: str, default: float, *, low: float = 0.0, above: float | None = None, high: float = math.inf) -> float:
        """A number with low <= number <= high and number > above."""
        text = self._text(name)
        if text is None:
            return default
        value = _parsed(float, text)
        if not (math.isfinite(value) and low <= value <= high and (above is None or value > above)):
            least = f"above {above:g}" if above is not None else f"at least {low:g}"
            raise self.error(name, f"must be a number {least}{f' and at most {high:g}' if high < math.inf else ''}")
        return value

    def whole(self, name: str, default: int, *, low: int = 0) -> int:
        """A whole number of at least `low`."""
        text = self._text(name)
        if text is None:
            return default
        value = _parsed(int, text)
        if not value >= low:
            raise self.error(name, f"must be a whole number of at least {low}")
        return int(value)

    def seconds(self, name: str, default: float, *, above: float | None = None) -> float:
        """Seconds, written as a number of them or as Go writes a duration ("1m30s")."""
        text = self._text(name)
        if text is None:
            return default
        value = _parsed(float, text)
        if math.isnan(value):
            value = _parsed(parse_duration_ns, text) / 1e9
        if not (math.isfinite(value) and value >= 0 and (above is None or value > above)):
            raise self.error(name, f'must be a duration ("90s", "5m") {"of at least 0" if above is None else f"above {above:g}"}')
        return value

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of the allowed words."""
        text = self._text(name)
        if text is not None and text not in allowed:
            raise self.error(name, f"must be {' or '.join(allowed)}")
        return default if text is None else text

    def bounds(self, least: int, most: int) -> tuple[int, int]:
        """The knobs `min`, which is at least `least`, and `max`, pods."""
        low, high = self.whole("min", least, low=least), self.whole("max", most, low=1)
        if low > high:
            raise self.error("max" if "max" in self._settings else "min", f"min ({low}) must be at most max ({high})")
        return low, high

    def error(self, name: str, problem: str) -> PolicyError:
        """About one of them."""
        return PolicyError(f"{self._policy}: {name} = {self._settings[name]!r}, {problem}")

    def done(self) -> None:
        """To be called when all have been read: raises PolicyError for a name that nobody asked for."""
        for name in self._settings:
            if name not in self._known:
                known = f"known are {', '.join(self._known)}" if self._known else "it has none"
                raise PolicyError(f"{self._policy}: {name} = {self._settings[name]!r}, there is no such knob; {known}")

    def _text(self, name: str) -> str | None:
        self._known.append(name)
        return self._settings.get(name)


def _parsed(parse: Callable[[str], float], text: str) -> float:
    """Not a number if it is none, which is within no bounds."""
    try:
        return parse(text)
    except ValueError:
        return math.nan
