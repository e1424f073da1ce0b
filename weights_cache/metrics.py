"""What the sidecar counts, as Prometheus metrics."""

from collections import Counter as Counts
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from weights_cache.keeper import Keeper, Pulled
from weights_cache.resident import Residents

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody asks for

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """Counters that `count` moves after each pull, and gauges that are read when somebody asks."""

    def __init__(self, keepers: Callable[[], Iterable[Keeper]], residents: Residents) -> None:
        self._registry = CollectorRegistry()
        self._keepers = keepers
        self._residents = residents
        self._bytes = self._counter("bytes", "Bytes that pulls brought or found, by where from: store, neighbour, cache.", ["source"])
        self._hits = self._counter("hits", "Pulls that found everything in the cache.")
        self._misses = self._counter("misses", "Pulls that had to bring something.")
        self._failures = self._counter("failures", "Pulls that failed; each is tried again.")
        self._waits = self._counter("waits", "Pulls that waited for another process that was fetching the same files.")
        self._waited = self._counter("wait_seconds", "Seconds spent waiting for other processes.")
        self._evictions = self._counter("evictions", "Snapshots that were evicted to make room.")
        self._damage = self._counter("verify_failures", "Chunks that did not have the digest they should have.")
        self._stale = self._counter("stale", "Pulls that used the cache because the store could not be reached.")
        self._cold = Histogram(
            "weights_cache_cold_start_seconds",
            "Seconds from the beginning of a pull that had to bring something until everything was there.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        for source in ("store", "neighbour", "cache"):
            self._bytes.labels(source)
        self._registry.register(self)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"weights_cache_{name}", text, labels, registry=self._registry)

    def count(self, pulled: Pulled) -> None:
        """Take what one pull did into account, also if it failed at last."""
        brought = pulled.store_bytes + pulled.neighbour_bytes
        self._bytes.labels("store").inc(pulled.store_bytes)
        self._bytes.labels("neighbour").inc(pulled.neighbour_bytes)
        self._waits.inc(bool(pulled.waited_s))
        self._waited.inc(pulled.waited_s)
        self._evictions.inc(pulled.evicted)
        self._damage.inc(pulled.damaged)
        if pulled.failed:
            self._failures.inc()
            return
        self._bytes.labels("cache").inc(pulled.cached_bytes)  # not before: a pull that is repeated finds them each time
        (self._misses if brought else self._hits).inc()
        self._stale.inc(pulled.stale)
        if brought:
            self._cold.observe(pulled.seconds)

    def collect(self) -> Iterable[Metric]:
        """The gauges, and what the resident tier counts by itself."""
        ready = GaugeMetricFamily("weights_cache_ready", "Whether the weights are complete in the cache.", labels=["uri"])
        there = GaugeMetricFamily("weights_cache_present_bytes", "Bytes of the weights that are in the cache.", labels=["uri"])
        total = GaugeMetricFamily("weights_cache_total_bytes", "Bytes of the weights.", labels=["uri"])
        rate = GaugeMetricFamily("weights_cache_bytes_per_second", "Bytes fetched per second, over the last pull.", labels=["uri"])
        for keeper in self._keepers():
            row = keeper.row()
            ready.add_metric([keeper.uri], int(keeper.ready))
            there.add_metric([keeper.uri], row.get("bytes", 0))
            total.add_metric([keeper.uri], row.get("total_bytes", 0))
            rate.add_metric([keeper.uri], row.get("bytes_per_second", 0))
        stays = GaugeMetricFamily("weights_resident_bytes", "Bytes of weights that stay in a device's memory.", labels=["device", "uri"])
        sizes: Counts[tuple[str, str]] = Counts()
        for one in self._residents.rows():
            sizes[one["device"], one["uri"]] += one["bytes"]
        for labels, size in sizes.items():
            stays.add_metric(labels, size)
        events = CounterMetricFamily(
            "weights_resident_events", "Weights that were kept on a device, refused, attached, missed, evicted.", labels=["event"]
        )
        for event, count in self._residents.counts.items():
            events.add_metric([event], count)
        return [ready, there, total, rate, stays, events]

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)
