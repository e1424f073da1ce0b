"""An agent's code: its module and what that imports, as far as it lies in the folders of FUNCTION_AGENT_PATH.

Import statements are followed as text, so nothing of it is run here; what is not found in these folders (libraries, Python's own modules,
our packages) is no part of it. It is a part of what a revision is: see rollout.py.
"""

import ast
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from importlib.util import cache_from_source
from pathlib import Path

MOST_FILES = 1000  # what is imported beyond them is not followed
MOST_BYTES = 8 << 20  # of a file that is read; of a larger one its stamp stands for what is in it
SHOWN = 3  # files in a message
_OURS = {"function", "weights_cache"}  # what a function has imported before it looks for its agent
_SUFFIXES = (*SOURCE_SUFFIXES, *EXTENSION_SUFFIXES)

Stamp = tuple[int, int, int] | None  # None: it is not there


@dataclass(frozen=True)
class Code:
    """What an agent consists of, as it was when it was read. Two are equal if the same is in their files."""

    digest: str
    agent: str = field(compare=False)
    folders: tuple[Path, ...] = field(compare=False)
    files: dict[Path, str] = field(compare=False, repr=False)  # with a digest of each
    stamps: dict[Path, Stamp] = field(compare=False, repr=False)  # of the files, and of folders in which others might come to be

    @classmethod
    def read(cls, agent: str, folders: Sequence[Path]) -> "Code":
        """The code of `package.module:Class`. A module that is not there, or cannot be read, has no files: the function says why."""
        files: dict[Path, str] = {}
        stamps: dict[Path, Stamp] = {}
        todo = [agent.partition(":")[0]]
        known = set(todo)
        while todo and len(files) < MOST_FILES:
            for module, file in _located(todo.pop(), folders, stamps):
                if file in files or not (stamp := _stamp(file)):
                    continue
                stamps[file] = stamp
                files[file], imports = _contents(file, stamp)
                new = {name for imported in imports for name in _absolute(imported, module, file)} - known
                known |= new
                todo += sorted(new)
        digest = hashlib.sha256(repr(sorted((str(file), text) for file, text in files.items())).encode()).hexdigest()
        return cls(digest, agent, tuple(folders), files, stamps)

    def now(self) -> "Code":
        """The same agent's code as it is now; this very object if nothing was touched."""
        if all(_stamp(path) == stamp for path, stamp in self.stamps.items()):
            return self
        found = Code.read(self.agent, self.folders)
        for file in found.files.keys() & self.files.keys():
            if found.files[file] != self.files[file] and _looks_alike(found.stamps[file], self.stamps[file]):
                _forget_compiled(file)
        return found

    def is_gone(self) -> bool:
        """Whether it is other code by now."""
        return self.now() != self

    def changed(self, new: "Code") -> list[str]:
        """The names of the files that are others in `new`, came to it or are gone."""
        paths = [path for path in self.files.keys() | new.files.keys() if self.files.get(path) != new.files.get(path)]
        return sorted(_shown(path, self.folders) for path in paths)


def listed(files: Sequence[str]) -> str:
    """The first of them, for a message."""
    return ", ".join(files[:SHOWN]) + (f" and {len(files) - SHOWN} more" if len(files) > SHOWN else "")


def _located(module: str, folders: Sequence[Path], stamps: dict[Path, Stamp]) -> Iterator[tuple[str, Path]]:
    """The files of a module and of the packages that it is in, with the name of each; `stamps` gets the folders that were looked into."""
    parts = module.split(".")
    if parts[0] in _OURS:
        return
    roots = list(folders)
    for number, part in enumerate(parts, 1):
        spaces = []
        for root in roots:
            stamps.setdefault(root, _stamp(root))
            candidates = [root / part / "__init__.py", *(root / f"{part}{suffix}" for suffix in _SUFFIXES)]
            if file := next((path for path in candidates if path.is_file()), None):
                yield ".".join(parts[:number]), file
                spaces = [root / part] if file == candidates[0] else []
                break
            if (root / part).is_dir():
                spaces.append(root / part)
        roots = spaces


@lru_cache(4 * MOST_FILES)
def _contents(file: Path, stamp: Stamp) -> tuple[str, tuple[tuple[int, str], ...]]:
    """A digest of what is in a file, and what it imports: (number of leading dots, name), which may be a module or something in one."""
    assert stamp
    if stamp[1] > MOST_BYTES:
        return repr(stamp), ()
    try:
        text = file.read_bytes()
    except OSError as error:
        return repr(error), ()
    imports: list[tuple[int, str]] = []
    with suppress(SyntaxError, ValueError, RecursionError, MemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are for whoever runs it
        for node in ast.walk(ast.parse(text)) if file.suffix in SOURCE_SUFFIXES else ():
            if isinstance(node, ast.Import):
                imports += [(0, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = f"{node.module}." if node.module else ""
                imports += [(node.level, base.rstrip(".")), *((node.level, base + alias.name) for alias in node.names)]
    return hashlib.sha256(text).hexdigest(), tuple(dict.fromkeys(imports))


def _absolute(imported: tuple[int, str], module: str, file: Path) -> Iterator[str]:
    """The name of what is imported, as seen from outside the package that `module` is in."""
    level, name = imported
    if not level:
        yield name
        return
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    if level <= len(package):
        yield ".".join([*package[: len(package) - level + 1], *filter(None, [name])])


def _stamp(path: Path) -> Stamp:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino


def _looks_alike(one: Stamp, other: Stamp) -> bool:
    """Whether Python takes what it has compiled of one file for the other's: it knows whole seconds, and the size."""
    return bool(one and other and (one[0] // 10**9, one[1]) == (other[0] // 10**9, other[1]))


def _forget_compiled(file: Path) -> None:
    with suppress(OSError, NotImplementedError):
        Path(cache_from_source(str(file))).unlink()


def _shown(path: Path, folders: Sequence[Path]) -> str:
    """Below the folder that it is in."""
    return next((str(path.relative_to(folder)) for folder in folders if path.is_relative_to(folder)), str(path))
