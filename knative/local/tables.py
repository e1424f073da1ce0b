"""The status document for people in a terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

Row = Sequence[str]

SERVICE_HEAD = ("SERVICE", "STATE", "PODS", "BUSY", "QUEUED", "REQUESTS", "P50", "P95", "P99", "LAST START", "URL")
REVISION_HEAD = ("REVISION", "STATE", "TRAFFIC", "PODS", "BUSY", "REQUESTS", "TAGS")
POD_HEAD = ("POD", "PHASE", "BUSY", "AGE", "RESTARTS", "WEIGHTS")
SOURCE_HEAD = ("QUEUE SOURCE", "PHASE", "QUEUE", "SINK", "WAITING", "IN FLIGHT", "OLDEST", "DONE", "RETRIED", "DEAD", "RESTARTS")
QUEUE_HEAD = ("QUEUE", "WAITING", "IN FLIGHT", "OLDEST", "DEAD")
_MARKS = {"zero": "○", "pending": "◌", "starting": "◐", "ready": "●", "draining": "↓", "failed": "✕"}
_STYLES = {"zero": "dim", "pending": "yellow", "starting": "yellow", "ready": "green", "draining": "blue", "failed": "red"}


def seconds(value: float | None) -> str:
    """A duration with as many digits as tell something."""
    if value is None:
        return "-"
    return f"{value * 1000:.1f} ms" if value < 0.01 else f"{value * 1000:.0f} ms" if value < 0.1 else f"{value:.2f} s"


def service_rows(status: dict[str, Any]) -> Iterator[Row]:
    """A row for each Service."""
    for service in status["services"]:
        ready = sum(pod["phase"] == "ready" for pod in service["pods"])
        latency, starts = service["latency"], service["cold_starts"]
        yield (
            _full_name(service),
            service["state"],
            f"{ready}/{service['desired']}",
            str(service["concurrency"]),
            str(service["queued"]),
            str(service["requests_total"]),
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
            str(sum(source["restarts"].values())),
        )


def queue_rows(status: dict[str, Any]) -> Iterator[Row]:
    """A row for each queue that no source polls, as are those that results go to."""
    polled = {source["queue_url"] for source in status["queue_sources"]}
    for queue in status["queues"]:
        if queue["url"] not in polled:
            yield queue["name"], *_in_queue(queue), _number(queue["dead"])


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
        if found := list(rows(status)):
            yield head, found


def _problems(status: dict[str, Any]) -> list[str]:
    """What a person has to look after."""
    failures = [service["failure"] for service in status["services"] if service["failure"]]
    failures += [f"{queue['name']}: {queue['problem']}" for queue in status["queues"] if queue["problem"]]
    failures += [
        f"{_full_name(source)} is started again and again: {container} {ended}"
        for source in status["queue_sources"]
        for container, ended in source["exits"].items()
        if source["phase"] == "failed"
    ]
    problem = status["manifests"]["problem"]
    return [*failures, *([f"manifests not taken: {problem}"] if problem else [])]


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
                str(sum(pod["restarts"].values())),
                f"{weights['bytes'] / 1e6:.1f} MB from {weights['source']}" if weights else "-",
            )


def plain(status: dict[str, Any]) -> str:
    """Lines with columns, for whatever reads them."""
    blocks = ["\n".join(_aligned([head, *rows])) for head, rows in _blocks(status)]
    return "\n\n".join([*blocks, *_problems(status), *_waits(status)])


def rich(status: dict[str, Any]) -> Group:
    """Tables for a terminal; a state has a sign besides its colour."""
    parts: list[Any] = []
    for head, rows in _blocks(status):
        table = Table(*head, box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name, state, *rest in rows:
            shown = f"[{_STYLES.get(state, '')}]{_MARKS.get(state, '?')} {state}[/]" if state in _STYLES else escape(state)
            table.add_row(f"[bold]{escape(name)}[/]", shown, *map(escape, rest))
        parts += [table, ""]
    parts += [f"[red]✕[/] {escape(problem)}" for problem in _problems(status)]
    parts += [f"[yellow]◌[/] {escape(line)}" for line in _waits(status)]
    return Group(*parts)


def _waits(status: dict[str, Any]) -> Iterator[str]:
    """What pods wait for that are not started."""
    return (f"{pod['name']} {pod['waits_for']}" for service in status["services"] for pod in service["pods"] if pod.get("waits_for"))


def _aligned(rows: Sequence[Row]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
