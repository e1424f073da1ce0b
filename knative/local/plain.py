"""Foreign text for a person's eyes: what a pod, a caller or a manifest has written cannot move the cursor or look like a line of ours.

Control characters are escaped as in Python; those that reorder or hide what is beside them as well.
"""

import re
from collections.abc import Iterable

MOST = 2000  # characters of one line
LINES = 40  # of one text
BAR = "  │ "  # before each line of a text that has several

_SPECIAL = "".join(
    (
        "\0-\x1f\x7f-\x9f",  # C0 and C1, with ESC, CR and line ends of all kinds
        "\xad\u061c\u180e\u200b\u200e\u200f",  # marks of direction, and what is not seen
        "\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb",  # more line ends; embeddings, overrides and isolates
        "\ud800-\udfff",  # bytes that are no text
        "\U000e0000-\U000e007f",  # tags: a text that only machines read
    )
)
_CONTROL = re.compile(f"[{_SPECIAL}]")
_COLOUR = re.compile(r"\x1b\[([0-9;]{0,40})m")
_RESET = "\x1b[0m"
_CONCEAL = re.compile(r"(^|;)0*8(;|$)")


def line(text: object, most: int = MOST) -> str:
    """One line, cut in the middle if it is longer than `most`."""
    said = str(text)
    if len(said) > most:  # first, so that a long one costs no more than what is shown of it
        said = f"{said[: most - most // 3]}…{said[len(said) - most // 3 + 1 :]}"
    return _CONTROL.sub(_escape, said)


def lines(text: str, most: int = LINES) -> list[str]:
    """Its lines, those in the middle left out if there are more than `most`."""
    found = text.rstrip("\n").split("\n")
    if len(found) > most:
        kept = most // 2
        found = [*found[:kept], f"… {len(found) - 2 * kept} lines are left out", *found[-kept:]]
    return [line(one.removesuffix("\r")) for one in found]


def block(text: str, most: int = LINES) -> str:
    """The first line as it is; those that follow are set off, so that none can be taken for one of ours."""
    first, *rest = lines(text, most)
    return "\n".join([first, *indented(rest)])


def record(text: str) -> str:
    """What a library logs, tracebacks included: of its own lines, too, none can be taken for one of ours."""
    return block(text) + "\n" * text.endswith("\n")


def indented(texts: Iterable[str]) -> list[str]:
    """Lines that are set off from ours."""
    return [f"{BAR}{line(text)}" for text in texts]


def log_line(text: str) -> str:
    """A line of a log for a terminal: colours are let through, as libraries use them, and end with the line; all else is escaped."""
    said, at, coloured = [], 0, False
    for colour in _COLOUR.finditer(text):
        if _CONCEAL.search(colour[1]) and not colour[1].startswith(("38", "48")):
            continue  # it would hide what comes after it
        said += [_CONTROL.sub(_escape_but_tabs, text[at : colour.start()]), colour[0]]
        at, coloured = colour.end(), True
    said.append(_CONTROL.sub(_escape_but_tabs, text[at:]))
    return "".join(said) + (_RESET if coloured else "")


def body(text: str) -> str:
    """A text of several lines, as an answer's body is, for a terminal: its line ends and tabs are let through."""
    return "\n".join(_CONTROL.sub(_escape_but_tabs, one) for one in text.replace("\r\n", "\n").split("\n"))


def _escape(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1] if not found[0].isprintable() else f"\\u{ord(found[0]):04x}"


def _escape_but_tabs(found: re.Match[str]) -> str:
    return found[0] if found[0] == "\t" else _escape(found)
