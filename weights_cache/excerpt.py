"""What errors quote of files: enough to recognise it by, however long it is, and on one line."""

import reprlib
from collections.abc import Iterable

MAX_SIGNS = 100  # of one thing
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


def _cut(text: str) -> str:
    if len(text) <= MAX_SIGNS:
        return text
    return f"{text[: MAX_SIGNS // 2]}…{text[1 - MAX_SIGNS // 2 :]}"
