"""From weights to a model of transformers: an unchanged class of the library whose parameters are views of the mapped files.

The library itself binds the tensors, by its own rules for renamed and tied weights, and computes the buffers that are not in the files.
What it only warns of is an error here: a parameter that the files do not have would get random values, and the answers would be wrong.
Nothing is fetched from a hub, and no code that comes with a model is run.
"""

import importlib.metadata
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from function.agent import Weights
from function.agents.transformers import choice
from weights_cache.environment import SettingsError
from weights_cache.errors import WeightsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXTRA = "pip install 'relight[transformers]'"
INDEX, MODEL = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
DTYPES = ("float32", "bfloat16", "float16")
# Files that may be large and are no use to a tokenizer or processor.
_OF_WEIGHTS = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pt", ".pth", ".ot", ".ckpt", ".tflite", ".npz")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_NAMED = 5  # of the tensors that are wrong, in an error

log = logging.getLogger("relight.function")


def library() -> Any:
    """The module `transformers`, kept from the network and from advice in the log. Raises SettingsError where it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when its parts are imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it advises on it after each fork
    with explained("transformers"):
        import transformers
        from huggingface_hub import constants
        from transformers.utils import logging as theirs
    constants.HF_HUB_OFFLINE = True  # they may have been imported before us
    if not os.environ.get("TRANSFORMERS_VERBOSITY"):
        theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    return transformers


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Around what imports parts of transformers: one line on the library that is missing or does not fit.

    what: that is to be had, for the error. Raises SettingsError.
    """
    try:
        yield
    except (ImportError, RuntimeError, AttributeError) as error:
        if reason := _import_reason(error):
            raise SettingsError(f"{what} cannot be had: {reason}") from error
        raise


def read_config(weights: Weights) -> Any:
    """The model's configuration, an object of transformers.

    Raises WeightsError for weights that are no model of the library, SettingsError for a model that needs code of its own.
    """
    transformers = library()
    files = weights.files()
    if ADAPTER in files:
        raise WeightsError(
            f"the weights have {ADAPTER}: they are an adapter to another model. Merge the two where both are, with peft: "
            "AutoPeftModel….from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER), and push FOLDER with the tokenizer's files"
        )
    path = weights.path("config.json")
    said = _json(path)
    try:
        with explained(f"the model's class ({said.get('model_type')})"):
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        kind, version = said.get("model_type"), transformers.__version__
        if said.get("auto_map"):
            raise SettingsError(
                f"the model needs code that comes with it ('auto_map' in config.json), as transformers {version} has no {kind!r}; "
                "such code is not run here: write an agent of your own that has it"
            ) from error
        if kind is None:
            raise WeightsError("config.json has no 'model_type': it is not that of a model of transformers") from error
        if kind not in transformers.CONFIG_MAPPING:
            raise WeightsError(f"transformers {version} does not know model_type {kind!r} of config.json; a newer one may") from error
        raise WeightsError(f"config.json cannot be used by transformers {version}: {first_line(error)}") from error
    if found := getattr(config, "quantization_config", None):
        how = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
        raise WeightsError(
            f"the weights are quantized ({how or 'quantization_config in config.json'}), which the agents of "
            "function.agents.transformers do not restore; use the model's weights in bfloat16 or float16"
        )
    return config


def load_model(
    weights: Weights,
    device: str,
    kind: str | type | None = None,
    *,
    config: Any = None,
    dtype: str | None = None,
    spare: Sequence[str] = (),
) -> Any:
    """A model of transformers around these weights, in evaluation mode and without gradients.

    kind: a class or its name: `BertModel`, or `AutoModelForCausalLM`, which chooses by the config; None: the config's own `architectures`.
    config: what `read_config` gave, if the caller has it. dtype: one of DTYPES to cast to, which copies what is of another; None: as in
    the files. spare: beginnings of names of parameters that may be missing, as nobody uses what they compute, such as `pooler.`.

    On a CPU the parameters are views of the mapped files, which all replicas on a node share; elsewhere they are what `Weights.to` gives.
    Raises WeightsError that names what is missing, unexpected or of another shape, SettingsError for a class that cannot be had.
    """
    config = read_config(weights) if config is None else config
    model_class = _model_class(config, kind)
    theirs = _of_model(weights)
    placed = dict(theirs.to(device)) if device != "cpu" else {}  # first, as its tensors land while the bytes come
    views = dict(theirs.to("cpu"))
    if not views:
        raise WeightsError(_no_tensors(weights.files(), config))
    wanted = _dtype(dtype) or _most_common_dtype(views.values())
    with explained(model_class.__name__):
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=views, dtype=wanted, output_loading_info=True, ignore_mismatched_sizes=True
        )
    _check(model, info, spare)
    model.requires_grad_(False)
    model.eval()
    if device != "cpu":
        _place(model, views, placed)
    _read_generation_config(model, weights)
    return model


def load_tokenizer(weights: Weights) -> Any:
    """The model's tokenizer. Raises WeightsError or SettingsError that says what is missing."""
    tokenizer = _from_folder(weights, "AutoTokenizer", "the tokenizer")
    _check_vocabulary(tokenizer, weights)
    return tokenizer


def load_image_processor(weights: Weights) -> Any:
    """What makes tensors of images. Raises WeightsError or SettingsError that says what is missing."""
    return _from_folder(weights, "AutoImageProcessor", "the image processor")


def load_feature_extractor(weights: Weights) -> Any:
    """What makes tensors of sound. Raises WeightsError or SettingsError that says what is missing."""
    return _from_folder(weights, "AutoFeatureExtractor", "the feature extractor")


def small_files(weights: Weights) -> Path:
    """The folder, once all its files but those of weights are there; not all of it, as `weights.directory()` waits for."""
    for name in weights.files():
        if not name.endswith(_OF_WEIGHTS):
            weights.path(name)
    return weights.path("config.json").parent


def first_line(error: BaseException) -> str:
    """The first sentence of what an error says: the library's own are long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].partition(". ")[0] if lines else type(error).__name__


def _from_folder(weights: Weights, kind: str, what: str) -> Any:
    transformers, folder = library(), small_files(weights)
    with explained(what):
        try:
            return getattr(transformers, kind).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError, KeyError, TypeError) as error:
            if "trust_remote_code" in str(error):
                raise SettingsError(f"{what} needs code that comes with the model, which is not run here") from error
            raise WeightsError(f"{what} cannot be made of the files of the weights: {first_line(error)}") from error


def _check_vocabulary(tokenizer: Any, weights: Weights) -> None:
    """Raises WeightsError where there is none: the library then makes a tokenizer that knows no word."""
    names = set(getattr(tokenizer, "vocab_files_names", {}).values())
    if names and not names & set(weights.files()):
        raise WeightsError(
            f"the weights have no vocabulary for the tokenizer, which is one of {', '.join(sorted(names))}: save it beside the model, "
            "tokenizer.save_pretrained(FOLDER), and push FOLDER again"
        )


def _model_class(config: Any, kind: str | type | None) -> Any:
    transformers = library()
    if isinstance(kind, type):
        found: Any = kind
    elif kind is None:
        names = config.architectures or []
        if not names:
            raise WeightsError("config.json has no 'architectures', so that the model's class is not known")
        kind = names[0]
    if isinstance(kind, str):
        with explained(kind):
            found = getattr(transformers, kind, None)
    if found is None:
        raise WeightsError(f"transformers {transformers.__version__} has no class {kind!r}, which the model is of")
    if not hasattr(found, "_model_mapping"):
        return found
    from transformers.models.auto import auto_factory

    if type(config) not in found._model_mapping:  # noqa: SLF001  what its own from_pretrained asks, which wants a folder
        raise WeightsError(f"a model of type {config.model_type!r} is none of {found.__name__}: {choice.fitting(config)}")
    with explained(found.__name__):
        return auto_factory._get_model_class(config, found._model_mapping)  # noqa: SLF001


def _of_model(weights: Weights) -> Weights:
    """Without tensors of other files, such as those in another precision or of another library."""
    files = weights.files()
    if INDEX in files:
        return weights
    if MODEL in files:
        return weights.only(MODEL)
    return weights.only(*(name for name in files if name.endswith(".safetensors") and "/" not in name))


def _no_tensors(files: Collection[str], config: Any) -> str:
    if any(name in files for name in _PICKLED):
        kind = (config.architectures or ["AutoModel"])[0]
        return (
            "the weights are pickled (pytorch_model.bin), which is not restored. Convert them once where they come from: "
            f"`from transformers import {kind}; {kind}.from_pretrained(FOLDER).save_pretrained(FOLDER)` writes model.safetensors; "
            "then remove pytorch_model*.bin* from FOLDER and push it again"
        )
    if any(name.endswith(".gguf") for name in files):
        return "the weights are GGUF; `relight convert` makes safetensors of those of Llama's kind, or take the model's safetensors"
    return f"the weights have no {MODEL}, and no {INDEX} with its files"


def _dtype(name: str | None) -> "torch.dtype | None":
    import torch

    if name is not None and name not in DTYPES:
        raise SettingsError(f"there is no dtype {name!r}; there are {', '.join(DTYPES)}")
    return getattr(torch, name) if name else None


def _most_common_dtype(tensors: Collection["Tensor"]) -> "torch.dtype":
    """The one that most bytes have, of floating-point numbers."""
    import torch

    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _check(model: Any, info: Mapping[str, Any], spare: Sequence[str]) -> None:
    """Raises WeightsError if the weights are not those of the model."""
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(tuple(spare)))
    unexpected = sorted(info["unexpected_keys"])
    heads = [name for name in unexpected if _is_of_another_head(model, name)]
    wrong = [
        *map(_mismatch, sorted(info["mismatched_keys"])[:_NAMED]),
        *map(first_line, [Exception(text) for text in info.get("error_msgs", [])]),
    ]
    strange = [name for name in unexpected if name not in heads]
    said = [f"they lack {_some(missing)}"] * bool(missing) + [f"the model has no {_some(strange)}"] * bool(strange) + wrong
    name = type(model).__name__
    if said and missing and name not in (model.config.architectures or [name]):
        raise WeightsError(f"{choice.fitting(model.config)}. As {name}, which was asked for, {'; '.join(said)}")
    if said:
        raise WeightsError(f"the weights do not fit {name}, which config.json describes: {'; '.join(said)}")
    if heads:
        log.info("%s has no use for %s of the weights", type(model).__name__, _some(heads))


def _mismatch(found: Any) -> str:
    """A tensor of another shape; version 4 tells no more than its name."""
    if isinstance(found, str):
        return f"{found} is of another shape"
    name, there, wanted = found
    return f"{name} is {_shape(there)}, not {_shape(wanted)}"


def _is_of_another_head(model: Any, name: str) -> bool:
    """Whether a tensor belongs to a part that the model's class does without: a head, or the pooler of the model below it.

    Not so of a layer more than the config says, or of a parameter more in a module that is there: without them the answers would be others.
    """
    module, parts = model, name.split(".")
    is_below = parts[0] == model.base_model_prefix and hasattr(model, parts[0])
    if is_below:
        module, parts = getattr(model, parts[0]), parts[1:]
    while len(parts) > 1 and not is_below and getattr(module, parts[0], None) is not None:
        module, parts = getattr(module, parts[0]), parts[1:]
    return len(parts) > 1 and not parts[0].isdigit() and getattr(module, parts[0], None) is None


def _place(model: Any, views: Mapping[str, "Tensor"], placed: Mapping[str, "Tensor"]) -> None:
    """Have a model on the CPU use the same tensors on another device, and move there what was made besides."""
    device = next(iter(placed.values())).device
    there: dict[tuple[Any, ...], Tensor] = {_identity(view): placed[name] for name, view in views.items()}
    move: Callable[[Tensor], Tensor] = lambda tensor: there.get(_identity(tensor), tensor).to(device)  # noqa: E731
    model._apply(move)  # noqa: SLF001  what `model.to` calls; parameters that are tied stay one


def _identity(tensor: "Tensor") -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _read_generation_config(model: Any, weights: Weights) -> None:
    if model.can_generate() and "generation_config.json" in weights.files():
        folder = weights.path("generation_config.json").parent
        model.generation_config = library().GenerationConfig.from_pretrained(folder, local_files_only=True)


def _import_reason(error: BaseException) -> str | None:
    """What is wrong with the libraries that transformers uses, None if it is not about that."""
    chain, at = [], error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__  # type: ignore[assignment]
    texts = " ".join(map(str, chain))
    if "torchvision" in texts and not any(isinstance(one, ImportError) and one.name == "torchvision" for one in chain):
        return (
            f"torchvision {_version('torchvision')} does not fit torch {_version('torch')}: install the torchvision that was built for "
            f"this torch, or uninstall it, as the agents here do without ({first_line(chain[-1])})"
        )
    absent = [one.name for one in chain if isinstance(one, ModuleNotFoundError) and one.name]
    if absent and absent[-1].split(".")[0] in ("transformers", "huggingface_hub"):
        return f"transformers is not installed; {EXTRA}"
    if absent:
        return f"the package {absent[-1].split('.')[0]!r} is not installed"
    return first_line(chain[-1]) if any(isinstance(one, ImportError) for one in chain) else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(of unknown version)"


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path.name} must be a JSON object")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _shape(size: Sequence[int]) -> str:
    return "x".join(map(str, size)) or "one number"
