"""From the messages of a conversation to the text that the model was trained to see, by the tokenizer's own chat template."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta

from function.agent import BadInput
from function.agents.inputs import check_message

log = logging.getLogger("relight.function")

ROLES = ("system", "user", "assistant", "tool")
NO_TEMPLATE = (
    "this model has no chat template, so that there is no telling how a conversation is to be written for it: ask at /v1/completions "
    'with a prompt, or save the model with a template (tokenizer.chat_template = "…"; tokenizer.save_pretrained(FOLDER))'
)


class ChatTemplate:
    """A tokenizer's, and what it has a place for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        found = tokenizer.chat_template
        texts = found if isinstance(found, Mapping) else {"default": found} if found else {}
        self.text = "\n".join(texts.values())
        self._names = set().union(*map(_variables, texts.values())) | ({"tools"} if "tool_use" in texts else set())

    def is_there(self) -> bool:
        """Whether there is one."""
        return bool(self.text)

    def takes(self, name: str) -> bool:
        """Whether it has a variable of this name."""
        return name in self._names

    def render(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> str:
        """The text, up to where the model answers.

        messages: as OpenAI has them, content a string. variables: `tools` and others that the template may use. Raises BadInput.
        """
        if not self.text:
            raise BadInput(NO_TEMPLATE)
        for name in variables:
            if not self.takes(name):
                raise BadInput(f"this model's chat template takes no {name}: leave out {name!r}")
        prepared = [self._prepared(message, f"messages[{number}]") for number, message in enumerate(messages)]
        try:
            return self._applied(prepared, variables)
        except BadInput:
            if not any("tool_calls" in message for message in prepared):
                raise
            return self._applied(list(map(_with_json, prepared)), variables)  # some templates want the arguments of calls as JSON

    def _applied(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadInput(f"the model's chat template refuses the messages: {error!s:.500}") from error
        return text

    def _prepared(self, message: Any, where: str) -> dict[str, Any]:
        calls = (message.get("tool_calls") if isinstance(message, Mapping) else None) or []
        check_message(message, where, ROLES, may_lack_content=bool(calls))
        if (calls or message["role"] == "tool") and not self.takes("tools"):
            raise BadInput("this model's chat template takes no tools: it has no place for messages of tools and their calls")
        found = {**message, "content": message.get("content") or ""}
        if calls:
            found["tool_calls"] = [_prepared_call(call) for call in (calls if isinstance(calls, list) else [calls])]
        else:
            found.pop("tool_calls", None)  # templates ask whether there are some by whether the name is there
        return found


def _with_json(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its calls as OpenAI has them."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _prepared_call(call: Any) -> dict[str, Any]:
    """OpenAI has a call's arguments as JSON; templates want what it says."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadInput('each of \'tool_calls\' must be an object like {"id": …, "function": {"name": …, "arguments": "{…}"}}')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise BadInput(f"'arguments' of the call of {function['name']!r:.60} must be JSON") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _variables(template: str) -> set[str]:
    """Names that a template uses and does not set itself."""
    try:
        parsed = jinja2.Environment(extensions=[jinja2.ext.loopcontrols]).parse(template)  # noqa: S701  nothing is rendered
    except jinja2.TemplateError:  # it has tags of the library's own
        return set(re.findall(r"\b[a-z_]\w*\b", template))
    return jinja2.meta.find_undeclared_variables(parsed)
