"""Tasks of texts: what the model gets of each input, and the answer that the library's own pipeline makes of its numbers."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from function.agent import BadInput
from function.agents.transformers import loading
from function.agents.transformers.choice import is_entailment
from function.agents.transformers.parameters import FLAG, LABELS, TARGETS, TEMPLATE, TEXTS, TRUNCATION, Parameter, checked, one_of, whole
from function.agents.transformers.rows import Forward, Numbers, Row, Texts, check_characters, check_rows, token_limit, within_bounds
from weights_cache.errors import WeightsError

SCORES = one_of("sigmoid", "softmax", "none")


class Task(Protocol):
    """What a model does with inputs. One thread calls it."""

    parameters: Mapping[str, Parameter]  # that a request may say
    media_types: tuple[str, ...]  # of bodies that are inputs as they are

    def predict(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[Any]:
        """One answer for each input. Raises BadInput."""

    def size(self, input: Any) -> float:  # noqa: A002  the contract's word
        """About how much work an input is."""

    def warm_up(self) -> None:
        """What the first call would otherwise pay."""


class TextTask:
    """A task whose inputs are texts, and whose model makes its answer in one pass."""

    parameters: Mapping[str, Parameter] = TRUNCATION
    media_types: tuple[str, ...] = ()
    outputs: Sequence[str] = ("logits",)  # of the model
    is_by_token = False
    keeps: Sequence[str] = ()  # of what the tokenizer tells
    wants = "a string"

    def __init__(self, task: str, model: Any, weights: Any) -> None:
        self.model = model
        self.tokenizer = loading.load_tokenizer(weights)
        self.texts = Texts(self.tokenizer, token_limit(model, self.tokenizer))
        self.forward = Forward(model, self.tokenizer, self.outputs, is_by_token=self.is_by_token)
        self.pipe = self.make_pipe(task)

    def make_pipe(self, task: str) -> Any:
        """The library's own, for what it makes of the model's numbers."""
        transformers = loading.library()
        with loading.explained(f"the pipeline {task!r}"):
            return transformers.pipeline(task, model=self.model, tokenizer=self.tokenizer, device=self.model.device)

    def predict(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[Any]:
        """One answer for each input, from one forward pass for all. Raises BadInput."""
        each = self.rows(inputs, parameters)
        numbers = iter(self.forward.run([row for rows in each for row in rows]))
        options = self.options(parameters)
        return [self.answer(rows, [next(numbers) for _ in rows], options) for rows in each]

    def rows(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[list[Row]]:
        """Those of each input."""
        texts = [self.text(one) for one in inputs]
        return [[row] for row in self.texts.rows(texts, truncation=parameters.get("truncation", False), keep=self.keeps)]

    def text(self, input: Any) -> str:  # noqa: A002
        """The text that an input is. Raises BadInput."""
        if not isinstance(input, str):
            raise BadInput(f"each input must be {self.wants}, not {kind_of(input)}")
        return input

    def options(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What the library's pipeline makes of the parameters, for its last step. Raises BadInput for what it refuses."""
        said = {name: value for name, value in parameters.items() if name != "truncation"}
        with refusing():
            options: dict[str, Any] = self.pipe._sanitize_parameters(**said)[2]  # noqa: SLF001  its own way from names to steps
        return options

    def answer(self, rows: Sequence[Row], numbers: Sequence[Numbers], options: Mapping[str, Any]) -> Any:
        """The answer to one input."""
        return self.pipe.postprocess(numbers[0], **options)

    def size(self, input: Any) -> float:  # noqa: A002
        """In characters, as tokens would take as long to count as to make."""
        return characters(input)

    def warm_up(self) -> None:
        """Texts of unlike lengths, so that it is known how they may share a pass."""
        said = {"truncation": True} if "truncation" in self.parameters else {}
        texts = ("warm up", "the second is longer, and has other words", "a third?")
        self.predict([self.example(text) for text in texts], said)

    def example(self, text: str) -> Any:
        """An input that holds the text."""
        return text


class TextClassification(TextTask):
    """A label and its score, or with `top_k` several."""

    parameters: Mapping[str, Parameter] = {"top_k": whole(1, is_null=True), "function_to_apply": SCORES, **TRUNCATION}
    wants = 'a string, or {"text": …, "text_pair": …}'

    def rows(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[list[Row]]:
        """Those of single texts together, and those of pairs."""
        found: dict[int, Row] = {}
        pairs = {at: strings(one, ("text",), ("text_pair",), self.wants) for at, one in enumerate(inputs) if not isinstance(one, str)}
        for is_pair in (False, True):
            places = [at for at in range(len(inputs)) if bool(pairs.get(at, {}).get("text_pair")) == is_pair]
            if places:
                first = [pairs[at]["text"] if at in pairs else inputs[at] for at in places]
                second = [pairs[at]["text_pair"] for at in places] if is_pair else None
                found |= zip(places, self.texts.rows(first, second, truncation=parameters.get("truncation", False)), strict=True)
        return [[found[at]] for at in range(len(inputs))]


class TokenClassification(TextTask):
    """Labels of tokens or, with `aggregation_strategy`, of words and entities."""

    parameters: Mapping[str, Parameter] = {
        "aggregation_strategy": one_of("none", "simple", "first", "average", "max"),
        "ignore_labels": TEXTS,
        "stride": whole(0),
        **TRUNCATION,
    }
    is_by_token = True
    keeps: Sequence[str] = ("special_tokens_mask", "offset_mapping")

    def __init__(self, task: str, model: Any, weights: Any) -> None:
        super().__init__(task, model, weights)
        if not self.tokenizer.is_fast:
            self.keeps = ("special_tokens_mask",)

    def rows(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[list[Row]]:
        """With `stride` a text is cut into pieces that overlap; else each has one."""
        if "stride" in parameters:
            self.options(parameters)
            if (limit := self.texts.limit) and parameters["stride"] > (most := (limit - self.tokenizer.num_special_tokens_to_add()) // 2):
                raise BadInput(f"'stride' must be at most {most}, half of the tokens of a text that the model takes at once")
            each = within_bounds(self._pieces(self.text(one), parameters["stride"]) for one in inputs)
        else:
            each = super().rows(inputs, parameters)
        for one, rows in zip(inputs, each, strict=True):
            for row in rows:
                row.extra["sentence"] = one
        return each

    def _pieces(self, text: str, stride: int) -> list[Row]:
        if not self.texts.limit:
            return self.texts.rows([text], keep=self.keeps)
        told = {"return_special_tokens_mask": True, "return_offsets_mapping": True, "return_overflowing_tokens": True}
        with refusing():
            found = self.texts.encode([text], truncation=True, stride=stride, **told)
        names = [name for name in self.tokenizer.model_input_names if name in found]
        each = range(len(found["input_ids"]))
        return [Row({name: found[name][at] for name in names}, {name: found[name][at] for name in self.keeps}) for at in each]

    def answer(self, rows: Sequence[Row], numbers: Sequence[Numbers], options: Mapping[str, Any]) -> Any:
        """The answer to one input."""
        outputs = []
        for row, found in zip(rows, numbers, strict=True):
            tensors = {name: torch.tensor([row.extra[name]]) for name in self.keeps}
            told = {"offset_mapping": None, "word_ids": None, "word_to_chars_map": None, "sentence": row.extra["sentence"]}
            outputs.append({**told, **tensors, **found, "input_ids": torch.tensor([row.inputs["input_ids"]])})
        with warnings.catch_warnings():  # of tokenizers that know no words, with each call
            warnings.simplefilter("ignore")
            return self.pipe.postprocess(outputs, **options)


class FillMask(TextTask):
    """The tokens that a mask may stand for."""

    parameters: Mapping[str, Parameter] = {"top_k": whole(1), "targets": TARGETS, **TRUNCATION}
    is_by_token = True

    def rows(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[list[Row]]:
        """Raises BadInput for a text without a mask."""
        each = super().rows(inputs, parameters)
        if any(self.tokenizer.mask_token_id not in row.inputs["input_ids"] for rows in each for row in rows):
            raise BadInput(f"the text must have the mask {self.tokenizer.mask_token!r} where a word is wanted")
        if parameters.get("top_k", 1) > self.model.config.vocab_size:
            raise BadInput(f"'top_k' is more than the {self.model.config.vocab_size} tokens that there are")
        return each

    def answer(self, rows: Sequence[Row], numbers: Sequence[Numbers], options: Mapping[str, Any]) -> Any:
        """The answer to one input."""
        return self.pipe.postprocess({"input_ids": torch.tensor([rows[0].inputs["input_ids"]]), **numbers[0]}, **options)

    def example(self, text: str) -> Any:
        """An input that holds the text."""
        return f"{text} {self.tokenizer.mask_token}"


class ZeroShotClassification(TextTask):
    """Labels of the caller's own: how well a sentence about each follows from the text."""

    parameters: Mapping[str, Parameter] = {"candidate_labels": LABELS, "hypothesis_template": TEMPLATE, "multi_label": FLAG, **TRUNCATION}
    wants = 'a string (with the parameter "candidate_labels"), or {"sequence": …, "candidate_labels": […]}'

    def __init__(self, task: str, model: Any, weights: Any) -> None:
        if not is_entailment(model.config):
            raise WeightsError("the model has no label 'entailment' in config.json (label2id), which zero-shot-classification goes by")
        super().__init__(task, model, weights)

    def rows(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[list[Row]]:
        """One for each label of an input; what it says itself goes before the parameters."""
        return within_bounds(self._pairs(one, parameters) for one in inputs)

    def _pairs(self, one: Any, parameters: Mapping[str, Any]) -> list[Row]:
        own = {} if isinstance(one, str) else _object(one, self.wants)
        text = one if isinstance(one, str) else own.pop("sequence", None)
        if not isinstance(text, str) or not text:
            raise BadInput(f"each input must be {self.wants}")
        said = {**parameters, **checked(own, self.parameters, "the input")}
        labels = said.get("candidate_labels")
        if labels is None:
            raise BadInput('"candidate_labels" must say which labels there are, in the parameters or in the input')
        labels = [label.strip() for label in labels.split(",") if label.strip()] if isinstance(labels, str) else labels
        check_rows(len(labels))
        template = said.get("hypothesis_template", "This example is {}.")
        check_characters([len(template) + template.count("{}") * len(label) for label in labels])
        hypotheses = [template.replace("{}", label) for label in labels]
        rows = self.texts.rows([text] * len(labels), hypotheses, truncation="only_first" if said.get("truncation") else False)
        for label, row in zip(labels, rows, strict=True):
            row.extra = {"candidate_label": label, "sequence": text, "multi_label": said.get("multi_label", False)}
        return rows

    def answer(self, rows: Sequence[Row], numbers: Sequence[Numbers], options: Mapping[str, Any]) -> Any:
        """The answer to one input."""
        outputs = [{**row.extra, **found} for row, found in zip(rows, numbers, strict=True)]
        return self.pipe.postprocess(outputs, multi_label=rows[0].extra["multi_label"])

    def example(self, text: str) -> Any:
        """An input that holds the text."""
        return {"sequence": text, "candidate_labels": ["warm"]}


class FeatureExtraction(TextTask):
    """The model's last hidden state: a vector for each token."""

    outputs = ("last_hidden_state",)
    is_by_token = True

    def answer(self, rows: Sequence[Row], numbers: Sequence[Numbers], options: Mapping[str, Any]) -> Any:
        """The answer to one input."""
        return self.pipe.postprocess(list(numbers[0].values()), **options)


def characters(one: Any) -> int:
    """How many an input has."""
    if isinstance(one, Mapping):
        return sum(map(characters, one.values()))
    return len(one) if isinstance(one, str) else 1


@contextmanager
def refusing() -> Iterator[None]:
    """Around what the library raises ValueError from for what a request says: it is the caller's mistake."""
    try:
        yield
    except ValueError as error:
        raise BadInput(loading.first_line(error)) from error


def _object(one: Any, wants: str) -> dict[str, Any]:
    if not isinstance(one, Mapping):
        raise BadInput(f"each input must be {wants}, not {kind_of(one)}")
    return dict(one)


def strings(one: Any, needed: Sequence[str], others: Sequence[str], wants: str) -> dict[str, str]:
    """An input that is an object of strings with these names. Raises BadInput."""
    found = _object(one, wants)
    if strange := [name for name in found if name not in (*needed, *others)]:
        raise BadInput(f"{strange[0]!r:.100} is no field of an input, which must be {wants}")
    if any(name not in found for name in needed) or not all(isinstance(text, str) for text in found.values()):
        raise BadInput(f"each input must be {wants}")
    return found


def kind_of(one: Any) -> str:
    """What a value is called in JSON."""
    names = {
        type(None): "null",
        str: "a string",
        bytes: "bytes",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(one), type(one).__name__)
