"""What bodies of 16 MiB cost: bombs that are to be refused and large bodies that are to pass, parsed at once and parsed within bounds.

.venv/bin/python bench/bodies.py [--mib 16] [--only TEXT]

Each in a process of its own. CPU seconds of the parse or the refusal, the most memory beside the body, the longest time in which another
thread did not get to run, and what the body was said to take.
"""

import argparse
import base64
import gc
import gzip
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

from bench.common import machine  # noqa: E402  found through the line above

LIMIT_S = 60
Make = Callable[[int], bytes]


def units(unit: str, before: str = '{"instances":[', after: str = "1]}") -> Make:
    """As many of one piece of text as have room."""
    return lambda size: before.encode() + unit.encode() * ((size - 40) // len(unit.encode())) + after.encode()


def made(piece: Callable[[int], str], before: str = '{"instances":[[', after: str = "1]]}") -> Make:
    """Pieces that differ."""

    def make(size: int) -> bytes:
        parts, length, number = [before], 0, 0
        while length < size - 200:
            parts.append(piece(number))
            length += len(parts[-1].encode())
            number += 1
        return "".join([*parts, after]).encode()

    return make


def quoted(text: str) -> Make:
    return lambda size: json.dumps(
        {"instances": [(text * (size // len(json.dumps(text)) + 1))[: (size - 40) * len(text) // len(json.dumps(text))]]}
    ).encode()


def rgb(brightest: int) -> Callable[[int], str]:
    chosen = random.Random(1)
    return lambda _: f"{[chosen.randrange(brightest + 1) for _ in range(3)]},".replace(" ", "")


BARE, ONE = ("[", "1]"), ('{"instances":[[', "1]]}")
V2 = ('{"inputs":[{"name":"input","datatype":"INT32","shape":[1],"data":[', "1]}]}")
TEN_KEYS = "{" + ",".join(f'"key{key}":{key}.5' for key in range(10)) + "},"
BOMBS: dict[str, Make] = {
    "`{},`": units("{},"),
    "`{},`, a bare list": units("{},", *BARE),
    "`{},` within one input": units("{},", *ONE),
    "`{},` as V2 data": units("{},", *V2),
    "`[],`": units("[],"),
    "`[],` within one input": units("[],", *ONE),
    '`"a",`': units('"a",'),
    '`"a",` within one input': units('"a",', *ONE),
    '`"a",` as V2 data': units('"a",', *V2),
    '`"",`': units('"",'),
    '`"",` within one input': units('"",', *ONE),
    '`"1,3,",` within one input': units('"1,3,",', *ONE),
    '`"\\n",` within one input': units('"\\n",', *ONE),
    "`[[[[`": lambda size: b"[" * size,
    '`{"a":{"a":`': lambda size: b'{"a":' * (size // 5),
    "190 levels, often": units("[" * 190 + "]" * 190 + ",", *ONE),
    '`{"a":1},`': units('{"a":1},'),
    '`{"a":1},` within one input': units('{"a":1},', *ONE),
    '`{"<number>":1},` within one input': made(lambda number: f'{{"{number:x}":1}},'),
    "`[1],`": units("[1],"),
    "`[1],` within one input": units("[1],", *ONE),
    "`1,`": units("1,"),
    "`999,`": units("999,"),
}
PASSING: dict[str, Make] = {
    "`1,` within one input": units("1,", *ONE),
    "`1,` as V2 data": units("1,", *V2),
    "`999,` within one input": units("999,", *ONE),
    "image, triples of 0 to 255": made(rgb(255)),
    "1.6 million floats of 8 digits": made(lambda number: f"{number % 89 / 89:.8f},"),
    "text": quoted("The quick brown fox jumps over the lazy dog. "),
    "text of commas, brackets, quotes": quoted(',[]{}":'),
    "text with umlauts": lambda size: ('{"instances":["' + "Grüße, " * (size // 10) + '"]}').encode(),
    "text in Chinese": lambda size: ('{"instances":["' + "模型" * (size // 7) + '"]}').encode(),
    "base64": lambda size: b'{"instances":["' + base64.b64encode(random.Random(1).randbytes(size * 3 // 4 - 40)) + b'"]}',
    "1,024 objects of ten keys": lambda size: json.dumps(
        {"instances": [{f"key{key}": "x" * (size // 11_000) for key in range(10)} for _ in range(1024)]}
    ).encode(),
    "objects of ten keys, one input": made(lambda _: TEN_KEYS),
    "one object of many keys": made(lambda number: f'"key{number:06}":"value {number}",', '{"instances":[{', '"a":1}]}'),
}


def before(data: bytes) -> tuple[Any, None]:
    """As the function did it: parsed first, judged afterwards."""
    import orjson

    document = orjson.loads(data)
    if data.count(b"[") + data.count(b"{") > 200 and is_deeper(document):
        raise ValueError("too deep")
    return document, None


def is_deeper(document: Any) -> bool:
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(200):
        children = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True


class Gaps:
    """The longest time in which this thread did not get to run."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        seen = time.perf_counter()
        while not self._over:
            time.sleep(0.001)
            now = time.perf_counter()
            self.longest_s, seen = max(self.longest_s, now - seen), now

    def __enter__(self) -> "Gaps":
        self._thread.start()
        time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()


def memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def child(name: str, size: int, way: str) -> None:
    from function import bodies

    data = (BOMBS | PASSING)[name](size)
    budget = bodies.ParseBudget(16 * size, 32 * size)
    parse = before if way == "before" else lambda data: bodies.parse_json(data, budget, 1024)
    said: str = "200"
    kept: tuple[Any, Any] = (None, None)  # what is parsed stays until the memory was looked at
    gc.collect()
    gc.freeze()  # as the function does when it is ready
    Path("/proc/self/clear_refs").write_text("5")
    at_first = memory("VmRSS")
    with Gaps() as gaps:
        cpu = time.thread_time()
        try:
            kept = parse(data)
        except Exception as error:  # noqa: BLE001  what it says is the result
            said = f"{getattr(error, 'status', 400)}"
        cpu = time.thread_time() - cpu
    peak = memory("VmHWM") - at_first
    print(json.dumps([said, cpu, peak / len(data), gaps.longest_s, kept[1].size / len(data) if kept[1] else 0]))


def measure(name: str, size: int, way: str) -> list[Any]:
    command = [sys.executable, __file__, "--child", name, str(size), way]
    found: list[Any] = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout)
    return found


def small() -> str:
    import timeit

    import orjson

    from function import bodies

    data = b'{"instances":[{"a":[1,2,3],"text":"%s","b":0.25,"k":[[1.5,2.5],[3.5,4.5]]}]}' % (b"words of a text " * 8)
    parsers = {"orjson alone": orjson.loads, "before": before, "after": bodies.parse_json}
    best = dict.fromkeys(parsers, 1.0)
    for _ in range(300):  # in turn, as other work on the machine comes and goes
        for name, parse in parsers.items():
            best[name] = min(best[name], timeit.timeit(lambda parse=parse: parse(data), number=500) / 500)  # type: ignore[misc]
    rows = [f"| parse of {len(data)} bytes | µs |", "| --- | ---: |"]
    rows += [f"| {name} | {seconds * 1e6:.2f} |" for name, seconds in best.items()]
    packed = gzip.compress(b"\0" * (256 << 20), 1)
    cpu, said = time.process_time(), ""
    try:
        bodies.decompress(packed, "gzip", 16 << 20)
    except Exception as error:  # noqa: BLE001  what it says is the result
        said = str(error)
    rows += ["", f"{len(packed) / 1e6:.1f} MB of gzip that would be 256 MiB: refused after {time.process_time() - cpu:.3f} s ({said})"]
    return "\n".join(rows)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), sys.argv[4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=16)
    parser.add_argument("--only", default="", help="cases with this in their name")
    options = parser.parse_args()
    print(machine(), "\n")
    print("| body | answer | CPU s | memory, times the body | others waited ms | held then, as said |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in BOMBS | PASSING:
        if options.only in name:
            old, new = (measure(name, options.mib << 20, way) for way in ("before", "after"))
            row = [f"{old[0]} → {new[0]}", f"{old[1]:.3f} → {new[1]:.3f}", f"{old[2]:.1f} → {new[2]:.1f}"]
            print(f"| {name.replace('|', '/')} | {' | '.join(row)} | {old[3] * 1e3:.0f} → {new[3] * 1e3:.0f} | {new[4]:.1f} |", flush=True)
    print("\n" + small())


if __name__ == "__main__":
    main()
