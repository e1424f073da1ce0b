"""The status document for people in a terminal: tables, and below them in words what they have to look after."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from rich.cells import cell_len
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from knative.local.code import listed
from knative.local.figures import restarts, seconds, size
from knative.local.plain import block, indented, line
from knative.local.series import origin

Row = Sequence[str]

CELL = 120  # characters
LOG_LINES = 12
NAMED = 4  # libraries of the fork server
SERVICE_HEAD = ("SERVICE", "STATE", "PODS", "BUSY", "QUEUED", "REQUESTS", "ERRORS", "ERROR RATE", "P50", "P95", "P99", "LAST START", "URL")
REVISION_HEAD = ("REVISION", "STATE", "TRAFFIC", "PODS", "BUSY", "REQUESTS", "ERRORS", "TAGS")
POD_HEAD = ("POD", "PHASE", "BUSY", "AGE", "RESTARTS", "WEIGHTS")
SOURCE_HEAD = ("QUEUE SOURCE", "PHASE", "QUEUE", "SINK", "WAITING", "IN FLIGHT", "OLDEST", "DONE", "RETRIED", "DEAD", "RESTARTS")
QUEUE_HEAD = ("QUEUE", "WAITING", "IN FLIGHT", "OLDEST", "DEAD")
# What is left out first where there is no room for all: `--json` has it.
_LESS = ("P50", "P95", "BUSY", "LAST START", "SINK", "URL", "RETRIED", "IN FLIGHT", "QUEUED", "P99", "OLDEST", "WEIGHTS", "AGE")
_GAP = 2  # between two columns
_MARKS = {"zero": "○", "pending": "◌", "starting": "◐", "ready": "●", "draining": "↓", "failed": "✕", "failing": "!"}
_STYLES = {
    "zero": "dim",
    "pending": "yellow",
    "starting": "yellow",
    "ready": "green",
    "draining": "blue",
    "failed": "red",
    "failing": "red",
}


@dataclass(frozen=True)
class Problem:
    """Something to look after, and the last lines of the log that tell of it."""

    text: str
    container: str = ""
    log: Sequence[str] = field(default=())

    def __str__(self) -> str:
        log = [f"the last lines of {self.container}:", *self.log[-LOG_LINES:]] if self.log else []
        return "\n".join([block(self.text), *indented(log)])


def service_rows(status: dict[str, Any]) -> Iterator[Row]:
    """A row for each Service."""
    for service in status["services"]:
        ready = sum(pod["phase"] == "ready" for pod in service["pods"])
        latency, starts = service["latency"], service["cold_starts"]
        yield (
            _full_name(service),
            _state(service),
            f"{ready}/{service['desired']}",
            str(service["concurrency"]),
            str(service["queued"]),
            str(service["requests_total"]),
            str(_errors(service).get("total", 0)),
            _percent(_lately(service).get("rate")),
            *(seconds(latency[name]) for name in ("p50", "p95", "p99")),
            f"{starts[0]['outcome']} {seconds(starts[0]['seconds'])}" if starts else "-",
            service["url"],
        )


def revision_rows(status: dict[str, Any]) -> Iterator[Row]:
    """A row for each revision of a Service that has several, or tags."""
    for service in status["services"]:
        for revision in service["revisions"]:
            if len(service["revisions"]) > 1 or revision["tags"]:
                yield (
                    revision["name"],
                    revision["state"],
                    f"{revision['percent']} %",
                    f"{revision['ready']}/{revision['desired']}",
                    str(revision["concurrency"]),
                    str(revision["requests_total"]),
                    str(_errors(service).get("revisions", {}).get(revision["name"], 0)),
                    ", ".join(revision["tags"]) or "-",
                )


def source_rows(status: dict[str, Any]) -> Iterator[Row]:
    """A row for each queue source."""
    for source in status["queue_sources"]:
        yield (
            _full_name(source),
            source["phase"],
            source["queue"] or "-",
            source["sink"],
            *_in_queue(source),
            str(source["done"]),
            str(source["retried"]),
            _number(source["dead"]),
            restarts(source["restarts"], source["exits"]),
        )


def queue_rows(status: dict[str, Any]) -> Iterator[Row]:
    """A row for each queue that no source polls, as are those that results go to."""
    polled = {source["queue_url"] for source in status["queue_sources"]}
    for queue in status["queues"]:
        if queue["url"] not in polled:
            yield queue["name"], *_in_queue(queue), _number(queue["dead"])


def _state(service: dict[str, Any]) -> str:
    """In one word: a Service is not well whose pods are, but whose callers get errors."""
    return "failing" if service["state"] == "ready" and _errors(service).get("failing") else str(service["state"])


def _errors(service: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = service.get("errors") or {}
    return found


def _lately(service: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = _errors(service).get("last_minute") or {}
    return found


def _percent(rate: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate:.1%}".replace("%", " %") if 0 < rate < 0.1 else f"{rate:.0%}".replace("%", " %")


def _full_name(found: dict[str, Any]) -> str:
    return found["name"] if found["namespace"] == "default" else f"{found['namespace']}/{found['name']}"


def _in_queue(found: dict[str, Any]) -> Iterator[str]:
    yield from (_number(found["depth"]), _number(found["in_flight"]))
    yield "-" if found["oldest_age_s"] is None else f"{found['oldest_age_s']:.0f} s"


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _blocks(status: dict[str, Any]) -> Iterator[tuple[Row, list[Row]]]:
    tables = (SERVICE_HEAD, service_rows), (REVISION_HEAD, revision_rows), (POD_HEAD, pod_rows), (SOURCE_HEAD, source_rows)
    for head, rows in (*tables, (QUEUE_HEAD, queue_rows)):
        found: list[Row] = [[line(cell, CELL) for cell in row] for row in rows(status)]
        if found:
            yield head, found


def _problems(status: dict[str, Any]) -> Iterator[Problem]:
    """What a person has to look after."""
    for service in status["services"]:
        yield from _problems_of(service, status["now"])
    for queue in status["queues"]:
        if queue["problem"]:
            yield Problem(f"{queue['name']}: {queue['problem']}")
    for source in status["queue_sources"]:
        log = source.get("log")
        if (problem := source.get("problem")) and problem not in [queue["problem"] for queue in status["queues"]]:
            yield Problem(f"{_full_name(source)}: {problem}")
        for container, ended in source["exits"].items():
            if source["phase"] == "failed":
                text = f"{_full_name(source)} is started again and again: {container} {ended}"
                yield _with_log(text, log if log and log["container"] == container else None)
    if problem := status["manifests"]["problem"]:
        yield Problem(f"manifests not taken: {problem}")


def _problems_of(service: dict[str, Any], now: float) -> Iterator[Problem]:
    failure = service["failure"] or ""
    if failure:
        yield _with_log(failure, service.get("failure_log"))
    for pod in service["pods"]:
        if (reason := pod.get("reason")) and reason not in failure:
            yield _with_log(f"{pod['name']}: {reason}", pod.get("log"))
    lately = _lately(service)
    if lately.get("errors"):
        made = ", ".join(f"{found['count']} × {origin(found['code'], found['source'])}" for found in lately["codes"])
        last = _errors(service)["last"]
        text = f"{lately['errors']} of the last minute's {lately['answers']} answers are errors: {made}"
        yield Problem(f"{_full_name(service)}: {text}; the last was {max(0, now - last['time']):.0f} s ago")


def _with_log(text: str, log: dict[str, Any] | None) -> Problem:
    return Problem(text, log["container"], log["lines"]) if log else Problem(text)


def pod_rows(status: dict[str, Any]) -> Iterator[Row]:
    """A row for each pod."""
    for service in status["services"]:
        for pod in service["pods"]:
            weights = pod.get("weights")
            yield (
                pod["name"],
                pod["phase"],
                str(pod["concurrency"]),
                f"{max(0, status['now'] - pod['started_at']):.0f} s",
                restarts(pod["restarts"], pod.get("exits") or {}),
                f"{size(weights['bytes'])} from {weights['source']}" if weights and weights["bytes"] else "-",
            )


def plain(status: dict[str, Any]) -> str:
    """Lines with columns, for whatever reads them."""
    first, *more = ["\n".join(_aligned([head, *rows])) for head, rows in _blocks(status)] or [""]
    return "\n\n".join([first, *map(str, _problems(status)), *more, *_changed(status), *_waits(status), *_held(status)])


def rich(status: dict[str, Any], width: int | None = None) -> Group:
    """Tables for a terminal; a state has a sign besides its colour. width: what the terminal has room for, if that is to be kept to."""
    found: list[list[Any]] = []
    for head, rows in _blocks(status):
        kept = _fitting(head, rows, width)
        table = Table(*(Column(head[index], no_wrap=True) for index in kept), box=None, padding=(0, _GAP, 0, 0), header_style="dim")
        for row in rows:
            table.add_row(*(_cell(index, row[index]) for index in kept))
        found.append([table, ""])
    problems = [Text.assemble(("✕ ", "red"), str(problem), "\n") for problem in _problems(status)]
    waits = [Text.assemble(("◌ ", "yellow"), text) for text in (*_changed(status), *_waits(status))]
    held = [Text(text, "dim") for text in _held(status)]
    return Group(*chain(*found[:1], problems, *found[1:], waits, held))


def _fitting(head: Row, rows: Sequence[Row], width: int | None) -> list[int]:
    """Which columns there is room for, in their order."""
    kept = list(range(len(head)))
    sizes = [max(cell_len(row[index]) for row in (head, *rows)) + _GAP + 2 * (index == 1) for index in kept]  # a state has its sign
    for name in _LESS:
        if width and name in head and sum(sizes[index] for index in kept) > width:
            kept.remove(head.index(name))
    return kept


def _cell(index: int, text: str) -> Text:
    if index == 1 and text in _STYLES:
        return Text(f"{_MARKS[text]} {text}", _STYLES[text])
    return Text(text, "" if index else "bold")


def _changed(status: dict[str, Any]) -> Iterator[str]:
    """Whose code or weights have changed, and were not taken."""
    for service in status["services"]:
        if files := service.get("changed"):
            text = f"{listed(files)} changed since {service['revision']} was made; SIGHUP takes it, or the dashboard"
            yield line(f"{_full_name(service)}: {text}")


def _waits(status: dict[str, Any]) -> Iterator[str]:
    """What pods wait for that are not started."""
    pods = [pod for service in status["services"] for pod in service["pods"]]
    return (line(f"{pod['name']} {pod['waits_for']}") for pod in pods if pod.get("waits_for"))


def _held(status: dict[str, Any]) -> Iterator[str]:
    """What the fork server has imported for those that start, and what it has not."""
    found = status.get("fork_server") or {}
    if modules := found.get("modules"):
        more = f" and {len(modules) - NAMED} more" if len(modules) > NAMED else ""
        without = "".join(
            f"; {library} is imported by each function itself, as it {reason}" for library, reason in found["left_out"].items()
        )
        yield line(f"fork server: {size(found['bytes'])}, with {', '.join(modules[:NAMED])}{more}{without}")


def _aligned(rows: Sequence[Row]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
