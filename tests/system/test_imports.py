"""Who may know whom: the rules that keep the sidecar small, the function free of storage code, and the platform replaceable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

# The one module that may reach into the other packages, and what it may reach.
DOOR = Path("knative/cli.py")
PACKAGES = ("function", "knative", "weights_cache")
# A function sees the reader's side of the cache.
READER_SIDE = {"weights_cache", "weights_cache.environment", "weights_cache.errors", "weights_cache.reader", "weights_cache.settings"}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {
                f"{node.module}.{alias.name}"
                for alias in node.names
                if (ROOT / (node.module or "").replace(".", "/") / f"{alias.name}.py").exists()
            }
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def foreign(path: Path) -> set[str]:
    """Modules of our other packages that a file imports."""
    own = path.relative_to(ROOT).parts[0]
    return {name for name in imports(path) if name.split(".")[0] in PACKAGES and name.split(".")[0] != own}


@pytest.mark.parametrize("package", ["knative", "weights_cache"])
def test_the_platform_and_the_cache_know_no_other_package(package: str) -> None:
    strangers = {str(path.relative_to(ROOT)): foreign(path) for path in files(package) if path.relative_to(ROOT) != DOOR}
    assert {path: names for path, names in strangers.items() if names} == {}


def test_the_function_knows_the_reader_side_of_the_cache_alone() -> None:
    reached = set().union(*(foreign(path) for path in files("function")))
    assert reached <= READER_SIDE


def test_how_settings_are_read_is_one_file_that_knows_nothing_else() -> None:
    ours, theirs = ROOT / "knative/environment.py", ROOT / "weights_cache/environment.py"
    assert ours.resolve() == theirs
    assert not {name for name in imports(theirs) if name.split(".")[0] in PACKAGES}


def test_the_queue_source_knows_nothing_of_the_platform() -> None:
    ours = {name for path in files("knative/queue_source") for name in imports(path) if name.split(".")[0] == "knative"}
    assert {name for name in ours if not name.startswith("knative.queue_source")} <= {"knative", "knative.environment"}


def test_the_command_line_imports_no_command_until_it_is_called() -> None:
    assert not foreign(ROOT / DOOR)


def test_only_the_comparison_with_reality_starts_a_platform() -> None:
    reached = {path.name for path in files("knative/simulator") if any(name.startswith("knative.local") for name in imports(path))}
    assert reached <= {"validate.py"}


def test_only_restore_and_agents_import_torch() -> None:
    known = {
        str(path.relative_to(ROOT)) for package in PACKAGES for path in files(package) if {"torch", "torch.nn.functional"} & imports(path)
    }
    others = {path for path in known if not path.startswith(("function/agents/", "weights_cache/restore/"))}
    assert others == {"weights_cache/reader.py"}  # for its annotations alone


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        pytest.param(
            "import function.server, function.app",
            {"torch", "boto3", "botocore", "knative"},
            id="the function opens its port without torch",
        ),
        pytest.param(
            "import weights_cache.sidecar, weights_cache.store", {"torch", "flask", "numpy", "boto3"}, id="the sidecar needs no torch"
        ),
        pytest.param("import function.agents.echo", {"torch", "boto3"}, id="an agent without torch never imports it"),
        pytest.param(
            "import knative.cli", {"torch", "boto3", "aiohttp", "pydantic", "yaml", "rich", "numpy"}, id="the command line starts fast"
        ),
        pytest.param("import knative.simulator", {"torch", "aiohttp", "pydantic", "matplotlib"}, id="a simulation needs numpy alone"),
        pytest.param(
            "import knative.queue_source.cli, knative.queue_source.source, knative.queue_source.sqs",
            {"torch", "flask", "aiohttp", "pydantic", "yaml", "rich", "pika", "function", "weights_cache"},
            id="the queue source needs boto3 and little else",
        ),
    ],
)
def test_importing_a_program_leaves_out_what_it_does_not_need(program: str, absent: set[str]) -> None:
    code = f"{program}\nimport sys\nprint(*sorted({absent!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert found == []
