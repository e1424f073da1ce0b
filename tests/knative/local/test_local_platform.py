"""The platform's own book-keeping."""

from pathlib import Path

from rich.console import Console

from knative.local.manifest import Sources
from knative.local.platform import Platform, PlatformSettings
from knative.local.terminal import Terminal
from tests.knative.local.running import manifests, service


def test_ports_do_not_run_out_however_many_pods_there_were(tmp_path: Path) -> None:
    (tmp_path / "hello.yaml").write_text(manifests(service("hello")))
    sources = Sources([tmp_path / "hello.yaml"])
    platform = Platform(PlatformSettings(8080, 8081, tmp_path, None, []), sources, Terminal(Console(quiet=True)))
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for _ in range(highest - lowest + 2):
        assert 0 < platform._maker.free_port() < 65536
