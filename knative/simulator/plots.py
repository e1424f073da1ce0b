"""Pictures of results. Each function makes one figure; `png` turns it into a file's bytes."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from knative.simulator.result import Result
from knative.simulator.sweep import Point

# Of Okabe and Ito: told apart by people who see few colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#8C564B", "#7F7F7F", "#000000")
INK, FAINT = "#24292f", "#d0d7de"
MOST_NAMES = 14  # that can be read beside points
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
    oracles = itertools.count()
    for at, (name, result) in enumerate(results.items()):
        latencies, shares = result.latencies.cdf()
        if not len(latencies):
            continue
        answered = result.answered / result.requests
        slower = 1 - shares * answered  # those without an answer are slower than any
        kept = slower > 0
        is_oracle = name.startswith("oracle")
        style = LINES[(next(oracles) if is_oracle else at // len(COLOURS)) % len(LINES)]
        axes.step(
            latencies[kept],
            slower[kept],
            where="post",
            color=INK if is_oracle else COLOURS[at % len(COLOURS)],
            linestyle=style,
            linewidth=1.4,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_plain))
    for q in (0.95, 0.99):
        axes.axhline(1 - q, color=FAINT, linewidth=0.8, zorder=0)
        axes.annotate(f"p{q * 100:g}", (1, 1 - q), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="#6e7781")
    _tidy(axes, "latency, s", "share of requests that are slower")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.legend(loc="lower left", frameon=True, framealpha=0.9, edgecolor="none", fontsize=8, ncols=1 + len(results) // 8)
    return figure


def pareto(points: Sequence[Point], oracles: Sequence[Point], percentile: str, title: str) -> Figure:
    """Cost against latency; the front as a line, and perfect foresight as marks. A policy that is part of the settings has a colour."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    shown = [point for point in points if math.isfinite(point.latency_s)]
    policies = list(dict.fromkeys(point.settings.get("policy", "") for point in shown))
    colours = {policy: COLOURS[at % len(COLOURS)] for at, policy in enumerate(policies)}
    by_colour = len(shown) > MOST_NAMES and len(policies) > 1  # too many points to name each
    for policy, colour in colours.items():
        of = [point for point in shown if point.settings.get("policy", "") == policy]
        label = policy if by_colour else None
        axes.scatter([point.result.cost for point in of], [point.latency_s for point in of], s=26, color=colour, label=label, zorder=2)
    front = sorted((point for point in shown if point.on_front), key=lambda point: (point.result.cost, point.latency_s))
    xs, ys = [point.result.cost for point in front], [point.latency_s for point in front]
    axes.step(xs, ys, where="post", color=INK, linewidth=0.9, zorder=1, label="nobody is cheaper and faster")
    named = sorted(shown if len(shown) <= MOST_NAMES else front[:MOST_NAMES], key=lambda point: point.result.cost)
    foreseen = [point for point in oracles if math.isfinite(point.latency_s)]
    if foreseen:
        xs, ys = [point.result.cost for point in foreseen], [point.latency_s for point in foreseen]
        axes.scatter(xs, ys, marker="D", s=44, color=INK, zorder=3, label="perfect foresight")
    if len(foreseen) > 1:
        named = [*named, *foreseen]
    axes.margins(x=0.12, y=0.08)
    if shown and min(point.result.cost for point in shown) > 0:
        axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_formatter(FuncFormatter(_plain))
        if axis.get_scale() == "log":
            axis.set_minor_formatter(FuncFormatter(_plain if high < 5 * low else _plain_if_few))
    axes.tick_params(which="minor", labelsize=8, colors=INK)
    _tidy(axes, "cost", f"{percentile}, s")
    left_out = len(points) - len(shown)
    axes.set_title(title + (f" ({left_out} without enough answers left out)" if left_out else ""), loc="left", fontsize=11, color=INK)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2 + (len(policies) if by_colour else 0))
    _name(axes, named, [*shown, *foreseen])
    return figure


def _name(axes: Axes, named: Sequence[Point], shown: Sequence[Point]) -> None:
    """Write beside each point what it is, where no other name and no point is yet."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # else nothing has a place yet
    inside = axes.get_window_extent()
    at = [axes.transData.transform((point.result.cost, point.latency_s)) for point in shown]
    taken = [Bbox.from_extents(x - 3, y - 3, x + 3, y + 3) for x, y in at]
    for point in named:
        label = axes.annotate(point.name, (point.result.cost, point.latency_s), (5, 4), textcoords="offset points", fontsize=8, color=INK)
        label.set_in_layout(False)  # it would move what has its place
        for away, (right, up) in itertools.product((0, 11, 22, 33, 44), ((5, 4), (5, -11), (-5, 4), (-5, -11))):
            label.set_horizontalalignment("left" if right > 0 else "right")
            label.xyann = (right, up + (away if up > 0 else -away))
            box = label.get_window_extent()
            if inside.x0 <= box.x0 and box.x1 <= inside.x1 and not any(box.overlaps(other) for other in taken):
                break
        taken.append(label.get_window_extent())
        if away:
            line = {"arrowstyle": "-", "color": INK, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2}
            axes.annotate("", label.xy, xytext=label.xyann, textcoords="offset points", arrowprops=line).set_in_layout(False)


def _plain(value: float, _: object) -> str:
    """A tick of a logarithmic axis as one writes the number."""
    return f"{value:g}"


def _plain_if_few(value: float, _: object) -> str:
    """Between two powers of ten, what begins with 2 or 5."""
    return f"{value:g}" if f"{value:.0e}"[0] in "25" else ""


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
