"""The platform's `/metrics`: what each Service does, in Prometheus' text format."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from knative.local.pod import Phase
from knative.local.service import LiveService

LABELS = ["namespace", "service"]
REVISION = [*LABELS, "revision"]


class Metrics:
    """Reads the Services when somebody asks; keeps nothing."""

    def __init__(self, services: Iterable[LiveService]) -> None:
        """services: as many as there are whenever they are asked for."""
        self._services = services

    def text(self) -> bytes:
        """Everything."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """One family after the other."""
        requests = CounterMetricFamily("relight_requests", "Requests that came.", labels=LABELS)
        concurrency = GaugeMetricFamily("relight_concurrency", "Requests in the system, those that wait included.", labels=LABELS)
        queued = GaugeMetricFamily("relight_queued", "Requests that wait for a pod.", labels=LABELS)
        desired = GaugeMetricFamily("relight_desired_pods", "Pods that the autoscaler wants.", labels=LABELS)
        hung = CounterMetricFamily("relight_hung_pods", "Pods that answered nobody any more and were replaced.", labels=LABELS)
        pods = GaugeMetricFamily("relight_pods", "Pods by phase.", labels=[*LABELS, "phase"])
        latency = HistogramMetricFamily("relight_request_seconds", "From a request's headers to the end of its answer.", labels=LABELS)
        cold = HistogramMetricFamily("relight_cold_start_seconds", "From a pod asked for to a pod ready.", labels=LABELS)
        weights = CounterMetricFamily(
            "relight_weights_starts", "Pods that became ready, by where their weights came from.", labels=[*LABELS, "source"]
        )
        share = GaugeMetricFamily("relight_revision_traffic_percent", "Percent of the requests that a revision is given.", labels=REVISION)
        given = CounterMetricFamily("relight_revision_requests", "Requests that came for a revision that is still known.", labels=REVISION)
        ready = GaugeMetricFamily("relight_revision_ready_pods", "Pods of a revision that are ready.", labels=REVISION)
        for live in self._services:
            record, labels = live.record, [live.service.namespace, live.service.name]
            phases = Counter(pod.phase for pod in live.pods)
            requests.add_metric(labels, live.requests_total)
            concurrency.add_metric(labels, live.concurrency)
            queued.add_metric(labels, live.queued)
            desired.add_metric(labels, live.desired)
            hung.add_metric(labels, record.hung_total)
            for phase in get_args(Phase):
                pods.add_metric([*labels, phase], phases[phase])
            for family, histogram in ((latency, record.latencies.histogram), (cold, record.cold_start_s)):
                family.add_metric(labels, histogram.buckets(), histogram.total_s)
            for source, count in record.weights.items():
                weights.add_metric([*labels, source], count)
            for name, percent in live.shares.items():
                share.add_metric([*labels, name], percent)
                given.add_metric([*labels, name], live.revisions[name].meter.total)
                ready.add_metric([*labels, name], live.revisions[name].ready)
        yield from (requests, concurrency, queued, desired, hung, pods, latency, cold, weights, share, given, ready)
