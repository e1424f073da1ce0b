"""The command line against recordings of Knative's own autoscaler, and against files that are not what they should be."""

import csv
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knative.autoscaler import ReplayError, ScaleSpec, SpecError
from knative.autoscaler.__main__ import main
from knative.autoscaler.replay import OUTPUT_COLUMNS, Sample, read_samples, read_spec, replay, write_rows

STEADY = settings(derandomize=True, deadline=None, max_examples=100)

DATA = Path(__file__).parent / "data"
CASES = sorted(path.name.removesuffix(".spec.json") for path in DATA.glob("*.spec.json"))


@pytest.mark.parametrize("case", CASES)
def test_a_replay_decides_as_knative_did(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(DATA / f"{case}.input.csv"), "--spec", str(DATA / f"{case}.spec.json")]) == 0
    got = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    want = list(csv.DictReader(io.StringIO((DATA / f"{case}.expected.csv").read_text())))
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert list(ours) == list(theirs) == list(OUTPUT_COLUMNS)
        for column in OUTPUT_COLUMNS:
            if column in ("stable", "panic_value") and theirs[column]:
                assert float(ours[column]) == pytest.approx(float(theirs[column]), abs=1e-6), theirs
            else:
                assert ours[column] == theirs[column], theirs


def test_the_cases_are_there() -> None:
    assert len(CASES) == 14


def rows(spec: ScaleSpec, samples: list[Sample], initial_ready: int = 0) -> list[tuple[float, str, int | None]]:
    return [(row.t, row.kind, row.decision.desired if row.decision else None) for row in replay(spec, samples, initial_ready)]


ONE_EACH = ScaleSpec(target=1, total=1)


def test_ticks_run_every_two_seconds_to_the_end_of_the_input() -> None:
    assert rows(ONE_EACH, [Sample(0, concurrency=1), Sample(5, concurrency=1)]) == [(0, "tick", 1), (2, "tick", 1), (4, "tick", 1)]


def test_ticks_before_the_first_sample_have_no_data() -> None:
    assert rows(ONE_EACH, [Sample(3.5, concurrency=2), Sample(4)]) == [(0, "tick", None), (2, "tick", None), (4, "tick", 2)]


def test_a_request_at_the_activator_pokes_in_between() -> None:
    samples = [Sample(0, activator=0), Sample(1, activator=2), Sample(1.5, activator=2)]
    assert rows(ONE_EACH, samples) == [(0, "tick", 0), (1, "poke", 1)]


def test_a_sample_from_the_pods_does_not_poke() -> None:
    assert rows(ONE_EACH, [Sample(0, concurrency=0), Sample(1, concurrency=2)]) == [(0, "tick", 0)]


def test_pods_and_activator_are_added_up() -> None:
    assert rows(ONE_EACH, [Sample(0, concurrency=2, activator=1)]) == [(0, "tick", 3)]


def test_ready_pods_stay_as_they_are_until_told_otherwise() -> None:
    samples = [Sample(0, ready=3), Sample(2), Sample(4, ready=0)]
    assert [row.ready for row in replay(ONE_EACH, samples, initial_ready=1)] == [3, 3, 0]


def test_no_samples_make_no_rows() -> None:
    assert rows(ONE_EACH, []) == []


def test_a_spec_for_another_class_is_refused_before_any_row() -> None:
    with pytest.raises(SpecError):
        replay(ScaleSpec(autoscaler_class="hpa.autoscaling.knative.dev"), [])


SAMPLES = st.lists(
    st.builds(
        Sample,
        t=st.integers(0, 400).map(lambda n: n / 4),
        concurrency=st.none() | st.floats(0, 100),
        activator=st.none() | st.sampled_from([0.0, 0.5, 7.0]),
        rps=st.none() | st.floats(0, 100),
        ready=st.none() | st.integers(0, 10),
    ),
    max_size=60,
).map(lambda samples: sorted(samples, key=lambda sample: sample.t))


@STEADY
@given(SAMPLES, st.sampled_from(["linear", "weighted-exponential"]), st.integers(0, 60))
def test_a_replay_depends_on_nothing_but_the_past(samples: list[Sample], algorithm: str, kept: int) -> None:
    spec = ScaleSpec.parse({"window": "10s", "scale-down-delay": "8s", "metric-aggregation-algorithm": algorithm}, 2)
    whole = list(replay(spec, samples))
    assert list(replay(spec, samples)) == whole
    begun = list(replay(spec, samples[:kept]))
    last = max((sample.t for sample in samples[:kept]), default=-1.0)
    # At the last sample's own time more samples might follow.
    assert [row for row in begun if row.t < last] == [row for row in whole if row.t < last]


@STEADY
@given(SAMPLES)
def test_rows_survive_being_written_and_read(samples: list[Sample]) -> None:
    out = io.StringIO()
    made = list(replay(ScaleSpec(stable_window_s=6, panic_window_s=1), samples))
    write_rows(made, out)
    read = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert [float(row["t"]) for row in read] == [row.t for row in made]
    assert [row["valid"] for row in read] == ["false" if row.decision is None else "true" for row in made]
    for text, row in zip(read, made, strict=True):
        assert row.decision is None or float(text["stable"]) == row.decision.stable
        assert row.decision or not any(text[column] for column in ("stable", "panic_value", "desired", "ebc", "bounded"))


BAD_INPUTS = [
    pytest.param("", "line 1: there is no column 't'", id="empty"),
    pytest.param("concurrency\n1\n", "line 1: there is no column 't'", id="no time"),
    pytest.param("t,cpu\n0,1\n", "line 1: unknown column 'cpu'; known are t, concurrency, activator, rps, ready", id="unknown column"),
    pytest.param("t,rps,rps\n0,1,1\n", "line 1: column 'rps' is there twice", id="column twice"),
    pytest.param("t,rps\n0,many\n", "line 2: rps = 'many', must be a finite number", id="not a number"),
    pytest.param("t,rps\n0,nan\n", "line 2: rps = 'nan', must be a finite number", id="nan"),
    pytest.param("t,rps\n0,1\n\n1,1e999\n", "line 4: rps = '1e999', must be a finite number", id="infinite"),
    pytest.param("t,rps\n0,1\n,1\n", "line 3: t is empty", id="time empty"),
    pytest.param("t,rps\n0,1\n1\n", "line 3: expected 2 cells, got 1", id="cell missing"),
    pytest.param("t,rps\n0,1,2\n", "line 2: expected 2 cells, got 3", id="cell too many"),
    pytest.param("t\n5\n4\n", "line 3: t = 4 goes back from 5", id="time goes back"),
    pytest.param("t\n-1\n", "line 2: t = '-1', must be seconds from the start, from 0 to 31622400", id="negative time"),
    pytest.param("t\n1700000000\n", "line 2: t = '1700000000', must be seconds from the start, from 0 to 31622400", id="a date"),
    pytest.param("t,ready\n0,1.5\n", "line 2: ready = '1.5', must be a whole number from 0 to 2147483647", id="half a pod"),
    pytest.param("t,ready\n0,-1\n", "line 2: ready = '-1', must be a whole number from 0 to 2147483647", id="minus one pod"),
    pytest.param('t\n"0\n', "line 2: not CSV: unexpected end of data", id="open quote"),
]


@pytest.mark.parametrize(("text", "problem"), BAD_INPUTS)
def test_a_bad_input_file_is_refused_with_its_line(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "input.csv"
    path.write_text(text)
    with pytest.raises(ReplayError) as caught:
        read_samples(path)
    assert str(caught.value) == f"{path}, {problem}"


BAD_SPECS = [
    pytest.param("{", "not JSON: ", id="not JSON"),
    pytest.param("[" * 100_000, "not JSON: maximum recursion depth exceeded", id="deeper than any spec"),
    pytest.param("[]", "expected a JSON object, got list", id="a list"),
    pytest.param('{"annotation": {}}', "unknown key 'annotation'; known are container_concurrency, annotations", id="unknown key"),
    pytest.param('{"annotations": []}', "annotations must be a JSON object of names and strings, got list", id="annotations a list"),
    pytest.param('{"annotations": {"min-scale": 1}}', "min-scale = 1, must be a string: put it in quotes", id="not a string"),
    pytest.param('{"annotations": {"window": "1s"}}', "window = '1s', must be a duration from 6s to 1h, in whole seconds", id="bad value"),
    pytest.param('{"container_concurrency": "1"}', "containerConcurrency = '1', must be a whole number from 0 to 1000", id="bad limit"),
    pytest.param('{"initial_ready": -1}', "initial_ready = -1, must be a whole number from 0 to 2147483647", id="bad ready count"),
    pytest.param('{"config_autoscaler": {"x": "1"}}', "config-autoscaler: x = '1', there is no such setting", id="unknown setting"),
]


@pytest.mark.parametrize(("text", "problem"), BAD_SPECS)
def test_a_bad_spec_file_is_refused_with_the_reason(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(text)
    with pytest.raises(ReplayError) as caught:
        read_spec(path)
    assert str(caught.value).startswith(f"{path}: {problem}")


def test_an_empty_spec_is_knatives_defaults(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    for text in ("{}", '{"initial_ready": 0}'):
        path.write_text(text)
        assert read_spec(path) == (ScaleSpec(), 0)


def test_a_spec_file_has_all_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(
        '{"annotations": {"min-scale": "2"}, "container_concurrency": 10, "config_autoscaler": {"max-scale": "9"}, "initial_ready": 4}'
    )
    assert read_spec(path) == (ScaleSpec(min_scale=2, max_scale=9, target=7, total=10), 4)


def test_several_samples_may_have_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "input.csv"
    path.write_text("t,concurrency\n0.5,1\n0.5,2\n")
    assert read_samples(path) == [Sample(0.5, concurrency=1), Sample(0.5, concurrency=2)]


def test_a_byte_order_mark_and_windows_line_ends_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "input.csv"
    path.write_bytes(b"\xef\xbb\xbft,rps\r\n0,1\r\n1,\r\n")
    assert read_samples(path) == [Sample(0, rps=1), Sample(1)]


@pytest.mark.parametrize("which", ["input", "spec"])
@pytest.mark.parametrize(
    ("content", "problem"), [(None, "No such file or directory"), (b"t\n\xff\n", "not UTF-8: invalid start byte at byte 2")]
)
def test_a_file_that_cannot_be_read_is_one_line_on_stderr_and_status_2(
    which: str, content: bytes | None, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"input": tmp_path / "input.csv", "spec": tmp_path / "spec.json"}
    files["input"].write_text("t\n0\n")
    files["spec"].write_text("{}")
    if content is None:
        files[which].unlink()
    else:
        files[which].write_bytes(content)
    assert main(["replay", str(files["input"]), "--spec", str(files["spec"])]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"knative.autoscaler: {files[which]}: {problem}\n"
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [[], ["replay"], ["replay", "input.csv"], ["replay", "--spec", "spec.json"], ["play", "input.csv"]])
def test_a_command_line_that_is_not_understood_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_module_runs_as_a_program_and_keeps_quiet_when_its_reader_leaves() -> None:
    case = DATA / "short-window"
    command = [sys.executable, "-m", "knative.autoscaler", "replay", f"{case}.input.csv", "--spec", f"{case}.spec.json"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        run = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(write_end)
    assert (run.returncode, run.stderr) == (0, "")


def test_an_average_of_minus_zero_is_printed_as_0() -> None:
    out = io.StringIO()
    write_rows(replay(ONE_EACH, [Sample(0, concurrency=-0.0)]), out)
    assert "-0" not in out.getvalue().splitlines()[1].split(",")
    assert math.copysign(1, float(out.getvalue().splitlines()[1].split(",")[3])) == 1
