"""The requests that wait for a pod of one revision: first come, first served."""

import asyncio
from collections import deque
from collections.abc import Callable

from knative.local.errors import Overloaded
from knative.local.pod import Pod

QUEUE_LIMIT = 10_000  # requests that may wait for a pod, as in Knative's activator

Turn = asyncio.Future[Pod]


class Waiting:
    """Whoever waits has a turn: a future of the pod that it gets, or of the error that it is told."""

    def __init__(self, name: str) -> None:
        """name: of the Service, in an error."""
        self._name = name
        self._turns: deque[Turn] = deque()

    def __len__(self) -> int:
        return len(self._turns)

    async def wait(self, waits: Callable[[], object]) -> Pod:
        """A pod, with a place in it. waits: called once this request waits. Raises Overloaded, or what `fail` is given."""
        if len(self._turns) >= QUEUE_LIMIT:
            raise Overloaded(f"{QUEUE_LIMIT} requests are waiting for {self._name} already", retry_after_s=1)
        turn: Turn = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        waits()
        try:
            return await turn
        except asyncio.CancelledError:
            # The caller went away: forget it, or pass on the place that it was just given.
            if turn.done() and not turn.cancelled() and not turn.exception():
                turn.result().leave()
            else:
                self._forget(turn)
            raise

    def serve(self, take: Callable[[], Pod | None]) -> None:
        """Give a pod to each in turn, as long as `take` has one with room."""
        while self._turns:
            if self._turns[0].done():
                self._turns.popleft()
            elif pod := take():
                pod.enter()
                self._turns.popleft().set_result(pod)
            else:
                return

    def fail(self, error: Exception) -> None:
        """Tell everybody."""
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_exception(error)

    def leave(self) -> deque[Turn]:
        """All turns, which are somebody else's from now on: nothing of their requests has reached a pod."""
        turns, self._turns = self._turns, deque()
        return turns

    def join(self, turn: Turn) -> None:
        """One more, who has waited for another revision until now."""
        self._turns.append(turn)
        turn.add_done_callback(self._forget)

    def _forget(self, turn: Turn) -> None:
        if turn in self._turns:
            self._turns.remove(turn)
