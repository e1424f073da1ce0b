"""What an agent that generates text declares beyond the contract's methods, and what its sequences tell of a piece beside its text.

All of it comes through the one door (see `guarded_agent`), where it becomes plain and is checked: what is not what it should be is a
mistake in the agent, at the start or in the one answer that it concerns.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from function.values import plain
from weights_cache.environment import SettingsError

Schema = dict[str, Any]

# Of agents that generate text, and of those that embed it: "dimensions" is a parameter, and `size` tells tokens as they were counted.
ABILITIES = ("logprobs", "tools", "response_format", "dimensions", "tokens")


class Piece(str):
    """A piece of text with what its sequence tells of it; a text like any other for whoever does not ask."""

    __slots__ = ("logprobs", "tool_calls")

    logprobs: list[dict[str, Any]]  # of its tokens: "token", "logprob", "bytes", and as "top_logprobs" the same of the likeliest
    tool_calls: list[dict[str, str]]  # that became whole with it: "name", and "arguments" in JSON


def piece_of(sequence: Any, text: Any, abilities: Mapping[str, str]) -> Any:
    """A piece, with what its sequence tells if its agent is able to.

    abilities: as `declared_abilities` gives them. Raises TypeError for what is told and is not what it should be, and whatever foreign code
    raises.
    """
    logprobs = getattr(sequence, "logprobs", None) if has(abilities, "logprobs") else None
    calls = getattr(sequence, "tool_calls", None) if has(abilities, "tools") else None
    if text is None or not (logprobs or calls):
        return text
    if not isinstance(text, str):
        raise TypeError(f"a sequence that tells logprobs or tool_calls gave a piece that is no text, but a {type(text).__name__}")
    piece = Piece(text)
    piece.logprobs = [_logprob(one) for one in _list("logprobs", logprobs)]
    piece.tool_calls = [_call(one) for one in _list("tool_calls", calls)]
    return piece


def has(abilities: Mapping[str, str], name: str) -> bool:
    """Whether this is among what an agent is able to."""
    return abilities.get(name) == ""


def declared_abilities(declared: Any) -> dict[str, str]:
    """By ability the reason why the agent lacks it, which is empty if it does not.

    declared: names of ABILITIES; or by name True, or the reason why not. Raises SettingsError.
    """
    found = declared if isinstance(declared, Mapping) else dict.fromkeys((declared,) if isinstance(declared, str) else declared, True)
    if strange := [name for name in found if name not in ABILITIES]:
        raise SettingsError(f"the agent's abilities must be among {', '.join(ABILITIES)}, and {strange[0]!r:.60} is none of them")
    return {name: "" if value is True else str(value or "") or "this model's agent is not able to" for name, value in found.items()}


def declared_parameters(declared: Any) -> dict[str, Schema]:
    """JSON Schema by name of what callers may say besides OpenAI's own parameters. Raises SettingsError."""
    found = plain(declared) if isinstance(declared, Mapping) else None
    if found is None or not all(isinstance(schema, dict) for schema in found.values()):
        raise SettingsError(
            'the agent\'s sampling_parameters must be JSON Schema by name, such as {"top_k": {"type": "integer", "minimum": 1}}'
        )
    return dict(found)


def _list(name: str, told: Any) -> Sequence[Any]:
    found = plain(told or [])
    if not isinstance(found, list):
        raise TypeError(f"a sequence's {name} are a {type(told).__name__}, not a list")
    return found


def _logprob(told: Any, *, is_top: bool = False) -> dict[str, Any]:
    data = told.get("bytes") if isinstance(told, dict) else None
    top = told.get("top_logprobs") or [] if isinstance(told, dict) else None
    is_one = isinstance(told, dict) and isinstance(told.get("token"), str) and isinstance(told.get("logprob"), int | float)
    if not is_one or not isinstance(top, list) or not (data is None or isinstance(data, list)):
        raise TypeError('one of a sequence\'s logprobs is not like {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": […]}')
    found = {"token": told["token"], "logprob": told["logprob"], "bytes": data}
    return found if is_top else found | {"top_logprobs": [_logprob(one, is_top=True) for one in top]}


def _call(told: Any) -> dict[str, str]:
    if not isinstance(told, dict) or not all(isinstance(told.get(name), str) for name in ("name", "arguments")):
        raise TypeError('one of a sequence\'s tool_calls is not like {"name": "weather", "arguments": "{}"}')
    return {"name": told["name"], "arguments": told["arguments"]}
