"""Amounts as Kubernetes writes them: 2, "500m", "1.5Gi"."""

import re

_SUFFIXES = (
    {"n": 1e-9, "u": 1e-6, "m": 1e-3}
    | {sign: 1000.0**power for power, sign in enumerate("kMGTPE", 1)}
    | {f"{sign}i": 1024.0**power for power, sign in enumerate("KMGTPE", 1)}
)


def parse(found: object) -> float:
    """The number that a quantity stands for. Raises ValueError."""
    match = re.fullmatch(r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+|[a-zA-Z]*)", str(found))
    if isinstance(found, bool) or not isinstance(found, str | int | float) or not match:
        raise ValueError("must be a quantity that is not negative, as 2, 500m or 1.5Gi")
    number, suffix = match.groups()
    if suffix[1:] and suffix[0] in "eE":  # an exponent; a bare E is exa
        return float(number + suffix)
    if suffix and suffix not in _SUFFIXES:
        raise ValueError(f"there is no suffix {suffix!r}; there are {', '.join(_SUFFIXES)}")
    return float(number) * _SUFFIXES.get(suffix, 1.0)


def show_bytes(amount: float) -> str:
    """A number of bytes for people, in the unit that manifests have."""
    for suffix, size in (("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)):
        if amount >= size:
            return f"{amount / size:.4g}{suffix}"
    return f"{amount:g}"
