"""SmolLM2-135M-Instruct: a small chat model whose answers are made token by token, all callers' in the same forward passes.

It restores what `relight convert` makes. An input is one of those of `function/agents/inputs.py`, where … may be any of the parameters of
Sampling; roles of messages are system, user and assistant. The output is the text that follows.

Computation is in the weights' own precision. `relight convert` makes bfloat16, which takes half the memory, shared by all that map the
file, and is the faster of the two where the processor multiplies it (AVX-512 BF16, AMX): on one core of an EPYC a step takes 45 ms
against 51 in float32, for eight sequences 61 against 94. For an older processor convert with `--dtype float32`.

A sequence gets what it would get alone, but for rounding: how a processor sums a product up may depend on how many rows share it. So
company moved logits in bfloat16 by up to 0.4 with AMX, by nothing with AVX-512 BF16; in float32 by up to 0.0001. Where two tokens are as
close to each other it may decide between them, and between those that a seed draws. Who needs the same text each time wants float32.
"""

import codecs
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from function.agent import BadInput, Weights
from function.agents.byte_alphabet import BYTES
from function.agents.inputs import check_message, read_input, whole_texts, with_parameters
from function.agents.llama import Cache, Llama
from function.agents.sampling import FURTHER_PARAMETERS, Chooser, Sampling, Stops

ROLES = ("system", "user", "assistant")
PROMPT_TOKENS = 512  # of one sequence's prompt that a step takes in, so that a long prompt does not hold the others up
END_OF_TEXT = "<|endoftext|>"  # ends a text that is no conversation


class Answer:
    """A text being made: what `start` gives and `step` goes on with. Its last three attributes are for whoever asks how it went."""

    def __init__(self, prompt: Sequence[int], cache: Cache, sampling: Sampling, room: int) -> None:
        """room: for tokens, in the context."""
        self.waiting = list(prompt)  # tokens that the model has not seen
        self.cache: Cache | None = cache  # None when it is not needed any more
        self.chooser = Chooser(sampling, prompt)
        self.text = Text(sampling.stop)
        self.limit = min(sampling.max_tokens, room)
        self.prompt_tokens = len(prompt)
        self.completion_tokens = 0
        self.finish_reason: str | None = None  # "stop": the model's own end or a stop text; "length": max_tokens, or the context is full

    def next_part(self) -> tuple[Cache, list[int]]:
        """What the next forward pass takes of it."""
        assert self.cache is not None  # it is not finished
        return self.cache, self.waiting[:PROMPT_TOKENS]

    def finish(self, reason: str) -> None:
        """No more tokens."""
        self.finish_reason = reason
        self.cache = None


class Text:
    """Puts tokens' bytes together to text, and holds back what may yet turn out not to belong to it.

    A character that is spread over tokens waits for its last byte; the beginning of a stop text waits until it is clear that it is none.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = Stops(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes) -> tuple[str, bool]:
        """The text that is certain now, and whether it ends here, before a stop text."""
        return self._stops.add(self._decoder.decode(data))

    def rest(self) -> str:
        """What was held back, when nothing follows; a character that lacks bytes is left out."""
        return self._stops.rest()


class SmolLM2:
    """Text in, the text that follows out; in one go, or piece by piece."""

    sampling_parameters = FURTHER_PARAMETERS

    def load(self, weights: Weights, device: str) -> None:
        """Bind the decoder's tensors, build its tokenizer and its chat template."""
        config = json.loads(weights.path("config.json").read_text())
        words = json.loads(weights.path("tokenizer_config.json").read_text())
        self._tokenizer = Tokenizer.from_file(str(weights.path("tokenizer.json")))
        self._special = {number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._ends = {config["eos_token_id"], self._tokenizer.token_to_id(END_OF_TEXT)}
        # The template comes with the weights; in a sandbox it reaches nothing but what it is given.
        self._template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(words["chat_template"])
        self._template.globals["raise_exception"] = _refuse
        self._model = Llama(config, dict(weights.to(device)))

    def warm_up(self) -> None:
        """The first passes set up torch's kernels, for a prompt and for a token."""
        self.predict([{"prompt": "warm up", "max_tokens": 2}])

    def predict(self, inputs: Sequence[Any], parameters: Mapping[str, Any] | None = None) -> list[str]:
        """The whole text for each input. Raises BadInput before any is made. parameters: of all, where an input says nothing else."""
        return whole_texts(self, [with_parameters(item, parameters or {}) for item in inputs])

    def start(self, input: Any) -> Answer:  # noqa: A002  the contract's word
        """An answer to be made. Raises BadInput."""
        text, sampling = self._read(input)
        try:
            prompt = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):
            raise BadInput("the text holds half a character (a lone surrogate)") from None
        if not prompt:
            raise BadInput("the prompt is empty; there must be something to go on with")
        room = self._model.context - len(prompt)
        if room < 1:
            raise BadInput(f"the prompt has {len(prompt)} tokens; the model's context has {self._model.context}, and one must be left")
        return Answer(prompt, self._model.cache(len(prompt) + min(sampling.max_tokens, room)), sampling, room)

    def step(self, answers: Sequence[Answer]) -> list[str | None]:
        """A token more for each, in one forward pass: its piece of text, None when there is no more.

        A piece is empty when it is held back (see Text), and while a prompt is still being taken in, PROMPT_TOKENS a step.
        """
        going_on = [answer for answer in answers if not answer.finish_reason]
        pieces: dict[int, str] = {}
        if going_on:
            with torch.inference_mode():
                logits = self._model.forward([answer.next_part() for answer in going_on])
                for answer, row in zip(going_on, logits, strict=True):
                    del answer.waiting[:PROMPT_TOKENS]
                    pieces[id(answer)] = "" if answer.waiting else self._take(answer, answer.chooser.choose(row))
        return [pieces.get(id(answer)) or (None if answer.finish_reason else "") for answer in answers]

    def _take(self, answer: Answer, token: int) -> str:
        """The text that a token adds."""
        answer.completion_tokens += 1
        if token in self._ends:
            answer.finish("stop")
            return answer.text.rest()
        piece, is_end = answer.text.add(self._bytes(token))
        if is_end:
            answer.finish("stop")
        elif answer.completion_tokens == answer.limit:
            answer.finish("length")
            piece += answer.text.rest()
        else:
            answer.waiting.append(token)
        return piece

    def _bytes(self, token: int) -> bytes:
        """A token's part of the text; special ones have none."""
        if token in self._special:
            return b""
        return bytes(BYTES[character] for character in self._tokenizer.id_to_token(token) or "")

    def _read(self, item: Any) -> tuple[str, Sampling]:
        """The text to go on with, and how."""
        found = read_input(item)
        return found.prompt if found.messages is None else self._conversation(found.messages), Sampling.parse(found.parameters)

    def _conversation(self, messages: list[Any]) -> str:
        """The messages as the model was trained to see them, up to where it answers."""
        for number, message in enumerate(messages):
            check_message(message, f"messages[{number}]", ROLES)
        return self._template.render(messages=messages, add_generation_prompt=True)


def _refuse(message: str) -> None:
    """What a chat template calls when it cannot use the messages."""
    raise BadInput(f"the model's chat template refuses the messages: {message}")
