"""The status document as tables: what has gone wrong is seen in words, and nobody else's text looks like one of ours."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from knative.local import tables

ESC = "\x1b"
EVIL = f"{ESC}[2J{ESC}[1;31mx\r\n\n12:00:00 hello ready\u2028\u202egnp [bold]b[/] [/] [link=http://evil]l[/link] \\"


def pod(**fields: Any) -> dict[str, Any]:
    return {"name": "hello-1-ab", "phase": "starting", "concurrency": 0, "started_at": 1.0, "restarts": {"function": 4}} | fields


def hello(**fields: Any) -> dict[str, Any]:
    return {
        "name": "hello",
        "namespace": "default",
        "state": "ready",
        "desired": 1,
        "concurrency": 0,
        "queued": 0,
        "requests_total": 40,
        "latency": {"p50": None, "p95": None, "p99": None},
        "cold_starts": [],
        "url": "http://hello/",
        "failure": None,
        "pods": [],
        "revisions": [],
    } | fields


def errors(count: int, answers: int, total: int = 9) -> dict[str, Any]:
    codes = [{"code": "500", "source": "pod", "count": count}] if count else []
    lately = {"answers": answers, "errors": count, "rate": count / answers if answers else None, "codes": codes}
    last = {"code": "500", "source": "pod", "time": 97.0, "revision": "hello-1"}
    return {
        "total": total,
        "codes": codes,
        "last": last,
        "last_minute": lately,
        "failing": count > 0.05 * answers,
        "revisions": {"hello-1": total},
    }


def document(*services: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"now": 100.0, "services": list(services), "manifests": {"problem": None}, "queue_sources": [], "queues": []} | fields


def on_a_screen(status: dict[str, Any]) -> str:
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, width=400, highlight=False, emoji=False).print(tables.rich(status))
    return screen.getvalue()


def cell(status: dict[str, Any], column: str) -> str:
    (row,) = tables.service_rows(status)
    return row[tables.SERVICE_HEAD.index(column)]


@pytest.mark.parametrize(
    ("count", "answers", "state", "rate"),
    [(0, 40, "ready", "0 %"), (1, 40, "ready", "2.5 %"), (3, 3, "failing", "100 %"), (0, 0, "ready", "-"), (5, 40, "failing", "12 %")],
)
def test_a_service_whose_callers_get_errors_is_not_well(count: int, answers: int, state: str, rate: str) -> None:
    status = document(hello(errors=errors(count, answers)))
    assert (cell(status, "STATE"), cell(status, "ERRORS"), cell(status, "ERROR RATE")) == (state, "9", rate)
    told = f"hello: {count} of the last minute's {answers} answers are errors: {count} × 500 from the function; the last was 3 s ago"
    assert (told in tables.plain(status)) == (told in on_a_screen(status)) == bool(count)


def test_an_error_of_the_platform_is_said_to_be_what_it_was() -> None:
    found = errors(8, 40)
    found["last_minute"]["codes"] = [{"code": "502", "source": "activator", "count": 8}]
    assert "answers are errors: 8 × 502 (the pod died with the request); the last" in tables.plain(document(hello(errors=found)))


def row_of(head: tuple[str, ...], lines: list[str]) -> dict[str, str]:
    """The row below this head, by column."""
    at = next(number for number, line in enumerate(lines) if line.startswith(head[0]))
    begins = [lines[at].index(name) for name in head]
    ends = [*begins[1:], None]
    return {name: lines[at + 1][begin:end].strip() for name, begin, end in zip(head, begins, ends, strict=True)}


@pytest.mark.parametrize(
    ("exits", "shown"),
    [
        ({}, "5"),
        ({"function": "ended with status 1"}, "5 (function: ended with status 1)"),
        ({"function": "x" * 500}, f"5 (function: {'x' * 59}…)"),
        ({f"c{number}": "was OOMKilled" for number in range(9)}, "5 (c0: was OOMKilled, c1: was OOMKilled, c2: was OOMKilled, 6 more)"),
    ],
    ids=["none", "one", "long", "many"],
)
def test_how_containers_ended_last_stands_beside_the_restarts(exits: dict[str, str], shown: str) -> None:
    found = pod(phase="ready", restarts={"function": 4, "weights-cache": 1}, exits=exits)
    assert row_of(tables.POD_HEAD, tables.plain(document(hello(pods=[found]))).splitlines())["RESTARTS"] == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "-"), (431, "431 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (16 * 10**9, "16.0 GB")],
)
def test_weights_have_a_fitting_unit_and_none_that_have_not_come_a_size(count: int, shown: str) -> None:
    status = document(hello(pods=[pod(weights={"bytes": count, "source": "store"})]))
    wanted = shown if shown == "-" else f"{shown} from store"
    assert row_of(tables.POD_HEAD, tables.plain(status).splitlines())["WEIGHTS"] == wanted


def source(**fields: Any) -> dict[str, Any]:
    in_queue = {"depth": 1, "in_flight": 1, "oldest_age_s": 1.0, "dead": 1, "problem": None, "name": "lq", "namespace": "default"}
    found = in_queue | {"phase": "failed", "queue": "q", "queue_url": "u", "sink": "hello", "done": 1, "retried": 1}
    return found | {"restarts": {"source": 3}, "exits": {"source": "ended with status 1"}} | fields


def test_a_queue_source_that_crashes_is_told_with_its_last_lines() -> None:
    log = {"container": "source", "lines": ["Access to the queue is denied"]}
    shown = tables.plain(document(queue_sources=[source(reason="x", log=log)]))
    told = "lq is started again and again: source ended with status 1\n  │ the last lines of source:\n  │ Access to the queue is denied"
    assert told in shown
    assert "the last lines" not in tables.plain(document(queue_sources=[source(log=None)]))
    assert "the last lines" not in tables.plain(document(queue_sources=[source(log=log | {"container": "other"})]))


def test_a_service_that_has_failed_is_not_said_to_be_failing() -> None:
    assert cell(document(hello(state="failed", errors=errors(3, 3))), "STATE") == "failed"


def test_the_errors_of_a_revision_stand_beside_its_requests() -> None:
    rows = [{"name": f"hello-{n}", "state": "ready", "percent": 50, "tags": {}, "ready": 1, "desired": 1, "concurrency": 0} for n in (1, 2)]
    status = document(hello(errors=errors(1, 2), revisions=[row | {"requests_total": 20} for row in rows]))
    assert [row[tables.REVISION_HEAD.index("ERRORS")] for row in tables.revision_rows(status)] == ["9", "0"]


def test_why_a_function_is_not_up_is_told_with_the_log_of_the_container_that_is_to_blame() -> None:
    log = {"container": "weights-cache", "lines": ["no objects below s3://models/flowerz; is the prefix right?"]}
    reason = "weights-cache ended with status 1 twice"
    failed = hello(state="failed", failure=reason, failure_log=log, pods=[pod(reason=reason, log=log)])
    waits = pod(name="hello-2-cd", reason="its volume c is not there", log=None)
    for shown in (tables.plain(document(failed, hello(pods=[waits]))), on_a_screen(document(failed, hello(pods=[waits])))):
        assert shown.count(reason) == 1  # the pod's reason is the Service's
        assert "  │ the last lines of weights-cache:\n  │ no objects below s3://models/flowerz; is the prefix right?" in shown
        assert "hello-2-cd: its volume c is not there" in shown


def everything_evil() -> dict[str, Any]:
    log = {"container": EVIL, "lines": [EVIL] * 50}
    bad = pod(name=EVIL, phase=EVIL, reason=EVIL, log=log, waits_for=EVIL, weights={"bytes": 1, "source": EVIL}, exits={EVIL: EVIL})
    found = hello(name=EVIL, namespace=EVIL, state=EVIL, failure=EVIL, failure_log=log, url=EVIL, pods=[bad], errors=errors(1, 1))
    found["cold_starts"] = [{"outcome": EVIL, "seconds": 1.0}]
    revision = {"name": EVIL, "state": EVIL, "percent": EVIL, "tags": {EVIL: EVIL}, "ready": 1, "desired": 1, "concurrency": 0}
    found["revisions"] = [revision | {"requests_total": 1}]
    in_queue = {"depth": 1, "in_flight": 1, "oldest_age_s": 1.0, "dead": 1, "problem": EVIL, "name": EVIL, "url": "u"}
    source = in_queue | {"namespace": EVIL, "phase": "failed", "queue": EVIL, "queue_url": "v", "sink": EVIL, "done": 1, "retried": 1}
    source |= {"restarts": {EVIL: 1}, "exits": {EVIL: EVIL}, "reason": EVIL, "log": log}
    return document(found, manifests={"problem": EVIL}, queue_sources=[source], queues=[in_queue])


@pytest.mark.parametrize("show", [tables.plain, on_a_screen])
def test_what_others_have_written_moves_nothing_and_makes_no_line_of_its_own(show: Any) -> None:
    shown = show(everything_evil())
    ours = re.sub(r"\x1b\[[0-9;]*m", "", shown)  # the styles of the tables
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", ours)
    assert "evil" in ours
    assert not [line for line in ours.splitlines() if line.lstrip().startswith("12:00:00")]
    assert "[bold]b[/] [/] [link=http://evil]l[/link]" in ours
    assert "\x1b]8;" not in shown


def test_a_document_of_any_size_is_bounded_on_a_screen() -> None:
    log = {"container": "function", "lines": ["x" * 100_000] * 1000}
    status = document(hello(failure="y\n" * 100_000, failure_log=log, url="u" * 100_000))
    assert len(tables.plain(status)) < 50_000


@pytest.mark.parametrize("width", [80, 100, 140, 400])
def test_on_a_narrow_screen_what_matters_is_whole_and_the_rest_is_left_out(width: int) -> None:
    log = {"container": "function", "lines": ["last words"]}
    busy = hello(name="smollm2-instruct", errors=errors(3, 40), url="http://smollm2-instruct.default.localhost:8080/")
    busy["pods"] = [
        pod(name="smollm2-instruct-00001-ab12cd", exits={"function": "ended with status 1"}, weights={"bytes": 1, "source": "s"})
    ]
    status = document(busy, hello(state="failed", failure="why", failure_log=log, pods=[pod(exits={"function": "ended with status 1"})]))
    screen = io.StringIO()
    Console(file=screen, width=width, highlight=False, emoji=False).print(tables.rich(status, width))
    lines = screen.getvalue().splitlines()
    assert {"SERVICE", "STATE", "PODS", "REQUESTS", "ERRORS", "ERROR"} <= set(lines[0].split())
    assert lines[1].split()[:3] == ["smollm2-instruct", "!", "failing"]
    assert all(len(line) <= width for line in lines)
    assert "…" not in screen.getvalue()
    assert ("URL" in lines[0]) == (width >= 140)
    assert lines[4].startswith("✕ smollm2-instruct: 3 of the last")  # what is wrong stands above the pods: below, a small screen ends
    assert next(number for number, line in enumerate(lines) if "last words" in line) < lines.index(next(x for x in lines if "POD " in x))


def test_what_has_changed_and_was_not_taken_is_told_with_what_takes_it() -> None:
    status = document(hello(revision="hello-00001", changed=["a.py", "the weights"]))
    told = "hello: a.py, the weights changed since hello-00001 was made; SIGHUP takes it, or the dashboard"
    assert told in tables.plain(status).splitlines()
    assert told in on_a_screen(status)
