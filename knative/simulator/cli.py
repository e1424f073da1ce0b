"""`relight simulate`: a trace, a model and a policy in; how slow and how dear it was out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from knative.simulator import answers
from knative.simulator.engine import Function, simulate_many
from knative.simulator.model import FunctionModel, Nodes
from knative.simulator.options import errors_in_one_line, read_knobs
from knative.simulator.policies import policy_names
from knative.simulator.result import Result
from knative.simulator.runs import Run
from knative.simulator.traces import OpenTrace


@click.group(invoke_without_command=True)
@click.option(
    "--trace",
    "paths",
    multiple=True,
    metavar="FILE",
    help="A file, or synthetic:KIND?NAME=VALUE&… More than one: functions that share the nodes.",
)
@click.option(
    "--function",
    "names",
    multiple=True,
    metavar="NAME",
    help="Whose requests, where a file has several functions'. Several share the nodes.",
)
@click.option("--policy", default="kpa", show_default=True, help=f"One of {', '.join(policy_names())}.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A knob of the policy; for kpa an annotation or a setting of config-autoscaler.",
)
@click.option("--model", multiple=True, metavar="FILE|NAME=VALUE", help="A TOML file with the function and its nodes, or one value of it.")
@click.option("--history", metavar="FILE", help="An earlier trace of the same function, for the policy `schedule` to learn from.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything that is left to chance.")
@click.option(
    "--horizon",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="End there; by default with the trace, when all is answered.",
)
@click.option("--json", "as_json", is_flag=True, help="The last line of the output is the result as one JSON object.")
@answers.options
@click.pass_context
def simulate(
    context: click.Context,
    paths: tuple[str, ...],
    names: tuple[str, ...],
    policy: str,
    settings: tuple[str, ...],
    model: tuple[str, ...],
    history: str | None,
    seed: int,
    horizon: float | None,
    as_json: bool,
    axes: tuple[str, ...],
    by: str,
    png: Path | None,
    html: Path | None,
    validated: bool,
) -> None:
    """Simulate a function under a trace: what a policy costs, and how long callers wait."""
    if context.invoked_subcommand:
        return
    if not paths:
        raise click.UsageError("--trace is missing: a file, or e.g. synthetic:poisson?rps=2")
    knobs = read_knobs(settings)
    run = Run(paths[0], policy, knobs, model, names[0] if names else None, seed, history=history, horizon_s=horizon)
    if axes or validated:
        if len(paths) > 1 or len(names) > 1:
            raise click.UsageError("--sweep and --validate are for one trace and one function")
        unused = {"--sweep": axes, "--png": png, "--html": html, "--horizon": horizon}
        if validated and (given := [name for name, value in unused.items() if value]):
            raise click.UsageError(f"--validate does not go with {' and '.join(given)}: it prints one comparison, of five minutes")
        with errors_in_one_line():
            if validated:
                answers.run_validation(run, as_json)
            else:
                answers.run_sweep(run, axes, by, png, html, as_json)
        return
    with errors_in_one_line():
        function, nodes = run.read_model()
        runs = [replace(run, trace=path, function=name) for path in paths for name in names or (None,)]
        traces = [one.open() for one in runs]
        results = simulate_many(
            [
                Function(f"{index + 1}: {trace.name}", trace, function, one.make_policy(function, trace, index))
                for index, (one, trace) in enumerate(zip(runs, traces, strict=True))
            ],
            seed=seed,
            nodes=nodes,
            span_s=max(trace.span_s() for trace in traces),
            horizon_s=horizon,
        )
    notes = sorted({note for trace in traces for note in trace.notes})
    _print(policy, traces, results.functions, results.total, function, nodes, notes)
    with errors_in_one_line():
        answers.draw(run, results.total, notes, png, html)
    if as_json:
        found = results.total.to_json()
        if len(traces) > 1:
            found["functions"] = {name: result.to_json() for name, result in results.functions.items()}
        click.echo(json.dumps(found))


simulate.add_command(answers.recommend_)


def _print(
    policy: str, traces: Sequence[OpenTrace], parts: dict[str, Result], whole: Result, model: FunctionModel, nodes: Nodes, notes: list[str]
) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"policy {policy}")
    shown = {"all": whole, **parts} if len(parts) > 1 else {traces[0].name: whole}
    for name in shown:
        table.add_column(name, justify="right")
    for label, row in zip(_ROWS, zip(*(_cells(result) for result in shown.values()), strict=True), strict=True):
        table.add_row(label, *row)
    console.print(table)
    if not nodes.count:
        notes = [*notes, "nodes without an end; set nodes.count and nodes.gpus for a limit"]
    for note in notes:
        console.print(f"note: {note}", markup=False)


_ROWS = (
    "requests",
    "that waited for a pod's start",
    "latency p50",
    "p95",
    "p99",
    "max",
    "timed out",
    "rejected",
    "failed",
    "pod-hours",
    "GPU-hours",
    "cost",
    "pods at most",
    "pod time with requests",
    "scale-downs taken back",
)


def _cells(result: Result) -> tuple[str, ...]:
    latencies = ("–" if value is None else f"{value:.3f} s" for value in result.latency_s.values())
    return (
        f"{result.requests:,}",
        f"{result.cold_start_share:.2%}",
        *latencies,
        f"{result.timed_out:,}",
        f"{result.rejected:,}",
        f"{result.failed:,}",
        f"{result.pod_seconds / 3600:,.2f}",
        f"{result.gpu_hours:,.2f}",
        f"{result.cost:,.2f}",
        f"{result.peak_pods}",
        f"{result.utilisation:.1%}",
        f"{result.flaps}",
    )
