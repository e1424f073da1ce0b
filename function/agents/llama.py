"""A Llama decoder in plain torch, used where its tensors lie: no modules to construct and then overwrite.

Sequences of different lengths share each forward pass: the tokens of all of them are the rows of one matrix, and only attention goes
through them one by one, each over a cache of its own (selective batching, Orca, OSDI 2022). So a sequence may bring its whole prompt
while the others bring one token each, none is padded to another's length, and one that is dropped leaves nothing behind.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's customary name
from torch import Tensor


class Cache:
    """The keys and values of one sequence's tokens. Room for all that may come is taken at once; the system fills it page by page."""

    def __init__(self, layers: int, heads: int, capacity: int, width: int, like: Tensor) -> None:
        """capacity: tokens; heads and width: the keys', and as many of the values."""
        self.length = 0  # tokens whose keys and values are in it
        room = torch.empty(layers, 2 * heads, capacity, width, dtype=like.dtype, device=like.device)
        self._layers = room.unbind()
        self._heads = heads

    def attend(self, layer: int, queries: Tensor, new: Tensor) -> Tensor:
        """Attention of new tokens to all so far and to themselves.

        queries: [tokens, heads, width]; new: [tokens, 2 × key heads, width], keys and then values. Returns [tokens, heads × width].
        """
        tokens, _, width = queries.shape
        stop = self.length + tokens
        kept = self._layers[layer][:, :stop]
        kept[:, self.length :] = new.transpose(0, 1)
        keys, values = kept[: self._heads], kept[self._heads :]
        # Several query heads share a key head: they are seen as further queries of it, so that no key has to be repeated.
        grouped = queries.view(tokens, self._heads, -1, width).permute(1, 2, 0, 3).flatten(1, 2)
        mask = None
        if tokens > 1:
            mask = torch.ones(tokens, stop, dtype=torch.bool, device=queries.device).tril(self.length)
            mask = mask.repeat(grouped.shape[1] // tokens, 1)
        attended = F.scaled_dot_product_attention(grouped[None], keys[None], values[None], attn_mask=mask)[0]
        return attended.view(self._heads, -1, tokens, width).permute(2, 0, 1, 3).reshape(tokens, -1)


class Llama:
    """The model: tokens in, logits out."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """config: config.json of a LlamaForCausalLM; weights: its tensors, which decide about precision and device."""
        self.context: int = config["max_position_embeddings"]
        self._heads: int = config["num_attention_heads"]
        self._key_heads: int = config["num_key_value_heads"]
        self._width: int = config["hidden_size"] // self._heads
        self._eps: float = config["rms_norm_eps"]
        self._embedding = weights["model.embed_tokens.weight"]
        self._head = self._embedding if config["tie_word_embeddings"] else weights["lm_head.weight"]
        self._layers = [_Layer(weights, f"model.layers.{layer}") for layer in range(config["num_hidden_layers"])]
        self._norm = weights["model.norm.weight"].float()
        frequencies = config["rope_theta"] ** -(torch.arange(0, self._width, 2, dtype=torch.float32) / self._width)
        angles = torch.outer(torch.arange(self.context, dtype=torch.float32), frequencies).repeat(1, 2).to(self._embedding.device)
        self._cos, self._sin = angles.cos(), angles.sin()

    def cache(self, capacity: int) -> Cache:
        """An empty one with room for so many tokens."""
        return Cache(len(self._layers), self._key_heads, capacity, self._width, self._embedding)

    def forward(self, parts: Sequence[tuple[Cache, Sequence[int]]]) -> Tensor:
        """The logits that follow the last new token of each sequence: float32 [sequences, vocabulary].

        parts: for each sequence its cache, and its tokens that are not yet in it, at least one.
        """
        device = self._embedding.device
        lengths = [len(tokens) for _, tokens in parts]
        tokens = torch.tensor([token for _, new in parts for token in new], device=device)
        positions = torch.tensor([cache.length + n for cache, new in parts for n in range(len(new))], device=device)
        cos, sin = self._cos[positions, None], self._sin[positions, None]
        x = self._embedding[tokens].float()  # the sum over the layers keeps full precision; what is multiplied by weights has theirs
        for number, layer in enumerate(self._layers):
            queries, new = self._project(layer, self._normal(x, layer.input_norm), cos, sin)
            attended = [
                cache.attend(number, own_queries, own_new)
                for (cache, _), own_queries, own_new in zip(parts, torch.split(queries, lengths), torch.split(new, lengths), strict=True)
            ]
            x += _linear(torch.cat(attended), layer.output)
            inner = self._normal(x, layer.inner_norm)
            x += _linear(F.silu(_linear(inner, layer.gate)) * _linear(inner, layer.up), layer.down)
        for (cache, _), length in zip(parts, lengths, strict=True):
            cache.length += length  # now, so that a pass that failed half-way can be made again
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        return _linear(self._normal(x[last], self._norm), self._head).float()

    def _project(self, layer: "_Layer", x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, and keys with values; queries and keys rotated by their positions (RoFormer, Su et al., 2021)."""
        turned = torch.cat([_linear(x, layer.query), _linear(x, layer.key)], 1).view(len(x), -1, self._width).float()
        first, second = turned.chunk(2, -1)
        turned = (turned * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
        values = _linear(x, layer.value).view(len(x), -1, self._width)
        return turned[:, : self._heads], torch.cat([turned[:, self._heads :], values], 1)

    def _normal(self, x: Tensor, weight: Tensor) -> Tensor:
        """Each row divided by its root mean square (Zhang and Sennrich, 2019), in the weights' precision."""
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._eps) * weight).to(self._embedding.dtype)


class _Layer:
    """The tensors of one layer."""

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        self.input_norm = weights[f"{name}.input_layernorm.weight"].float()
        self.query, self.key, self.value, self.output = (weights[f"{name}.self_attn.{part}_proj.weight"] for part in "qkvo")
        self.inner_norm = weights[f"{name}.post_attention_layernorm.weight"].float()
        self.gate, self.up, self.down = (weights[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x times a weight. A lone row of bfloat16 goes through as two: some processors sum one up in another order than several, and what a
    sequence gets would depend on whether others are there. From two rows on that order is the same with oneDNN on AVX-512, not on AMX;
    float32 has no such order, and would pay for the second row.
    """
    if len(x) == 1 and x.dtype == torch.bfloat16:
        return F.linear(x.expand(2, -1), weight)[:1]
    return F.linear(x, weight)
