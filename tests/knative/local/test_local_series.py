"""What comes again and again is told once, and then as a number."""

import pytest

from knative.local.outcomes import Outcomes
from knative.local.series import KEPT, ErrorSeries, Repeats


class Clock:
    """Seconds, in each of which so many answers come, and what is told of them."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.outcomes = Outcomes()
        self.series = ErrorSeries(self.outcomes)
        self.told: list[tuple[float, str]] = []

    def second(self, *codes: int, source: str = "pod") -> None:
        for code in codes:
            self.outcomes.add(self.now + 0.5, code, source)  # type: ignore[arg-type]
        self.now += 1
        if text := self.series.look(self.now):
            self.told.append((self.now - 1000, text))


def test_an_error_is_told_at_once_and_that_there_are_none_any_more_a_minute_later() -> None:
    clock = Clock()
    clock.second(200, 200)
    clock.second(500)
    for _ in range(200):
        clock.second(200)
    assert clock.told == [(2, "callers get errors: 1 × 500 from the function"), (62, "callers get no errors any more, 1 in all")]


def test_a_thousand_errors_a_second_are_one_line_a_minute() -> None:
    clock = Clock()
    for _ in range(150):
        clock.second(*[500] * 1000, 200)
    for _ in range(100):
        clock.second(200)
    assert [at for at, _ in clock.told] == [1, 61, 121, 181, 241]
    assert clock.told[0][1] == "callers get errors: 1000 × 500 from the function"
    assert clock.told[1][1] == "callers still get errors: 60000 × 500 from the function; 60000 of the last minute's 60060 answers"
    assert clock.told[-1][1] == "callers get no errors any more, 150000 in all"


def test_a_second_series_counts_for_itself_and_says_who_made_the_errors() -> None:
    clock = Clock()
    clock.second(500)
    for _ in range(100):
        clock.second()
    clock.second(503, 503, source="activator")
    for _ in range(100):
        clock.second()
    assert [text for _, text in clock.told[2:]] == [
        "callers get errors: 2 × 503 (no pod could be started or had room)",
        "callers get no errors any more, 2 in all",
    ]


@pytest.mark.parametrize(
    ("code", "source", "said"),
    [
        (502, "activator", "502 (the pod died with the request)"),
        (504, "activator", "504 (it took too long)"),
        (502, "pod", "502 from the function"),
        (0, "pod", "other from the function"),
        (500, "activator", "500 from the platform"),
    ],
)
def test_an_error_of_the_platform_says_what_it_stands_for(code: int, source: str, said: str) -> None:
    clock = Clock()
    clock.second(code, source=source)
    assert clock.told == [(1, f"callers get errors: 1 × {said}")]


def test_refused_callers_and_those_who_went_away_are_no_series_of_errors() -> None:
    clock = Clock()
    for _ in range(100):
        clock.second(400, 404, 429, 499)
    assert clock.told == []


def test_the_same_ending_is_told_once_a_minute_with_its_number() -> None:
    repeats = Repeats()
    ended = "function ended with status 3: 12:00:%02d no model at 0x7f%010x"
    told = [text for second in range(0, 200, 10) if (text := repeats.add(float(second), "hello-00001", ended % (second % 60, second)))]
    assert len(told) == 4
    assert told[0] == ended % (0, 0)
    assert told[1] == f"{ended % (0, 60)} (6 times within 60 s)"


@pytest.mark.parametrize(
    ("subject", "text"), [("hello-00002", "ended with status 3: no model"), ("hello-00001", "was ended by SIGKILL: no model")]
)
def test_another_ending_or_another_revision_is_news(subject: str, text: str) -> None:
    repeats = Repeats()
    assert repeats.add(1.0, "hello-00001", "ended with status 3: no model")
    assert repeats.add(2.0, subject, text) == text
    assert repeats.add(3.0, "hello-00001", "ended with status 3: no model") is None


def test_what_is_forgotten_is_news_again_and_nothing_else_is() -> None:
    repeats = Repeats()
    for subject in ("hello", "other"):
        assert repeats.add(1.0, subject, "no model")
    repeats.forget("hello")
    assert repeats.add(2.0, "hello", "no model") == "no model"
    assert repeats.add(2.0, "other", "no model") is None


def test_the_number_stands_in_the_first_line() -> None:
    repeats = Repeats()
    for second in (0.0, 1.0):
        repeats.add(second, "hello", "not ready\nits log")
    assert repeats.add(60.0, "hello", "not ready\nits log") == "not ready (2 times within 60 s)\nits log"


def test_what_is_remembered_is_bounded() -> None:
    repeats = Repeats()
    words = ["".join(chr(ord("g") + int(digit)) for digit in f"{number:05d}") for number in range(KEPT * 4)]
    for word in words:
        assert repeats.add(1.0, "hello", word) == word
    assert len(repeats._told) == KEPT
