"""What the function tells Prometheus."""

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from function.model import Model

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """One registry for one function."""

    def __init__(self, model: Model, model_name: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter that nobody asks for
        self._registry = CollectorRegistry()
        self._registry.register(_ModelCollector(model, model_name))
        self.requests = Counter("function_requests", "Requests answered.", ["route", "code"], registry=self._registry)
        self.seconds = Histogram(
            "function_request_seconds", "Seconds to answer a request.", ["route"], buckets=_SECONDS, registry=self._registry
        )
        self.instances = Counter("function_instances", "Inputs handed to the model.", registry=self._registry)

    def text(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self._registry)


class _ModelCollector(Collector):
    """Reads the model's state when it is asked, so that nothing has to be kept in step."""

    def __init__(self, model: Model, model_name: str) -> None:
        self._model = model
        self._name = model_name

    def collect(self) -> Iterator[Metric]:
        status: dict[str, Any] = self._model.status()
        yield _gauge("function_ready", "Whether the function takes traffic.", [({"model": self._name}, status["phase"] == "ready")])
        yield _gauge("function_weights_bytes", "Bytes of the weights that are there.", [({"model": self._name}, status["restored_bytes"])])
        yield _gauge(
            "function_cold_start_seconds",
            "Seconds from the process's start to the end of each stage.",
            [({"model": self._name, "stage": stage}, seconds) for stage, seconds in status["stages"].items()],
        )


def _gauge(name: str, text: str, samples: Iterable[tuple[dict[str, str], float]]) -> GaugeMetricFamily:
    rows = list(samples)
    family = GaugeMetricFamily(name, text, labels=list(rows[0][0]) if rows else [])
    for labels, value in rows:
        family.add_metric(list(labels.values()), value)
    return family
