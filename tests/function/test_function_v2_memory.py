"""What a large binary tensor takes of the server's memory, as `bench/v2_binary.py` measures it."""

from functools import partial

import numpy as np
import pytest

from bench.v2_binary import by_tritonclient, function, peak_growth, timed, to_function, worker_of
from tests.support import free_port


@pytest.mark.soak
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # the benchmark leaves its connections to the garbage collector
@pytest.mark.parametrize(("agent", "wants_array"), [("Sum", False), ("Same", True)])
def test_thirteen_mebibytes_take_three_times_their_size_at_most(agent: str, wants_array: bool) -> None:
    tensor, port = np.ones((1, 3328 << 10), np.float32), free_port()
    with function(agent, port, tensor.nbytes) as server:
        calls = [make(port, tensor, wants_array=wants_array) for make in (to_function, by_tritonclient)]
        timed(calls, 1)
        assert peak_growth(worker_of(server.pid), partial(timed, calls, 2)) < 3 * tensor.nbytes * (1 + wants_array)
