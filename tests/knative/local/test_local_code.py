"""An agent's code: which files are a part of it, and when it is another."""

import os
import py_compile
import re
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from knative.local import code
from knative.local.code import Code, listed
from knative.local.content import with_content
from knative.local.launch import Places
from knative.local.manifest import read_manifests
from knative.local.seeds import Seeds
from tests.knative.local.running import manifests, service


def write(folder: Path, **files: str) -> None:
    """Modules; `pkg__mod` is pkg/mod.py, and `pkg__` its __init__.py."""
    for name, text in files.items():
        path = folder / f"{re.sub('__$', '/__init__', name).replace('__', '/', name.count('__') - name.endswith('__'))}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def names(found: Code, folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in found.files)


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        pytest.param("plain:Agent", ["plain.py"], id="libraries and what is not there are not followed"),
        pytest.param("direct:Agent", ["direct.py", "plain.py"], id="import"),
        pytest.param("late:Agent", ["late.py", "plain.py"], id="import in a function"),
        pytest.param("circle:Agent", ["circle.py", "round.py"], id="modules that import each other"),
        pytest.param(
            "pkg.model:Agent",
            ["pkg/__init__.py", "pkg/deep/__init__.py", "pkg/deep/leaf.py", "pkg/model.py", "plain.py"],
            id="package",
        ),
        pytest.param("space.model:Agent", ["plain.py", "space/model.py"], id="package without __init__"),
        pytest.param("broken:Agent", ["broken.py"], id="no Python"),
        pytest.param("function.agents.echo:Echo", [], id="ours"),
        pytest.param("nowhere:Agent", [], id="nothing"),
    ],
)
def test_imports_are_followed_through_the_folders(tmp_path: Path, agent: str, expected: list[str]) -> None:
    write(
        tmp_path,
        plain="import json, a_library_that_is_not_here\nfrom function.agent import Weights\n",
        direct="import plain as other\n",
        late="def load():\n    from plain import json\n",
        circle="import round\n",
        round="import circle\n",
        pkg__="",
        pkg__model="from .deep import leaf\nfrom . import missing\n",
        pkg__deep__="",
        pkg__deep__leaf="from ..model import x\nimport plain\n",
        space__model="import plain\n",
        broken="import plain\ndef (:\n",
        function="raise RuntimeError\n",
        unused="",
    )
    assert names(Code.read(agent, [tmp_path]), tmp_path) == expected


def test_the_first_folder_wins(tmp_path: Path) -> None:
    write(tmp_path / "one", model="import helper")
    write(tmp_path / "two", model="", helper="")
    assert names(Code.read("model:A", [tmp_path / "one", tmp_path / "two"]), tmp_path) == ["one/model.py", "two/helper.py"]


def test_it_is_another_when_a_file_is_another_and_only_then(tmp_path: Path) -> None:
    write(tmp_path, model="import helper, later", helper="x = 1")
    first = Code.read("model:A", [tmp_path])
    assert first.now() is first
    (tmp_path / "notes.txt").write_text("no part of it")
    os.utime(tmp_path / "helper.py")
    assert first.now() == first
    assert first.changed(first.now()) == []
    write(tmp_path, helper="x = 2")
    assert first.now() != first
    assert first.changed(first.now()) == ["helper.py"]
    write(tmp_path, helper="x = 1", later="")
    assert first.changed(first.now()) == ["later.py"]
    (tmp_path / "later.py").unlink()
    assert first.now() == first
    (tmp_path / "model.py").rename(tmp_path / "other.py")
    assert first.changed(first.now()) == ["helper.py", "model.py"]
    assert listed(["a", "b", "c", "d"]) == "a, b, c and 1 more"


def test_what_python_has_compiled_of_another_version_of_the_same_second_and_size_goes(tmp_path: Path) -> None:
    write(tmp_path, model="x = 1")
    file = tmp_path / "model.py"
    os.utime(file, ns=(10**18, 10**18))
    first = Code.read("model:A", [tmp_path])
    py_compile.compile(str(file))
    file.write_text("x = 2")
    os.utime(file, ns=(10**18 + 1000, 10**18 + 1000))
    assert first.now() != first
    assert not Path(cache_from_source(str(file))).exists()


def test_a_great_many_files_and_a_great_one_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "MOST_FILES", 10)
    monkeypatch.setattr(code, "MOST_BYTES", 100)
    write(tmp_path, **{f"m{number}": f"import m{number + 1}" for number in range(50)}, great="import m1" + "#" * 100)
    assert len(Code.read("m0:A", [tmp_path]).files) == 10
    great = Code.read("great:A", [tmp_path])
    assert names(great, tmp_path) == ["great.py"]
    write(tmp_path, great="import m2" + "#" * 100)
    assert great.now() != great


def test_what_is_worked_on_is_watched_wherever_python_finds_it_and_what_is_installed_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "linked", mine__agent="import mine.helper, json, yaml, knative.local", mine__="", mine__helper="")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "linked")  # as a package that was installed as editable
    container = {"command": ["python", "-m", "function"], "env": [{"name": "FUNCTION_AGENT", "value": "mine.agent:Agent"}]}
    (hello,) = read_manifests([(str(tmp_path / "hello.yaml"), manifests(service("hello", container=container)))]).services
    found = with_content(hello, Places(tmp_path), Seeds()).code
    assert found
    assert names(found, tmp_path / "linked") == ["mine/__init__.py", "mine/agent.py", "mine/helper.py"]
