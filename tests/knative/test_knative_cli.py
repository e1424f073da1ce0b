"""The command `relight` itself."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("words", "module", "extra"), [("cluster render", "yaml", "cluster"), ("simulate", "numpy", "simulator")])
def test_a_command_whose_packages_are_not_installed_names_the_extra(words: str, module: str, extra: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from knative.cli import main; main({words.split()!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(f"pip install 'relight[{extra}]'"), done.stderr
    assert "Traceback" not in done.stderr
