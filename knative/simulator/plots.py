"""Pictures of results. Each function makes one figure; `png` turns it into a file's bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from knative.simulator.result import Result
from knative.simulator.sweep import Point

# Of Okabe and Ito: told apart by people who see few colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#8C564B", "#7F7F7F", "#000000")
INK, FAINT = "#24292f", "#d0d7de"
LINES = ("-", "--", "-.", ":")


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG file."""
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def timeline(result: Result, title: str) -> Figure:
    """Load and pods over time, one below the other, on one axis of time."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    series = result.series
    unit_s, unit = _unit(result.horizon_s)
    edges = np.append(series.t_s, series.t_s[-1] + series.step_s[-1]) / unit_s if len(series.t_s) else np.array([0.0, 1.0])
    if len(series.t_s):
        above.stairs(series.load, edges, fill=True, color=COLOURS[5], alpha=0.45, label="requests at once")
        above.stairs(series.queue, edges, color=COLOURS[1], linewidth=1.2, label="of these, waiting for a pod")
        below.stairs(series.pods, edges, fill=True, color=FAINT, label="pods paid for")
        below.stairs(series.ready, edges, color=COLOURS[0], linewidth=1.2, label="pods ready")
    _tidy(above, "", "requests")
    _tidy(below, f"time, {unit}", "pods")
    above.set_title(title, loc="left", fontsize=11, color=INK)
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.set_xlim(edges[0], edges[-1])
        axes.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=8)
    return figure


def latency_cdf(results: Mapping[str, Result], title: str) -> Figure:
    """Which share of requests waits longer than so long: both axes logarithmic, as it is the slow ones that matter."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for at, (name, result) in enumerate(results.items()):
        latencies, shares = result.latencies.cdf()
        if not len(latencies):
            continue
        answered = result.answered / result.requests
        slower = 1 - shares * answered  # those without an answer are slower than any
        kept = slower > 0
        style = LINES[at // len(COLOURS) % len(LINES)]
        axes.step(latencies[kept], slower[kept], where="post", color=COLOURS[at % len(COLOURS)], linestyle=style, linewidth=1.4, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=1)
    for q in (0.95, 0.99):
        axes.axhline(1 - q, color=FAINT, linewidth=0.8, zorder=0)
        axes.annotate(f"p{q * 100:g}", (1, 1 - q), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="#6e7781")
    _tidy(axes, "latency, s", "share of requests that are slower")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.legend(loc="lower left", frameon=True, framealpha=0.9, edgecolor="none", fontsize=8, ncols=1 + len(results) // 8)
    return figure


def pareto(points: Sequence[Point], oracle: Point | None, percentile: str, title: str) -> Figure:
    """Cost against latency; the front as a line, and the bound as a mark. Where a policy is part of the settings, it has a colour."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    shown = [point for point in points if math.isfinite(point.latency_s)]
    policies = list(dict.fromkeys(point.settings.get("policy", "") for point in shown))
    for at, policy in enumerate(policies):
        of = [point for point in shown if point.settings.get("policy", "") == policy]
        axes.scatter(
            [point.result.cost for point in of],
            [point.latency_s for point in of],
            s=26,
            color=COLOURS[at % len(COLOURS)],
            label=policy or "settings",
            zorder=2,
        )
    front = sorted(((point.result.cost, point.latency_s, point) for point in shown if point.on_front), key=lambda one: one[:2])
    axes.step([one[0] for one in front], [one[1] for one in front], where="post", color=INK, linewidth=0.9, zorder=1, label="front")
    if len(front) <= 12:
        for cost, latency, point in front:
            text = ", ".join(value if name == "policy" else f"{name} {value}" for name, value in point.settings.items())
            axes.annotate(text, (cost, latency), xytext=(5, 4), textcoords="offset points", fontsize=7, color=INK)
    if oracle and math.isfinite(oracle.latency_s):
        axes.scatter([oracle.result.cost], [oracle.latency_s], marker="D", s=44, color=COLOURS[1], zorder=3, label="perfect foresight")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    _tidy(axes, "cost", f"{percentile}, s")
    left_out = len(points) - len(shown)
    axes.set_title(title + (f" ({left_out} without enough answers left out)" if left_out else ""), loc="left", fontsize=11, color=INK)
    axes.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=8, ncols=1 + len(policies) // 8)
    return figure


def _tidy(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(color=FAINT, linewidth=0.5, alpha=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _unit(span_s: float) -> tuple[float, str]:
    """What a time so long is best told in."""
    for unit_s, name in ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes")):
        if span_s >= 3 * unit_s:
            return unit_s, name
    return 1.0, "seconds"
