"""`relight simulate` as its user sees it."""

import json
from pathlib import Path

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
