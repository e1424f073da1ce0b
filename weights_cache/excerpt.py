"""What errors quote of files: enough to recognise it by, however long it is, and on one line."""

import reprlib
from collections.abc import Iterable

from weights_cache.environment import masked

MAX_SIGNS = 100  # of one thing
MAX_TOLD_SIGNS = 2000  # of an error
_MAX_LIST_SIGNS = 400

_repr = reprlib.Repr()  # which looks at no more than it shows
_repr.maxstring = _repr.maxother = MAX_SIGNS
_repr.maxlong = 40
_repr.maxlevel = 3


def quoted(value: object) -> str:
    """What `repr` says, cut in the middle."""
    text = repr(value) if type(value) is str and len(value) < MAX_SIGNS else _repr.repr(value)
    return _cut(text)


def plain(name: str) -> str:
    """A name as it is, cut in the middle; one that would not stay on its line is quoted."""
    return _cut(name) if name.isprintable() else quoted(name)


def listed(names: Iterable[str], *, most: int = 20) -> str:
    """The first of these names, and how many more there are."""
    names = list(names)
    said, length = [], 0
    for name in names[:most]:
        said.append(plain(name))
        length += len(said[-1])
        if length > _MAX_LIST_SIGNS:
            break
    more = f" and {len(names) - len(said)} more" if len(names) > len(said) else ""
    return ", ".join(said) + more or "none"


def told(text: str, most: int = MAX_TOLD_SIGNS) -> str:
    """A message for people: on one line, without secrets, and cut in the middle; what would not stay on the line is escaped."""
    if len(text) > 8 * most:  # what is cut out is not looked at, but for what a secret may begin or end with
        text = _cut(text, 8 * most)
    text = masked(text)
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else " " if letter in "\r\n\t" else repr(letter)[1:-1] for letter in text)
    return _cut(text, most)


def described(error: BaseException) -> str:
    """An error in such a message; one that is not of this package is named by its type."""
    from weights_cache.errors import WeightsError

    text = str(error)
    return text if isinstance(error, WeightsError) else told(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _cut(text: str, most: int = MAX_SIGNS) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[1 - most // 2 :]}"
