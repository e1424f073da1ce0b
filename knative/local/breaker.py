"""Tells a pod that hangs from one that is slow."""

TIME_OUTS = 3  # in a row


class Breaker:
    """Counts the requests of one pod that timed out before the first byte of an answer.

    It trips at TIME_OUTS of them in a row, if the pod had at least one of them for most of the time that a request has. Any first byte
    of any answer, an error's too, begins the count again: one request that takes for ever does not speak against a pod that answers
    others. A request that waited so long for its turn that the pod had no time left says little; alone such never trip it, so that a
    pod that works, but has more to do than it can, is left to. Callers that go away by themselves are not counted.
    """

    def __init__(self) -> None:
        self.has_answered = False
        self._time_outs = 0
        self._had_time = False

    def answered(self) -> None:
        """The first byte of an answer came."""
        self.has_answered = True
        self.reset()

    def reset(self) -> None:
        """Begin to count again: another process may answer from now on."""
        self._time_outs = 0
        self._had_time = False

    def timed_out(self, had_s: float, limit_s: float) -> bool:
        """A request timed out that the pod had for `had_s` of its `limit_s` seconds; whether the pod hangs."""
        self._time_outs += 1
        self._had_time |= had_s > limit_s / 2
        return self._had_time and self._time_outs >= TIME_OUTS
