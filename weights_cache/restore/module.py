"""Modules around restored tensors, without memory or time for parameters that would only be overwritten."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from weights_cache.errors import WeightsError

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_NAMED = 5  # of the names that are wrong, in an error


def assemble(build: Callable[[], ModuleT], tensors: Iterable[tuple[str, Tensor]], device: Callable[[str], torch.device]) -> ModuleT:
    """What `build` makes, with the tensors as its parameters and buffers: see `Weights.module`.

    device: of a tensor by name, for buffers that the weights do not have.
    """
    with torch.device("meta"):
        module = build()
    module.requires_grad_(False)
    state = dict(tensors)
    tied: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    for names in tied.values():
        if len(names) > 1 and (found := [name for name in names if name in state]):
            state |= dict.fromkeys(names, nn.Parameter(state[found[0]], requires_grad=False))  # one parameter, as they were
    try:
        missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # shapes
        raise WeightsError(f"the weights do not fit the module: {error}") from error
    if missing or unexpected:
        lacks = [f"they lack {_some(missing)}"] * bool(missing) + [f"the module lacks {_some(unexpected)}"] * bool(unexpected)
        raise WeightsError(f"the weights do not fit the module: {', and '.join(lacks)}")
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise WeightsError(
                f"buffer {name!r} is not in the weights, and what the module computes of it on the meta device has no values; "
                'make it with a device of its own, such as torch.arange(…, device="cpu")'
            )
        if name not in state and buffer.device != device(name):
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, buffer.to(device(name)))
    return module


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(repr(name) for name in sorted(names)[:_NAMED]) + more
