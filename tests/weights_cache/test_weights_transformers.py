"""Unchanged classes of transformers around restored weights: tiny models with random weights, made here."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from tests.support import fill_cache
from weights_cache.errors import WeightsError
from weights_cache.reader import Weights
from weights_cache.settings import WeightsSettings

URI = "s3://models/tiny"
TEXT: Mapping[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 32,
}
VISION = {
    **{name: TEXT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "patch_size": 8,
}
SPEECH = {"vocab_size": 32, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 8}
LAYERS = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WHISPER = {**SPEECH, **LAYERS, **TOKENS, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_start_token_id": 1}
KINDS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "bert": ("BertConfig", "AutoModelForSequenceClassification", TEXT),
    "llama": ("LlamaConfig", "AutoModelForCausalLM", TEXT),
    "gpt2": (
        "GPT2Config",
        "AutoModelForCausalLM",
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 32, **TOKENS},
    ),
    "vit": ("ViTConfig", "AutoModelForImageClassification", {**VISION, "image_size": 16}),
    "whisper": ("WhisperConfig", "AutoModelForSpeechSeq2Seq", WHISPER),
    "clip": ("CLIPConfig", "AutoModel", {"text_config": dict(TEXT), "vision_config": {**VISION, "image_size": 16}, "projection_dim": 8}),
    "t5": ("T5Config", "AutoModelForSeq2SeqLM", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}),
}


@pytest.fixture(scope="module", autouse=True)
def library() -> Any:
    from function.agents.transformers import loading

    return loading.library()


def made(kind: str, library: Any) -> tuple[Any, Callable[[], Any]]:
    """A model with random weights, and what makes another one."""
    config_name, auto, options = KINDS[kind]
    config = getattr(library, config_name)(**options)

    def build() -> Any:
        return getattr(library, auto).from_config(config)

    model = build()
    model.eval()
    return model, build


def restored(model: Any, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any] = lambda state: None) -> Weights:
    """The weights as the library saves them, changed."""
    saved = folder / "saved"
    model.save_pretrained(saved)
    state = load((saved / "model.safetensors").read_bytes())
    change(state)
    fill_cache(folder / "cache", URI, {"model.safetensors": save(state), "config.json": (saved / "config.json").read_bytes()})
    return Weights(WeightsSettings(uri=URI, cache_dir=folder / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_transformers_is_built_around_the_weights(kind: str, library: Any, tmp_path: Path) -> None:
    model, build = made(kind, library)
    weights = restored(model, tmp_path)
    found = weights.module(build, "cpu")
    theirs, mine = dict(model.named_parameters()), dict(found.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    mapped = {tensor.data_ptr() for tensor in weights.values()}
    assert all(parameter.data_ptr() in mapped for parameter in mine.values())
    buffers = dict(model.named_buffers())
    assert {name: buffer.tolist() for name, buffer in found.named_buffers()} == {name: one.tolist() for name, one in buffers.items()}


def test_a_prefix_that_would_mend_all_is_told(tmp_path: Path) -> None:
    fill_cache(tmp_path, URI, {"model.safetensors": save({"net.0.weight": torch.ones(2, 2), "net.0.bias": torch.zeros(2)})})
    weights = Weights(WeightsSettings(uri=URI, cache_dir=tmp_path))
    with pytest.raises(WeightsError, match=r"rename=lambda name: name\.removeprefix\('net\.'\)"):
        weights.module(lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)), "cpu")
    nested: Any = weights.module(lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)), "cpu", rename=lambda name: name.removeprefix("net."))
    assert nested[0].weight.tolist() == [[1, 1], [1, 1]]
    with pytest.raises(WeightsError, match=r"rename=lambda name: 'a\.' \+ name"):
        weights.module(lambda: torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"net": torch.nn.Sequential(torch.nn.Linear(2, 2))})}), "cpu")


@pytest.mark.parametrize("device", ["cpu", "host"])
@pytest.mark.parametrize("kind", ["bert", "llama", "vit", "t5"])
def test_the_library_binds_the_weights_itself_and_without_a_copy(kind: str, device: str, library: Any, tmp_path: Path) -> None:
    from function.agents.transformers.loading import load_model

    model, _ = made(kind, library)
    weights = restored(model, tmp_path)
    found = load_model(weights, device)
    assert type(found) is type(model)
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    theirs, mine = dict(model.named_parameters(remove_duplicate=False)), dict(found.named_parameters(remove_duplicate=False))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert len({id(one) for one in mine.values()}) == len({id(one) for one in theirs.values()})  # what was tied is
    assert all(torch.equal(one, dict(found.named_buffers())[name]) for name, one in model.named_buffers())
    mapped = {tensor.data_ptr() for tensor in weights.values()}
    assert {parameter.data_ptr() in mapped for parameter in mine.values()} == {device == "cpu"}


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: state.pop(name)


def add(**tensors: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: state.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(drop("classifier.weight"), r"BertForSequenceClassification.*they lack classifier\.weight$", id="a random head"),
        pytest.param(
            drop("bert.encoder.layer.0.output.dense.bias"), r"they lack bert\.encoder\.layer\.0\.output\.dense\.bias", id="a bias"
        ),
        pytest.param(
            add(bert__encoder__layer__1__output__dense__bias=torch.zeros(16)),
            r"the model has no bert\.encoder\.layer\.1\.output\.dense\.bias",
            id="a layer that the config does not have",
        ),
        pytest.param(
            add(classifier__weight=torch.zeros(3, 16)), r"classifier\.weight is (3x16, not 2x16|of another shape)", id="other labels"
        ),
    ],
)
def test_weights_that_are_not_those_of_the_model_are_an_error(
    change: Callable[[dict[str, torch.Tensor]], Any], reason: str, library: Any, tmp_path: Path
) -> None:
    from function.agents.transformers.loading import load_model

    weights = restored(made("bert", library)[0], tmp_path, change)
    with pytest.raises(WeightsError, match=reason):
        load_model(weights, "cpu")


def test_what_another_head_has_left_behind_is_no_error(library: Any, tmp_path: Path) -> None:
    from function.agents.transformers.loading import load_model

    change = add(cls__predictions__bias=torch.zeros(32), bert__pooler2__dense__weight=torch.zeros(2))
    weights = restored(made("bert", library)[0], tmp_path, change)
    assert load_model(weights, "cpu", "AutoModel").base_model_prefix == "bert"


def test_a_cast_is_a_copy_and_what_is_asked_for(library: Any, tmp_path: Path) -> None:
    from function.agents.transformers.loading import load_model

    weights = restored(made("bert", library)[0], tmp_path, lambda state: state.update({name: one.half() for name, one in state.items()}))
    assert {parameter.dtype for parameter in load_model(weights, "cpu").parameters()} == {torch.float16}
    assert {parameter.dtype for parameter in load_model(weights, "cpu", dtype="float32").parameters()} == {torch.float32}


CONFIG = b'{"model_type": "bert", "architectures": ["BertModel"]}'


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"pytorch_model.bin": b"x", "config.json": CONFIG}, r"pickled.*BertModel\.from_pretrained.*then remove pytorch_model"),
        ({"model.gguf": b"x", "config.json": CONFIG}, "GGUF"),
        ({"vocab.txt": b"x", "config.json": CONFIG}, "no model.safetensors"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "adapter to another model.*merge_and_unload"),
        ({"config.json": b"{"}, "no JSON"),
        ({"config.json": b"{}"}, "no 'model_type'"),
        ({"config.json": b'{"model_type": "nonesuch"}'}, "does not know model_type 'nonesuch'"),
        ({"config.json": b'{"model_type": "x", "auto_map": {"AutoConfig": "own.Config"}}', "own.py": b""}, "code that comes with it"),
        ({"config.json": b'{"model_type": "bert", "quantization_config": {"quant_method": "awq"}}'}, r"quantized \(awq\)"),
        ({"config.json": b'{"model_type": "bert", "architectures": ["OwnModel"]}'}, "no class 'OwnModel'"),
        ({"config.json": b'{"model_type": "bert"}'}, "no 'architectures'"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_cannot_be_restored_is_told_in_a_line(files: Mapping[str, bytes], reason: str, tmp_path: Path) -> None:
    from function.agents.transformers.loading import load_model
    from weights_cache.environment import SettingsError

    fill_cache(tmp_path, URI, files)
    with pytest.raises((WeightsError, SettingsError), match=reason) as caught:
        load_model(Weights(WeightsSettings(uri=URI, cache_dir=tmp_path)), "cpu")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_words_is_an_error(library: Any, tmp_path: Path) -> None:
    from function.agents.transformers.loading import load_tokenizer

    weights = restored(made("bert", library)[0], tmp_path)
    with pytest.raises(WeightsError, match=r"tokenizer\.save_pretrained\(FOLDER\)"):
        load_tokenizer(weights)


def fail_as_with_another_torchvision() -> None:
    try:
        raise RuntimeError("operator torchvision::nms does not exist")
    except RuntimeError as error:
        raise RuntimeError("Failed to import transformers.pipelines because of …\n(look up)\ntorchvision") from error


def test_a_torchvision_that_does_not_fit_is_named() -> None:
    from function.agents.transformers.loading import explained
    from weights_cache.environment import SettingsError

    with (
        pytest.raises(SettingsError, match=r"torchvision .* does not fit torch 2\..*operator torchvision::nms does not exist"),
        explained("it"),
    ):
        fail_as_with_another_torchvision()


def test_a_library_that_is_not_installed_is_named() -> None:
    from function.agents.transformers.loading import explained
    from weights_cache.environment import SettingsError

    with pytest.raises(SettingsError, match="the package 'nonesuch' is not installed"), explained("it"):
        importlib.import_module("nonesuch")
    with pytest.raises(SettingsError, match=r"pip install 'relight\[transformers\]'"), explained("it"):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
