"""How many requests a revision has at once: a time-weighted average, as Knative's queue-proxy and activator report it."""

from collections.abc import Callable


class ConcurrencyMeter:
    """Counts requests in the system (waiting or with a pod) and averages them over the time between two reports. Times in seconds.

    A request whose caller has yet to send it is none: it asks nothing of anybody.
    """

    def __init__(self, now: float) -> None:
        self.current = 0
        self.total = 0  # requests since the start
        self._area = 0.0  # request-seconds since the last report
        self._changed_at = now
        self._reported_at = now
        self._reported_total = 0

    def arrive(self, now: float) -> None:
        """One request more."""
        self._advance(now)
        self.current += 1
        self.total += 1

    def leave(self, now: float) -> None:
        """One request less."""
        self._advance(now)
        self.current -= 1

    def report(self, now: float) -> tuple[float, float]:
        """Requests at once, averaged since the last report, and requests that came per second since then."""
        self._advance(now)
        span_s = now - self._reported_at
        if span_s <= 0:
            return float(self.current), 0.0
        result = self._area / span_s, (self.total - self._reported_total) / span_s
        self._area, self._reported_at, self._reported_total = 0.0, now, self.total
        return result

    def _advance(self, now: float) -> None:
        self._area += self.current * (now - self._changed_at)
        self._changed_at = now


class Load:
    """What one request is to its revision's meter: nothing until `count`, and nothing after `end`. Times in seconds."""

    def __init__(self, meter: ConcurrencyMeter, now: Callable[[], float]) -> None:
        self._meter = meter
        self._now = now
        self._is_counted = self._is_over = False

    def count(self) -> None:
        """All of it is there, or so much that it is worked on."""
        if not self._is_counted and not self._is_over:
            self._is_counted = True
            self._meter.arrive(self._now())

    def end(self) -> float:
        """It is over; when."""
        now = self._now()
        self._is_over = True
        if self._is_counted:
            self._meter.leave(now)
        else:
            self._meter.total += 1
        return now
