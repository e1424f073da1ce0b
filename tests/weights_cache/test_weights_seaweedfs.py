"""Against SeaweedFS, a store that checks signatures: what a person pushes is what they pull, and what is said when it is refused."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support import BIN, ROOT, wait_until
from tests.weights_cache.conftest import noise
from tests.weights_cache.stores import Bucket, Fault, Proxy, Seaweed
from weights_cache.cache import NodeCache, snapshot_id
from weights_cache.errors import CacheError, ObjectChanged, StoreError
from weights_cache.fetch import Puller
from weights_cache.store import Store
from weights_cache.uri import WeightsUri

MIB = 1 << 20
# Names that a file may have and that this store keeps as they are.
NAMES = [
    "重み",
    "ünï-é",
    "e\u0301 decomposed",
    "🚀",
    "\u202eright to left",
    "\ufffe",
    "with space",
    " spaces around ",
    "100%",
    "%2e%2e",
    "a%2Fb",
    "a%20b",
    "a+b",
    "a+b c&d=e",
    "#hash?",
    "quote'\"",
    "<x>&amp;",
    "$(x);`y`",
    "new\nline",
    "tab\there",
    "\x01\x7f",
    "-rf",
    "~",
    "*",
    "...",
    "..a",
    "a..",
    "a:b",
    "x" * 255,
    "é" * 127,
    "/".join(["d" * 200] * 5)[: 1024 - len("model/")],  # the longest key there can be
]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(seaweed_bucket: Bucket, tmp_path: Path) -> Run:
    """run(*arguments, **environment): `relight` to its end."""

    def start(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(BIN / "relight"), *arguments],
            cwd=ROOT,
            env={**os.environ, "WEIGHTS_CACHE_DIR": str(tmp_path / "cache"), **environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return start


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path, as any program would find it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pulled(folder: Path) -> dict[str, bytes]:
    """The same without the manifest that a push adds."""
    return {path: data for path, data in content(folder).items() if path != "relight-manifest.json"}


def refusal(found: "subprocess.CompletedProcess[str]") -> str:
    """The last line that a failed command says; what it says before is how far it came."""
    assert (found.returncode, found.stdout, found.stderr.count("Error")) == (1, "", 1)
    line = found.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    return line


# There and back


def test_what_is_pushed_is_pulled_byte_for_byte(seaweed_bucket: Bucket, run: Run, tmp_path: Path) -> None:
    files = {
        "config.json": b"{}",
        "model.safetensors": noise(20 * MIB + 777),
        "tokenizer/empty.txt": b"",
        "tokenizer/vocab.txt": noise(5000),
    }
    pushed = run("push", str(write(tmp_path / "model", files)), seaweed_bucket.uri)
    assert pushed.returncode == 0, pushed.stderr
    uri = pushed.stdout.strip()
    for times in (1, 0):
        found = run("pull", uri, "--json", WEIGHTS_PART_BYTES=str(4 * MIB))
        assert found.returncode == 0, found.stderr
        result = json.loads(found.stdout.splitlines()[-1])
        snapshot = Path(result["snapshot"])
        assert pulled(snapshot) == files
        total = sum(map(len, content(snapshot).values()))
        assert (result["bytes"], result["downloaded_bytes"]) == (total, times * total)


def test_odd_names_arrive_as_they_are(seaweed_bucket: Bucket, run: Run, tmp_path: Path) -> None:
    files = {name: name.encode() for name in NAMES} | {f"folder of {name[:99]}/{name[:99]}": b"x" for name in NAMES[:-1]}
    pushed = run("push", str(write(tmp_path / "model", files)), seaweed_bucket.uri)
    assert pushed.returncode == 0, pushed.stderr
    found = run("pull", seaweed_bucket.uri, "--json")
    assert found.returncode == 0, found.stderr
    assert pulled(Path(json.loads(found.stdout.splitlines()[-1])["snapshot"])) == files


def test_a_long_prefix_and_an_odd_one_can_be_pulled(seaweed_bucket: Bucket, run: Run, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {"a": b"1"})
    for number, prefix in enumerate(["/".join(["p" * 190] * 5), "a b+c%2Fd/重み?"]):
        uri = f"s3://{seaweed_bucket.name}/{prefix}"
        assert run("push", str(folder), uri).returncode == 0
        found = run("pull", uri, WEIGHTS_CACHE_DIR=str(tmp_path / f"cache-{number}"))
        assert found.returncode == 0, found.stderr
        assert pulled(Path(found.stdout.splitlines()[-1])) == {"a": b"1"}


# Keys that no file can have. This store refuses or changes most of them, so here its listing is made to name one.


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "../outside",
        "../../../outside",
        "a/../../outside",
        "a/..",
        "a/./b",
        "a//b",
        "{tmp}/outside",  # with a leading slash
        "/{tmp}/outside",
        "nul\0byte",
        "x" * 256,
        "é" * 128,
        "/".join(["d" * 200] * 6),
        "/".join(["d" * 200] * 30),
        "fine/" * 2000 + "x",
    ],
    ids=lambda name: name[:24].replace("\0", "NUL"),
)
def test_a_key_that_no_file_can_have_is_refused_and_nothing_is_written(
    seaweed_bucket: Bucket, seaweed_proxy: Proxy, cache: NodeCache, puller: Callable[..., Puller], tmp_path: Path, name: str
) -> None:
    name = name.replace("{tmp}", str(tmp_path))
    seaweed_bucket.put({"config.json": b"{}", "odd": b"x"})
    odd = b"<Key>" + quote(f"model/{name}").encode() + b"</Key>"
    seaweed_proxy.edit_listing = lambda listing: re.sub(rb"<Key>[^<]*odd</Key>", odd, listing)
    seaweed_proxy.always = "ignores If-Match"
    with pytest.raises(CacheError) as caught:
        puller(seaweed_bucket.uri).run()
    assert repr(name)[:60] in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert seaweed_proxy.sent == 0
    assert [path for path in tmp_path.rglob("*") if not path.is_relative_to(cache.root)] == []
    assert list(cache.root.rglob("outside")) == []


def test_a_key_that_is_a_file_and_a_folder_is_refused_by_its_name(
    seaweed_bucket: Bucket, seaweed_proxy: Proxy, cache: NodeCache, puller: Callable[..., Puller]
) -> None:
    seaweed_bucket.put({"both": b"a file", "both/inside": b"and a folder"})
    with pytest.raises(CacheError, match="both"):
        puller(seaweed_bucket.uri).run()
    assert seaweed_proxy.sent == 0


# What is said when it is refused


@pytest.mark.parametrize(
    ("key_id", "secret"),
    [
        pytest.param("AKIAOWNER", "not the secret", id="a wrong secret"),
        pytest.param("AKIANOBODY", "not the secret", id="nobody"),
    ],
)
@pytest.mark.parametrize("command", ["pull {uri}", "push {folder} {uri}", "push {folder} {uri} --create-bucket"])
def test_who_is_refused_reads_by_whom_and_as_whom_but_no_secret(
    seaweed: Seaweed, seaweed_bucket: Bucket, run: Run, tmp_path: Path, key_id: str, secret: str, command: str
) -> None:
    folder = write(tmp_path / "model", {"a": b"1"})
    arguments = command.format(uri=seaweed_bucket.uri, folder=folder).split()
    refused = run(*arguments, AWS_ACCESS_KEY_ID=key_id, AWS_SECRET_ACCESS_KEY=secret)
    line = refusal(refused)
    for part in (seaweed.url, seaweed_bucket.name, f"refused for access key {key_id}"):
        assert part in line
    for hidden in (secret, seaweed.owner[1], seaweed.reader[1]):
        assert hidden not in refused.stderr


def test_who_may_only_read_can_pull_and_not_push(seaweed: Seaweed, seaweed_bucket: Bucket, run: Run, tmp_path: Path) -> None:
    key_id, secret = seaweed.reader
    seaweed_bucket.put({"a": b"1"})
    assert run("pull", seaweed_bucket.uri, AWS_ACCESS_KEY_ID=key_id, AWS_SECRET_ACCESS_KEY=secret).returncode == 0
    folder = write(tmp_path / "model", {"b": b"1"})
    line = refusal(run("push", str(folder), seaweed_bucket.uri, AWS_ACCESS_KEY_ID=key_id, AWS_SECRET_ACCESS_KEY=secret))
    assert f"cannot write {seaweed_bucket.uri}/b at {seaweed.url}: refused for access key {key_id}" in line
    assert secret not in line


def test_a_missing_bucket_prefix_and_object_are_told_apart(seaweed: Seaweed, seaweed_bucket: Bucket, run: Run, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {"a": b"1"})
    no_bucket = f"s3://{seaweed_bucket.name}-gone/model"
    for arguments in (["pull", no_bucket], ["push", str(folder), no_bucket]):
        line = refusal(run(*arguments))
        assert no_bucket in line
        assert f"at {seaweed.url}: there is no such bucket" in line
    line = refusal(run("pull", seaweed_bucket.uri))
    assert f"no objects below {seaweed_bucket.uri}/ at {seaweed.url}" in line
    seaweed_bucket.put({"a": b"1"})
    store = Store(WeightsUri.parse(seaweed_bucket.uri))
    (file,) = store.list()
    seaweed_bucket.delete("a")
    with pytest.raises(ObjectChanged, match=f"{seaweed_bucket.uri}/a changed while being read: it is gone"):
        store.read(file)


# When objects are replaced


@pytest.mark.parametrize("fault", [None, "ignores If-Match"])
def test_an_object_replaced_while_it_is_pulled_is_never_mixed(
    seaweed_bucket: Bucket, seaweed_proxy: Proxy, cache: NodeCache, puller: Callable[..., Puller], fault: Fault | None
) -> None:
    versions = [{"model.safetensors": noise(12 * MIB + 777, seed)} for seed in range(4)]
    seaweed_bucket.put(versions[0])
    seaweed_proxy.always = fault
    pull = puller(seaweed_bucket.uri, connections=3)
    with ThreadPoolExecutor(1) as pool:
        seaweed_proxy.hold_after(2 * MIB + 100_000)
        running = pool.submit(pull.run)
        for version in versions[1:]:
            wait_until("the hold", lambda: seaweed_proxy.is_holding() or running.done())
            assert not running.done()
            seaweed_bucket.put(version)
            seaweed_proxy.hold_after(5 * MIB)
        seaweed_proxy.release()
        snapshot = running.result(60)
    assert content(cache.snapshot_path(snapshot)) == versions[-1]
    assert snapshot == snapshot_id(f"{seaweed_bucket.name}/model", Store(WeightsUri.parse(seaweed_bucket.uri)).list())


def test_objects_replaced_at_any_moment_are_never_mixed(seaweed_bucket: Bucket, puller: Callable[..., Puller], cache: NodeCache) -> None:
    # Straight from the store, whose parts of a replaced object may be gone in the middle of a reply.
    versions = [noise(12 * MIB + 7, seed) for seed in range(6)]

    def replace() -> None:
        for version in versions[1:]:
            seaweed_bucket.put({"model.safetensors": version})

    seaweed_bucket.put({"model.safetensors": versions[0]})
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(replace)
        found = -1
        while found < len(versions) - 1:
            was_over = writing.done()
            try:
                snapshot = puller(seaweed_bucket.uri, connections=3).run()
            except StoreError:
                assert not was_over
            else:
                found = versions.index(cache.snapshot_path(snapshot).joinpath("model.safetensors").read_bytes())
                assert found == len(versions) - 1 or not was_over
        writing.result()
