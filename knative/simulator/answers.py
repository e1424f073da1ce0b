"""What `relight simulate` makes of results besides one table: sweeps, pictures, a report, the comparison with reality, a recommendation."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from knative.simulator import patch, tables
from knative.simulator.options import errors_in_one_line, read_knobs
from knative.simulator.recommend import Recommendation, recommend
from knative.simulator.result import Result
from knative.simulator.runs import Run
from knative.simulator.slo import Slo, SloError
from knative.simulator.sweep import Sweep, parse_axis, sweep

Command = TypeVar("Command", bound=Callable[..., Any])


def options(command: Command) -> Command:
    """What `relight simulate` takes for these answers."""
    help_of_sweep = "Try each value: of a knob, of the model, or of `policy`. More than one: every combination, on all cores."
    help_of_validate = "Replay the first five minutes against `relight run` in real time, and tell how far the simulation is off."
    folder, file = click.Path(file_okay=False, path_type=Path), click.Path(dir_okay=False, path_type=Path)
    for option in (
        click.option("--validate", "validated", is_flag=True, help=help_of_validate),
        click.option("--html", type=file, metavar="FILE", help="Write a page with everything in it."),
        click.option("--png", type=folder, metavar="DIR", help="Put pictures there: load and pods, latency, front."),
        click.option("--by", default="p99", show_default=True, metavar="pNN", help="The percentile that a sweep sets against the cost."),
        click.option("--sweep", "axes", multiple=True, metavar="NAME=A,B,…", help=help_of_sweep),
    ):
        command = option(command)
    return command


def percentile(name: str) -> Slo:
    """The one that --by names. Raises SimulatorError."""
    try:
        return Slo.parse(f"{name}=1s")
    except SloError:
        raise SloError(f"--by {name}: must be like p99, with a percentile between 0 and 100") from None


def run_sweep(run: Run, axes: Sequence[str], by: str, png: Path | None, html: Path | None, as_json: bool) -> None:
    """Simulate every combination, and print which nobody beats. Raises SimulatorError."""
    parsed = [parse_axis(text) for text in axes]
    slo = percentile(by)
    notes = run.open().notes
    with _growing() as (more, done):
        found = sweep(run, parsed, slo, more, done)
    _console().print(tables.swept(found, notes))
    best = {point.name: point.result for point in found.points if point.on_front}
    _files(run, notes, best, found, png, html)
    if as_json:
        points = [tables.as_json(point.settings, point.result) | {"on_front": point.on_front} for point in found.points]
        oracles = [tables.as_json(point.settings, point.result) for point in found.oracles]
        bound = {"oracle": oracles, "oracle_not_the_bound_for": found.not_the_bound}
        click.echo(json.dumps({"by": found.percentile, "points": points, **bound, "notes": notes}))


def draw(run: Run, result: Result, notes: Sequence[str], png: Path | None, html: Path | None) -> None:
    """The pictures and the page of one result, where they are wanted. Raises SimulatorError."""
    _files(run, notes, {run.policy: result}, None, png, html)


def run_validation(run: Run, as_json: bool) -> None:
    """Compare with the real platform and print how far they are apart; exit status 1 beyond the bounds. Raises SimulatorError."""
    from knative.simulator.validate import validate

    found = validate(run, lambda line: click.echo(line, err=True))
    click.echo(found.table())
    if as_json:
        click.echo(json.dumps(found.to_json()))
    if not found.holds:
        raise SystemExit(1)


@click.command(name="recommend")
@click.option("--trace", required=True, metavar="FILE", help="A file, or synthetic:KIND?NAME=VALUE&…")
@click.option("--function", metavar="NAME", help="Whose requests, where a file has several functions'.")
@click.option(
    "--slo", "goal", required=True, metavar="pNN=TIME", help="What is to be kept, such as p99=2s; a request without an answer breaks it."
)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An annotation that is to stay as it is.")
@click.option("--model", multiple=True, metavar="FILE|NAME=VALUE", help="A TOML file with the function and its nodes, or one value of it.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything that is left to chance.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("scale.yaml"),
    show_default=True,
    help="The patch for kustomize.",
)
@click.option("--json", "as_json", is_flag=True, help="The last line of the output is the result as one JSON object.")
def recommend_(
    trace: str,
    function: str | None,
    goal: str,
    settings: tuple[str, ...],
    model: tuple[str, ...],
    seed: int,
    output: Path,
    as_json: bool,
) -> None:
    """Print the cheapest annotations that keep a goal for latency, what they cost, and how sure that is; write them as a patch.

    They are chosen on the first 60 % of the trace and judged on the rest. The exit status is 1 if the goal is not kept.
    """
    knobs = read_knobs(settings)
    with errors_in_one_line():
        run = Run(trace, knobs=knobs, model=model, function=function, seed=seed)
        notes = run.open().notes
        with _growing() as (more, done):
            found = recommend(run, Slo.parse(goal), more, done)
        text = patch.patch(found.annotations, found.container_concurrency, _why(run, found))
        unchecked = patch.check(text)
        patch.write(output, text)
    click.echo(tables.recommended(found, notes))
    click.echo(
        f"wrote {output}: "
        + (f"not put on the base, as {unchecked}" if unchecked else "it renders on our base, and Knative's rules accept it")
    )
    if as_json:
        click.echo(json.dumps(_document(found, output, unchecked is None)))
    if not found.is_met:
        raise SystemExit(1)


def _document(found: Recommendation, output: Path, is_checked: bool) -> dict[str, Any]:
    sure = found.confidence
    return {
        "slo": str(found.slo),
        "kept": found.is_met,
        "annotations": {f"autoscaling.knative.dev/{name}": value for name, value in found.annotations.items()},
        "container_concurrency": found.container_concurrency,
        "patch": str(output),
        "patch_checked": is_checked,
        "certainty": found.certainty,
        "interval_s": [_finite(sure.low_s), _finite(sure.high_s)],
        "kept_in_share_of_draws": sure.share_met,
        "cold_starts": found.test.cold_starts,
        "tried": found.tried,
        "train": found.train.to_json(),
        "test": found.test.to_json(),
        "oracle": found.oracle.to_json(),
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: None for never."""
    return value if value < float("inf") else None


def _why(run: Run, found: Recommendation) -> str:
    name = run.trace.rpartition("/")[2] + (f", {run.function}" if run.function else "")
    return f"{found.slo} for {name}: by `relight simulate recommend`, which is {found.certainty} in certainty."


def _files(run: Run, notes: Sequence[str], results: Mapping[str, Result], swept: Sweep | None, png: Path | None, html: Path | None) -> None:
    if not png and not html:
        return
    try:
        from knative.simulator import plots, report
    except ImportError as err:
        raise click.ClickException(f"pictures need {err.name}: pip install 'relight[simulator]'") from None
    title = run.trace.rpartition("/")[2] + (f", {run.function}" if run.function else "")
    figures = {}
    if swept:
        figures["front"] = ("Cost and latency", plots.pareto(swept.points, swept.oracles, swept.percentile, title))
        results = {**results, **{point.name: point.result for point in swept.oracles}}
        notes = [*notes, f"oracle: {tables.foresight(swept)}"]
    else:
        ((policy, result),) = results.items()
        figures["timeline"] = ("Load and pods", plots.timeline(result, f"{title}: {policy}"))
    figures["latency"] = ("Latency", plots.latency_cdf(results, title))
    if png:
        try:
            png.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise click.ClickException(f"--png {png}: {err.strerror or err}") from None
        for name, (_, figure) in figures.items():
            report.write(png / f"{name}.png", plots.png(figure))
    if html:
        if swept:
            names = list(swept.points[0].settings)
            rows = [[*point.settings.values(), *tables.cells(point.result)] for point in swept.points]
            rows += [[point.name, *[""] * (len(names) - 1), *tables.cells(point.result)] for point in swept.oracles]
            marked = frozenset(at for at, point in enumerate(swept.points) if point.on_front)
            table = report.Table([*names, *tables.HEAD], rows, marked)
        else:
            table = report.Table(["policy", *tables.HEAD], [[name, *tables.cells(one)] for name, one in results.items()])
        report.write(html, report.page(f"relight simulate: {title}", notes, [("Results", table), *figures.values()]))


def _console() -> Console:
    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)


def _bar() -> Progress:
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


@contextmanager
def _growing() -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """A bar for work of which more turns up on the way."""
    with _bar() as bar:
        task, total = bar.add_task("", total=0), 0

        def more(count: int) -> None:
            nonlocal total
            total += count
            bar.update(task, total=total)

        yield more, lambda: bar.advance(task)
