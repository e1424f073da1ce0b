"""Any model of transformers that gives one answer to one input: FUNCTION_TASK says which task, or the model's configuration.

What an input, a parameter and an answer are is what the library's own `pipeline(task)` has: the answers to `instances` are those to a list
of them. A text that is longer than the model takes is refused, unless the parameter `truncation` says that it be cut.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from function.agent import TensorSpec, Weights
from function.agents.inputs import check_no_prompt
from function.agents.transformers import choice, loading
from function.agents.transformers.answers import QuestionAnswering
from function.agents.transformers.media import ImageClassification, SpeechRecognition
from function.agents.transformers.parameters import checked
from function.agents.transformers.tasks import (
    FeatureExtraction,
    FillMask,
    Task,
    TextClassification,
    TokenClassification,
    ZeroShotClassification,
)
from function.agents.transformers.texts import TextToText
from function.settings import for_agents

log = logging.getLogger("relight.function")

_TASKS: Mapping[str, type[Any]] = {
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "fill-mask": FillMask,
    "zero-shot-classification": ZeroShotClassification,
    "question-answering": QuestionAnswering,
    "summarization": TextToText,
    "translation": TextToText,
    "text2text-generation": TextToText,
    "image-classification": ImageClassification,
    "automatic-speech-recognition": SpeechRecognition,
    "feature-extraction": FeatureExtraction,
}
_SPARE = {"feature-extraction": ("pooler.",)}  # it computes nothing that is asked for


class Pipeline:
    """The agent. `media_types` and the parameters are known once it is loaded."""

    inputs = (TensorSpec("input", "BYTES", (-1,)),)
    outputs = (TensorSpec("output", "BYTES", (-1,)),)
    media_types: tuple[str, ...] = ()

    def load(self, weights: Weights, device: str) -> None:
        """Choose the task, restore the model, and make what stands around it."""
        settings = for_agents()
        config = loading.read_config(weights)
        self.task = choice.task_of(settings.task, config, weights)
        base = choice.base(self.task)
        log.info("the task is %s, as %s has it", self.task, "FUNCTION_TASK" if settings.task else "config.json or the model's card")
        if base == "feature-extraction" and "modules.json" in weights.files():
            log.warning(
                "feature-extraction gives a vector for each token, and the weights are a model of sentence-transformers (modules.json), "
                "made to give one for each text: FUNCTION_AGENT=function.agents.transformers:Embeddings does"
            )
        model = loading.load_model(
            weights, device, choice.HEADS[base] or None, config=config, dtype=settings.dtype, spare=_SPARE.get(base, ())
        )
        self._task: Task = _TASKS[base](self.task, model, weights)
        self.media_types = self._task.media_types

    def warm_up(self) -> None:
        """A forward pass, or several."""
        self._task.warm_up()

    def predict(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[Any]:
        """One answer for each input. Raises BadInput."""
        check_no_prompt(inputs, self.task)
        return self._task.predict(inputs, checked(parameters, self._task.parameters, self.task))

    def size(self, input: Any) -> float:  # noqa: A002  the contract's word
        """About how much work an input is, so that inputs of like size share a batch."""
        return self._task.size(input)
