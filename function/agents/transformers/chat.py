"""Any causal language model of transformers: its texts are made token by token, all callers' in the same forward passes.

An input is one of those of `function/agents/inputs.py`, where … may be the parameters of Sampling and, beside messages and prompts,

    "logprobs": true, "top_logprobs": 5       probabilities of the tokens made, and of as many of the likeliest
    "tools": […]                              as OpenAI has them, for a chat template that takes them
    "response_format": {…}                    the same
    "chat_template_kwargs": {…}               further variables of the chat template
    "ignore_eos": true                        the text goes on to max_tokens

The output is the text that follows. What a caller does not say is as the model's generation_config has it. Greedy texts are those of
the library's `generate`; in float32 to the token, as far as rounding is not what decides between two tokens.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from function.agent import BadInput, Weights
from function.agents.inputs import read_input, whole_texts, with_parameters
from function.agents.sampling import FURTHER_PARAMETERS, Chooser, Sampling, Stops
from function.agents.transformers import choice
from function.agents.transformers.chat_template import ChatTemplate
from function.agents.transformers.chat_text import Vocabulary, Words
from function.agents.transformers.chat_tools import Form, NoTools, Parser, form_of
from function.agents.transformers.loading import library, load_model, load_tokenizer, read_config
from function.settings import for_agents

library()  # before its parts are imported: it says what is missing
from function.agents.transformers.generation import Decoder, decoder  # noqa: E402

log = logging.getLogger("relight.function")

PROMPT_TOKENS = 256  # of prompts that a step takes in, so that a long one does not hold the others up
LONG = 32  # characters for each token of the context: so long a text has more tokens, or hardly any that are not spaces
TOP_LOGPROBS = 20  # at most
LEAST_LOGPROB = -9999.0  # JSON has no infinity; what OpenAI says for it
LIBRARY_TOP_K = 50  # what `generate` takes where a generation_config with do_sample says nothing
# What a generation_config may ask of `generate` that is not done here, and what it says where it asks for nothing.
UNDONE = {
    "num_beams": 1, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "min_length": 0,
    "min_new_tokens": None, "suppress_tokens": None, "begin_suppress_tokens": None, "forced_eos_token_id": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "guidance_scale": None, "sequence_bias": None, "top_h": None,
}  # fmt: skip


class Answer:
    """A text being made: what `start` gives and `step` goes on with. Its attributes without `_` are for whoever asks how it went."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, room: int, words: Words, tools: Parser) -> None:
        """room: for tokens, in the context."""
        self.prompt_tokens = len(prompt)
        self.completion_tokens = 0
        self.finish_reason: str | None = None  # "stop", "tool_calls", or "length": max_tokens, or the context is full
        self.logprobs: list[dict[str, Any]] | None = None  # of the tokens of the last piece
        self.tool_calls: list[dict[str, str]] = []  # that became whole with the last piece
        self.waiting = list(prompt)  # tokens that the model has not seen
        self.chooser = Chooser(sampling, prompt)
        self.likeliest: int | None = None  # of which so many are told, if probabilities are
        self.ends: set[int] = set()
        self.failure: Exception | None = None  # what its last token led to
        self.decoder: Decoder | None = None  # once it has been in a pass, until it is finished
        self.cache: Any = None
        self._limit = min(sampling.max_tokens, room)
        self._words = words
        self._stops = Stops(sampling.stop)
        self._tools = tools
        self._has_called = False
        self._untold: list[dict[str, Any]] = []  # probabilities of tokens whose text is held back

    def close(self) -> None:
        """Free what the model holds for it."""
        if self.decoder is not None:
            self.decoder.close(self.cache)
        self.decoder = self.cache = None

    def take(self, token: int, told: dict[str, Any] | None) -> str:
        """The text that a token adds. told: what is told of it, if it is."""
        self.completion_tokens += 1
        if token in self.ends:
            return self._finish("stop", self._words.rest())
        if told is not None:
            self._untold.append(told)
        piece, is_end = self._stops.add(self._words.add(token))
        if is_end:
            return self._tell("stop", *self._flushed(piece))
        if self.completion_tokens == self._limit:
            return self._finish("length", self._words.rest(), piece)
        self.waiting.append(token)
        return self._tell(None, *self._tools.add(piece))

    def _finish(self, reason: str, rest: str, piece: str = "") -> str:
        """The last text: what was held back, too, unless a stop text comes to light in it."""
        more, is_end = self._stops.add(rest)
        piece += more
        return self._tell("stop" if is_end else reason, *self._flushed(piece if is_end else piece + self._stops.rest()))

    def _flushed(self, piece: str) -> tuple[str, list[dict[str, str]]]:
        text, calls = self._tools.add(piece)
        rest, more = self._tools.finish()
        return text + rest, calls + more

    def _tell(self, reason: str | None, text: str, calls: list[dict[str, str]]) -> str:
        self.tool_calls = calls
        self._has_called = self._has_called or bool(calls)
        if reason is not None:
            self.finish_reason = "tool_calls" if self._has_called and reason == "stop" else reason
            self.close()
        if self.likeliest is not None:
            self.logprobs = []
            if text or calls or reason:
                self.logprobs, self._untold = self._untold, []
        return text


class Chat:
    """Text in, the text that follows out; in one go, or piece by piece."""

    sampling_parameters: Mapping[str, Any] = FURTHER_PARAMETERS | {
        "ignore_eos": {"type": "boolean", "description": "a boolean"},
    }

    def load(self, weights: Weights, device: str) -> None:
        """Bind the model, its tokenizer and its chat template."""
        config = read_config(weights)
        choice.check_talks(config)
        self._tokenizer = load_tokenizer(weights)
        self._vocabulary = Vocabulary(self._tokenizer)
        self._template = ChatTemplate(self._tokenizer)
        self._form: Form | None = form_of(self._template.text) if self._template.takes("tools") else None
        self._model = load_model(weights, device, "AutoModelForCausalLM", config=config, dtype=for_agents().dtype)
        config = self._model.config.get_text_config(decoder=True)
        self._context = _context(config, self._tokenizer)
        generation = self._model.generation_config
        self._ends = _ends(generation, self._tokenizer)
        self._defaults = _defaults(generation)
        self._decoder: Decoder | None = None
        self.abilities = self._abilities()
        if self._template.is_there():
            variables = {"type": "object", "description": "an object: further variables of the chat template"}
            self.sampling_parameters = {**self.sampling_parameters, "chat_template_kwargs": variables}

    def warm_up(self) -> None:
        """The first passes set up torch's kernels, and show whether the model's streams may share passes."""
        self._decoder = decoder(self._model)

    def predict(self, inputs: Sequence[Any], parameters: Mapping[str, Any] | None = None) -> list[str]:
        """The whole text for each input. Raises BadInput before any is made.

        parameters: of all of them, where an input says nothing else.
        """
        if parameters:
            inputs = [with_parameters(self._object(item) if isinstance(item, str) else item, parameters) for item in inputs]
        for item in inputs:
            if isinstance(item, Mapping) and (item.get("tools") or item.get("logprobs")):
                raise BadInput("probabilities and calls of tools are told at /v1/chat/completions alone")
        return whole_texts(self, inputs)

    def start(self, input: Any) -> Answer:  # noqa: A002  the contract's word
        """An answer to be made. Raises BadInput."""
        found = read_input(self._object(input) if isinstance(input, str) else input)
        said = dict(found.parameters)
        likeliest = _likeliest(said.pop("logprobs", None), said.pop("top_logprobs", None))
        is_endless = said.pop("ignore_eos", None) or False
        tools = said.get("tools") or []
        variables = _variables(said)
        sampling = Sampling.parse(said, self._defaults)
        if found.messages is None:
            if variables:
                raise BadInput(f"{next(iter(variables))!r} is for a conversation, and this is a prompt: send 'messages'")
            prompt = self._tokens(found.prompt, add_special_tokens=True)
        else:
            prompt = self._tokens(self._template.render(found.messages, variables), add_special_tokens=False)
        room = self._context - len(prompt)
        if room < 1:
            raise self._too_long(str(len(prompt)))
        form = self._form if tools else None
        kept = {token: text for text in (form.markers if form else ()) if (token := self._vocabulary.marker(text)) is not None}
        parser = form.parser(tools) if form else NoTools()
        answer = Answer(prompt, sampling, room, Words(self._vocabulary, prompt, kept), parser)
        answer.likeliest = likeliest
        answer.ends = set() if is_endless else self._ends
        return answer

    def _object(self, item: str | Mapping[str, Any]) -> Mapping[str, Any]:
        """An input as an object: a lone text is a message of a user, or a prompt where there is no template for messages."""
        if not isinstance(item, str):
            return item
        return {"messages": [{"role": "user", "content": item}]} if self._template.is_there() else {"prompt": item}

    def step(self, answers: Sequence[Answer]) -> list[str | None]:
        """A token more for each: its piece of text, None when there is no more.

        A piece is empty when it is held back, and while a prompt is still being taken in, PROMPT_TOKENS of all of them a step.
        """
        if failure := next((answer.failure for answer in answers if answer.failure), None):
            raise failure  # now that nothing is done yet: who makes the steps again one by one finds whose it is
        pieces: dict[int, str] = {}
        if parts := self._parts([answer for answer in answers if not answer.finish_reason]):
            with torch.inference_mode():
                logits = self._forward(parts)
                for (answer, tokens), row in zip(parts, logits, strict=True):
                    del answer.waiting[: len(tokens)]
                    pieces[id(answer)] = "" if answer.waiting else self._chosen(answer, row)
        return [_piece(answer, pieces.get(id(answer))) for answer in answers]

    def _parts(self, answers: Sequence[Answer]) -> list[tuple[Answer, list[int]]]:
        """What the next passes take: the one token of each that is being made, and of prompts what there is time for, the first first."""
        self._decoder = self._decoder or decoder(self._model)
        left = PROMPT_TOKENS
        parts = []
        for answer in answers:
            tokens = answer.waiting[: PROMPT_TOKENS if self._decoder.takes_parts else None]
            if answer.completion_tokens == 0:
                if left < min(len(tokens), PROMPT_TOKENS):
                    continue
                left -= len(tokens)
            parts.append((answer, tokens))
        return parts

    def _forward(self, parts: Sequence[tuple[Answer, Sequence[int]]]) -> Tensor:
        assert self._decoder is not None
        for answer in (answer for answer, _ in parts if answer.decoder is None):
            answer.decoder, answer.cache = self._decoder, self._decoder.open()
        return self._decoder.forward([(answer.cache, tokens) for answer, tokens in parts])

    def _chosen(self, answer: Answer, logits: Tensor) -> str:
        answer.logprobs, answer.tool_calls = None, []
        try:
            token = answer.chooser.choose(logits)
            told = None if answer.likeliest is None else self._told(token, logits, answer.likeliest)
            return answer.take(token, told)
        except Exception as error:  # noqa: BLE001  others have their tokens already, and are not to lose them
            answer.failure = error
            return ""

    def _told(self, token: int, logits: Tensor, count: int) -> dict[str, Any]:
        """A token's probability by the model alone, whatever was drawn from, and the likeliest ones', in OpenAI's words."""
        logprobs = torch.log_softmax(logits, 0)
        values, tokens = logprobs.topk(min(count, len(logprobs)))
        likeliest = [self._one(*pair) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]
        return self._one(token, float(logprobs[token])) | {"top_logprobs": likeliest}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self._vocabulary.describe(token)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": data}

    def _too_long(self, count: str) -> BadInput:
        return BadInput(f"the prompt has {count} tokens; the model's context has {self._context}, and one must be left")

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Raises BadInput; of a text that is far too long without having looked at all of it, while others wait."""
        if len(text) > (first := LONG * self._context):
            count = len(self._tokens(text[:first], add_special_tokens=False))
            if count > self._context:
                raise self._too_long(f"more than {count}")
        try:
            prompt: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        except (UnicodeEncodeError, TypeError):
            raise BadInput("the text holds half a character (a lone surrogate)") from None
        if not prompt:
            raise BadInput("the prompt is empty; there must be something to go on with")
        return prompt

    def _abilities(self) -> dict[str, bool | str]:
        """What callers may ask for beside parameters; or why not."""
        has_template = self._template.is_there()

        def of_template(name: str, what: str) -> bool | str:
            lack = f"this model's chat template takes no {what}" if has_template else "this model has no chat template"
            return self._template.takes(name) or lack

        return {
            "logprobs": True,
            "tools": of_template("tools", "tools"),
            "response_format": of_template("response_format", "response_format"),
        }


def _piece(answer: Answer, made: str | None) -> str | None:
    """What a step gives for an answer: None at the end of one that has nothing more to tell."""
    if made is None:
        return None if answer.finish_reason else ""
    return made if made or not answer.finish_reason or answer.logprobs or answer.tool_calls else None


def _variables(said: dict[str, Any]) -> dict[str, Any]:
    """What the chat template is handed besides the messages, taken out of what was said."""
    further = said.pop("chat_template_kwargs", None) or {}
    if not isinstance(further, Mapping):
        raise BadInput("'chat_template_kwargs' must be an object")
    named = {name: value for name in ("tools", "response_format") if (value := said.pop(name, None))}
    if strange := {"messages", "add_generation_prompt", "tokenize", "chat_template", *named} & set(further):
        raise BadInput(f"'chat_template_kwargs' must not have {min(strange)!r}")
    return {**further, **named}


def _likeliest(logprobs: Any, top_logprobs: Any) -> int | None:
    """How many of the likeliest tokens are to be told, if any are."""
    if not isinstance(logprobs, bool | None):
        raise BadInput("'logprobs' must be a boolean")
    count = 0 if top_logprobs is None else top_logprobs
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= TOP_LOGPROBS:
        raise BadInput(f"'top_logprobs' must be a whole number from 0 to {TOP_LOGPROBS}")
    if count and not logprobs:
        raise BadInput("'top_logprobs' must go with \"logprobs\": true")
    return count if logprobs else None


def _context(config: Any, tokenizer: Any) -> int:
    """Tokens that a text may have, prompt included."""
    found = getattr(config, "max_position_embeddings", None) or getattr(tokenizer, "model_max_length", None)
    return int(found) if isinstance(found, int) and 0 < found < 2**31 else 2**31


def _ends(generation: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text."""
    found = generation.eos_token_id
    return {one for one in (*(found if isinstance(found, list | tuple) else [found]), tokenizer.eos_token_id) if isinstance(one, int)}


def _defaults(generation: Any) -> Sampling:
    """What holds where a caller says nothing, by the model's generation_config."""
    if undone := [name for name, nothing in UNDONE.items() if getattr(generation, name, None) not in (None, nothing)]:
        log.warning("generation_config.json asks for %s, which is not done here", ", ".join(undone))
    found: dict[str, Any] = {
        "repetition_penalty": generation.repetition_penalty or 1.0,
        "max_tokens": generation.max_new_tokens or Sampling.max_tokens,
    }
    if generation.do_sample:
        found["temperature"] = 1.0 if generation.temperature is None else generation.temperature
        found["top_p"] = 1.0 if generation.top_p is None else generation.top_p
        found["top_k"] = LIBRARY_TOP_K if generation.top_k is None else generation.top_k
        found["min_p"] = getattr(generation, "min_p", None) or 0.0
    return Sampling(**found)
