"""What batches cost, as it was measured of late, and which inputs of unlike sizes are best computed together."""

import math
from collections.abc import Sequence

_MOST_CUTS = 31  # that are tried in one batch, so that to choose them takes well below a millisecond
_TELLING = 1e-3  # the variance, relative to the squares, from which on a line says what is fixed and what is not
_WORTH_A_TRY = 0.25  # the share of padding from which on a batch is cut in two to learn what that saves
_SLACK = 0.01  # of a batch's time, that a cut has to save beside the fixed part
_WINDOW = 8  # inputs that are sorted, at least
_NEARLY = 1.15  # how much longer than the best plan one may take that sorts fewer


class Recent:
    """The average of what was seen of late (exponentially weighted); 0 before anything was."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, seen: float) -> None:
        """One more."""
        self.value += (0.2 if self.value else 1.0) * (seen - self.value)


class Cost:
    """What batches of late took, as a fixed part and one for each input: a line through them (least squares, exponentially weighted)."""

    def __init__(self) -> None:
        self._means: list[float] | None = None  # of inputs, seconds, inputs², inputs · seconds

    def add(self, inputs: int, seconds: float) -> None:
        """One more batch."""
        self._means = _mixed(self._means, (inputs, seconds, inputs * inputs, inputs * seconds), 0.1)

    @property
    def mean_s(self) -> float:
        """All of it; inf before there was any."""
        return self._means[1] if self._means else math.inf

    @property
    def fixed_s(self) -> float:
        """The fixed part; all of it while nothing tells the two apart."""
        if not self._means:
            return math.inf
        inputs, seconds, squares, products = self._means
        variance = squares - inputs * inputs
        if variance < _TELLING * squares:
            return seconds
        return min(max(seconds - (products - inputs * seconds) / variance * inputs, 0.0), seconds)


class SizedCost:
    """The same for batches whose inputs are padded to the longest: a fixed part and one for each unit of `padded` size.

    The line has the least relative errors (those of least squares belong to the largest batches), as what it is asked for is whether
    small ones are better.
    """

    def __init__(self) -> None:
        self._means: list[float] | None = None  # of 1/s, p/s, 1/s², p/s², p²/s², for p padded and s seconds

    def add(self, padded: float, seconds: float) -> None:
        """One more batch. seconds: above 0."""
        one, each = 1 / seconds, padded / seconds
        self._means = _mixed(self._means, (one, each, one * one, one * each, each * each), 0.05)

    def line(self) -> tuple[float, float] | None:
        """Seconds that are fixed, and seconds for each unit; None while nothing tells the two apart."""
        if not self._means:
            return None
        one, each, ones, both, eaches = self._means
        determinant = ones * eaches - both * both
        if determinant < _TELLING * ones * eaches:
            return None
        fixed_s, each_s = (one * eaches - each * both) / determinant, (each * ones - one * both) / determinant
        if fixed_s < 0:
            return 0.0, each / eaches
        return (fixed_s, each_s) if each_s > 0 else (one / ones, 0.0)

    @property
    def fixed_s(self) -> float:
        """The fixed part; inf while nothing tells it."""
        line = self.line()
        return line[0] if line else math.inf

    def parts(self, sizes: Sequence[float]) -> list[list[int]]:
        """The indices of these inputs, which are in the order they came in, cut into the batches that they are best computed in.

        Only neighbours are sorted by size, as few of them as bring most of what there is to gain: who is computed long before those that
        came before him makes them wait, and next time it is he who waits. While it is not known what is fixed, much padding is worth a
        try: it is cut in two.
        """
        count, padding = len(sizes), padded(sizes) - sum(sizes)
        line = self.line()
        if line is None:
            is_worth_a_try = self._means is not None and padding > _WORTH_A_TRY * padded(sizes)
            by_size = sorted(range(count), key=sizes.__getitem__)
            return sorted(map(sorted, (by_size[: count // 2], by_size[count // 2 :]))) if is_worth_a_try else [list(range(count))]
        fixed_s, each_s = line
        whole_s = fixed_s + each_s * padded(sizes)
        plans: list[tuple[float, list[list[int]]]] = []  # seconds, and the parts; the fewer are sorted, the earlier
        width = _WINDOW
        while padding * each_s > fixed_s and (width < count or not plans):  # else less is to be gained than one more batch costs
            windows = [range(start, min(start + width, count)) for start in range(0, count, width)]
            cut = [_alike(sizes, window, fixed_s + _SLACK * whole_s, each_s) for window in windows]
            plans.append((sum(seconds for seconds, _ in cut), [part for _, parts in cut for part in parts]))
            width *= 2
        plans.append((whole_s, [list(range(count))]))
        least_s = min(plans)[0]
        return next(parts for seconds, parts in plans if seconds <= _NEARLY * least_s)


def padded(sizes: Sequence[float]) -> float:
    """What a batch of these takes, in units of size, if each is padded to the largest."""
    return len(sizes) * max(sizes)


def _alike(sizes: Sequence[float], which: Sequence[int], fixed_s: float, each_s: float) -> tuple[float, list[list[int]]]:
    """These inputs in parts of like sizes that take the least time together, and that time. The largest steps in size are tried as cuts.

    Each part is in the order of the inputs, and so are the parts, by their first.
    """
    by_size = sorted(which, key=sizes.__getitem__)
    ordered = [sizes[index] for index in by_size]
    steps = sorted((at for at in range(1, len(ordered)) if ordered[at] > ordered[at - 1]), key=lambda at: ordered[at - 1] - ordered[at])
    edges = [0, *sorted(steps[:_MOST_CUTS]), len(ordered)]
    best: list[tuple[float, int]] = [(0.0, 0)]  # up to each edge: seconds, and the number of the edge where its last part begins
    for end in edges[1:]:
        largest_s = each_s * ordered[end - 1]
        best.append(min((best[at][0] + fixed_s + (end - edges[at]) * largest_s, at) for at in range(len(best))))
    parts, at = [], len(edges) - 1
    while at:
        begins = best[at][1]
        parts.append(sorted(by_size[edges[begins] : edges[at]]))
        at = begins
    return best[-1][0], sorted(parts)


def _mixed(means: list[float] | None, seen: Sequence[float], share: float) -> list[float]:
    """The means with so large a share of what was seen last."""
    return [mean + share * (value - mean) for mean, value in zip(means or seen, seen, strict=True)]
