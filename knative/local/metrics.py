"""The platform's `/metrics`: what each Service does, in Prometheus' text format."""

from collections.abc import Iterable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from knative.local.pod import Phase
from knative.local.revision import Revision

LABELS = ["namespace", "service"]


class Metrics:
    """Reads the revisions when somebody asks; keeps nothing."""

    def __init__(self, revisions: Iterable[Revision]) -> None:
        self._revisions = list(revisions)

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
        for revision in self._revisions:
            record, labels = revision.record, [revision.service.namespace, revision.service.name]
            requests.add_metric(labels, revision.meter.total)
            concurrency.add_metric(labels, revision.meter.current)
            queued.add_metric(labels, revision.queued)
            desired.add_metric(labels, revision.desired)
            hung.add_metric(labels, record.hung_total)
            for phase in get_args(Phase):
                pods.add_metric([*labels, phase], sum(pod.phase == phase for pod in revision.pods))
            for family, histogram in ((latency, record.latencies.histogram), (cold, record.cold_start_s)):
                family.add_metric(labels, histogram.buckets(), histogram.total_s)
            for source, count in record.weights.items():
                weights.add_metric([*labels, source], count)
        yield from (requests, concurrency, queued, desired, hung, pods, latency, cold, weights)
