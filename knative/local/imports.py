"""What functions import, as they have told: so that the fork server has it already when they start the next time.

A function tells in a file of its own, once it is ready. It is remembered in the state directory, by agent, for the next `relight run`.
"""

import asyncio
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from weights_cache.environment import is_secret

FILE = "RELIGHT_IMPORTS_FILE"  # the variable that tells a function where to tell
AGENT, AGENT_PATH = "FUNCTION_AGENT", "FUNCTION_AGENT_PATH"
LOOK_S = 0.5  # between two looks whether somebody has told
PATIENCE_S = 1800.0  # that a function may take to be ready
MOST_AGENTS = 100  # that are remembered
MOST_BYTES = 4 << 20  # of what a function tells

_Module = Annotated[str, StringConstraints(max_length=300, pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*$")]


class _Told(BaseModel):
    """What a function tells. fresh: these are all that it has, and not what it has besides that which it was forked with."""

    fresh: bool
    modules: list[_Module] = Field(max_length=20_000)


class _Agent(BaseModel):
    modules: list[_Module] = Field(max_length=40_000)
    told_at: float


class _LeftOut(BaseModel):
    reason: str
    stamp: int


class _Memory(BaseModel):
    """The file that is kept."""

    model_config = ConfigDict(allow_inf_nan=False)

    agents: dict[str, _Agent] = {}
    left_out: dict[str, _LeftOut] = {}


class Imports:
    """Remembers it; and which libraries cannot be held."""

    def __init__(self, folder: Path) -> None:
        """folder: its own, made when it is needed."""
        self.functions: Sequence[Mapping[str, str]] = ()  # the variables that functions of the manifests will have
        self._folder = folder
        self._told = folder / "told"
        self._kept = folder / "imports.json"
        self._memory = _Memory()
        self._asked: dict[Path, tuple[str, float]] = {}  # the agent that is to tell in each file, and until when that is waited for
        self._anew: set[str] = set()  # agents of which a whole list was told in this run
        self._number = 0
        self._wanted = asyncio.Event()  # set while somebody is to tell

    def load(self) -> None:
        """What is known of earlier runs. A file that cannot be read is as good as none."""
        shutil.rmtree(self._told, ignore_errors=True)
        with suppress(OSError, ValidationError):
            self._memory = _Memory.model_validate_json(self._kept.read_bytes())

    def variable(self, agent: str) -> dict[str, str]:
        """What a function is to have in its environment, so that it tells."""
        try:
            self._told.mkdir(parents=True, exist_ok=True)
        except OSError:
            return {}
        self._number += 1
        path = self._told / str(self._number)
        self._asked[path] = agent, time.monotonic() + PATIENCE_S
        self._wanted.set()
        return {FILE: str(path.absolute())}

    async def listen(self) -> list[str]:
        """Wait until somebody has told something new; the agents that have."""
        while True:
            await self._wanted.wait()
            await asyncio.sleep(LOOK_S)
            if found := self.look():
                await asyncio.to_thread(self._keep)
                return found

    def look(self) -> list[str]:
        """The agents that have told something new since."""
        new = []
        for path, (agent, end) in list(self._asked.items()):
            if not path.exists():
                if time.monotonic() < end:
                    continue
            elif self._learn(agent, path):
                new.append(agent)
            del self._asked[path]
            path.unlink(missing_ok=True)
        if not self._asked:
            self._wanted.clear()
        return new

    def _learn(self, agent: str, path: Path) -> bool:
        """Take what was told; whether it is more than was known."""
        try:
            if path.stat().st_size > MOST_BYTES:
                return False
            told = _Told.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return False  # somebody else's; all that is lost is time
        agents = self._memory.agents
        known = agents[agent].modules if agent in agents else []
        is_whole = told.fresh and agent not in self._anew
        self._anew |= {agent} if told.fresh else set()
        modules = told.modules if is_whole else list(dict.fromkeys([*known, *told.modules]))
        agents.pop(agent, None)
        agents[agent] = _Agent(modules=modules, told_at=time.time())  # behind all others
        for name in list(agents)[:-MOST_AGENTS]:
            del agents[name]
        return not set(modules) <= set(known)

    def _keep(self) -> None:
        with suppress(OSError):  # a full disk: it is known as long as this run lasts
            self._folder.mkdir(parents=True, exist_ok=True)
            new = self._kept.with_suffix(".new")
            lasting = {library: about for library, about in self._memory.left_out.items() if about.stamp}
            new.write_text(self._memory.model_copy(update={"left_out": lasting}).model_dump_json())
            new.replace(self._kept)

    def want(self, functions: Sequence[Mapping[str, str]]) -> bool:
        """The functions of the manifests now; whether they are others than before, so that what was found about them may not hold."""
        if functions == self.functions:
            return False
        self.functions = functions
        self._memory.left_out = {library: about for library, about in self._memory.left_out.items() if about.stamp}
        return True

    def leave_out(self, library: str, reason: str, stamp: int = 0) -> bool:
        """A library cannot be held; with a stamp that stays so, also in later runs, until something is installed where it is.

        Whether that was not known.
        """
        known, found = self._memory.left_out.get(library), _LeftOut(reason=reason, stamp=stamp)
        self._memory.left_out[library] = found
        return found != known

    async def held(self, libraries: Iterable[str]) -> None:
        """These are held."""
        for library in libraries:
            self._memory.left_out.pop(library, None)
        await asyncio.to_thread(self._keep)

    @property
    def left_out(self) -> dict[str, str]:
        """Libraries that cannot be held, and why."""
        return {library: about.reason for library, about in self._memory.left_out.items()}

    def order(self, most_bytes: int) -> dict[str, Any]:
        """What the fork server is to import: what the function that told last needs is first. See function/warm_imports.py."""
        wanted = {env[AGENT]: env for env in self.functions if env.get(AGENT)}
        known = [agent for agent in reversed(self._memory.agents) if agent in wanted]
        modules = dict.fromkeys(module for agent in known for module in self._memory.agents[agent].modules)
        names = {name for env in self.functions for name in env}
        alike = {name for name in names if len({env.get(name) for env in self.functions}) == 1 and not is_secret(name)}
        return {
            "environment": {name: self.functions[0][name] for name in sorted(alike)},
            "withheld": sorted(names - alike),
            "modules": list(modules),
            "sources": [{"agent": agent, "folders": _folders(env)} for agent, env in wanted.items() if agent not in known],
            "without": {library: about.stamp for library, about in self._memory.left_out.items()},
            "most_bytes": most_bytes,
        }


def _folders(env: Mapping[str, str]) -> list[str]:
    return [folder for name in (AGENT_PATH, "PYTHONPATH") for folder in env.get(name, "").split(os.pathsep) if folder]
