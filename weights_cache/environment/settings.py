"""Settings from environment variables: typed, checked, and strict about misspelt names.

A settings class is a frozen dataclass whose fields are made with `setting`; `read` fills it from an environment once per program.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from weights_cache.environment.masking import masked, told

T = TypeVar("T")

# What Kubernetes injects into each container for the Services of its namespace: a Service named `function` must not look like a typo.
_SERVICE_LINK = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_.+)?$|_PORT$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")


# What is no secret, under whatever name: of a name that is not known nobody can say what it holds.
_HARMLESS = re.compile(r"[-+]?[0-9]{1,12}(\.[0-9]{1,6})?|true|false|yes|no|on|off", re.IGNORECASE)


class SettingsError(Exception):
    """A setting is misspelt, malformed or out of bounds; the text is for the person who has to act, and holds no credentials."""

    def __init__(self, text: str) -> None:
        super().__init__(masked(text))


def setting(
    env: str,
    default: Any = dataclasses.MISSING,
    *,
    text: str,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A dataclass field read from the variable `env`; `text` is its line in the README's table."""
    return dataclasses.field(
        default=default, metadata={"env": env, "text": text, "minimum": minimum, "maximum": maximum, "choices": tuple(choices)}
    )


def read(cls: type[T], environ: Mapping[str, str], *, prefix: str) -> T:
    """An instance of the settings class `cls`, filled from `environ`.

    Raises SettingsError for a value out of bounds or a missing one, and for any variable with `prefix` that is no setting of `cls`.
    """
    fields = [field for field in dataclasses.fields(cls) if "env" in field.metadata]  # type: ignore[arg-type]
    known = {field.metadata["env"] for field in fields}
    for name in sorted(environ):
        if name.startswith(prefix) and name not in known and not _SERVICE_LINK.search(name):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            value = f"={environ[name]!r}" if _HARMLESS.fullmatch(environ[name]) else ""
            raise SettingsError(f"{name}{value}: there is no such setting; {hint}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in fields:
        name = field.metadata["env"]
        raw = environ.get(name, "")
        if raw:
            values[field.name] = _parse(name, raw, hints[field.name], field.metadata)
        elif field.default is dataclasses.MISSING:
            raise SettingsError(f"{name} is not set: {field.metadata['text']}")
    return cls(**values)


def _parse(name: str, raw: str, hint: Any, bounds: Mapping[str, Any]) -> Any:
    if isinstance(hint, types.UnionType):  # `X | None`: an absent variable is None, a present one is an X
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if hint is bool:
        words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
        if raw.lower() not in words:
            raise SettingsError(f"{name}={told(raw)}: must be true or false")
        return words[raw.lower()]
    if hint in (int, float):
        try:
            value = hint(raw)
        except ValueError:
            raise SettingsError(f"{name}={told(raw)}: must be {'a whole number' if hint is int else 'a number'}") from None
        low, high = bounds["minimum"], bounds["maximum"]
        if not (low is None or value >= low) or not (high is None or value <= high):  # also catches nan
            allowed = " and ".join(text for text in (low is not None and f"at least {low}", high is not None and f"at most {high}") if text)
            raise SettingsError(f"{name}={told(raw)}: must be {allowed}")
        return value
    if bounds["choices"] and raw not in bounds["choices"]:
        raise SettingsError(f"{name}={told(raw)}: must be one of {', '.join(bounds['choices'])}")
    return Path(raw) if hint is Path else raw
