"""What is made of results: sweeps and their front, goals and how sure they are, recommendations, the patch, pictures and the page."""

import contextlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from knative.autoscaler import ScaleSpec
from knative.cli import main
from knative.simulator import patch
from knative.simulator.errors import SimulatorError
from knative.simulator.running import Finished
from knative.simulator.runs import Run, results
from knative.simulator.slo import Requests, Slo
from knative.simulator.sweep import combinations, pareto, parse_axis
from knative.simulator.validate import BOUND_PODS, Comparison
from tests.support import BIN, wait_until

TRACE = "synthetic:bursts?duration=2h&every=5m&size=20"
PNG = b"\x89PNG\r\n"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["simulate", *arguments], catch_exceptions=False)


def last(result: Result) -> dict[str, object]:
    """The JSON object that is the last line of what was printed."""
    found: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("points", "front"),
    [
        pytest.param([(1, 9), (2, 5), (3, 5), (4, 1), (2, 6)], {0, 1, 3}, id="neither dearer nor slower than another"),
        pytest.param([(1, 5), (1, 5)], {0, 1}, id="equals share it"),
        pytest.param([(1, 5), (1, 4)], {1}, id="as cheap and faster"),
        pytest.param([(0, math.inf), (1, 3)], {1}, id="too many without an answer"),
        pytest.param([], set(), id="none"),
    ],
)
def test_the_front_is_what_nobody_beats(points: list[tuple[float, float]], front: set[int]) -> None:
    assert pareto(points) == front


def test_an_axis_has_values_that_may_hold_commas_in_brackets() -> None:
    assert parse_axis("service=0.1,lognormal(p50=1,p99=3), 2") == ("service", ["0.1", "lognormal(p50=1,p99=3)", "2"])
    assert len(combinations([("a", ["1", "2"]), ("b", ["3", "4", "5"])])) == 6


@pytest.mark.parametrize("text", ["window", "window=", "=1", "window=1,,2"])
def test_an_axis_that_is_none_is_told(text: str) -> None:
    with pytest.raises(SimulatorError, match="must be like window=30s,60s"):
        parse_axis(text)


def test_an_axis_twice_and_too_many_combinations_are_told() -> None:
    with pytest.raises(SimulatorError, match="is there twice"):
        combinations([("a", ["1"]), ("a", ["2"])])
    with pytest.raises(SimulatorError, match="1000000 combinations, at most"):
        combinations([(name, ["1"] * 100) for name in "abc"])


@pytest.mark.parametrize("text", ["p99", "p99=", "p99=soon", "p0=1s", "99=1s", "p99=0s", "p100=1s"])
def test_a_goal_that_is_none_is_told(text: str) -> None:
    with pytest.raises(SimulatorError, match=f"--slo {re.escape(text)}"):
        Slo.parse(text)


def test_a_request_without_an_answer_is_later_than_any() -> None:
    """One pod with a second for each request, 100 of them at once: those beyond the 10th second are not answered in time."""
    run = Run("synthetic:teaching?requests=100&over=0.001&slow=0&short=1", "fixed", {"pods": "1"}, ("timeout_s=10.5",))
    result = run.result()
    assert result.timed_out == 90
    assert Slo.parse("p5=1s").latency_s(result) == pytest.approx(5, abs=1)
    assert Slo.parse("p11=1s").latency_s(result) == math.inf
    assert not Slo.parse("p11=3000s").is_met(result)


def test_the_interval_of_a_percentile_shows_how_much_days_differ() -> None:
    """Latencies that are alike throughout leave no doubt; one slow hour of forty does."""

    def interval(slow: bool) -> tuple[float, float, float]:
        requests, rng = Requests(), np.random.default_rng(1)
        for at in range(40_000):
            latency = 9.0 if slow and at < 1000 else rng.uniform(0.9, 1.1)
            requests.add(Finished("function", float(at), 0.0, latency, "answered", False))
        found = requests.confidence(Slo.parse("p99=2s"), seed=1)
        return found.low_s, found.high_s, found.share_met

    assert interval(slow=False) == pytest.approx((1.1, 1.1, 1.0), rel=0.02)
    low, high, met = interval(slow=True)
    assert low == pytest.approx(1.1, rel=0.02)
    assert high == pytest.approx(9, rel=0.02)
    assert met == pytest.approx(math.exp(-1), abs=0.1)  # the slow hour is in none of forty draws


def test_runs_on_all_cores_are_those_of_one() -> None:
    runs = [Run(TRACE, seed=seed) for seed in range(3)]
    found = results(runs)
    assert [one.to_json() for one in found] == [run.result().to_json() for run in runs]


def test_runs_are_worked_on_at_once_each_by_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads a pipe waits for its writer: no run is handed its model before both have asked for theirs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    pipes = [tmp_path / "one.toml", tmp_path / "other.toml"]
    for pipe in pipes:
        os.mkfifo(pipe)
    processes: list[int | None] = []

    def hand_out() -> None:
        writers: dict[Path, int] = {}
        try:
            for pipe in pipes:
                writers[pipe] = wait_until(f"{pipe.name} is asked for", partial(os.open, pipe, os.O_WRONLY | os.O_NONBLOCK))
            processes.extend(child.pid for child in multiprocessing.active_children())
        finally:
            for pipe in reversed(pipes):
                if pipe in writers:
                    os.close(writers[pipe])
                else:  # else nobody would ever answer who asks for it later
                    pipe.unlink()
                    pipe.touch()

    thread = threading.Thread(target=hand_out)
    thread.start()
    found = results([Run(TRACE, model=(str(pipe),)) for pipe in pipes])
    thread.join()
    assert len(set(processes)) == 2
    assert os.getpid() not in processes
    assert [one.to_json() for one in found] == [Run(TRACE).result().to_json()] * 2


def test_a_sweep_shows_how_far_it_is_on_a_terminal_and_nowhere_else() -> None:
    command = ["simulate", "--trace", TRACE, "--sweep", "min-scale=0,1,2"]
    terminal, theirs = os.openpty()
    with subprocess.Popen(
        [str(BIN / "relight"), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # at its end
            while piece := os.read(terminal, 65_536):
                shown += piece
        os.close(terminal)
        assert process.stdout
        table = process.stdout.read().decode()
    assert process.returncode == 0
    assert b"simulating" in shown
    assert b"4/4" in shown  # three settings, and the oracle
    assert "simulating" not in table
    piped = call(*command[1:])
    assert piped.stdout == table
    assert not piped.stderr.strip()


def test_a_sweep_marks_its_front_and_is_bounded_by_the_oracle() -> None:
    result = call("--trace", TRACE, "--sweep", "min-scale=0,1,2", "--sweep", "concurrency=1,2", "--by", "p95", "--json")
    assert result.exit_code == 0
    document = last(result)
    points = document["points"]
    assert isinstance(points, list)
    assert len(points) == 6
    assert any(point["on_front"] for point in points)
    assert document["by"] == "p95"
    oracles = document["oracle"]
    assert isinstance(oracles, list)
    assert [(one["settings"], one["cold_start_share"]) for one in oracles] == [({"policy": "oracle", "concurrency": "2"}, 0)]
    assert "nobody is cheaper" in result.stdout


@pytest.mark.parametrize(
    ("model", "oracles", "told"),
    [
        pytest.param([], [None], "the bound: perfect foresight; nobody waits, and that cannot cost less", id="one request at a time"),
        pytest.param(["concurrency=4"], [None], "(not exactly: concurrency)", id="several, which share a pod for nothing"),
        pytest.param(
            ["concurrency=4", "batch_slowdown=0.1"],
            ["4", "2", "1"],
            "with concurrency 1 nobody is slowed down either, and that cannot cost less",
            id="several, which slow each other down: the fewer at once, the faster and the dearer",
        ),
        pytest.param(
            ["concurrency=4", "batch_slowdown=3"], ["1"], "and that cannot cost less", id="worse than taking turns: alone is cheapest"
        ),
        pytest.param(["drain_s=5", "nodes.count=9"], [None], "(not exactly: drain_s, nodes.count)", id="what it does not plan for"),
    ],
)
def test_a_sweep_says_what_foresight_is_a_bound_of(model: list[str], oracles: list[str | None], told: str) -> None:
    settings = [word for setting in ["service=lognormal(p50=2,p99=9)", *model] for word in ("--model", setting)]
    result = call("--trace", TRACE, *settings, "--sweep", "policy=kpa,keep-alive", "--json")
    document = last(result)
    points, found = document["points"], document["oracle"]
    assert isinstance(points, list)
    assert isinstance(found, list)
    assert [one["settings"].get("concurrency") for one in found] == oracles
    assert min(one["latency_s"]["p99"] for one in found) <= min(point["latency_s"]["p99"] for point in points) + 1e-9
    assert told in result.stdout


def test_each_model_of_a_sweep_has_its_own_foresight() -> None:
    """Twice as many GPUs for each pod: twice the cost, for nothing; without a limit of nodes they are not needed to be the bound."""
    sweeps = [last(call("--trace", TRACE, "--sweep", f"gpus={values}", "--json"))["oracle"] for values in ("1", "2", "2,1")]
    one, two, both = ([(point["settings"]["gpus"], point["cost"]) for point in found] for found in sweeps)  # type: ignore[attr-defined]
    assert two == [("2", pytest.approx(2 * one[0][1]))]
    assert both == one


def test_a_sweep_over_policies_writes_pictures_and_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = call("--trace", TRACE, "--sweep", "policy=kpa,keep-alive", "--png", str(tmp_path / "png"), "--html", str(page))
    assert result.exit_code == 0
    for name in ("front", "latency"):
        picture = (tmp_path / "png" / f"{name}.png").read_bytes()
        assert picture.startswith(PNG)
        assert len(picture) < 100_000
    text = page.read_text()
    assert "keep-alive" in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing is asked of a network
    assert "made up (seed 0)" in text


def test_one_result_has_pictures_of_load_and_pods(tmp_path: Path) -> None:
    result = call("--trace", TRACE, "--png", str(tmp_path), "--json")
    assert result.exit_code == 0
    assert (tmp_path / "timeline.png").read_bytes().startswith(PNG)
    assert isinstance(last(result)["requests"], int)


def test_a_recommendation_keeps_its_goal_and_renders_on_our_base(tmp_path: Path) -> None:
    out = tmp_path / "scale.yaml"
    settings = ["--model", "cold_start.imports=20", "--model", "service=0.5", "--model", "concurrency=4"]
    result = call(
        "recommend", "--trace", "synthetic:poisson?rps=0.05&duration=90m", "--slo", "p99=2s", *settings, "--output", str(out), "--json"
    )
    assert result.exit_code == 0
    document = last(result)
    assert document["kept"]
    annotations = document["annotations"]
    assert isinstance(annotations, dict)
    # One call in 20 s: a pod must be there, by a minimum or by staying.
    spec = ScaleSpec.parse(annotations, 4)
    assert spec.min_scale == 1 or spec.scale_to_zero_pod_retention_period_s > 60
    assert document["patch_checked"]
    assert yaml.safe_load(out.read_text())["spec"]["template"]["metadata"]["annotations"] == annotations
    assert "How sure: " in result.stdout


def test_a_goal_that_nothing_keeps_is_told_and_fails(tmp_path: Path) -> None:
    out = str(tmp_path / "scale.yaml")
    result = call("recommend", "--trace", "synthetic:poisson?duration=1h", "--slo", "p50=1ms", "--set", "max-scale=2", "--output", out)
    assert result.exit_code == 1
    assert "NOT kept" in result.stdout
    assert "How sure: low" in result.stdout


def test_what_the_caller_has_set_is_recommended_as_it_is(tmp_path: Path) -> None:
    out = str(tmp_path / "scale.yaml")
    arguments = ["--slo", "p95=10s", "--set", "min-scale=2", "--set", "window=30s", "--output", out, "--json"]
    document = last(call("recommend", "--trace", "synthetic:poisson?duration=1h", *arguments))
    annotations = document["annotations"]
    assert isinstance(annotations, dict)
    assert (annotations["autoscaling.knative.dev/min-scale"], annotations["autoscaling.knative.dev/window"]) == ("2", "30s")


def test_a_patch_that_knative_would_refuse_is_not_written() -> None:
    with pytest.raises(patch.PatchError, match=r"Knative would refuse this: .*window"):
        patch.patch({"window": "1s"}, 1, "why")


def test_a_patch_takes_effect_on_our_base() -> None:
    text = patch.patch({"min-scale": "3", "window": "5m"}, 2, "why\nand how")
    assert patch.check(text) is None
    assert text.startswith("# why\n# and how\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sweep", "window=1s", "--trace", TRACE], "window = '1s'"),
        (["--sweep", "policy=none", "--trace", TRACE], "there is no policy 'none'"),
        (["--sweep", "window=30s", "--trace", TRACE, "--trace", TRACE], "for one trace and one function"),
        (["--sweep", "window=30s", "--trace", TRACE, "--by", "median"], "--by median: must be like p99"),
        (["--sweep", "window=30s", "--trace", TRACE, "--by", "p99=2s"], "--by p99=2s: must be like p99"),
        (["--sweep", "window=30s", "--trace", TRACE, "--by", "p100"], "--by p100: must be like p99"),
        (["--trace", "synthetic:none", "--sweep", "window=30s"], "no kind 'none'"),
        (["--validate", "--trace", TRACE, "--sweep", "window=30s"], "--validate does not go with --sweep"),
        (["--validate", "--trace", TRACE, "--png", "there"], "--validate does not go with --png"),
        (["--validate", "--trace", TRACE, "--html", "page", "--horizon", "60"], "--validate does not go with --html and --horizon"),
        (["--validate", "--policy", "hpa", "--trace", TRACE], "the policy must be kpa"),
        (["--validate", "--model", "concurrency=4", "--trace", TRACE], "concurrency must be 1"),
        (["--validate", "--trace", "synthetic:poisson?rps=1000"], "needs from 1 to 20000 requests"),
        (["recommend", "--slo", "p99=2s", "--trace", TRACE, "--set", "max-scale=many"], "max-scale = 'many'"),
        (["recommend", "--slo", "p99=2s", "--trace", "synthetic:teaching"], "no request in the last 40 %"),
        (["recommend", "--slo", "p99=2s", "--trace", "absent.csv"], "absent.csv: No such file"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments: list[str], told: str) -> None:
    result = call(*arguments)
    assert result.exit_code != 0
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_a_comparison_counts_pods_at_the_times_of_the_looks() -> None:
    simulated = Run("synthetic:poisson?rps=1&duration=5m", "fixed", {"pods": "2"}).result()
    times = np.arange(0.25, 300, 0.5)
    latencies = np.full(simulated.answered, 0.1)
    same = Comparison("t", simulated, latencies, 0, times, np.full(len(times), 2.0), (0.1,), 0.001)
    assert same.pods_apart == pytest.approx(0, abs=0.01)
    assert same.holds
    other = Comparison("t", simulated, latencies, 0, times, np.full(len(times), 3.0), (0.1,), 0.001)
    assert other.pods_apart > BOUND_PODS
    assert not other.holds
    assert "MISSED" in other.table()
    assert not Comparison("t", simulated, latencies + 1, 0, times, np.full(len(times), 2.0), (0.1,), 0.001).holds
