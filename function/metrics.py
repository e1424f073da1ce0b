"""What the function tells Prometheus."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from function.model import Model
from function.runner import Observer
from function.streams import Made

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics(Observer):
    """One registry for one function; it watches the model."""

    def __init__(self, model: Model, model_name: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter that nobody asks for
        self.registry = CollectorRegistry()
        self.registry.register(_ModelCollector(model, model_name, lambda: self.fast_path))
        requests = Counter("function_requests", "Requests answered.", ["route", "code"], registry=self.registry)
        seconds = Histogram("function_request_seconds", "Seconds to answer a request.", ["route"], buckets=_SECONDS, registry=self.registry)
        # Of routes and codes there are few.
        self.requests: Callable[[str, int], Counter] = functools.cache(lambda route, code: requests.labels(route, str(code)))
        self.seconds: Callable[[str], Histogram] = functools.cache(seconds.labels)
        self.fast_path = 0  # predictions that the loop took in; it alone counts them
        self.instances = Counter("function_instances", "Inputs handed to the model.", registry=self.registry)
        self.first_piece = Histogram(
            "function_first_piece_seconds",
            "Seconds from a request to the first piece of its stream.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.duplicates = Counter(
            "function_event_duplicates",
            "Repeated events that got the reply of the first one, which was remembered, or was being made and was waited for (joined).",
            ["reply"],
            registry=self.registry,
        )
        for how in ("remembered", "joined"):
            self.duplicates.labels(how)
        self.duplicates_waiting = Gauge(
            "function_event_duplicates_waiting", "Repeated events that wait for what becomes of the first one.", registry=self.registry
        )
        self._remembered = Gauge("function_event_memory_entries", "Finished events that are remembered.", registry=self.registry)
        self._remembered_bytes = Gauge("function_event_memory_bytes", "Bytes of their replies.", registry=self.registry)
        self._batch_inputs = Histogram("function_batch_inputs", "Inputs in a batch.", buckets=_SIZES, registry=self.registry)
        self._model_seconds = Histogram("function_model_seconds", "Seconds of a batch.", buckets=_SECONDS, registry=self.registry)
        self._queue_seconds = Histogram(
            "function_queue_seconds", "Seconds that a call waited for the model.", buckets=_SECONDS, registry=self.registry
        )
        self._steps = Histogram("function_step_sequences", "Streams that shared a step.", buckets=_SIZES, registry=self.registry)
        self._step_seconds = Counter("function_step_seconds", "Seconds spent in steps.", registry=self.registry)
        self._pieces = Counter("function_pieces", "Pieces of streams that were made for callers.", registry=self.registry)
        model.observe(self)

    def watch_memory(self, kept: Callable[[], tuple[int, int]]) -> None:
        """kept: how many events are remembered, and their bytes."""
        self._remembered.set_function(lambda: kept()[0])
        self._remembered_bytes.set_function(lambda: kept()[1])

    def batch(self, inputs: int, seconds: float, waited_s: Sequence[float]) -> None:
        """The model predicted."""
        self._batch_inputs.observe(inputs)
        self._model_seconds.observe(seconds)
        for wait_s in waited_s:
            self._queue_seconds.observe(wait_s)

    def step(self, made: Made, seconds: float) -> None:
        """The model went on with streams."""
        self._steps.observe(made.sequences)
        self._step_seconds.inc(seconds)
        self._pieces.inc(made.pieces)

    def text(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self.registry)


class _ModelCollector(Collector):
    """Reads the model's state when it is asked, so that nothing has to be kept in step."""

    def __init__(self, model: Model, model_name: str, fast_path: Callable[[], int]) -> None:
        self._fast_path = fast_path
        self._model = model
        self._name = model_name

    def collect(self) -> Iterator[Metric]:
        status: dict[str, Any] = self._model.status()
        yield _gauge("function_ready", "Whether the function takes traffic.", [({"model": self._name}, status["phase"] == "ready")])
        yield _gauge("function_weights_bytes", "Bytes of the weights that are there.", [({"model": self._name}, status["restored_bytes"])])
        yield _gauge("function_waiting", "Requests that wait for the model.", [({"model": self._name}, self._model.batcher.waiting())])
        yield _gauge("function_active_streams", "Streams that are being made.", [({"model": self._name}, self._model.active_streams())])
        state = self._model.breaker.state
        yield _gauge(
            "function_breaker_state",
            "1 for the state the breaker is in.",
            [({"model": self._name, "state": name}, state == name) for name in ("closed", "open", "half-open")],
        )
        trips = CounterMetricFamily("function_breaker_trips", "Times the breaker opened.", labels=["model"])
        trips.add_metric([self._name], self._model.breaker.trips)
        yield trips
        text = "Predictions that the loop took in without a thread of their own."
        yield CounterMetricFamily("function_fast_path", text, value=self._fast_path())
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
