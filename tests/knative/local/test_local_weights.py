"""What the platform sees of the node's caches, beside what the caches' own program made."""

import asyncio
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web

from knative.local.pod import Pod
from knative.local.weights import ANSWER_BYTES, SNAPSHOTS, cached, sidecars
from tests.support import fill_cache

FILES = {"model.safetensors": b"w" * 5000, "tokenizer/vocab.json": b"v" * 300}


def test_a_complete_snapshot_is_told_with_its_bytes(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path / "default" / "cache", "s3://models/minilm", FILES)
    (tmp_path / "default" / "notes").mkdir()  # a volume that is no cache
    (found,) = cached(tmp_path)
    assert found["checked_at"] > 0
    assert found == {
        "volume": "default/cache",
        "uri": "s3://models/minilm",
        "snapshot": snapshot,
        "bytes": 5300,
        "files": 2,
        "complete": True,
        "checked_at": found["checked_at"],
    }


def test_a_file_that_is_not_there_makes_a_snapshot_incomplete(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path / "default" / "cache", "s3://models/minilm", FILES)
    (tmp_path / "default" / "cache" / "snapshots" / snapshot / "model.safetensors").resolve().unlink()
    (found,) = cached(tmp_path)
    assert (found["complete"], found["bytes"]) == (False, 300)


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path / "default" / "cache", "s3://models/minilm", FILES)
    refs = tmp_path / "default" / "cache" / "refs"
    for number, text in enumerate(
        ("not JSON", "[]", '{"uri": "s3://models/other"}', "[" * 50_000, '{"uri": "' + "x" * 70_000 + '"}', "\xff")
    ):
        (refs / str(number)).write_text(text, encoding="latin-1")
    os.mkfifo(refs / "pipe")  # whoever reads it waits for ever
    assert [row["snapshot"] for row in cached(tmp_path)] == [snapshot]
    shutil.rmtree(tmp_path / "default" / "cache" / "snapshots" / snapshot)
    assert [row["complete"] for row in cached(tmp_path)] == [False]


def test_what_a_cache_says_is_json_whoever_wrote_it(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path / "default" / "cache", "s3://models/minilm", FILES)
    for number, checked in enumerate(("NaN", "Infinity", '"now"', "1e999", "12.5")):
        (tmp_path / "default" / "cache" / "refs" / str(number)).write_text(
            f'{{"uri": "u", "snapshot": "{snapshot}", "checked": {checked}}}'
        )
    found = json.loads(json.dumps(cached(tmp_path)), parse_constant=lambda sign: pytest.fail(sign))
    assert [row["checked_at"] for row in found[:5]] == [None, None, None, None, 12.5]


@pytest.mark.parametrize(
    ("snapshots", "metrics", "told"),
    [
        (b'{"snapshots": [{"uri": "u"}]}', b"# TYPE a_total counter\na_total 1\n", ([{"uri": "u"}], {"a_total": 1.0})),
        (b'{"snapshots": [1, {"bytes": NaN}, null]}', b"# TYPE a_total counter\na_total NaN\n", ([{"bytes": None}], {})),
        (b'{"snapshots": "many"}', b"", ([], {})),
        (b'{"snapshots": [' + b"{}," * 500 + b"{}]}", b"", ([{}] * SNAPSHOTS, {})),
        (b"[" * 100_000, b"", None),
        (b"x" * (ANSWER_BYTES + 1), b"", None),
        (b'{"snapshots": []}', b"\xff\xfe", None),
        (b'{"snapshots": []}', b"a{b=} c d\n", None),
    ],
    ids=["as it is", "not all of it", "something else", "too many", "too deep", "too long", "no text", "no metrics"],
)
def test_whatever_answers_at_the_port_of_a_sidecar_harms_nobody(snapshots: bytes, metrics: bytes, told: Any) -> None:
    async def answer(request: web.BaseRequest) -> web.Response:
        return web.Response(body=metrics if request.path == "/metrics" else snapshots)

    async def scenario() -> list[dict[str, Any]]:
        runner = web.ServerRunner(web.Server(answer))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        process = SimpleNamespace(is_main=False, env={"WEIGHTS_PORT": str(runner.addresses[0][1])})
        pod = SimpleNamespace(name="hello-1", phase="ready", plan=SimpleNamespace(processes=[process]))
        async with aiohttp.ClientSession() as session:
            found = await sidecars([cast(Pod, pod)], session)
        await runner.cleanup()
        return found

    expected = [{"pod": "hello-1", "snapshots": told[0], "counters": told[1]}] if told else []
    assert asyncio.run(scenario()) == expected


def test_without_volumes_there_are_none(tmp_path: Path) -> None:
    assert cached(tmp_path / "none") == []
