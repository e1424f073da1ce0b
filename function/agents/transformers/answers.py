"""Question answering: the span of a text that answers a question.

transformers had a pipeline for it until it was removed in a release of version 5; this is what it computed (transformers 4.57,
`pipelines/question_answering.py`), for tokenizers that know where a token is in its text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from function.agent import BadInput
from function.agents.transformers.parameters import FLAG, Parameter, whole
from function.agents.transformers.rows import Numbers, Row, within_bounds
from function.agents.transformers.tasks import TextTask, strings
from weights_cache.errors import WeightsError

MOST_TOKENS = 384  # of a piece of the text with the question
STRIDE = 128  # tokens that two pieces share
_NEVER = -10_000.0  # a logit of what cannot be part of an answer

Floats = NDArray[np.float32]


class QuestionAnswering(TextTask):
    """{"score", "start", "end", "answer"}, or with `top_k` a list of them; start and end are characters of the context."""

    parameters: Mapping[str, Parameter] = {
        "top_k": whole(1, 1000),
        "doc_stride": whole(0),
        "max_answer_len": whole(1),
        "max_seq_len": whole(1, 4096),
        "handle_impossible_answer": FLAG,
        "align_to_words": FLAG,
    }
    outputs = ("start_logits", "end_logits")
    is_by_token = True
    wants = '{"question": …, "context": …}, both of them strings that are not empty'

    def make_pipe(self, task: str) -> Any:
        """The library has none any more."""
        if not self.tokenizer.is_fast:
            raise WeightsError("question-answering needs a fast tokenizer (tokenizer.json), which says where a token is in its text")

    def rows(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[list[Row]]:
        """As many of an input as its context has pieces."""
        return within_bounds(self._pieces(strings(one, ("question", "context"), (), self.wants), parameters) for one in inputs)

    def _pieces(self, one: Mapping[str, str], parameters: Mapping[str, Any]) -> list[Row]:
        if not all(one.values()):
            raise BadInput(f"each input must be {self.wants}")
        limit = self.texts.limit or MOST_TOKENS
        most = min(parameters.get("max_seq_len", min(limit, MOST_TOKENS)), limit)
        question = len(self.texts.encode(one["question"], add_special_tokens=False)["input_ids"])
        room, least = most - question - self.tokenizer.num_special_tokens_to_add(pair=True), max(1, most // 4)
        if room < least:
            raise BadInput(
                f"the question has {question} tokens and leaves {max(room, 0)} of the {most} that the model sees at once, which must be "
                f"{least} at least"
            )
        stride = parameters.get("doc_stride", min(most // 2, STRIDE, room // 2))
        if stride > room // 2:
            raise BadInput(
                f"'doc_stride' must be at most {room // 2}, half of the {room} tokens of the context that the model sees at once"
            )
        texts, cut = (one["question"], one["context"]), "only_second"
        if not self._is_question_first():
            texts, cut = (one["context"], one["question"]), "only_first"
        told = {"return_token_type_ids": True, "return_special_tokens_mask": True, "return_overflowing_tokens": True}
        found = self.texts.encode(*texts, truncation=cut, max_length=most, stride=stride, return_offsets_mapping=True, **told)
        names = [name for name in self.tokenizer.model_input_names if name in found]
        return [
            Row({name: found[name][at] for name in names}, {"encoding": encoding, "context": one["context"]})
            for at, encoding in enumerate(found.encodings)
        ]

    def options(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """They are the last step's own."""
        return dict(parameters)

    def answer(self, rows: Sequence[Row], numbers: Sequence[Numbers], options: Mapping[str, Any]) -> Any:
        """The answer to one input."""
        count, is_aligned = options.get("top_k", 1), options.get("align_to_words", True)
        longest, may_be_none = options.get("max_answer_len", 15), options.get("handle_impossible_answer", False)
        by_text: dict[str, dict[str, Any]] = {}
        null_score = 1_000_000.0
        for row, found in zip(rows, numbers, strict=True):
            may_answer = self._may_answer(row)
            start, end = (_probabilities(found[name].float().numpy()[0], may_answer) for name in self.outputs)
            null_score = min(null_score, float(start[0] * end[0]))
            start[0] = end[0] = 0  # the first token says that there is none
            # Of answers that are made to end where words do, some are one and the same.
            for first, last, score in _spans(start, end, may_answer, count * 2 + 10 if is_aligned else count, longest):
                _add(by_text, row.extra["context"], *self._place(row, first, last, is_aligned=is_aligned), score)
        answers = list(by_text.values())
        if may_be_none:
            answers.append({"score": null_score, "start": 0, "end": 0, "answer": ""})
        answers = sorted(answers, key=lambda answer: answer["score"], reverse=True)[:count]
        return answers[0] if len(answers) == 1 else answers

    def example(self, text: str) -> Any:
        """An input that holds the text."""
        return {"question": "warm?", "context": text}

    def _is_question_first(self) -> bool:
        return bool(self.tokenizer.padding_side == "right")

    def _may_answer(self, row: Row) -> NDArray[np.bool_]:
        """Of each token, whether it is of the context, or says that there is no answer."""
        context = 1 if self._is_question_first() else 0
        of_context = np.array([sequence == context for sequence in row.extra["encoding"].sequence_ids])
        found: NDArray[np.bool_] = of_context | (np.array(row.inputs["input_ids"]) == self.tokenizer.cls_token_id)
        return found

    def _place(self, row: Row, first: int, last: int, *, is_aligned: bool) -> tuple[int, int]:
        """Where tokens are in the context."""
        encoding, context = row.extra["encoding"], 1 if self._is_question_first() else 0
        if is_aligned:
            words = encoding.token_to_word(first), encoding.token_to_word(last)
            if None not in words and all(spans := [encoding.word_to_chars(word, context) for word in words]):
                return spans[0][0], spans[1][1]
        return encoding.offsets[first][0], encoding.offsets[last][1]


def _probabilities(logits: Floats, may_answer: NDArray[np.bool_]) -> Floats:
    logits = np.where(may_answer, logits, np.float32(_NEVER))
    likely = np.exp(logits - logits.max())
    found: Floats = likely / likely.sum()
    return found


def _spans(start: Floats, end: Floats, may_answer: NDArray[np.bool_], count: int, longest: int) -> list[tuple[int, int, float]]:
    """The likeliest: first token, last token, and the product of their probabilities."""
    scores = np.tril(np.triu(np.outer(start, end)), longest - 1)
    flat = scores.ravel()
    if count == 1:
        places = np.array([flat.argmax()])
    elif flat.size < count:
        places = np.argsort(-flat)
    else:
        likely = np.argpartition(-flat, count)[:count] if count < flat.size else np.arange(flat.size)
        places = likely[np.argsort(-flat[likely])]
    found = zip(*np.unravel_index(places, scores.shape), strict=True)
    return [(int(first), int(last), float(scores[first, last])) for first, last in found if may_answer[first] and may_answer[last]]


def _add(answers: dict[str, dict[str, Any]], context: str, start: int, end: int, score: float) -> None:
    """One more; the same text again makes it likelier."""
    text = context[start:end]
    if (answer := answers.get(text.lower())) is not None:
        answer["score"] += score
    else:
        answers[text.lower()] = {"score": score, "start": start, "end": end, "answer": text}
