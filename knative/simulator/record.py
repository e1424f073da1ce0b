"""Quantities over time: integrals of what changes in steps, and their course at a bounded resolution."""

from __future__ import annotations

import numpy as np

from knative.simulator.result import Series

SERIES_POINTS = 2_048
COLUMNS = ("load", "queue", "pods", "ready", "wanted")


class Steps:
    """A number that changes in steps, and its integral over time."""

    __slots__ = ("_area", "_since", "most", "value")

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.most = value
        self._area = 0.0
        self._since = 0.0

    def set(self, now: float, value: int) -> None:
        """It is `value` from now on."""
        self._area += self.value * (now - self._since)
        self._since = now
        self.value = value
        if value > self.most:
            self.most = value

    def integral(self, now: float) -> float:
        """Value x seconds up to now."""
        return self._area + self.value * (now - self._since)


class Course:
    """The integrals of COLUMNS per step of time. When there are too many steps, each two become one."""

    def __init__(self) -> None:
        self.step_s = 1.0
        self._begins: list[float] = []
        self._rows: list[tuple[float, ...]] = []
        self._last_s = 0.0
        self._last = (0.0,) * len(COLUMNS)

    def add(self, now: float, integrals: tuple[float, ...]) -> float:
        """Close a step at `now`, given the integrals since the start; when to close the next one."""
        self._begins.append(self._last_s)
        self._rows.append(tuple(new - old for new, old in zip(integrals, self._last, strict=True)))
        self._last_s, self._last = now, integrals
        if len(self._rows) == SERIES_POINTS:
            self._rows = [tuple(map(sum, zip(*pair, strict=True))) for pair in zip(self._rows[::2], self._rows[1::2], strict=True)]
            self._begins = self._begins[::2]
            self.step_s *= 2
        return now + self.step_s

    def series(self, now: float, integrals: tuple[float, ...]) -> Series:
        """All of it; `now` is the end."""
        if now > self._last_s:
            self.add(now, integrals)
        begins = np.array(self._begins)
        steps = np.diff(np.append(begins, self._last_s))
        rows = np.array(self._rows).reshape(len(begins), len(COLUMNS)) / steps[:, None]
        return Series(begins, steps, **dict(zip(COLUMNS, rows.T, strict=True)))
