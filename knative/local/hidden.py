"""Files of the user whose names are those of our packages: `python -m function` would run them, as it looks in its directory first."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

_OURS = ("function", "knative", "weights_cache")
_HOME = Path(__file__).parents[2]  # where they are


def hidden(argv: Sequence[str], cwd: Path | None) -> Path | None:
    """The file or folder in a process's directory that one of our packages is hidden by, if it runs one of them."""
    if not any(before == "-m" and word.partition(".")[0] in _OURS for before, word in pairwise(argv)):
        return None
    try:
        folder = cwd or Path.cwd()
        if folder.samefile(_HOME):
            return None
    except OSError:  # it is not there, which is found elsewhere
        return None
    candidates = [path for name in _OURS for path in (folder / name / "__init__.py", folder / f"{name}.py")]
    found = next((path for path in candidates if path.is_file()), None)
    return found.parent if found and found.name == "__init__.py" else found
