"""The platform's own book-keeping."""

import asyncio
from pathlib import Path

from rich.console import Console

from knative.local.manifest import Sources
from knative.local.platform import Platform, PlatformSettings
from knative.local.terminal import Terminal
from tests.knative.local.running import manifests, service
from tests.support import free_port


def test_ports_do_not_run_out_however_many_pods_there_were(tmp_path: Path) -> None:
    (tmp_path / "hello.yaml").write_text(manifests(service("hello")))
    sources = Sources([tmp_path / "hello.yaml"])
    platform = Platform(PlatformSettings(8080, 8081, tmp_path, None, []), sources, Terminal(Console(quiet=True)))
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for _ in range(highest - lowest + 2):
        assert 0 < platform._maker.free_port() < 65536


def test_every_task_of_a_running_platform_has_an_owner_and_none_is_left_when_it_has_stopped(tmp_path: Path) -> None:
    document = service("hello", scale={"min-scale": "1"}, container={"livenessProbe": {"httpGet": {"path": "/healthz"}}})
    (tmp_path / "hello.yaml").write_text(manifests(document))
    port, admin_port = free_port(), free_port()
    settings = PlatformSettings(port, admin_port, tmp_path / "state", None, [])

    async def main() -> tuple[set[str], set[str]]:
        platform = Platform(settings, Sources([tmp_path / "hello.yaml"]), Terminal(Console(quiet=True)))
        running = asyncio.create_task(platform.run(), name="the test's")
        async with asyncio.timeout(60):
            while not running.done() and not any(service["state"] == "ready" for service in platform.status()["services"]):
                await asyncio.sleep(0.01)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        owned = {task.get_name() for task in tasks if not task.get_name().startswith("Task-")}
        bare = {repr(task.get_coro()) for task in tasks if task.get_name().startswith("Task-")}
        platform._stop.set()
        await asyncio.wait_for(running, 60)
        left = {repr(task) for task in asyncio.all_tasks() - {asyncio.current_task()}}
        assert left == set()
        return owned, bare

    owned, bare = asyncio.run(main())
    assert {"the autoscaler's beat", "the liveness probe of function", "keeping the container function"} <= owned
    assert bare == set()
