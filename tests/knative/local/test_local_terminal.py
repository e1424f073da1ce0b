"""What a person reads on the terminal while pods come and go."""

import io
import re

import pytest
from rich.console import Console

from knative.local.pod import Report, Weights
from knative.local.revision import Revision
from knative.local.terminal import Terminal
from tests.knative.local.fakes import Events, FakePod, parsed


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def terminal(screen: io.StringIO) -> Terminal:
    return Terminal(Console(file=screen, highlight=False, emoji=False, width=60))


@pytest.fixture
def revision() -> Revision:
    return Revision(parsed(), FakePod, Events())


@pytest.fixture
def pod(revision: Revision) -> FakePod:
    pod = FakePod(revision, "hello-00001-abc123")
    pod.phase = "starting"
    return pod


def told(screen: io.StringIO) -> list[str]:
    """The lines, each without its time of day."""
    return [line.partition(" ")[2] for line in screen.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("waiting", "why"),
    [(0, "wanted before anybody calls"), (1, "1 request waiting"), (20, "20 requests waiting")],
    ids=["none", "one", "many"],
)
def test_a_pod_that_starts_is_told_with_the_reason(
    terminal: Terminal, screen: io.StringIO, revision: Revision, pod: FakePod, waiting: int, why: str
) -> None:
    terminal.starting(revision, pod, waiting)
    assert told(screen) == [f"hello starting hello-00001-abc123: {why}"]


def test_a_process_that_ended_by_itself_is_told_at_once(terminal: Terminal, screen: io.StringIO, revision: Revision, pod: FakePod) -> None:
    terminal.crashed(revision, pod, "function ended with status 3: [boot] failed")
    assert " ".join(told(screen)) == "hello hello-00001-abc123: function ended with status 3: [boot] failed"


def test_without_a_screen_each_phase_of_a_cold_start_is_one_line(
    terminal: Terminal, screen: io.StringIO, revision: Revision, pod: FakePod
) -> None:
    for report in (
        Report(phase="importing"),
        Report(phase="importing"),
        Report(phase="restoring", restored_bytes=10_000_000, total_bytes=90_000_000),
        Report(phase="restoring", restored_bytes=80_000_000, total_bytes=90_000_000),
        Report(phase="warming"),
    ):
        pod.report = report
        terminal.progress(revision, pod)
    assert told(screen) == [
        "hello hello-00001-abc123 importing",
        "hello hello-00001-abc123 restoring, 10.0 of 90.0 MB of weights",
        "hello hello-00001-abc123 warming",
    ]


def test_a_pod_that_is_ready_is_told_with_its_stages_in_order_and_the_source_of_its_weights(
    terminal: Terminal, screen: io.StringIO, revision: Revision, pod: FakePod
) -> None:
    pod.stages = {"spawn": 0.01, "ready": 2.0, "warm_up": 1.9, "import": 1.1}
    pod.report = Report(phase="ready", weights=Weights(source="cache", bytes=90_868_376))
    terminal.ready(revision, pod)
    assert told(screen) == [
        "hello ready after 2.00 s (spawn 0.01 · import 1.10 · warm-up 1.90 · ready 2.00; 90.9 MB of weights from the cache)"
    ]


def test_the_way_back_to_zero_is_told(terminal: Terminal, screen: io.StringIO, revision: Revision) -> None:
    terminal.at_zero(revision, 7.26)
    assert told(screen) == ["hello scaled to zero, 7.3 s after the last request"]


def test_what_others_say_is_shown_sign_for_sign(terminal: Terminal, screen: io.StringIO, revision: Revision, pod: FakePod) -> None:
    odd = "[/] [bold]app.py:100:[/bold]"
    terminal.failed(revision, odd)
    pod.report = Report(phase=odd, weights=Weights(source=odd, bytes=1))
    terminal.progress(revision, pod)
    pod.stages = {"ready": 1.0, odd: 0.5}
    terminal.ready(revision, pod)
    assert [line.count(odd) for line in told(screen)] == [1, 1, 2]


def test_on_a_screen_a_cold_start_is_one_live_line_that_goes_when_the_pod_is_ready(revision: Revision, pod: FakePod) -> None:
    screen = io.StringIO()
    terminal = Terminal(Console(file=screen, highlight=False, emoji=False, force_terminal=True, width=120))
    pod.report = Report(phase="[/] restoring", restored_bytes=10_000_000, total_bytes=90_000_000)
    terminal.progress(revision, pod)
    assert "[/] restoring" in screen.getvalue()
    assert "10.0/90.0 MB" in screen.getvalue()
    pod.phase = "ready"
    terminal.progress(revision, pod)
    after_clearing = screen.getvalue().rpartition("\x1b[2K")[2]
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", after_clearing).strip() == ""
    assert "\x1b[?25h" in after_clearing  # the cursor is back
