"""A fork server and functions from it, for tests that look at both."""

import asyncio
import contextlib
import http.client
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from knative.local import fork_server as fork_server_module
from knative.local import process as process_module
from knative.local.fork_server import ForkServer
from knative.local.imports import Imports
from knative.local.inheritance import inherited
from knative.local.launch import Process
from knative.local.process import ContainerProcess
from tests.support import ROOT, free_port, request


def lean_site(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the Python path without the libraries that take long to import, and a fork server that is patient."""
    site = folder / "site"
    site.mkdir()
    for name in ("torch", "tokenizers"):
        (site / f"{name}.py").write_text("raise ModuleNotFoundError(__name__)\n")
    monkeypatch.setenv("PYTHONPATH", f"{site}:{ROOT}")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(fork_server_module, "ANSWER_S", 20.0)  # a busy machine is not an unwell server
    monkeypatch.setattr(fork_server_module, "RESTART_S", 0.01)
    monkeypatch.setattr(process_module, "RESTART_S", 0.01)
    return site


class Stage:
    """A fork server and the means to run functions with it."""

    def __init__(self, folder: Path, imports: Imports | None = None) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.endings: list[str] = []
        self.is_busy = False
        self.server = ForkServer(folder / "fork-server.log", lambda: self.is_busy, self.said.append, imports=imports)

    async def warm(self, but: int | None = None) -> int:
        """The process id of the fork server once it is warm, of another one than `but`."""
        await until("a warm fork server", lambda: self.server.pid not in (None, but))
        assert self.server.pid
        return self.server.pid

    async def spare(self) -> int:
        """The process id of the process that waits for the next function."""
        await until("a spare process", lambda: self.server._current and self.server._current._spare)
        assert self.server._current
        assert self.server._current._spare
        return self.server._current._spare.child.pid

    def process(self, agent: str = "telling:Agent", name: str = "function", **settings: str) -> Process:
        port = free_port()
        env = inherited() | {"FUNCTION_AGENT": agent, "FUNCTION_HOST": "127.0.0.1", "PORT": str(port), **settings}
        return Process(name, True, ("python", "-m", "function"), env, None, (), self.folder / f"{name}.log", None, None)

    @contextlib.asynccontextmanager
    async def running(self, process: Process, *, fresh: bool = False) -> AsyncIterator[ContainerProcess]:
        container = ContainerProcess(process, lambda ending: self.endings.append(str(ending)), None if fresh else self.server)
        await container.start()
        try:
            yield container
        finally:
            await container.stop(5)


async def ask(process: Process) -> Any:
    """What the telling agent says, once it is up."""
    port = int(process.env["PORT"])

    def call() -> Any:
        with contextlib.suppress(OSError, http.client.HTTPException):
            reply = request(port, "POST", "/", {"instances": [1]})
            assert reply.status in (200, 503), process.log.read_text()
            return reply.json()["predictions"][0] if reply.status == 200 else None

    end = time.monotonic() + 60
    while time.monotonic() < end:
        if told := await asyncio.to_thread(call):
            return told
        await asyncio.sleep(0.02)
    raise AssertionError(f"no answer; its log:\n{process.log.read_text()}")


async def until(what: str, probe: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not probe():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        await asyncio.sleep(0.01)


def play(folder: Path, scene: Callable[[Stage], Awaitable[None]], imports: Imports | None = None) -> None:
    async def main() -> None:
        stage = Stage(folder, imports)
        stage.server.start()
        try:
            await stage.warm()
            await scene(stage)
        finally:
            await stage.server.stop()

    asyncio.run(main())


def children() -> set[str]:
    """Our processes, those that wait to be reaped included. The servers of other tests may be among them."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
