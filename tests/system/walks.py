"""Pages that are typed by tests: their blocks of code, and a shell to type them in."""

import contextlib
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support import BIN, ROOT, Server, clean_environment, free_port, request, running, wait_until


class Page:
    """A document, and the folder in which what it says is done."""

    def __init__(self, name: str, folder: Path, **environment: str) -> None:
        self.text = (ROOT / name).read_text()
        self.folder = folder
        self.environment = clean_environment(PATH=f"{BIN}:/usr/local/bin:/usr/bin:/bin") | environment
        self.admin = 0

    def block(self, marker: str) -> str:
        """The code that follows `<!-- marker -->`."""
        found = re.findall(rf"<!-- {re.escape(marker)} -->\n```\w+\n(.*?)```", self.text, re.DOTALL)
        assert len(found) == 1, f"the page has {len(found)} blocks {marker!r}"
        block: str = found[0].replace("source .venv/bin/activate\n", "")  # PATH has it
        return block

    def run(self, marker: str, replacing: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
        """What a block prints when it is typed, with some words in place of others."""
        script = self.block(marker)
        for old, new in (replacing or {}).items():
            assert old in script, f"the block {marker!r} has no {old}"
            script = script.replace(old, new)
        done = subprocess.run(
            ["bash", "-ec", script], cwd=folder or self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def serving(self, marker: str, *options: str) -> Iterator[Server]:
        """The platform that the last line of a block starts, with ports of its own."""
        port, self.admin = free_port(), free_port()
        commands = self.block(marker).strip().splitlines()
        assert commands[-1].startswith("relight run"), commands
        words = [f"--port {port} --admin-port {self.admin}", *options]
        script = "\n".join(["set -e", f"cd {self.folder}", *commands[:-1], f"exec {commands[-1]} {' '.join(words)}"])
        with running(["bash", "-c", script], self.folder.parent / f"{self.folder.name}.log", self.environment, port) as server:
            wait_until("the platform", lambda: server.process.poll() is not None or request(self.admin, "GET", "/api/status").status == 200)
            assert server.process.poll() is None, server.said()
            yield server
