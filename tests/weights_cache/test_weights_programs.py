"""What each side of the cache imports: a sidecar stays small, and a function starts without what it does not use."""

import subprocess
import sys

import pytest

from tests.support import ROOT


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        pytest.param("weights_cache.reader", {"torch", "boto3", "botocore", "click"}, id="the reader"),
        pytest.param("weights_cache.cache", {"torch", "boto3", "botocore"}, id="the cache"),
        pytest.param("weights_cache.fetch", {"torch", "boto3", "botocore"}, id="fetching"),
        pytest.param("weights_cache.sidecar", {"torch", "safetensors", "boto3", "botocore"}, id="the sidecar, until it asks the store"),
        pytest.param("weights_cache.cli", {"torch", "boto3", "botocore", "rich"}, id="the command line, until it is used"),
    ],
)
def test_a_module_imports_only_what_it_needs(module: str, absent: set[str]) -> None:
    code = f"import {module}, sys\nprint(*sorted({absent!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert found == []


def test_a_reader_without_weights_never_imports_torch() -> None:
    code = """
import sys, pathlib
from weights_cache.reader import Weights
from weights_cache.settings import WeightsSettings
weights = Weights(WeightsSettings(cache_dir=pathlib.Path("/nowhere")))
print(len(weights), weights.restored().bytes, "torch" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert found == ["0", "0", "False"]
