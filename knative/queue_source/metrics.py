"""What the queue source counts, as Prometheus metrics."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody asks for


class Metrics:
    """Counters, and gauges that are read when somebody asks."""

    def __init__(self, gauges: Callable[[], dict[str, float]]) -> None:
        """gauges: the values of `held`, `busy`, `held_bytes`, `oldest_held_seconds` and `paused`."""
        self._registry = CollectorRegistry()
        self._gauges = gauges
        self.received = self._counter("received", "Messages received, each as often as it was delivered.")
        self.done = self._counter("done", "Messages that the sink took and that were deleted.")
        self.retried = self._counter(
            "retried", "Posts that are made again because the sink was busy or away; the message is kept meanwhile."
        )
        self.given_back = self._counter("given_back", "Messages given back to the queue: failed, or held when the source stopped.")
        self.poison = self._counter("poison", "Messages that can never succeed, given back for the redrive policy.")
        self.results = self._counter("results", "Reply events sent to the results queue.")
        self.lost = self._counter("lost", "Messages whose visibility ran out while they were held; they are delivered again.")
        self.repeated = self._counter("repeated", "Deliveries of a message that was held or just done; they are not posted.")
        self.queue_errors = self._counter("queue_errors", "Calls of the queue's service that failed.")
        self._registry.register(self)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"queue_source_{name}", text, registry=self._registry)

    def collect(self) -> Iterable[Metric]:
        """The gauges."""
        texts = {
            "held": "Messages that are held.",
            "busy": "Messages that are being posted.",
            "held_bytes": "Bytes of messages that are held, and of what was fetched for them.",
            "oldest_held_seconds": "For how long the oldest held message has been so.",
            "paused": "Whether nothing is pulled because the sink is busy or away.",
        }
        found = self._gauges()
        return [GaugeMetricFamily(f"queue_source_{name}", text, value=found[name]) for name, text in texts.items()]

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)
