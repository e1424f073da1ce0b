"""A request that shows a model at work, from its files: what its task takes, or its tensors."""

import math
from pathlib import Path
from typing import Any, cast

from function.agent import Weights
from weights_cache.environment import SettingsError

Example = dict[str, Any]

MOST_NUMBERS = 64  # in a request that a person looks at
_PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEUlEQVR42mNoaPiPFTEMLQkAyud/wVo28zkAAAAASUVORK5CYII="  # 8 by 8, a PNG
_SAMPLES = 800  # of silence: the least that models of speech take is 400
_TEXT = "A delightful film."
_SENTENCE = "The weather is fine today, and the town is full of people."
_OF_TASKS: dict[str, Example] = {
    "text-classification": {"instances": [_TEXT]},
    "feature-extraction": {"instances": [_TEXT]},
    "token-classification": {"instances": ["Ada Lovelace lived in London."]},
    "zero-shot-classification": {"instances": ["I missed my train."], "parameters": {"candidate_labels": ["travel", "cooking"]}},
    "question-answering": {"instances": [{"question": "Where did Ada live?", "context": "Ada Lovelace lived in London."}]},
    "summarization": {"instances": [_SENTENCE]},
    "translation": {"instances": [_SENTENCE]},
    "text2text-generation": {"instances": [_SENTENCE]},
    "image-classification": {"instances": [{"b64": _PICTURE}]},
}


def of_transformers(folder: str | Path) -> Example | None:
    """What `Pipeline` answers for the model that is saved in a folder; None where its task is not known, or is not one of Pipeline's."""
    from function.agents.transformers import choice, loading

    transformers = loading.library()
    config = transformers.AutoConfig.from_pretrained(folder)
    try:
        task = choice.base(choice.task_of(None, config, cast("Weights", _Folder(Path(folder)))))
    except SettingsError:
        return None
    if task == "fill-mask":
        mask = transformers.AutoTokenizer.from_pretrained(folder).mask_token
        return {"instances": [f"Paris is the {mask} of France."]}
    if task == "automatic-speech-recognition":
        rate = transformers.AutoFeatureExtractor.from_pretrained(folder).sampling_rate
        return {"instances": [{"raw": [0] * _SAMPLES, "sampling_rate": rate}]}
    return _OF_TASKS[task]


def of_onnx(file: str | Path) -> Example | None:
    """Ones in the shapes that a model's file asks for, 1 where any size will do; None where that is more than a person looks at."""
    import onnxruntime

    from function.agents.onnx import Slot

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    given = [Slot.of(slot) for slot in session.get_inputs()]
    by_rows = all(slot.counts_rows() for slot in (*given, *(Slot.of(slot, is_output=True) for slot in session.get_outputs())))
    shapes = {slot.name: [max(size, 1) for size in slot.sizes(by_rows=by_rows)] for slot in given}
    if not given or sum(map(math.prod, shapes.values())) > MOST_NUMBERS or not all(slot.dtype for slot in given):
        return None
    row = {slot.name: _filled(_one(slot), shapes[slot.name]) for slot in given}
    return {"instances": [row if len(row) > 1 else next(iter(row.values()))]}


class _Folder:
    """What the choice of a task asks of weights."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def files(self) -> list[str]:
        return [path.name for path in self._folder.iterdir()]

    def path(self, name: str) -> Path:
        return self._folder / name


def _one(slot: Any) -> object:
    if slot.datatype == "BYTES":
        return "text"
    if slot.datatype == "BOOL":
        return True
    return 1.0 if slot.datatype.startswith("FP") else 1


def _filled(value: object, shape: list[int]) -> object:
    return [_filled(value, shape[1:]) for _ in range(shape[0])] if shape else value
