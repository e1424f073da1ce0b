"""all-MiniLM-L6-v2: sentences to vectors, in plain torch on the restored tensors.

A BERT encoder (Devlin et al., 2018) with the pooling of Sentence-Transformers (Reimers and Gurevych, 2019): the mean over a
sentence's tokens, scaled to length 1. There are no torch modules to construct and then overwrite: the weights are used where they lie.

The sentences of a batch lie one after the other, without padding: only attention, a few hundredths of the work, sees them side by side.
Padded to the longest, sentences of 5 to 40 words would cost half as much again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's customary name
from tokenizers import Tokenizer
from torch import Tensor

from function.agent import BadInput, Weights
from function.agents.linear import Linear

MAX_TOKENS = 256  # what the model was trained with; longer sentences are cut


class MiniLM:
    """One sentence in, 384 numbers out; the dot product of two outputs is their cosine."""

    def load(self, weights: Weights, device: str) -> None:
        """Bind the encoder's tensors and build its tokenizer."""
        config = json.loads(weights.path("config.json").read_text())
        self._layers: int = config["num_hidden_layers"]
        self._heads: int = config["num_attention_heads"]
        self._eps: float = config["layer_norm_eps"]
        self._tokenizer = Tokenizer.from_file(str(weights.path("tokenizer.json")))
        self._tokenizer.no_padding()  # the file pads everything to 128 tokens; we pad to the longest of a batch
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._weights: Mapping[str, Tensor] = dict(weights.to(device))
        layers = [key.removesuffix(".weight") for key, weight in self._weights.items() if key.startswith("encoder.") and weight.ndim == 2]
        self._linears = {name: Linear(self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]) for name in layers}
        self._packing = self._pack()
        self._device = self._weights["embeddings.word_embeddings.weight"].device

    def warm_up(self) -> None:
        """The first pass sets up torch's kernels."""
        self.predict(["warm up"])

    def size(self, input: Any) -> int:  # noqa: A002  the contract's word
        """About how many tokens it has (one for four letters), in steps of 64: only attention is padded, so less makes no difference."""
        return min(-(-(len(input) // 4 + 2) // 64) * 64, MAX_TOKENS) if isinstance(input, str) else 0

    def predict(self, inputs: Sequence[Any]) -> Sequence[list[float]]:
        """A vector of 384 floats, of length 1, for each sentence."""
        for sentence in inputs:
            if not isinstance(sentence, str):
                raise BadInput(f"each instance must be a sentence (a string), not {type(sentence).__name__}")
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(inputs))]
        tokens = torch.tensor([token for row in rows for token in row])
        with torch.inference_mode():
            vectors: list[list[float]] = self._embed(tokens.to(self._device), Layout(list(map(len, rows)), self._device)).tolist()
            next(self._packing, None)
        return vectors

    def _pack(self) -> Iterator[None]:
        """A layer with each of the first batches, as all at once would keep a caller waiting, but for those that a cold start waits for."""
        yield from (None, None)  # the warm-up, and whoever woke us
        for layer in self._linears.values():
            layer.pack()
            yield

    def _embed(self, tokens: Tensor, layout: "Layout") -> Tensor:
        """tokens: int64 [t], those of all sentences. Returns float32 [n, 384]."""
        w = self._weights
        x = F.embedding(tokens, w["embeddings.word_embeddings.weight"])
        x = x + F.embedding(layout.positions, w["embeddings.position_embeddings.weight"]) + w["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        for layer in range(self._layers):
            x = self._layer(x, layout, f"encoder.layer.{layer}")
        return F.normalize(layout.spread(x).sum((1, 2)) / layout.lengths[:, None], dim=1)

    def _layer(self, x: Tensor, layout: "Layout", name: str) -> Tensor:
        query, key, value = (
            layout.spread(self._linear(x, f"{name}.attention.self.{part}"), self._heads).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.visible).transpose(1, 2).flatten(2)
        attended = layout.gather(attended)
        x = self._norm(x + self._linear(attended, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        inner = F.gelu(self._linear(x, f"{name}.intermediate.dense"))
        return self._norm(x + self._linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return self._linears[name](x)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], self._eps)


class Layout:
    """Where the tokens of a batch are: all in one row, and side by side in a grid that is padded to the longest sentence."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """lengths: each sentence's, in tokens."""
        columns = torch.arange(max(lengths))
        mask = columns < torch.tensor(lengths)[:, None]
        cells = mask.flatten().nonzero().squeeze(1)
        is_full = len(cells) == mask.numel()
        self._shape = mask.shape
        self._cells = None if is_full else cells.to(device)  # of the grid, flattened, that have tokens; None if all have
        self.visible = None if is_full else mask[:, None, None, :].to(device)  # for attention
        self.positions = (cells % len(columns)).to(device)  # of each token in its sentence
        self.lengths = torch.tensor(lengths, device=device)

    def spread(self, x: Tensor, heads: int = 1) -> Tensor:
        """[t, f] → [n, longest, heads, f / heads], with zeros where a sentence is shorter."""
        if self._cells is not None:
            x = x.new_zeros(self._shape.numel(), x.shape[1]).index_copy_(0, self._cells, x)
        return x.view(*self._shape, heads, -1)

    def gather(self, grid: Tensor) -> Tensor:
        """[n, longest, f] → [t, f]."""
        x = grid.flatten(0, 1)
        return x if self._cells is None else x.index_select(0, self._cells)
