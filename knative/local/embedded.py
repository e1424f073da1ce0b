"""Servers that come with the platform, each a process of its own: started when a manifest names them, filled with seeds."""

import asyncio
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from knative.local.errors import PlatformError
from knative.local.launch import Process
from knative.local.process import ContainerProcess
from knative.local.procfs import MARK

# What manifests call the object store; the real address takes its place.
OBJECT_STORE = "http://object-store.relight.localhost"
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


class ObjectStore:
    """The embedded S3 server, in memory. One that dies is started again, and filled again with the seeds."""

    def __init__(self, port: int, log: Path, seeds: Sequence[Seed], tell: Callable[[str], object], mark: str = "") -> None:
        """tell: what happens to it, for a person. mark: see `procfs.MARK`."""
        self.address = f"http://127.0.0.1:{port}"
        self._port = port
        self._seeds = seeds
        self._tell = tell
        self._ended = asyncio.Event()
        self._mending: asyncio.Task[None] | None = None
        self._process = ContainerProcess(
            Process(
                container="object-store",
                is_main=True,
                argv=(sys.executable, "-m", "knative.local.object_store", str(port)),
                env=dict(os.environ) | {MARK: f"{mark}object-store/"},
                cwd=None,
                directories=(),
                log=log,
                readiness=None,
                liveness=None,
            ),
            on_exit=self._exited,
        )

    async def start(self) -> None:
        """Returns once it answers and has the seeds. Raises PlatformError if it does not; it is to be stopped then too."""
        await self._process.start()
        if not await self._answers():
            said = "\n".join(self._process.tail(10))
            raise PlatformError(f"the embedded object store did not start; it said:\n{said}")
        self._tell(f"object store at {self.address}, in memory")
        for seed in self._seeds:
            await self.fill(seed)
        self._ended.clear()
        self._mending = asyncio.create_task(self._mend())

    async def stop(self) -> None:
        """End it; what it held is gone."""
        if self._mending:
            self._mending.cancel()
            await asyncio.gather(self._mending, return_exceptions=True)
        await self._process.stop(5)

    def _exited(self, ended: str) -> None:
        self._ended.set()
        if self._mending:
            self._tell(f"object store {ended}; starting it again")

    async def _mend(self) -> None:
        """Whenever it was started again it is empty: fill it."""
        while True:
            await self._ended.wait()
            self._ended.clear()
            while not await self._answers():
                pass
            try:
                for seed in self._seeds:
                    await self.fill(seed)
            except PlatformError as error:  # it died again, or the seed's directory is gone
                self._tell(str(error))
            if not self._ended.is_set():
                self._tell(f"object store is back, with what --seed names ({len(self._seeds)})")

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
