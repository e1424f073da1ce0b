"""What a request may say in "parameters", for each task: names and values of the library's own pipelines, and no others.

The library drops what it does not know, or hands it to whatever takes anything; here it is the caller's mistake.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from function.agent import BadInput

MOST = 2**31
MOST_GENERATED = 2048  # tokens of a text


@dataclass(frozen=True)
class Parameter:
    """One parameter. wants: what it must be, in words; is_null: whether null is a value, and not as good as nothing."""

    wants: str
    fits: Callable[[Any], bool]
    is_null: bool = False


def whole(low: int, high: int = MOST, *, is_null: bool = False) -> Parameter:
    """A whole number of a range."""
    wants = f"a whole number from {low}" + (f" to {high}" if high < MOST else "") + (", or null for all" if is_null else "")
    return Parameter(wants, lambda value: type(value) is int and low <= value <= high, is_null)


def number(low: float, high: float) -> Parameter:
    """A number of a range."""
    return Parameter(f"a number from {low:g} to {high:g}", lambda value: type(value) in (int, float) and low <= value <= high)


def one_of(*values: str) -> Parameter:
    """One of these words."""
    return Parameter("one of " + ", ".join(map(repr, values)), lambda value: isinstance(value, str) and value in values)


FLAG = Parameter("true or false", lambda value: type(value) is bool)
TEXT = Parameter("a string", lambda value: isinstance(value, str))
TEXTS = Parameter("a list of strings", lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value))
LABELS = Parameter(
    "a list of strings, or one with commas between them",
    lambda value: (isinstance(value, str) and bool(value.strip(", "))) or (TEXTS.fits(value) and all(value) and bool(value)),
)
TARGETS = Parameter("a string or a list of strings", lambda value: bool(value) and (TEXT.fits(value) or TEXTS.fits(value)))
TEMPLATE = Parameter(
    "a string with {} where the label goes, and no other braces", lambda value: isinstance(value, str) and _is_template(value)
)

TRUNCATION = {"truncation": FLAG}
# Of `generate`, those whose cost is bounded.
GENERATION = {
    "max_new_tokens": whole(1, MOST_GENERATED),
    "max_length": whole(1, MOST_GENERATED),
    "min_new_tokens": whole(0, MOST_GENERATED),
    "min_length": whole(0, MOST_GENERATED),
    "num_beams": whole(1, 16),
    "num_return_sequences": whole(1, 16),
    "do_sample": FLAG,
    "early_stopping": FLAG,
    "temperature": number(1e-3, 100),
    "top_k": whole(0),
    "top_p": number(0, 1),
    "repetition_penalty": number(1e-3, 100),
    "length_penalty": number(-100, 100),
    "no_repeat_ngram_size": whole(0, 100),
}


def checked(given: Mapping[str, Any], known: Mapping[str, Parameter], what: str) -> dict[str, Any]:
    """The parameters that were said, as they are. what: the task, for the error. Raises BadInput."""
    found = {}
    for name, value in given.items():
        if name not in known:
            raise BadInput(f"{what} has no parameter {name!r}; it has {', '.join(known) or 'none'}")
        parameter = known[name]
        if value is None and not parameter.is_null:
            continue
        if value is not None and not parameter.fits(value):
            raise BadInput(f"parameter {name!r} must be {parameter.wants}")
        found[name] = value
    return found


def _is_template(text: str) -> bool:
    """Whether only {} is to be filled in: `str.format` can do much more."""
    rest = text.replace("{}", "")
    return "{}" in text and "{" not in rest and "}" not in rest
