"""Which task a model is for: what FUNCTION_TASK says, or the model's configuration and card."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from function.agent import Weights
from weights_cache.environment import SettingsError

AGENTS = "function.agents.transformers"

# Tasks, and what transformers names the classes of their models.
HEADS = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "zero-shot-classification": "AutoModelForSequenceClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "summarization": "AutoModelForSeq2SeqLM",
    "translation": "AutoModelForSeq2SeqLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "automatic-speech-recognition": "",  # one of several, see `media`
    "feature-extraction": "AutoModel",
}
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}

_TRANSLATION = re.compile(r"translation_[a-zA-Z_-]+_to_[a-zA-Z_-]+")
_BY_CLASS = (
    ("ForSequenceClassification", ("text-classification",)),
    ("ForTokenClassification", ("token-classification",)),
    ("ForMaskedLM", ("fill-mask",)),
    ("ForQuestionAnswering", ("question-answering",)),
    ("ForImageClassification", ("image-classification",)),
    ("ForImageClassificationWithTeacher", ("image-classification",)),
    ("ForCTC", ("automatic-speech-recognition",)),
    ("MTModel", ("translation",)),
    ("ForSpeechSeq2Seq", ("automatic-speech-recognition",)),
    ("WhisperForConditionalGeneration", ("automatic-speech-recognition",)),
    ("Speech2TextForConditionalGeneration", ("automatic-speech-recognition",)),
    ("SpeechEncoderDecoderModel", ("automatic-speech-recognition",)),
    ("PegasusForConditionalGeneration", ("summarization",)),
    ("M2M100ForConditionalGeneration", ("translation",)),
    ("MBartForConditionalGeneration", ("translation", "summarization")),
    ("ForConditionalGeneration", ("summarization", "translation", "text2text-generation")),
)
_TALKS = ("ForCausalLM", "LMHeadModel")
# What the library and the hub have besides, and which agent it is here.
_ELSEWHERE = {"text-generation": "Chat", "conversational": "Chat", "sentence-similarity": "Embeddings", "sentence-embedding": "Embeddings"}
_CARD_BYTES = 1 << 16


def task_of(said: str | None, config: Any, weights: Weights) -> str:
    """The task's name, such as `text-classification` or `translation_en_to_fr`. said: FUNCTION_TASK, if it is set.

    Raises SettingsError where there is no such task, where it is not the model's, and where the model leaves a choice.
    """
    if said:
        task = ALIASES.get(said, said)
        if task not in HEADS and not _TRANSLATION.fullmatch(task):
            raise SettingsError(f"FUNCTION_TASK={said!r}: {_unknown(said)}")
        _check(said, base(task), config)
        return task
    tasks = _tasks(config)
    if len(tasks) == 1:
        return tasks[0]
    tag = _tag_of_card(weights)
    if tag in (tasks or HEADS):
        return tag
    names = " or ".join(config.architectures or ["of no class that config.json names"])
    if names.endswith(_TALKS):
        raise SettingsError(
            f"the model is {names}, which goes on with a text: FUNCTION_AGENT={AGENTS}:Chat is for it; "
            "for its vectors set FUNCTION_TASK=feature-extraction"
        )
    raise SettingsError(f"the model is {names}, so that its task is not known: set FUNCTION_TASK to one of {_list(tasks or HEADS)}")


def fitting(config: Any) -> str:
    """What a model is by its config, and which agent and task are for that: the end of an error's sentence."""
    name = (config.architectures or [""])[0]
    if not name:
        return "config.json does not name the model's class (architectures)"
    agent = "Chat" if name.endswith(_TALKS) else "Pipeline" if (tasks := _tasks(config)) else ""
    if not agent:
        return f"the model is {name} by config.json"
    with_task = f" with FUNCTION_TASK={' or '.join(tasks)}" if agent == "Pipeline" else ""
    return f"the model is {name} by config.json, for which there is FUNCTION_AGENT={AGENTS}:{agent}{with_task}"


def other_use(config: Any) -> str:
    """The same for a model with a head that embeddings have no use for; empty for others."""
    return fitting(config) if any(task not in ("feature-extraction", "fill-mask") for task in _tasks(config)) else ""


def check_talks(config: Any) -> None:
    """Raises SettingsError for a model with another head than one that goes on with a text, though its weights might fit one."""
    if any(task != "feature-extraction" for task in _tasks(config)):
        raise SettingsError(f"this agent goes on with texts, and {fitting(config)}")


def _unknown(said: str) -> str:
    """What is said of a task that there is not."""
    if agent := _ELSEWHERE.get(said):
        return f"that is what FUNCTION_AGENT={AGENTS}:{agent} is for, without a task"
    near = difflib.get_close_matches(said, [*HEADS, *ALIASES], 1)
    there = f"there are {_list(HEADS)} and translation_XX_to_YY"
    return f"there is no such task; did you mean {near[0]!r}? Of all {there}" if near else f"there is no such task; {there}"


def _check(said: str, task: str, config: Any) -> None:
    """Raises SettingsError where the model's class has another head: its weights might fit all the same, and the answers mean nothing."""
    name = (config.architectures or [""])[0]
    tasks = _tasks(config)
    if task == "feature-extraction" or not tasks or name.endswith("ForConditionalGeneration") or not HEADS[task]:
        return
    if HEADS[task] not in [HEADS[base(one)] for one in tasks] and tasks != ("feature-extraction",):
        raise SettingsError(f"FUNCTION_TASK={said!r} is not what the model was made for: {fitting(config)}")


def base(task: str) -> str:
    """The task that has the head: of a pair of languages, translation."""
    return "translation" if task.startswith("translation_") else task


def _tasks(config: Any) -> Sequence[str]:
    """Those that the model may be for; empty if that is not known."""
    name = (config.architectures or [""])[0]
    specific = [task for task in (getattr(config, "task_specific_params", None) or {}) if base(task) in HEADS]
    if name.endswith("ForConditionalGeneration") and len(specific) == 1:
        return specific  # of a BART that was trained for summaries
    found: Sequence[str] = next((tasks for end, tasks in _BY_CLASS if name.endswith(end)), ())
    if name.endswith("ForConditionalGeneration") and not getattr(config, "is_encoder_decoder", False):
        return ()  # it goes on with texts, and sees images perhaps
    if found == ("text-classification",) and is_entailment(config):
        return (*found, "zero-shot-classification")
    if not found and name.endswith("Model") and not name.endswith(_TALKS) and not getattr(config, "is_encoder_decoder", False):
        return () if getattr(config, "vision_config", None) is not None else ("feature-extraction",)
    return found


def is_entailment(config: Any) -> bool:
    """Whether the model tells if one text follows from another."""
    return any(str(label).lower().startswith("entail") for label in (config.label2id or {}))


def _tag_of_card(weights: Weights) -> str:
    """What the model's card says, `pipeline_tag` in the head of README.md, if it came along."""
    if "README.md" not in weights.files():
        return ""
    with weights.path("README.md").open("rb") as card:
        head = card.read(_CARD_BYTES).decode(errors="replace").split("\n---", 1)[0]
    found = re.search(r"^pipeline_tag:\s*['\"]?([\w-]+)", head, re.MULTILINE)
    return ALIASES.get(found[1], found[1]) if found else ""


def _list(tasks: Any) -> str:
    return ", ".join(tasks)
