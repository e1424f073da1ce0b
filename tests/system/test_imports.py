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
# The one package that every other may know: how settings are read and told.
SHARED = {"weights_cache", "weights_cache.environment"}


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
                if any(
                    (ROOT / (node.module or "").replace(".", "/") / name).exists()
                    for name in (f"{alias.name}.py", f"{alias.name}/__init__.py")
                )
            }
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def foreign(path: Path) -> set[str]:
    """Modules of our other packages that a file imports."""
    own = path.relative_to(ROOT).parts[0]
    return {name for name in imports(path) if name.split(".")[0] in PACKAGES and name.split(".")[0] != own}


def strangers(package: str, known: set[str]) -> dict[str, set[str]]:
    """The files of a package that import anything of another one but what is known."""
    found = {str(path.relative_to(ROOT)): foreign(path) - known for path in files(package) if path.relative_to(ROOT) != DOOR}
    return {path: names for path, names in found.items() if names}


def test_the_cache_knows_no_other_package() -> None:
    assert strangers("weights_cache", set()) == {}


def test_the_platform_knows_how_settings_are_read_and_no_other_package() -> None:
    assert strangers("knative", SHARED) == {}


def test_the_function_knows_the_reader_side_of_the_cache_alone() -> None:
    reached = set().union(*(foreign(path) for path in files("function")))
    assert reached <= READER_SIDE


def test_what_every_package_shares_knows_nothing_of_ours() -> None:
    shared = files("weights_cache/environment")
    ours = {name for path in shared for name in imports(path) if name.split(".")[0] in PACKAGES}
    assert all(name.startswith("weights_cache.environment") for name in ours)
    assert not [path for path in (ROOT / package for package in PACKAGES) for link in path.rglob("*") if link.is_symlink()]


def test_the_queue_source_knows_nothing_of_the_platform() -> None:
    ours = {name for path in files("knative/queue_source") for name in imports(path) if name.split(".")[0] == "knative"}
    assert {name for name in ours if not name.startswith("knative.queue_source")} <= {"knative"}


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
    assert others == {"weights_cache/devices.py", "weights_cache/reader.py"}  # for their annotations alone


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
            {"torch", "flask", "aiohttp", "pydantic", "yaml", "rich", "pika", "function", "weights_cache.store", "weights_cache.settings"},
            id="the queue source needs boto3 and little else",
        ),
    ],
)
def test_importing_a_program_leaves_out_what_it_does_not_need(program: str, absent: set[str]) -> None:
    code = f"{program}\nimport sys\nprint(*sorted({absent!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert found == []
