"""`relight convert` on small GGUF files made here, from which every number is known."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

from function.agents.byte_alphabet import BYTES
from knative.cli import main
from tests.support import BIN, ROOT

HIDDEN, INNER, HEADS, KEY_HEADS, LAYERS = 64, 96, 4, 2, 2
WIDTH = HIDDEN // HEADS
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(BYTES), "he", "Ġhe", "12"]
TEMPLATE = "{{ messages[0]['content'] }}"

Array = np.ndarray[Any, Any]


def tensors(*, tied: bool = True) -> dict[str, Array]:
    """The original model's, under Hugging Face's names, in the order they are used in."""
    random = np.random.default_rng(1)

    def some(*shape: int) -> Array:
        return random.standard_normal(shape, dtype=np.float32)

    found = {"model.embed_tokens.weight": some(len(TOKENS), HIDDEN)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        found |= {
            f"{name}.input_layernorm.weight": some(HIDDEN),
            f"{name}.self_attn.q_proj.weight": some(HIDDEN, HIDDEN),
            f"{name}.self_attn.k_proj.weight": some(KEY_HEADS * WIDTH, HIDDEN),
            f"{name}.self_attn.v_proj.weight": some(KEY_HEADS * WIDTH, HIDDEN),
            f"{name}.self_attn.o_proj.weight": some(HIDDEN, HIDDEN),
            f"{name}.post_attention_layernorm.weight": some(HIDDEN),
            f"{name}.mlp.gate_proj.weight": some(INNER, HIDDEN),
            f"{name}.mlp.up_proj.weight": some(INNER, HIDDEN),
            f"{name}.mlp.down_proj.weight": some(HIDDEN, INNER),
        }
    found["model.norm.weight"] = some(HIDDEN)
    return found if tied else {**found, "lm_head.weight": some(len(TOKENS), HIDDEN)}


def in_gguf(name: str, numbers: Array) -> tuple[str, Array]:
    """A tensor as llama.cpp stores it: row 2i of a head is row i of the original's first half, row 2i + 1 of its second half."""
    for theirs, ours in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "_proj": "",
    }.items():
        name = name.replace(theirs, ours)
    if name.endswith(("attn_q.weight", "attn_k.weight")):
        half = WIDTH // 2
        order = [head * WIDTH + row // 2 + half * (row % 2) for head in range(len(numbers) // WIDTH) for row in range(WIDTH)]
        numbers = numbers[order]
    return name, numbers


Change = Callable[[dict[str, Array]], object]


def write(path: Path, *, arch: str = "llama", pre: str = "smollm", q4_1: bool = False, tied: bool = True, change: Change = list) -> Path:
    """A GGUF of that model. change: of its tensors, under GGUF's names."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["h e", "Ġ he", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    stored = dict(in_gguf(name, numbers) for name, numbers in tensors(tied=tied).items())
    change(stored)
    for name, numbers in reversed(stored.items()):  # not in the order they are wanted in
        if q4_1 and numbers.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(path: Path, target: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["convert", str(path), str(target), *options])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "tiny"


@pytest.mark.parametrize("tied", [True, False])
def test_every_number_comes_back_under_its_original_name_in_the_order_of_a_forward_pass(tmp_path: Path, target: Path, tied: bool) -> None:
    result = convert(write(tmp_path / "tiny.gguf", tied=tied), target, "--dtype", "float32")
    assert (result.exit_code, result.stdout) == (0, f"{target}\n")
    with safe_open(target / "model.safetensors", "np") as file:
        assert list(file.offset_keys()) == list(tensors(tied=tied))
        assert file.metadata() == {"format": "pt", "provenance": "converted from F32"}
        for name, numbers in tensors(tied=tied).items():
            np.testing.assert_array_equal(file.get_tensor(name), numbers, name)
    config = json.loads((target / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied


def test_bfloat16_is_the_default_and_rounds_as_torch_does(source: Path, target: Path) -> None:
    assert convert(source, target).exit_code == 0
    found = load_file(target / "model.safetensors")
    for name, numbers in tensors().items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], torch.from_numpy(numbers).bfloat16()), name


def test_quantized_blocks_become_numbers_and_the_configuration_says_so(tmp_path: Path, target: Path) -> None:
    assert convert(write(tmp_path / "tiny.gguf", q4_1=True), target, "--dtype", "float32").exit_code == 0
    found = load_file(target / "model.safetensors")
    for name, numbers in tensors().items():
        step = (numbers.max() - numbers.min()) / 15 if numbers.ndim == 2 else 0
        assert abs(found[name].numpy() - numbers).max() <= 0.51 * step + 0.004, name
    assert json.loads((target / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "name": "Tiny",
        "provenance": "converted from Q4_1",
        "license": "apache-2.0",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": WIDTH,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "vocab_size": len(TOKENS),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def test_the_tokenizer_splits_digits_keeps_special_tokens_and_loses_nothing(source: Path, target: Path) -> None:
    assert convert(source, target).exit_code == 0
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert tokenizer.encode("he 12 he<|im_end|>").tokens == ["he", "Ġ", "1", "2", "Ġhe", "<|im_end|>"]
    for text in ("  tabs\tand\nlines ", "naïve — 東京 🎈", "he's 3.14"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_chat_template_and_the_special_tokens_have_a_file(source: Path, target: Path) -> None:
    assert convert(source, target).exit_code == 0
    assert json.loads((target / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 128,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
    }


def refused(result: Result, target: Path) -> str:
    """The one line that it says, when it leaves nothing behind."""
    assert result.exit_code == 1
    assert result.stdout == ""
    line, rest = result.stderr.split("\n", 1)
    assert rest == ""
    assert not target.parent.exists()
    return line.removeprefix("Error: ")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip archive"])
def test_a_file_that_is_no_gguf_is_refused_in_one_line(tmp_path: Path, target: Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    assert refused(convert(tmp_path / "other", target), target) == f"{tmp_path}/other is not a GGUF file: it begins with {content[:4]!r}"


def test_a_model_of_another_architecture_is_refused_in_one_line(tmp_path: Path, target: Path) -> None:
    path = write(tmp_path / "other.gguf", arch="gpt2")
    assert refused(convert(path, target), target) == f"{path}: the architecture is 'gpt2'; only 'llama' is supported"


def test_another_tokenizer_is_refused_in_one_line(tmp_path: Path, target: Path) -> None:
    path = write(tmp_path / "other.gguf", pre="llama-bpe")
    assert "a tokenizer of kind 'gpt2/llama-bpe' is not supported" in refused(convert(path, target), target)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lambda found: found.pop("blk.1.ffn_up.weight"), "tensor 'blk.1.ffn_up.weight' is missing", id="one is missing"),
        pytest.param(
            lambda found: found.update({"rope_freqs.weight": np.ones(8, np.float32)}),
            "tensor 'rope_freqs.weight' is none of a plain llama model's; such models are not supported",
            id="one is strange",
        ),
        pytest.param(
            lambda found: found["output_norm.weight"].fill(np.nan), "tensor 'output_norm.weight' is damaged", id="one is not numbers"
        ),
    ],
)
def test_tensors_that_are_no_llama_models_are_refused_in_one_line(tmp_path: Path, target: Path, change: Change, says: str) -> None:
    path = write(tmp_path / "other.gguf", change=change)
    assert refused(convert(path, target), target) == f"{path}: {says}"


def test_a_file_that_was_cut_off_anywhere_is_refused_in_one_line(source: Path, target: Path) -> None:
    whole = source.read_bytes()
    for size in [*range(4, 400, 7), *range(400, len(whole), len(whole) // 40), len(whole) - 300]:
        source.write_bytes(whole[:size])
        assert "damaged GGUF file" in refused(convert(source, target), target)


def test_a_conversion_that_fails_leaves_an_earlier_one_as_it_was(tmp_path: Path, source: Path, target: Path) -> None:
    assert convert(source, target).exit_code == 0
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert before.keys() == FILES
    damaged = write(tmp_path / "damaged.gguf", change=lambda found: found["output_norm.weight"].fill(np.inf))
    assert convert(damaged, target, "--dtype", "float32").exit_code == 1
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert convert(source, target, "--dtype", "float32").exit_code == 0
    assert {path.name for path in target.iterdir()} == FILES
    assert (target / "model.safetensors").stat().st_size > 1.9 * len(before["model.safetensors"])


def test_progress_is_a_plain_line_on_stderr_where_there_is_no_terminal(source: Path, target: Path) -> None:
    result = convert(source, target)
    assert result.stderr.startswith("convert tiny.gguf: 0.2 of 0.2 MB, ")
    assert result.stderr.count("\n") == 1


def test_progress_is_a_bar_on_a_terminal(source: Path, target: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    command = [str(BIN / "relight"), "convert", str(source), str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, timeout=60, check=True)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # how Linux says that the terminal is closed
        pass
    os.close(ours)
    assert done.stdout.decode() == f"{target}\n"
    assert "━" in shown.decode()


def test_without_its_extra_the_command_says_what_to_install(source: Path, target: Path) -> None:
    code = f"import sys; sys.modules['gguf'] = None; from knative.cli import main; main(['convert', {str(source)!r}, {str(target)!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("pip install 'relight[convert]'\n")
    assert done.stderr.count("\n") == 1
