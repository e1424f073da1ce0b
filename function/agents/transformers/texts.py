"""Texts made of texts: summarization, translation, and whatever an encoder-decoder was trained for.

transformers had pipelines for them until they were removed in version 5; this is what they did (transformers 4.57,
`pipelines/text2text_generation.py`): the model's own `generate`, with the defaults of those pipelines.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from function.agent import BadInput
from function.agents.transformers import loading
from function.agents.transformers.choice import base
from function.agents.transformers.parameters import FLAG, GENERATION, TEXT, TRUNCATION, Parameter
from function.agents.transformers.rows import Row, Texts, joined, position_limit, token_limit
from function.agents.transformers.tasks import characters, kind_of, refusing

MOST_NEW_TOKENS, BEAMS = 256, 4  # where the model's generation config does not say
MOST_OF_ALL_BEAMS = 8192  # tokens of all beams, or of all sequences, of one text
_NOT_SAID = 20  # the `max_length` of a generation config that says none
_NAMES = {"summarization": "summary_text", "translation": "translation_text", "text2text-generation": "generated_text"}


class TextToText:
    """One text of each input, by the name that the library gave it, or with `num_return_sequences` several."""

    media_types: tuple[str, ...] = ()

    def __init__(self, task: str, model: Any, weights: Any) -> None:
        self.parameters: Mapping[str, Parameter] = {**GENERATION, **TRUNCATION, "clean_up_tokenization_spaces": FLAG}
        self._name = _NAMES[base(task)]
        self._model = model
        self._tokenizer = loading.load_tokenizer(weights)
        self._texts = Texts(self._tokenizer, token_limit(model, self._tokenizer))
        self._room = position_limit(model)  # for the tokens that are made, the first of which is no part of the text
        specific: dict[str, Any] = {**((getattr(model.config, "task_specific_params", None) or {}).get(task) or {})}
        self._prefix = specific.pop("prefix", None) or getattr(model.config, "prefix", None) or ""
        self._generation = self._defaults(specific)
        self._languages: dict[str, str] = {}
        self._needs_languages = base(task) == "translation" and hasattr(self._tokenizer, "_build_translation_inputs")
        if base(task) == "translation":
            self.parameters = {**self.parameters, "src_lang": TEXT, "tgt_lang": TEXT}
            if task != "translation":
                source, _, target = task.removeprefix("translation_").partition("_to_")
                self._languages = {"src_lang": source, "tgt_lang": target}

    def _defaults(self, specific: Mapping[str, Any]) -> Any:
        """How texts are made unless a request says more. specific: what the config says of this task."""
        found = copy.deepcopy(self._model.generation_config)
        if found.num_beams in (None, 1):
            found.num_beams = BEAMS
        if found.max_new_tokens is None and found.max_length in (None, _NOT_SAID):
            found.max_new_tokens = min(MOST_NEW_TOKENS, (self._room or MOST_NEW_TOKENS + 1) - 1)
        if found.pad_token_id is None:
            found.pad_token_id = self._tokenizer.pad_token_id
        found.update(**specific)
        return found

    def predict(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[Any]:
        """All of them made together, step by step. Raises BadInput."""
        said = dict(parameters)
        options = {"clean_up_tokenization_spaces": said.pop("clean_up_tokenization_spaces", False)}
        truncation = said.pop("truncation", False)
        languages = self._languages | {name: said.pop(name) for name in ("src_lang", "tgt_lang") if name in said}
        more = self._translating(languages) if self._needs_languages else {}
        rows = self._texts.rows([self._prefix + self._text(one) for one in inputs], truncation=truncation)
        tokens = self._generate(rows, {**said, **more})
        each = len(tokens) // len(rows)
        texts = [{self._name: self._tokenizer.decode(row, skip_special_tokens=True, **options)} for row in tokens]
        return texts if each == 1 else [texts[at : at + each] for at in range(0, len(texts), each)]

    def size(self, input: Any) -> float:  # noqa: A002  the contract's word
        """In characters."""
        return characters(input)

    def warm_up(self) -> None:
        """Two tokens of a text."""
        self._generate(self._texts.rows(["warm up"]), {"max_new_tokens": 2})

    def _text(self, one: Any) -> str:
        if not isinstance(one, str):
            raise BadInput(f"each input must be a string, not {kind_of(one)}")
        return one

    def _translating(self, languages: Mapping[str, str]) -> dict[str, int]:
        """Have a model of several languages translate from one to the other: what comes from here on is of the first."""
        if len(languages) < 2:
            raise BadInput("the model knows several languages: the parameters 'src_lang' and 'tgt_lang' must say which")
        vocabulary = self._tokenizer.get_vocab()
        for name, language in languages.items():
            if language not in vocabulary and f"__{language}__" not in vocabulary:
                raise BadInput(f"{name!r}: the model does not know {language!r}; its languages are as its tokenizer writes them")
        found = self._tokenizer._build_translation_inputs([""], return_tensors=None, **languages)  # noqa: SLF001  which sets the first
        return {"forced_bos_token_id": int(found["forced_bos_token_id"])}

    def _generate(self, rows: Sequence[Row], said: Mapping[str, Any]) -> Any:
        """Tokens of each text, [rows × sequences, tokens]."""
        how = copy.deepcopy(self._generation)
        if "max_length" in said and "max_new_tokens" not in said:
            how.max_new_tokens = None  # a default, and what was said goes before it
        most = max(said.get("max_new_tokens", 0), said.get("max_length", 0))
        if self._room and most >= self._room:
            raise BadInput(f"the model can make at most {self._room - 1} tokens, and not {most}")
        wide = max(said.get("num_beams", how.num_beams), said.get("num_return_sequences", 1))
        if most * wide > MOST_OF_ALL_BEAMS:
            raise BadInput(f"{most} tokens in {wide} beams or sequences are {most * wide}, and may be {MOST_OF_ALL_BEAMS}: ask for fewer")
        names = [name for name in rows[0].inputs if name != "token_type_ids"]
        pad, is_left = self._tokenizer.pad_token_id, self._tokenizer.padding_side == "left"
        inputs = {name: joined(name, rows, pad, is_left=is_left).to(self._model.device) for name in names}
        with torch.inference_mode(), refusing():
            return self._model.generate(**inputs, generation_config=how, **said).cpu()
