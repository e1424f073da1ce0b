"""Modules around restored tensors, without memory or time for parameters that would only be overwritten.

While a module is constructed its parameters are placeholders on torch's `meta` device: they have a shape and no values, and initialising
them costs nothing. Whatever else it computes, such as its buffers, is computed as ever. See `_Placeholders` for where the two meet.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from weights_cache.errors import WeightsError
from weights_cache.excerpt import quoted

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_NAMED = 5  # of the names that are wrong, in an error
_LINES = 4  # of what torch says, in an error
_META = torch.device("meta")
_PARAMETER: Any = nn.Parameter


def assemble(
    build: Callable[[], ModuleT],
    tensors: Iterable[tuple[str, Tensor]],
    device: Callable[[str], torch.device],
    rename: Callable[[str], str | None] = lambda name: name,
) -> ModuleT:
    """What `build` makes, with the tensors as its parameters and buffers: see `Weights.module`.

    device: of a tensor by name, for buffers that the weights do not have.
    """
    with _placeholders() as placeholders:
        module = build()
    module.requires_grad_(False)
    state = {new: tensor for name, tensor in tensors if (new := rename(name)) is not None}
    buffers = dict(module.named_buffers(remove_duplicate=False))
    for name in buffers.keys() - module.state_dict().keys():
        state.pop(name, None)  # it is not persistent: the module makes it, whatever an older version of its class has saved
    tied: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    for names in tied.values():
        if len(names) > 1 and (found := [name for name in names if name in state]):
            state |= dict.fromkeys(names, nn.Parameter(state[found[0]], requires_grad=False))  # one parameter, as they were
    missing, unexpected = _bind(module, state)
    if (missing or unexpected) and (renamed := _library_names(module, state)):
        state = {renamed.get(name, name): tensor for name, tensor in state.items()}
        missing, unexpected = _bind(module, state)
    if missing or unexpected:
        lacks = [f"they lack {_some(missing)}"] * bool(missing) + [f"the module lacks {_some(unexpected)}"] * bool(unexpected)
        raise WeightsError(f"the weights do not fit the module: {', and '.join(lacks)}{_hint(missing, unexpected)}")
    _place_buffers(module, state, device, placeholders)
    return module


def _bind(module: nn.Module, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Have the module use the tensors of its names. Returns the parameters that none is for, and the tensors that it has no use for.

    Raises WeightsError for a tensor of another shape.
    """
    try:
        absent, unexpected = module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # shapes
        raise WeightsError(f"the weights do not fit the module: {_some_lines(str(error))}") from error
    parameters = module.named_parameters(remove_duplicate=False)
    return [name for name, parameter in parameters if name in absent or parameter.is_meta], list(unexpected)


def _library_names(module: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, str]:
    """For a model of transformers whose files have names of an earlier version: from these to the ones of today. Empty for others.

    The library knows them when it loads a model: it is given tensors without values, and where these are afterwards is looked at.
    """
    transformers: Any = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return {}
    there = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items() if tensor.numel()}
    names = {tensor.data_ptr(): name for name, tensor in there.items()}  # their pages are never touched
    told = transformers.utils.logging
    verbosity, has_bar = told.get_verbosity(), told.is_progress_bar_enabled()
    try:
        told.set_verbosity_error()
        told.disable_progress_bar()
        model = type(module).from_pretrained(
            None, config=module.config, state_dict=there, dtype=_dtype(module), ignore_mismatched_sizes=True
        )
    finally:
        told.set_verbosity(verbosity)
        if has_bar:
            told.enable_progress_bar()
    return {names[tensor.data_ptr()]: name for name, tensor in model.state_dict().items() if tensor.data_ptr() in names}


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters() if parameter.dtype.is_floating_point), None)


def _hint(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """How to mend it, where all that is missing is there with one prefix more or less, as with the model below a head."""
    lacking, there = sorted(missing), set(unexpected)
    for name in there if lacking else ():
        if name.endswith(f".{lacking[0]}") and {(prefix := name.removesuffix(lacking[0])) + one for one in lacking} <= there:
            return f"; rename=lambda name: name.removeprefix({prefix!r}) if name.startswith({prefix!r}) else None takes what the module has"
        if lacking[0].endswith(f".{name}"):
            prefix = lacking[0].removesuffix(name)
            if all(one.startswith(prefix) and one.removeprefix(prefix) in there for one in lacking):
                return f"; rename=lambda name: {prefix!r} + name gives them the module's names"
    return ""


def _place_buffers(
    module: nn.Module, state: Mapping[str, Tensor], device: Callable[[str], torch.device], placeholders: "_Placeholders"
) -> None:
    """Move the buffers that the module has made to where they belong."""
    moved: dict[int, Tensor] = {}  # one that is in several places stays one
    for name, buffer in list(module.named_buffers(remove_duplicate=False)):
        if placeholders.has_no_values(buffer):
            raise WeightsError(
                f"buffer {quoted(name)} is not in the weights, and cannot be computed before they are there: "
                "the module makes it of a parameter's values, or on the meta device"
            )
        if name not in state and buffer.device != device(name):
            parent, _, leaf = name.rpartition(".")
            if id(buffer) not in moved:
                moved[id(buffer)] = buffer.to(device(name))
            setattr(module.get_submodule(parent), leaf, moved[id(buffer)])


@contextmanager
def _placeholders() -> Iterator["_Placeholders"]:
    """While it lasts, parameters that this thread makes are placeholders."""
    with ExitStack() as entered:
        torch.empty(0, device=_META)  # what torch imports for its first one is not imported in the middle of somebody's constructor
        if torch.empty(0).device.type != "cpu":  # which `get_default_device` of torch 2.6 does not know of a `with torch.device`
            entered.enter_context(torch.device("cpu"))  # what becomes a placeholder takes no room on a device before
        mode = entered.enter_context(_Placeholders())
        entered.enter_context(_making)
        yield mode


class _Making:
    """Has `nn.Parameter` make placeholders, in the threads that have entered it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the patch and how many want it
        self._wanted = 0
        self._here = threading.local()
        self._theirs: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._wanted:
                self._patch()
            self._wanted += 1
        self._here.depth = getattr(self._here, "depth", 0) + 1

    def __exit__(self, *_: object) -> None:
        self._here.depth -= 1
        with self._lock:
            self._wanted -= 1
            if not self._wanted:
                _PARAMETER.__new__ = self._theirs

    def _patch(self) -> None:
        self._theirs = vars(_PARAMETER)["__new__"]
        theirs, here = _PARAMETER.__new__, self._here

        def make(cls: type[nn.Parameter], data: Any = None, requires_grad: bool = True) -> Any:
            if getattr(here, "depth", 0) and (data is None or type(data) in (Tensor, nn.Parameter)):
                data = torch.empty(0, device=_META) if data is None else data.detach().to(_META)
            return theirs(cls, data, requires_grad)

        _PARAMETER.__new__ = make


_making = _Making()

_DEVICE = Tensor.device.__get__
# What is made of a tensor's shape, with values that are given.
_LIKE = {torch.zeros_like, torch.ones_like, torch.full_like, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor}
_MOVE = {Tensor.to, Tensor.cpu, Tensor.cuda}
# What initialises a tensor in place, of its methods and of `nn.init`'s functions; on `meta` some of it takes milliseconds to do nothing.
_FILL = "zero_ fill_ normal_ uniform_ random_ bernoulli_ exponential_ log_normal_ erfinv_ mul_ add_ clamp_ constant_ kaiming_uniform_"
_FILLS = set(_FILL.split())
_OPERATORS = "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul"
_IN_PLACE = {f"__i{operator}__" for operator in _OPERATORS.split()}
_SET = {"__setitem__", "__set__"}  # the latter of attributes, such as `data`


class _Placeholders(TorchFunctionMode):
    """What a constructor sees of placeholders: tensors on the CPU, for it may make others there that go with them.

    What an operation makes of a placeholder and real tensors is a placeholder, and so is, from then on, a real tensor that it writes to.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lost: dict[int, torch.UntypedStorage] = {}  # of such real tensors, by address

    def has_no_values(self, tensor: Tensor) -> bool:
        """Whether it is a placeholder."""
        return tensor.is_meta or (bool(self._lost) and tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in self._lost)

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Called in place of each of torch's functions, and not for what these call."""
        kwargs = dict(kwargs or {})
        tensors = list(_tensors((*args, *kwargs.values())))
        if not any(map(self.has_no_values, tensors)):
            return func(*args, **kwargs)
        if func == _DEVICE:
            return torch.device("cpu")
        name: str = getattr(func, "__name__", "")
        if name in _FILLS and len(tensors) == 1:
            return tensors[0]
        if func in _LIKE and kwargs.get("device") is None:
            kwargs["device"] = "cpu"
        elif func in _MOVE:
            return self._move(func, args, kwargs)
        elif not all(tensor.is_meta for tensor in tensors):
            is_written = name in _SET | _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
            targets = list(_tensors([kwargs["out"]])) if kwargs.get("out") is not None else list(args[:1]) if is_written else []
            if real := [target for target in targets if not target.is_meta]:
                self._lost |= {storage.data_ptr(): storage for storage in (target.untyped_storage() for target in real)}
                return None if name in _SET else kwargs.get("out", args[0])
            if name in ("__getitem__", "__setitem__"):
                args = [_to_meta(args[0]), *args[1:]]  # an index has to have values, and may
            else:
                args, kwargs = [_to_meta(value, scalars=name in _SET) for value in args], {key: _to_meta(kwargs[key]) for key in kwargs}
        return func(*args, **kwargs)

    def _move(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A placeholder stays where it is; what goes to where one is stays, too."""
        tensor: Tensor = args[0]
        where: list[Any] = [value.dtype if isinstance(value, Tensor) else value for value in args[1:]]
        if func is not Tensor.to:
            return tensor
        if self.has_no_values(tensor):
            tensor = _to_meta(tensor, scalars=True)
            where = [_META if isinstance(value, (str, torch.device)) else value for value in where]
            kwargs = dict(kwargs) | ({"device": _META} if "device" in kwargs else {})
        if isinstance(other := kwargs.get("tensor"), Tensor):
            kwargs = {key: value for key, value in kwargs.items() if key != "tensor"} | {"dtype": other.dtype}
        return tensor.to(*where, **kwargs)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _to_meta(value: Any, *, scalars: bool = False) -> Any:
    """A tensor, or those in a list or tuple, without their values; what has one number goes with tensors of every device."""
    if isinstance(value, Tensor):
        return value.to(_META) if value.dim() or scalars else value
    return type(value)(map(_to_meta, value)) if type(value) in (list, tuple) else value


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(quoted(name) for name in sorted(names)[:_NAMED]) + more


def _some_lines(text: str) -> str:
    lines = text.splitlines()
    said = [line if len(line) < 200 else f"{line[:200]}…" for line in lines[:_LINES]]
    return "\n".join([*said, f"\tand {len(lines) - _LINES} more"] if len(lines) > _LINES else said)
