"""How many threads a library may compute with."""

import os
from pathlib import Path


def threads(wanted: int) -> int:
    """What FUNCTION_TORCH_THREADS wants; 0 is what the container may use, as more than cores make a busy machine several times slower."""
    return wanted or cpu_limit()


def cpu_limit(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Whole CPUs that the container may use by its cgroup (v2), at least 1; without a limit 1."""
    try:
        quota, period = file.read_text().split()
        return max(1, min(int(quota) // int(period), os.cpu_count() or 1))
    except (OSError, ValueError):
        return 1
