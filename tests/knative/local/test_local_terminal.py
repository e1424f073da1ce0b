"""What a person reads on the terminal while pods come and go."""

import io
import random
import re

import pytest
from rich.console import Console

from knative.local.plain import BAR
from knative.local.pod import Report, Weights
from knative.local.revision import Revision
from knative.local.terminal import Terminal
from knative.local.trouble import Trouble
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
        "hello hello-00001-abc123 restoring, 10.0 MB of 90.0 MB of weights",
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


def test_small_weights_are_no_part_of_a_megabyte(terminal: Terminal, screen: io.StringIO, revision: Revision, pod: FakePod) -> None:
    pod.report = Report(phase="restoring", restored_bytes=0, total_bytes=431)
    terminal.progress(revision, pod)
    pod.stages = {"ready": 1.0}
    pod.report = Report(phase="ready", weights=Weights(source="store", bytes=431))
    terminal.ready(revision, pod)
    assert told(screen) == [
        "hello hello-00001-abc123 restoring, 0 B of 431 B of weights",
        "hello ready after 1.00 s (ready 1.00; 431 B of weights from the store)",
    ]


def test_a_pod_that_was_ready_before_is_ready_again_and_its_first_start_is_not_told_anew(
    terminal: Terminal, screen: io.StringIO, revision: Revision, pod: FakePod
) -> None:
    pod.stages = {"spawn": 0.01, "ready": 2.0}
    terminal.ready(revision, pod)
    terminal.crashed(revision, pod, "function ended with status 1")
    terminal.ready(revision, pod)
    other = FakePod(revision, "hello-00001-def456")
    other.stages = {"ready": 3.0}
    terminal.ready(revision, other)
    assert told(screen) == [
        "hello ready after 2.00 s (spawn 0.01 · ready 2.00)",
        "hello hello-00001-abc123: function ended with status 1",
        "hello ready again: hello-00001-abc123",
        "hello ready after 3.00 s (ready 3.00)",
    ]


def test_whoever_reads_that_a_pod_has_ended_reads_that_it_is_back_and_a_loop_stays_a_few_lines(
    terminal: Terminal, screen: io.StringIO, revision: Revision, pod: FakePod
) -> None:
    pod.stages = {"ready": 2.0}
    terminal.ready(revision, pod)
    for ended in ("ended with status 1", "ended with status 1", "was killed", "was killed", "was killed"):
        terminal.crashed(revision, pod, ended)
        terminal.ready(revision, pod)
    assert [line.partition(": ")[2] for line in told(screen)[1:]] == ["ended with status 1", pod.name, "was killed", pod.name]


def test_a_function_that_served_and_broke_again_has_failed_anew(
    terminal: Terminal, screen: io.StringIO, revision: Revision, pod: FakePod
) -> None:
    pod.stages = {"ready": 2.0}
    broken = Trouble("hello-00001-abc123: its container function ended with status 1, twice as it started")
    for _ in range(3):
        terminal.failed(revision, broken)
        terminal.failed(revision, broken)  # and that again is the same news
        terminal.ready(revision, pod)
    assert sum("failed: " in line for line in told(screen)) == 3


def test_once_the_platform_serves_its_own_lines_have_the_time(terminal: Terminal, screen: io.StringIO, revision: Revision) -> None:
    terminal.say("object store at http://127.0.0.1:1")
    terminal.serving([revision.service], ["http://hello/"], [], revision.service, 1, 2)
    terminal.say("[dim]manifests read again[/]")
    terminal.note("[stopped]\nnow")
    first, *_, again, stopped, rest = screen.getvalue().splitlines()
    assert """-d '{"instances": [INPUT]}'""" in screen.getvalue()  # nobody has said what it takes
    assert first == "object store at http://127.0.0.1:1"
    assert re.fullmatch(r"\d\d:\d\d:\d\d manifests read again", again)
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[stopped\]", stopped)
    assert rest == f"{BAR}now"


def test_the_way_back_to_zero_is_told(terminal: Terminal, screen: io.StringIO, revision: Revision) -> None:
    terminal.at_zero(revision, 7.26)
    assert told(screen) == ["hello scaled to zero, 7.3 s after the last request"]


def test_what_others_say_is_shown_sign_for_sign(terminal: Terminal, screen: io.StringIO, revision: Revision, pod: FakePod) -> None:
    odd = "[/] [bold]app.py:100:[/bold]"
    terminal.failed(revision, Trouble(odd))
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


EVIL = "\x1b[2Jx\r\n\n12:00:00 hello ready\u2028\u202egnp [bold]b[/] [/] [link=http://evil]l[/link] \\"


def test_what_others_have_written_moves_nothing_and_makes_no_line_of_its_own(revision: Revision, pod: FakePod) -> None:
    screen = io.StringIO()
    terminal = Terminal(Console(file=screen, force_terminal=True, highlight=False, emoji=False, width=60))
    pod.name = EVIL
    terminal.starting(revision, pod, 1)
    pod.report = Report(phase=EVIL, weights=Weights(source=EVIL, bytes=1))
    terminal.progress(revision, pod)
    pod.stages = {"ready": 1.0} | {f"{EVIL}{number}": 0.5 for number in range(1000)}
    terminal.ready(revision, pod)
    terminal.crashed(revision, pod, EVIL)
    terminal.hung(revision, pod, EVIL)
    terminal.failed(revision, Trouble(EVIL, EVIL, (EVIL, "[/]")))
    terminal.gave_up(revision, pod)
    terminal.about(EVIL, EVIL)
    terminal.note(EVIL)
    terminal.say(EVIL)  # not escaped by whoever calls
    source = {"name": EVIL, "queue": EVIL, "sink": EVIL}
    revision.service.metadata.annotations["relight/example"] = EVIL
    terminal.serving([revision.service], [EVIL], [source], revision.service, 1, 2)
    terminal.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[mlhAK]", "", screen.getvalue()).replace("\r", "")  # rich's own: colours, and the live line's
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", shown)
    assert "\x1b[2J" not in screen.getvalue()
    assert "\x1b]8;" not in screen.getvalue()
    assert not [line for line in shown.splitlines() if line.lstrip().startswith("12:00:00")]
    assert shown.count("[link=http://evil]l[/link]") >= 13
    assert len(shown) < 40_000


def test_a_crash_loop_is_told_once_a_minute_whatever_its_pods_are_called(
    terminal: Terminal, screen: io.StringIO, revision: Revision, pod: FakePod, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("knative.local.terminal.time.monotonic", lambda: now)
    for _ in range(100):
        pod.name = f"hello-00001-{random.getrandbits(24):06x}"
        terminal.crashed(revision, pod, f"function ended with status 3: 12:00:{now % 60:02.0f} no model at 0x{random.getrandbits(40):x}")
        now += 3
    lines = [line for line in screen.getvalue().splitlines() if "ended" in line]
    assert len(lines) == 5  # in five minutes
    assert "(20 times within 60 s)" in screen.getvalue()


def test_a_new_revision_that_ends_like_the_one_before_is_told_at_once(
    terminal: Terminal, screen: io.StringIO, revision: Revision, pod: FakePod
) -> None:
    terminal.crashed(revision, pod, "function ended with status 3")
    revision.name = "hello-00002"
    terminal.crashed(revision, pod, "function ended with status 3")
    assert screen.getvalue().count("status 3") == 2


def test_the_log_of_a_failed_start_is_set_off_from_our_own_lines(terminal: Terminal, screen: io.StringIO, revision: Revision) -> None:
    terminal.failed(revision, Trouble("hello-1 did not start", "weights-cache", ("no objects below s3://models/x", "12:00:00 hello ready")))
    first, *rest = screen.getvalue().splitlines()
    assert "hello failed: hello-1 did not start" in first
    assert all(line.startswith(BAR) for line in rest)
    assert [line.removeprefix(BAR).strip() for line in rest[-2:]] == ["no objects below s3://models/x", "12:00:00 hello ready"]


@pytest.mark.parametrize(
    ("example", "shown"),
    [
        ('{"instances": ["it\'s"]}', """-d '{"instances": ["it'"'"'s"]}'"""),
        ('{\n  "instances": ["é"]\n}\n', """-d '{"instances": ["é"]}'"""),
        ("no\nJSON", r"-d 'no\nJSON'"),
    ],
)
def test_the_example_is_a_command_to_copy(terminal: Terminal, screen: io.StringIO, revision: Revision, example: str, shown: str) -> None:
    revision.service.metadata.annotations["relight/example"] = example
    terminal.serving([revision.service], ["http://hello/"], [], revision.service, 1, 2)
    assert [line.partition("-d ")[1] + line.partition("-d ")[2] for line in screen.getvalue().splitlines() if "curl" in line] == [shown]


def test_what_a_reason_says_is_not_said_again_by_the_log(terminal: Terminal, screen: io.StringIO, revision: Revision) -> None:
    why = "FUNCTION_AGENT='a:B': module 'a' has no 'B'"
    log = (f"2026-01-31 09:12:59,1 ERROR relight.function: {why}", f"function: {why}", "loading: tokenizer")
    terminal.failed(revision, Trouble(f"its container function ended with status 2: {why}", "function", log))
    first, _, *lines = told(screen)
    assert first == f"hello failed: its container function ended with status 2: {why}"
    assert [line.strip("│ ") for line in lines] == ["loading: tokenizer"]
