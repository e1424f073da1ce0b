"""Calls of tools in what a model writes, where its chat template has a known form for them.

    Hermes and Qwen   <tool_call>{"name": …, "arguments": {…}}</tool_call>, between texts, as often as it likes
    Llama 3           {"name": …, "parameters": {…}} and nothing else, perhaps after <|python_tag|>
    Mistral           [TOOL_CALLS][{"name": …, "arguments": {…}}, …] or [TOOL_CALLS]name[ARGS]{…}, after a text

What is not quite of the form stays text. A call is told when it is whole.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from function.agents.sampling import begun

Call = dict[str, str]  # "name", and "arguments" in JSON


class Parser(Protocol):
    """Takes a text apart, as it comes."""

    def add(self, text: str) -> tuple[str, list[Call]]:
        """What is certain to be text, and the calls that are whole now."""

    def finish(self) -> tuple[str, list[Call]]:
        """The same when nothing follows."""


class Form:
    """How a model writes calls."""

    def __init__(self, parser: Any, markers: Sequence[str]) -> None:
        self.markers = markers  # texts that may be special tokens
        self._parser = parser

    def parser(self, tools: Iterable[Any]) -> Parser:
        """For one answer. tools: that its request offers."""
        found: Parser = self._parser({tool.get("function", tool).get("name") for tool in tools if isinstance(tool, dict)})
        return found


def form_of(template: str) -> Form | None:
    """The form that a chat template teaches, if it is a known one."""
    if "<tool_call>" in template:
        return Form(Hermes, ("<tool_call>", "</tool_call>"))
    if "[TOOL_CALLS]" in template:
        return Form(Mistral, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"))
    if "<|python_tag|>" in template or ('"parameters"' in template and "<|start_header_id|>" in template):
        return Form(Llama, (_PYTHON,))
    return None


class NoTools:
    """All of it is text."""

    def add(self, text: str) -> tuple[str, list[Call]]:
        """See Parser."""
        return text, []

    def finish(self) -> tuple[str, list[Call]]:
        """See Parser."""
        return "", []


class Hermes:
    """Calls between tags."""

    def __init__(self, names: set[str]) -> None:
        self._held = ""
        self._is_inside = False
        self._has_called = False

    def add(self, text: str) -> tuple[str, list[Call]]:
        """See Parser."""
        self._held += text
        said, calls = "", []
        while True:
            tag = _CLOSE if self._is_inside else _OPEN
            before, found, after = self._held.partition(tag)
            if not found:
                break
            self._held = after
            if not self._is_inside:
                said += self._between(before)
            elif call := _call(_loads(before)):
                calls.append(call)
                self._has_called = True
            else:
                said += _OPEN + before + _CLOSE
            self._is_inside = not self._is_inside
        if not self._is_inside and not (self._has_called and not self._held.strip()):
            certain = len(self._held) - begun(self._held, _OPEN)
            said, self._held = said + self._between(self._held[:certain]), self._held[certain:]
        return said, calls

    def _between(self, text: str) -> str:
        """Calls are written on lines of their own: after one, an empty line is no text."""
        return "" if self._has_called and not text.strip() else text

    def finish(self) -> tuple[str, list[Call]]:
        """See Parser; the last call may lack its end."""
        if self._is_inside:
            call = _call(_loads(self._held))
            return ("", [call]) if call else (_OPEN + self._held, [])
        return self._between(self._held), []


class Mistral:
    """Calls at the end."""

    def __init__(self, names: set[str]) -> None:
        self._held = ""
        self._is_inside = False

    def add(self, text: str) -> tuple[str, list[Call]]:
        """See Parser."""
        self._held += text
        if self._is_inside:
            return "", []
        before, found, after = self._held.partition(_CALLS)
        if found:
            self._is_inside, self._held = True, after
            return before, []
        certain = len(before) - begun(before, _CALLS)
        self._held = before[certain:]
        return before[:certain], []

    def finish(self) -> tuple[str, list[Call]]:
        """See Parser."""
        if not self._is_inside:
            return self._held, []
        found = _loads(self._held)
        if found is None:
            found = [_named(part) for part in self._held.split(_CALLS)]
        calls = [_call(one) for one in (found if isinstance(found, list) else [found])]
        return ("", [call for call in calls if call]) if calls and all(calls) else (_CALLS + self._held, [])


class Llama:
    """A call, or several with `;` between them, in place of a text."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._held: str | None = ""  # None once it is clear that it is a text

    def add(self, text: str) -> tuple[str, list[Call]]:
        """See Parser."""
        if self._held is None:
            return text, []
        self._held += text
        begin = self._held.lstrip()
        if not begin or begin.startswith(("{", _PYTHON)) or _PYTHON.startswith(begin):
            return "", []
        held, self._held = self._held, None
        return held, []

    def finish(self) -> tuple[str, list[Call]]:
        """See Parser."""
        held = self._held or ""
        calls = [_call(found, "parameters") for found in _objects(held.strip().removeprefix(_PYTHON))]
        if calls and all(call and call["name"] in self._names for call in calls):
            return "", [call for call in calls if call]
        return held, []


_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_CALLS = "[TOOL_CALLS]"
_PYTHON = "<|python_tag|>"


def _call(found: Any, arguments: str = "arguments") -> Call | None:
    """A call as it is told; None for what is none."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"]:
        return None
    given = found.get(arguments, found.get("arguments"))
    given = {} if given is None else given  # a tool may take none
    if isinstance(given, str):
        given = _loads(given)
    return {"name": found["name"], "arguments": json.dumps(given, ensure_ascii=False)} if isinstance(given, dict) else None


def _named(text: str) -> dict[str, Any] | None:
    found = re.fullmatch(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(\{.*\})\s*", text, re.DOTALL)
    return {"name": found[1], "arguments": _loads(found[2])} if found else None


def _loads(text: str) -> Any:
    """JSON's value, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _objects(text: str) -> list[Any]:
    """The objects that a text is made of, with `;` between them; none if it is something else, too."""
    found, decoder, at = [], json.JSONDecoder(), 0
    while at < len(text):
        if text[at] in "; \n":
            at += 1
            continue
        try:
            one, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        found.append(one)
    return found
