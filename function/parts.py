"""A batch that is computed in parts of like sizes, for an agent that tells how large its inputs are.

The batch is the one that would be computed without that, and its parts are computed one after another before anything else of their class
is: nobody waits longer than the whole batch would have taken, as it was measured, and nobody is overtaken by who came after it was full.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from function.cost import SizedCost, padded
from function.priority import Priority

if TYPE_CHECKING:
    from function.batcher import Call

Sizes = Sequence[float | None]  # of inputs; None of one that is not known


@dataclass(frozen=True)
class Slice:
    """The part of a call that is in a batch."""

    call: "Call"
    inputs: Sequence[Any]
    is_first: bool  # of a call that is in several batches
    at: Sequence[int] | None = None  # the inputs' places in the call; None if they are the next ones


Taken = tuple["Call", int, int]  # a call, and its inputs in a batch: from which on and up to which


class Parts:
    """What was taken from the queue and is not computed yet; used by the model's thread alone."""

    def __init__(self) -> None:
        self.measure: Callable[[Sequence[Any]], Sizes] | None = None  # how large inputs are, if the agent tells it
        self.was_cut = False  # the last batch
        self._waiting: tuple[deque[list[Slice]], deque[list[Slice]]] = deque(), deque()  # by priority
        self._cost = SizedCost()
        self._padded: float | None = None  # what the last part took in units of size, if the sizes of its inputs are known

    def __bool__(self) -> bool:
        return any(self._waiting)

    def of(self, priority: Priority) -> bool:
        """Whether there are any of this class."""
        return bool(self._waiting[priority])

    @property
    def fixed_s(self) -> float | None:
        """The fixed part of what a batch takes; None where sizes are not known."""
        return None if self._padded is None else self._cost.fixed_s

    def add(self, priority: Priority, taken: Sequence[Taken]) -> None:
        """What one batch is made of, whose parts are then the next of its class."""
        if self.measure is None:
            self._waiting[priority].append([Slice(call, call.inputs[start:stop], start == 0) for call, start, stop in taken])
            return
        self._tell_sizes([call for call, _, _ in taken if call.sizes is None])
        places = [(call, place) for call, start, stop in taken for place in (call.order or range(len(call.inputs)))[start:stop]]
        sizes = [call.sizes[place] for call, place in places if call.sizes is not None]
        known = [size for size in sizes if size is not None]
        parts = self._cost.parts(known) if len(known) == len(places) else [list(range(len(places)))]
        self.was_cut = len(parts) > 1
        begun = {call for call, start, _ in taken if start}
        for part in parts:
            of_calls: dict[Call, list[int]] = {}
            for number in part:
                call, place = places[number]
                of_calls.setdefault(call, []).append(place)
            slices = [Slice(call, [call.inputs[place] for place in at], call not in begun, at) for call, at in of_calls.items()]
            begun.update(of_calls)
            self._waiting[priority].append(slices)

    def next(self, priority: Priority, now: float) -> list[Slice]:
        """The part of this class that is next, without those who do not wait any more; empty if there is none."""
        while self._waiting[priority]:
            slices = [part for part in self._waiting[priority].popleft() if not part.call.is_over(now)]
            if slices:
                self._padded = _padded(slices)
                return slices
        return []

    def computed(self, seconds: float) -> None:
        """How long the last part took."""
        if self._padded and seconds > 0:
            self._cost.add(self._padded, seconds)

    def _tell_sizes(self, calls: Sequence["Call"]) -> None:
        """Ask the agent, once for each input; the inputs of a long call are then taken in the order of their sizes, largest first."""
        assert self.measure
        sizes = iter(self.measure([item for call in calls for item in call.inputs]))
        for call in calls:
            call.sizes = found = [next(sizes) for _ in call.inputs]
            known = [size for size in found if size is not None]
            if len(found) == len(known) > 1:
                call.order = sorted(range(len(known)), key=known.__getitem__, reverse=True)


def _padded(slices: Sequence[Slice]) -> float | None:
    """What a batch of these takes, in units of size; None if one is not known."""
    found: list[float] = []
    for part in slices:
        for place in part.at or ():
            size = part.call.sizes[place] if part.call.sizes else None
            if size is None:
                return None
            found.append(size)
    return padded(found) if found else None
