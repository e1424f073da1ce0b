"""When a pod is taken for one that hangs."""

from collections.abc import Sequence

import pytest

from knative.local.breaker import Breaker

LIMIT_S = 60.0
ANSWER = None  # among the seconds that the pod had requests for which timed out


@pytest.mark.parametrize(
    ("events", "hangs"),
    [
        pytest.param([60, 60], False, id="a few that are late may be slow"),
        pytest.param([60, 60, 60], True, id="one after the other without an answer"),
        pytest.param([60, ANSWER, 60, 60], False, id="an answer to others begins the count again"),
        pytest.param([60, ANSWER, 60, 60, 60], True, id="after its last answer"),
        pytest.param([1, 2, 3, 4, 5], False, id="those that had waited nearly all their time say little"),
        pytest.param([60, 1, 1], True, id="beside one that had its time they count"),
        pytest.param([1, 1, 60], True, id="in any order"),
        pytest.param([60, 1, ANSWER, 1, 1, 1], False, id="not beside one before the last answer"),
    ],
)
def test_a_pod_hangs_if_it_lets_three_in_a_row_time_out(events: Sequence[float | None], hangs: bool) -> None:
    breaker, tripped = Breaker(), []
    for event in events:
        if event is ANSWER:
            breaker.answered()
        else:
            tripped.append(breaker.timed_out(event, LIMIT_S))
    assert (tripped[-1], any(tripped[:-1])) == (hangs, False)


def test_another_process_begins_anew() -> None:
    breaker = Breaker()
    for _ in range(2):
        breaker.timed_out(60, LIMIT_S)
    breaker.reset()
    assert not breaker.timed_out(60, LIMIT_S)
