"""The platform's `/metrics`: what each Service and each queue source does, in Prometheus' text format."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from knative.local.outcomes import name
from knative.local.pod import Phase
from knative.local.queue_watch import QueueWatch
from knative.local.service import LiveService

LABELS = ["namespace", "service"]
REVISION = [*LABELS, "revision"]
SOURCE = ["namespace", "source"]


class Metrics:
    """Reads the Services and the queues when somebody asks; keeps nothing."""

    def __init__(self, services: Iterable[LiveService], queues: QueueWatch) -> None:
        """services: as many as there are whenever they are asked for."""
        self._services = services
        self._queues = queues

    def text(self) -> bytes:
        """Everything."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """One family after the other."""
        yield from self._of_services()
        yield from self._of_sources()

    def _of_sources(self) -> Iterator[Metric]:
        done = CounterMetricFamily("relight_queue_source_done", "Messages that are done with.", labels=SOURCE)
        retried = CounterMetricFamily("relight_queue_source_retried", "Deliveries that were to be tried again.", labels=SOURCE)
        waiting = GaugeMetricFamily("relight_queue_source_depth", "Messages that wait in the queue.", labels=SOURCE)
        in_flight = GaugeMetricFamily(
            "relight_queue_source_in_flight", "Messages that somebody has taken and not yet deleted.", labels=SOURCE
        )
        oldest = GaugeMetricFamily("relight_queue_source_oldest_age_seconds", "Age of the oldest message in the queue.", labels=SOURCE)
        dead = GaugeMetricFamily("relight_queue_source_dead", "Messages in the dead-letter queue.", labels=SOURCE)
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {
            "done": done,
            "retried": retried,
            "depth": waiting,
            "in_flight": in_flight,
            "oldest_age_s": oldest,
            "dead": dead,
        }
        for source in self._queues.status()[0]:
            for figure, family in families.items():
                if source[figure] is not None:
                    family.add_metric([source["namespace"], source["name"]], source[figure])
        yield from families.values()

    def _of_services(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "relight_requests",
            "Requests that are over, by the status of the answer and who made it; 499: the caller went away before there was one.",
            labels=[*LABELS, "code", "source"],
        )
        concurrency = GaugeMetricFamily("relight_concurrency", "Requests in the system, those that wait included.", labels=LABELS)
        queued = GaugeMetricFamily("relight_queued", "Requests that wait for a pod.", labels=LABELS)
        desired = GaugeMetricFamily("relight_desired_pods", "Pods that the autoscaler wants.", labels=LABELS)
        hung = CounterMetricFamily("relight_hung_pods", "Pods that answered nobody any more and were replaced.", labels=LABELS)
        failed = CounterMetricFamily(
            "relight_failed_starts", "Pods that did not become ready, for the first time or again, and were given up.", labels=LABELS
        )
        pods = GaugeMetricFamily("relight_pods", "Pods by phase.", labels=[*LABELS, "phase"])
        latency = HistogramMetricFamily("relight_request_seconds", "From a request's headers to the end of its answer.", labels=LABELS)
        cold = HistogramMetricFamily("relight_cold_start_seconds", "From a pod asked for to a pod ready.", labels=LABELS)
        weights = CounterMetricFamily(
            "relight_weights_starts", "Pods that became ready, by where their weights came from.", labels=[*LABELS, "source"]
        )
        share = GaugeMetricFamily("relight_revision_traffic_percent", "Percent of the requests that a revision is given.", labels=REVISION)
        given = CounterMetricFamily(
            "relight_revision_requests", "The same of each revision that is still known.", labels=[*REVISION, "code", "source"]
        )
        ready = GaugeMetricFamily("relight_revision_ready_pods", "Pods of a revision that are ready.", labels=REVISION)
        for live in self._services:
            record, labels = live.record, [live.service.namespace, live.service.name]
            phases = Counter(pod.phase for pod in live.pods)
            for (code, source), count in record.outcomes.counts.items():
                requests.add_metric([*labels, name(code), source], count)
            concurrency.add_metric(labels, live.concurrency)
            queued.add_metric(labels, live.queued)
            desired.add_metric(labels, live.desired)
            hung.add_metric(labels, record.hung_total)
            failed.add_metric(labels, record.failed_starts)
            for phase in get_args(Phase):
                pods.add_metric([*labels, phase], phases[phase])
            for family, histogram in ((latency, record.latencies.histogram), (cold, record.cold_start_s)):
                family.add_metric(labels, histogram.buckets(), histogram.total_s)
            for place, count in record.weights.items():
                weights.add_metric([*labels, place], count)
            for revision, percent in live.shares.items():
                share.add_metric([*labels, revision], percent)
                ready.add_metric([*labels, revision], sum(pod.phase == "ready" for pod in live.revisions[revision].pods))
                for (code, source), count in record.outcomes.of(revision).items():
                    given.add_metric([*labels, revision, name(code), source], count)
        yield from (requests, concurrency, queued, desired, hung, failed, pods, latency, cold, weights, share, given, ready)
