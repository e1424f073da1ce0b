"""all-MiniLM-L6-v2: sentences to vectors, in plain torch on the restored tensors.

A BERT encoder (Devlin et al., 2018) with the pooling of Sentence-Transformers (Reimers and Gurevych, 2019): the mean over a
sentence's tokens, scaled to length 1. There are no torch modules to construct and then overwrite: the weights are used where they lie.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's customary name
from tokenizers import Tokenizer
from torch import Tensor

from function.agent import BadInput, Weights

MAX_TOKENS = 256  # what the model was trained with; longer sentences are cut


class MiniLM:
    """One sentence in, 384 numbers out; the dot product of two outputs is their cosine."""

    def load(self, weights: Weights, device: str) -> None:
        """Bind the encoder's tensors and build its tokenizer."""
        self._device = device
        config = json.loads(weights.path("config.json").read_text())
        self._layers: int = config["num_hidden_layers"]
        self._heads: int = config["num_attention_heads"]
        self._eps: float = config["layer_norm_eps"]
        self._tokenizer = Tokenizer.from_file(str(weights.path("tokenizer.json")))
        self._tokenizer.no_padding()  # the file pads everything to 128 tokens; we pad to the longest of a batch
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._weights: Mapping[str, Tensor] = dict(weights.to(device))

    def warm_up(self) -> None:
        """The first pass sets up torch's kernels."""
        self.predict(["warm up"])

    def predict(self, inputs: Sequence[Any]) -> Sequence[list[float]]:
        """A vector of 384 floats, of length 1, for each sentence."""
        for sentence in inputs:
            if not isinstance(sentence, str):
                raise BadInput(f"each instance must be a sentence (a string), not {type(sentence).__name__}")
        encodings = self._tokenizer.encode_batch_fast(list(inputs))
        longest = max(len(encoding.ids) for encoding in encodings)
        tokens = torch.zeros(len(inputs), longest, dtype=torch.long)
        mask = torch.zeros(len(inputs), longest, dtype=torch.bool)
        for row, encoding in enumerate(encodings):
            tokens[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
            mask[row, : len(encoding.ids)] = True
        with torch.inference_mode():
            vectors: list[list[float]] = self._embed(tokens.to(self._device), mask.to(self._device)).tolist()
        return vectors

    def _embed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens: int64 [n, t]; mask: bool [n, t], True at tokens. Returns float32 [n, 384]."""
        w = self._weights
        x = w["embeddings.word_embeddings.weight"][tokens]
        x = x + w["embeddings.position_embeddings.weight"][: tokens.shape[1]] + w["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        visible = mask[:, None, None, :]
        for layer in range(self._layers):
            x = self._layer(x, visible, f"encoder.layer.{layer}")
        kept = mask[:, :, None].to(x.dtype)
        return F.normalize((x * kept).sum(1) / kept.sum(1), dim=1)

    def _layer(self, x: Tensor, visible: Tensor, name: str) -> Tensor:
        query, key, value = (
            self._linear(x, f"{name}.attention.self.{part}").view(*x.shape[:2], self._heads, -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible).transpose(1, 2).flatten(2)
        x = self._norm(x + self._linear(attended, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        inner = F.gelu(self._linear(x, f"{name}.intermediate.dense"))
        return self._norm(x + self._linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], self._eps)
