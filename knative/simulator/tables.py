"""Results for people in a terminal, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from knative.simulator.recommend import DAY_S, Recommendation
from knative.simulator.result import Result
from knative.simulator.slo import INTERVAL
from knative.simulator.sweep import Point, Sweep

HEAD = ("requests", "cold", "p50", "p95", "p99", "max", "lost", "pod-hours", "cost", "peak", "busy", "flaps")


def seconds(value: float | None) -> str:
    """A time with as many digits as tell something."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "never"
    if value < 0.9995:
        return f"{value * 1000:.3g} ms"
    return f"{value:.2f} s" if value < 99.995 else f"{value:.0f} s"


def cells(result: Result) -> list[str]:
    """The cells below HEAD. Lost are those without an answer: timed out, rejected or failed."""
    lost = result.timed_out + result.rejected + result.failed
    return [
        f"{result.requests}",
        f"{result.cold_start_share:.2%}",
        *(seconds(result.latency_s[name]) for name in ("p50", "p95", "p99", "max")),
        f"{lost}",
        f"{result.pod_seconds / 3600:.3g}" if result.pod_seconds < 3.6e6 else f"{result.pod_seconds / 3600:.0f}",
        f"{result.cost:.2f}",
        f"{result.peak_pods}",
        f"{result.utilisation:.0%}",
        f"{result.flaps}",
    ]


def one(result: Result, notes: Iterable[str]) -> Group:
    """A single result."""
    lost = {"timed out": result.timed_out, "rejected": result.rejected, "failed": result.failed, "still waiting": result.in_system}
    said = ", ".join(f"{count} {name}" for name, count in lost.items() if count) or "none"
    latency = " · ".join(f"{name} {seconds(value)}" for name, value in result.latency_s.items())
    rows = {
        "requests": f"{result.requests}, of which {result.cold_start_share:.2%} waited for a pod to start",
        "latency": latency,
        "without an answer": said,
        "pods": f"{result.pod_seconds / 3600:.2f} pod-hours, at most {result.peak_pods} at once, busy {result.utilisation:.0%} of the time",
        "cost": f"{result.cost:.2f} for {result.gpu_hours:.2f} GPU-hours in {result.horizon_s / 3600:.2f} h",
        "flaps": f"{result.flaps} scale-downs were taken back",
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, text in rows.items():
        table.add_row(f"[dim]{name}[/]", escape(text))
    return Group(table, *_notes(notes))


def swept(sweep: Sweep, notes: Iterable[str]) -> Group:
    """A sweep, the points on the front marked; sorted by cost."""
    names = list(sweep.points[0].settings)
    table = Table("", *map(escape, names), *HEAD, box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in HEAD:
        table.columns[1 + len(names) + HEAD.index(name)].justify = "right"
    for point in sorted(sweep.points, key=_by_cost):
        style = "bold" if point.on_front else ""
        mark = "●" if point.on_front else ""
        table.add_row(mark, *(escape(point.settings[name]) for name in names), *cells(point.result), style=style)
    for oracle in sweep.oracles:
        table.add_row("◇", escape(oracle.name), *[""] * (len(names) - 1), *cells(oracle.result), style="dim")
    legend = f"● nobody is cheaper and has a lower {sweep.percentile} · ◇ {foresight(sweep)}"
    return Group(table, f"[dim]{escape(legend)}[/]", *_notes(notes))


def foresight(sweep: Sweep) -> str:
    """What the oracles of a sweep are, and how far they are a bound."""
    if sweep.not_the_bound:
        return f"perfect foresight: nobody waits, for about as little as that can cost (not exactly: {', '.join(sweep.not_the_bound)})"
    if len({oracle.settings.get("concurrency") for oracle in sweep.oracles}) > 1:  # as requests slow each other down
        return "perfect foresight: nobody waits; with concurrency 1 nobody is slowed down either, and that cannot cost less"
    return "the bound: perfect foresight; nobody waits, and that cannot cost less"


def _by_cost(point: Point) -> tuple[float, float]:
    return point.result.cost, point.latency_s


def _notes(notes: Iterable[str]) -> list[str]:
    return [f"[dim]note: {escape(note)}[/]" for note in notes]


def recommended(found: Recommendation, notes: Iterable[str]) -> str:
    """A recommendation in plain words."""
    slo, sure = found.slo, found.confidence
    share = found.train_s / (found.train_s + found.test_s)
    per_day = DAY_S / max(found.test.horizon_s, 1e-9)
    lines = [
        f"{slo}: " + ("kept" if found.is_met else "NOT kept by any of the settings that were tried; this one comes closest"),
        "",
        *lines_of(found),
        "",
        f"Chosen from {found.tried} settings on the first {share:.0%} of the trace; {slo.name} there is "
        f"{seconds(slo.latency_s(found.train))}.",
        f"On the rest, which had no say: {slo.name} {seconds(slo.latency_s(found.test))}, {INTERVAL:.0%} interval {seconds(sure.low_s)} to "
        f"{seconds(sure.high_s)}; kept in {sure.share_met:.1%} of {sure.blocks} blocks of {seconds(sure.block_s)} drawn at random.",
        f"It costs {found.test.cost * per_day:.2f} a day ({found.test.pod_seconds * per_day / 3600:.1f} pod-hours); "
        f"with perfect foresight it would be {found.oracle.cost * per_day:.2f}.",
        f"How sure: {found.certainty}. It rests on {found.test.requests} requests; {found.test.cold_starts} of them waited for a cold start"
        + (", and on days like these." if found.test.cold_starts else "; none of them tells how long one takes."),
        *([] if found.are_alike else [_unlike(found)]),
        *(f"note: {note}" for note in notes),
    ]
    return "\n".join(lines)


def _unlike(found: Recommendation) -> str:
    before, after = found.train.requests / found.train_s, found.test.requests / found.test_s
    return f"note: the two parts differ, {before:.3g} and {after:.3g} requests/s on average: what holds in one says little about the other"


def lines_of(found: Recommendation) -> list[str]:
    """The lines to put under `spec.template`."""
    return [
        *(f'  autoscaling.knative.dev/{name}: "{value}"' for name, value in found.annotations.items()),
        f"  (containerConcurrency: {found.container_concurrency})",
    ]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table; the first `left` columns are words, the others numbers."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join([" --- "] * left + [" ---: "] * (len(head) - left)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def as_json(settings: Mapping[str, str], result: Result) -> dict[str, object]:
    """One point of a sweep."""
    return {"settings": dict(settings), **result.to_json()}
