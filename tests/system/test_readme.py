"""The README is true: its settings are the code's, and a newcomer who follows it gets what it promises."""

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from function.settings import FunctionSettings
from knative.queue_source.settings import QueueSourceSettings
from tests.support import BIN, ROOT, request
from tests.system.walks import Page
from weights_cache.settings import WeightsSettings

README = (ROOT / "README.md").read_text()


def said(default: Any) -> str:
    """A default as one writes it into an environment variable."""
    return str(default).lower() if isinstance(default, bool) else str(default)


def rows(settings: type[Any]) -> list[str]:
    """The table's rows for a settings class."""
    made = []
    for field in dataclasses.fields(settings):
        default = "required" if field.default is dataclasses.MISSING else "" if field.default in (None, "") else f"`{said(field.default)}`"
        made.append(f"| `{field.metadata['env']}` | {default} | {field.metadata['text']} |".replace("|  |", "| |"))
    return made


def test_the_settings_table_is_the_codes() -> None:
    table = [line for line in README.splitlines() if re.match(r"\| `(PORT|K_\w+|FUNCTION_\w+|WEIGHTS_\w+|QUEUE_SOURCE_\w+)` \|", line)]
    assert table == rows(FunctionSettings) + rows(WeightsSettings) + rows(QueueSourceSettings)


def test_every_target_that_the_readme_names_is_in_the_makefile() -> None:
    named = set(re.findall(r"`make (\w+)", README))
    assert named
    assert named <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture
def newcomer(tmp_path: Path) -> Page:
    """A folder with the files that the README tells to write."""
    page = Page("README.md", tmp_path / "newcomer")
    page.folder.mkdir()
    for name in ("my_model.py", "save.py"):
        (page.folder / name).write_text(page.block(f"file: {name}"))
    return page


def test_a_model_brought_as_the_readme_says_answers(newcomer: Page) -> None:
    with newcomer.serving("run") as server:
        reply = request(server.port, "POST", "/v1/models/linear:predict", {"instances": [[1, 1], [0, 2]]})
        assert (reply.status, reply.json()) == (200, {"predictions": [6.0, 7.0]})
        refused = request(server.port, "POST", "/", {"instances": [["one", 2]]})
        assert (refused.status, refused.json()["error"]["type"]) == (400, "bad_input")
        refused = request(server.port, "POST", "/", {"instances": [[1, 2, 3]]})
        assert refused.json()["error"]["message"] == "each instance must have 2 numbers"


@pytest.mark.soak
def test_a_model_that_is_converted_answers_openais_clients(tmp_path: Path) -> None:
    page = Page("README.md", tmp_path / "checkout")
    page.folder.mkdir()
    (page.folder / ".venv").symlink_to(BIN.parent)
    with page.serving("run: smollm2") as server:
        answer = json.loads(page.run("ask: smollm2", {":8080": f":{server.port}"}))
        assert "fox" in answer["choices"][0]["message"]["content"].lower()


def test_the_overlays_render() -> None:
    for overlay in ("default", "local"):
        rendered = subprocess.run(
            [BIN / "kubectl", "kustomize", ROOT / "knative/manifests/overlays" / overlay], capture_output=True, text=True, check=True
        )
        assert "kind: Service" in rendered.stdout
