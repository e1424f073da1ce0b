"""Foreign text cannot move the cursor, reorder a line, or look like a line of ours."""

import re
import unicodedata

import pytest

from knative.local.errors import ManifestError
from knative.local.plain import BAR, LINES, block, body, indented, line, lines, log_line

FORGED = "x\n12:00:00 hello ready after 0.10 s"
ESC = "\x1b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (FORGED, r"x\n12:00:00 hello ready after 0.10 s"),
        ("a\rb", r"a\rb"),
        (f"{ESC}[2J{ESC}]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),  # the same in one byte
        ("a\u2028b\u2029c\x85d\x0be", r"a\u2028b\u2029c\x85d\x0be"),
        ("user\u202egnp.exe", r"user\u202egnp.exe"),
        ("a\u2066b\u200fc\u061cd\u200be\xadf", r"a\u2066b\u200fc\u061cd\u200be\xadf"),
        ("\ud83d", r"\ud83d"),
        ("a\tb", r"a\tb"),
        ("grüße 你好 👩‍💻 1\xa0000 [bold]", "grüße 你好 👩‍💻 1\xa0000 [bold]"),
        ("\\n stays", "\\n stays"),
    ],
)
def test_a_line_is_one_line_of_what_is_seen(text: str, shown: str) -> None:
    assert line(text) == shown


def test_nothing_that_controls_a_terminal_or_the_order_of_a_line_gets_through() -> None:
    every = "".join(map(chr, range(0x110000)))
    for shown in (line(every, len(every)), body(every).replace("\n", "").replace("\t", ""), log_line(every).replace("\t", "")):
        assert {unicodedata.category(sign) for sign in shown} & {"Cc", "Zl", "Zp", "Cs"} == set()
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c]", shown)


def test_the_lines_after_the_first_are_set_off() -> None:
    assert block(f"{FORGED}\r\nlast") == f"x\n{BAR}12:00:00 hello ready after 0.10 s\n{BAR}last"
    assert indented(["a\nb"]) == [f"{BAR}a\\nb"]


def test_a_text_is_bounded_in_lines_and_in_their_length_and_costs_no_more_than_is_shown() -> None:
    assert len(line("x" * 10_000_000)) == 2000
    assert line("a" * 100 + "z" * 100, 21) == "a" * 14 + "…" + "z" * 6
    found = lines("\n".join(map(str, range(1000))))
    assert (len(found), found[0], found[-1]) == (LINES + 1, "0", "999")
    assert found[LINES // 2] == "… 960 lines are left out"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"{ESC}[1;32mINFO{ESC}[0m up", f"{ESC}[1;32mINFO{ESC}[0m up{ESC}[0m"),
        (f"{ESC}[31mred to the end", f"{ESC}[31mred to the end{ESC}[0m"),
        (f"{ESC}[38;5;8mgrey", f"{ESC}[38;5;8mgrey{ESC}[0m"),
        (f"{ESC}[8mhidden", r"\x1b[8mhidden"),
        (f"{ESC}[1;08mhidden", r"\x1b[1;08mhidden"),
        (f"{ESC}[2K{ESC}[1Agone", r"\x1b[2K\x1b[1Agone"),
        (f"{ESC}]52;c;cm0gLXJm{ESC}\\", "\\x1b]52;c;cm0gLXJm\\x1b\\"),  # writes the clipboard
        (f"{ESC}]8;;http://evil{ESC}\\here", "\\x1b]8;;http://evil\\x1b\\here"),
        ("a\tb", "a\tb"),
        ("10%\r20%", r"10%\r20%"),
        ("plain", "plain"),
    ],
)
def test_a_line_of_a_log_keeps_its_colours_and_nothing_else(text: str, shown: str) -> None:
    assert log_line(text) == shown


def test_a_body_keeps_its_lines() -> None:
    assert body(f'{{\n\t"a": "{ESC}[31m\rb"\r\n}}') == '{\n\t"a": "\\x1b[31m\\rb"\n}'


def test_an_error_about_a_manifest_stays_one_line() -> None:
    assert "\n" not in str(ManifestError("a.yaml", "spec", f"found {FORGED}\u202e"))
