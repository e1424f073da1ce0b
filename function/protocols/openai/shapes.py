"""What an answer of OpenAI's routes looks like."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from function.guarded_agent import Usage
from function.values import dumps


@dataclass(frozen=True)
class Shape:
    """How completions and chat completions differ in what they answer."""

    prefix: str  # of ids
    whole: str  # the `object` of an answer in one go
    chunk: str  # and of a part of one
    said: Callable[[str], dict[str, Any]]  # what a choice holds of a text
    part: Callable[[str], dict[str, Any]]  # and of a piece of it
    first: dict[str, Any] | None  # what a choice holds in a chunk before the first piece, if there is to be one
    ending: dict[str, Any]  # and in the one after the last


TEXT_SHAPE = Shape(
    "cmpl-", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text}, None, {"text": ""}
)
CHAT_SHAPE = Shape(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"content": text}},
    {"delta": {"role": "assistant", "content": ""}},
    {"delta": {}},
)


@dataclass(frozen=True)
class Answer:
    """One choice."""

    text: str
    usage: Usage = field(default_factory=Usage)


def usage(answers: Iterable[Usage]) -> dict[str, int]:
    """What all of them took together."""
    found = list(answers)
    prompt, completion = sum(one.prompt_tokens for one in found), sum(one.completion_tokens for one in found)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def text_of(output: Any) -> str:
    """An agent's output as text: itself, bytes that are UTF-8, or in JSON what is neither."""
    if isinstance(output, bytes):
        try:
            return output.decode()
        except UnicodeDecodeError:
            pass
    return output if isinstance(output, str) else dumps(output).decode()
