"""`relight convert`: a llama model in GGUF becomes what an agent restores, and what other servers open too.

    model.safetensors        the tensors under the names that Hugging Face's Llama has, in the order in which a forward pass needs them
    config.json              the model's shape
    tokenizer.json           for the `tokenizers` library
    tokenizer_config.json    the names of the special tokens, and the chat template

What GGUF does differently is undone: quantized blocks become numbers again (gguf.dequantize), and the rows of the query and key
projections return from the order that llama.cpp's rotary embedding wants (its convert_hf_to_gguf.py, `permute`) to the original one.
A conversion brings back no precision that quantization took: config.json says what it was converted from.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor

    Array = np.ndarray[Any, Any]

MODEL = "model.safetensors"
LINE_S = 5.0  # between two lines of progress where there is no terminal
ALIGNMENT = 64  # of the first tensor in the file; each of the others follows the one before it

_DTYPES = {"bfloat16": ("BF16", 2), "float32": ("F32", 4)}  # the format's name, bytes a number

# GGUF's name → Hugging Face's, in the order in which a forward pass needs them.
_HEAD = {"token_embd.weight": "model.embed_tokens.weight"}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TAIL = {"output_norm.weight": "model.norm.weight"}
_UNTIED = {"output.weight": "lm_head.weight"}  # absent where the embedding is used once more

_CONTROL, _USER_DEFINED = 3, 4  # token types: special ones, and others that are taken out of the text before it is split

T = TypeVar("T")


class ConvertError(Exception):
    """The file cannot be converted; says why in one line."""


class Source:
    """A GGUF file: its metadata, and its tensors as numbers."""

    def __init__(self, path: Path) -> None:
        """Raises ConvertError unless it is the GGUF of a llama model whose parts are known here."""
        self.path = path
        self._reader = _read(path)
        architecture = self.text("general.architecture")
        if architecture != "llama":
            raise ConvertError(f"{path}: the architecture is {architecture!r}; only 'llama' is supported")
        self._tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in self._reader.tensors}
        self.is_tied = not set(_UNTIED) & set(self._tensors)
        self.names = self._names()

    def _names(self) -> dict[str, str]:
        """GGUF's name of each tensor → Hugging Face's."""
        names = dict(_HEAD)
        for layer in range(self.number("llama.block_count")):
            names |= {f"blk.{layer}.{name}": f"model.layers.{layer}.{theirs}" for name, theirs in _LAYER.items()}
        names |= _TAIL if self.is_tied else _TAIL | _UNTIED
        if lacking := sorted(set(names) - set(self._tensors)):
            raise ConvertError(f"{self.path}: tensor {lacking[0]!r} is missing")
        if strange := sorted(set(self._tensors) - set(names)):
            raise ConvertError(f"{self.path}: tensor {strange[0]!r} is none of a plain llama model's; such models are not supported")
        return names

    def _get(self, key: str, kind: type[T], default: T | None) -> T:
        field = self._reader.get_field(key)
        found = field.contents() if field else default
        if found is None:
            raise ConvertError(f"{self.path}: its metadata has no {key!r}")
        if not isinstance(found, kind):
            raise ConvertError(f"{self.path}: {key!r} in its metadata is {found!r:.50}, not of type {kind.__name__}")
        return found

    def text(self, key: str, default: str | None = None) -> str:
        """A string of the metadata. Raises ConvertError, as the others do, if it is not there or something else."""
        return self._get(key, str, default)

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number of the metadata, not negative."""
        found = self._get(key, int, default)
        if isinstance(found, bool) or found < 0:
            raise ConvertError(f"{self.path}: {key!r} in its metadata is {found}")
        return found

    def flag(self, key: str) -> bool:
        """A boolean of the metadata, False if it is not there."""
        return self._get(key, bool, False)

    def real(self, key: str) -> float:
        """A float32 of the metadata, as the decimal number that was meant: 1e-05, not 9.999999747378752e-06."""
        import numpy as np

        return float(str(np.float32(self._get(key, float, None))))

    def items(self, key: str) -> list[Any]:
        """A list of the metadata."""
        return self._get(key, list, None)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's, outermost dimension first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def numbers(self, name: str) -> "Array":
        """A tensor in float32, its rows in the original order. Raises ConvertError if it is of an unknown type or damaged."""
        import gguf
        import numpy as np

        tensor = self._tensors[name]
        try:
            found = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ConvertError(f"{self.path}: tensor {name!r} of type {tensor.tensor_type.name} cannot be read: {error}") from error
        if found.shape != self.shape(name) or not np.isfinite(found).all():
            raise ConvertError(f"{self.path}: tensor {name!r} is damaged")
        heads = self.heads
        if name.endswith("attn_q.weight"):
            return _original_order(found, heads)
        if name.endswith("attn_k.weight"):
            return _original_order(found, self.number("llama.attention.head_count_kv", heads))
        return found

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.number("llama.attention.head_count")

    def quantization(self) -> str:
        """The type that most of the numbers have, such as Q4_1."""
        bytes_of: dict[str, int] = {}
        for tensor in self._tensors.values():
            bytes_of[tensor.tensor_type.name] = bytes_of.get(tensor.tensor_type.name, 0) + tensor.n_elements
        return max(bytes_of, key=lambda name: bytes_of[name])


def _read(path: Path) -> "GGUFReader":
    try:
        import gguf
    except ImportError as error:
        raise ConvertError(f"converting needs another package ({error}): pip install 'relight[convert]'") from error
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ConvertError(f"{path} is not a GGUF file: it begins with {magic!r}")
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # what its parser stumbles over
        raise ConvertError(f"{path} is a damaged GGUF file, or an unknown version of it: {error}") from error


def _original_order(rows: "Array", heads: int) -> "Array":
    """Undo llama.cpp's permutation: it keeps the two halves of each head interleaved, the original one after the other."""
    if not heads or rows.shape[0] % (2 * heads):
        raise ConvertError(f"{rows.shape[0]} rows of a projection cannot belong to {heads} heads")
    found: Array = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
    return found


def config(source: Source, dtype: str) -> dict[str, Any]:
    """config.json, as Hugging Face's LlamaForCausalLM has it."""
    hidden, heads = source.number("llama.embedding_length"), source.heads
    if not heads or source.number("llama.rope.dimension_count", hidden // heads) * heads != hidden:
        raise ConvertError(f"{source.path}: {hidden} dimensions in {heads} heads, of which only a part is rotated, are not supported")
    if (scaling := source.text("llama.rope.scaling.type", "none")) != "none":
        raise ConvertError(f"{source.path}: scaled rotary embeddings ({scaling}) are not supported")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "name": source.text("general.name", source.path.stem),
        "provenance": f"converted from {source.quantization()}",
        "license": source.text("general.license", "unknown"),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": source.number("llama.feed_forward_length"),
        "num_hidden_layers": source.number("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.number("llama.attention.head_count_kv", heads),
        "head_dim": hidden // heads,
        "max_position_embeddings": source.number("llama.context_length"),
        "rms_norm_eps": source.real("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": source.real("llama.rope.freq_base"),
        "vocab_size": source.shape("token_embd.weight")[0],
        "tie_word_embeddings": source.is_tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": source.number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.number("tokenizer.ggml.eos_token_id"),
        "torch_dtype": dtype,
    }


def tokenizer(source: Source) -> str:
    """tokenizer.json: byte-pair encoding whose input is split as SmolLM's is."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (source.text("tokenizer.ggml.model"), source.text("tokenizer.ggml.pre", "default"))
    if kind != ("gpt2", "smollm"):
        raise ConvertError(f"{source.path}: a tokenizer of kind {'/'.join(kind)!r} is not supported, only 'gpt2/smollm'")
    tokens: list[str] = source.items("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in source.items("tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises nothing more special
        raise ConvertError(f"{source.path}: its tokenizer is damaged: {error}") from error
    # Each digit by itself, then the words and marks of GPT-2's pattern, as bytes.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    made.decoder = decoders.ByteLevel()
    types = source.items("tokenizer.ggml.token_type")
    for token, type_ in zip(tokens, types, strict=False):
        if type_ == _CONTROL:
            made.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif type_ == _USER_DEFINED:
            made.add_tokens([AddedToken(token, normalized=False)])
    return made.to_str(pretty=True)


def tokenizer_config(source: Source) -> dict[str, Any]:
    """tokenizer_config.json: the special tokens by their use, and the chat template (Jinja) where there is one."""
    tokens = source.items("tokenizer.ggml.tokens")
    found: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.number("llama.context_length"),
        "add_bos_token": source.flag("tokenizer.ggml.add_bos_token"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    for use, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = source.number(f"tokenizer.ggml.{key}_token_id", len(tokens))
        if number < len(tokens):
            found[f"{use}_token"] = tokens[number]
    if template := source.text("tokenizer.chat_template", ""):
        found["chat_template"] = template
    return found


def write_tensors(source: Source, file: BinaryIO, dtype: str, progress: Callable[[int], object]) -> None:
    """model.safetensors, one tensor at a time, so that a model need not fit into memory. progress: is told the bytes of each."""
    name_of, width = _DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "provenance": f"converted from {source.quantization()}"}}
    at = 0
    for name, theirs in source.names.items():
        size = math.prod(source.shape(name)) * width
        header[theirs] = {"dtype": name_of, "shape": source.shape(name), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in source.names:
        numbers = source.numbers(name)
        written = file.write((_bfloat16(numbers) if dtype == "bfloat16" else numbers.astype("<f4")).tobytes())
        progress(written)


def _bfloat16(numbers: "Array") -> "Array":
    """The bits of finite float32 numbers as bfloat16, to the nearest, to the even one of two: numpy has no such type."""
    bits = numbers.astype("<f4").view("<u4")
    found: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return found


def convert(path: Path, directory: Path, dtype: str, progress: Callable[[int], object], total: Callable[[int], object]) -> None:
    """Write the four files into a directory, each complete or not at all, the tensors last.

    total: is told the bytes of tensors that `progress` will add up to. Raises ConvertError and OSError; then no file has changed.
    """
    source = Source(path)
    total(sum(math.prod(source.shape(name)) for name in source.names) * _DTYPES[dtype][1])
    texts = {
        "config.json": _json(config(source, dtype)),
        "tokenizer.json": tokenizer(source),
        "tokenizer_config.json": _json(tokenizer_config(source)),
    }
    with _replacing(directory, [*texts, MODEL]) as files:
        for name, text in texts.items():
            files[name].write(text.encode())
        write_tensors(source, files[MODEL], dtype, progress)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _replacing(directory: Path, names: list[str]) -> Iterator[Mapping[str, BinaryIO]]:
    """Files to write, under temporary names; they get their own when all went well, and otherwise go away."""
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    parts = {name: directory / f".{name}.{os.getpid()}.part" for name in names}
    try:
        with contextlib.ExitStack() as opened:
            files = {name: opened.enter_context(part.open("wb")) for name, part in parts.items()}
            yield files
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        for name, part in parts.items():
            part.replace(directory / name)
    except BaseException:
        for part in parts.values():
            part.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                folder.rmdir()
        raise


class _Shown:
    """Shows on stderr how far it is: a bar on a terminal, elsewhere a plain line every few seconds and one at the end."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._total = self._done = 0
        self._began = self._said = time.monotonic()
        self._bar: Any = None

    def total(self, size: int) -> None:
        self._total = size
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self._what, total=size)
            self._bar.start()

    def add(self, size: int) -> None:
        self._done += size
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif self._done == self._total or time.monotonic() - self._said >= LINE_S:
            self._said = time.monotonic()
            seconds = self._said - self._began
            click.echo(f"{self._what}: {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, {seconds:.1f} s", err=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


@click.command(name="convert")
@click.argument("source", metavar="SRC.gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="bfloat16", show_default=True, help="What the tensors become.")
def command(source: Path, directory: Path, dtype: str) -> None:
    """Convert the llama model in SRC.gguf to safetensors, with its tokenizer and configuration, and print DIR."""
    shown = _Shown(f"convert {source.name}")
    try:
        convert(source, directory, dtype, shown.add, shown.total)
    except (ConvertError, OSError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        shown.close()
    click.echo(str(directory))
