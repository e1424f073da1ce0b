"""Every format of a trace is read for what it says, sampled where it says little, and refused with a line where it is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from knative.simulator.trace import CHUNK, Arrivals
from knative.simulator.traces import BadTrace, OpenTrace, open_trace
from knative.simulator.traces.windows import GAMMA, WEIBULL, Window, sampled

DATA = Path(__file__).parent / "data"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(*lines: str, name: str = "trace") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return make


def whole(trace: OpenTrace) -> Arrivals:
    """All of a trace at once."""
    return Arrivals._make(np.concatenate(columns) for columns in zip(*trace, strict=True))


def test_the_published_azure_trace_is_read_as_it_is() -> None:
    found = whole(open_trace(DATA / "azure_published.csv"))
    assert found.t_s[:3].tolist() == [0.0, pytest.approx(4.314579), pytest.approx(4.541877)]
    assert (found.prompt_tokens[0], found.output_tokens[0]) == (374, 44)
    assert np.isnan(found.service_s).all()


@pytest.mark.parametrize(("function", "requests"), [(None, 40), ("conv", 32), ("code", 8)])
def test_a_service_of_an_azure_trace_can_be_taken_alone(function: str | None, requests: int) -> None:
    trace = open_trace(DATA / "azure_merged.csv", function=function)
    assert len(whole(trace).t_s) == requests
    assert trace.notes == ()


def test_counts_are_kept_to_the_request_and_an_unknown_window_is_no_silence() -> None:
    """The row at 41400 is missing: the clock passes over it."""
    trace = open_trace(DATA / "elb_counts.csv", seed=1)
    found = np.bincount((whole(trace).t_s // 300).astype(int), minlength=20)
    wanted = [int(line.split(",")[1]) for line in (DATA / "elb_counts.csv").read_text().splitlines()[1:]]
    assert found.tolist() == wanted
    assert trace.duration_s == 20 * 300
    assert any("sampled (seed 1)" in note for note in trace.notes)
    assert any("300 s of missing windows are unknown" in note for note in trace.notes)


def test_the_rates_of_servegens_clients_are_sampled() -> None:
    trace = open_trace(DATA / "servegen_rates.csv", function="m-small/chunk-7", seed=2)
    times = whole(trace).t_s
    assert not ((times >= 600) & (times < 1800)).any()  # two windows without traffic
    assert 400 < len(times) < 760  # 543 were measured
    assert trace.duration_s == 7200
    assert any("sampled (seed 2)" in note for note in trace.notes)


def test_all_clients_together_are_each_clients_requests() -> None:
    def times(function: str | None) -> list[float]:
        return list(whole(open_trace(DATA / "servegen_rates.csv", function=function, seed=3)).t_s)

    assert times(None) == sorted(times("m-small/chunk-7") + times("m-mid/chunk-100"))


def test_a_prometheus_export_is_a_rate_in_steps_and_nan_is_unknown() -> None:
    trace = open_trace(DATA / "prometheus.json", function="service=minilm", seed=4)
    assert trace.duration_s == 60  # the values of 30, 45, 75 and 90 s
    counts = np.bincount((whole(trace).t_s // 15).astype(int), minlength=4)
    assert counts[0] == pytest.approx(30, abs=25)
    assert counts[3] == 0
    assert any("15 s without a value are unknown" in note for note in trace.notes)
    assert len(whole(open_trace(DATA / "prometheus.json", seed=4)).t_s) > counts.sum()


def test_a_functions_log_tells_when_requests_came_and_what_they_cost() -> None:
    """Five answers; the caller's two mistakes are left out, and other lines too."""
    found = whole(open_trace(DATA / "function.log"))
    assert found.t_s.tolist() == pytest.approx([0.0, 0.110, 0.321, 0.630, 1.039], abs=0.002)
    assert found.service_s[0] == pytest.approx(0.00071 - 0.000233)


def test_requests_of_a_log_are_put_in_order_of_their_coming(write: Write) -> None:
    def line(second: int, total_s: float, **more: object) -> str:
        return json.dumps({"time": f"2026-01-01T00:00:{second:02}.000+00:00", "status": 200, "total_s": total_s, **more})

    found = whole(open_trace(write(line(10, 1.0), line(20, 15.0), line(21, 0.5, status=503), line(40, 30.0, first_piece_s=2.0))))
    assert found.t_s.tolist() == [0.0, 4.0, 15.5, 33.0]
    assert found.service_s.tolist() == [15.0, 1.0, 15.0, 30.0]  # what was refused costs what the one before cost


def test_a_long_log_is_handed_over_in_chunks_and_in_order(tmp_path: Path) -> None:
    total_s = np.random.default_rng(5).uniform(0.1, 30.0, 3 * CHUNK)
    with (tmp_path / "log").open("w") as file:
        for at, total in enumerate(total_s):
            file.write(
                f'{{"time":"2026-01-01T{at // 36000:02}:{at // 600 % 60:02}:{at / 10 % 60:06.3f}","status":200,"total_s":{total}}}\n'
            )
    chunks = list(open_trace(tmp_path / "log"))
    assert len(chunks) > 1
    times = np.concatenate([chunk.t_s for chunk in chunks])
    assert len(times) == 3 * CHUNK
    assert (np.diff(times) >= 0).all()


@pytest.mark.parametrize("spec", ["poisson", "bursts", "onoff", "diurnal?duration=1d", "teaching"])
def test_made_up_traffic_is_the_same_for_the_same_seed(spec: str) -> None:
    first, again, other = (whole(open_trace(f"synthetic:{spec}", seed=seed)).t_s for seed in (7, 7, 8))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
    assert (np.diff(first) >= 0).all()


def test_the_teaching_case_is_a_rush_of_short_requests_and_then_a_few_long_ones() -> None:
    found = whole(open_trace("synthetic:teaching?long=1m"))
    assert (found.t_s[:50] <= 5).all()
    assert found.t_s[50:].tolist() == [15.0, 25.0, 35.0, 45.0, 55.0]
    assert found.service_s.tolist() == [0.2] * 50 + [60.0] * 5


def test_a_poisson_process_has_its_rate() -> None:
    found = whole(open_trace("synthetic:poisson?rps=20&duration=1h"))
    assert len(found.t_s) == pytest.approx(72_000, rel=0.03)
    assert found.t_s[-1] < 3600


@pytest.mark.parametrize("pattern", [GAMMA, WEIBULL])
@pytest.mark.parametrize("cv", [0.0, 0.4, 1.0, 3.0])
def test_sampled_gaps_have_the_rate_and_the_cv_that_were_measured(pattern: str, cv: float) -> None:
    chunks = sampled([Window(600.0, 20_000.0, 5.0, cv=cv, pattern=pattern)], seed=1)
    times = np.concatenate([chunk.t_s for chunk in chunks])
    gaps = np.diff(times)
    assert times[0] >= 600
    assert times[-1] < 20_600
    assert len(times) == pytest.approx(100_000, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.12 * cv + 1e-9)


def test_short_windows_have_the_right_number_of_uneven_requests_on_average() -> None:
    """A gap that began with each window would give (CV² - 1) / 2 requests too many or too few in each."""
    windows = [Window(10.0 * at, 10.0, 0.5, cv=3.0, pattern=WEIBULL) for at in range(4000)]
    assert sum(len(chunk.t_s) for chunk in sampled(windows, seed=1)) == pytest.approx(20_000, rel=0.08)


def test_a_part_of_a_trace_starts_at_zero() -> None:
    trace = open_trace(DATA / "azure_merged.csv")
    found = whole(trace.part(77.0, 77.4))
    assert found.t_s.tolist() == pytest.approx([0.299, 0.311, 0.351, 0.398])
    assert found.prompt_tokens.tolist() == [4808, 846, 3180, 110]
    assert trace.span_s() == 78.315


AZURE = "t_s,service,context_tokens,generated_tokens"
SERVEGEN = "client,t_s,rate_rps,cv,pattern,arg1,arg2"
LOG = '{"time":"2026-01-01T00:00:10","status":200,"total_s":1}'


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        pytest.param(["a,b", "1,2"], "in no known format: it begins with 'a,b'", id="unknown"),
        pytest.param([""], "in no known format", id="empty"),
        pytest.param([AZURE, "0,code,1,2", "1,code,x,2"], "line 3: context_tokens = 'x', must be a whole number", id="a word for a number"),
        pytest.param([AZURE, "5,code,1,2", "1,code,1,2"], "line 3: goes back in time, by 4 s", id="not sorted"),
        pytest.param([AZURE, "nan,code,1,2"], "line 2: t_s = 'nan', must be a finite number", id="nan"),
        pytest.param([AZURE, "0,code,1"], "line 2: expected 4 cells", id="cells missing"),
        pytest.param(["TIMESTAMP,ContextTokens,GeneratedTokens", "yesterday,1,2"], "line 2: TIMESTAMP = 'yesterday'", id="not a date"),
        pytest.param(["t_s,requests", "0,1", "0,2"], "line 3: t_s = 0, must be later than the row before", id="a window twice"),
        pytest.param(["t_s,requests", "0,1"], "needs two rows at least", id="one window"),
        pytest.param(["t_s,requests", "0,-1"], "line 2: requests = '-1'", id="a negative count"),
        pytest.param([SERVEGEN, "a,0,1,1,Pareto,0,0"], "line 2: pattern = 'Pareto', must be Gamma, Weibull or empty", id="pattern"),
        pytest.param([SERVEGEN, "a,0,9e9,1,,0,0", "a,600,1,1,,0,0"], "line 2: rate_rps = 9e+09, must be at most", id="an absurd rate"),
        pytest.param([LOG, LOG.replace("10", "01")], "line 2: goes back in time", id="logs of two pods"),
        pytest.param([LOG, LOG.replace("200", '"good"')], "line 2: not a request as a function logs it", id="a line of something else"),
        pytest.param([LOG.replace("200", "404")], "there is no request in it", id="nothing but mistakes"),
        pytest.param(['{"status":"success","data":{"resultType":"vector","result":[]}}'], "must be 'matrix'", id="an instant query"),
        pytest.param(['{"status":"error","data":{"resultType":"matrix"}, "error":"bad"}'], "not a successful answer", id="a refused query"),
        pytest.param(['{"status":"success","data":{"resultType":"matrix","result":['], "not JSON", id="cut"),
        pytest.param(
            ['{"status":"success","data":{"resultType":"matrix","result":[{"metric":{},"values":[[0,"1"],[15,"9e9"]]}]}}'],
            "ask for a rate",
            id="a counter",
        ),
    ],
)
def test_a_bad_file_is_told_in_one_line(write: Write, lines: list[str], told: str) -> None:
    path = write(*lines)
    with pytest.raises(BadTrace) as caught:
        whole(open_trace(path))
    assert str(caught.value).startswith(str(path))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "function", "told"),
    [
        (DATA / "azure_merged.csv", "chat", "no function 'chat'; it has conv, code"),
        (DATA / "elb_counts.csv", "elb", "no function 'elb'; it has one, which has no name"),
        (DATA / "absent.csv", None, "No such file"),
        (DATA, None, "Is a directory"),
        ("synthetic:poison", None, "no kind 'poison'; there are poisson, bursts"),
        ("synthetic:poisson?rate=1", None, "poisson has no setting 'rate'; it has rps, duration"),
        ("synthetic:poisson?rps=-1", None, "rps = '-1', must be a number"),
        ("synthetic:bursts?over=0", None, "over = 0, must be more than 0"),
        ("synthetic:diurnal?swing=2", None, "swing = 2, must be from 0 to 1"),
        ("synthetic:poisson", "a", "no functions to choose 'a' from"),
    ],
)
def test_what_is_not_there_is_told(path: Path | str, function: str | None, told: str) -> None:
    with pytest.raises(BadTrace, match=told.replace("?", r"\?")):
        whole(open_trace(path, function=function))
