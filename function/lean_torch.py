"""A leaner `import torch`: what only compilers and exporters need is left out until somebody needs it.

A third of the import goes into `torch.export`, the higher-order operators, the kernels of the `meta` device, which are in Python, and a
few others that an agent that computes eagerly does not use. While torch is imported, `LEFT_OUT` are empty modules; afterwards they are
taken away again, and everything by which their absence could be noticed brings all of them in, so that there are two states only:
lean, and exactly what the ordinary import makes. Noticed is

- the import of any module of torch that is not there yet (`torch.export`, `torch._dynamo`, `torch._subclasses`, …),
- an attribute that a package of torch lacks (`torch.export`, `torch.cond`), or an operator that a namespace of `torch.ops` lacks,
- the first tensor on the `meta` device.

While it is lean no operator has another kernel than it has otherwise, those of `meta` excepted, which tests see to. One difference is not
noticed: `torch.utils._pytree` takes a `torch.Size` for a leaf.

It knows torch's inside, so a version that is not in `VERIFIED` is imported as ever, and so is one that does something unforeseen.
"""

import importlib
import importlib.util
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger("relight.function")

VERIFIED = ("2.13.0", "2.12.1", "2.9.1")  # tests/function/test_function_lean_torch.py passes with them, `-m soak` too
LEFT_OUT = (  # in the order in which torch imports them
    "torch.distributions",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
    "torch.quantization",
    "torch.masked",
    "torch.export",
    "torch.func",
    "torch._higher_order_ops",
    "torch.distributed._meta_registrations",
    "torch._meta_registrations",
)
# What torch itself takes from them while it is imported.
_KNOWN = ("vmap", "cond", "while_loop", "NestedCompileRegionOptions")
_COMPLETE = ("torch.cuda",)  # packages that lack nothing, and that torch's C++ asks for what it is about to put there
_OPERATORS = ("triton",)  # a namespace of which torch.cuda asks for what it is about to put there
_CREATION = ("empty.memory_format", "empty_strided")  # every tensor on `meta` comes from one of these, or from another such tensor


def install() -> None:
    """The next `import torch` of this process will be lean, if torch is one that we know."""
    if "torch" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_lean() -> bool:
    """Whether torch is imported, and without what is left out."""
    return "torch" in sys.modules and any(isinstance(finder, _Finder) for finder in sys.meta_path)


class _LeftOut(ModuleType):
    """Stands for a module while torch is imported."""

    def __init__(self, name: str, finder: "_Finder") -> None:
        super().__init__(name)
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _KNOWN:
            return type(name, (_Absent,), {"home": self.__name__})
        self._finder.give_up()
        return getattr(importlib.import_module(self.__name__), name)


class _Absent:
    """Base of what stands for a module's attribute; classes, since annotations are made of them."""

    home = ""


class _Finder(MetaPathFinder):
    """Leaves out while torch is imported; afterwards notices what is missed."""

    def __init__(self) -> None:
        self._phase = "before"  # importing or given up, lean, whole
        self._completing = threading.local()  # .now: this thread is bringing in the rest
        self._met: set[str] = set()  # those of LEFT_OUT that this version of torch imports
        self._undo: list[Callable[[], object]] = []
        self._taken: list[tuple[ModuleType, str, str, str]] = []  # of a module, an attribute; and where it comes from

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Called for each module that is not there yet."""
        if name == "torch" and self._phase == "before":
            return self._torch_spec(path)
        if not name.startswith("torch."):
            return None
        if self._phase == "importing" and (met := [left_out for left_out in LEFT_OUT if f"{name}.".startswith(f"{left_out}.")]):
            if name in met and not PathFinder.find_spec(name, path):
                return None  # this version of torch asks for it and does without
            self._met.update(met)
            return ModuleSpec(name, _Empty(self), is_package=True)
        if self._phase == "lean" and not self._is_completing():
            self.complete()
            if module := sys.modules.get(name):  # one of those that were left out
                return _Present.spec(module)
        return None

    def _torch_spec(self, path: Sequence[str] | None) -> ModuleSpec | None:
        spec = PathFinder.find_spec("torch", path)
        if not spec or not isinstance(spec.loader, SourceFileLoader):
            sys.meta_path.remove(self)
            return None
        if (version := _version(spec)) not in VERIFIED:
            sys.meta_path.remove(self)
            log.info("torch %s is imported whole, which takes longer: what may be left out is known of %s", version, ", ".join(VERIFIED))
            return None
        spec.loader = _TorchLoader(spec.loader.name, spec.loader.path, self)
        return spec

    def run(self, execute: Callable[[], None]) -> None:
        """Import torch, by `execute`."""
        self._phase = "importing"
        try:
            execute()
        except BaseException:
            self._end()
            raise
        is_as_foreseen = self._phase == "importing"
        self._phase = "lean"
        try:
            self._watch()
        except Exception as error:  # noqa: BLE001  whatever it is, the ordinary state is the way out
            log.warning("torch is imported whole: %s", error)
            is_as_foreseen = False
        if not is_as_foreseen:
            self.complete()

    def give_up(self) -> None:
        """While torch is imported: leave out nothing more, and bring in what was, in its order; the rest comes at the end."""
        self._phase = "given up"
        absent = _remove_left_out()
        for name in LEFT_OUT:
            if name in absent:
                importlib.import_module(name)

    def complete(self) -> None:
        """Bring in all that was left out. Several threads may do so at a time: imports know how to wait for each other."""
        self._completing.now = True
        try:
            for name in LEFT_OUT:
                if name in self._met:
                    importlib.import_module(name)
            for module, attribute, home, name in self._taken:
                setattr(module, attribute, getattr(importlib.import_module(home), name))
            self._end()
        finally:
            self._completing.now = False

    def _is_completing(self) -> bool:
        return getattr(self._completing, "now", False)

    def _end(self) -> None:
        if self._phase != "whole":
            self._phase = "whole"
            sys.meta_path.remove(self)
            while self._undo:
                self._undo.pop()()

    def _watch(self) -> None:
        """Take away what stands for the absent, and watch where it could be missed."""
        _remove_left_out()
        for name, module in list(sys.modules.items()):
            if (name == "torch" or name.startswith("torch.")) and hasattr(module, "__path__"):
                for attribute, value in list(vars(module).items()):
                    if type(value) is _LeftOut:
                        delattr(module, attribute)
                    elif type(value) is type and issubclass(value, _Absent):  # a class of torch may object to the question
                        self._taken.append((module, attribute, value.home, value.__name__))
                        delattr(module, attribute)
                if name not in _COMPLETE:
                    self._watch_package(module)
        torch: Any = sys.modules["torch"]
        _set_generator_metaclass(torch)
        for namespace in (type(torch.ops.aten), type(torch.ops.higher_order)):
            self._watch_operators(namespace)
        self._watch_meta(torch)

    def _watch_package(self, module: ModuleType) -> None:
        theirs = vars(module).get("__getattr__")
        makes_namespaces = module.__name__ == "torch.ops"  # of operators, when they are first asked for

        def find(name: str) -> Any:
            if (
                not name.startswith("__")
                and not self._is_completing()
                and not (makes_namespaces and (name in _OPERATORS or _has_operators(name)))
            ):
                self.complete()
                if name in vars(module):
                    return vars(module)[name]
            if theirs:
                return theirs(name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]
        self._undo.append(lambda: setattr(module, "__getattr__", theirs) if theirs else delattr(module, "__getattr__"))

    def _watch_operators(self, namespace: Any) -> None:
        theirs = namespace.__getattr__

        def find(self_: Any, name: str) -> Any:
            try:
                return theirs(self_, name)
            except AttributeError:
                if name.startswith("__") or self._is_completing() or vars(self_).get("name") in _OPERATORS:
                    raise
            self.complete()
            return getattr(self_, name)

        namespace.__getattr__ = find
        self._undo.append(lambda: setattr(namespace, "__getattr__", theirs))

    def _watch_meta(self, torch: Any) -> None:
        """Watches the operators that make tensors on `meta`, as `torch.library.get_kernel` shows how."""
        library = torch.library.Library("aten", "IMPL")
        inside = threading.local()

        def watch(name: str) -> None:
            kernel = torch.library.get_kernel(f"aten::{name}", "Meta")

            def create(keys: Any, *args: Any, **kwargs: Any) -> Any:
                inside.now = True
                try:
                    if self._phase == "lean" and not self._is_completing():
                        self.complete()
                finally:
                    inside.now = False
                return kernel.call_boxed(keys, *args, **kwargs)

            library.impl(name, create, "Meta", with_keyset=True)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that we override what is there
            for name in _CREATION:
                watch(name)

        def undo() -> None:
            if not getattr(inside, "now", False):  # else it stays, and hands on: a kernel cannot be taken away while it runs
                library._destroy()  # noqa: SLF001  what its finalizer calls

        self._undo.append(undo)


class _TorchLoader(SourceFileLoader):
    """torch's own, that has it imported by the finder."""

    def __init__(self, name: str, path: str, finder: _Finder) -> None:
        super().__init__(name, path)
        self._finder = finder

    def exec_module(self, module: ModuleType) -> None:
        """Called by the import system."""
        execute = super().exec_module
        self._finder.run(lambda: execute(module))


class _Empty(Loader):
    """Makes what stands for a module that is left out."""

    def __init__(self, finder: _Finder) -> None:
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Called by the import system."""
        return _LeftOut(spec.name, self._finder)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is in it."""


class _Present(Loader):
    """Gives a module that came while it was being looked for, as it is; without this it would be executed a second time."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    @classmethod
    def spec(cls, module: ModuleType) -> ModuleSpec:
        """What the finder is to answer. The import system goes by the module's own spec, so that is changed for a moment."""
        module.__spec__ = ModuleSpec(module.__name__, cls(module))
        return module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Called by the import system."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """It is executed already."""
        module.__spec__ = self._spec


def _set_generator_metaclass(torch: Any) -> None:
    """The one thing in what is left out that eager torch needs: no Generator can be made before. It may be done twice."""
    if change := getattr(torch._C, "_set_generator_metaclass", None):  # noqa: SLF001  since 2.13
        of_2_14 = sys.modules.get("torch._custom_class_base")
        change(of_2_14.CustomClassBaseMeta if of_2_14 else sys.modules["torch._opaque_base"].OpaqueBaseMeta)


def _has_operators(namespace: str) -> bool:
    """Whether there are any; one that it lacks is noticed when it is asked for."""
    names: list[str] = sys.modules["torch"]._C._dispatch_get_all_op_names()  # noqa: SLF001
    return any(name.startswith(f"{namespace}::") for name in names)


def _remove_left_out() -> list[str]:
    absent = [name for name, module in sys.modules.items() if type(module) is _LeftOut]
    for name in absent:
        del sys.modules[name]
    return absent


def _version(spec: ModuleSpec) -> str:
    """Without the part that names the build, as in 2.13.0+cpu; empty if it cannot be told. torch is not there yet to be asked."""
    try:
        text = Path(spec.origin or "").with_name("version.py").read_text()
    except OSError:
        return ""
    found = re.search(r"^__version__ = '([^'+]*)", text, re.MULTILINE)
    return found[1] if found else ""
