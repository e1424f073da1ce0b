"""What an import leaves behind in a process, besides its modules: what others would notice, and the variables that it has read."""

import gc
import locale
import logging
import os
import signal
import socket
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

OURS = ("function", "weights_cache")
# Of no matter: the mark of a process, and threads, of which the platform has seen to it that what a fork has is what is asked for.
_NOT_NOTED = ("RELIGHT_CONTAINER", "OMP_NUM_THREADS")
# What libraries replace for everybody, but so that nobody else notices: the attribute, and the package that the new one is from.
_HARMLESS = {
    ("inspect.getfile", "torch"),  # knows classes of torch.package, too
    ("typing._collect_parameters", "typing_extensions"),  # knows its own parameters, too
    ("typing._check_generic", "typing_extensions"),
    ("multiprocessing.synchronize.SemLock._make_name", "joblib"),  # names that are unique by another rule
    ("multiprocessing.synchronize.SemLock._make_name", "loky"),
}
_MISSING = object()


# What is said of a process


def state() -> dict[str, object]:
    """What no import may change, each by what is said of a library that does."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {
        "starts threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208  names are enough
        "starts processes": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "sets signal handlers": (
            [status[name] for name in ("SigBlk", "SigIgn", "SigCgt")],
            [signal.getsignal(number) for number in signal.valid_signals()],
        ),
        "opens files or devices": sorted(_open_files()),
        "shares memory with its forks, as a lock does": Path("/proc/self/maps").read_bytes().count(b" rw-s "),
        "changes the working directory": str(Path.cwd()),
        "changes the umask": status["Umask"],
        "changes how logs are written": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "replaces standard files or hooks": (sys.stdin, sys.stdout, sys.stderr, sys.excepthook, threading.excepthook),
        "changes the locale": locale.setlocale(locale.LC_ALL),
        "changes the default time-out of sockets": socket.getdefaulttimeout(),
        "changes sys.path": list(sys.path),
        "changes how modules are found": (list(sys.path_hooks), [finder for finder in sys.meta_path if _is_for_others(finder)]),
        "changes the recursion limit": sys.getrecursionlimit(),
        "changes how often threads switch": sys.getswitchinterval(),
        "changes which warnings are shown": [rule for rule in warnings.filters if _is_of_all_warnings(rule)],
        "changes what garbage is collected": (gc.isenabled(), gc.get_threshold()),
        "chooses how processes are started": _how_processes_are_started(),
        "replaces the event loops of asyncio": _event_loop_policy(),
        "traces or profiles": (sys.gettrace(), sys.getprofile(), threading.gettrace(), threading.getprofile()),
    }


def _how_processes_are_started() -> str | None:
    """None if nobody has chosen."""
    module = sys.modules.get("multiprocessing")
    return module.get_start_method(allow_none=True) if module else None


def _event_loop_policy() -> object:
    """None if it is asyncio's own, which is made when it is first needed."""
    policy = getattr(sys.modules.get("asyncio.events"), "_event_loop_policy", None)
    return None if type(policy).__module__.startswith("asyncio.") else policy


def _open_files() -> Iterator[str]:
    """All but ordinary files: to share the place in one that is only read does no harm."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  names are enough
        with suppress(OSError):  # that of the listing itself
            target = str(Path("/proc/self/fd", name).readlink())
            if not target.startswith("/") or target.startswith("/dev/"):
                yield target


def _is_for_others(finder: Any) -> bool:
    """Whether it finds Python's own modules; the finders of libraries are for old names of their own modules."""
    if isinstance(finder, type) or type(finder).__module__.partition(".")[0] in OURS:
        return isinstance(finder, type)  # Python's own are classes
    find = getattr(finder, "find_spec", None)
    try:
        return find is not None and any(find(name, None, None) is not None for name in sys.stdlib_module_names & sys.modules.keys())
    except Exception:  # noqa: BLE001  it is not for such names
        return True


def _is_of_all_warnings(rule: tuple[Any, ...]) -> bool:
    """Whether it is about warnings of all modules: neither about certain ones, nor about those of a library."""
    _, message, category, module, _ = rule
    return message is None and module is None and category.__module__ == "builtins"


# Which attributes of modules are replaced


class Attributes:
    """The functions and classes of Python's modules, with its constants, and of all modules that are there when it is made."""

    def __init__(self) -> None:
        self._there = set(sys.modules)
        self._known = dict(self._look())

    def replaced(self) -> str | None:
        """One that is another than it was at the last call, with the name of its module; None if all are what they were."""
        known, self._known = self._known, dict(self._look())
        for name, (owner, before) in known.items():
            found, now = self._known.get(name, (None, {}))
            if found is not owner:
                return name
            for attribute, value in before.items():
                new = now.get(attribute, _MISSING)
                if new is not value and _is_changed(name, value, new) and not _is_harmless(name, attribute, new):
                    return f"{name}.{attribute}"
            if name == "builtins" and (added := now.keys() - before.keys()):
                return f"builtins.{min(added)}"
        return next((f"{name}.{attribute}" for name in self._known.keys() - known.keys() for attribute in self._foreign(name)), None)

    def _foreign(self, name: str) -> Iterator[str]:
        """Attributes of a module of Python's that has just come, or of a class in it, which are not Python's."""
        for attribute, value in self._known[name][1].items():
            is_foreign = callable(value) and (package := _package_of(value)) in sys.modules and not _is_pythons(package)
            if is_foreign and not _is_harmless(name, attribute, value):
                yield attribute

    def _look(self) -> Iterator[tuple[str, tuple[object, dict[str, Any]]]]:
        """Modules and their classes by name, each with its attributes."""
        for name, module in list(sys.modules.items()):
            if isinstance(module, types.ModuleType) and (_is_pythons(name) or name in self._there):
                attributes = dict(vars(module))
                yield name, (module, attributes)
                for key, value in attributes.items():
                    if issubclass(type(value), type) and value.__module__ == name:  # `isinstance` would wake up proxies
                        yield f"{name}.{key}", (value, dict(vars(value)))


def _is_pythons(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def _is_changed(owner: str, value: object, new: object) -> bool:
    """Whether that is more than what a module may make for itself when it is first needed."""
    if type(value) in (int, float, str):
        return _is_pythons(owner) and (type(new) is not type(value) or new != value)
    return callable(value) or isinstance(value, (staticmethod, classmethod, property))


def _is_harmless(owner: str, attribute: str, new: object) -> bool:
    package = _package_of(new)
    return (package == owner.partition(".")[0] and not _is_pythons(owner)) or (f"{owner}.{attribute}", package) in _HARMLESS


def _package_of(value: Any) -> str:
    """Where a function or class was written, or the class of an object."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, types.FunctionType):  # which may have been given another's name
        return str(value.__globals__.get("__name__")).partition(".")[0]
    return str((value if isinstance(value, type) else type(value)).__module__).partition(".")[0]


# Which variables are read


class reads:  # noqa: N801  used like a function
    """Notes which variables are read, as long as it is entered."""

    def __init__(self, names: dict[str, None]) -> None:
        theirs = type(os.environ)

        class Noting(theirs):  # type: ignore[misc, valid-type]
            def __getitem__(self, key: str) -> str:
                if key not in _NOT_NOTED:
                    names[key] = None
                return str(super().__getitem__(key))

            # All of them are read for a program that is started, or to choose by the beginning of a name, of which `_prefixes` knows.
            def copy(self) -> dict[str, str]:
                return {key: super(Noting, self).__getitem__(key) for key in self}

            def items(self) -> Any:
                return self.copy().items()

        self._theirs, self._noting = theirs, Noting

    def __enter__(self) -> None:
        os.environ.__class__ = self._noting

    def __exit__(self, *_: object) -> None:
        os.environ.__class__ = self._theirs
