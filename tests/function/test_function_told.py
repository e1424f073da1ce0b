"""What an agent declares and its sequences tell, as it comes through the one door."""

from types import SimpleNamespace
from typing import Any

import pytest

from function.told import Piece, declared_abilities, declared_parameters, piece_of
from weights_cache.environment import SettingsError

ALL = {"logprobs": "", "tools": "", "response_format": ""}
ONE = {"token": "a", "logprob": -1, "bytes": [97]}


def test_abilities_are_names_or_reasons_why_not() -> None:
    assert declared_abilities(()) == {}
    assert declared_abilities("tools") == {"tools": ""}
    assert declared_abilities(["logprobs", "tools"]) == {"logprobs": "", "tools": ""}
    assert declared_abilities({"tools": "it is shy", "logprobs": True}) == {"tools": "it is shy", "logprobs": ""}
    assert declared_abilities({"tools": False})["tools"]  # some reason there has to be


@pytest.mark.parametrize("declared", [["juggling"], {"juggling": True}, [1]])
def test_an_ability_that_there_is_none_of_fails_the_start(declared: Any) -> None:
    with pytest.raises(SettingsError, match="abilities must be among logprobs, tools, response_format"):
        declared_abilities(declared)


@pytest.mark.parametrize("declared", [["top_k"], {"top_k": 5}, "top_k", None])
def test_parameters_that_are_no_schemas_fail_the_start(declared: Any) -> None:
    with pytest.raises(SettingsError, match="sampling_parameters must be JSON Schema by name"):
        declared_parameters(declared)


def test_what_a_sequence_tells_is_made_plain_and_goes_with_its_text() -> None:
    told = SimpleNamespace(logprobs=({**ONE, "top_logprobs": [ONE], "more": 1},), tool_calls=[{"name": "f", "arguments": "{}", "id": 7}])
    piece = piece_of(told, "a", ALL)
    assert isinstance(piece, Piece)
    assert (piece, piece.logprobs, piece.tool_calls) == ("a", [{**ONE, "top_logprobs": [ONE]}], [{"name": "f", "arguments": "{}"}])
    assert type(piece_of(SimpleNamespace(logprobs=[], tool_calls=None), "a", ALL)) is str
    assert type(piece_of(told, "a", {"logprobs": "no", "tools": "no"})) is str  # what is not declared is the agent's own
    assert piece_of(told, None, ALL) is None


@pytest.mark.parametrize(
    "told",
    [
        {"logprobs": "abc"},
        {"logprobs": [1]},
        {"logprobs": [{"token": 1, "logprob": 0}]},
        {"logprobs": [{**ONE, "bytes": "a"}]},
        {"logprobs": [{**ONE, "top_logprobs": [{}]}]},
        {"logprobs": [{**ONE, "top_logprobs": 5}]},
        {"tool_calls": {"name": "f"}},
        {"tool_calls": [{"name": "f"}]},
        {"tool_calls": [{"name": "f", "arguments": {}}]},
    ],
)
def test_what_is_told_and_is_not_what_it_should_be_is_a_mistake(told: Any) -> None:
    with pytest.raises(TypeError, match="a sequence"):
        piece_of(SimpleNamespace(**told), "a", ALL)


def test_what_is_told_goes_with_a_text_alone() -> None:
    with pytest.raises(TypeError, match="a piece that is no text, but a dict"):
        piece_of(SimpleNamespace(logprobs=[ONE]), {"text": "a"}, ALL)
