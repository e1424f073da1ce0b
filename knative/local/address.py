"""Where a running platform is found: a small file in its state directory that names its admin port."""

import json
from collections.abc import Callable
from pathlib import Path

DEFAULT_ADMIN = "http://127.0.0.1:8081"
NAME = "platform.json"


def announce(state_dir: Path, admin: str) -> Callable[[], None]:
    """Write down where the admin port is; returns what takes it back. A platform that is killed leaves it, and the next overwrites it."""
    path = state_dir / NAME
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"admin": admin}))
    new.replace(path)
    return lambda: path.unlink(missing_ok=True)


def find(state_dir: Path) -> str:
    """The admin address of the platform that uses this state directory, or the usual one if none says so."""
    try:
        return str(json.loads((state_dir / NAME).read_text())["admin"])
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT_ADMIN
