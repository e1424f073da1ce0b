"""How long the simulator takes, and how much memory: one core, one process for each case.

1. A million requests of one function under the KPA, in three kinds of traffic.
2. A week of traffic by day and night, streamed: the memory that it takes beyond a trace of an hour.
3. A hundred functions that share GPUs for a day of rate-window traces: ServeGen's clients, a day of the week each, sampled.

    .venv/bin/python bench/simulator.py --rates ../shared/traces/servegen_rates_10min_week1.csv
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # and not this folder, whose platform.py would be found in place of Python's own

import argparse  # noqa: E402
import csv  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

from bench.common import machine  # noqa: E402
from knative.simulator import Function, make_policy, read_model, simulate, simulate_many  # noqa: E402
from knative.simulator.traces import open_trace  # noqa: E402

DAY_S = 86_400.0
RATES = ROOT.parent / "shared/traces/servegen_rates_10min_week1.csv"
MILLION = {
    "steady, 20 a second": "synthetic:poisson?rps=20&duration=50000",
    "steady, 2 a second": "synthetic:poisson?rps=2&duration=500000",
    "bursts of 500 each quarter of an hour": "synthetic:bursts?rps=0.01&every=900&size=500&over=10&duration=1770000",
}
MODEL = ("service=exponential(mean=0.4)", "concurrency=4")
WEEK = "synthetic:diurnal?rps=1.65&duration=604800"
# A model of many gigabytes: its load times are those of a diffusion service (p50 22.7 s, p99 52 s).
LARGE = ("service=lognormal(p50=2, p99=20)", "concurrency=8", "batch_slowdown=0.05", "cold_start.load=lognormal(p50=22.7, p99=52)")
NODES = ("nodes.count=16", "nodes.gpus=8")
FUNCTIONS = 100


def million(traffic: str) -> dict[str, Any]:
    model, _ = read_model(MODEL)
    result = simulate(open_trace(MILLION[traffic]), model, make_policy("kpa", {}, model), seed=1)
    return {"requests": result.requests, "simulated_s": result.horizon_s, "p99_s": result.latency_s["p99"]}


def week(seconds: str) -> dict[str, Any]:
    model, _ = read_model(MODEL)
    trace = open_trace(WEEK)
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = simulate(trace, model, make_policy("kpa", {}, model), seed=1, horizon_s=float(seconds))
    return {"requests": result.requests, "grown_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun) / 1024}


def hundred(rates: str) -> dict[str, Any]:
    model, nodes = read_model((*LARGE, *NODES))
    with Path(rates).open() as file:
        names = list(dict.fromkeys(row["client"] for row in csv.DictReader(file)))
    functions = []
    for number in range(FUNCTIONS):
        day, name = number // len(names) % 7, names[number % len(names)]
        trace = open_trace(rates, function=name, seed=number).part(day * DAY_S, (day + 1) * DAY_S)
        functions.append(Function(f"{number}", trace, model, make_policy("kpa", {"max-scale": "16"}, model)))
    whole = simulate_many(functions, seed=1, nodes=nodes, span_s=DAY_S).total
    return {
        "requests": whole.requests,
        "p50_s": whole.latency_s["p50"],
        "p99_s": whole.latency_s["p99"],
        "timed_out": whole.timed_out,
        "peak_pods": whole.peak_pods,
        "gpu_hours": whole.gpu_hours,
    }


CASES: dict[str, Callable[[str], dict[str, Any]]] = {"million": million, "week": week, "hundred": hundred}


def measure(case: str, about: str) -> dict[str, Any]:
    """What a case finds, with the time and the memory that it took in a process of its own."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, __file__, "--case", case, about], stdout=subprocess.PIPE, text=True, check=True)
    print(f"{case} {about}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def child(case: str, about: str) -> None:
    began, cpu = time.monotonic(), time.process_time()
    found = CASES[case](about)
    found |= {
        "wall_s": time.monotonic() - began,
        "cpu_s": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=Path, default=RATES, help="ServeGen's rates by client and window; left out where it is not there")
    parser.add_argument("--case", nargs=2, metavar=("CASE", "ABOUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if arguments.case:
        child(*arguments.case)
        return
    print("| one function, a million requests, KPA | simulated | CPU seconds (elapsed) | requests per CPU second | peak memory |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for traffic in MILLION:
        found = measure("million", traffic)
        speed, days = found["requests"] / found["cpu_s"], found["simulated_s"] / DAY_S
        print(
            f"| {traffic} ({found['requests']:,}) | {days:.1f} days | {found['cpu_s']:.1f} ({found['wall_s']:.1f}) | {speed:,.0f} "
            f"| {found['peak_mib']:.0f} MiB |"
        )
    print()
    print("| by day and night, KPA | requests | CPU seconds | memory beyond the start |\n| --- | ---: | ---: | ---: |")
    for span, seconds in (("13 hours, to noon of the first day", "46800"), ("a week", "604800")):
        found = measure("week", seconds)
        print(f"| {span} | {found['requests']:,} | {found['cpu_s']:.1f} | {found['grown_mib']:.1f} MiB |")
    print()
    if arguments.rates.exists():
        found = measure("hundred", str(arguments.rates))
        print(f"| {FUNCTIONS} functions, a day, 128 GPUs on 16 nodes, KPA | |\n| --- | ---: |")
        print(f"| CPU seconds (elapsed) | {found['cpu_s']:.0f} ({found['wall_s']:.0f}) |\n| requests | {found['requests']:,} |")
        print(f"| peak memory | {found['peak_mib']:.0f} MiB |\n| pods at most | {found['peak_pods']} |")
        print(f"| GPU-hours | {found['gpu_hours']:,.0f} |\n| latency p50, p99 | {found['p50_s']:.1f} s, {found['p99_s']:.1f} s |")
        print(f"| timed out | {found['timed_out']:,} |\n")
    print(f"{machine()}.")


if __name__ == "__main__":
    main()
