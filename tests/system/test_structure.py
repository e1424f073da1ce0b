"""What the code as a whole keeps to: classes that can be read, and an owner for each task and thread."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGES = ("function", "knative", "weights_cache")
MOST_METHODS = 20
# Where tasks and threads may be begun: in what owns them, is told of their end, and ends them.
TASK_OWNERS = {"knative/local/tasks.py"}
THREAD_OWNERS = {
    "function/ending.py",  # what ends the process
    "function/failing.py",
    "function/log.py",
    "function/runner.py",
    "function/tracing.py",
    "function/worker.py",
    "knative/local/embedded_server.py",
    "knative/local/queue_watch.py",
    "knative/queue_source/threads.py",
    "weights_cache/threads.py",
}
BEGIN_TASKS = {"create_task", "ensure_future", "run_coroutine_threadsafe"}
BEGIN_THREADS = {"Thread", "Timer", "ThreadPoolExecutor", "start_new_thread", "ThreadingHTTPServer", "ThreadingMixIn"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def name_of(called: ast.expr) -> str:
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


def begun(tree: ast.Module, names: set[str]) -> list[str]:
    """Calls of these, and classes that are made of them."""
    calls = [name_of(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    bases = [name_of(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases]
    return [name for name in (*calls, *bases) if name in names]


@pytest.mark.parametrize(
    ("names", "owners"), [pytest.param(BEGIN_TASKS, TASK_OWNERS, id="tasks"), pytest.param(BEGIN_THREADS, THREAD_OWNERS, id="threads")]
)
def test_every_task_and_every_thread_has_an_owner(names: set[str], owners: set[str]) -> None:
    found = {path for path, tree in modules() if begun(tree, names)}
    assert found == owners


def test_no_class_has_more_methods_than_can_be_kept_in_mind() -> None:
    sizes = {
        f"{path}: {node.name}": sum(isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) for one in node.body)
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert {name: size for name, size in sizes.items() if size > MOST_METHODS} == {}


def test_the_rule_finds_what_it_is_to_find() -> None:
    bare = ast.parse("asyncio.create_task(x())\nthreading.Thread(target=f).start()\nclass A(ThreadingMixIn): pass")
    assert (begun(bare, BEGIN_TASKS), begun(bare, BEGIN_THREADS)) == (["create_task"], ["Thread", "ThreadingMixIn"])
    assert Path(ROOT / "knative").is_dir()
