"""`relight simulate` as its user sees it."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from knative.cli import main


def relight(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["simulate", *arguments], catch_exceptions=False)


def test_a_table_then_the_result_in_the_last_line() -> None:
    arguments = ["--trace", "synthetic:poisson?rps=2&duration=60", "--policy", "fixed", "--set", "pods=2", "--seed", "3", "--json"]
    done = relight(*arguments)
    assert done.exit_code == 0
    *table, last = done.output.splitlines()
    found = json.loads(last)
    assert found["pod_seconds"] == pytest.approx(120, abs=1)
    assert any(line.startswith("requests") and str(found["requests"]) in line for line in table)
    assert any("made up" in line for line in table)
    assert relight(*arguments).output == done.output


def test_several_traces_are_functions_that_share_the_nodes(tmp_path: Path) -> None:
    model = tmp_path / "model.toml"
    model.write_text("service = 1\n[nodes]\ncount = 1\ngpus = 2\n")
    traces = [word for n in (1, 2, 3) for word in ("--trace", f"synthetic:poisson?rps={n}&duration=100")]
    found = json.loads(relight(*traces, "--model", str(model), "--model", "cold_start.imports=3", "--json").output.splitlines()[-1])
    assert found["peak_pods"] == 2
    assert len(found["functions"]) == 3
    assert sum(one["requests"] for one in found["functions"].values()) == found["requests"]


def two_services(path: Path) -> Path:
    """In the second hour, each quarter of it: one request of `little` and 50 of `much`, of 100 s each."""
    rows = [f"{3_600 + at},{name},0,4000" for at in (60, 960, 1860, 2760) for name in ["little"] + ["much"] * 50]
    path.write_text("\n".join(["t_s,service,context_tokens,generated_tokens", *rows, ""]))
    return path


def scheduled(*arguments: str) -> dict[str, Any]:
    """What came of `schedule` for `little`; its KPA wants no spare pods."""
    fixed = ["--policy", "schedule", "--set", "target-utilization-percentage=100", "--function", "little", "--json"]
    found: dict[str, Any] = json.loads(relight(*fixed, *arguments).output.splitlines()[-1])
    return found


def test_a_schedule_learns_from_the_history_when_pods_are_needed(tmp_path: Path) -> None:
    trace = str(two_services(tmp_path / "trace.csv"))
    assert scheduled("--trace", trace, "--history", trace)["cold_start_share"] == 0
    nothing = tmp_path / "nothing.csv"  # which has no functions to choose from: all of it is the history
    nothing.write_text("t_s,requests\n0,0\n3600,0\n")
    assert scheduled("--trace", trace, "--history", str(nothing))["cold_start_share"] == 1


@pytest.mark.parametrize("history", ["trace.csv", "last_week.csv"])
def test_a_history_is_of_the_function_alone(tmp_path: Path, history: str) -> None:
    """Whether it is in the trace's file or in another one, and whether one simulation is made or a sweep."""
    trace, earlier = (str(two_services(tmp_path / name)) for name in ("trace.csv", history))
    alone = scheduled("--trace", trace, "--history", earlier)
    assert alone["peak_pods"] == 1
    (swept,) = scheduled("--trace", trace, "--history", earlier, "--sweep", "lead=60s")["points"]
    assert swept["peak_pods"] == 1
    both = scheduled("--trace", trace, "--history", earlier, "--function", "much")["functions"]
    assert [found["peak_pods"] for found in both.values()] == [1, 50]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("", "--trace is missing"),
        ("--trace /no/such/file", "/no/such/file"),
        ("--trace synthetic:teaching --policy kpq", "did you mean kpa?"),
        ("--trace synthetic:teaching --set window", "--set window: must be NAME=VALUE"),
        ("--trace synthetic:teaching --model servce=1", "did you mean service?"),
        ("--trace synthetic:teaching --policy schedule", "--history FILE"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, problem: str) -> None:
    done = relight(*arguments.split())
    assert done.exit_code != 0
    assert problem in done.output.splitlines()[-1]
