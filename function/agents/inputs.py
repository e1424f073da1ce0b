"""What agents that generate text take, and how they make whole texts: shared by all of them.

An input is one of

    "a question"                                        one message of a user
    {"messages": [{"role": …, "content": …}, …], …}     a conversation
    {"prompt": "a text to go on with", …}
    {"text_input": "the same", "parameters": {…}}
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from function.agent import BadInput

_KINDS = ("messages", "prompt", "text_input")


class TextInput(NamedTuple):
    """An input, read: either messages or a prompt, and what else its caller says."""

    messages: list[Any] | None
    prompt: str
    parameters: Mapping[str, Any]


def read_input(item: Any) -> TextInput:
    """Raises BadInput."""
    if isinstance(item, str):
        return TextInput([{"role": "user", "content": item}], "", {})
    if not isinstance(item, Mapping):
        raise BadInput(f"an input must be a string or an object, not {type(item).__name__}")
    kinds = [kind for kind in _KINDS if kind in item]
    if len(kinds) != 1:
        raise BadInput('an input object must have one of "messages", "prompt" and "text_input"')
    kind = kinds[0]
    found, others = item[kind], {name: value for name, value in item.items() if name != kind}
    if kind == "messages":
        if not isinstance(found, list) or not found:
            raise BadInput("'messages' must be a list that is not empty")
        return TextInput(found, "", others)
    if not isinstance(found, str):
        raise BadInput(f"{kind!r} must be a string")
    return TextInput(None, found, _parameters(others) if kind == "text_input" else others)


def with_parameters(item: Any, parameters: Mapping[str, Any]) -> Any:
    """An input that has what its request says of all inputs, but for what it says itself."""
    if isinstance(item, str):
        item = {"messages": [{"role": "user", "content": item}]}
    if not parameters or not isinstance(item, Mapping):
        return item
    if "text_input" not in item:
        return {**parameters, **item}
    return {**item, "parameters": {**parameters, **_parameters({name: item[name] for name in item if name != "text_input"})}}


def check_message(message: Any, where: str, roles: Sequence[str], *, may_lack_content: bool = False) -> None:
    """Raises BadInput for what is no message of a conversation, which says what is wrong with it. where: `messages[0]`."""
    if not isinstance(message, Mapping):
        raise BadInput(f"{where} must be an object with 'role' and 'content', not {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in roles:
        raise BadInput(f"{where}: 'role' must be one of {', '.join(roles)}, not {role!r:.60}")
    if not isinstance(content, str) and not (may_lack_content and content is None):
        raise BadInput(f"{where}: 'content' must be a string, not {type(content).__name__}")


def check_no_prompt(inputs: Sequence[Any], what: str) -> None:
    """Raises BadInput if one is what an agent that generates takes. what: the model is for."""
    if any(isinstance(item, Mapping) and not item.keys().isdisjoint(_KINDS) for item in inputs):
        raise BadInput(f'this model is for {what}, and does not go on with texts or chat: ask with {{"instances": […]}} at POST /')


class Generator(Protocol):
    """An agent that makes texts in steps."""

    def start(self, input: Any) -> Any:  # noqa: A002  the contract's word
        """A text to be made."""

    def step(self, sequences: Sequence[Any]) -> Sequence[str | None]:
        """A piece more of each, None at its end."""


def whole_texts(agent: Generator, inputs: Sequence[Any]) -> list[str]:
    """The whole text for each input. Raises BadInput before any is made."""
    answers = [agent.start(item) for item in inputs]
    texts = [""] * len(answers)
    going_on = list(range(len(answers)))
    while going_on:
        pieces = agent.step([answers[index] for index in going_on])
        for index, piece in zip(going_on, pieces, strict=True):
            texts[index] += piece or ""
        going_on = [index for index, piece in zip(going_on, pieces, strict=True) if piece is not None]
    return texts


def _parameters(others: Mapping[str, Any]) -> Mapping[str, Any]:
    """What stands beside a text_input."""
    found = others.get("parameters")
    if strange := [name for name in others if name != "parameters"]:
        raise BadInput(f"there is no {strange[0]!r} beside 'text_input'; put it into 'parameters'")
    if not isinstance(found, Mapping | None):
        raise BadInput("'parameters' must be an object")
    return found or {}
