"""The decoder on a small model of random weights, with products that round alike on every processor: there company changes not one bit.

What the processor's own products do is seen on real weights, in test_function_smollm2.py.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's customary name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from function.agents.llama import Cache, Llama

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "vocab_size": 96,
}
_PRODUCT = F.linear


def one_by_one(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ, each row by itself: all products are of one shape, so that the processor has nothing to choose by."""
    return torch.cat([_PRODUCT(row, weight) for row in torch.split(x, 1)])


def a_lone_row_in_halves(x: Tensor, weight: Tensor) -> Tensor:
    """As processors do that sum a lone row up in another order than several; AVX-512 BF16 does so."""
    if len(x) > 1:
        return one_by_one(x, weight)
    half = x.shape[1] // 2
    first, second = (one_by_one(x[:, part], weight[:, part].contiguous()) for part in (slice(half), slice(half, None)))
    return first + second


def model_of(dtype: torch.dtype) -> Llama:
    made = torch.Generator().manual_seed(5)

    def weight(*shape: int) -> Tensor:
        drawn: Tensor = torch.randn(*shape, generator=made) / float(shape[-1]) ** 0.5
        return drawn.to(dtype)

    hidden, inner, keys = CONFIG["hidden_size"], CONFIG["intermediate_size"], 32
    weights = {"model.embed_tokens.weight": 8 * weight(CONFIG["vocab_size"], hidden), "model.norm.weight": torch.ones(hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        for part, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            weights[f"model.layers.{layer}.{part}.weight"] = weight(rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden)
    return Llama(CONFIG, weights)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products as small as these are slower with more, the more so where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MODELS = {dtype: model_of(dtype) for dtype in (torch.float32, torch.bfloat16)}


class Sequence_:  # noqa: N801  as in the agent's contract
    """Parts that the model takes in one after the other, and the logits after each."""

    def __init__(self, model: Llama, parts: Sequence[Sequence[int]]) -> None:
        self.cache: Cache = model.cache(CONFIG["max_position_embeddings"])
        self.parts = list(parts)
        self.logits: list[Tensor] = []


def go_on(model: Llama, sequences: Sequence[Sequence_]) -> None:
    """One forward pass for all of these."""
    with torch.inference_mode():
        found = model.forward([(one.cache, one.parts.pop(0)) for one in sequences])
    for one, row in zip(sequences, found, strict=True):
        one.logits.append(row)


def alone(model: Llama, parts: Sequence[Sequence[int]]) -> list[Tensor]:
    sequence = Sequence_(model, parts)
    while sequence.parts:
        go_on(model, [sequence])
    return sequence.logits


def in_company(model: Llama, parts: Sequence[Sequence[Sequence[int]]], chance: random.Random) -> list[list[Tensor]]:
    """Of several sequences that are taken into a pass or left out by chance, in any order."""
    sequences = [Sequence_(model, own) for own in parts]
    while waiting := [one for one in sequences if one.parts]:
        go_on(model, chance.sample(waiting, chance.randint(1, len(waiting))))
    return [one.logits for one in sequences]


few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
TOKENS = st.lists(st.integers(0, CONFIG["vocab_size"] - 1), min_size=1, max_size=9)
PARTS = st.lists(TOKENS, min_size=1, max_size=5)
ROWS = [pytest.param(one_by_one, id="row by row"), pytest.param(a_lone_row_in_halves, id="another order for a lone row")]


@few
@given(company=st.lists(PARTS, min_size=1, max_size=5), chance=st.randoms(use_true_random=False))
@pytest.mark.parametrize("product", ROWS)
def test_company_does_not_move_a_sequences_logits_by_one_bit(
    product: Callable[[Tensor, Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    company: list[list[list[int]]],
    chance: random.Random,
) -> None:
    monkeypatch.setattr(F, "linear", product)
    model = MODELS[torch.bfloat16]
    expected = [alone(model, parts) for parts in company]
    found = in_company(model, company, chance)
    for own, among in zip(expected, found, strict=True):
        assert torch.equal(torch.stack(own), torch.stack(among))


@few
@given(company=st.lists(PARTS, min_size=2, max_size=5), chance=st.randoms(use_true_random=False))
def test_with_the_processors_own_products_company_moves_them_by_rounding_alone(
    company: list[list[list[int]]], chance: random.Random
) -> None:
    model = MODELS[torch.float32]
    found = in_company(model, company, chance)
    for parts, among in zip(company, found, strict=True):
        torch.testing.assert_close(torch.stack(among), torch.stack(alone(model, parts)), rtol=1e-4, atol=1e-3)


def test_a_prompt_in_several_parts_is_the_same_prompt() -> None:
    model, prompt = MODELS[torch.float32], list(range(30, 60))
    whole = alone(model, [prompt])[-1]
    for cut in (1, 7, 29):
        torch.testing.assert_close(alone(model, [prompt[:cut], prompt[cut:]])[-1], whole, rtol=1e-4, atol=1e-3)
    other = alone(model, [prompt[1:]])[-1]
    assert (other - whole).abs().max() > 0.1  # of which the rounding above is far
