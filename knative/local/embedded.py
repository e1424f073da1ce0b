"""The server that comes with the platform, a process of its own: an object store and queues, started when a manifest names one of them."""

import asyncio
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp

from knative.local.again import Again
from knative.local.errors import PlatformError
from knative.local.inheritance import inherited
from knative.local.launch import Process
from knative.local.process import ContainerProcess
from knative.local.procfs import MARK
from knative.local.queues import ACCOUNT, CONTENTS, EMBEDDED, REGION, Queue, dead_letters
from knative.local.seeds import Seed
from knative.local.tasks import describe

ALONE = {"PYTHONSAFEPATH": "1"}  # a `knative.py` where we were started is not to hide our own
START_LIMIT_S, START_LOOK_S = 60.0, 0.05
LOOK_S = 2.0  # between two looks at what is in it
ANSWER_S = 5.0  # for one of them


class EmbeddedServer:
    """Object storage and queues in memory. What it loses, as it died or was emptied, it is given again; the queues are empty then."""

    def __init__(self, port: int, log: Path, tell: Callable[[str], object], mark: str = "") -> None:
        """tell: what happens to it, for a person. mark: see `procfs.MARK`."""
        self.address = f"http://127.0.0.1:{port}"
        self.queues: list[str] = []  # by name; the dead-letter queues not among them
        self.oldest: Mapping[str, float] = {}  # when the oldest message was sent, by the name of a queue that has some
        self._seeds: list[Seed] = []
        self._tell = tell
        self._is_lost = False  # it has ended since it was looked at last
        self._session: aiohttp.ClientSession | None = None
        self._looking = Again("the look after the embedded object store and queues", self._look, LOOK_S, tell)
        self._process = ContainerProcess(
            Process(
                container="embedded",
                is_main=True,
                argv=(sys.executable, "-m", "knative.local.embedded_server", str(port)),
                env=inherited() | ALONE | {MARK: f"{mark}embedded/"},
                cwd=None,
                directories=(),
                log=log,
                readiness=None,
                liveness=None,
            ),
            on_exit=self._exited,
            on_failure=lambda what, error: tell(describe(what, error)),
        )

    async def start(self) -> None:
        """Returns once it answers. Raises PlatformError if it does not; it is to be stopped then too."""
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S))
        await self._process.start()
        end = time.monotonic() + START_LIMIT_S
        while await self._contents() is None:
            if not self._process.running or time.monotonic() > end:
                said = "\n".join(self._process.tail(10))
                raise PlatformError(f"the embedded object store and queues did not start; they said:\n{said}")
            await asyncio.sleep(START_LOOK_S)
        self._looking.start()

    async def serve_objects(self, seeds: Sequence[Seed]) -> list[str]:
        """Be an object store with these directories in it, of which it returns the snapshots. Raises PlatformError."""
        self._tell(f"object store at {self.address}, in memory")
        snapshots = [await self.fill(seed) for seed in seeds]
        self._seeds += seeds
        return snapshots

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
        await self._looking.stop()
        if self._session:
            await self._session.close()
            self._session = None
        await self._process.stop(5)

    def _exited(self, ended: object) -> None:
        self._is_lost = True
        if self._session:
            self._tell(f"object store and queues: the embedded server {ended}; starting it again")

    async def _look(self) -> None:
        """See what is in it, and give it what it should have. Raises PlatformError if that cannot be done."""
        found = await self._contents()
        if found is None:
            return  # it is being started again
        self.oldest = {name: at for name, at in found["queues"].items() if at is not None}
        queues = [name for name in self.queues if not {name, dead_letters(name)} <= found["queues"].keys()]
        seeds = [seed for seed in self._seeds if seed.place not in found["below"]]
        await self._create(queues)
        for seed in seeds:
            await self.fill(seed)
        if queues or seeds or self._is_lost:
            had = "was started again, and" if self._is_lost else "had lost what it held, and"
            self._is_lost = False
            self._tell(f"object store and queues: the embedded server {had} has again {_counted(seeds, queues)}")

    async def _contents(self) -> dict[str, Any] | None:
        """See `embedded_server.contents`; None if it does not answer."""
        if not self._session:
            return None
        try:
            query = [("below", seed.place) for seed in self._seeds]
            async with self._session.get(f"{self.address}{CONTENTS}", params=query) as reply:
                found: dict[str, Any] = await reply.json()
                return found if reply.status == HTTPStatus.OK else None
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None

    async def _create(self, names: Iterable[str]) -> None:
        def create() -> None:
            for name in names:
                Queue(self.queue_url(name), EMBEDDED).create()

        await asyncio.to_thread(create)

    async def fill(self, seed: Seed) -> str:
        """Put a directory into it, with `relight push` in a process of its own, which shows its progress; the snapshot that it is now.

        Raises PlatformError.
        """
        if not any(path.is_file() for path in seed.directory.rglob("*")):
            raise PlatformError(f"{seed.directory}: holds no files; the embedded object store keeps what it has")
        env = inherited() | ALONE | EMBEDDED | {"AWS_ENDPOINT_URL": self.address, "AWS_DEFAULT_REGION": REGION}
        command = (sys.executable, "-m", "weights_cache", "push", str(seed.directory), seed.uri, "--create-bucket")
        child = await asyncio.create_subprocess_exec(*command, env=env, stdout=asyncio.subprocess.PIPE)
        try:
            told, _ = await child.communicate()
        except asyncio.CancelledError:
            child.kill()
            await child.wait()
            raise
        if child.returncode:
            raise PlatformError(f"{seed.directory} could not be put into the embedded object store (exit status {child.returncode})")
        return told.decode().strip()


def _counted(seeds: Sequence[Seed], queues: Sequence[str]) -> str:
    """What was given to it again."""
    said = [f"{', '.join(seed.uri for seed in seeds)} of --seed"] if seeds else []
    said += [f"{len(queues)} queue{'s' * (len(queues) != 1)}, without messages"] if queues else []
    return " and ".join(said) or "nothing, as it held nothing"
