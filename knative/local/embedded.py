"""The server that comes with the platform, a process of its own: an object store and queues, started when a manifest names one of them."""

import asyncio
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from knative.local.errors import PlatformError
from knative.local.launch import Process
from knative.local.process import ContainerProcess
from knative.local.procfs import MARK
from knative.local.queues import ACCOUNT, EMBEDDED, Queue

START_LIMIT_S = 60.0
LOOK_S = 0.05


@dataclass(frozen=True)
class Seed:
    """A directory to be put into the object store before the first request."""

    directory: Path
    uri: str

    @classmethod
    def parse(cls, text: str) -> "Seed":
        """From `DIR=s3://bucket/prefix`. Raises PlatformError."""
        directory, separator, uri = text.rpartition("=")
        if not separator or not re.match("s3://[^/]", uri):
            raise PlatformError(f"--seed {text!r}: must be DIR=s3://bucket/prefix")
        if not Path(directory).is_dir():
            raise PlatformError(f"--seed {text!r}: there is no directory {directory!r}")
        return cls(Path(directory), uri)


class EmbeddedServer:
    """Object storage and queues in memory. When it dies it is started again and filled with the seeds again; the queues are empty then."""

    def __init__(self, port: int, log: Path, tell: Callable[[str], object], mark: str = "") -> None:
        """tell: what happens to it, for a person. mark: see `procfs.MARK`."""
        self.address = f"http://127.0.0.1:{port}"
        self.queues: list[str] = []  # by name; the dead-letter queues not among them
        self._seeds: list[Seed] = []
        self._port = port
        self._tell = tell
        self._ended = asyncio.Event()
        self._mending: asyncio.Task[None] | None = None
        self._process = ContainerProcess(
            Process(
                container="embedded",
                is_main=True,
                argv=(sys.executable, "-m", "knative.local.embedded_server", str(port)),
                env=dict(os.environ) | {MARK: f"{mark}embedded/"},
                cwd=None,
                directories=(),
                log=log,
                readiness=None,
                liveness=None,
            ),
            on_exit=self._exited,
        )

    async def start(self) -> None:
        """Returns once it answers. Raises PlatformError if it does not; it is to be stopped then too."""
        await self._process.start()
        if not await self._answers():
            said = "\n".join(self._process.tail(10))
            raise PlatformError(f"the embedded object store and queues did not start; they said:\n{said}")
        self._ended.clear()
        self._mending = asyncio.create_task(self._mend())

    async def serve_objects(self, seeds: Sequence[Seed]) -> None:
        """Be an object store with these directories in it. Raises PlatformError."""
        self._tell(f"object store at {self.address}, in memory")
        for seed in seeds:
            await self.fill(seed)
        self._seeds += seeds

    async def serve_queues(self, names: Iterable[str]) -> None:
        """Have these queues, each with a dead-letter queue. Raises PlatformError."""
        if new := [name for name in names if name not in self.queues]:
            await self._create(new)
            self.queues += new
            self._tell(f"queues at {self.address}, in memory: {', '.join(new)}")

    def queue_url(self, name: str) -> str:
        """The address of a queue."""
        return f"{self.address}/{ACCOUNT}/{name}"

    async def stop(self) -> None:
        """End it; what it held is gone."""
        if self._mending:
            self._mending.cancel()
            await asyncio.gather(self._mending, return_exceptions=True)
        await self._process.stop(5)

    def _exited(self, ended: str) -> None:
        self._ended.set()
        if self._mending:
            self._tell(f"object store and queues: the embedded server {ended}; starting it again")

    async def _mend(self) -> None:
        """Whenever it was started again it is empty: fill it."""
        while True:
            await self._ended.wait()
            self._ended.clear()
            while not await self._answers():
                pass
            try:
                await self._create(self.queues)
                for seed in self._seeds:
                    await self.fill(seed)
            except PlatformError as error:  # it died again, or the seed's directory is gone
                self._tell(str(error))
            if not self._ended.is_set():
                queues = f", and {len(self.queues)} queues without their messages" if self.queues else ""
                self._tell(f"object store is back, with what --seed names ({len(self._seeds)}){queues}")

    async def _create(self, names: Iterable[str]) -> None:
        def create() -> None:
            for name in names:
                Queue(self.queue_url(name), EMBEDDED).create()

        await asyncio.to_thread(create)

    async def _answers(self) -> bool:
        """Whether it does, soon."""
        for _ in range(int(START_LIMIT_S / LOOK_S)):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.close()
                return True
            except OSError:
                if not self._mending and not self._process.running:
                    break
                await asyncio.sleep(LOOK_S)
        return False

    async def fill(self, seed: Seed) -> None:
        """Put a directory into it, with `relight push` in a process of its own, which shows its progress. Raises PlatformError."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEIGHTS_"))}
        env |= {"AWS_ACCESS_KEY_ID": "relight", "AWS_SECRET_ACCESS_KEY": "relight-local", "AWS_DEFAULT_REGION": "us-east-1"}
        env["AWS_ENDPOINT_URL"] = self.address
        command = (sys.executable, "-m", "weights_cache", "push", str(seed.directory), seed.uri, "--create-bucket")
        child = await asyncio.create_subprocess_exec(*command, env=env, stdout=asyncio.subprocess.DEVNULL)
        try:
            status = await child.wait()
        except asyncio.CancelledError:
            child.kill()
            await child.wait()
            raise
        if status:
            raise PlatformError(f"{seed.directory} could not be put into the embedded object store (exit status {status})")
