"""The events to come, in order."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappush

from knative.simulator.record import Steps

# What happens first of what happens at one time: a place is free before it is looked for, and a sample has what came before it.
ENDS, READIES, SAMPLES, COMES, EXPIRES = (kind << 48 for kind in range(5))


class Clock:
    """A heap of (when, kind + number, handler, about). Those of one time come in the order of their kind, then as they were made.

    Where it is hot, `_arrive` and `_serve` push onto it themselves.
    """

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Callable[..., None], object]] = []
        self.made = 0
        self.live = 0  # functions with requests to come, or on their way
        self.pods = Steps()  # of all functions

    def when(self, at: float, kind: int, handler: Callable[..., None], about: object = None) -> None:
        """Have `handler(at, about)` called at `at`."""
        self.made = made = self.made + 1
        heappush(self.heap, (at, kind + made, handler, about))
