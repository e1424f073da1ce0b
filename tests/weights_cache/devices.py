"""The devices that tests of restoring run on: the host's own memory, and a GPU where there is one."""

import pytest
import torch

SMALL = {"copiers": 2, "slot_bytes": 64 << 10}  # a ring that small models go round several times

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
DEVICES = [
    pytest.param(("host", "host:1"), id="host"),
    pytest.param(("cuda:0", "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"), id="cuda", marks=[pytest.mark.gpu, needs_gpu]),
]
