"""How many threads a library may compute with."""

import os
from pathlib import Path

_SPINS = 1000  # some 0.02 ms: about as long as there is between two parts of a pass that are computed in parallel


def threads(wanted: int) -> int:
    """What FUNCTION_TORCH_THREADS wants; 0 is what the container may use, as more than cores make a busy machine several times slower."""
    return wanted or cpu_limit()


def limit_waiting() -> None:
    """Have threads of OpenMP, as torch has them, sleep soon where they wait for each other; before it is loaded, as it reads this then.

    By itself each spins for milliseconds. Where its partner has no core at that time that is half of all the work, and takes the core from
    whoever is waited for. What the environment says of it holds.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(_SPINS)


def cpu_limit(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Whole CPUs that the container may use by its cgroup (v2), at least 1; without a limit 1."""
    try:
        quota, period = file.read_text().split()
        return max(1, min(int(quota) // int(period), os.cpu_count() or 1))
    except (OSError, ValueError):
        return 1
