"""What each policy does on real traces: the tables and pictures of docs/policies.md.

    .venv/bin/python bench/policies.py --traces DIR

DIR holds azure_llm_2023_first30min.csv, aws_elb_requests_5min_days1-7.csv and servegen_rates_10min_week1.csv; docs/policies.md says
where they come from. Everything between the two marks in the document is replaced, and the pictures in docs/policies too.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

from matplotlib.figure import Figure  # noqa: E402  found through the line above

from knative.simulator import plots  # noqa: E402
from knative.simulator.result import Result  # noqa: E402
from knative.simulator.runs import Run, results  # noqa: E402
from knative.simulator.slo import Slo  # noqa: E402
from knative.simulator.sweep import Point, pareto  # noqa: E402
from knative.simulator.tables import markdown, seconds  # noqa: E402

DOCUMENT, PICTURES = ROOT / "docs/policies.md", ROOT / "docs/policies"
BEGIN, END = "<!-- made by `make policies`, from here -->", "<!-- to here -->"
BY = Slo.parse("p99=1s")  # the percentile of the pictures
SEED = 1

# One GPU a pod, one request at a time, loading as slow as a real diffusion service's: p50 22.7 s, p99 52 s.
LARGE = ("concurrency=1", "cold_start.imports=3", "cold_start.load=lognormal(p50=22.7, p99=52)")
BY_TOKENS = (*LARGE, "service=tokens(prefill=8000, decode=100)")
BY_CHANCE = (*LARGE, "service=lognormal(p50=1.5, p99=6)")
SMALL = ("concurrency=1",)  # the demo's cold start, 1.4 s

STAY = {"scale-down-delay": "15m", "scale-to-zero-pod-retention-period": "15m"}
MOST = {"max-scale": "{most}"}  # of the case
POLICIES: dict[str, tuple[str, dict[str, str]]] = {
    "kpa": ("kpa", {}),
    "kpa, max {most}": ("kpa", MOST),
    "kpa, max {most}, min 1": ("kpa", MOST | {"min-scale": "1"}),
    "kpa, max {most}, stay 15 min": ("kpa", MOST | STAY),
    "hpa": ("hpa", {}),
    "keda-queue": ("keda-queue", {}),
    "keda-http": ("keda-http", {}),
    "keep-alive": ("keep-alive", {}),
    "rps-step": ("rps-step", {}),
    "hybrid-histogram": ("hybrid-histogram", {}),
    "schedule": ("schedule", {}),
    "oracle": ("oracle", {}),
}


@dataclass(frozen=True)
class Case:
    """A trace, and what it is."""

    key: str
    title: str
    file: str
    function: str | None
    model: tuple[str, ...]
    most: int = 20

    def run(self, traces: Path, name: str) -> Run:
        policy, asked = POLICIES[name]
        knobs = {knob: self.shown(value) for knob, value in asked.items()}
        trace = self.file if self.file.startswith("synthetic:") else str(traces / self.file)
        history = trace if policy == "schedule" else None
        return Run(trace, policy, knobs, self.model, self.function, SEED, history=history, history_seed=SEED + 1)

    def shown(self, text: str) -> str:
        return text.replace("{most}", str(self.most))


AZURE, ELB, SERVEGEN = "azure_llm_2023_first30min.csv", "aws_elb_requests_5min_days1-7.csv", "servegen_rates_10min_week1.csv"
CASES = (
    Case("code", "Azure `code`, 30 minutes: bursts, and minutes of silence", AZURE, "code", BY_TOKENS),
    Case("conv", "Azure `conv`, 30 minutes: steady", AZURE, "conv", BY_TOKENS),
    Case("elb", "AWS load balancer, a week: days and nights, rushes", ELB, None, BY_CHANCE),
    Case("seldom", "ServeGen `m-mid/chunk-50`, a week: seldom called", SERVEGEN, "m-mid/chunk-50", BY_CHANCE),
    Case("rushes", "ServeGen `m-large/chunk-57`, a week: always a little, and rushes", SERVEGEN, "m-large/chunk-57", BY_CHANCE),
    Case("shifts", "ServeGen `m-mid/chunk-44`, a week: much for hours, then nothing", SERVEGEN, "m-mid/chunk-44", BY_CHANCE, most=60),
)
TEACHING = Case("teaching", "50 requests of 0.2 s within 5 s, then 5 of 30 s", "synthetic:teaching", None, SMALL)
DAY_S = 86_400.0


def row(name: str, result: Result, on_front: bool) -> list[str]:
    lost = result.timed_out + result.rejected + result.failed
    shown = f"**{name}**" if on_front else name
    return [
        shown,
        f"{result.cost / result.horizon_s * DAY_S:.2f}",
        *(seconds(result.latency_s[quantile]) for quantile in ("p50", "p95", "p99")),
        f"{result.cold_start_share:.2%}",
        f"{lost}",
        f"{result.peak_pods}",
        f"{result.utilisation:.0%}",
        f"{result.flaps}",
    ]


HEAD = ("", "cost a day", "p50", "p95", "p99", "cold", "lost", "most pods", "busy", "flaps")


def section(case: Case, found: dict[str, Result]) -> str:
    bound = found["oracle"]
    others = [name for name in found if name != "oracle"]
    front = pareto([(found[name].cost, BY.latency_s(found[name])) for name in others])
    points = [
        Point({"policy": case.shown(name)}, found[name], BY.latency_s(found[name]), on_front=at in front) for at, name in enumerate(others)
    ]
    oracle = Point({"policy": "oracle"}, bound, BY.latency_s(bound))
    write(f"{case.key}.png", plots.pareto(points, [oracle], BY.name, case.title.replace("`", "")))
    table = markdown(
        HEAD, [row(point.settings["policy"], point.result, point.on_front) for point in points] + [row("oracle", bound, False)]
    )
    return f"### {case.title}\n\n{bound.requests} requests.\n\n{table}\n\n![Cost and p99 of each policy.](policies/{case.key}.png)"


def teaching(found: dict[str, Result]) -> str:
    names = ("rps-step", "kpa", "keep-alive", "oracle")
    write("rps-step.png", plots.timeline(found["rps-step"], "rps-step: 50 short requests, then 5 long ones"))
    table = markdown(HEAD, [row(name, found[name], False) for name in names])
    picture = "![Requests and pods under rps-step: pods go while they are needed.](policies/rps-step.png)"
    return f"### {TEACHING.title}\n\n{table}\n\n{picture}"


def write(name: str, figure: Figure) -> None:
    data = plots.png(figure, dpi=90)
    assert len(data) <= 100_000, f"{name} has {len(data)} bytes"
    (PICTURES / name).write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    traces = parser.parse_args().traces
    if missing := [file for file in (AZURE, ELB, SERVEGEN) if not (traces / file).is_file()]:
        raise SystemExit(f"{traces}: {', '.join(missing)} not there; docs/policies.md says where they come from")
    wanted = [(case, name) for case in CASES for name in POLICIES]
    wanted += [(TEACHING, name) for name in ("rps-step", "kpa", "keep-alive", "oracle")]
    made = results([case.run(traces, name) for case, name in wanted], lambda: print(".", end="", file=sys.stderr, flush=True))
    print(file=sys.stderr)
    by_case: dict[str, dict[str, Result]] = {}
    for (case, name), result in zip(wanted, made, strict=True):
        by_case.setdefault(case.key, {})[name] = result
    document(by_case)


def document(found: dict[str, dict[str, Result]]) -> None:
    """Put the tables into the document; `found`: by case and by policy."""
    PICTURES.mkdir(exist_ok=True)
    parts = [section(case, found[case.key]) for case in CASES] + [teaching(found[TEACHING.key])]
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}")


if __name__ == "__main__":
    main()
