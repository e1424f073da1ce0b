"""Figures for people: with a unit, and as many digits as tell something."""

from collections.abc import Mapping

EXIT = 60  # characters of how one container ended
EXITS = 3  # containers of which it is said


def seconds(value: float | None) -> str:
    """A duration."""
    if value is None:
        return "-"
    return f"{value * 1000:.1f} ms" if value < 0.01 else f"{value * 1000:.0f} ms" if value < 0.1 else f"{value:.2f} s"


def size(count: int) -> str:
    """A number of bytes."""
    if count < 1000:
        return f"{count} B"
    scaled = count / 1000
    for unit in ("kB", "MB"):
        if round(scaled, 1) < 1000:
            return f"{scaled:.1f} {unit}"
        scaled /= 1000
    return f"{scaled:.1f} GB"


def restarts(counts: Mapping[str, int], exits: Mapping[str, str]) -> str:
    """How often the containers of a pod were started again, and how those that have ended did so last."""
    ends = [f"{container}: {ended if len(ended) <= EXIT else f'{ended[: EXIT - 1]}…'}" for container, ended in exits.items()]
    more = [f"{len(ends) - EXITS} more"] if len(ends) > EXITS else []
    return f"{sum(counts.values())}" + (f" ({', '.join([*ends[:EXITS], *more])})" if ends else "")
