"""The agent for causal language models of transformers. The judge of values is the library: `generate`, its logits, its tokenizer."""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from function.agent import BadInput, Weights
from function.agents.transformers import generation_attention
from function.agents.transformers.chat import PROMPT_TOKENS, Answer, Chat
from function.agents.transformers.chat_template import ChatTemplate
from function.agents.transformers.chat_text import Vocabulary, Words
from function.agents.transformers.chat_tools import form_of
from function.agents.transformers.generation import Apart, Together, decoder
from tests.function.tiny_models import CHATML, make_model, make_reciter, make_tokenizer, save
from tests.support import BIN, Server, clean_environment, fill_cache, free_port, request, running
from weights_cache.settings import WeightsSettings

URI = "s3://models/m"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As a function has without a CPU limit; more of them wait for each other where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Load = Callable[..., Chat]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Makes the agent of a model, restored from a node cache."""

    def loaded(model: Any, **tokenizer: Any) -> Chat:
        folder = tmp_path_factory.mktemp("model")
        fill_cache(folder / "cache", URI, save(folder / "files", model, make_tokenizer(**tokenizer)))
        agent = Chat()
        agent.load(Weights(WeightsSettings(uri=URI, cache_dir=folder / "cache")), "cpu")
        agent.warm_up()
        return agent

    return loaded


@pytest.fixture(scope="module")
def llama(load: Load) -> Chat:
    return load(make_model("llama"), chat_template=CHATML)


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """What the library's own `generate` makes, greedily."""
    with torch.inference_mode():
        found = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count, do_sample=False)
    made: list[int] = found[0, len(prompt) :].tolist()
    return made


def drain(agent: Chat, answer: Answer) -> list[str]:
    pieces = []
    while (piece := agent.step([answer])[0]) is not None:
        pieces.append(piece)
    return pieces


# Passes


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "mistral", "gpt_neo", "bloom"])
def test_sequences_that_come_go_and_pause_get_what_generate_makes_of_each(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_attention, "SPARE", 4)  # so that lengths differ enough to be taken apart
    model = make_model(kind)
    found: Any = decoder(model)
    assert type(found).__name__ == ("Apart" if kind in ("gpt_neo", "bloom") else "Together")
    prompts = [[(5 + 7 * place + length) % 400 for place in range(length)] for length in (3, 20, 9, 14, 1)]
    waiting = [list(prompt) for prompt in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    caches = [found.open() for _ in prompts]
    with torch.inference_mode():
        for step in range(60):
            # one joins every second step, and in one step of five each is left out
            due = [at for at in range(len(prompts)) if step >= 2 * at and len(made[at]) < 15 and (3 * step + at) % 5]
            if not due:
                continue
            parts = [(caches[at], waiting[at][:8] if found.takes_parts else waiting[at]) for at in due]
            for at, (_, tokens), logits in zip(due, parts, found.forward(parts), strict=True):
                del waiting[at][: len(tokens)]
                if not waiting[at]:
                    made[at].append(int(logits.argmax()))
                    waiting[at] = made[at][-1:]
                if len(made[at]) == 15:
                    found.close(caches[at])
    assert made == [generated(model, prompt, 15) for prompt in prompts]


def test_a_model_whose_texts_company_would_change_is_asked_sequence_by_sequence(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama")
    forward = model.forward

    def by_batch(**given: Any) -> Any:  # a model that looks at its whole batch
        found = forward(**given)
        found.logits = found.logits * len(given["input_ids"])
        return found

    by_batch.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = by_batch
    assert isinstance(decoder(model), Apart)
    assert "do not share forward passes" in caplog.text


def test_attention_is_taken_apart_where_lengths_differ_much(monkeypatch: pytest.MonkeyPatch) -> None:
    def groups(*lengths: int) -> Any:
        return getattr(generation_attention.grouped(torch.zeros(len(lengths), 1, 1, max(lengths)), lengths), "relight_groups", None)

    assert groups(10, 12, 11) is None
    assert groups(10, 12, 4000, 11, 9) == [(0, 2, 12), (2, 3, 4000), (3, 5, 11)]
    found: Any = decoder(make_model("llama"))
    seen: list[int] = []

    def watched(module: Any, query: Any, key: Any, *rest: Any, **more: Any) -> Any:
        seen.append(len(key) * key.shape[2])
        return sdpa_attention_forward(module, query, key, *rest, **more)

    monkeypatch.setattr(generation_attention, "sdpa_attention_forward", watched)
    monkeypatch.setattr(generation_attention, "SPARE", 16)
    rows = [found.open() for _ in range(4)]
    with torch.inference_mode():
        found.forward([(row, [5] * (200 if row is rows[2] else 4)) for row in rows])
        seen.clear()
        found.forward([(row, [6]) for row in rows])
    assert seen == [10, 201, 5] * 2  # columns of each call, in both layers: the long one's are nobody else's


def test_more_sequences_than_the_room_had_at_first_and_longer_ones(llama: Chat) -> None:
    prompts = [f"fox number {number} " + "and so on " * number for number in range(11)]
    wanted = llama.predict([{"prompt": prompt, "max_tokens": 4} for prompt in prompts])
    alone = [llama.predict([{"prompt": prompt, "max_tokens": 4}])[0] for prompt in prompts]
    assert wanted == alone
    assert len(set(wanted)) > 5


def test_a_long_prompt_is_taken_in_parts_while_others_go_on(load: Load, monkeypatch: pytest.MonkeyPatch, llama: Chat) -> None:
    assert PROMPT_TOKENS <= 512
    monkeypatch.setattr("function.agents.transformers.chat.PROMPT_TOKENS", 16)
    short, long = llama.start({"prompt": "the", "max_tokens": 12}), llama.start({"prompt": "the fox " * 20, "max_tokens": 3})
    late = llama.start({"prompt": "a dog and a dog", "max_tokens": 3})
    llama.step([short])
    wanted = [
        llama.predict([{"prompt": text, "max_tokens": count}])[0]
        for text, count in (("the", 12), ("the fox " * 20, 3), ("a dog and a dog", 3))
    ]
    texts, taken = ["", "", ""], []
    answers = [short, long, late]
    texts[0] = ""
    pieces = llama.step(answers)
    while any(piece is not None for piece in pieces):
        taken.append((short.completion_tokens, len(long.waiting)))
        texts = [text + (piece or "") for text, piece in zip(texts, pieces, strict=True)]
        pieces = llama.step(answers)
    assert [count for count, _ in taken[:3]] == [2, 3, 4]
    assert taken[0][1] - taken[1][1] == 16
    assert texts[1:] == wanted[1:]
    assert wanted[0].endswith(texts[0])


def test_a_step_that_fails_can_be_made_again(llama: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = llama.predict([{"prompt": "the fox", "max_tokens": 6}])[0]
    answer = llama.start({"prompt": "the fox", "max_tokens": 6})
    text = llama.step([answer])[0] or ""
    with monkeypatch.context() as patch:
        patch.setattr(llama._model.lm_head, "forward", lambda hidden: hidden @ torch.zeros(3, 3))  # which fails at the end of a pass
        with pytest.raises(RuntimeError):
            llama.step([answer])
    assert text + "".join(drain(llama, answer)) == wanted


def test_what_the_token_of_one_leads_to_costs_the_others_nothing(llama: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = llama.predict([{"prompt": "the fox", "max_tokens": 6}])[0]
    good, bad = llama.start({"prompt": "the fox", "max_tokens": 6}), llama.start({"prompt": "a dog", "max_tokens": 6})
    monkeypatch.setattr(bad.chooser, "choose", lambda logits: logits[10**6])
    text = llama.step([good, bad])[0] or ""
    with pytest.raises(IndexError):
        llama.step([good, bad])
    with pytest.raises(IndexError):
        llama.step([bad])
    assert text + "".join(drain(llama, good)) == wanted
    bad.close()


def test_a_place_is_free_when_its_answer_is_over_or_closed(llama: Chat) -> None:
    assert isinstance(llama._decoder, Together)
    answers = [llama.start({"prompt": "the fox", "max_tokens": count}) for count in (1, 9)]
    llama.step(answers)
    assert [row is not None for row in llama._decoder._rows] == [False, True]
    answers[1].close()
    assert llama._decoder._rows == []


# Texts


def test_greedy_texts_are_those_of_generate(llama: Chat) -> None:
    prompts = ["the quick", "naïve 東京", "a"]
    found = llama.predict([{"prompt": prompt, "max_tokens": 12} for prompt in prompts])
    for prompt, text in zip(prompts, found, strict=True):
        tokens = llama._tokenizer(prompt)["input_ids"]
        assert text == llama._tokenizer.decode(generated(llama._model, tokens, 12), skip_special_tokens=True).rstrip("\ufffd")
    answer = llama.start({"prompt": "the quick", "max_tokens": 12})
    assert "".join(drain(llama, answer)) == found[0]
    assert (answer.prompt_tokens, answer.completion_tokens, answer.finish_reason) == (2, 12, "length")


def test_a_conversation_is_written_by_the_tokenizers_template(llama: Chat) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the fox"}]
    text = llama._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    answer = llama.start({"messages": messages, "max_tokens": 5})
    assert answer.waiting == llama._tokenizer(text, add_special_tokens=False)["input_ids"]
    assert llama.predict(["the fox"]) == llama.predict([{"messages": messages[1:]}])
    few = llama.predict(["the fox", {"messages": messages[1:], "max_tokens": 3}], {"max_tokens": 5})
    assert few == llama.predict([{"messages": messages[1:], "max_tokens": count} for count in (5, 3)])
    with pytest.raises(BadInput, match="must be a string or an object"):
        llama.predict([7], {"max_tokens": 5})


def test_a_seed_draws_the_same_text_in_any_company(llama: Chat) -> None:
    def asked(seed: int | None, **more: Any) -> dict[str, Any]:
        return {"prompt": "the fox", "max_tokens": 8, "temperature": 1.0, "seed": seed, **more}

    alone = [llama.predict([asked(seed)])[0] for seed in (1, 2)]
    assert llama.predict([asked(2), asked(None), asked(1), asked(None)])[::2] == alone[::-1]
    assert len({*alone, *llama.predict([asked(None), asked(None)])}) == 4
    greedy = llama.predict([{"prompt": "the fox", "max_tokens": 8}])
    assert llama.predict([asked(3, top_k=1), asked(4, top_p=0.0), asked(5, min_p=1.0)]) == greedy * 3
    assert llama.predict([asked(1, temperature=0.0, repetition_penalty=50.0)]) != greedy


def test_without_a_word_of_the_caller_the_models_generation_config_holds(load: Load) -> None:
    model = make_model("llama")
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=1, max_new_tokens=5, repetition_penalty=1.5, eos_token_id=[7, 9])
    agent = load(model)
    answer = agent.start({"prompt": "the"})
    drain(agent, answer)
    assert answer.completion_tokens <= 5
    assert {7, 9} < agent._ends
    assert (agent._defaults.temperature, agent._defaults.top_k, agent._defaults.repetition_penalty) == (0.7, 1, 1.5)
    model.generation_config.update(do_sample=False)
    wanted = generated(model, agent._tokenizer("the")["input_ids"], 5)
    assert agent.predict([{"prompt": "the", "temperature": 0}])[0] == agent._tokenizer.decode(wanted, skip_special_tokens=True)


def test_the_dtype_is_the_settings(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUNCTION_DTYPE", "bfloat16")
    agent = load(make_model("llama"))
    assert agent._model.dtype == torch.bfloat16
    assert drain(agent, agent.start({"prompt": "the fox", "max_tokens": 2}))


def test_each_of_several_end_tokens_ends_a_text_and_counts(load: Load) -> None:
    tokenizer = make_tokenizer()
    model = make_reciter([*tokenizer("the fox")["input_ids"], 9, *[0] * 20])
    model.generation_config.eos_token_id = [8, 9]
    agent = load(model)
    answer = agent.start({"prompt": "a"})
    assert "".join(drain(agent, answer)) == "the fox"
    assert (answer.finish_reason, answer.completion_tokens) == ("stop", 3)
    endless = agent.start({"prompt": "a", "ignore_eos": True, "max_tokens": 5})
    drain(agent, endless)
    assert (endless.finish_reason, endless.completion_tokens) == ("length", 5)


def test_pieces_are_whole_characters_and_together_what_the_tokenizer_makes(load: Load) -> None:
    text = " naïve 東京 🎈🎈 İ — fin"
    tokens = make_tokenizer()(text)["input_ids"]
    agent = load(make_reciter([*tokens, 2, 0]))
    pieces = drain(agent, agent.start({"prompt": "a"}))
    assert "".join(pieces) == text
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    cut = agent.predict([{"prompt": "a", "max_tokens": count} for count in range(1, len(tokens))])
    assert all(text.startswith(one) for one in cut)


def test_spaces_are_kept_where_a_tokenizer_drops_the_first(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "▁The", "▁cat", "▁sat", ".", *(f"<0x{byte:02X}>" for byte in "é".encode())]
    made = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<s>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>"))
    words = Words(vocabulary, [0, 1, 2], {})
    assert [words.add(token) for token in (3, 5, 6, 0, 2, 4)] == [" sat", "", "é", "", " cat", "."]
    assert vocabulary.describe(3) == (" sat", list(b" sat"))
    assert vocabulary.describe(5)[1] == [0xC3]


@pytest.mark.parametrize("stop", ["fox", ["zzz", "ck bro"], "k brown fox"])
def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(load: Load, stop: Any) -> None:
    whole = "the quick brown fox"
    agent = load(make_reciter([*make_tokenizer()(whole)["input_ids"], 2, *[0] * 9]))
    at = min(found for one in ([stop] if isinstance(stop, str) else stop) if (found := whole.find(one)) >= 0)
    answer = agent.start({"prompt": "a", "stop": stop})
    assert "".join(drain(agent, answer)) == whole[:at]
    assert answer.finish_reason == "stop"
    assert agent.predict([{"prompt": "a", "stop": "fox jumps"}]) == [whole]  # what was held back was none


# Probabilities


def test_probabilities_are_those_of_the_models_logits(llama: Chat) -> None:
    asked = {"prompt": "the fox", "max_tokens": 6, "logprobs": True, "top_logprobs": 3, "temperature": 1.5, "top_p": 0.9, "seed": 3}
    answer = llama.start(asked)
    prompt = list(answer.waiting)
    told: list[dict[str, Any]] = []
    made: list[int] = []
    while llama.step([answer])[0] is not None:
        told += answer.logprobs or []
        made += answer.waiting
    assert (len(told), len(made)) == (6, 5)
    with torch.inference_mode():
        rows = llama._model(torch.tensor([[*prompt, *made]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
    for one, token, row in zip(told, made, rows, strict=False):
        assert one["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        assert [top["logprob"] for top in one["top_logprobs"]] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert bytes(one["bytes"]).decode(errors="replace") == one["token"] == llama._tokenizer.decode([token])


# Calls of tools


def parsed(template: str, pieces: list[str]) -> tuple[str, list[dict[str, str]]]:
    form = form_of(template)
    assert form
    parser = form.parser([{"function": {"name": "f"}}])
    text, calls = "", []
    for said, found in (*(parser.add(piece) for piece in pieces), parser.finish()):
        text += said
        calls += found
    return text, calls


F, NONE = {"name": "f", "arguments": '{"a": 1}'}, {"name": "f", "arguments": "{}"}
HERMES, MISTRAL, LLAMA = "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"


@pytest.mark.parametrize(
    ("template", "written", "text", "calls"),
    [
        (HERMES, 'Yes.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "Yes.\n", [F]),
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>',
            "",
            [F, F],
        ),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [F]),
        (HERMES, '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "f", "arguments": null}</tool_call>', "", [NONE, NONE]),
        (HERMES, "<tool_call>{no}</tool_call> a <tool_cal", "<tool_call>{no}</tool_call> a <tool_cal", []),
        (HERMES, '<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
        (HERMES, "1 < 2 <b>", "1 < 2 <b>", []),
        (MISTRAL, 'So [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "So ", [F]),
        (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f{"a": 1}', "", [F, F]),
        (MISTRAL, "[TOOL_CALLS] what", "[TOOL_CALLS] what", []),
        (MISTRAL, "[TOOL", "[TOOL", []),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", [F]),
        (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {"a": 1}}', "", [F, F]),
        (LLAMA, '{"name": "g", "parameters": {}}', '{"name": "g", "parameters": {}}', []),
        (LLAMA, '{"name": 1', '{"name": 1', []),
        (LLAMA, "A text {}", "A text {}", []),
    ],
)
def test_calls_are_told_apart_from_text_however_it_is_cut(template: str, written: str, text: str, calls: Any) -> None:
    for size in (1, 2, 7, 1000):
        assert parsed(template, [written[at : at + size] for at in range(0, len(written), size)]) == (text, calls)


# What is refused


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (7, "an input must be a string or an object"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "\ud800"}, "half a character"),
        ({"prompt": "a" * 300}, r"the prompt has 300 tokens; the model's context has 256, and one must be left"),
        ({"prompt": "a " * 10**6}, r"the prompt has more than 8192 tokens; the model's context has 256, and one must be left"),
        ({"prompt": "a", "tools": [{}]}, "'tools' is for a conversation"),
        ({"prompt": "a", "top_q": 1}, "there is no parameter 'top_q'"),
        ({"prompt": "a", "logprobs": 1}, "'logprobs' must be a boolean"),
        ({"prompt": "a", "logprobs": True, "top_logprobs": 21}, "'top_logprobs' must be a whole number from 0 to 20"),
        ({"prompt": "a", "top_logprobs": 2}, "'top_logprobs' must go with"),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"messages\[0\]: 'role' must be one of system, user.*not 'robot'"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 1}]},
            r"messages\[1\]: 'content' must be a string, not int",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}}, "takes no response_format"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"thinking": 1}}, "takes no thinking"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": 1}}, "must not have 'messages'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "must be JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "must be an object like"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(llama: Chat, item: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        llama.start(item)


def test_a_template_gets_the_arguments_of_calls_as_it_wants_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "b"}]
    each = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}{{ ARGUMENTS }}{% endfor %}{{ m.content }}{% endfor %}{{ tools or '' }}"
    )
    for arguments in ("call.function.arguments.a", "'json: ' + call.function.arguments"):
        template = ChatTemplate(make_tokenizer(chat_template=each.replace("ARGUMENTS", arguments)))
        assert template.render(messages, {}) in ("aéb", 'ajson: {"a": "é"}b')


def test_without_a_template_there_is_no_chat_and_with_a_strict_one_its_own_word_is_told(load: Load) -> None:
    model = make_model("llama")
    plain = load(model)
    assert plain.abilities["tools"] == "this model has no chat template"
    with pytest.raises(BadInput, match=r"no chat template.*ask at /v1/completions"):
        plain.start({"messages": [{"role": "user", "content": "hello"}]})
    assert plain.predict([{"prompt": "hello"}]) == plain.predict(["hello"])
    strict = load(model, chat_template="{{ raise_exception('Conversation roles must alternate') }}")
    with pytest.raises(BadInput, match="refuses the messages: Conversation roles must alternate"):
        strict.start("hello")
    with pytest.raises(BadInput, match="this model's chat template takes no tools"):
        strict.start({"messages": [{"role": "user", "content": "a"}], "tools": [{}]})


# The real client against a real server

WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'
ASKED: Any = [{"role": "user", "content": "Weather?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of a model that recites such that it calls a tool where it is offered WEATHER, and talks where it is not."""
    folder = tmp_path_factory.mktemp("server")
    tokenizer = make_tokenizer(chat_template=CHATML)
    prompt = tokenizer.apply_chat_template(ASKED, tools=[WEATHER], tokenize=False, add_generation_prompt=True)
    before = len(tokenizer(prompt)["input_ids"]) - 1
    talk = tokenizer("naïve 東京 🎈 and the quick brown fox jumps over the lazy dog " * 20)["input_ids"][:before]
    model = make_reciter([*talk, *tokenizer(f"Let me look. {CALL}")["input_ids"], 2, *[5] * 10])
    fill_cache(folder / "cache", URI, save(folder / "files", model, tokenizer))
    port = free_port()
    env = clean_environment(
        PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT="function.agents.transformers:Chat", FUNCTION_MODEL_NAME="m",
        WEIGHTS_URI=URI, WEIGHTS_CACHE_DIR=str(folder / "cache"),
    )  # fmt: skip
    with running([str(BIN / "python"), "-m", "function"], folder / "log", env, port) as found:
        yield found.ready()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with ExitStack() as stack:
        yield stack.enter_context(
            OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any", max_retries=0, timeout=60, http_client=http)
        )


def test_the_client_is_told_calls_of_tools(client: OpenAI) -> None:
    found = client.chat.completions.create(model="m", messages=ASKED, tools=[WEATHER])
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == ("Let me look. ", "tool_calls")
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert len(call.id) == 9
    assert call.id.isalnum()
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})
    with client.chat.completions.stream(model="m", messages=ASKED, tools=[WEATHER]) as stream:
        stream.until_done()
        streamed = stream.get_final_completion().choices[0]
    assert (streamed.message.content, streamed.finish_reason) == ("Let me look. ", "tool_calls")
    assert [one.function.name for one in streamed.message.tool_calls or []] == ["weather"]
    untold = client.chat.completions.create(model="m", messages=ASKED, tools=[WEATHER], tool_choice="none", max_tokens=5)
    assert (untold.choices[0].message.tool_calls, untold.choices[0].finish_reason) == (None, "length")


def test_the_client_sends_what_tools_said(client: OpenAI) -> None:
    messages: Any = [
        *ASKED,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    found = client.chat.completions.create(model="m", messages=messages, max_tokens=3)
    assert found.usage is not None
    plain = client.chat.completions.create(model="m", messages=ASKED, max_tokens=3)
    assert plain.usage is not None
    assert found.usage.prompt_tokens > plain.usage.prompt_tokens + 10


def test_the_client_gets_choices_probabilities_stops_and_usage(client: OpenAI) -> None:
    asked: Any = {"model": "m", "messages": ASKED, "max_tokens": 9, "logprobs": True, "top_logprobs": 2, "n": 3}
    found = client.chat.completions.create(**asked)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in found.choices}) == 1
    assert found.usage is not None
    prompt = client.chat.completions.create(model="m", messages=ASKED, max_tokens=1).usage
    assert prompt is not None
    assert (found.usage.completion_tokens, found.usage.prompt_tokens) == (27, prompt.prompt_tokens)
    for choice in found.choices:
        content = choice.logprobs.content if choice.logprobs else None
        assert content is not None
        assert b"".join(bytes(one.bytes or []) for one in content).decode(errors="ignore") == choice.message.content
        assert {len(one.top_logprobs) for one in content} == {2}
        assert all(one.logprob == one.top_logprobs[0].logprob <= 0 for one in content)
    text, told, ends = ["", "", ""], [0, 0, 0], {}
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            for part in chunk.choices:
                text[part.index] += part.delta.content or ""
                told[part.index] += len(part.logprobs.content or []) if part.logprobs else 0
                ends[part.index] = part.finish_reason
            used = chunk.usage
    assert text == [choice.message.content for choice in found.choices]
    assert (told, ends, used) == ([9] * 3, dict.fromkeys(range(3), "length"), found.usage)
    stop = (text[0] or "")[3:5]
    stopped = client.chat.completions.create(model="m", messages=ASKED, stop=[stop])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == (text[0].partition(stop)[0], "stop")


def test_the_client_draws_each_choice_with_a_seed_of_its_own(client: OpenAI) -> None:
    asked: Any = {"model": "m", "prompt": "the", "max_tokens": 6, "temperature": 2, "n": 3, "seed": 5, "extra_body": {"top_k": 300}}
    found = [choice.text for choice in client.completions.create(**asked).choices]
    assert len(set(found)) == 3
    assert [choice.text for choice in client.completions.create(**asked).choices] == found
    with client.completions.create(**asked, stream=True) as stream:
        texts = ["", "", ""]
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == found
    told = client.completions.create(model="m", prompt="the", max_tokens=4, logprobs=2).choices[0]
    assert told.logprobs is not None
    assert len(told.logprobs.tokens or []) == len(told.logprobs.token_logprobs or []) == 4
    assert all(len(top) == 2 for top in told.logprobs.top_logprobs or [])
    assert (told.logprobs.text_offset or [])[0] == 0


def test_what_the_model_cannot_do_is_refused_and_named(client: OpenAI, server: Server) -> None:
    for name, value, says in (
        ("response_format", {"type": "json_object"}, "takes no response_format"),
        ("tool_choice", "required", "a call cannot be forced"),
        ("top_logprobs", 2, "must go with"),
        ("top_k", "many", "a whole number"),
        ("best_of", 2, "there is no parameter"),
    ):
        with pytest.raises(openai.BadRequestError, match=says) as caught:
            client.chat.completions.create(model="m", messages=ASKED, extra_body={name: value})
        assert caught.value.param == name
    with pytest.raises(openai.BadRequestError, match=r"the prompt has \d+ tokens; the model's context has \d+"):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a" * 2000}])
    chat = request(server.port, "GET", "/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]
    properties = chat["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"top_k", "min_p", "repetition_penalty", "chat_template_kwargs", "ignore_eos"} < set(properties)
    assert properties["logprobs"]["type"] == ["boolean", "null"]
