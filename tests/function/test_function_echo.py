"""The agents without a model."""

import time

import pytest

from function.agent import BadInput
from function.agents.echo import Delay


def test_the_delay_agent_takes_as_long_as_the_longest_input_says() -> None:
    began = time.monotonic()
    assert Delay().predict([0.01, 0.05]) == [0.01, 0.05]
    assert time.monotonic() - began >= 0.05


@pytest.mark.parametrize("value", ["soon", None, True, -1, 3601, float("nan")])
def test_the_delay_agent_refuses_what_is_no_time(value: object) -> None:
    with pytest.raises(BadInput, match="must be a number of seconds"):
        Delay().predict([0, value])
