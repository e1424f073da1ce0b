"""Imports made ahead of need, for processes that are forked; and what a function that is ready tells of its own.

A library is imported once, in a process that nobody calls, and every fork has it. That must not be noticed, so after each import there is
a look at what a fork would carry along: threads, which it would lack, signal handlers, files, changed variables, and the like. A library
that leaves anything behind is left out: the process is of no use any more, and whoever started it starts another one without that library.

Which variables are read meanwhile is noted: a function that has others than this process had is no fork of it.
"""

import ast
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from function.generators import Generators
from function.import_traces import OURS, Attributes, reads, state
from weights_cache.environment import is_secret

FILE = "RELIGHT_IMPORTS_FILE"  # where a function is to tell what it has imported; given by the local platform
# What native code of libraries reads when it is loaded, which cannot be seen; besides names that begin with the library's own.
_READ_BY_NATIVE_CODE = {
    "cv2": ("OPENCV_",),
    "jaxlib": ("JAX_", "XLA_"),
    "onnxruntime": ("ORT_",),
    "pyarrow": ("ARROW_",),
    "tensorflow": ("TF_", "XLA_"),
    "tokenizers": ("RAYON_",),
    "transformers": ("HF_", "HUGGINGFACE_"),
}


# What this process has imported


def site_of(file: str | None) -> str | None:
    """The folder of installed packages that a file lies in; None for our own code, the user's, and Python's."""
    for name in ("site-packages", "dist-packages"):
        head, found, _ = (file or "").partition(f"{os.sep}{name}{os.sep}")
        if found:
            return f"{head}{os.sep}{name}"
    return None


def imported(besides: Iterable[str] = ()) -> list[str]:
    """The modules of libraries and of ours that are there, in the order in which they came, without those of `besides`."""
    known = set(besides)
    return [name for name, module in list(sys.modules.items()) if name not in known and _is_found_again(name, module)]


def _is_found_again(name: str, module: object) -> bool:
    """Whether a module comes from a file of a library or of ours, and importing this name would bring the same."""
    try:
        spec: Any = getattr(module, "__spec__", None)
        if spec is None or spec.name != name:  # not what Python knows as that name
            return False
        origin = spec.origin
    except Exception:  # noqa: BLE001  it stands for a module that is not there yet, and cannot be had
        return False
    return isinstance(origin, str) and (site_of(origin) is not None or name.partition(".")[0] in OURS)


# What a function tells


_file: str | None = None
inherited: frozenset[str] = frozenset()  # the modules that this process was forked with; none in a fresh one


def expect() -> None:
    """Take what the local platform has said out of the environment, before anything else reads that. Later: `tell`."""
    global _file
    _file = os.environ.pop(FILE, None)


def tell() -> None:
    """Tell the local platform what this function has imported, if it wants to know; called once the agent is ready."""
    if _file:
        text = json.dumps({"fresh": not inherited, "modules": imported(inherited)})
        with suppress(OSError):  # the platform is gone, or its disk is full
            Path(f"{_file}.new").write_text(text)
            Path(f"{_file}.new").rename(_file)


# What an agent's source says


def named_in_source(agent: str, folders: Sequence[Path]) -> list[str]:
    """What the module of `module:Class` imports that is not in the same folders, as `module` or `module:attribute`."""
    found: dict[str, None] = {}
    waiting, seen = [agent.partition(":")[0]], set()
    while waiting:
        module = waiting.pop(0)
        if module in seen:
            continue
        seen.add(module)
        if file := _source(module, folders):
            with suppress(OSError, SyntaxError, ValueError, RecursionError):  # the function will say so
                package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                for name, attribute in _imports(ast.parse(file.read_bytes()), package):
                    is_near = _source(name, folders) is not None
                    waiting += [name] if is_near else []
                    waiting += [f"{name}.{attribute}"] if is_near and attribute else []
                    if not is_near and name not in OURS:
                        found[f"{name}:{attribute}" if attribute else name] = None
    return list(found)


def _source(module: str, folders: Sequence[Path]) -> Path | None:
    for folder in folders:
        base = folder.joinpath(*module.split("."))
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """(module, attribute or nothing) of all that is imported anywhere but for a type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            if module and module != "__future__":
                yield from ((module, "" if alias.name == "*" else alias.name) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                yield from _imports(ast.Module([child], []), package)
        else:
            yield from _imports(node, package)


# Importing ahead


class LeftOut(Exception):
    """A library, or a module of ours, cannot be held: this process is of no use, and the next one is to do without it."""

    def __init__(self, library: str, reason: str, stamp: int = 0) -> None:
        """stamp: of the library as it is installed, if it is to be left out until that changes; else 0."""
        super().__init__(f"{library} {reason}")
        self.library, self.reason, self.stamp = library, reason, stamp


@dataclass(frozen=True)
class Order:
    """What is to be imported.

    environment: the variables that all functions will have alike, as far as they are known, without secrets. withheld: the names of all
    others, whose values are nobody else's business. modules: as `imported` names them. sources: of agents that were never seen running,
    `agent` and `folders` to look for it in; what their source names is imported. without: libraries that are left out, with their stamps.
    most_bytes: of the process's own memory.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    withheld: Sequence[str] = ()
    modules: Sequence[str] = ()
    sources: Sequence[Mapping[str, Any]] = ()
    without: Mapping[str, int] = field(default_factory=dict)
    most_bytes: int = 1 << 62

    def names(self) -> Iterator[str]:
        """All that is to be imported, in turn: libraries before what is ours, so that each answers for itself."""
        yield from sorted(self.modules, key=_is_ours)
        for source in self.sources:
            agent: str = source["agent"]
            module, _, name = agent.partition(":")
            folders = [Path(folder) for folder in source["folders"]]
            if _is_ours(module):  # which may be imported, and then tells where its class really is
                yield agent
                agent = f"{getattr(getattr(sys.modules.get(module), name, None), '__module__', module)}:{name}"
                folders = [Path(__file__).parent.parent]
            yield from named_in_source(agent, folders)


class Importer:
    """Imports what is ordered into this process."""

    def __init__(self, order: Order, tell: Callable[[str], object] = lambda library: None) -> None:
        """tell: called with the name of the library that comes next, so that it is known of one that never returns."""
        self.libraries: dict[str, float] = {}  # that were not there before, with the seconds that each took which was asked for
        self.added: dict[str, str] = {}  # variables that libraries have set
        self.env = dict(os.environ)  # the variables as they were then
        self.generators = Generators()
        self._order = order
        self._pid = os.getpid()
        self._tell = tell
        self._began_with = set(sys.modules)
        self._reads: dict[str, None] = {}
        self._seconds: dict[str, float] = {}
        self._state = state()
        self._attributes = Attributes()
        self._told = ""
        self._prefixes: tuple[str, ...] = ()

    def run(self, first: Sequence[str]) -> None:
        """Import `first` and what was ordered. Raises LeftOut."""
        os.environ.update(self._order.environment)
        self.env = dict(os.environ)
        for name in (*first, *self._order.names()):
            library = _held_or_left(name)
            stamp = self._order.without.get(library)
            if stamp is None or (stamp and stamp != _stamp(library)):
                self._import(name, library)
        self._check_attributes()
        found = {name.partition(".")[0] for name in imported(self._began_with)} - set(OURS)
        self.libraries = dict(
            sorted(((library, self._seconds.get(library, 0.0)) for library in found), key=lambda item: (-item[1], item[0]))
        )
        self._prefixes = _prefixes(self.libraries)
        self._order = Order()

    def disagreement(self, env: Mapping[str, str]) -> str | None:
        """A variable for which a function with this environment would have needed an import of its own; None if there is none."""
        for name in (*self._reads, *_read_unseen(self._prefixes, {**self.env, **env})):
            if env.get(name) != self.env.get(name):
                return name
        return next((name for name, value in self.added.items() if env.get(name, value) != value), None)

    def _import(self, name: str, library: str) -> None:
        module_name, _, attribute = name.partition(":")
        if module_name in sys.modules and (not attribute or attribute in vars(sys.modules[module_name])):
            return
        if library != self._told:
            self._check_attributes()
            self._tell(library)
            self._told = library
        began, known = time.monotonic(), len(self._reads)
        try:
            with reads(self._reads), self.generators:
                module = importlib.import_module(module_name)
                if attribute:
                    getattr(module, attribute, None)
        except ImportError:
            pass  # what was ordered is not installed, or not any more, or something that it needs
        except BaseException as error:
            self._end_if_forked()
            if not (_is_ours(library) and isinstance(error, Exception)):  # what an agent of ours asks for is seen by its own name
                raise self._left_out(library, f"cannot be imported: {type(error).__name__}: {error}"[:300]) from error
        self._seconds[library] = self._seconds.get(library, 0.0) + time.monotonic() - began
        self._check(library, list(self._reads)[known:])

    def _end_if_forked(self) -> None:
        """What a library has forked has all of ours, and is not to go on with it."""
        if os.getpid() != self._pid:
            os._exit(0)

    def _check(self, library: str, read: Sequence[str]) -> None:
        self._end_if_forked()
        now = state()
        for what, value in self._state.items():
            if now[what] != value:
                raise self._left_out(library, f"{what} when it is imported")
        if self.generators.is_seeded():
            raise self._left_out(library, "seeds the random numbers of all others when it is imported")
        self._check_variables(library, read)
        if (used := own_bytes()) > self._order.most_bytes:
            raise LeftOut(library, f"would take the fork server to {used >> 20} MiB, of at most {self._order.most_bytes >> 20}")

    def _check_attributes(self) -> None:
        """That takes longer, and is done once all modules of a library are there that are asked for in a row."""
        if replaced := self._attributes.replaced():
            raise self._left_out(self._told, f"replaces {replaced} when it is imported")

    def _check_variables(self, library: str, read: Sequence[str]) -> None:
        expected = {**self.env, **self.added}
        for name in expected:
            if os.environ.get(name) != expected[name]:
                raise self._left_out(library, f"changes the variable {name} when it is imported")
        self.added |= {name: value for name, value in os.environ.items() if name not in expected}
        withheld = self._order.withheld
        prefixes = () if _is_ours(library) else _prefixes([library])  # ours reads its settings when the program begins
        for name in sorted({*(set(read) & set(withheld)), *_read_unseen(prefixes, withheld)}):
            raise LeftOut(
                library, f"reads {name} when it is imported, which is {'a secret' if is_secret(name) else 'not the same in all pods'}"
            )

    def _left_out(self, library: str, reason: str) -> LeftOut:
        return LeftOut(library, reason, _stamp(library))


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in OURS


def _held_or_left(name: str) -> str:
    """What is held or left out as a whole: a library, but of our packages each module, for itself."""
    module = name.partition(":")[0]
    return module if _is_ours(module) else module.partition(".")[0]


def own_bytes() -> int:
    """This process's memory that is no file's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def sites() -> dict[str, int]:
    """When a package was last added to or taken from each folder that they are installed in, or replaced."""
    return {folder: _changed(folder) for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")}


def _stamp(library: str) -> int:
    """When something was last installed where a library is; 0 if it cannot be told."""
    with suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(library)
        if spec and (folder := site_of(spec.origin)):
            return _changed(folder)
    return 0


def _changed(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0


def _prefixes(libraries: Iterable[str]) -> tuple[str, ...]:
    """What the names of variables begin with that these may read unseen."""
    return tuple(prefix for library in libraries for prefix in (f"{library.upper()}_", *_READ_BY_NATIVE_CODE.get(library, ())))


def _read_unseen(prefixes: tuple[str, ...], names: Iterable[str]) -> Iterator[str]:
    """Those that native code may have read; no secrets, which none needs to be loaded."""
    return (name for name in names if name.startswith(prefixes) and not is_secret(name))
