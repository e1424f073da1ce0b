"""Whether processes pay for https: the same bytes over TLS by threads of one process and by two processes, beside plain http.

.venv/bin/python bench/tls.py [--rounds 5] [--size 1G]
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose platform.py would stand for Python's own

from bench import fetch  # noqa: E402  found through the line above
from bench.common import free_ports, machine  # noqa: E402


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="1G")
    options = parser.parse_args()
    size = fetch.parse_size(options.size)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bench-tls-") as folder:
        work = Path(folder)
        whole, half = work / "whole" / fetch.FILE, work / "half" / fetch.FILE
        fetch.write_safetensors(whole, size)
        fetch.write_safetensors(half, size // 2)
        (work / "nginx").mkdir()
        with fetch.nginx(work / "nginx", {"whole": whole, "first": half, "second": half}, work) as plain:
            secure, server = start_tls(work, plain)
            try:
                report(options.rounds, work, plain, secure)
            finally:
                server.terminate()
                server.wait()


def start_tls(work: Path, plain: str) -> "tuple[str, subprocess.Popen[bytes]]":
    """A second nginx with the first one's files, over TLS."""
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            work / "key.pem",
            "-out",
            work / "cert.pem",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ],
        check=True,
        capture_output=True,
    )
    (port,) = free_ports(1)
    config = (work / "nginx" / "nginx.conf").read_text()
    config = config.replace(plain.removeprefix("http://"), f"127.0.0.1:{port} ssl")
    config = config.replace("server {", f"server {{ ssl_certificate {work}/cert.pem; ssl_certificate_key {work}/key.pem;", 1)
    (work / "tls.conf").write_text(re.sub(r"pid [^;]*;", f"pid {work}/tls.pid;", config))
    program = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") or "nginx"
    server = subprocess.Popen([program, "-p", work / "nginx", "-c", work / "tls.conf"])
    time.sleep(1)
    return f"https://127.0.0.1:{port}", server


def report(rounds: int, work: Path, plain: str, secure: str) -> None:
    ways = {
        "http, 4 threads": (plain, ["whole"], 4),
        "https, 1 thread": (secure, ["whole"], 1),
        "https, 2 threads": (secure, ["whole"], 2),
        "https, 4 threads": (secure, ["whole"], 4),
        "https, 2 processes of 1 thread": (secure, ["first", "second"], 1),
        "https, 2 processes of 2 threads": (secure, ["first", "second"], 2),
    }
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way in [*ways][turn % len(ways) :] + [*ways][: turn % len(ways)]:
            found[way].append(run(work, *ways[way]))
    print(machine(), "\n")
    print("| way | MB/s, median (min to max) | CPU-s per GB, median |\n| --- | ---: | ---: |")
    for way, runs in found.items():
        rates = [rate for rate, _ in runs]
        rate, low, high = (f"{number / 1e6:.0f}" for number in (statistics.median(rates), min(rates), max(rates)))
        print(f"| {way} | {rate} ({low} to {high}) | {statistics.median(cpu for _, cpu in runs) * 1e9:.2f} |")


def run(work: Path, endpoint: str, buckets: list[str], threads: int) -> tuple[float, float]:
    """Bytes per second and CPU seconds per byte of one process for each bucket, all at the same time."""
    environ = {**os.environ, **fetch.environment_for(endpoint), "AWS_CA_BUNDLE": str(work / "cert.pem"), "PYTHONPATH": str(ROOT)}
    caches = [work / f"cache-{bucket}" for bucket in buckets]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", cache, f"s3://{bucket}/{fetch.PREFIX}", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        for cache, bucket in zip(caches, buckets, strict=True)
    ]
    for process in started:
        fetch.await_line(process, "READY")
    for process in started:
        fetch.go(process)
    results = [tuple(map(float, process.communicate()[0].split())) for process in started]
    for cache in caches:
        shutil.rmtree(cache)
    total = sum(result[2] for result in results)
    return total / max(result[0] for result in results), sum(result[1] for result in results) / total


def child(directory: Path, uri: str, threads: int) -> None:
    from weights_cache.cache import NodeCache
    from weights_cache.fetch import Puller
    from weights_cache.settings import WeightsSettings
    from weights_cache.store import Store
    from weights_cache.uri import WeightsUri

    cache = NodeCache(directory)
    puller = Puller(Store(WeightsUri.parse(uri)), cache, WeightsSettings(connections=threads), uri=uri)
    cache.create()
    print("READY", flush=True)
    sys.stdin.readline()
    began, cpu = time.perf_counter(), time.process_time()
    puller.run()
    print(time.perf_counter() - began, time.process_time() - cpu, puller.progress.total_bytes)


if __name__ == "__main__":
    main()
