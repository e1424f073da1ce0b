"""The steps from a model's output to a vector, as sentence-transformers' folders describe them: pooling, dense layers, normalisation.

`modules.json` lists the modules of a folder, the first of which is the model (or a table of vectors, one a token), the others are steps.
Each step reads and writes `features` by name. What they compute is the library's (sentence-transformers 6.2), which is not needed here.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from function.agent import Weights
from weights_cache.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS, SENTENCE = "token_embeddings", "sentence_embedding"
POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_OF_OLD = {  # how a folder says its mode that was saved before version 5.2
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass
class Features:
    """What the steps hand on for a batch: named vectors, and of the tokens which are there."""

    named: "dict[str, Tensor]"
    mask: "Tensor"  # int64 [n, longest]: 1 for a token, 0 for padding
    prompt_tokens: int = 0  # at each text's begin


class Step(Protocol):
    """One of the modules behind the model."""

    def __call__(self, features: Features) -> None:
        """Reads of `features`, and adds to it."""


@dataclass(frozen=True)
class Layout:
    """What `modules.json` says: the class of the first module and the folder it is in, and the steps behind it."""

    first: str
    folder: str
    steps: "list[Step]"


def read_layout(weights: Weights, device: str) -> Layout | None:
    """None without a `modules.json`. Raises WeightsError for modules that are not known here."""
    entries = read_json(weights, "modules.json")
    if entries is None:
        return None
    found = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    if not found or found[0][0] not in ("Transformer", "StaticEmbedding"):
        name = found[0][0] if found else "no module"
        raise WeightsError(f"modules.json begins with {name}; models that begin with Transformer or StaticEmbedding are known here")
    steps = [step for name, path in found[1:] if (step := _step(name, weights, path, device))]
    return Layout(*found[0], steps)


def read_json(weights: Weights, name: str) -> Any:
    """A file's document, None if there is no such file. Raises WeightsError."""
    if name not in weights.files():
        return None
    try:
        return json.loads(weights.path(name).read_text())
    except ValueError as error:
        raise WeightsError(f"{name} is no JSON: {error}") from error


def _step(name: str, weights: Weights, folder: str, device: str) -> "Step | None":
    config = read_json(weights, f"{folder}/config.json") or {}  # of Normalize there may be no folder, as git keeps no empty ones
    match name:
        case "Pooling":
            return Pooling.of(config)
        case "Normalize":
            return Normalize(config)
        case "Dense":
            return Dense(config, _tensors(weights, folder, device))
        case "LayerNorm":
            return LayerNorm(_tensors(weights, folder, device))
        case "Dropout":
            return None
    raise WeightsError(f"modules.json has a module {name}; Pooling, Dense, LayerNorm, Normalize and Dropout are known here")


def _tensors(weights: Weights, folder: str, device: str) -> "Mapping[str, Tensor]":
    there = [name for name in weights.files() if name.startswith(f"{folder}/")]
    if f"{folder}/model.safetensors" not in there:
        raise WeightsError(f"{folder} has no model.safetensors, only {', '.join(there) or 'nothing'}; save the model anew")
    return dict(weights.folder(folder).to(device))


@dataclass(frozen=True)
class Pooling:
    """One vector for each text from those of its tokens; with several modes, theirs one behind the other."""

    modes: tuple[str, ...]
    includes_prompt: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Pooling":
        """As `1_Pooling/config.json` says. Raises WeightsError for a mode that there is not."""
        said = config.get("pooling_mode") or [mode for key, mode in _OF_OLD.items() if config.get(key)] or ["mean"]
        modes = (said,) if isinstance(said, str) else tuple(said)
        if unknown := [mode for mode in modes if mode not in POOLING_MODES]:
            raise WeightsError(f"there is no pooling mode {unknown[0]!r}; there are {', '.join(POOLING_MODES)}")
        return cls(modes, bool(config.get("include_prompt", True)))

    def __call__(self, features: Features) -> None:
        """[n, longest, f] → [n, f · modes]."""
        import torch

        tokens = features.named[TOKENS]
        mask = features.mask if self.includes_prompt else _without_prompt(features)
        vectors = [self._pool(mode, tokens, mask, features.mask) for mode in self.modes]
        features.named[SENTENCE] = torch.cat(vectors, dim=-1)

    def _pool(self, mode: str, tokens: "Tensor", mask: "Tensor", whole: "Tensor") -> "Tensor":
        """mask: of the tokens that count. whole: with those of a prompt."""
        import torch

        exact = torch.float32 if tokens.dtype in (torch.float16, torch.bfloat16) else tokens.dtype  # in which sums are made
        rows = torch.arange(len(tokens), device=tokens.device)
        if mode == "cls":
            return tokens[rows, mask.argmax(1)]
        if mode == "lasttoken":
            last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
            return tokens[rows, last] * mask.amax(1, keepdim=True).to(tokens.dtype)
        if mode == "max":
            return tokens.masked_fill(mask[:, :, None] == 0, float("-inf")).amax(1)
        weights = mask.to(exact)
        if mode == "weightedmean":  # by the place in the text
            weights = weights * (torch.arange(1, mask.shape[1] + 1, device=mask.device) - whole.argmax(1)[:, None])
        total, count = (tokens * weights[:, :, None]).sum(1, dtype=exact), weights.sum(1)[:, None].clamp(min=1e-9)
        return (total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)).to(tokens.dtype)


def _without_prompt(features: Features) -> "Tensor":
    import torch

    places = torch.arange(features.mask.shape[1], device=features.mask.device) - features.mask.argmax(1)[:, None]
    return features.mask * (places >= features.prompt_tokens)


class Normalize:
    """Vectors of length 1."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._given = config.get("module_input_name") or SENTENCE
        self._made = config.get("module_output_name") or self._given

    def __call__(self, features: Features) -> None:
        """Nothing where there is nothing of that name, as the library has it."""
        import torch.nn.functional as F  # noqa: N812

        if (x := features.named.get(self._given)) is not None:
            features.named[self._made] = F.normalize(x, p=2, dim=-1)


class Dense:
    """A linear layer and an activation, with the way around both if `use_residual`."""

    def __init__(self, config: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> None:
        self._given = config.get("module_input_name") or SENTENCE
        self._made = config.get("module_output_name") or self._given
        self._weight, self._bias, self._residual = tensors["linear.weight"], tensors.get("linear.bias"), tensors.get("residual.weight")
        self._has_residual = bool(config.get("use_residual"))
        self._activation = _activation(config.get("activation_function", "torch.nn.modules.activation.Tanh"))

    def __call__(self, features: Features) -> None:
        """[…, in] → […, out]."""
        import torch.nn.functional as F  # noqa: N812

        x = features.named[self._given].to(self._weight.dtype)
        made = self._activation(F.linear(x, self._weight, self._bias))
        if self._has_residual:
            made = made + (x if self._residual is None else F.linear(x, self._residual))
        features.named[self._made] = made


class LayerNorm:
    """Of the sentence's vector."""

    def __init__(self, tensors: "Mapping[str, Tensor]") -> None:
        self._weight, self._bias = tensors["norm.weight"], tensors["norm.bias"]

    def __call__(self, features: Features) -> None:
        """[n, f] → [n, f]."""
        import torch.nn.functional as F  # noqa: N812

        features.named[SENTENCE] = F.layer_norm(features.named[SENTENCE], self._weight.shape, self._weight, self._bias)


def _activation(path: str) -> "nn.Module":
    """A module of torch that needs no arguments; a class of any other package would be code that comes with the model."""
    from torch import nn

    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None) if module.startswith("torch.nn.") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise WeightsError(f"the activation function {path!r} of a Dense layer is no module of torch.nn")
    return found()
