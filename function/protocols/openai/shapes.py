"""What an answer of OpenAI's routes looks like."""

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from function.guarded_agent import Usage
from function.told import Piece
from function.values import dumps

Said = dict[str, Any]


@dataclass
class Told:
    """What a piece, or a whole answer, is made of."""

    text: str
    logprobs: list[Said] = field(default_factory=list)  # of its tokens, as in `function.told.Piece`
    tool_calls: list[Said] = field(default_factory=list)  # as OpenAI has them, but for "index"

    @classmethod
    def of_piece(cls, piece: Any) -> "Told":
        """What an agent gave for one."""
        if not isinstance(piece, Piece):
            return cls(text_of(piece))
        return cls(str(piece), piece.logprobs, [_call(call) for call in piece.tool_calls])

    @classmethod
    def of_pieces(cls, pieces: Iterable[Any]) -> "Told":
        """All of an answer."""
        found = [cls.of_piece(piece) for piece in pieces]
        return cls(
            "".join(one.text for one in found),
            list(chain.from_iterable(one.logprobs for one in found)),
            list(chain.from_iterable(one.tool_calls for one in found)),
        )


@dataclass(frozen=True)
class Shape:
    """How completions and chat completions differ in what they answer."""

    prefix: str  # of ids
    whole: str  # the `object` of an answer in one go
    chunk: str  # and of a part of one
    said: Callable[[Told], Said]  # what a choice holds of an answer
    part: Callable[[Told, int], Said]  # and of a piece of it, before which there were so many calls of tools
    logprobs: Callable[[Sequence[Said], int], Said]  # of tokens, before which there was so much text
    first: Said | None  # what a choice holds in a chunk before the first piece, if there is to be one
    ending: Said  # and in the one after the last


def _text_logprobs(tokens: Sequence[Said], offset: int) -> Said:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token["token"])
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{one["token"]: one["logprob"] for one in token["top_logprobs"]} for token in tokens],
        "text_offset": offsets,
    }


def _message(told: Told) -> Said:
    calls = {"tool_calls": told.tool_calls} if told.tool_calls else {}
    content = None if calls and not told.text else told.text
    return {"message": {"role": "assistant", "content": content, "refusal": None, **calls}}


def _delta(told: Told, calls: int) -> Said:
    if not told.tool_calls:
        return {"delta": {"content": told.text}}
    indexed = [{"index": calls + number, **call} for number, call in enumerate(told.tool_calls)]
    return {"delta": {**({"content": told.text} if told.text else {}), "tool_calls": indexed}}


TEXT_SHAPE = Shape(
    prefix="cmpl-",
    whole="text_completion",
    chunk="text_completion",
    said=lambda told: {"text": told.text},
    part=lambda told, _: {"text": told.text},
    logprobs=_text_logprobs,
    first=None,
    ending={"text": ""},
)
CHAT_SHAPE = Shape(
    prefix="chatcmpl-",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    said=_message,
    part=_delta,
    logprobs=lambda tokens, _: {"content": list(tokens), "refusal": None},
    first={"delta": {"role": "assistant", "content": ""}},
    ending={"delta": {}},
)


def usage(answers: Sequence[Usage], choices: int) -> dict[str, int]:
    """What all of them took together. choices: so many of them in a row have one prompt, which counts once."""
    prompt = sum(one.prompt_tokens for one in answers[::choices])
    completion = sum(one.completion_tokens for one in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def text_of(output: Any) -> str:
    """An agent's output as text: itself, bytes that are UTF-8, or in JSON what is neither."""
    if isinstance(output, bytes):
        try:
            return output.decode()
        except UnicodeDecodeError:
            pass
    return output if isinstance(output, str) else dumps(output).decode()


def _call(call: Said) -> Said:
    """With an id: of nine letters and digits, as templates of Mistral's models take no other when it comes back."""
    return {"id": uuid.uuid4().hex[:9], "type": "function", "function": call}
